"""Parameters and the flat arenas that their values and gradients lie in.

A layer asks its stage's `ParamStore` for each parameter's shard at construction; when all layers of
the stage are built, `allocate` lays the parameters out in arenas, one for each set of reduction
groups, and computes the initial values of what this rank owns. Reduction, clipping, the optimizer
and checkpoints then work on long contiguous arrays.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mpillm.array.random import fold
from mpillm.parallel.shard import Shard

if TYPE_CHECKING:
    from mpillm.array.backend import Array, Backend
    from mpillm.parallel.group import Group

__all__ = ["Arena", "Init", "Param", "ParamStore"]

# Parameters begin at multiples of this many elements, so that rows stay aligned to cache lines.
_ALIGN = 16

# Elements whose initial values are computed at once: bounds the float64 temporaries.
_INIT_BLOCK = 1 << 22


@dataclass(frozen=True)
class Init:
    """How a parameter begins: zeros, ones, or normal with standard deviation `std`."""

    kind: Literal["zeros", "ones", "normal"]
    std: float = 0.0


@dataclass(eq=False)
class Param:
    """One use, by one layer, of a parameter's shard.

    name: the same in every layout. shard: the part that this rank holds. reduce_over: the groups
    its gradient is summed over, in this order. decay: whether weight decay applies. owner: whether
    this rank is the one, of those in its model replica that hold this shard, that counts it in
    norms and writes it to checkpoints. use: a tied parameter's uses are numbered in order of their
    layers; they share `value` and `master` and have a `grad` each.

    value: the weights in the compute dtype; master: in the optimizer's dtype, the same array where
    the two agree; grad: the sum of this use's gradients. All have the shard's local shape and are
    views of an arena, there once the store was allocated.
    """

    name: str
    shard: Shard
    init: Init
    reduce_over: tuple[Group, ...]
    decay: bool
    owner: bool
    tied: bool
    use: int
    value: Array = field(default=None, repr=False)
    master: Array = field(default=None, repr=False)
    grad: Array = field(default=None, repr=False)


@dataclass(eq=False)
class Arena:
    """A flat run of parameters that are reduced over the same groups.

    params and offsets: the distinct parameters and where each begins; value, master: (n,); grads:
    (uses, n), a row for each local use of tied parameters, else one row; `grad` is the first row,
    which holds the whole gradient once the uses were added up.
    """

    params: list[Param]
    offsets: list[int]
    reduce_over: tuple[Group, ...]
    tied: bool
    value: Array
    master: Array
    grads: Array

    @property
    def grad(self) -> Array:
        """The gradient that the optimizer reads, (n,)."""
        return self.grads[0]

    @property
    def size(self) -> int:
        """Elements, alignment included."""
        return int(self.value.size)

    def spans(self) -> list[tuple[int, int, bool]]:
        """(start, stop, decay) of the runs of parameters that agree about weight decay."""
        spans: list[tuple[int, int, bool]] = []
        ends = [*self.offsets[1:], self.size]
        for param, start, stop in zip(self.params, self.offsets, ends, strict=True):
            if spans and spans[-1][2] == param.decay:
                spans[-1] = (spans[-1][0], stop, param.decay)
            else:
                spans.append((start, stop, param.decay))
        return spans


class ParamStore:
    """The parameters of one stage on this rank."""

    def __init__(self, backend: Backend, dtype: Any, seed: int | None) -> None:
        """seed: of the initial values; None leaves zeros, for weights that are loaded."""
        self._backend = backend
        self._dtype = dtype
        self._seed = seed
        self._uses: list[Param] = []
        self.arenas: list[Arena] = []

    def add(
        self,
        name: str,
        shard: Shard,
        init: Init,
        *,
        reduce_over: tuple[Group, ...],
        decay: bool,
        owner: bool,
        tied_use: int | None = None,
    ) -> Param:
        """Ask for a parameter's shard; its arrays are there after `allocate`.

        A tied parameter is added once by each layer that uses it, with `tied_use` 0, 1, ... in the
        order of the layers in the model; every other name may be added only once.
        """
        uses = [param for param in self._uses if param.name == name]
        if uses and (tied_use is None or uses[0].shard != shard or not uses[0].tied):
            raise ValueError(f"parameter {name} is there already")
        tied, use = tied_use is not None, tied_use or 0
        param = Param(name, shard, init, reduce_over, decay, owner, tied, use)
        self._uses.append(param)
        return param

    @property
    def params(self) -> list[Param]:
        """Each distinct parameter once, in order of registration."""
        first: dict[str, Param] = {}
        for param in self._uses:
            first.setdefault(param.name, param)
        return list(first.values())

    def acquire(self, number: int, following: int) -> None:
        """Make the weights of layer `number` valid; layer `following` is the next to come."""

    def release(self, number: int) -> None:
        """The weights of layer `number` are not needed for now."""

    def allocate(self) -> None:
        """Lay out the arenas, bind all views, and fill in the initial values."""
        groups: dict[tuple[tuple[str, ...], bool], list[Param]] = {}
        for param in self.params:
            key = (tuple(group.axis for group in param.reduce_over), param.tied)
            groups.setdefault(key, []).append(param)
        self.arenas = [self._arena(params) for params in groups.values()]

    def _arena(self, params: list[Param]) -> Arena:
        offsets, size = [], 0
        for param in params:
            offsets.append(size)
            size += -(-param.shard.size // _ALIGN) * _ALIGN
        # The uses of every parameter of a tied arena are on the same layers' stages.
        uses = {
            param.name: [use for use in self._uses if use.name == param.name] for param in params
        }
        rows = max(len(same) for same in uses.values())
        value = self._backend.zeros((size,), self._dtype)
        grads = self._backend.zeros((rows, size), self._dtype)
        arena = Arena(params, offsets, params[0].reduce_over, params[0].tied, value, value, grads)
        for param, offset in zip(params, offsets, strict=True):
            part, shape = slice(offset, offset + param.shard.size), param.shard.local_shape
            for row, use in enumerate(uses[param.name]):
                use.value = use.master = value[part].reshape(shape)
                use.grad = grads[row, part].reshape(shape)
            if self._seed is not None:
                self._initialize(param, value[part], fold(self._seed, "init", param.name))
        return arena

    def _initialize(self, param: Param, flat: Array, key: int) -> None:
        """Write the initial values of `param`'s shard to `flat`, evaluated on the host."""
        if param.init.kind != "normal":
            flat.fill(0.0 if param.init.kind == "zeros" else 1.0)
            return
        shard = param.shard
        if shard.size == 0:
            return
        row = shard.size // shard.local_shape[0]
        rows = max(1, _INIT_BLOCK // row)
        for low in range(shard.start[0], shard.stop[0], rows):
            high = min(low + rows, shard.stop[0])
            block = self._backend.host_random.normal_slab(
                key, shard.shape, (low, *shard.start[1:]), (high, *shard.stop[1:])
            )
            block *= param.init.std
            begin = (low - shard.start[0]) * row
            flat[begin : begin + block.size] = self._backend.from_host(
                block.reshape(-1).astype(self._dtype)
            )
