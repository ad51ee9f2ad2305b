"""The optimizer: AdamW on the arenas."""

from __future__ import annotations

from collections.abc import Iterable, Iterator

import numpy as np

from mpillm.array.backend import Array, Backend
from mpillm.nn.param import Arena, Param
from mpillm.nn.stage import Stage
from mpillm.parallel.progress import Progress
from mpillm.training.settings import OptimizerSettings

__all__ = ["AdamW", "state_arrays"]

_WEIGHTS = "parameter"
_MOMENTS = ("optimizer/m", "optimizer/v")


def state_arrays(arenas: Iterable[Arena]) -> Iterator[tuple[str, Arena, bool]]:
    """(kind, arena, shared) of everything that training keeps of these arenas, in order.

    shared: whether ZeRO has shared it out, so that a rank keeps its part only. Needs no arrays: a
    plan asks for ranks that do not run.
    """
    arenas = list(arenas)
    for arena in arenas:
        yield _WEIGHTS, arena, arena.zero == 3
    for arena in arenas:
        for kind in _MOMENTS:
            yield kind, arena, arena.zero > 0


class AdamW:
    """AdamW (Loshchilov and Hutter 2019) with one pair of moments for each element of an arena.

    Works on this rank's part of every arena, which is the whole of it without ZeRO.
    """

    def __init__(
        self,
        stages: list[Stage],
        backend: Backend,
        settings: OptimizerSettings,
        progress: Progress,
    ) -> None:
        self._ops = backend.ops
        self._settings = settings
        self._progress = progress
        self._arenas = [arena for stage in stages for arena in stage.store.arenas]
        self._moments: dict[Arena, tuple[Array, Array]] = {
            arena: (
                backend.zeros((arena.master.size,), arena.master.dtype),
                backend.zeros((arena.master.size,), arena.master.dtype),
            )
            for arena in self._arenas
        }

    def step(self, number: int, lr: float, grad_norm: float) -> None:
        """Update number `number`, from 1, with the gradients clipped to the settings' norm.

        Collective where ZeRO shares out the work: every rank then has all updated weights again.
        """
        s, scale = self._settings, self._scale(grad_norm)
        under_way = []
        for arena in self._arenas:
            first, second = self._moments[arena]
            for start, stop, decays in arena.spans():
                part = slice(start, stop)
                self._ops.adamw(
                    arena.master[part],
                    arena.grad[part],
                    first[part],
                    second[part],
                    lr=lr,
                    betas=s.betas,
                    eps=s.eps,
                    decay=s.decay if decays else 0.0,
                    step=number,
                    grad_scale=scale,
                )
            # While the weights of one arena travel, the next one is updated.
            request = arena.share_values()
            if request is not None:
                under_way.append(self._progress.watch(request))
            self._progress.poll()
        for request in under_way:
            self._progress.wait(request)

    def overflows(self, grad_norm: float) -> bool:
        """Whether squares of gradients of this norm are beyond the type of the moments.

        An infinite second moment would never come down again, and its weight never move.
        """
        clipped = grad_norm * self._scale(grad_norm)
        return clipped * clipped > float(np.finfo(self._arenas[0].master.dtype).max)

    def _scale(self, grad_norm: float) -> float:
        """What gradients are multiplied by, as torch.nn.utils.clip_grad_norm_ has it."""
        clip = self._settings.clip
        return min(1.0, clip / (grad_norm + 1e-6)) if clip > 0.0 else 1.0

    def state(self) -> Iterator[tuple[str, Param, tuple[int, int] | None, Array]]:
        """(kind, parameter, range, view) of what this rank keeps of weights and moments.

        A view has the shape of the parameter's shard or, with a range, is flat and holds that part
        of the shard's C-order flattened elements. Writing to it restores the state.
        """
        for kind, arena, shared in state_arrays(self._arenas):
            x = self._array(kind, arena)
            for param, part, view in arena.pieces(x) if shared else arena.wholes(x):
                yield kind, param, part, view

    def _array(self, kind: str, arena: Arena) -> Array:
        """What this rank keeps of an arena's arrays of one kind."""
        if kind == _WEIGHTS:
            return arena.master if arena.zero == 3 else arena.value
        return self._moments[arena][_MOMENTS.index(kind)]

    @property
    def bytes(self) -> int:
        """Bytes of the moments on this rank."""
        return sum(int(m.nbytes + v.nbytes) for m, v in self._moments.values())
