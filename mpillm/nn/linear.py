"""Products with a weight matrix that is cut over the tensor group, by columns or by rows.

Shoeybi et al. 2019, "Megatron-LM", section 3: a ColumnLinear followed by a RowLinear needs one sum
over the tensor group in the forward pass, in the RowLinear, and one in the backward pass, in the
ColumnLinear. With sequence parallelism (Korthikanti et al. 2022, section 4.2.2) what goes into the
one and comes out of the other is this rank's rows: they are gathered before the product, and the
sum is shared out. Between the two a rank holds all rows of its part of the features.
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

    The outputs have a shape, (3, heads, e) for example, and are cut along its axis `cut`. Takes
    this rank's rows of x, (b, t, inputs) or (rows, inputs), see `mpillm.nn.rows`; gives all rows of
    its part of y, (b, t, outputs of this rank).

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
        self._rows = build.rows
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
        """This rank's rows of x -> all rows of this rank's y (b, t, local outputs)."""
        (x,) = inputs
        ops = self._ops
        shape = (*micro.shape, self.width)
        x = ops.operand(x)
        x_ni = self._rows.gather(x, *micro.shape).reshape(-1, self.inputs)
        y_no = ops.matmul(x_ni, self._weight_oi().T)
        if self.bias is not None:
            ops.add_bias(y_no, self.bias.value.reshape(-1))
        return (y_no.reshape(shape),), x if micro.training else None

    def backward(self, d_outputs: Arrays, saved: Any, micro: Micro) -> Arrays:
        """All rows of dy of this rank's outputs -> its rows of dx, summed over the ranks."""
        (dy,) = d_outputs
        x, weight, bias, ops = saved, self.weight, self.bias, self._ops
        rows_no = dy.reshape(math.prod(dy.shape[:-1]), self.width)
        dy_no = ops.operand(rows_no)

        def add_gradients() -> None:
            # The rows are gathered anew here and not before: work that is put off then holds this
            # rank's rows only, without which zero bubble would cost the memory that sharing them
            # saves. Tensor ranks run the same program, so they come to it in the same order.
            x_ni = self._rows.gather(x, *micro.shape).reshape(-1, self.inputs)
            grad_oi = weight.grad.reshape(-1, self.inputs)
            ops.matmul(dy_no.T, x_ni, out=grad_oi, accumulate=True)
            if bias is not None:
                self._add_bias_gradient(rows_no, bias)

        micro.gradients.add((weight,) if bias is None else (weight, bias), add_gradients)
        dx_ni = ops.matmul(dy_no, self._weight_oi())
        return (self._rows.sum(dx_ni.reshape(*dy.shape[:-1], self.inputs)),)

    def _weight_oi(self) -> Array:
        """The weight as a matrix, an operand of products."""
        return self._ops.operand(self.weight.value.reshape(-1, self.inputs))

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

    The inputs have a shape, (heads, e) for example, cut along its axis `cut`. Takes all rows of
    this rank's part of x, (b, t, inputs of this rank); gives this rank's rows of y, (b, t, outputs)
    or (rows, outputs), see `mpillm.nn.rows`.
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
        self._rows = build.rows
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
            # Added after the sum, on every rank alike, and so counted on one. Its gradient is that
            # of all rows on every rank, as dy is gathered anyway, and needs no sum over them.
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
        """All rows of this rank's x (b, t, local inputs) -> its rows of y, summed over ranks."""
        (x,) = inputs
        # Where this rank has no input, b*t cannot be inferred from x, which is empty.
        x_ni = self._ops.operand(x.reshape(math.prod(x.shape[:-1]), self.width))
        y_no = self._ops.matmul(x_ni, self._weight_oi().T)
        y = self._rows.sum(y_no.reshape(*x.shape[:-1], self.outputs))
        if self.bias is not None:
            self._ops.add_bias(y, self.bias.value)
        return (y,), x_ni if micro.training else None

    def backward(self, d_outputs: Arrays, saved: Any, micro: Micro) -> Arrays:
        """This rank's rows of dy -> all rows of dx of this rank's inputs."""
        x_ni, weight, bias, ops = saved, self.weight, self.bias, self._ops
        dy = self._rows.gather(d_outputs[0], *micro.shape)
        rows_no = dy.reshape(-1, self.outputs)
        dy_no = ops.operand(rows_no)

        def add_gradients() -> None:
            grad_oi = weight.grad.reshape(self.outputs, self.width)
            ops.matmul(dy_no.T, x_ni, out=grad_oi, accumulate=True)
            if bias is not None:
                ops.sum_rows(rows_no, bias.grad)

        micro.gradients.add((weight,) if bias is None else (weight, bias), add_gradients)
        dx_ni = ops.matmul(dy_no, self._weight_oi())
        return (dx_ni.reshape(*dy.shape[:-1], self.width),)

    def _weight_oi(self) -> Array:
        """The weight as a matrix, an operand of products."""
        return self._ops.operand(self.weight.value.reshape(self.outputs, self.width))
