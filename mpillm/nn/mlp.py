"""The feed-forward part of a block, cut over the tensor group by its inner width."""

from __future__ import annotations

from typing import Any

from mpillm.nn.dropout import Dropout
from mpillm.nn.layer import Arrays, Build, Layer, Micro
from mpillm.nn.linear import ColumnLinear, RowLinear

__all__ = ["MLP"]


class MLP(Layer):
    """y = dropout(W2 gelu(W1 x)).

    Takes this rank's rows of x and gives those of y, (b, t, d) or (rows, d), see `mpillm.nn.rows`.
    """

    def __init__(
        self,
        build: Build,
        name: str,
        width: int,
        inner: int,
        *,
        bias: bool,
        std: float,
        out_std: float,
        drop: float,
    ) -> None:
        self._ops = build.backend.ops
        self.up = ColumnLinear(build, f"{name}.up", width, (inner,), 0, bias=bias, std=std)
        self.down = RowLinear(build, f"{name}.down", (inner,), width, 0, bias=bias, std=out_std)
        self._dropout = Dropout(build, f"{name}.down", drop)

    def forward(self, inputs: Arrays, micro: Micro) -> tuple[Arrays, Any]:
        """This rank's rows of x -> those of y."""
        (x,), saved_up = self.up.forward(inputs, micro)
        x, saved_gelu = self._ops.gelu_forward(x)
        (x,), saved_down = self.down.forward((x,), micro)
        (x,), saved_dropout = self._dropout.forward((x,), micro)
        if not micro.training:
            return (x,), None
        return (x,), (saved_up, saved_gelu, saved_down, saved_dropout)

    def backward(self, d_outputs: Arrays, saved: Any, micro: Micro) -> Arrays:
        """dy -> dx."""
        saved_up, saved_gelu, saved_down, saved_dropout = saved
        d_outputs = self._dropout.backward(d_outputs, saved_dropout, micro)
        (dx,) = self.down.backward(d_outputs, saved_down, micro)
        dx = self._ops.gelu_backward(dx, saved_gelu)
        return self.up.backward((dx,), saved_up, micro)
