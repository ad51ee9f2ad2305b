"""The operations that `ops.py` times: this package's, and the same in PyTorch."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from typing import Any

from op_case import Case, Side
from settings import OPTIMIZER, Setting, token_stream

__all__ = ["cases"]


def cases(setting: Setting, dtype: str) -> list[Case]:
    """The operations of a setting; in bfloat16 those with products, as others stay float32."""
    make = _Maker(setting, dtype)
    d, v = setting.width, setting.vocabulary
    products = [
        make.linear("product, up", d, 4 * d, bias=False),
        make.linear("product, down", 4 * d, d, bias=False),
        make.linear("product with bias, qkv", d, 3 * d, bias=True),
        make.linear("product, head", d, v, bias=False),
        make.attention(),
    ]
    if dtype == "bfloat16":
        return products
    return [
        *products,
        make.layernorm(),
        make.gelu(),
        make.residual(),
        make.dropout(),
        make.embedding(),
        make.cross_entropy(),
        make.adamw(),
        make.sum_of_squares(),
    ]


class _Maker:
    """Makes cases, with random numbers in NumPy arrays that both sides read."""

    def __init__(self, setting: Setting, dtype: str) -> None:
        import numpy as np
        import torch

        from mpillm.array.backend import Backend

        self.setting, self.np, self.torch = setting, np, torch
        self.functional = torch.nn.functional
        self.backend = Backend.create("numpy", dtype=dtype)
        self.ops = self.backend.ops
        self.b = max(1, setting.batch // 2)
        self.n = self.b * setting.length
        self.bfloat16 = dtype == "bfloat16"
        # 8 bits of each operand against 24.
        self.tolerance = 3e-2 if self.bfloat16 else 1e-4
        self._draw = np.random.default_rng(1)

    def random(self, *shape: int) -> Any:
        """Normal float32."""
        return self._draw.standard_normal(shape, self.np.float32)

    def autograd(self, function: Callable[..., Any], inputs: list[Any], dy: Any = None) -> Side:
        """PyTorch's side: the function of all inputs, and its derivatives by them."""
        torch = self.torch
        inputs = [torch.as_tensor(x).requires_grad_() for x in inputs]
        if dy is not None:
            dy = torch.as_tensor(dy).to(torch.bfloat16 if self.bfloat16 else torch.float32)

        def forward(_: Any) -> tuple[Any, Any]:
            with torch.autocast("cpu", torch.bfloat16, enabled=self.bfloat16):
                y = function(*inputs)
            return y, y

        return Side(forward, lambda y: torch.autograd.grad(y, inputs, dy))

    def linear(self, name: str, inputs: int, outputs: int, *, bias: bool) -> Case:
        """y = x W^T + b, with the gradients of x, W and b."""
        ops, n = self.ops, self.n
        x, w, dy = self.random(n, inputs), self.random(outputs, inputs), self.random(n, outputs)
        b, dw, db = self.random(outputs), self.np.zeros_like(w), self.np.zeros(outputs, w.dtype)

        def forward(_: Any) -> tuple[Any, Any]:
            x_ni = ops.operand(x)
            y = ops.matmul(x_ni, ops.operand(w).T)
            if bias:
                ops.add_bias(y, b)
            return y, x_ni

        def backward(x_ni: Any) -> Sequence[Any]:
            dy_no = ops.operand(dy)
            dw.fill(0.0)
            ops.matmul(dy_no.T, x_ni, out=dw, accumulate=True)
            if bias:
                db.fill(0.0)
                ops.sum_rows(dy, db)
            dx = ops.matmul(dy_no, ops.operand(w))
            return (dx, dw, db) if bias else (dx, dw)

        theirs = self.autograd(self.functional.linear, [x, w, b] if bias else [x, w], dy)
        flops = 6.0 * x.size * outputs
        return Case(name, (n, outputs), Side(forward, backward), theirs, flops, self.tolerance)

    def attention(self) -> Case:
        """Causal; queries, keys and values are views of one product's result, as in the model."""
        ops, torch, setting = self.ops, self.torch, self.setting
        b, t, h = self.b, setting.length, setting.heads
        e = setting.width // h
        qkv, d_qkv = self.random(b, t, 3, h, e), self.random(b, t, 3, h, e)
        d_out = self.random(b, t, h, e).transpose(0, 2, 1, 3)
        q, k, v = qkv.transpose(2, 0, 3, 1, 4)
        into = tuple(d_qkv.transpose(2, 0, 3, 1, 4))
        index, scale = self.np.arange(t), 1.0 / math.sqrt(e)

        def forward(_: Any) -> tuple[Any, Any]:
            saved = ops.attention_forward(q, k, v, index, index, scale=scale)
            return saved[0], saved

        whole = torch.from_numpy(qkv).to(torch.bfloat16 if self.bfloat16 else torch.float32)
        theirs = self.autograd(
            lambda *qkv: self.functional.scaled_dot_product_attention(*qkv, is_causal=True),
            list(whole.permute(2, 0, 3, 1, 4)),
            d_out,
        )
        return Case(
            "attention",
            (b, h, t, e),
            Side(forward, lambda saved: ops.attention_backward(d_out, *saved, into)),
            theirs,
            # Two products forward and five backward, where the scores are computed anew.
            14.0 * b * h * t * (t + 1) / 2 * e,
            self.tolerance,
        )

    def layernorm(self) -> Case:
        """Layer norm, with a bias where the model has one."""
        ops, d, bias = self.ops, self.setting.width, self.setting.bias
        x, dy, gain = self.random(self.n, d), self.random(self.n, d), self.random(d)
        shift = self.random(d) if bias else None
        ours = Side(
            lambda _: ops.layernorm_forward(x, gain, shift),
            lambda saved: ops.layernorm_backward(dy, saved)[: 3 if bias else 2],
        )
        theirs = self.autograd(
            lambda x, *parameters: self.functional.layer_norm(x, (d,), *parameters),
            [x, gain, shift] if bias else [x, gain],
            dy,
        )
        return Case("layer norm", x.shape, ours, theirs)

    def gelu(self) -> Case:
        """GELU in its tanh form, of the feed-forward part's hidden features."""
        ops, shape = self.ops, (self.n, 4 * self.setting.width)
        x, dy = self.random(*shape), self.random(*shape)
        ours = Side(
            lambda _: ops.gelu_forward(x),
            lambda saved: (ops.gelu_backward(dy, saved),),
        )
        theirs = self.autograd(lambda x: self.functional.gelu(x, approximate="tanh"), [x], dy)
        return Case("GELU", shape, ours, theirs)

    def residual(self) -> Case:
        """x + y, ours in place of y; there is nothing to do backward."""
        ops, shape = self.ops, (self.n, self.setting.width)
        x, y = self.random(*shape), self.random(*shape)
        a, b = self.torch.from_numpy(x), self.torch.from_numpy(y.copy())
        ours = Side(lambda y: (ops.add_residual(x, y), None), None, y.copy)
        return Case("residual", shape, ours, Side(lambda _: (a + b, None)))

    def dropout(self) -> Case:
        """Dropout of one feature in ten; ours draws numbers that no layout changes."""
        ops, shape = self.ops, (self.n, self.setting.width)
        x, dy = self.random(*shape), self.random(*shape)
        keys = self.backend.random.fold(1, self.np.arange(self.n, dtype=self.np.uint64))
        ours = Side(
            lambda _: ops.dropout_forward(x, keys, 0.1),
            lambda saved: (ops.dropout_backward(dy, saved),),
        )
        theirs = self.autograd(lambda x: self.functional.dropout(x, 0.1, training=True), [x], dy)
        return Case("dropout", shape, ours, theirs, tolerance=math.inf)

    def embedding(self) -> Case:
        """Rows of the token table, and its gradient."""
        ops, np, setting = self.ops, self.np, self.setting
        ids = token_stream(setting.vocabulary)[: self.n].astype(np.int32)
        ids = ids.reshape(self.b, setting.length)
        table = self.random(setting.vocabulary, setting.width)
        dy = self.random(*ids.shape, setting.width)
        grad = np.zeros_like(table)

        def backward(_: Any) -> Sequence[Any]:
            grad.fill(0.0)
            ops.embedding_backward(dy, ids, grad)
            return (grad,)

        ours = Side(lambda _: (ops.embedding_forward(table, ids), None), backward)
        long = self.torch.from_numpy(ids).long()
        theirs = self.autograd(lambda table: self.functional.embedding(long, table), [table], dy)
        return Case("embedding", dy.shape, ours, theirs)

    def cross_entropy(self) -> Case:
        """Mean cross-entropy of logits. Ours overwrites them, so that it is handed a copy."""
        ops, np, n, v = self.ops, self.np, self.n, self.setting.vocabulary
        logits = self.random(n, v)
        labels = self._draw.integers(0, v, n)
        weight = np.full(n, 1.0 / n, np.float32)

        def forward(copy: Any) -> tuple[Any, Any]:
            total, target = ops.cross_entropy_forward(copy, ops.row_max(copy), labels)
            return (np.log(total) - target).sum(dtype="float64") / n, (copy, total)

        def backward(saved: Any) -> Sequence[Any]:
            return (ops.cross_entropy_backward(*saved, labels, weight),)

        targets = self.torch.from_numpy(labels)
        theirs = self.autograd(lambda x: self.functional.cross_entropy(x, targets), [logits])
        return Case("cross-entropy", (n, v), Side(forward, backward, logits.copy), theirs)

    def _block(self) -> list[Any]:
        """Arrays of the shapes of a block's weights."""
        d = self.setting.width
        return [self.random(*shape) for shape in ((3 * d, d), (d, d), (4 * d, d), (d, 4 * d))]

    def adamw(self) -> Case:
        """The update of a block's weights, ours in one arena."""
        ops, np, torch, s = self.ops, self.np, self.torch, OPTIMIZER
        weights, grads = self._block(), self._block()
        master, grad = (np.concatenate([x.ravel() for x in one]) for one in (weights, grads))
        moments = np.zeros_like(master), np.zeros_like(master)
        # So large a learning rate that a wrong update is seen beside the weights.
        values: dict[str, Any] = {"lr": 1.0, "betas": s.betas, "eps": s.eps}
        steps = 0

        def update(_: Any) -> tuple[Any, Any]:
            nonlocal steps
            steps += 1
            more = {"decay": s.decay, "step": steps, "grad_scale": 1.0}
            ops.adamw(master, grad, *moments, **values, **more)
            return master, None

        parameters = [torch.nn.Parameter(torch.from_numpy(x)) for x in weights]
        for parameter, x in zip(parameters, grads, strict=True):
            parameter.grad = torch.from_numpy(x)
        optimizer = torch.optim.AdamW(parameters, weight_decay=s.decay, fused=True, **values)

        def their_update(_: Any) -> tuple[Any, Any]:
            optimizer.step()
            return parameters, None

        theirs = Side(their_update)
        return Case("AdamW", master.shape, Side(update), theirs)

    def sum_of_squares(self) -> Case:
        """The norm of a block's gradients, for clipping; ours the same bits in every layout."""
        from mpillm.array.ops import norm_block

        ops, torch, grads = self.ops, self.torch, self._block()
        arrays = [(x.ravel(), norm_block(x.shape)) for x in grads]
        tensors = [torch.from_numpy(x) for x in grads]

        def norm(_: Any) -> tuple[Any, Any]:
            return math.sqrt(sum(ops.sum_of_squares(x, n).sum() for x, n in arrays)), None

        theirs = Side(lambda _: (torch.nn.utils.get_total_norm(tensors), None))
        return Case("sum of squares", (sum(x.size for x in grads),), Side(norm), theirs)
