"""Layer normalization."""

from __future__ import annotations

from typing import Any

from mpillm.nn.layer import Arrays, Build, Layer, Micro
from mpillm.nn.param import Init
from mpillm.parallel.shard import Shard

__all__ = ["LayerNorm"]


class LayerNorm(Layer):
    """y = (x - mean) / sqrt(var + eps) * gain + bias over the last axis.

    Gain and bias are whole on every rank. Where the tensor ranks share out the rows, each has the
    gradients of its own rows only, and they are summed over the tensor group, too.
    """

    def __init__(self, build: Build, name: str, width: int, *, bias: bool, eps: float) -> None:
        mesh = build.mesh
        self._ops = build.backend.ops
        self._eps = eps
        reduce_over = (mesh.replicas, mesh.tensor) if build.rows.shared else (mesh.replicas,)

        def add(part: str, init: Init) -> Any:
            return build.store.add(
                f"{name}.{part}",
                Shard.whole((width,)),
                init,
                reduce_over=reduce_over,
                decay=False,
                owner=mesh.tensor.rank == 0,
            )

        self.gain = add("gain", Init("ones"))
        self.bias = add("bias", Init("zeros")) if bias else None

    def forward(self, inputs: Arrays, micro: Micro) -> tuple[Arrays, Any]:
        """x (..., d), any rows -> y (..., d)."""
        bias = None if self.bias is None else self.bias.value
        # What is saved may hold the gain, and sharded weights are gone by the backward pass.
        gain = self.gain.value.copy() if micro.training else self.gain.value
        y, saved = self._ops.layernorm_forward(inputs[0], gain, bias, self._eps)
        return (y,), saved if micro.training else None

    def backward(self, d_outputs: Arrays, saved: Any, micro: Micro) -> Arrays:
        """dy -> dx."""
        gain, bias = self.gain, self.bias
        dx, d_gain, d_bias = self._ops.layernorm_backward(d_outputs[0], saved)

        def add_gradients() -> None:
            gain.grad += d_gain
            if bias is not None:
                bias.grad += d_bias

        micro.gradients.add((gain,) if bias is None else (gain, bias), add_gradients)
        return (dx,)
