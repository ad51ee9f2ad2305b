"""Parameters and the flat arenas that their values and gradients lie in.

An arena holds the parameters of one layer that are reduced over the same groups: it is what
reduction, clipping, ZeRO, the optimizer and checkpoints work on, a long contiguous array.

ZeRO (Rajbhandari et al. 2020) shares out arenas over the ranks that hold the same parameters: stage
1 the optimizer's work and state, stage 2 also the gradients, stage 3 also the weights, which are
then there while a layer is at work only.
"""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import TYPE_CHECKING, Any, Literal

from mpillm.array.ops import norm_block
from mpillm.parallel.shard import Shard

if TYPE_CHECKING:
    from mpillm.array.backend import Array, Backend
    from mpillm.array.pool import Pool
    from mpillm.parallel.group import Group
    from mpillm.parallel.request import Request

__all__ = ["Arena", "Init", "Param", "cut_into_parts"]


@dataclass(frozen=True)
class Init:
    """How a parameter begins: zeros, ones, or normal with standard deviation `std`."""

    kind: Literal["zeros", "ones", "normal"]
    std: float = 0.0


@dataclass(eq=False)
class Param:
    """One use, by one layer, of a parameter's shard.

    name: the same in every layout. shard: the part that this rank holds. reduce_over: the groups
    its gradient is summed over, in this order; ZeRO shares it out over the first. decay: whether
    weight decay applies. owner: whether this rank is the one, of those along the tensor and pipe
    axes that hold this shard, that counts it in norms and writes it to checkpoints. layer: number
    of the layer in its stage. use: a tied parameter's uses are numbered in order of their layers;
    they share `value` and have a `grad` each.

    value: the weights in the compute dtype; grad: the sum of this use's gradients. Both have the
    shard's local shape and are views of `arena`, there once the store was allocated; `value` is
    there between `acquire` and `release` only where weights are sharded, `grad` while a gradient is
    being computed where gradients are.
    """

    name: str
    shard: Shard
    init: Init
    reduce_over: tuple[Group, ...]
    decay: bool
    owner: bool
    tied: bool
    layer: int
    use: int
    arena: Arena = field(default=None, repr=False)  # type: ignore[assignment]
    value: Array = field(default=None, repr=False)
    grad: Array = field(default=None, repr=False)


def cut_into_parts(
    params: Sequence[Param], offsets: Sequence[int], size: int, parts: int
) -> list[int]:
    """Where the parts of an arena begin and end, `parts + 1` ascending places from 0 to `size`.

    As even as can be where a part may begin only where a parameter or one of the blocks begins
    whose squares are summed for the norm: then every block lies in one part, and its sum has the
    same bits however many parts there are.
    """
    cuts = [0]
    for number in range(1, parts):
        target = size * number // parts
        place = max(0, bisect_right(offsets, target) - 1)
        block = norm_block(params[place].shard.shape)
        blocks = (target - offsets[place] + block // 2) // block
        after = offsets[place + 1] if place + 1 < len(offsets) else size
        # Past its last element a parameter has no block to begin.
        cut = offsets[place] + blocks * block
        cuts.append(cut if blocks * block < params[place].shard.size else after)
    return [*cuts, size]


@dataclass(eq=False)
class Arena:
    """Parameters of a layer that are reduced over the same groups, in one flat array.

    params and offsets: the distinct parameters and where each begins; size: elements, alignment
    included; uses: of each parameter, its uses on this stage in order. zero: the ZeRO stage; cuts:
    where the parts of the ranks of `reduce_over[0]` begin and end; rank: whose part is this rank's.
    uses_apart: whether each use of a tied parameter has a gradient of its own.

    value: the weights, (size,); None while weights are sharded and not gathered.
    grads: (rows, size), a row for each use of tied parameters that is apart, else one; None while
    gradients are sharded and none is being computed.
    master, grad: this rank's part of the weights that the optimizer updates and of the gradient it
    reads, once the uses were added up; flat, views of `value` and `grads` where these are whole.
    """

    params: list[Param]
    offsets: list[int]
    size: int
    uses: list[list[Param]]
    zero: int
    cuts: list[int]
    rank: int
    uses_apart: bool = True
    value: Array = None
    grads: Array = None
    master: Array = None
    grad: Array = None
    gathering: Request | None = None  # of the weights, from the time it begins to their release
    _holders: int = field(default=0, repr=False)
    _dtype: Any = field(default=None, repr=False)
    _gathered: Array = field(default=None, repr=False)

    @property
    def reduce_over(self) -> tuple[Group, ...]:
        """The groups that the gradient is summed over."""
        return self.params[0].reduce_over

    @property
    def tied(self) -> bool:
        """Whether its parameters have uses on the first and on the last stage."""
        return self.params[0].tied

    @property
    def layers(self) -> list[int]:
        """Numbers of the layers of the stage that use it, ascending."""
        return sorted({use.layer for uses in self.uses for use in uses})

    @property
    def rows(self) -> int:
        """Rows of `grads`."""
        return max(len(uses) for uses in self.uses) if self.uses_apart else 1

    @property
    def part(self) -> slice:
        """This rank's part."""
        return slice(self.cuts[self.rank], self.cuts[self.rank + 1])

    @property
    def counts(self) -> list[int]:
        """Elements of each rank's part."""
        return [b - a for a, b in pairwise(self.cuts)]

    @property
    def stored_bytes(self) -> tuple[int, int]:
        """Bytes of weights and of gradients that stay on this rank."""
        weights = self.master if self.zero == 3 else self.value
        gradients = self.grad if self.zero >= 2 else self.grads
        return int(weights.nbytes), int(gradients.nbytes)

    # -- arrays ------------------------------------------------------------------------------------

    def allocate(self, backend: Backend, dtype: Any, gradients: bool = True) -> None:
        """Make the arrays that stay, all zeros, and bind the views of the parameters.

        What `reduce_over[0]` sums or gathers lies where it need not be copied for that, if there
        are gradients: else there is nothing to sum, nor an update to be gathered. Collective.
        """
        self._dtype = dtype
        own = self.counts[self.rank]
        summed, gathered = gradients and self.zero < 2, gradients and self.zero > 0
        together, alone = self.reduce_over[0].zeros, backend.zeros
        if self.zero == 3:
            self.master = (together if gathered else alone)((own,), dtype)
        else:
            self.value = (together if gathered else alone)((self.size,), dtype)
            self.master = self.value[self.part]
            self._bind_values()
        if summed:
            self.bind_grads(together((self.rows, self.size), dtype))
            self.grad = self.grads[0, self.part]
        elif gradients:
            self.grad = alone((own,), dtype)

    def open_grads(self, pool: Pool) -> None:
        """Make sure that gradients can be added to; where they are sharded they begin at zero."""
        if self.grads is None:
            grads = pool.take((self.rows, self.size), self._dtype)
            grads.fill(0.0)
            self.bind_grads(grads)

    def close_grads(self) -> Array:
        """Take the gradients away; returns them, for the caller to give back to the pool."""
        grads = self.grads
        self.bind_grads(None)
        return grads

    def bind_grads(self, grads: Array) -> None:
        """Let the uses' gradients be views of `grads`; None takes them away."""
        self.grads = grads
        for uses, offset in zip(self.uses, self.offsets, strict=True):
            for row, use in enumerate(uses):
                flat = slice(offset, offset + use.shard.size)
                own = row if self.uses_apart else 0
                use.grad = None if grads is None else _shaped(grads[own, flat], use)

    def gather(self, pool: Pool) -> Request:
        """Begin to gather the weights from the ranks that share them."""
        self._gathered = pool.take((self.size,), self._dtype)
        return self.reduce_over[0].iallgather(self.master, self._gathered, self.counts)

    def hold_values(self) -> None:
        """The gathered weights are in: let the parameters be views of them."""
        self._holders += 1
        if self._holders == 1:
            self.value = self._gathered
            self._bind_values()

    def drop_values(self, pool: Pool) -> None:
        """One holder less; the last one takes the gathered weights away."""
        self._holders -= 1
        if self._holders == 0:
            pool.give(self.value)
            self.value = self._gathered = self.gathering = None
            self._bind_values()

    def share_values(self) -> Request | None:
        """Begin to send this rank's updated weights to the others, where all keep all weights."""
        if self.zero not in (1, 2):
            return None
        return self.reduce_over[0].iallgather(self.master, self.value, self.counts)

    def _bind_values(self) -> None:
        for uses, offset in zip(self.uses, self.offsets, strict=True):
            for use in uses:
                flat = slice(offset, offset + use.shard.size)
                use.value = None if self.value is None else _shaped(self.value[flat], use)

    # -- what lies where ---------------------------------------------------------------------------

    def kept(self, *, shared: bool) -> Iterator[tuple[Param, tuple[int, int] | None, slice]]:
        """What this rank keeps of something that is laid out like the arena, arrays or no arrays.

        (parameter, None, place of its shard), or, where the ranks of `reduce_over[0]` share it out,
        (parameter, [start, stop) in its flattened shard, place in this rank's part).
        """
        if shared:
            yield from self._ranges(self.part.start, self.part.stop)
        else:
            for param, offset in zip(self.params, self.offsets, strict=True):
                yield param, None, slice(offset, offset + param.shard.size)

    def wholes(self, x: Array) -> Iterator[tuple[Param, None, Array]]:
        """(parameter, None, view of its shard's shape) of all of `x`, laid out like `value`."""
        for param, _, place in self.kept(shared=False):
            yield param, None, _shaped(x[place], param)

    def pieces(
        self, x: Array, *, whole: bool = False
    ) -> Iterator[tuple[Param, tuple[int, int], Array]]:
        """(parameter, [start, stop) in its flattened shard, flat view) of what `x` holds.

        x: laid out like this rank's part; with `whole`, like all of the arena.
        """
        bounds = (0, self.size) if whole else (self.part.start, self.part.stop)
        for param, part, place in self._ranges(*bounds):
            yield param, part, x[place]

    def _ranges(self, low: int, high: int) -> Iterator[tuple[Param, tuple[int, int], slice]]:
        """(parameter, [start, stop) in its flattened shard, place after `low`) in [low, high)."""
        for param, offset in zip(self.params, self.offsets, strict=True):
            start = max(low, offset)
            stop = min(high, offset + param.shard.size)
            if start < stop:
                yield param, (start - offset, stop - offset), slice(start - low, stop - low)

    def spans(self) -> list[tuple[int, int, bool]]:
        """(start, stop, decay) of the runs of this rank's part that agree about weight decay."""
        low, high = self.part.start, self.part.stop
        spans: list[tuple[int, int, bool]] = []
        ends = [*self.offsets[1:], self.size]
        for param, start, stop in zip(self.params, self.offsets, ends, strict=True):
            a, b = max(start, low) - low, min(stop, high) - low
            if a >= b:
                continue
            if spans and spans[-1][2] == param.decay:
                spans[-1] = (spans[-1][0], b, param.decay)
            else:
                spans.append((a, b, param.decay))
        return spans


def _shaped(flat: Array, param: Param) -> Array:
    return flat.reshape(param.shard.local_shape)
