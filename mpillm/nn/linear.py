"""Products with a weight matrix that is cut over the tensor group, by columns or by rows.

Shoeybi et al. 2019, "Megatron-LM", section 3: a ColumnLinear followed by a RowLinear needs one sum
over the tensor group in the forward pass, in the RowLinear, and one in the backward pass, in the
ColumnLinear.
"""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mpillm.nn.layer import Arrays, Build, Layer, Micro
from mpillm.nn.param import Init, Param
from mpillm.parallel.shard import Shard

if TYPE_CHECKING:
    from mpillm.array.backend import Array

__all__ = ["ColumnLinear", "RowLinear"]


class ColumnLinear(Layer):
    """y = x W^T + b with the outputs cut over the tensor group.

    The outputs have a shape, (3, heads, e) for example, and are cut along its axis `cut`. Takes x
    (b, t, inputs), whole on every rank; gives this rank's part of y as (b, t, outputs of this
    rank).

    bias_at_rest: a place on the outputs' first axis whose bias the loss does not depend on. Its
    gradient is zero, and left so: what a computed one would hold is rounding noise, which Adam
    blows up to full steps that differ from layout to layout.
    """

    def __init__(
        self,
        build: Build,
        name: str,
        inputs: int,
        outputs: tuple[int, ...],
        cut: int,
        *,
        bias: bool,
        std: float,
        bias_at_rest: int | None = None,
    ) -> None:
        mesh = build.mesh
        self._ops = build.backend.ops
        self._tensor = mesh.tensor
        self._bias_at_rest = bias_at_rest
        shape = (*outputs, inputs)
        shard = Shard.split(shape, cut, mesh.tensor.size, mesh.tensor.rank)
        self.weight = build.store.add(
            f"{name}.weight",
            shard,
            Init("normal", std),
            reduce_over=(mesh.replicas,),
            decay=True,
            owner=True,
        )
        self.bias = None
        if bias:
            self.bias = build.store.add(
                f"{name}.bias",
                Shard.split(outputs, cut, mesh.tensor.size, mesh.tensor.rank),
                Init("zeros"),
                reduce_over=(mesh.replicas,),
                decay=False,
                owner=True,
            )
        self.inputs = inputs
        self.local_outputs = shard.local_shape[:-1]
        self.width = math.prod(self.local_outputs)

    def forward(self, inputs: Arrays, micro: Micro) -> tuple[Arrays, Any]:
        """x (b, t, inputs) -> this rank's y (b, t, local outputs)."""
        (x,) = inputs
        x_ni = x.reshape(-1, self.inputs)
        y_no = self._ops.matmul(x_ni, self.weight.value.reshape(-1, self.inputs).T)
        if self.bias is not None:
            y_no += self.bias.value.reshape(-1)
        return (y_no.reshape(*x.shape[:-1], self.width),), x_ni if micro.training else None

    def backward(self, d_outputs: Arrays, saved: Any, micro: Micro) -> Arrays:
        """dy of this rank's outputs -> dx, summed over the tensor group."""
        (dy,) = d_outputs
        x_ni, weight, bias, ops = saved, self.weight, self.bias, self._ops
        dy_no = dy.reshape(x_ni.shape[0], self.width)

        def add_gradients() -> None:
            grad_oi = weight.grad.reshape(-1, self.inputs)
            ops.matmul(dy_no.T, x_ni, out=grad_oi, accumulate=True)
            if bias is not None:
                self._add_bias_gradient(dy_no, bias)

        micro.gradients.add((weight,) if bias is None else (weight, bias), add_gradients)
        dx_ni = ops.matmul(dy_no, weight.value.reshape(-1, self.inputs))
        self._tensor.allreduce(dx_ni)
        return (dx_ni.reshape(*dy.shape[:-1], self.inputs),)

    def _add_bias_gradient(self, dy_no: Array, bias: Param) -> None:
        if self._bias_at_rest is None:
            self._ops.sum_rows(dy_no, bias.grad.reshape(-1))
            return
        places = self.local_outputs[0]
        width = self.width // places
        for place in range(places):
            if place != self._bias_at_rest:
                columns = slice(place * width, (place + 1) * width)
                self._ops.sum_rows(dy_no[:, columns], bias.grad[place].reshape(-1))


class RowLinear(Layer):
    """y = x W^T + b with the inputs cut over the tensor group.

    The inputs have a shape, (heads, e) for example, cut along its axis `cut`. Takes this rank's
    part of x (b, t, inputs of this rank); gives y (b, t, outputs), whole on every rank.
    """

    def __init__(
        self,
        build: Build,
        name: str,
        inputs: tuple[int, ...],
        outputs: int,
        cut: int,
        *,
        bias: bool,
        std: float,
    ) -> None:
        mesh = build.mesh
        self._ops = build.backend.ops
        self._tensor = mesh.tensor
        shard = Shard.split((outputs, *inputs), 1 + cut, mesh.tensor.size, mesh.tensor.rank)
        self.weight = build.store.add(
            f"{name}.weight",
            shard,
            Init("normal", std),
            reduce_over=(mesh.replicas,),
            decay=True,
            owner=True,
        )
        self.bias = None
        if bias:
            # Added after the sum, on every rank alike, and so counted on one.
            self.bias = build.store.add(
                f"{name}.bias",
                Shard.whole((outputs,)),
                Init("zeros"),
                reduce_over=(mesh.replicas,),
                decay=False,
                owner=mesh.tensor.rank == 0,
            )
        self.outputs = outputs
        self.width = math.prod(shard.local_shape[1:])

    def forward(self, inputs: Arrays, micro: Micro) -> tuple[Arrays, Any]:
        """This rank's x (b, t, local inputs) -> y (b, t, outputs), summed over the tensor group."""
        (x,) = inputs
        # Where this rank has no input, b*t cannot be inferred from x, which is empty.
        x_ni = x.reshape(math.prod(x.shape[:-1]), self.width)
        y_no = self._ops.matmul(x_ni, self.weight.value.reshape(self.outputs, self.width).T)
        self._tensor.allreduce(y_no)
        if self.bias is not None:
            y_no += self.bias.value
        return (y_no.reshape(*x.shape[:-1], self.outputs),), x_ni if micro.training else None

    def backward(self, d_outputs: Arrays, saved: Any, micro: Micro) -> Arrays:
        """dy -> dx of this rank's inputs."""
        (dy,) = d_outputs
        x_ni, weight, bias, ops = saved, self.weight, self.bias, self._ops
        dy_no = dy.reshape(-1, self.outputs)

        def add_gradients() -> None:
            grad_oi = weight.grad.reshape(self.outputs, self.width)
            ops.matmul(dy_no.T, x_ni, out=grad_oi, accumulate=True)
            if bias is not None:
                ops.sum_rows(dy_no, bias.grad)

        micro.gradients.add((weight,) if bias is None else (weight, bias), add_gradients)
        dx_ni = ops.matmul(dy_no, weight.value.reshape(self.outputs, self.width))
        return (dx_ni.reshape(*dy.shape[:-1], self.width),)
