"""The block of a Transformer: two residual branches, normalized before."""

from __future__ import annotations

from typing import Any

from mpillm.nn.layer import Arrays, Build, Layer, Micro

__all__ = ["PreNormBlock"]


class PreNormBlock(Layer):
    """x + attention(norm1(x)), then x + mlp(norm2(x)).

    Takes and gives this rank's rows, (b, t, d) or (rows, d), see `mpillm.nn.rows`. In a model with
    mixtures of experts also the auxiliary loss so far, float64 (1,), to which a mixture adds.
    """

    def __init__(
        self, build: Build, norm1: Layer, attention: Layer, norm2: Layer, mlp: Layer
    ) -> None:
        self._ops = build.backend.ops
        self.norm1 = norm1
        self.attention = attention
        self.norm2 = norm2
        self.mlp = mlp

    def forward(self, inputs: Arrays, micro: Micro) -> tuple[Arrays, Any]:
        """This rank's rows of x -> those of y; with an auxiliary loss, if there is one."""
        x, *auxiliary = inputs
        saved = []
        for norm, branch in ((self.norm1, self.attention), (self.norm2, self.mlp)):
            hidden, saved_norm = norm.forward((x,), micro)
            (y, *losses), saved_branch = branch.forward(hidden, micro)
            x = self._ops.add_residual(x, y)
            if losses:
                auxiliary = [auxiliary[0] + losses[0]]
            saved.append((saved_norm, saved_branch, len(losses)))
        return (x, *auxiliary), saved if micro.training else None

    def backward(self, d_outputs: Arrays, saved: Any, micro: Micro) -> Arrays:
        """dy -> dx."""
        dy, *d_auxiliary = d_outputs
        for norm, branch in ((self.norm2, self.mlp), (self.norm1, self.attention)):
            saved_norm, saved_branch, losses = saved.pop()
            d_hidden = branch.backward((dy, *d_auxiliary[:losses]), saved_branch, micro)
            d_hidden = norm.backward(d_hidden, saved_norm, micro)
            dy = self._ops.add_residual(dy, d_hidden[0])
        return (dy, *d_auxiliary)

    def new_state(self, b: int, capacity: int) -> dict[str, Any]:
        """The decoding state of both branches."""
        return {**self.attention.new_state(b, capacity), **self.mlp.new_state(b, capacity)}
