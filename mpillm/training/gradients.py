"""From the gradients of micro-batches to the gradient of the step, and its norm.

In deterministic mode each micro-batch's gradient is computed by itself, and they are combined by
the pairwise tree over the micro-batches' numbers: partly on each rank, partly by the ordered
reduction over ranks. Otherwise they are accumulated in place, which takes less memory and time.

Up to ZeRO stage 1 a rank adds up its micro-batches and then sums over the replicas, arena by arena,
as soon as the last use of the last micro-batch is in. From stage 2 on no rank keeps whole
gradients: each micro-batch's are summed over the replicas at once, and a rank keeps its part.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

from mpillm.array.backend import Array, Backend
from mpillm.array.ops import norm_block
from mpillm.nn.layer import GradientSink, Layer
from mpillm.nn.param import Arena, Param
from mpillm.nn.stage import Stage
from mpillm.parallel.mesh import Mesh
from mpillm.parallel.progress import Progress
from mpillm.parallel.request import Request
from mpillm.training.watch import Watch

__all__ = ["Gradients", "TreeSum"]

# Sums of sharded gradients that may be under way at once; each holds an arena's whole gradient.
_UNDER_WAY = 2


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


@dataclass(eq=False)
class _Sink(GradientSink):
    """The sink of one micro-batch, by its place among those of this rank."""

    gradients: Gradients
    place: int

    def add(self, params: tuple[Param, ...], work: Callable[[], None]) -> None:
        """Do the work, where there are gradients to add to."""
        self.gradients.open(params)
        work()
        self.gradients.progress.poll()

    def done(self, layer: Layer) -> None:
        """Note that the layer has added all it has to add."""
        self.gradients.layer_done(layer, self.place)


class Gradients:
    """The gradients of this rank's stages through one step after another."""

    def __init__(
        self,
        stages: list[Stage],
        mesh: Mesh,
        backend: Backend,
        progress: Progress,
        *,
        micros: int,
        deterministic: bool,
        watch: Watch | None = None,
    ) -> None:
        """Collective: the ranks tell each other which parameters they hold.

        micros: micro-batches that this rank runs in a step. progress: drives the sums under way.
        watch: looks at this rank's gradients before they are added to others'.
        """
        self.progress = progress
        self._mesh = mesh
        self._backend = backend
        self._micros = micros
        self._deterministic = deterministic
        self._watch = watch
        self._overlap = mesh.layout.overlap
        self._arenas = [arena for stage in stages for arena in stage.store.arenas]
        self._pools = {arena: stage.store.pool for stage in stages for arena in stage.store.arenas}
        self._uses: dict[Layer, list[Arena]] = {
            layer: [arena for arena in stage.store.arenas if number in arena.layers]
            for stage in stages
            for number, layer in enumerate(stage.layers)
        }
        self._trees: dict[Arena, TreeSum] = {}
        self._layers_done: dict[tuple[Arena, int], int] = {}
        self._sums: dict[Arena, list[Request]] = {}
        self._shards: deque[_ShardedSum] = deque()
        # ZeRO deals out norms too; otherwise every replica of the model adds up its own.
        self._norm_group = mesh.world if mesh.layout.zero else mesh.model
        self._slots, self._places = self._norm_slots()

    # -- a step ------------------------------------------------------------------------------------

    def begin_step(self) -> None:
        """Set all gradients to zero."""
        self._trees = {}
        self._layers_done = {}
        for arena in self._arenas:
            (arena.grads if arena.grads is not None else arena.grad).fill(0.0)

    def sink(self, place: int) -> GradientSink:
        """Where layers hand in gradients of this rank's micro-batch number `place` of a step."""
        return _Sink(self, place)

    def open(self, params: tuple[Param, ...]) -> None:
        """Make sure that gradients of these parameters can be added to."""
        for param in params:
            if param.grad is None:
                param.arena.open_grads(self._pools[param.arena])
        if self._watch is not None:
            self._watch.opened(params)

    def layer_done(self, layer: Layer, place: int) -> None:
        """A layer has added all it has to add for a micro-batch. These ascend for each layer."""
        for arena in self._uses[layer]:
            done = self._layers_done.get((arena, place), 0) + 1
            self._layers_done[arena, place] = done
            if done == len(arena.layers):
                self._micro_done(arena, place)

    def reduce(self) -> None:
        """Make `grad` of every arena this rank's part of the step's gradient.

        The uses of a tied parameter are added in order of use. Adding those of one stage before the
        sum over the replicas moves less; deterministic mode adds them after it, because only then
        is each use's sum the tree over all micro-batches, wherever the replicas begin and end.
        """
        for arena in self._arenas:
            if arena.zero < 2 and arena not in self._sums:
                self._begin_sum(arena)
            for request in self._sums.pop(arena, ()):
                self.progress.wait(request)
        self._finish_shards(0)
        for arena in self._arenas:
            if arena.zero >= 2 and self._deterministic:
                arena.grad[...] = _add_rows(self._trees.pop(arena).result())
            elif arena.zero < 2 and self._deterministic:
                _add_rows(arena.grads[:, arena.part])
            for group in arena.reduce_over[1:]:
                group.allreduce(arena.grad)
            if arena.tied:
                self._mesh.tied.allreduce(arena.grad)

    def _micro_done(self, arena: Arena, place: int) -> None:
        """The gradient of an arena for one micro-batch is complete."""
        last, alone = place == self._micros - 1, arena.zero >= 2 or self._deterministic
        if self._watch is not None and (last or alone):
            self._watch.gradients(arena, place, since=place if alone else 0)
        if arena.zero >= 2:
            self._sum_shards(arena)
            return
        if self._deterministic and self._micros > 1:
            tree = self._trees.setdefault(arena, TreeSum())
            tree.add(arena.grads)
            if last:
                arena.grads[...] = tree.result()
                del self._trees[arena]
            else:
                arena.grads.fill(0.0)
        if last and self._overlap:
            self._begin_sum(arena)

    def _begin_sum(self, arena: Arena) -> None:
        """Begin to sum an arena over the replicas: all rows, or one after adding them up."""
        rows = arena.grads if self._deterministic else _add_rows(arena.grads)[None]
        group = arena.reduce_over[0]
        if arena.zero == 0:
            requests = [group.iallreduce(rows)]
        else:
            requests = [group.ireduce_scatter(row, row[arena.part], arena.counts) for row in rows]
        self._sums[arena] = [self.progress.watch(request) for request in requests]

    def _sum_shards(self, arena: Arena) -> None:
        """Begin to sum a micro-batch's gradient over the replicas, each of whom keeps its part."""
        pool = self._pools[arena]
        arena.open_grads(pool)  # where no work was handed in
        grads = arena.close_grads()
        rows = grads if self._deterministic else _add_rows(grads)[None]
        parts = pool.take((len(rows), arena.grad.size), arena.grad.dtype)
        group = arena.reduce_over[0]
        requests = [
            self.progress.watch(group.ireduce_scatter(row, part, arena.counts))
            for row, part in zip(rows, parts, strict=True)
        ]
        self._shards.append(_ShardedSum(arena, grads, parts, requests))
        self._finish_shards(_UNDER_WAY if self._overlap else 0)

    def _finish_shards(self, left: int) -> None:
        """Complete sums of sharded gradients, in order, until no more than `left` are under way."""
        while len(self._shards) > left:
            summed = self._shards.popleft()
            for request in summed.requests:
                self.progress.wait(request)
            arena, pool = summed.arena, self._pools[summed.arena]
            if self._deterministic:
                self._trees.setdefault(arena, TreeSum()).add(summed.parts)
            else:
                arena.grad += summed.parts[0]
            pool.give(summed.grads)
            pool.give(summed.parts)

    # -- the norm ----------------------------------------------------------------------------------

    def norm(self) -> float:
        """Length of the whole gradient, each parameter counted once; the same on all ranks.

        Sums of squares are float64, of fixed blocks of each parameter, added in the order of the
        parameters' names, so that neither data, pipeline nor ZeRO layout changes a bit.
        """
        xp, ops = self._backend.xp, self._backend.ops
        slots = self._backend.zeros((self._slots,), "float64")
        sums = [
            ops.sum_of_squares(view, norm_block(param.shard.shape))
            for param, _, view in self._counted()
        ]
        if sums:
            slots[self._places] = xp.concatenate(sums)
        self._norm_group.allreduce(slots)
        return math.sqrt(float(slots.sum()))

    def _counted(self) -> list[tuple[Param, tuple[int, int], Array]]:
        """(parameter, range, view) of the gradients that this rank counts in the norm."""
        mesh = self._mesh
        counted = []
        for arena in self._arenas:
            # Of ranks that hold the same arena whole, the first in the group that sums counts it.
            first = arena.zero > 0 or (
                arena.reduce_over[0].rank == 0
                if mesh.layout.zero
                else arena.reduce_over[0] is mesh.expert_replicas or mesh.expert.rank == 0
            )
            if first:
                counted += [piece for piece in arena.pieces(arena.grad) if piece[0].owner]
        return counted

    def _norm_slots(self) -> tuple[int, Array]:
        """Number of blocks of all parameters of the model, and the places of this rank's.

        Each block of each shard has a slot of its own, so that a sum over ranks adds nothing to it.
        """
        counted = self._counted()
        mine = {_shard_of(param): _blocks(param.shard.size, param) for param, _, _ in counted}
        blocks: dict[tuple[str, tuple[int, ...]], int] = {}
        for held in self._norm_group.allgather_objects(mine):
            blocks.update(held)
        first, total = {}, 0
        for shard in sorted(blocks):
            first[shard] = total
            total += blocks[shard]
        places = [
            first[_shard_of(param)] + start // norm_block(param.shard.shape) + block
            for param, (start, stop), _ in counted
            for block in range(_blocks(stop - start, param))
        ]
        return total, self._backend.from_host(np.array(places, dtype=np.int64))


@dataclass
class _ShardedSum:
    """A sum of a micro-batch's gradient under way: what is summed and what comes out."""

    arena: Arena
    grads: Array
    parts: Array
    requests: list[Request]


def _add_rows(grads: Array) -> Array:
    """Add the uses of tied parameters, (uses, n), up in order in the first row; returns that."""
    for use in range(1, len(grads)):
        grads[0] += grads[use]
    return grads[0]


def _shard_of(param: Param) -> tuple[str, tuple[int, ...]]:
    """What tells the shards of all parameters apart."""
    return param.name, param.shard.start


def _blocks(size: int, param: Param) -> int:
    """Blocks of `Ops.sum_of_squares` in `size` elements of a parameter."""
    return -(-size // norm_block(param.shard.shape))
