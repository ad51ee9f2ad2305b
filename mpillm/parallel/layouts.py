"""The layouts of a number of ranks: listed, written as text, read back.

A layout is a `ParallelSettings` whose five sizes are given. As text it is a list such as
`data=2,tensor=2,sequence=true`: sizes that are not named are 1, other settings are those of a base,
the settings of a run, where the layout has a use for them.
"""

from __future__ import annotations

import math
import re
from collections.abc import Hashable, Iterator, Mapping, Sequence
from itertools import product

from msgspec.structs import replace

from mpillm.config import Section, load, to_table
from mpillm.parallel.schedules import SCHEDULES
from mpillm.parallel.settings import ParallelSettings

__all__ = [
    "SIZES",
    "LayoutConfig",
    "choose_layout",
    "factors",
    "layout_text",
    "layouts",
    "parse_layout",
    "ranks_of",
    "split_list",
]

SIZES = ("data", "tensor", "pipe", "context", "expert")


class LayoutConfig(Section, frozen=True, kw_only=True):
    """What `load` reads a layout into, so that its errors name `--parallel.key`."""

    parallel: ParallelSettings


def ranks_of(layout: ParallelSettings) -> int:
    """Number of ranks that a layout takes."""
    return math.prod(getattr(layout, axis) for axis in SIZES)


def layouts(ranks: int, base: ParallelSettings) -> list[ParallelSettings]:
    """Every layout of `ranks` ranks, whatever a model makes of it.

    All sizes with that product; where tensor > 1, with sequence parallelism and without; where
    pipe > 1, every schedule, the interleaved one with the base's chunks, or 2; ZeRO 0 to 3.
    """
    chunks = max(2, base.chunks)
    found = []
    for sizes in _sizes(ranks, SIZES):
        sequences = (False, True) if sizes["tensor"] > 1 else (False,)
        schedules = tuple(SCHEDULES) if sizes["pipe"] > 1 else (base.schedule,)
        for sequence, schedule, zero in product(sequences, schedules, range(4)):
            layout = replace(
                base,
                sequence=sequence,
                schedule=schedule,
                chunks=chunks if schedule == "interleaved" else 1,
                zero=zero,
            )
            found.append(_with_sizes(layout, sizes))
    return found


def factors(layout: ParallelSettings) -> dict[str, Hashable]:
    """What tells one layout from another, for a covering set."""
    kept: dict[str, Hashable] = {axis: getattr(layout, axis) for axis in SIZES}
    schedule = layout.schedule if layout.pipe > 1 else "none"
    return {**kept, "sequence": layout.sequence, "schedule": schedule, "zero": layout.zero}


def parse_layout(text: str, base: ParallelSettings) -> ParallelSettings:
    """The layout that `text` names, a list of `name=value`; UserError where it names none."""
    return choose_layout([f"--parallel.{part}" for part in split_list(text)], base)


def choose_layout(options: Sequence[str], base: ParallelSettings) -> ParallelSettings:
    """The layout that `--parallel.key=value` options name as `parse_layout` does a text's parts."""
    table = {"parallel": to_table(_with_sizes(base, {}))}
    layout = load(LayoutConfig, table, options).parallel
    # Now that the sizes are known: what the base says and these have a use for, then what is named.
    keys = [option.partition("=")[0].removeprefix("--parallel.") for option in options]
    named = {key: getattr(layout, key) for key in (key.replace("-", "_") for key in keys)}
    return replace(_with_sizes(base, {axis: getattr(layout, axis) for axis in SIZES}), **named)


def layout_text(layout: ParallelSettings, base: ParallelSettings) -> str:
    """The text that `parse_layout` reads as `layout`; a pipeline's schedule is always told."""
    sizes = {axis: size for axis in SIZES if (size := getattr(layout, axis)) > 1}
    inherited, plain = _with_sizes(base, sizes), ParallelSettings()
    parts = [f"{axis}={size}" for axis, size in sizes.items()] or ["data=1"]
    for name in ParallelSettings.__struct_fields__:
        value = getattr(layout, name)
        telling = name in ("sequence", "chunks", "zero") and value != getattr(plain, name)
        telling |= name == "schedule" and layout.pipe > 1
        if name not in SIZES and (telling or value != getattr(inherited, name)):
            parts.append(f"{name}={_value_text(value)}")
    return ",".join(parts)


def split_list(text: str) -> list[str]:
    """The items of a list in text, which may be lists in brackets themselves.

    >>> split_list("pipe=3,boundaries=[1,3]")
    ['pipe=3', 'boundaries=[1,3]']
    """
    return re.split(r",(?![^\[]*\])", text)


def _value_text(value: object) -> str:
    """A setting's value as the command line reads it."""
    if isinstance(value, tuple):
        return "[" + ",".join(map(str, value)) + "]"
    return str(value).lower() if isinstance(value, bool) else str(value)


def _sizes(ranks: int, axes: tuple[str, ...]) -> Iterator[dict[str, int]]:
    """Every way to write `ranks` as a product of sizes of the axes, the first axis large first."""
    axis, *others = axes
    for size in range(ranks, 0, -1) if others else (ranks,):
        if ranks % size == 0:
            rest = _sizes(ranks // size, tuple(others)) if others else ({},)
            yield from ({axis: size, **inner} for inner in rest)


def _with_sizes(base: ParallelSettings, sizes: Mapping[str, int]) -> ParallelSettings:
    """The base with these sizes, the others 1, and without what these have no use for."""
    layout = replace(base, **{axis: sizes.get(axis, 1) for axis in SIZES})
    layout = replace(
        layout,
        sequence=layout.sequence and layout.tensor > 1,
        chunks=layout.chunks if layout.pipe > 1 else 1,
    )
    if layout.pipe == 1 and layout.schedule == "interleaved":  # which takes several chunks
        layout = replace(layout, schedule=ParallelSettings().schedule)
    if len(layout.boundaries) != layout.pipe * layout.chunks - 1:
        layout = replace(layout, boundaries=())
    return layout
