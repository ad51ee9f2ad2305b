"""From the gradients of micro-batches to the gradient of the step, and its norm.

In deterministic mode each micro-batch's gradient is computed by itself, and they are combined by
the pairwise tree over the micro-batches' numbers: here as far as this rank's block of them goes, by
the ordered reduction over the ranks beyond. Otherwise they are accumulated in place, which takes
less memory and time.
"""

from __future__ import annotations

import math

import numpy as np

from mpillm.array.backend import Array, Backend
from mpillm.array.ops import NORM_BLOCK
from mpillm.nn.stage import Stage
from mpillm.nn.param import Arena, Param
from mpillm.parallel.mesh import Mesh

__all__ = ["Gradients", "TreeSum"]


class TreeSum:
    """Pairwise-tree sum of arrays that come one after another, in place of holding all of them.

    Works like a binary counter: level k holds the sum of 2^k consecutive arrays. The result is
    bitwise that of `mpillm.parallel.group.pairwise_sum`.
    """

    def __init__(self) -> None:
        self._levels: list[Array | None] = []

    def add(self, x: Array) -> None:
        """Add the next array, which may be overwritten afterwards."""
        carried = False  # whether x is an array of our own
        for level, held in enumerate(self._levels):
            if held is None:
                self._levels[level] = x if carried else x.copy()
                return
            held += x
            x, carried, self._levels[level] = held, True, None
        self._levels.append(x if carried else x.copy())

    def result(self) -> Array:
        """The sum; at least one array must have been added."""
        total = None
        for held in self._levels:  # from the smallest block, which came last, upwards
            if held is not None:
                total = held if total is None else held + total
        return total


class Gradients:
    """The gradients of this rank's stages through one step after another."""

    def __init__(
        self, stages: list[Stage], mesh: Mesh, backend: Backend, deterministic: bool
    ) -> None:
        """Collective: the ranks of a model replica tell each other which parameters they hold."""
        self._stages = stages
        self._mesh = mesh
        self._backend = backend
        self._deterministic = deterministic
        self._trees: dict[Arena, TreeSum] = {}
        self._owned = [
            (arena, offset, param)
            for stage in stages
            for arena in stage.store.arenas
            for param, offset in zip(arena.params, arena.offsets, strict=True)
            if param.owner
        ]
        self._slots, self._places = self._norm_slots([param for _, _, param in self._owned])

    def begin_step(self) -> None:
        """Set all gradients to zero."""
        self._trees = {}
        for stage in self._stages:
            for arena in stage.store.arenas:
                arena.grads.fill(0.0)

    def after_backward(self, micro: int, chunk: int) -> None:
        """To be called after each backward pass of a stage, in ascending order of micro-batches."""
        if self._deterministic:
            for arena in self._stages[chunk].store.arenas:
                self._trees.setdefault(arena, TreeSum()).add(arena.grads)
                arena.grads.fill(0.0)

    def reduce(self) -> None:
        """Make `grad` of every arena the gradient of the step, on all ranks alike.

        The uses of a tied parameter are added in order of use. Adding them before the sum over the
        replicas moves less; deterministic mode adds them after it, because only then is each use's
        sum the tree over all micro-batches, wherever the replicas begin and end.
        """
        for arena, tree in self._trees.items():
            arena.grads[...] = tree.result()
        self._trees = {}
        for stage in self._stages:
            for arena in stage.store.arenas:
                if self._deterministic:
                    self._sum_replicas(arena, arena.grads)
                    self._sum_uses(arena)
                else:
                    self._sum_uses(arena)
                    self._sum_replicas(arena, arena.grad)

    def _sum_uses(self, arena: Arena) -> None:
        for use in range(1, len(arena.grads)):
            arena.grads[0] += arena.grads[use]
        if arena.tied:
            self._mesh.tied.allreduce(arena.grad)

    @staticmethod
    def _sum_replicas(arena: Arena, grads: Array) -> None:
        for group in arena.reduce_over:
            group.allreduce(grads)

    def norm(self) -> float:
        """Length of the whole gradient, each parameter counted once; the same on all ranks.

        Sums of squares are float64, of fixed blocks of each parameter, added in the order of the
        parameters' names, so that neither data nor pipeline layout changes a bit.
        """
        xp, ops = self._backend.xp, self._backend.ops
        slots = self._backend.zeros((self._slots,), "float64")
        sums = [
            square
            for arena, offset, param in self._owned
            for square in ops.sum_of_squares(arena.grad[offset : offset + param.shard.size])
        ]
        if sums:
            slots[self._places] = xp.stack(sums)
        self._mesh.model.allreduce(slots)
        return math.sqrt(float(slots.sum()))

    def _norm_slots(self, owned: list[Param]) -> tuple[int, Array]:
        """Number of blocks of all parameters of the model, and the places of this rank's."""
        mine = {param.name: _blocks(math.prod(param.shard.shape)) for param in owned}
        blocks: dict[str, int] = {}
        for held in self._mesh.model.allgather_objects(mine):
            blocks.update(held)
        first, total = {}, 0
        for name in sorted(blocks):
            first[name] = total
            total += blocks[name]
        places = [
            first[param.name] + block
            for param in owned
            for block in range(_blocks(param.shard.size))
        ]
        return total, self._backend.from_host(np.array(places, dtype=np.int64))


def _blocks(size: int) -> int:
    """Blocks of `Ops.sum_of_squares` in an array of `size` elements."""
    return -(-size // NORM_BLOCK)
