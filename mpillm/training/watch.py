"""Where a number that is not finite appeared first: in which layer or parameter, on which rank.

While a step runs every rank looks at what its layers give and at its own gradients, before they are
added to others': one product of each array with itself. Only if a step turns out to be bad is
looked closer, and told what all ranks saw.
"""

from __future__ import annotations

import math
import platform
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from enum import IntEnum
from typing import Any

import numpy as np

from mpillm.array.backend import Array, Backend
from mpillm.models.model import Model
from mpillm.nn.layer import Arrays, Layer
from mpillm.nn.param import Arena, Param
from mpillm.nn.stage import Stage
from mpillm.parallel.mesh import Mesh

__all__ = ["Finding", "Kind", "Watch", "all_finite", "first_of", "place_text"]


class Kind(IntEnum):
    """What is not finite, in the order in which one makes the others so."""

    WEIGHTS = 0
    MOMENTS = 1
    OUTPUT = 2
    LOSS = 3
    GRADIENT = 4
    SUM = 5


@dataclass(frozen=True, order=True)
class Finding:
    """Something that is not finite on a rank.

    micro: number of the micro-batch in the step, -1 where there is none. order: ascending in the
    order of appearance, within a kind and a micro-batch. what: it, in words.
    """

    kind: Kind
    micro: int
    order: tuple[int, int]
    what: str = field(compare=False)


def all_finite(backend: Backend, x: Array) -> Any:
    """Whether all elements are finite: a bool, or on a device a 0-dimensional array to be asked.

    On the host a dot product finds out at the speed of memory. It may overflow.
    """
    if backend.on_host:
        flat = x.reshape(-1)
        with np.errstate(over="ignore", invalid="ignore"):
            product = np.dot(flat, flat)
        return math.isfinite(product) or bool(np.isfinite(flat).all())
    return backend.xp.isfinite(x).all()


class Watch:
    """What this rank has seen in a step. Nothing here is collective.

    Flags of a device's arrays are kept as they are, and read only if a step is bad.
    """

    def __init__(
        self,
        model: Model,
        stages: list[Stage],
        mesh: Mesh,
        backend: Backend,
        numbers: Sequence[int],
    ) -> None:
        """numbers: of this rank's micro-batches, in the step, in the order in which they run."""
        self._backend = backend
        self._numbers = numbers
        self._arenas = [arena for stage in stages for arena in stage.store.arenas]
        # Numbers of the layers in the model, and of the first layer of the stage of each arena.
        self._layers: dict[Layer, int] = {}
        self._starts: dict[Arena, int] = {}
        pipe = mesh.pipe
        cuts = model.cuts(mesh.layout)[pipe.rank :: pipe.size]
        for stage, (start, _) in zip(stages, cuts, strict=True):
            self._layers |= {layer: start + i for i, layer in enumerate(stage.layers)}
            self._starts |= dict.fromkeys(stage.store.arenas, start)
        self._names = [unit.name for unit in model.units]
        self._opened: dict[Param, int] = {}
        self._seen: list[tuple[Any, Finding]] = []

    def begin_step(self) -> None:
        """Forget what was seen."""
        self._seen.clear()

    def outputs_of(self, place: int) -> Callable[[Layer, Arrays], None]:
        """What looks at the outputs of layers for this rank's micro-batch number `place`."""

        def look(layer: Layer, outputs: Arrays) -> None:
            for x in outputs:
                flag = all_finite(self._backend, x)
                if flag is not True:
                    self._saw(flag, Kind.OUTPUT, place, (self._layers[layer], 0), layer)

        return look

    def opened(self, params: tuple[Param, ...]) -> None:
        """Note in which order the backward pass comes to the parameters."""
        for param in params:
            self._opened.setdefault(param, len(self._opened))

    def gradients(self, arena: Arena, place: int, since: int) -> None:
        """Look at gradients of micro-batches `since` to `place`, still this rank's own."""
        if arena.grads is None:  # no work was handed in
            return
        if self._backend.on_host and all_finite(self._backend, arena.grads):
            return
        for uses in arena.uses:
            # Which of several uses has spoilt a gradient that they share cannot be told. It is put
            # down to the one that the backward pass comes to last: what came before is named first.
            for use in uses if arena.uses_apart else uses[:1]:
                order = (-self._starts[arena] - use.layer, self._opened.get(use, 0))
                flag = all_finite(self._backend, use.grad)
                if flag is not True:
                    self._saw(flag, Kind.GRADIENT, since, order, use, place)

    def _saw(
        self,
        flag: Any,
        kind: Kind,
        place: int,
        order: tuple[int, int],
        what: Layer | Param,
        last: int | None = None,
    ) -> None:
        first = self._numbers[place]
        micros = f"micro-batch {first}"
        if last is not None and last != place:
            micros = f"micro-batches {first} to {self._numbers[last]}"
        if isinstance(what, Param):
            text = f"the gradient of {what.name} from {micros}"
        else:
            text = f"the output of {self._names[order[0]]} in the forward pass of {micros}"
        self._seen.append((flag, Finding(kind, first, order, text)))

    # -- a bad step --------------------------------------------------------------------------------

    def clean(self) -> bool:
        """Whether everything that was seen is finite; one copy from a device."""
        flags = [flag for flag, _ in self._seen]
        return not flags or bool(self._backend.xp.stack(flags).all())

    def seen(self) -> list[Finding]:
        """Outputs and gradients that were not finite, sorted."""
        return sorted(finding for flag, finding in self._seen if not bool(flag))

    def findings(
        self, state: Iterable[tuple[str, Param, tuple[int, int] | None, Array]]
    ) -> list[Finding]:
        """What is not finite on this rank after a step; the first one of each kind is enough.

        state: weights and moments, as `AdamW.state` gives them. Gradients must have been summed.
        """
        found = self.seen()
        for number, (kind, param, _, x) in enumerate(state):
            bad = self._count(x)
            if bad:
                weights = kind == "parameter"
                name = "the weight" if weights else kind
                text = f"{name} {param.name}" if weights else f"{name} of {param.name}"
                text += f" ({bad:,} of {x.size:,} elements)"
                found.append(
                    Finding(Kind.WEIGHTS if weights else Kind.MOMENTS, -1, (number, 0), text)
                )
        for arena in self._arenas:
            for param, _, x in arena.pieces(arena.grad):
                if self._count(x):
                    order = (-self._starts[arena] - param.layer, self._opened.get(param, 0))
                    text = f"the gradient of {param.name} in its sum"
                    found.append(Finding(Kind.SUM, -1, order, text))
        return sorted(found)

    def losses(self, of_micros: Sequence[np.ndarray]) -> list[Finding]:
        """Losses of this rank's micro-batches that are not finite, by number.

        of_micros: those of all of the step's micro-batches, float64 (micros,), of each kind.
        """
        bad = (j for j in self._numbers if not all(np.isfinite(x[j]) for x in of_micros))
        return [Finding(Kind.LOSS, j, (0, 0), f"the loss of micro-batch {j}") for j in bad]

    def _count(self, x: Array) -> int:
        """Elements that are not finite."""
        if bool(all_finite(self._backend, x)):
            return 0
        return int((~self._backend.xp.isfinite(x)).sum())


def first_of(mesh: Mesh, mine: Sequence[Finding]) -> tuple[Finding, str] | None:
    """The first finding of all ranks, and the ranks that saw it, in words; collective.

    mine: this rank's, sorted. The same on every rank; None where no rank found anything.
    """
    best = mine[0] if mine else None
    everyone = mesh.world.allgather_objects((best, platform.node()))
    found = [finding for finding, _ in everyone if finding is not None]
    if not found:
        return None
    first = min(found)
    ranks = [
        (rank, node)
        for rank, (finding, node) in enumerate(everyone)
        if finding is not None and finding == first and finding.what == first.what
    ]
    return first, place_text(mesh, ranks)


def place_text(mesh: Mesh, ranks: Sequence[tuple[int, str]]) -> str:
    """World ranks with their places in the mesh and their nodes, in words; at most four of them."""
    texts = []
    for rank, node in ranks[:4]:
        place = [
            f"{axis} {i}" for axis, i in mesh.grid.place(rank).items() if mesh.grid.sizes[axis] > 1
        ]
        texts.append(f"rank {rank} ({', '.join([*place, f'node {node}'])})")
    if len(ranks) > 4:
        texts.append(f"{len(ranks) - 4} more")
    return texts[0] if len(texts) == 1 else f"{', '.join(texts[:-1])} and {texts[-1]}"
