"""Single operations of mpillm, the reference and the tuned ones, against PyTorch's.

Needs the `oracle` extra (torch); skipped without it.
"""

from __future__ import annotations

import itertools
from typing import Any

import numpy as np
import pytest

from mpillm.array.fast_numpy import FastNumpyOps
from mpillm.array.ops import Ops

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'mpillm[oracle]'")

import torch.nn.functional as F  # noqa: E402, N812

# The arrays are too small for threads to help.
torch.set_num_threads(1)

# What a type allows.
TOLERANCE = {"float32": 1e-5, "float64": 1e-12}

dtypes = pytest.mark.parametrize("dtype", TOLERANCE)
both_ops = pytest.mark.parametrize("ops", [Ops(np), FastNumpyOps(np)], ids=["reference", "fast"])


def assert_close(ours: np.ndarray, theirs: Any, dtype: str) -> None:
    """The same type and, against the largest element, the same values."""
    expected = theirs.detach().numpy()
    assert ours.dtype == expected.dtype == dtype
    finite = np.abs(expected[np.isfinite(expected)])
    tolerance = TOLERANCE[dtype] * max(1.0, float(finite.max(initial=0.0)))
    np.testing.assert_allclose(ours, expected, rtol=0, atol=tolerance)


def normal(rng: np.random.Generator, dtype: str, *shape: int) -> tuple[np.ndarray, Any]:
    """Standard normal numbers, as an array and as a tensor that collects a gradient."""
    array = rng.standard_normal(shape).astype(dtype)
    return array, torch.from_numpy(array.copy()).requires_grad_()


DOCUMENTS = np.array([[0, 0, 0, 1, 1, 1, 1, 2, 2], [0, 1, 1, 1, 1, 1, 3, 3, 3]])
SHUFFLED = np.array([4, 0, 8, 2, 6, 1, 7, 3, 5])  # as a rank that holds a zigzag slice sees them
RANGE = np.arange(9)

# name: heads, key heads, query and key indices, query and key documents, causal, drop
ATTENTION: dict[str, tuple[int, int, Any, Any, Any, Any, bool, float]] = {
    "causal": (4, 4, RANGE, RANGE, None, None, True, 0.0),
    "all visible": (4, 4, RANGE, RANGE, None, None, False, 0.0),
    "documents": (4, 4, RANGE, RANGE, DOCUMENTS, DOCUMENTS, True, 0.0),
    "documents, all visible": (4, 4, RANGE, RANGE, DOCUMENTS, DOCUMENTS, False, 0.0),
    "grouped queries": (6, 2, RANGE, RANGE, None, None, True, 0.0),
    "grouped queries, documents": (6, 2, RANGE, RANGE, DOCUMENTS, DOCUMENTS, True, 0.0),
    "one key head": (4, 1, RANGE, RANGE, None, None, True, 0.0),
    "after a cache": (4, 2, RANGE[-3:], RANGE, None, None, True, 0.0),
    "any order": (4, 4, SHUFFLED, SHUFFLED[::-1], None, None, True, 0.0),
    "rows that see nothing": (4, 2, RANGE, RANGE[4:], None, None, True, 0.0),
    "dropout": (6, 2, RANGE, RANGE, DOCUMENTS, DOCUMENTS, True, 0.3),
}


@dtypes
@both_ops
@pytest.mark.parametrize("case", ATTENTION)
def test_attention(case: str, ops: Ops, dtype: str) -> None:
    h, g, q_index, k_index, q_document, k_document, causal, drop = ATTENTION[case]
    b, tq, tk, e = 2, len(q_index), len(k_index), 8
    rng = np.random.default_rng(1)
    q, q_torch = normal(rng, dtype, b, h, tq, e)
    k, k_torch = normal(rng, dtype, b, g, tk, e)
    v, v_torch = normal(rng, dtype, b, g, tk, e)
    d_out, d_out_torch = normal(rng, dtype, b, h, tq, e)
    row_keys = rng.integers(0, 1 << 63, (b, h, tq)).astype(np.uint64)

    scale = 0.4
    out, lse, saved = ops.attention_forward(
        q,
        k,
        v,
        q_index,
        k_index,
        q_document,
        k_document,
        causal=causal,
        scale=scale,
        drop=drop,
        row_keys=row_keys if drop else None,
    )
    dq, dk, dv = ops.attention_backward(d_out, out, lse, saved)

    mask = torch.ones(b, 1, tq, tk, dtype=torch.bool)
    if causal:
        mask &= torch.from_numpy(q_index[:, None] >= k_index[None, :])
    if q_document is not None:
        mask &= torch.from_numpy(q_document[:, None, :, None] == k_document[:, None, None, :])
    repeated = k_torch.repeat_interleave(h // g, dim=1)
    scores = (q_torch @ repeated.mT * scale).masked_fill(~mask, -torch.inf)
    if drop:
        # PyTorch draws its own; the decisions are ours, the arithmetic theirs.
        keep = torch.from_numpy(ops.random.keep(row_keys, k_index, drop))
        p = scores.softmax(-1) * keep / (1.0 - drop)
        expected = p @ v_torch.repeat_interleave(h // g, dim=1)
    else:
        expected = F.scaled_dot_product_attention(
            q_torch, k_torch, v_torch, attn_mask=mask, scale=scale, enable_gqa=True
        )
    gradients = torch.autograd.grad(expected, (q_torch, k_torch, v_torch), d_out_torch)

    assert_close(out, expected, dtype)
    assert_close(lse, scores.logsumexp(-1), dtype)
    for ours, theirs in zip((dq, dk, dv), gradients, strict=True):
        assert_close(ours, theirs, dtype)


@dtypes
@both_ops
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
def test_layernorm(bias: bool, ops: Ops, dtype: str) -> None:
    rng = np.random.default_rng(2)
    x, x_torch = normal(rng, dtype, 3, 7, 40)
    gain, gain_torch = normal(rng, dtype, 40)
    offset, offset_torch = normal(rng, dtype, 40)
    dy, dy_torch = normal(rng, dtype, 3, 7, 40)
    y, saved = ops.layernorm_forward(x, gain, offset if bias else None, 1e-3)
    dx, d_gain, d_bias = ops.layernorm_backward(dy, saved)
    expected = F.layer_norm(x_torch, (40,), gain_torch, offset_torch if bias else None, 1e-3)
    inputs = (x_torch, gain_torch, offset_torch)[: 3 if bias else 2]
    gradients = torch.autograd.grad(expected, inputs, dy_torch)
    assert_close(y, expected, dtype)
    for ours, theirs in zip((dx, d_gain, d_bias), gradients, strict=False):
        assert_close(ours, theirs, dtype)
    assert (d_bias is not None) == bias


@dtypes
@both_ops
def test_gelu(ops: Ops, dtype: str) -> None:
    rng = np.random.default_rng(4)
    x, x_torch = normal(rng, dtype, 300, 300)  # more than a tile of the tuned version
    dy, dy_torch = normal(rng, dtype, 300, 300)
    y, saved = ops.gelu_forward(4.0 * x)
    dx = ops.gelu_backward(dy, saved)
    expected = F.gelu(4.0 * x_torch, approximate="tanh")
    (gradient,) = torch.autograd.grad(expected, x_torch, dy_torch)
    assert_close(y, expected, dtype)
    assert_close(4.0 * dx, gradient, dtype)


@dtypes
@both_ops
def test_embedding(ops: Ops, dtype: str) -> None:
    rng = np.random.default_rng(5)
    table, table_torch = normal(rng, dtype, 13, 6)
    dy, dy_torch = normal(rng, dtype, 4, 20, 6)
    ids = rng.integers(0, 13, (4, 20))
    expected = F.embedding(torch.from_numpy(ids), table_torch)
    (gradient,) = torch.autograd.grad(expected, table_torch, dy_torch)
    assert_close(ops.embedding_forward(table, ids), expected, dtype)
    grad = np.zeros_like(table)
    ops.embedding_backward(dy, ids, grad)
    assert_close(grad, gradient, dtype)


@dtypes
@both_ops
@pytest.mark.parametrize("cuts", [(0, 65), (0, 22, 44, 65), (0, 0, 64, 65)])
def test_cross_entropy(cuts: tuple[int, ...], ops: Ops, dtype: str) -> None:
    """Over slices of the vocabulary, as tensor ranks hold them."""
    rng = np.random.default_rng(6)
    logits, logits_torch = normal(rng, dtype, 30, 65)
    labels = rng.integers(0, 65, 30)
    weights = rng.random(30).astype(dtype) * (rng.random(30) < 0.7)

    slices = [logits[:, a:b].copy() for a, b in itertools.pairwise(cuts)]
    row_max = np.max([ops.row_max(part) for part in slices], axis=0)
    sums = sum(
        ops.cross_entropy_forward(part, row_max, labels, first)
        for part, first in zip(slices, cuts, strict=False)
    )
    d_logits = [
        ops.cross_entropy_backward(part, sums[0], labels, weights, first)
        for part, first in zip(slices, cuts, strict=False)
    ]

    expected = F.cross_entropy(logits_torch, torch.from_numpy(labels), reduction="none")
    (gradient,) = torch.autograd.grad(expected, logits_torch, torch.from_numpy(weights))
    assert_close(np.log(sums[0]) - sums[1], expected, dtype)
    assert_close(np.concatenate(d_logits, axis=1), gradient, dtype)


@dtypes
@both_ops
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw(decay: float, ops: Ops, dtype: str) -> None:
    """Twenty steps with clipping, on more elements than a tile of the tuned version has."""
    rng = np.random.default_rng(7)
    size, betas, eps, clip = 70_000, (0.9, 0.99), 1e-8, 3.0
    master, master_torch = normal(rng, dtype, size)
    first, second = np.zeros_like(master), np.zeros_like(master)
    optimizer = torch.optim.AdamW([master_torch], betas=betas, eps=eps, weight_decay=decay)
    for step in range(1, 21):
        grad, grad_torch = normal(rng, dtype, size)
        lr = 1e-2 / step
        norm = float(np.sqrt(ops.sum_of_squares(grad, 1000).sum()))
        ops.adamw(
            master,
            grad,
            first,
            second,
            lr=lr,
            betas=betas,
            eps=eps,
            decay=decay,
            step=step,
            grad_scale=clip / (norm + 1e-6),
        )
        master_torch.grad = grad_torch.detach()
        assert norm == pytest.approx(float(torch.nn.utils.clip_grad_norm_([master_torch], clip)))
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
    state = optimizer.state[master_torch]
    assert_close(master, master_torch, dtype)
    assert_close(first, state["exp_avg"], dtype)
    assert_close(second, state["exp_avg_sq"], dtype)
