"""Try whether a run comes out the same under other layouts, before a big job.

Does the first steps of the run under one layout after another, with its own model, text and seed,
and compares losses, gradient norms and weights with one rank's run. Sequences are cut to unequal
lengths, so that a wrong weighting of tokens shows. Exit code 1 if any layout differs.
"""

from __future__ import annotations

import time
from collections.abc import Sequence
from pathlib import Path

import mpillm
from mpillm.cli.parser import Parser, integer, number
from mpillm.config import describe
from mpillm.errors import UserError
from mpillm.parallel.launch import agree, start
from mpillm.report.verification import HEADER, Row, line, markdown, summary
from mpillm.training.settings import RunConfig

__all__ = ["run"]

_EPILOG = """\
A layout of fewer ranks than were started runs on the first of them. A row of the table: the largest
differences of losses and gradient norms, relative, and of weights, as max|a - b| / (max|a| + sum of
learning rates); whether all bits are the same; milliseconds a step; the layout; bytes that the
busiest rank sends in a step, by axis.

In float32 Adam with its usual optimizer.eps of 1e-8 turns a gradient that is nothing but rounding
noise into a part of a full step, so single weights may differ where nothing is wrong. With
--optimizer.eps=1e-3 or --train.dtype=float64 they do not. The largest difference that passes is by
default 1e-10 in float64, 5e-5 in float32 and 2e-2 in bfloat16.

Settings, as for mpillm train:

"""


def run(arguments: Sequence[str]) -> int:
    """`mpillm verify-layouts CONFIG.toml ...`; rank 0 prints each row as soon as it is there."""
    options, overrides = _parser().parse_with_settings(arguments, RunConfig)
    given = vars(options)
    config, path = given.pop("config"), given.pop("markdown")
    world, rows = start(), list[Row]()
    for row in mpillm.verify_layouts(config, world, overrides=overrides, **given):
        if world.rank == 0:
            if not rows or row.variant != rows[-1].variant:
                print(*filter(None, ["", " ".join(row.variant), HEADER]), sep="\n")
            print(line(row), flush=True)
        rows.append(row)
    failed = any(row.failed for row in rows)
    with agree(world):
        if world.rank == 0:
            told = summary(rows, options.steps)
            print(f"\n{told}", flush=True)
            if path is not None:
                command = f"mpirun -n {world.size} mpillm verify-layouts {' '.join(arguments)}"
                _write(path, f"    {command}\n\n{told}\n\n{markdown(rows)}")
            if failed:  # a launcher may drop the last words when another rank ends with an error
                time.sleep(0.2)
    return int(failed)


def _write(path: Path, text: str) -> None:
    """Write the tables."""
    try:
        path.write_text(text, encoding="utf-8")
    except OSError as error:
        raise UserError(f"--markdown {path}: cannot be written: {error.strerror}") from None


def _parser() -> Parser:
    """The options: the arguments of `mpillm.verify_layouts`, which checks their values."""
    parser = Parser(
        "verify-layouts",
        __doc__,
        usage="mpillm verify-layouts CONFIG.toml [--ranks N,...] [--layouts LAYOUT ...] "
        "[--section.key=value ...]",
        epilog=_EPILOG + describe(RunConfig),
    )
    parser.add_argument("config", metavar="CONFIG.toml", type=Path, help="the settings of the run")

    def add(name: str, metavar: str, text: str, **options: object) -> None:
        parser.add_argument(name, metavar=metavar, help=text, **options)  # type: ignore[arg-type]

    add("--ranks", "N,...", "layouts of N ranks (default: of all there are)", type=_integers)
    add("--layouts", "LAYOUT", "try these, such as data=2,tensor=2,sequence=true", nargs="+")
    add("--using", "AXIS", "only layouts that cut these axes, such as expert", nargs="+")
    add("--vary", "SETTING", "try all values of settings: model.tied=true,false", nargs="+")
    parser.add_argument(
        "--pairs", action="store_true", help="only so many that every two choices meet in one"
    )
    add("--steps", "N", "steps to do (default: 3)", type=integer, default=3)
    add("--tolerance", "X", "largest difference (default: that of the dtype)", type=number)
    add("--results", "FILE", "rows done (default: verify-layouts.jsonl in run.dir)", type=Path)
    parser.add_argument("--fresh", action="store_true", help="run again what FILE has already")
    add("--markdown", "FILE", "write the table for a document", type=Path)
    parser.set_defaults(ranks=(), layouts=(), using=(), vary=())
    return parser


def _integers(text: str) -> list[int]:
    """The numbers in a list."""
    return [integer(part) for part in text.split(",")]
