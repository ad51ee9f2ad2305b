"""Who stands where: the members of every group of a layout, by arithmetic alone.

The grid has five axes: pipe, data, expert, context, tensor, the last one fastest, so that tensor
neighbours, who talk most, share a node. No communicator is made here: `Mesh` makes those of the
ranks at hand, a plan looks at ranks that do not run, and `mpillm doctor` at ranks that are dead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from msgspec.structs import replace

from mpillm.errors import UserError
from mpillm.parallel.schedules import SCHEDULES
from mpillm.parallel.settings import ParallelSettings

__all__ = ["AXES", "GROUPS", "Grid", "fit"]

AXES = ("pipe", "data", "expert", "context", "tensor")

# The axes along which each group's ranks lie, the slowest of its own order first.
GROUPS: dict[str, tuple[str, ...]] = {
    "world": AXES,
    **{axis: (axis,) for axis in AXES},
    "replicas": ("context", "data", "expert"),
    "expert_replicas": ("context", "data"),
    "batch": ("data", "expert"),
    "model": ("pipe", "expert", "tensor"),
    "tied": ("pipe",),
}
"""Names of the groups; what each is for, `Mesh` tells. `tied` has only the ends of its line."""


def fit(settings: ParallelSettings, ranks: int) -> ParallelSettings:
    """The layout with `data = 0` replaced by what the ranks allow; UserError when it cannot fit."""
    others = settings.tensor * settings.pipe * settings.context * settings.expert
    named = f"tensor {settings.tensor} x pipe {settings.pipe}" + "".join(
        f" x {axis} {getattr(settings, axis)}"
        for axis in ("context", "expert")
        if getattr(settings, axis) > 1
    )
    _check_settings(settings)
    if settings.data == 0:
        if ranks % others:
            raise UserError(
                f"parallel: {named} = {others} does not divide {ranks} "
                f"{'rank' if ranks == 1 else 'ranks'}; start a multiple of {others} ranks "
                f"(mpirun -n {others})"
            )
        return replace(settings, data=ranks // others)
    product = settings.data * others
    if product != ranks:
        raise UserError(
            f"parallel: data {settings.data} x {named} = {product} does not fit "
            f"{ranks} {'rank' if ranks == 1 else 'ranks'}; start {product} (mpirun -n {product}) "
            "or change the layout"
        )
    return settings


def _check_settings(settings: ParallelSettings) -> None:
    """UserError for settings that mean nothing together."""
    s = settings
    if s.sequence and s.tensor == 1:
        raise UserError(
            "parallel.sequence = true shares out tokens over the tensor ranks, and parallel.tensor "
            "is 1; set parallel.tensor >= 2, or parallel.sequence = false"
        )
    if s.chunks > 1 and s.pipe == 1:
        raise UserError(
            f"parallel.chunks = {s.chunks}: several stages a rank shorten the wait of a pipeline, "
            "and parallel.pipe is 1; set parallel.pipe >= 2, or parallel.chunks = 1"
        )
    SCHEDULES[s.schedule](s.pipe, 1, s.chunks)  # one that takes other numbers of chunks says so
    stages = s.pipe * s.chunks
    if s.boundaries and len(s.boundaries) != stages - 1:
        raise UserError(
            f"parallel.boundaries = {list(s.boundaries)} makes {len(s.boundaries) + 1} stages, and "
            f"pipe {s.pipe} x chunks {s.chunks} = {stages}; give {stages - 1} of them, or none"
        )


class Grid:
    """The places of the ranks of a layout, which must have been through `fit`."""

    def __init__(self, layout: ParallelSettings) -> None:
        self.layout = layout
        self.sizes = {axis: int(getattr(layout, axis)) for axis in AXES}
        self.size = math.prod(self.sizes.values())

    def place(self, rank: int) -> dict[str, int]:
        """Index of a world rank along each axis."""
        place: dict[str, int] = {}
        for axis in reversed(AXES):
            rank, place[axis] = divmod(rank, self.sizes[axis])
        return {axis: place[axis] for axis in AXES}

    def rank(self, place: dict[str, int]) -> int:
        """World rank at a place."""
        rank = 0
        for axis in AXES:
            rank = rank * self.sizes[axis] + place[axis]
        return rank

    def members(self, group: str, rank: int) -> tuple[int, ...]:
        """World ranks of the group of this name that `rank` belongs to, in the group's order."""
        place = self.place(rank)
        if group == "tied":
            ends = {0, self.sizes["pipe"] - 1}
            if place["pipe"] not in ends:
                return (rank,)
            return tuple(self.rank({**place, "pipe": end}) for end in sorted(ends))
        return tuple(self.rank(other) for other in self._along(place, GROUPS[group]))

    def position(self, group: str, rank: int) -> tuple[int, int]:
        """A world rank's own rank in the group of this name, and the group's size.

        As `members` has it, without a list of them: of a layout of ten thousand ranks a plan asks
        for every rank's groups.
        """
        place, index, size = self.place(rank), 0, 1
        if group == "tied":
            last = self.sizes["pipe"] - 1
            ends = place["pipe"] in (0, last) and last > 0
            return (int(place["pipe"] == last), 2) if ends else (0, 1)
        for axis in GROUPS[group]:
            index = index * self.sizes[axis] + place[axis]
            size *= self.sizes[axis]
        return index, size

    def _along(self, place: dict[str, int], axes: tuple[str, ...]) -> Iterable[dict[str, int]]:
        """The places that differ from `place` along these axes only, the last one fastest."""
        places = [place]
        for axis in axes:
            places = [{**at, axis: i} for at in places for i in range(self.sizes[axis])]
        return places
