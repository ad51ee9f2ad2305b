"""The mesh of a rank that does not run: enough of it to lay out what that rank would hold.

Layers are built on a `PlannedMesh` as on a `Mesh`, without MPI and without other ranks, and ask its
groups for a rank and a size. That is all these can tell: a call that would need ranks is a mistake.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NoReturn

from mpillm.parallel.grid import GROUPS, Grid
from mpillm.parallel.settings import ParallelSettings

__all__ = ["PlannedGroup", "PlannedMesh"]


@dataclass(frozen=True, eq=False)
class PlannedGroup:
    """A rank's place in a group of ranks that do not run."""

    axis: str
    rank: int
    size: int

    def __getattr__(self, name: str) -> NoReturn:
        if name.startswith("_"):  # what Python itself asks any object for
            raise AttributeError(name)
        raise RuntimeError(
            f"{name} over {self.axis}: its {self.size} ranks are planned and do not run"
        )


class PlannedMesh:
    """A place in the grid of a layout, and its groups; what they are for, `Mesh` tells."""

    pipe: PlannedGroup
    data: PlannedGroup
    expert: PlannedGroup
    context: PlannedGroup
    tensor: PlannedGroup
    replicas: PlannedGroup
    expert_replicas: PlannedGroup
    batch: PlannedGroup
    model: PlannedGroup
    tied: PlannedGroup
    world: PlannedGroup

    def __init__(self, layout: ParallelSettings, rank: int) -> None:
        """`layout` must have been through `fit`. rank: in the world."""
        self.layout = layout
        self.grid = Grid(layout)
        for name in GROUPS:
            setattr(self, name, PlannedGroup(name, *self.grid.position(name, rank)))
