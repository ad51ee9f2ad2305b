"""What a family hands out: a model as a list of units that a partitioner cuts into stages."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache
from itertools import accumulate
from typing import TYPE_CHECKING, Any

from mpillm.errors import UserError
from mpillm.nn.layer import Build, Layer, Micro
from mpillm.nn.stage import Stage
from mpillm.nn.param import ParamStore

if TYPE_CHECKING:
    from mpillm.array.backend import Backend
    from mpillm.parallel.mesh import Mesh

__all__ = ["Model", "Unit", "build_stage", "partition"]

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
    and dtypes of the arrays that cross a cut for a micro-batch. axes: the mesh axes it can use.
    """

    family: str
    units: tuple[Unit, ...]
    boundary: Callable[[Micro, Any], tuple[Spec, ...]]
    axes: frozenset[str]

    def check_layout(self, mesh: Mesh) -> None:
        """UserError when the mesh has an axis that this model cannot use, or too many stages."""
        layout = mesh.layout
        for axis in ("data", "tensor", "pipe", "context", "expert"):
            size = getattr(layout, axis)
            if size > 1 and axis not in self.axes:
                valid = ", ".join(sorted(self.axes))
                raise UserError(
                    f"parallel.{axis} = {size}: family {self.family!r} runs over {valid} only; "
                    f"set parallel.{axis} = 1"
                )
        if layout.pipe > len(self.units):
            raise UserError(
                f"parallel.pipe = {layout.pipe}: the model can be cut into at most "
                f"{len(self.units)} stages ({self.units[0].name} ... {self.units[-1].name}); "
                f"set parallel.pipe <= {len(self.units)}"
            )


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


def build_stage(model: Model, backend: Backend, mesh: Mesh, dtype: Any, seed: int | None) -> Stage:
    """This rank's stage, with its parameters allocated, and initialized unless seed is None."""
    cuts = partition(tuple(unit.cost for unit in model.units), mesh.pipe.size)
    start, stop = cuts[mesh.pipe.rank]
    store = ParamStore(backend, dtype, seed)
    build = Build(backend, mesh, store)
    layers = [unit.build(build) for unit in model.units[start:stop]]
    store.allocate()
    return Stage(layers, store)
