"""The optimizer: AdamW on the arenas."""

from __future__ import annotations

from collections.abc import Iterator

from mpillm.array.backend import Array, Backend
from mpillm.nn.param import Arena, Param
from mpillm.nn.stage import Stage
from mpillm.parallel.progress import Progress
from mpillm.training.settings import OptimizerSettings

__all__ = ["AdamW"]


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
        self._stores = [stage.store for stage in stages]
        self._arenas = [arena for store in self._stores for arena in store.arenas]
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
        s = self._settings
        # As torch.nn.utils.clip_grad_norm_ has it.
        scale = min(1.0, s.clip / (grad_norm + 1e-6)) if s.clip > 0.0 else 1.0
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

    def state(self) -> Iterator[tuple[str, Param, tuple[int, int] | None, Array]]:
        """(kind, parameter, range, view) of what this rank keeps of weights and moments.

        A view has the shape of the parameter's shard or, with a range, is flat and holds that part
        of the shard's C-order flattened elements. Writing to it restores the state.
        """
        for store in self._stores:
            for param, part, view in store.weights():
                yield "parameter", param, part, view
        for arena in self._arenas:
            for kind, moment in zip(("m", "v"), self._moments[arena], strict=True):
                pieces = arena.pieces(moment) if arena.zero else arena.wholes(moment)
                for param, part, view in pieces:
                    yield f"optimizer/{kind}", param, part, view

    @property
    def bytes(self) -> int:
        """Bytes of the moments on this rank."""
        return sum(int(m.nbytes + v.nbytes) for m, v in self._moments.values())
