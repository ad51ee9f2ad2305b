"""Who stands where: the members of every group of a layout, by arithmetic alone.

The grid has five axes: pipe, data, expert, context, tensor, the last one fastest, so that tensor
neighbours, who talk most, share a node. No communicator is made here: `Mesh` makes those of the
ranks at hand, a plan looks at ranks that do not run, and `mpillm doctor` at ranks that are dead.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

from mpillm.parallel.settings import ParallelSettings

__all__ = ["AXES", "GROUPS", "Grid"]

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

    def _along(self, place: dict[str, int], axes: tuple[str, ...]) -> Iterable[dict[str, int]]:
        """The places that differ from `place` along these axes only, the last one fastest."""
        places = [place]
        for axis in axes:
            places = [{**at, axis: i} for at in places for i in range(self.sizes[axis])]
        return places
