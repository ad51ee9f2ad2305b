"""The parameters of a stage: asked for by its layers, laid out in arenas, gathered when sharded.

A layer asks its stage's `ParamStore` for each parameter's shard at construction; when all layers of
the stage are built, `allocate` lays the parameters out in arenas and computes the initial values of
what this rank owns. `lay_out` alone is for a plan of what a rank that does not run would hold.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from mpillm.array.pool import Pool
from mpillm.array.random import fold
from mpillm.nn.param import Arena, Init, Param, cut_into_parts
from mpillm.parallel.progress import Progress

if TYPE_CHECKING:
    from mpillm.array.backend import Array, Backend
    from mpillm.parallel.group import Group
    from mpillm.parallel.shard import Shard

__all__ = ["ParamStore"]

# Parameters begin at multiples of this many elements, so that rows stay aligned to cache lines.
_ALIGN = 16

# Elements whose initial values are computed at once: bounds the float64 temporaries.
_INIT_BLOCK = 1 << 22


class ParamStore:
    """The parameters of one stage on this rank."""

    def __init__(
        self,
        backend: Backend,
        dtype: Any,
        seed: int | None,
        *,
        zero: int = 0,
        gradients: bool = True,
        uses_apart: bool = True,
        pool: Pool | None = None,
        progress: Progress | None = None,
    ) -> None:
        """seed: of the initial values; None leaves zeros, for weights that are loaded.

        zero: the ZeRO stage. gradients: whether there is room for them; uses_apart: for each use of
        a tied parameter, or for all of this stage together. pool: what sharded weights
        are gathered into, and sharded gradients computed in. progress: drives the gathering.
        """
        self.dtype = dtype
        self.pool = pool or Pool(backend)
        self._gradients = gradients
        self.arenas: list[Arena] = []
        self._backend = backend
        self._seed = seed
        self._zero = zero
        self._uses_apart = uses_apart
        self._progress = progress or Progress()
        self._uses: dict[str, list[Param]] = {}  # by name, in order of registration
        self._layer = 0
        self._sharded: list[list[Arena]] = []  # of every layer, the arenas to gather

    def next_layer(self) -> None:
        """The parameters that are added from now on are those of the stage's next layer."""
        self._layer += 1

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
        uses = self._uses.setdefault(name, [])
        if uses and (tied_use is None or uses[0].shard != shard or not uses[0].tied):
            raise ValueError(f"parameter {name} is there already")
        tied, use = tied_use is not None, tied_use or 0
        param = Param(name, shard, init, reduce_over, decay, owner, tied, self._layer, use)
        uses.append(param)
        return param

    @property
    def params(self) -> list[Param]:
        """Each distinct parameter once, in order of registration."""
        return [uses[0] for uses in self._uses.values()]

    def lay_out(self) -> None:
        """Put every parameter into its arena; no array is made and no initial value computed."""
        groups: dict[tuple[tuple[str, ...], int | None], list[Param]] = {}
        for param in self.params:
            axes = tuple(group.axis for group in param.reduce_over)
            groups.setdefault((axes, None if param.tied else param.layer), []).append(param)
        self.arenas = [self._arena(params) for params in groups.values()]
        self._sharded = [
            [arena for arena in self.arenas if layer in arena.layers and arena.zero == 3]
            for layer in range(self._layer + 1)
        ]

    def allocate(self) -> None:
        """Lay out the arenas, make their arrays, bind all views, and fill in initial values."""
        self.lay_out()
        for arena in self.arenas:
            arena.allocate(self._backend, self.dtype, self._gradients)
            if self._seed is not None:
                self._fill(arena, self._seed)

    def weights(self) -> Iterator[tuple[Param, tuple[int, int] | None, Array]]:
        """What this rank keeps of every parameter: (parameter, range, view).

        The view has the shape of the parameter's shard; with a range, [start, stop) in the shard's
        C-order flattened elements, it is flat and holds these.
        """
        for arena in self.arenas:
            yield from arena.pieces(arena.master) if arena.zero == 3 else arena.wholes(arena.value)

    # -- weights that are sharded ------------------------------------------------------------------

    def acquire(self, number: int, following: int) -> None:
        """Make the weights of layer `number` valid, and fetch those of layer `following`.

        Layers outside of the stage have none. The ranks that share them call in the same order.
        """
        for layer in (number, following):
            if 0 <= layer < len(self._sharded):
                for arena in self._sharded[layer]:
                    if arena.gathering is None:
                        arena.gathering = self._progress.watch(arena.gather(self.pool))
        for arena in self._sharded[number]:
            assert arena.gathering is not None  # begun above, or as the layer that followed
            self._progress.wait(arena.gathering)
            arena.hold_values()

    def release(self, number: int) -> None:
        """The weights of layer `number` are not needed for now."""
        for arena in self._sharded[number]:
            arena.drop_values(self.pool)

    # -- laying out --------------------------------------------------------------------------------

    def _arena(self, params: list[Param]) -> Arena:
        # Those without decay last, so that the optimizer goes over few long runs.
        params = sorted(params, key=lambda param: not param.decay)
        offsets, size = [], 0
        for param in params:
            offsets.append(size)
            size += -(-param.shard.size // _ALIGN) * _ALIGN
        uses = [sorted(self._uses[param.name], key=lambda use: use.use) for param in params]
        if len({len(same) for same in uses}) > 1:
            raise ValueError(f"tied parameters of different uses: {[p.name for p in params]}")
        replicas = params[0].reduce_over[0]
        zero = self._zero if replicas.size > 1 else 0
        arena = Arena(
            params=params,
            offsets=offsets,
            size=size,
            uses=uses,
            zero=zero,
            cuts=cut_into_parts(params, offsets, size, replicas.size if zero else 1),
            rank=replicas.rank if zero else 0,
            uses_apart=self._uses_apart,
        )
        for same in uses:
            for use in same:
                use.arena = arena
        return arena

    def _fill(self, arena: Arena, seed: int) -> None:
        """Write the initial values of what this rank owns of an arena."""
        whole = arena.zero < 3
        for param, (start, stop), flat in arena.pieces(
            arena.value if whole else arena.master, whole=whole
        ):
            self._initialize(param, start, stop, flat, fold(seed, "init", param.name))

    def _initialize(self, param: Param, start: int, stop: int, flat: Array, key: int) -> None:
        """Write the initial values of [start, stop) of `param`'s flattened shard to `flat`."""
        if param.init.kind != "normal":
            flat.fill(0.0 if param.init.kind == "zeros" else 1.0)
            return
        if start == stop:
            return
        shard = param.shard
        row = shard.size // shard.local_shape[0]
        rows = max(1, _INIT_BLOCK // row)
        for low in range(start // row, -(-stop // row), rows):
            high = min(low + rows, -(-stop // row))
            first = shard.start[0]
            block = self._backend.host_random.normal_slab(
                key, shard.shape, (first + low, *shard.start[1:]), (first + high, *shard.stop[1:])
            )
            block *= param.init.std
            a, b = max(start, low * row), min(stop, high * row)
            values = block.reshape(-1)[a - low * row : b - low * row].astype(self.dtype)
            flat[a - start : b - start] = self._backend.from_host(values)
