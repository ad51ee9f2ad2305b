"""Every operation on every backend: against the reference, a plain formula, and its own slope."""

from __future__ import annotations

import importlib
import importlib.util
import inspect
import math
import pkgutil
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
from gradcheck import check_directional
from hypothesis import given, settings
from hypothesis import strategies as st

import mpillm.array
from mpillm.array.backend import Backend
from mpillm.array.fast_numpy import FastNumpyOps
from mpillm.array.ops import Ops, norm_block
from mpillm.array.random import KeyedRandom
from mpillm.errors import UserError

BACKENDS = ["reference", "numpy", "onednn", "strict"]
BACKENDS += ["cupy"] * bool(importlib.util.find_spec("cupy"))
HOST: list[Ops] = [Ops(np), FastNumpyOps(np)]
REFERENCE = HOST[0]

# A little more than a tile of the tuned versions.
TILED = 70_001

# Relative to the largest element of a result.
TOLERANCE = {"float32": 1e-5, "float64": 1e-13}

on_host = pytest.mark.parametrize("ops", HOST, ids=["reference", "numpy"])


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    name: str = request.param
    if name == "reference":
        return Backend(name, np, Ops(np))
    try:
        return Backend.create(name)
    except UserError as error:  # oneDNN is an extra
        pytest.skip(str(error))


# -- the cases ------------------------------------------------------------------------------------

Inputs = dict[str, Any]


@dataclass(frozen=True)
class Case:
    """Inputs by name, floating ones in float64; what to compute; and the inputs that it changes."""

    inputs: Inputs
    run: Callable[[Ops, Inputs], Sequence[Any]]
    changed: tuple[str, ...] = ()


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def integers(seed: int, bound: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, bound, shape, dtype=np.int32)


def keys(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 2**64, shape, dtype=np.uint64)


@dataclass(frozen=True)
class Attention:
    """Settings of an attention; `index` and `documents` are those of queries and of keys."""

    q_index: Any
    k_index: Any
    q_document: Any = None
    k_document: Any = None
    b: int = 2
    h: int = 4
    g: int = 4
    e: int = 3
    causal: bool = True
    drop: float = 0.0
    size: float = 1.0

    def inputs(self) -> Inputs:
        q_index, k_index = (np.array(x, np.int64) for x in (self.q_index, self.k_index))
        tq, tk = q_index.shape[-1], k_index.shape[-1]
        inputs = {
            "q": self.size * normal(1, self.b, self.h, tq, self.e),
            "k": normal(2, self.b, self.g, tk, self.e),
            "v": normal(3, self.b, self.g, tk, self.e),
            "d_out": normal(4, self.b, self.h, tq, self.e),
            "q_index": q_index,
            "k_index": k_index,
            "row_keys": keys(5, self.b, self.h, tq),
        }
        if self.q_document is not None:
            inputs["q_document"] = np.array(self.q_document, np.int32)
            inputs["k_document"] = np.array(self.k_document, np.int32)
        return inputs

    def apply(self, operation: Callable[..., Any], x: Inputs) -> Any:
        """`attention_forward` or `attention_saved`."""
        return operation(
            x["q"],
            x["k"],
            x["v"],
            x["q_index"],
            x["k_index"],
            x.get("q_document"),
            x.get("k_document"),
            causal=self.causal,
            scale=0.7,
            drop=self.drop,
            row_keys=x["row_keys"] if self.drop > 0 else None,
        )

    def forward(self, ops: Ops, x: Inputs) -> tuple[Any, Any, Any]:
        out, lse, saved = self.apply(ops.attention_forward, x)
        return out, lse, saved

    def run(self, ops: Ops, x: Inputs) -> tuple[Any, ...]:
        out, lse, saved = self.forward(ops, x)
        return out, lse, *ops.attention_backward(x["d_out"], out, lse, saved)


PLACES = range(6)
PACKED = [0, 0, 1, 1, 1, 2]
ATTENTION = {
    "causal": Attention(PLACES, PLACES),
    "all to all": Attention(PLACES, PLACES, causal=False),
    "documents": Attention(PLACES, PLACES, PACKED, PACKED),
    "documents, all to all": Attention(PLACES, PLACES, PACKED, PACKED, causal=False),
    "documents by row": Attention(PLACES, PLACES, [PACKED, [0] * 6], [PACKED, [0] * 6]),
    "grouped queries": Attention(PLACES, PLACES, g=2),
    "one key head": Attention(PLACES, PLACES, g=1, drop=0.3),
    "dropout": Attention(PLACES, PLACES, drop=0.3),
    "dropout by row": Attention([[0, 2], [5, 1]], [[0, 1, 2], [1, 5, 0]], drop=0.4, g=2),
    "zigzag": Attention([0, 1, 10, 11], [2, 3, 8, 9, 0, 1, 10, 11], drop=0.2),
    "index by row": Attention([[0, 1, 2], [4, 3, 7]], [[0, 1, 2, 3], [7, 4, 2, 5]]),
    "some large scores": Attention(PLACES, PLACES, size=25.0),
    "decoding": Attention([4], range(5), g=2),
    "decoding a few": Attention([3, 4], range(5)),
    "rows that see nothing": Attention([0, 5, 1], [4, 3, 5]),
    "a document of its own": Attention(PLACES, PLACES, [0, 9, 1, 1, 9, 2], PACKED, causal=False),
    "no heads": Attention(PLACES, PLACES, h=0, g=0, drop=0.1),
    "no keys": Attention(PLACES, [], drop=0.1),
    "no queries": Attention([], PLACES),
    "no rows": Attention(PLACES, PLACES, b=0),
}


def attention_merge(ops: Ops, x: Inputs) -> Sequence[Any]:
    ops.attention_merge(x["out"], x["lse"], x["part"], x["part_lse"])
    return ()


def attention_merge_case(*shape: int) -> Case:
    """Some rows have seen no key so far, some see none in the part."""
    out, part = normal(1, *shape, 3), normal(2, *shape, 3)
    lse, part_lse = 9 * normal(3, *shape), 9 * normal(4, *shape)
    for which, (rows, row_lse) in enumerate([(out, lse), (part, part_lse)]):
        blind = integers(5 + which, 2, *shape) == 1
        rows[blind], row_lse[blind] = 0.0, -np.inf
    inputs = {"out": out, "lse": lse, "part": part, "part_lse": part_lse}
    return Case(inputs, attention_merge, ("out", "lse"))


def layernorm(ops: Ops, x: Inputs) -> Sequence[Any]:
    y, saved = ops.layernorm_forward(x["x"], x["gain"], x.get("bias"), 1e-5)
    return y, *ops.layernorm_backward(x["dy"], saved)


def gelu(ops: Ops, x: Inputs) -> Sequence[Any]:
    y, saved = ops.gelu_forward(x["x"])
    return y, ops.gelu_backward(x["dy"], saved)


def transposed_gelu(ops: Ops, x: Inputs) -> Sequence[Any]:
    y, saved = ops.gelu_forward(x["x"].T)
    return y, ops.gelu_backward(x["dy"].T, saved)


def dropout(ops: Ops, x: Inputs) -> Sequence[Any]:
    y, saved = ops.dropout_forward(x["x"], x["row_keys"], 0.3)
    return y, ops.dropout_backward(x["dy"], saved)


def embedding(first: int) -> Callable[[Ops, Inputs], Sequence[Any]]:
    def run(ops: Ops, x: Inputs) -> Sequence[Any]:
        ops.embedding_backward(x["dy"], x["ids"], x["grad"], first)
        return (ops.embedding_forward(x["table"], x["ids"], first),)

    return run


def embedding_case(rows: int, first: int, *shape: int) -> Case:
    inputs = {
        "table": normal(1, rows, 5),
        "ids": integers(2, 9, *shape),
        "dy": normal(3, *shape, 5),
        "grad": normal(4, rows, 5),
    }
    return Case(inputs, embedding(first), ("grad",))


def cross_entropy(first: int) -> Callable[[Ops, Inputs], Sequence[Any]]:
    def run(ops: Ops, x: Inputs) -> Sequence[Any]:
        row_max = ops.row_max(x["logits"])
        # A slice without columns has its maximum from the other slices.
        sums = ops.cross_entropy_forward(x["logits"], x["top"], x["labels"], first)
        ops.cross_entropy_backward(
            x["logits"], sums[0] + x["others"], x["labels"], x["weight"], first
        )
        return row_max, sums

    return run


def cross_entropy_case(columns: int, first: int) -> Case:
    logits = 3 * normal(1, 7, columns)
    inputs = {
        "logits": logits,
        "top": logits.max(axis=1, initial=0.5),
        "labels": integers(2, 11, 7),
        "others": np.exp(normal(3, 7)),
        "weight": np.abs(normal(4, 7)) * [0, 1, 1, 1, 0, 1, 1],
    }
    return Case(inputs, cross_entropy(first), ("logits",))


def adamw(decay: float, steps: int) -> Callable[[Ops, Inputs], Sequence[Any]]:
    def run(ops: Ops, x: Inputs) -> Sequence[Any]:
        for step in range(1, steps + 1):
            ops.adamw(
                x["master"],
                x["grad"],
                x["first"],
                x["second"],
                lr=0.03,
                betas=(0.9, 0.99),
                eps=1e-6,
                decay=decay,
                step=step,
                grad_scale=0.25,
            )
        return ()

    return run


def adamw_case(size: int, decay: float, steps: int) -> Case:
    inputs = {
        "master": normal(1, size),
        "grad": normal(2, size),
        "first": normal(3, size) / 10,
        "second": normal(4, size) ** 2 / 10,
    }
    return Case(inputs, adamw(decay, steps), ("master", "first", "second"))


def matmul(ops: Ops, x: Inputs) -> Sequence[Any]:
    product = ops.matmul(x["a"], x["b"])
    assert ops.matmul(x["a"], x["b"], out=x["written"]) is x["written"]
    assert ops.matmul(x["a"], x["b"], out=x["added"], accumulate=True) is x["added"]
    return product, ops.matmul(x["b"].swapaxes(-1, -2), x["a"].swapaxes(-1, -2))


def matmul_case(batch: tuple[int, ...], m: int, k: int, n: int) -> Case:
    inputs = {
        "a": normal(1, *batch, m, k),
        "b": normal(2, *batch, k, n),
        "written": normal(3, *batch, m, n),
        "added": normal(4, *batch, m, n),
    }
    return Case(inputs, matmul, ("written", "added"))


def sum_rows(ops: Ops, x: Inputs) -> Sequence[Any]:
    ops.sum_rows(x["x"], x["out"])
    return ()


def bias_and_residual(ops: Ops, x: Inputs) -> Sequence[Any]:
    ops.add_bias(x["x"], x["out"])
    assert ops.add_residual(x["x"], x["y"]) is x["y"]
    return (ops.matmul(ops.operand(x["x"]), ops.operand(x["y"]).T),)


def rows_case(run: Callable[[Ops, Inputs], Sequence[Any]], *shape: int, bias: bool = True) -> Case:
    inputs = {
        "x": normal(1, *shape) + 0.3,
        "dy": normal(2, *shape),
        "gain": normal(3, shape[-1]),
        "row_keys": keys(5, *shape[:-1]),
    }
    return Case({**inputs, "bias": normal(4, shape[-1])} if bias else inputs, run)


CASES: dict[str, Case] = {
    "matmul": matmul_case((), 5, 7, 3),
    "matmul of stacks": matmul_case((2, 3), 5, 7, 3),
    "matmul over nothing": matmul_case((2,), 3, 0, 4),
    "matmul of nothing": matmul_case((), 0, 4, 3),
    "sum_rows": Case({"x": normal(1, 40, 6), "out": normal(2, 6)}, sum_rows),
    "bias and residual": Case(
        {"x": normal(1, 40, 6), "out": normal(2, 6), "y": normal(3, 40, 6)},
        bias_and_residual,
        ("x", "y"),
    ),
    "layernorm": rows_case(layernorm, 2, 5, 33),
    "layernorm without bias": rows_case(layernorm, 2, 5, 33, bias=False),
    "layernorm of nothing": rows_case(layernorm, 0, 33),
    "gelu": Case({"x": 3 * normal(1, TILED), "dy": normal(2, TILED)}, gelu),
    "gelu of a transposed array": rows_case(transposed_gelu, 40, 7),
    "gelu of nothing": rows_case(gelu, 4, 0),
    "dropout": rows_case(dropout, 2, 5, 33),
    "dropout of nothing": rows_case(dropout, 2, 5, 0),
    "embedding": embedding_case(9, 0, 4, 8),
    "embedding of a slice": embedding_case(4, 3, 40),
    "embedding outside": embedding_case(4, 100, 6),
    "embedding without rows": embedding_case(0, 3, 5),
    "embedding of nothing": embedding_case(9, 0, 0),
    "cross entropy": cross_entropy_case(11, 0),
    "cross entropy of a slice": cross_entropy_case(4, 5),
    "cross entropy without columns": cross_entropy_case(0, 11),
    "adamw": adamw_case(TILED, 0.1, 2),
    "adamw without decay": adamw_case(50, 0.0, 1),
    "adamw of nothing": adamw_case(0, 0.1, 1),
    "sum_of_squares": Case(
        {"x": normal(1, 5000)}, lambda ops, x: (ops.sum_of_squares(x["x"], 300),)
    ),
    **{
        f"attention, {name}": Case(attention.inputs(), attention.run)
        for name, attention in ATTENTION.items()
    },
    "attention_merge": attention_merge_case(2, 4, 6),
    "attention_merge of nothing": attention_merge_case(2, 0, 6),
}


# -- every backend against the reference in float64 -----------------------------------------------


def cast(inputs: Inputs, dtype: str) -> Inputs:
    return {
        name: x.astype(dtype) if x.dtype.kind == "f" else x.copy() for name, x in inputs.items()
    }


def same(ours: np.ndarray, exact: np.ndarray, tolerance: float) -> None:
    assert ours.shape == exact.shape
    infinite = np.isinf(exact)
    assert (ours[infinite] == exact[infinite]).all()
    scale = np.abs(exact[~infinite]).max(initial=1e-30)
    assert np.abs(ours[~infinite] - exact[~infinite]).max(initial=0.0) <= tolerance * scale


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("name", CASES)
def test_every_backend_agrees_with_the_reference(backend: Backend, name: str, dtype: str) -> None:
    case = CASES[name]
    held = cast(case.inputs, dtype)
    exact = cast(held, "float64")
    device = {label: backend.from_host(x.copy()) for label, x in held.items()}
    ours = [None if x is None else backend.to_host(x) for x in case.run(backend.ops, device)]
    expected = case.run(REFERENCE, exact)
    for x, y in zip(ours, expected, strict=True):
        assert (x is None) == (y is None)
        if x is not None:
            assert x.dtype == ("float64" if name == "sum_of_squares" else dtype)
            same(x, y, TOLERANCE[dtype])
    for label, before in held.items():
        after = backend.to_host(device[label])
        assert after.dtype == before.dtype
        if label in (*case.changed, "out"):
            same(after, exact[label], TOLERANCE[dtype])
        else:
            assert after.tobytes() == before.tobytes(), f"{label} was overwritten"


TILES = {"fast_numpy._TILE": 16, "fast_attention._TILE": 24, "fast_attention._QUERIES": 2}


@pytest.mark.parametrize("name", CASES)
def test_small_tiles_change_nothing(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything that the cases do in one tile, in several, the last of them not full."""
    for place, size in TILES.items():
        monkeypatch.setattr(f"mpillm.array.{place}", size)
    test_every_backend_agrees_with_the_reference(Backend.create("numpy"), name, "float64")


def public(kind: type) -> set[str]:
    return {name for name, what in vars(kind).items() if callable(what) and name[0] != "_"}


def test_there_is_a_case_for_every_operation() -> None:
    called = set()

    class Watched(Ops):
        def __getattribute__(self, name: str) -> Any:
            called.add(name)
            return super().__getattribute__(name)

    for case in CASES.values():
        case.run(Watched(np), cast(case.inputs, "float64"))
    assert called >= public(Ops)


def heirs(kind: type) -> list[type]:
    return [heir for child in kind.__subclasses__() for heir in (child, *heirs(child))]


def test_tuned_versions_have_the_signatures_of_the_reference() -> None:
    for module in pkgutil.iter_modules(mpillm.array.__path__):
        importlib.import_module(f"mpillm.array.{module.name}")
    tuned = [kind for kind in heirs(Ops) if kind.__module__.startswith("mpillm.")]
    assert FastNumpyOps in tuned
    for kind in tuned:
        assert public(kind) and public(kind) <= public(Ops)
        for name in public(kind):
            assert inspect.signature(getattr(kind, name)) == inspect.signature(getattr(Ops, name))


# -- the reference against plain formulas ---------------------------------------------------------


def test_layernorm_formula() -> None:
    x, gain, bias = normal(1, 4, 9), normal(2, 9), normal(3, 9)
    y, _ = REFERENCE.layernorm_forward(x, gain, bias, 1e-3)
    for row, out in zip(x, y, strict=True):
        mean = sum(row) / 9
        variance = sum((row - mean) ** 2) / 9
        plain = (row - mean) / math.sqrt(variance + 1e-3) * gain + bias
        assert np.abs(out - plain).max() < 1e-14


@on_host
def test_gelu_formula(ops: Ops) -> None:
    x = np.array([-50.0, -3.0, -1.0, -1e-9, 0.0, 0.5, 2.0, 40.0])
    y, _ = ops.gelu_forward(x)
    plain = [0.5 * a * (1 + math.tanh(math.sqrt(2 / math.pi) * (a + 0.044715 * a**3))) for a in x]
    assert np.abs(y - plain).max() < 1e-15


@on_host
def test_dropout_formula(ops: Ops) -> None:
    x, row_keys = normal(1, 3, 50), keys(2, 3)
    y, _ = ops.dropout_forward(x, row_keys, 0.2)
    keep = KeyedRandom(np).keep(row_keys, np.arange(50), 0.2)
    assert 0 < keep.sum() < keep.size
    assert np.abs(y - x * keep / 0.8).max() < 1e-15
    assert (ops.dropout_forward(x, row_keys, 0.0)[0] == x).all()


@pytest.mark.parametrize("name", ATTENTION)
def test_attention_formula(name: str) -> None:
    attention, x = ATTENTION[name], ATTENTION[name].inputs()
    out, lse, _ = attention.forward(REFERENCE, x)
    q, k, v = x["q"], x["k"], x["v"]
    b, h, tq, _ = q.shape

    def by_row(array: np.ndarray) -> np.ndarray:
        return np.broadcast_to(array, (b, array.shape[-1]))

    k_index = by_row(x["k_index"])
    visible = np.ones((b, tq, k.shape[2]), bool)
    if attention.causal:
        visible &= k_index[:, None, :] <= by_row(x["q_index"])[:, :, None]
    if "q_document" in x:
        visible &= by_row(x["q_document"])[:, :, None] == by_row(x["k_document"])[:, None, :]
    for row, head, query in np.ndindex(b, h, tq):
        seen = visible[row, query]
        group = head // (h // k.shape[1])
        weight = np.exp(0.7 * k[row, group, seen] @ q[row, head, query])
        if not seen.any():
            assert (out[row, head, query] == 0).all() and lse[row, head, query] == -np.inf
            continue
        assert abs(lse[row, head, query] - math.log(weight.sum())) < 1e-13
        keep = KeyedRandom(np).keep(
            x["row_keys"][row, head, query], k_index[row, seen], attention.drop
        )
        mean = (weight * keep / weight.sum() / (1 - attention.drop)) @ v[row, group, seen]
        assert np.abs(out[row, head, query] - mean).max() < 1e-13


@on_host
def test_embedding_formula(ops: Ops) -> None:
    table, ids, dy = normal(1, 4, 3), integers(2, 9, 5, 6), normal(3, 5, 6, 3)
    grad = np.ones_like(table)
    rows = ops.embedding_forward(table, ids, 2)
    ops.embedding_backward(dy, ids, grad, 2)
    plain = np.ones_like(table)
    for place in np.ndindex(ids.shape):
        inside = 2 <= ids[place] < 6
        assert (rows[place] == (table[ids[place] - 2] if inside else 0)).all()
        if inside:
            plain[ids[place] - 2] += dy[place]
    assert np.abs(grad - plain).max() < 1e-14


@on_host
@pytest.mark.parametrize("decay", [0.0, 0.1])
def test_adamw_formula(ops: Ops, decay: float) -> None:
    beta1, beta2, lr, eps, clip = 0.9, 0.95, 0.02, 1e-3, 0.5
    p, m, v = normal(1, 20), np.zeros(20), np.zeros(20)
    plain_p, plain_m, plain_v = p.copy(), m.copy(), v.copy()
    for step in range(1, 5):
        grad = normal(10 + step, 20)
        kept = grad.copy()
        ops.adamw(
            p, grad, m, v, lr=lr, betas=(beta1, beta2), eps=eps, decay=decay, step=step,
            grad_scale=clip,
        )  # fmt: skip
        assert (grad == kept).all()
        g = grad * clip
        plain_m = beta1 * plain_m + (1 - beta1) * g
        plain_v = beta2 * plain_v + (1 - beta2) * g**2
        m_hat, v_hat = plain_m / (1 - beta1**step), plain_v / (1 - beta2**step)
        plain_p = plain_p - lr * (m_hat / (np.sqrt(v_hat) + eps) + decay * plain_p)
        for ours, plain in ((p, plain_p), (m, plain_m), (v, plain_v)):
            assert np.abs(ours - plain).max() < 1e-14


# -- slopes ---------------------------------------------------------------------------------------


@on_host
@pytest.mark.parametrize("accumulate", [False, True])
def test_matmul_slope(ops: Ops, accumulate: bool) -> None:
    """The products that layers use backwards: dx = dy W, and dW += dy^T x."""
    x, w, dy, base = normal(1, 6, 4), normal(2, 3, 4), normal(3, 6, 3), normal(4, 3, 4)
    grad = base.copy()
    ops.matmul(dy.T, x, out=grad, accumulate=accumulate)
    dw = grad - base if accumulate else grad
    check_directional(
        lambda: float((ops.matmul(x, w.T) * dy).sum()), [x, w], [ops.matmul(dy, w), dw]
    )


@on_host
def test_sum_rows_slope(ops: Ops) -> None:
    bias, x, dy, grad = normal(1, 5), normal(2, 7, 5), normal(3, 7, 5), np.zeros(5)
    ops.sum_rows(dy, grad)
    check_directional(lambda: float(((x + bias) * dy).sum()), [bias], [grad])


@on_host
@pytest.mark.parametrize("with_bias", [False, True])
def test_layernorm_slope(ops: Ops, with_bias: bool) -> None:
    x, gain, dy = normal(1, 3, 4, 7), normal(2, 7), normal(4, 3, 4, 7)
    bias = normal(3, 7) if with_bias else None
    _, saved = ops.layernorm_forward(x, gain, bias)
    dx, dgain, dbias = ops.layernorm_backward(dy, saved)
    assert (dbias is None) == (bias is None)

    def loss() -> float:
        return float((ops.layernorm_forward(x, gain, bias)[0] * dy).sum())

    arrays, gradients = [x, gain], [dx, dgain]
    if bias is not None:
        arrays, gradients = [*arrays, bias], [*gradients, dbias]
    check_directional(loss, arrays, gradients)


@on_host
@pytest.mark.parametrize("shape", [(3, 50), (TILED,)])
def test_gelu_slope(ops: Ops, shape: tuple[int, ...]) -> None:
    x, dy = 2 * normal(1, *shape), normal(2, *shape)
    _, saved = ops.gelu_forward(x)
    dx = ops.gelu_backward(dy, saved)
    check_directional(lambda: float((ops.gelu_forward(x)[0] * dy).sum()), [x], [dx])


@on_host
def test_dropout_slope(ops: Ops) -> None:
    x, dy, row_keys = normal(1, 3, 4, 50), normal(2, 3, 4, 50), keys(3, 3, 4)
    _, saved = ops.dropout_forward(x, row_keys, 0.3)
    dx = ops.dropout_backward(dy, saved)
    check_directional(
        lambda: float((ops.dropout_forward(x, row_keys, 0.3)[0] * dy).sum()), [x], [dx]
    )


@on_host
@pytest.mark.parametrize("name", ATTENTION)
def test_attention_slope(ops: Ops, name: str) -> None:
    attention, x = ATTENTION[name], ATTENTION[name].inputs()
    _, _, dq, dk, dv = attention.run(ops, x)
    check_directional(
        lambda: float((attention.forward(ops, x)[0] * x["d_out"]).sum()),
        [x["q"], x["k"], x["v"]],
        [dq, dk, dv],
    )


@on_host
@pytest.mark.parametrize("first", [0, 3, 20])
def test_embedding_slope(ops: Ops, first: int) -> None:
    table, ids, dy = normal(1, 5, 3), integers(2, 9, 4, 6), normal(3, 4, 6, 3)
    grad = np.zeros_like(table)
    ops.embedding_backward(dy, ids, grad, first)
    assert grad.any() == (first < 9)
    check_directional(
        lambda: float((ops.embedding_forward(table, ids, first) * dy).sum()), [table], [grad]
    )


def sliced_loss(
    ops: Ops, logits: np.ndarray, labels: np.ndarray, weight: np.ndarray, cuts: list[int]
) -> tuple[float, np.ndarray, np.ndarray]:
    """Loss, its value by row, and derivative by the logits, from slices of the vocabulary."""
    parts = [logits[:, a:b].copy() for a, b in pairwise(cuts)]
    row_max = np.max([ops.row_max(part) for part in parts], axis=0)
    sums = np.sum(
        [
            ops.cross_entropy_forward(part, row_max, labels, first)
            for part, first in zip(parts, cuts, strict=False)
        ],
        axis=0,
    )
    by_row = np.log(sums[0]) - sums[1]
    slopes = [
        ops.cross_entropy_backward(part, sums[0], labels, weight, first)
        for part, first in zip(parts, cuts, strict=False)
    ]
    return float((by_row * weight).sum()), by_row, np.concatenate(slopes, axis=1)


@on_host
@pytest.mark.parametrize("cuts", [[0, 11], [0, 4, 4, 5, 11], [0, 0, 11, 11]])
def test_cross_entropy_slope(ops: Ops, cuts: list[int]) -> None:
    logits, labels = 2 * normal(1, 6, 11), integers(2, 11, 6)
    weight = np.array([0.3, 0.0, 1.0, 0.7, 2.0, 0.1])
    _, _, slope = sliced_loss(ops, logits, labels, weight, cuts)
    assert (slope[1] == 0).all()
    check_directional(lambda: sliced_loss(ops, logits, labels, weight, cuts)[0], [logits], [slope])


@settings(max_examples=30)
@given(st.lists(st.integers(0, 9), max_size=5), st.sampled_from([1.0, 1e3]))
def test_cross_entropy_of_slices_is_that_of_the_whole(inner: list[int], size: float) -> None:
    logits, labels = size * normal(1, 8, 9), integers(2, 9, 8)
    _, by_row, slope = sliced_loss(REFERENCE, logits, labels, np.ones(8), [0, *sorted(inner), 9])
    shifted = logits - logits.max(axis=1, keepdims=True)
    exact = np.log(np.exp(shifted).sum(axis=1)) - shifted[np.arange(8), labels]
    assert np.abs(by_row - exact).max() < 1e-12 * size
    softmax = np.exp(shifted) / np.exp(shifted).sum(axis=1, keepdims=True)
    assert np.abs(slope - (softmax - np.eye(9)[labels])).max() < 1e-14


# -- properties of attention ----------------------------------------------------------------------


def test_a_row_that_sees_no_key_gives_nothing_and_takes_nothing(backend: Backend) -> None:
    for name in ("rows that see nothing", "a document of its own", "no keys"):
        attention = ATTENTION[name]
        x = {label: backend.from_host(array) for label, array in attention.inputs().items()}
        out, lse, dq, dk, dv = (backend.to_host(y) for y in attention.run(backend.ops, x))
        blind = np.isneginf(lse[0, 0])
        assert blind.any() and (name == "no keys" or not blind.all())
        assert not out[:, :, blind].any() and np.isneginf(lse[:, :, blind]).all()
        assert not dq[:, :, blind].any()
        assert all(np.isfinite(y).all() for y in (out, dq, dk, dv))
        # What such a row is given must not reach the keys.
        x["d_out"] = backend.from_host(attention.inputs()["d_out"] + 5 * blind[:, None])
        again = [backend.to_host(y) for y in attention.run(backend.ops, x)]
        assert (again[3] == dk).all() and (again[4] == dv).all()


@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.filterwarnings("error")
def test_a_hidden_key_of_any_size_changes_nothing(backend: Backend, dtype: str) -> None:
    """A key that a query may not see can have a score whose exponential is infinite."""
    attention = Attention(PLACES, PLACES, g=2)
    x = cast(attention.inputs(), dtype)
    plain = [backend.to_host(y) for y in attention.run(backend.ops, on(backend, x))]
    x["k"][:, :, -1] = 1e4 * np.sign(x["k"][:, :, -1])  # seen by the last query alone
    large = [backend.to_host(y) for y in attention.run(backend.ops, on(backend, x))]
    for before, after in zip(plain[:3], large[:3], strict=True):
        assert (before[:, :, :-1] == after[:, :, :-1]).all()
    assert all(np.isfinite(y).all() for y in large)


def on(backend: Backend, inputs: Inputs) -> Inputs:
    return {name: backend.from_host(x.copy()) for name, x in inputs.items()}


@pytest.mark.filterwarnings("error")
@settings(max_examples=15)
@given(
    st.sampled_from(["causal", "all to all", "documents", "dropout", "one key head", "zigzag",
                     "index by row", "rows that see nothing", "dropout by row"]),
    st.lists(st.integers(0, 8), max_size=4),
)  # fmt: skip
def test_parts_of_the_keys_add_up_to_the_whole(name: str, inner: list[int]) -> None:
    """What a ring over the keys does: merge by log-sum-exp; backward with the whole out and lse."""
    attention, x = ATTENTION[name], ATTENTION[name].inputs()
    whole = attention.run(REFERENCE, x)
    tk = x["k"].shape[2]
    cuts = [0, *sorted(min(cut, tk) for cut in inner), tk]
    out, lse = np.zeros_like(x["q"]), np.full(x["q"].shape[:3], -np.inf)
    saved = []
    for a, b in pairwise(cuts):
        part = {**x, "k": x["k"][:, :, a:b], "v": x["v"][:, :, a:b]}
        part |= {n: x[n][..., a:b] for n in ("k_index", "k_document") if n in x}
        REFERENCE.attention_merge(out, lse, *attention.forward(REFERENCE, part)[:2])
        saved.append(attention.apply(REFERENCE.attention_saved, part))
    slopes = [REFERENCE.attention_backward(x["d_out"], out, lse, part) for part in saved]
    merged = (
        out,
        lse,
        sum(slope[0] for slope in slopes),
        np.concatenate([slope[1] for slope in slopes], axis=2),
        np.concatenate([slope[2] for slope in slopes], axis=2),
    )
    for ours, exact in zip(merged, whole, strict=True):
        same(np.asarray(ours), exact, 1e-13)


def test_parts_are_merged_into_wider_sums(backend: Backend) -> None:
    x = attention_merge_case(2, 4, 6).inputs
    held = on(backend, x)
    part = on(backend, cast({"part": x["part"], "part_lse": x["part_lse"]}, "float32"))
    backend.ops.attention_merge(held["out"], held["lse"], part["part"], part["part_lse"])
    REFERENCE.attention_merge(x["out"], x["lse"], x["part"], x["part_lse"])
    for name in ("out", "lse"):
        ours = backend.to_host(held[name])
        assert ours.dtype == "float64"
        same(ours, x[name], 1e-6)


# -- sums of squares ------------------------------------------------------------------------------


@pytest.mark.parametrize(("size", "block"), [(700, 16), (64, 16), (9, 16), (600_000, 586), (0, 16)])
def test_sums_of_squares_by_block(backend: Backend, size: int, block: int) -> None:
    x = normal(1, size).astype(np.float32)
    sums = backend.to_host(backend.ops.sum_of_squares(backend.from_host(x), block))
    assert sums.dtype == np.float64
    exact = [float((x[a : a + block].astype(float) ** 2).sum()) for a in range(0, size, block)]
    assert sums.tolist() == pytest.approx(exact, rel=1e-12)


@settings(max_examples=30)
@given(st.integers(0, 3), st.integers(0, 300), st.integers(1, 200))
def test_a_sum_of_squares_depends_on_its_block_alone(before: int, after: int, size: int) -> None:
    block = normal(7, size).astype(np.float32)
    ahead = normal(8, before * size).astype(np.float32)
    whole = np.concatenate([ahead, block, np.ones(after, np.float32)])
    held = REFERENCE.sum_of_squares(whole, size)
    (alone,) = REFERENCE.sum_of_squares(block, size)
    assert held[before].tobytes() == alone.tobytes()
    assert len(held) == before + -(-(size + after) // size)


@pytest.mark.parametrize(
    "shape", [(1,), (15,), (17,), (1024 * 16,), (50257, 768), (3, 12, 64, 768)]
)
def test_the_blocks_of_a_parameter_are_few_and_not_tiny(shape: tuple[int, ...]) -> None:
    block, size = norm_block(shape), math.prod(shape)
    assert block >= 16 and -(-size // block) <= 1024
    assert block == 16 or -(-size // block) > 1000
