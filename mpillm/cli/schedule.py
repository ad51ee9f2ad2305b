"""Draw a pipeline schedule's timeline, with its bubble and its peak activations."""

from __future__ import annotations

import argparse
import os
import shutil
import sys
from collections.abc import Sequence
from math import inf
from pathlib import Path
from typing import Any

from mpillm.cli.parser import Parser, integer, number
from mpillm.errors import UserError, did_you_mean
from mpillm.parallel.launch import rank_hint
from mpillm.parallel.programs import lower, validate
from mpillm.parallel.schedules import SCHEDULES
from mpillm.parallel.simulate import Costs, bubble_fraction, simulate
from mpillm.report.timeline import draw_png, draw_text, summarize

__all__ = ["run"]

# Forwards of all ranks; more take minutes, and no one could read them.
_MOST = 200_000


def run(arguments: Sequence[str]) -> int:
    """`mpillm schedule --stages P --micros M --name NAME ...`; rank 0 draws and prints."""
    options = _parser().parse(arguments)
    _check(options)
    name, size = options.name, (options.stages, options.micros, options.chunks)
    times = options.forward, options.backward, options.weight_gradient
    actions = SCHEDULES[name](*size)
    if rank_hint() > 0:
        return 0
    stages, micros, chunks = size
    programs = lower(actions, chunks)
    validate(programs, ranks=stages, micros=micros, chunks=chunks)
    timeline = simulate(programs, Costs.even(stages * chunks, *times))
    title = f"{name}: {_count(stages, 'rank')}, "
    title += f"{chunks} chunks a rank, " if chunks > 1 else ""
    title += _count(micros, "micro-batch", "es")
    colour = sys.stdout.isatty() and "NO_COLOR" not in os.environ
    width = shutil.get_terminal_size((100, 24)).columns
    text = draw_text(timeline, width, colour=colour)
    facts = summarize(timeline, bubble_fraction(name, *size, *times))
    print("\n".join([title, *text, "", *facts]), flush=True)
    if options.png is not None:
        peak = max(timeline.peak_activations)
        bubble = f"bubble {100 * timeline.bubble:.1f} %, peak activations {peak}"
        draw_png(timeline, options.png, f"{title}; {bubble}")
        print(f"drawn to {options.png}")
    return 0


def _count(number: int, what: str, plural: str = "s") -> str:
    """A number of things.

    >>> _count(2, "rank")
    '2 ranks'
    """
    return f"{number} {what}{'' if number == 1 else plural}"


def _parser() -> Parser:
    """The command's options."""
    parser = Parser("schedule", __doc__)

    def add(name: str, text: str, **options: Any) -> None:
        default = options.get("default")
        text += "" if default is None else f" (default: {default})"
        parser.add_argument(f"--{name}", help=text, **options)

    count = {"type": integer, "metavar": "N"}
    add("stages", "pipeline ranks", required=True, **count)
    add("micros", "micro-batches of a step", required=True, **count)
    add("name", f"the schedule: {', '.join(SCHEDULES)}", metavar="NAME", default="1f1b")
    add("chunks", "virtual stages that each rank holds", default=1, **count)
    time = {"type": number, "metavar": "T", "default": 1.0}
    add("forward", "time of a micro-batch's forward in one chunk", **time)
    add("backward", "time of its backward without the weight gradient", **time)
    add("weight-gradient", "time of its weight gradient", **time)
    add("png", "also draw a picture (extra 'report')", type=Path, metavar="FILE")
    return parser


def _check(options: argparse.Namespace) -> None:
    """UserError for what means nothing, or cannot be drawn."""
    for name in ("stages", "micros", "chunks"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name} {getattr(options, name)}: expected at least 1")
    for name, valid in (
        ("forward", 0.0 < options.forward < inf),
        ("backward", 0.0 < options.backward < inf),
        ("weight-gradient", 0.0 <= options.weight_gradient < inf),
    ):
        if not valid:
            value = getattr(options, name.replace("-", "_"))
            expected = "at least 0" if name == "weight-gradient" else "above 0"
            raise UserError(f"--{name} {value:g}: expected a finite time {expected}")
    if options.name not in SCHEDULES:
        raise UserError(f"--name {options.name}: {did_you_mean(options.name, SCHEDULES)}")
    places = options.stages * options.micros * options.chunks
    if places > _MOST:
        raise UserError(
            f"--stages x --micros x --chunks = {places:,}: expected at most {_MOST:,}, "
            f"for example --micros {max(1, _MOST // (options.stages * options.chunks))}"
        )
