"""The optimizer: AdamW on the arenas."""

from __future__ import annotations

from collections.abc import Iterator

from mpillm.array.backend import Array, Backend
from mpillm.nn.stage import Stage
from mpillm.nn.param import Arena, Param
from mpillm.training.settings import OptimizerSettings

__all__ = ["AdamW"]


class AdamW:
    """AdamW (Loshchilov and Hutter 2019) with one pair of moments for each element of an arena."""

    def __init__(self, stages: list[Stage], backend: Backend, settings: OptimizerSettings) -> None:
        self._ops = backend.ops
        self._settings = settings
        self._arenas = [arena for stage in stages for arena in stage.store.arenas]
        self._moments: dict[Arena, tuple[Array, Array]] = {
            arena: (
                backend.zeros((arena.size,), arena.master.dtype),
                backend.zeros((arena.size,), arena.master.dtype),
            )
            for arena in self._arenas
        }

    def step(self, number: int, lr: float, grad_norm: float) -> None:
        """Update number `number`, from 1, with the gradients clipped to the settings' norm."""
        s = self._settings
        # As torch.nn.utils.clip_grad_norm_ has it.
        scale = min(1.0, s.clip / (grad_norm + 1e-6)) if s.clip > 0.0 else 1.0
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

    def state(self) -> Iterator[tuple[str, Param, Array]]:
        """(kind, parameter, view) of the weights and of every moment, for checkpoints.

        A view has the shape of the parameter's shard; writing to it restores the state.
        """
        for arena in self._arenas:
            first, second = self._moments[arena]
            for param, offset in zip(arena.params, arena.offsets, strict=True):
                part = slice(offset, offset + param.shard.size)
                yield "parameter", param, param.master
                yield "optimizer/m", param, first[part].reshape(param.shard.local_shape)
                yield "optimizer/v", param, second[part].reshape(param.shard.local_shape)
