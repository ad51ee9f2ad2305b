"""Train a model, or resume the run in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mpillm
from mpillm.cli.parser import Parser
from mpillm.config import describe
from mpillm.errors import EXIT_REQUEUE
from mpillm.training.settings import RunConfig

__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """`mpillm train CONFIG.toml [--section.key=value ...] [--fresh]`; 85 when stopped and saved."""
    parser = Parser(
        "train",
        __doc__,
        usage="mpillm train CONFIG.toml [--section.key=value ...] [--fresh]",
        epilog="Settings, in the file or as options that override it (of the model, those of the "
        f"usual family):\n\n{describe(RunConfig)}",
    )
    parser.add_argument("config", metavar="CONFIG.toml", type=Path, help="the settings of the run")
    parser.add_argument(
        "--fresh", action="store_true", help="start over even where the run has checkpoints"
    )
    options, overrides = parser.parse_with_settings(arguments, RunConfig)
    result = mpillm.train(options.config, overrides=overrides, fresh=options.fresh)
    return EXIT_REQUEUE if result.stopped else 0
