"""The grid of ranks and the Groups along its axes; who belongs to which, `Grid` tells."""

from __future__ import annotations

from mpi4py import MPI

from mpillm.array.backend import Backend
from mpillm.parallel.grid import AXES, GROUPS, Grid, fit
from mpillm.parallel.group import MESSAGE_LIMIT, Group
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.shared_memory import node_of

__all__ = ["AXES", "Mesh", "fit"]


class Mesh:
    """This rank's place in the grid, and the Groups it belongs to.

    pipe, data, expert, context, tensor: the ranks along one axis.
    replicas (context x data x expert): those over which dense gradients are summed, and which share
    out what ZeRO shards. Data is faster than context here, so that a tree over the ranks has the
    data ranks of a context rank as subtrees.
    expert_replicas (context x data): the same for the weights of experts.
    batch (data x expert): those that share out a step's sequences.
    model (pipe x expert x tensor): those that hold every parameter between them.
    tied: the first and the last pipeline stage; of size 1 where they are one or this is neither.
    world: all ranks.
    node: those that share this rank's node; for arrays of the host, whatever the backend.
    """

    pipe: Group
    data: Group
    expert: Group
    context: Group
    tensor: Group
    replicas: Group
    expert_replicas: Group
    batch: Group
    model: Group
    tied: Group
    world: Group
    node: Group

    def __init__(
        self,
        comm: MPI.Intracomm,
        layout: ParallelSettings,
        backend: Backend,
        recorder: Recorder,
        message_limit: int = MESSAGE_LIMIT,
    ) -> None:
        """`layout` must have been through `fit` for the size of `comm`. Every rank calls."""
        self.layout = layout
        self.grid = Grid(layout)
        self.recorder = recorder
        node = node_of(comm)
        for name in (*GROUPS, "node"):
            part = node
            if name != "node":
                members = self.grid.members(name, comm.rank)
                part = comm.Split(min(members), members.index(comm.rank))
            device = Backend.create("numpy") if name == "node" else backend
            group = Group(part, name, device, recorder, layout.reduction, message_limit, node)
            setattr(self, name, group)

    def free(self) -> None:
        """Give all communicators back to MPI. Every rank calls."""
        for group in vars(self).values():
            if isinstance(group, Group):
                group.free()

    def describe(self) -> str:
        """The layout in words: the axes above 1, or `1 rank`."""
        parts = [
            f"{axis} {size}"
            for axis in ("data", "tensor", "pipe", "context", "expert")
            if (size := getattr(self.layout, axis)) > 1
        ]
        return " x ".join(parts) if parts else "1 rank"
