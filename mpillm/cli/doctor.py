"""Tell what became of a run: where its ranks stood, who is at fault, what to do."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from mpillm.cli.parser import Parser, integer

__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """`mpillm doctor RUN [--attempt N]`; one process, without MPI."""
    parser = Parser("doctor", __doc__)
    parser.add_argument("run", metavar="RUN", type=Path, help="the run's folder")
    parser.add_argument(
        "--attempt", metavar="N", type=integer, help="which start of the run (default: the last)"
    )
    options = parser.parse(arguments)

    from mpillm.training.doctor import examine

    print("\n".join(examine(options.run, options.attempt)))
    return 0
