"""What a family hands out: a model as a list of units that a partitioner cuts into stages."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from itertools import accumulate, pairwise
from typing import TYPE_CHECKING, Any

from mpillm.array.pool import Pool
from mpillm.errors import UserError
from mpillm.nn.layer import Build, Layer, Micro, Recomputed
from mpillm.nn.stage import Stage
from mpillm.nn.store import ParamStore

if TYPE_CHECKING:
    from mpillm.array.backend import Backend
    from mpillm.nn.rows import SharedRows
    from mpillm.parallel.mesh import Mesh
    from mpillm.parallel.progress import Progress
    from mpillm.parallel.settings import ParallelSettings

__all__ = ["Model", "Spec", "Unit", "build_stages", "partition"]

Spec = tuple[tuple[int, ...], Any]


@dataclass(frozen=True)
class Unit:
    """A layer that is not built yet: name, cost (multiply-adds a token), and how to build it."""

    name: str
    cost: float
    build: Callable[[Build], Layer]


@dataclass(frozen=True)
class Model:
    """A model as settings describe it.

    units: its layers from tokens to loss; a pipeline may be cut between any two. boundary: shapes
    and dtypes of the arrays that cross a cut for a micro-batch, by the dtype of activations and how
    tensor ranks share out rows. axes: the mesh axes it can use. why_not: of axes that it cannot
    use, why, where there is more to say. auxiliary: whether the head gives an auxiliary loss beside
    the loss; the step's loss is the sum of both.
    """

    family: str
    units: tuple[Unit, ...]
    boundary: Callable[[Micro, Any, SharedRows], tuple[Spec, ...]]
    axes: frozenset[str]
    why_not: Mapping[str, str] = field(default_factory=dict)
    auxiliary: bool = False

    def check_layout(self, layout: ParallelSettings) -> None:
        """UserError when the layout has an axis that this model cannot use, or too many stages."""
        for axis in ("data", "tensor", "pipe", "context", "expert"):
            size = getattr(layout, axis)
            if size > 1 and axis not in self.axes:
                valid = ", ".join(sorted(self.axes))
                why = self.why_not.get(axis, f"family {self.family!r} runs over {valid} only")
                raise UserError(f"parallel.{axis} = {size}: {why}; set parallel.{axis} = 1")
        stages, units = layout.pipe * layout.chunks, self.units
        if stages > len(units):
            chunks = f" x parallel.chunks = {layout.chunks}" if layout.chunks > 1 else ""
            fitting = "parallel.pipe x parallel.chunks" if chunks else "parallel.pipe"
            raise UserError(
                f"parallel.pipe = {layout.pipe}{chunks}: the model can be cut into at most "
                f"{len(units)} stages ({units[0].name} ... {units[-1].name}); "
                f"set {fitting} <= {len(units)}"
            )
        self.cuts(layout)

    def cuts(self, layout: ParallelSettings) -> list[tuple[int, int]]:
        """(start, stop) of the units of every stage: as the settings say, or balanced by cost."""
        stages, count = layout.pipe * layout.chunks, len(self.units)
        if not layout.boundaries:
            return partition(tuple(unit.cost for unit in self.units), stages)
        ends = (0, *layout.boundaries, count)
        if any(a >= b for a, b in pairwise(ends)):
            raise UserError(
                f"parallel.boundaries = {list(layout.boundaries)}: expected ascending layers from "
                f"1 to {count - 1} ({self.units[1].name} ... {self.units[-1].name})"
            )
        return list(pairwise(ends))


def partition(costs: tuple[float, ...], stages: int) -> list[tuple[int, int]]:
    """Cut a list into `stages` runs, none empty, so that the largest sum of costs is smallest.

    Of all such cuts the most even one, whose sums have the least sum of squares. Returns (start,
    stop) pairs. ValueError when there are fewer items than stages.

    >>> partition((1.0, 4.0, 4.0, 4.0, 2.0), 2)
    [(0, 3), (3, 5)]
    """
    if not 1 <= stages <= len(costs):
        raise ValueError(f"{len(costs)} layers cannot be cut into {stages} stages")
    before = (0.0, *accumulate(costs))

    def cut(combine: Callable[[float, float], float], limit: float) -> tuple[float, list[int]]:
        """Least combined cost of cutting all of the list, no stage above `limit`; the ends."""

        @cache
        def best(start: int, left: int) -> tuple[float, tuple[int, ...]]:
            if left == 0:
                return (0.0, ()) if start == len(costs) else (math.inf, ())
            found: tuple[float, tuple[int, ...]] = (math.inf, ())
            for stop in range(start + 1, len(costs) - left + 2):
                own = before[stop] - before[start]
                if own > limit:
                    break
                rest, ends = best(stop, left - 1)
                found = min(found, (combine(own, rest), (stop, *ends)), key=lambda one: one[0])
            return found

        value, ends = best(0, stages)
        return value, list(ends)

    largest, _ = cut(max, math.inf)
    _, ends = cut(lambda own, rest: own * own + rest, largest)
    return list(zip([0, *ends[:-1]], ends, strict=True))


def build_stages(
    model: Model,
    backend: Backend,
    mesh: Mesh,
    dtype: Any,
    seed: int | None,
    *,
    recompute: Recomputed = "none",
    gradients: bool = True,
    uses_apart: bool = True,
    progress: Progress | None = None,
    allocate: bool = True,
) -> list[Stage]:
    """This rank's stages, by chunk, with their parameters allocated.

    seed: of the initial weights; None for weights that are loaded. recompute: what is computed anew
    in the backward pass. gradients: whether there is room for them; uses_apart: for each use of a
    tied parameter, or for all on a stage together. progress: drives the gathering of sharded
    weights. allocate: else parameters are laid out only, for a plan of a rank that does not run.
    """
    cuts, pipe, stages = model.cuts(mesh.layout), mesh.pipe, []
    pool = Pool(backend)
    for start, stop in cuts[pipe.rank :: pipe.size]:
        store = ParamStore(
            backend,
            dtype,
            seed,
            zero=mesh.layout.zero,
            gradients=gradients,
            uses_apart=uses_apart,
            pool=pool,
            progress=progress,
        )
        build = Build(backend, mesh, store, recompute)
        layers = []
        for unit in model.units[start:stop]:
            layers.append(unit.build(build))
            store.next_layer()
        if allocate:
            store.allocate()
        else:
            store.lay_out()
        stages.append(Stage(layers, store))
    return stages
