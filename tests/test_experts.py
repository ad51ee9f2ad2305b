"""Mixtures of experts on one rank: routing, capacity, balance, and the whole layer and model."""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gradcheck import check_directional, check_layer, scramble
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI
from msgspec.structs import replace as changed

from mpillm.array.backend import Backend
from mpillm.array.routing import RoutingOps
from mpillm.errors import UserError
from mpillm.models.gpt2 import Settings
from mpillm.models.model import build_stages
from mpillm.models.settings import build_model
from mpillm.nn.experts import MixtureOfExperts
from mpillm.nn.layer import Build, Layer, Micro, PutOff
from mpillm.nn.router import Mixture
from mpillm.nn.stage import Stage
from mpillm.nn.store import ParamStore
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings

BACKENDS = ["numpy", "strict"] + ["cupy"] * bool(importlib.util.find_spec("cupy"))
BACKEND = Backend.create("numpy")
OPS = BACKEND.ops
B, T, WIDTH, INNER, EXPERTS = 3, 6, 8, 10, 5


@pytest.fixture(scope="module", params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return Backend.create(request.param)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    mesh = mesh_on(BACKEND)
    yield mesh
    mesh.free()


def mesh_on(backend: Backend) -> Mesh:
    return Mesh(MPI.COMM_SELF, fit(ParallelSettings(), 1), backend, Recorder())


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


# -- the operations -------------------------------------------------------------------------------


def routes(seed: int, n: int, experts: int, k: int) -> np.ndarray:
    """k different experts of n tokens, (n, k)."""
    rng = np.random.default_rng(seed)
    return rng.permuted(np.tile(np.arange(experts), (n, 1)), axis=1)[:, :k]


def settled(logits: np.ndarray, k: int, gap: float = 0.1) -> np.ndarray:
    """Which rows stay as they are chosen when every logit moves by less than half the gap."""
    if k == logits.shape[-1]:
        return np.ones(logits.shape[:-1], bool)
    ranked = np.sort(logits, axis=-1)[..., ::-1]
    return ranked[..., k - 1] - ranked[..., k] > gap


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float64", 1e-15)])
@pytest.mark.parametrize("k", [1, 2, 5])
def test_tokens_go_to_the_likeliest_experts(
    backend: Backend, k: int, dtype: str, tolerance: float
) -> None:
    logits = np.round(2 * normal(1, 40, EXPERTS), 1)  # so that there are ties
    logits[0], logits[1] = 0.0, [0.5, 1.0, 0.5, 1.0, 0.5]
    held = backend.from_host(logits.astype(dtype))
    results = backend.ops.route_forward(held, k)[:3]
    p, chosen, gates = (backend.to_host(x) for x in results)
    assert p.dtype == gates.dtype == dtype
    exact = np.exp(logits) / np.exp(logits).sum(axis=1, keepdims=True)
    np.testing.assert_allclose(p, exact, atol=tolerance)
    for row in range(40):
        expected = sorted(range(EXPERTS), key=lambda e: (-held[row, e].item(), e))[:k]
        assert chosen[row].tolist() == expected
        share = exact[row, expected]
        if k > 1:
            share = share / share.sum()
        np.testing.assert_allclose(gates[row], share, atol=4 * tolerance)


@pytest.mark.parametrize("k", [1, 2, 3, 5])
@pytest.mark.parametrize("with_p", [True, False])
def test_route_slope(k: int, with_p: bool) -> None:
    logits = normal(2, 60, EXPERTS)
    logits = logits[settled(logits, k)]
    d_gates, dp = normal(3, len(logits), k), normal(4, len(logits), EXPERTS)

    def loss() -> float:
        p, _, gates, _ = OPS.route_forward(logits, k)
        return float((gates * d_gates).sum() + (p * dp).sum() * with_p)

    saved = OPS.route_forward(logits, k)[-1]
    d_logits = OPS.route_backward(d_gates, dp if with_p else None, saved)
    check_directional(loss, [logits], [d_logits])


@given(
    st.integers(0, 3), st.integers(0, 7), st.integers(1, 3), st.integers(1, 6), st.booleans(),
    st.integers(0, 99),
)  # fmt: skip
def test_an_expert_takes_the_first_of_a_sequence(
    b: int, t: int, k: int, capacity: int, by_row: bool, seed: int
) -> None:
    """By place, wherever in the array the tokens lie."""
    experts = 3
    chosen = routes(seed, b * t, experts, k).reshape(b, t, k)
    rng = np.random.default_rng(seed)
    index = rng.permuted(np.tile(np.arange(2 * t), (b, 1)), axis=1)[:, :t]
    if not by_row:
        index = rng.permutation(2 * t)[:t]
    keep = OPS.within_capacity(chosen, index, experts, capacity)
    assert keep.shape == (b, t, k) and keep.dtype == bool
    for row in range(b):
        taken = [0] * experts
        for token in np.argsort(index[row] if by_row else index):
            for choice, expert in enumerate(chosen[row, token]):
                taken[expert] += 1
                assert keep[row, token, choice] == (taken[expert] <= capacity)


def test_no_later_token_changes_who_is_kept() -> None:
    """As in a causal model it must not; here the second choice of place 0 stays."""
    chosen = np.array([[[0, 1], [1, 2], [1, 0]]])
    keep = OPS.within_capacity(chosen, np.arange(3), 3, 1)
    assert keep.tolist() == [[[True, True], [False, True], [False, False]]]


@given(st.integers(0, 20), st.integers(1, 3), st.booleans(), st.integers(0, 99))
def test_assignments_are_sorted_by_expert_then_by_number(
    n: int, k: int, drops: bool, seed: int
) -> None:
    experts = 4
    chosen = routes(seed, n, experts, k)
    keep = np.random.default_rng(seed).random((n, k)) < 0.6 if drops else None
    order, slots, counts = OPS.sort_by_expert(chosen, keep, experts)
    kept = np.ones((n, k), bool) if keep is None else keep
    expected = [
        number
        for expert in range(experts)
        for number in range(n * k)
        if kept.flat[number] and chosen.flat[number] == expert
    ]
    assert order[: counts.sum()].tolist() == expected
    assert counts.tolist() == [int((chosen[kept] == expert).sum()) for expert in range(experts)]
    for slot, number in enumerate(expected):
        assert slots.flat[number] == slot
    assert not slots[~kept].any()


@pytest.mark.parametrize("k", [1, 3])
def test_combine_formula_and_slope(k: int) -> None:
    n, experts, d = 7, 4, 3
    chosen = routes(1, n, experts, k)
    keep = np.random.default_rng(2).random((n, k)) < 0.7
    order, slots, counts = OPS.sort_by_expert(chosen, keep, experts)
    order = order[: counts.sum()]
    rows, weights, dy = normal(3, len(order), d), normal(4, n, k) * keep, normal(5, n, d)

    y = OPS.combine_forward(rows, slots, weights)
    expected = np.zeros((n, d))
    for slot, number in enumerate(order):
        expected[number // k] += weights.flat[number] * rows[slot]
    np.testing.assert_allclose(y, expected, atol=1e-14)

    d_rows, d_weights = OPS.combine_backward(dy, rows, order, slots, weights)
    # The derivative by the weight of what was dropped means nothing.
    weights_kept, d_kept = weights[keep], d_weights[keep]

    def loss() -> float:
        weights[keep] = weights_kept
        return float((OPS.combine_forward(rows, slots, weights) * dy).sum())

    check_directional(loss, [rows, weights_kept], [d_rows, d_kept])
    nothing = OPS.combine_forward(rows[:0], 0 * slots, 0 * weights)
    np.testing.assert_array_equal(nothing, np.zeros((n, d)))
    none = OPS.combine_backward(dy, rows[:0], order[:0], 0 * slots, 0 * weights)
    assert none[0].shape == (0, d) and (none[1] == np.zeros((n, k))).all()
    ones = OPS.combine_forward(rows, slots, None)
    np.testing.assert_array_equal(ones, OPS.combine_forward(rows, slots, np.ones((n, k))))


@pytest.mark.parametrize("dtype, tolerance", [("float32", 1e-6), ("float64", 1e-13)])
def test_every_backend_agrees_with_numpy_in_float64(
    backend: Backend, dtype: str, tolerance: float
) -> None:
    b, t, k, d = 2, 9, 2, 3
    logits = normal(1, b * t, EXPERTS)
    logits[~settled(logits, k), 0] += 9  # so that both types choose alike
    inputs = {
        "logits": logits,
        "mask": (normal(2, b, t) > 0).astype(float),
        "share": np.abs(normal(3, b, EXPERTS)),
        "rows": normal(4, b * t * k, d),
        "dy": normal(5, b * t, d),
        "d_gates": normal(6, b * t, k),
        "d_total": np.array([0.3]),
    }
    called: set[str] = set()

    def run(of: Backend, held: dict[str, np.ndarray]) -> list[np.ndarray]:
        class Watched(type(of.ops)):  # type: ignore[misc]
            def __getattribute__(self, name: str) -> Any:
                called.add(name)
                return super().__getattribute__(name)

        ops = Watched(of.xp)
        x = {name: of.from_host(array.copy()) for name, array in held.items()}
        p, chosen, gates, saved = ops.route_forward(x["logits"], k)
        chosen_btk = chosen.reshape(b, t, k)
        keep = ops.within_capacity(chosen_btk, of.xp.arange(t)[::-1], EXPERTS, 4)
        keep = keep.reshape(b * t, k)
        order, slots, counts = ops.sort_by_expert(chosen, keep, EXPERTS)
        order = order[: int(counts.sum())]
        rows = x["rows"][: order.size]
        weights = gates * keep
        y = ops.combine_forward(rows, slots, weights)
        counted = ops.count_choices(chosen_btk, x["mask"], EXPERTS)
        share = x["share"].astype("float64")
        total, saved_balance = ops.balance_forward(p.reshape(b, t, -1), share, x["mask"])
        dp = ops.balance_backward(x["d_total"].astype("float64"), saved_balance)
        d_logits = ops.route_backward(x["d_gates"], dp.reshape(p.shape), saved)
        results = [p, chosen, gates, keep, order, slots, counts, y, counted, total, dp, d_logits]
        results += ops.combine_backward(x["dy"], rows, order, slots, weights)
        for name, array in held.items():
            assert (of.to_host(x[name]) == array).all(), f"{name} was overwritten"
        return [of.to_host(result) for result in results]

    ours = run(backend, {name: array.astype(dtype) for name, array in inputs.items()})
    exact = run(BACKEND, inputs)
    for x, y in zip(ours, exact, strict=True):
        assert x.shape == y.shape
        assert np.abs(x - 1.0 * y).max() <= tolerance * np.abs(y).max()
        # The balance loss and the counts behind it are float64 in every run.
        assert x.dtype == (dtype if y.dtype == float and x.dtype != y.dtype else y.dtype)
    public = {name for name, what in vars(RoutingOps).items() if callable(what) and name[0] != "_"}
    assert called >= public


# -- the layer ------------------------------------------------------------------------------------


def mixture_layer(
    mixture: Mixture, *, bias: bool = True, drop: float = 0.0, inner: int = INNER
) -> Callable[[Build], MixtureOfExperts]:
    return lambda build: MixtureOfExperts(
        build, "experts", WIDTH, inner, mixture, bias=bias, std=0.4, out_std=0.4, drop=drop
    )


def make(
    factory: Callable[[Build], Any], mesh: Mesh, backend: Backend = BACKEND
) -> tuple[Any, ParamStore]:
    store = ParamStore(backend, "float64", seed=1)
    layer = factory(Build(backend, mesh, store))
    store.allocate()
    if backend is BACKEND:
        scramble(store)
    return layer, store


def micro_batch(b: int = B, t: int = T, *, training: bool = True, **changes: Any) -> Micro:
    """The last sequence is padding, and another one is cut short."""
    mask = np.ones((b, t))
    mask[-1:], mask[:1, -2:] = 0, 0
    micro = Micro(
        tokens=np.zeros((b, t), dtype=np.int32),
        mask=mask,
        index=np.arange(t),
        samples=np.arange(b) + 4,
        training=training,
        key=17,
    )
    return replace(micro, **changes)


def hidden(layer: MixtureOfExperts, k: int, *shape: int, seed: int = 5) -> np.ndarray:
    """Random rows that stay with the experts that they go to when they are moved a little."""
    rows = normal(seed, 20 * math.prod(shape), WIDTH)
    rows = rows[settled(rows @ layer.router.weight.value.T, k)]
    return rows[: math.prod(shape)].reshape(*shape, WIDTH)


def gelu(x: np.ndarray) -> np.ndarray:
    return 0.5 * x * (1 + np.tanh(math.sqrt(2 / math.pi) * (x + 0.044715 * x**3)))


def reference(
    layer: MixtureOfExperts, mixture: Mixture, x: np.ndarray, micro: Micro
) -> tuple[np.ndarray, float]:
    """Output and balance loss, token by token, straight from the papers."""
    (b, t), k = micro.shape, mixture.per_token
    experts, router = layer.experts, layer.router.weight.value
    y, loss = np.zeros_like(x), 0.0
    for row in range(b):
        taken, assigned = np.zeros(mixture.experts), np.zeros(mixture.experts)
        probability, counted = np.zeros(mixture.experts), 0
        index = micro.index if micro.index.ndim == 1 else micro.index[row]
        for token in np.argsort(index):
            p = np.exp(x[row, token] @ router.T)
            p /= p.sum()
            chosen = np.argsort(-p)[:k]
            gates = p[chosen] if k == 1 else p[chosen] / p[chosen].sum()
            if micro.mask[row, token]:
                assigned[chosen] += 1
                probability += p
                counted += 1
            for expert, gate in zip(chosen, gates, strict=True):
                taken[expert] += 1
                limit = math.ceil(mixture.capacity * k * t / mixture.experts)
                if mixture.capacity and taken[expert] > limit:
                    continue
                inner = experts.up.value[expert] @ x[row, token]
                out = 0.0
                if experts.up_bias is not None:
                    inner = inner + experts.up_bias.value[expert]
                    out = experts.down_bias.value[expert]
                y[row, token] += gate * (experts.down.value[expert] @ gelu(inner) + out)
        if counted:
            f, mean = assigned / (k * counted), probability / counted
            loss += mixture.balance * counted * mixture.experts * float(f @ mean)
    return y, loss


BY_ROW = {"index": np.array([[3, 1, 0, 2, 5, 4], [0, 1, 2, 3, 4, 5], [9, 4, 6, 2, 1, 7]])}

# Name: the mixture, options of the layer, what is special about the micro-batch.
MIXTURES: dict[str, tuple[Mixture, dict[str, Any], dict[str, Any]]] = {
    "two of five": (Mixture(EXPERTS, 2, balance=0.3), {}, {}),
    "one of five": (Mixture(EXPERTS, 1, balance=0.3), {}, {}),
    "all of three": (Mixture(3, 3, balance=0.3), {}, {}),
    "a single one": (Mixture(1, 1), {}, {}),
    "without biases": (Mixture(EXPERTS, 2, balance=0.3), {"bias": False}, {}),
    "without balance": (Mixture(EXPERTS, 2), {}, {}),
    "capacity": (Mixture(EXPERTS, 2, capacity=0.7, balance=0.3), {}, {}),
    "capacity, by row": (Mixture(EXPERTS, 2, capacity=0.7, balance=0.3), {}, BY_ROW),
    "capacity, one": (Mixture(EXPERTS, 1, capacity=1.0), {}, {}),
    "capacity for all": (Mixture(EXPERTS, 2, capacity=5.0), {}, {}),
    "capacity of one": (Mixture(4, 3, capacity=1e-9, balance=0.1), {}, {}),
}


@pytest.mark.parametrize("name", MIXTURES)
def test_the_layer_is_a_sum_over_experts_of_each_token(name: str, mesh: Mesh) -> None:
    mixture, options, changes = MIXTURES[name]
    layer, _ = make(mixture_layer(mixture, **options), mesh)
    x, micro = normal(7, B, T, WIDTH), micro_batch(**changes)
    (y, loss), _ = layer.forward((x,), micro)
    expected_y, expected_loss = reference(layer, mixture, x, micro)
    np.testing.assert_allclose(y, expected_y, atol=1e-13)
    assert loss.shape == (1,) and loss.dtype == np.float64
    np.testing.assert_allclose(loss, expected_loss, rtol=1e-13)


@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("name", MIXTURES)
def test_slopes(name: str, drop: float, mesh: Mesh) -> None:
    mixture, options, changes = MIXTURES[name]
    layer, store = make(mixture_layer(mixture, drop=drop, **options), mesh)
    x = hidden(layer, mixture.per_token, B, T)
    gradients = check_layer(layer, store, (x,), micro_batch(**changes))
    # The only expert is certain, whatever the router's weight.
    certain = {"experts.router.weight"} if mixture.experts == 1 else set()
    assert {name for name, gradient in gradients.items() if not gradient.any()} == certain


@pytest.mark.parametrize(
    "operation", ["route_backward", "combine_backward", "balance_backward", "gelu_backward"]
)
def test_a_slightly_wrong_backward_pass_is_found(
    operation: str, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    mixture, _, _ = MIXTURES["capacity"]
    layer, store = make(mixture_layer(mixture), mesh)
    original = getattr(OPS, operation)

    def wrong(*args: Any) -> Any:
        result = original(*args)
        return (result[0], result[1] * 1.001) if isinstance(result, tuple) else result * 1.001

    monkeypatch.setattr(OPS, operation, wrong)
    with pytest.raises(AssertionError, match="numeric"):
        check_layer(layer, store, (hidden(layer, 2, B, T),), micro_batch())


def test_weight_gradients_wait_for_the_sink(mesh: Mesh) -> None:
    layer, store = make(mixture_layer(Mixture(EXPERTS, 2, 0.7, 0.3)), mesh)
    x, slopes = normal(1, B, T, WIDTH), (normal(2, B, T, WIDTH), np.array([0.3]))

    def backward(micro: Micro) -> None:
        _, saved = layer.forward((x,), micro)
        layer.backward(tuple(slope.copy() for slope in slopes), saved, micro)

    put_off: list[Callable[[], None]] = []
    micro = micro_batch()
    backward(replace(micro, gradients=PutOff(micro.gradients, put_off)))
    assert not any(arena.grads.any() for arena in store.arenas)
    for work in put_off:
        work()
    once = [arena.grads.copy() for arena in store.arenas]
    backward(micro)
    for arena, gradient in zip(store.arenas, once, strict=True):
        assert gradient.any()
        assert np.abs(arena.grads - 2 * gradient).max() <= 1e-12 * np.abs(gradient).max()


def test_outside_of_training_nothing_is_dropped_saved_or_balanced(mesh: Mesh) -> None:
    mixture = Mixture(EXPERTS, 2, capacity=0.1, balance=0.3)
    layer, _ = make(mixture_layer(mixture), mesh)
    x, micro = normal(1, B, T, WIDTH), micro_batch()
    (y, loss), saved = layer.forward((x,), replace(micro, training=False, mask=None))
    expected, _ = reference(layer, Mixture(EXPERTS, 2), x, micro)
    np.testing.assert_allclose(y, expected, atol=1e-13)
    assert saved is None and loss.tolist() == [0.0]
    (dropped, _), _ = layer.forward((x,), micro)
    assert np.abs(dropped - expected).max() > 0.1


def results(
    layer: Layer, store: ParamStore, x: np.ndarray, micro: Micro, dy: np.ndarray
) -> tuple[np.ndarray, float, np.ndarray]:
    """y, loss and dx; the weights' gradients are added to the store's."""
    (y, loss), saved = layer.forward((x,), micro)
    (dx,) = layer.backward((dy.copy(), np.array([0.3])), saved, micro)
    return y, float(loss[0]), dx


@pytest.mark.parametrize("name", [name for name in MIXTURES if "capacity" in name])
def test_a_sequence_does_not_see_its_micro_batch(name: str, mesh: Mesh) -> None:
    """Neither capacity nor balance: all at once, or one sequence after the other."""
    mixture, options, changes = MIXTURES[name]
    layer, store = make(mixture_layer(mixture, drop=0.2, **options), mesh)
    micro, x, dy = micro_batch(**changes), normal(1, B, T, WIDTH), normal(2, B, T, WIDTH)
    y, loss, dx = results(layer, store, x, micro, dy)
    together = [arena.grads.copy() for arena in store.arenas]
    for arena in store.arenas:
        arena.grads.fill(0.0)
    losses = []
    for row in range(B):
        one = slice(row, row + 1)
        index = micro.index if micro.index.ndim == 1 else micro.index[one]
        part = replace(
            micro,
            tokens=micro.tokens[one],
            mask=micro.mask[one],
            samples=micro.samples[one],
            index=index,
        )
        y_one, loss_one, dx_one = results(layer, store, x[one], part, dy[one])
        np.testing.assert_allclose(y_one, y[one], atol=1e-13)
        np.testing.assert_allclose(dx_one, dx[one], atol=1e-13)
        losses.append(loss_one)
    assert losses[-1] == 0.0  # it is padding
    assert sum(losses) == pytest.approx(loss, rel=1e-13, abs=0)
    for arena, gradient in zip(store.arenas, together, strict=True):
        np.testing.assert_allclose(arena.grads, gradient, atol=1e-12)


def test_evenly_spread_tokens_have_a_balance_loss_of_one(mesh: Mesh) -> None:
    """Of a token; where all go to one expert it is the number of experts (Fedus, section 2.2)."""
    layer, _ = make(mixture_layer(Mixture(4, 1, balance=1.0)), mesh)
    layer.router.weight.value[...] = 0
    layer.router.weight.value[:, :4] = 100 * np.eye(4)
    x = np.zeros((1, 8, WIDTH))
    x[0, np.arange(8), np.arange(8) % 4] = 1
    micro = replace(micro_batch(1, 8), mask=np.ones((1, 8)))
    (_, loss), _ = layer.forward((x,), micro)
    assert loss[0] == pytest.approx(8.0)
    x[...] = x[:, :1]
    (_, loss), _ = layer.forward((x,), micro)
    assert loss[0] == pytest.approx(4 * 8.0)


@pytest.mark.parametrize("b, t", [(0, 4), (2, 0)])
def test_no_tokens(b: int, t: int, mesh: Mesh) -> None:
    layer, store = make(mixture_layer(Mixture(EXPERTS, 2, 0.7, 0.3), drop=0.1), mesh)
    x, micro = np.zeros((b, t, WIDTH)), micro_batch(b, t)
    y, loss, dx = results(layer, store, x, micro, x)
    assert y.shape == dx.shape == x.shape and loss == 0.0
    assert not any(arena.grads.any() for arena in store.arenas)


def test_a_router_that_is_not_a_number_does_not_stop_the_pass(mesh: Mesh) -> None:
    """The step's loss is not finite then, and it is for the trainer to say so."""
    layer, _ = make(mixture_layer(Mixture(EXPERTS, 2)), mesh)
    x = np.full((B, T, WIDTH), np.nan)
    (y, _), _ = layer.forward((x,), micro_batch())
    assert np.isnan(y).all()


# -- the model ------------------------------------------------------------------------------------

SMALL = Settings(
    layers=2, heads=2, width=8, vocabulary=11, context=6, init_std=0.3, experts=4, dropout=0.1,
    expert_capacity=1.0, balance=0.2,
)  # fmt: skip


class SumOfLosses(Layer):
    """A whole model whose output is the sum of loss and auxiliary loss."""

    def __init__(self, stage: Stage) -> None:
        self.stage = stage

    def forward(self, inputs: Any, micro: Micro) -> tuple[Any, Any]:
        (loss, auxiliary), saved = self.stage.forward(inputs, micro)
        return (loss + auxiliary,), saved

    def backward(self, d_outputs: Any, saved: Any, micro: Micro) -> Any:
        return self.stage.backward(d_outputs, saved, micro)


def text(b: int = 3, t: int = 6, **changes: Any) -> Micro:
    rng = np.random.default_rng(0)
    tokens, labels = (rng.integers(0, 11, (b, t), dtype=np.int32) for _ in range(2))
    return micro_batch(b, t, **{"tokens": tokens, "labels": labels, **changes})


def small_stage(mesh: Mesh, backend: Backend = BACKEND, **options: Any) -> Stage:
    recompute = options.pop("recompute", "none")
    model = build_model(changed(SMALL, **options))
    (stage,) = build_stages(model, backend, mesh, "float64", seed=1, recompute=recompute)
    return stage


MODELS: dict[str, dict[str, Any]] = {
    "every block": {},
    "every second block": {"expert_every": 2, "tied": False},
    "one of four": {"experts_per_token": 1, "expert_capacity": 0.0, "bias": False},
}


@pytest.mark.parametrize("name", MODELS)
def test_slopes_of_the_whole_model(name: str, mesh: Mesh) -> None:
    stage, micro = small_stage(mesh, **MODELS[name]), text()
    # Far enough apart for a choice not to change on the way.
    scramble(stage.store, 0.2)
    for param in stage.store.params:
        if param.name.endswith("router.weight"):
            param.value *= 6.0
    scale = 1.0 / micro.mask.sum()
    gradients = check_layer(SumOfLosses(stage), stage.store, (), micro, (scale,))
    assert all(gradient.any() for gradient in gradients.values())


def test_names_and_shapes_of_the_weights(mesh: Mesh) -> None:
    stage = small_stage(mesh, expert_every=2)
    shapes = {param.name: param.shard.shape for param in stage.store.params}
    ours = {name: shape for name, shape in shapes.items() if name.startswith("block.001.experts")}
    assert ours == {
        "block.001.experts.router.weight": (4, 8),
        "block.001.experts.up.weight": (4, 32, 8),
        "block.001.experts.up.bias": (4, 32),
        "block.001.experts.down.weight": (4, 8, 32),
        "block.001.experts.down.bias": (4, 8),
    }
    assert "block.000.mlp.up.weight" in shapes and "block.001.mlp.up.weight" not in shapes


def test_the_auxiliary_loss_is_the_sum_over_the_blocks(mesh: Mesh) -> None:
    micro = text()
    stage = small_stage(mesh, dropout=0.0)
    (loss, auxiliary), _ = stage.forward((), micro)
    singles = []
    for number, block in enumerate(stage.layers[1:-1]):
        inputs: Any = ()
        for layer in stage.layers[: number + 1]:
            inputs, _ = layer.forward(inputs, micro)
        before = inputs[1].copy()
        outputs, _ = block.forward(inputs, micro)
        assert inputs[1] == before  # who computes anew needs it once more
        singles.append((outputs[1] - before).item())
    assert all(single > 0 for single in singles)
    assert auxiliary.item() == pytest.approx(sum(singles), rel=1e-14)
    plain = small_stage(mesh, dropout=0.0, balance=0.0)
    assert [x.item() for x in plain.forward((), micro)[0]] == [loss.item(), 0.0]


def test_a_block_that_is_computed_anew_gives_the_same_gradients(mesh: Mesh) -> None:
    def gradients(recompute: str) -> list[np.ndarray]:
        stage, micro = small_stage(mesh, recompute=recompute), text()
        _, saved = stage.forward((), micro)
        stage.backward((0.1,), saved, micro)
        return [arena.grads for arena in stage.store.arenas]

    expected = gradients("none")
    for ours, exact in zip(gradients("block"), expected, strict=True):
        assert exact.any()
        np.testing.assert_array_equal(ours, exact)


def test_decoding_token_by_token_gives_the_same_logits(mesh: Mesh) -> None:
    stage, b, t = small_stage(mesh), 3, 6
    whole = text(b, t, training=False, want="logits", mask=None)
    (logits,), _ = stage.forward((), whole)
    state = stage.new_state(b, t)
    for place in range(t):
        one = replace(
            whole,
            tokens=whole.tokens[:, place : place + 1],
            index=np.arange(place, place + 1),
            want="last_logits",
            state=state,
        )
        (ours,), _ = stage.forward((), one)
        np.testing.assert_allclose(ours[:, 0], logits[:, place], atol=1e-13)


def test_on_a_device_the_host_reads_the_counts_and_nothing_else() -> None:
    backend = Backend.create("strict")
    there = mesh_on(backend)
    device, host = small_stage(there, backend), small_stage(mesh_on(BACKEND))
    arrays = ("tokens", "labels", "mask", "index", "samples")
    micro = text()
    moved = replace(micro, **{name: backend.from_host(getattr(micro, name)) for name in arrays})
    before = backend.xp.transfers.to_host
    (loss, auxiliary), saved = device.forward((), moved)
    device.backward((0.1,), saved, moved)
    assert backend.xp.transfers.to_host - before == 2  # once for each mixture
    (exact, exact_auxiliary), saved = host.forward((), micro)
    host.backward((0.1,), saved, micro)
    assert float(loss) == pytest.approx(float(exact), rel=1e-12)
    assert auxiliary.item() == pytest.approx(exact_auxiliary.item(), rel=1e-12)
    for ours, expected in zip(device.store.arenas, host.store.arenas, strict=True):
        np.testing.assert_allclose(backend.to_host(ours.grads), expected.grads, atol=1e-12)


@pytest.mark.parametrize(
    "changes, message",
    [
        ({"experts": 3, "experts_per_token": 4}, "model.experts_per_token = 4: .* nearest is 3"),
        ({"experts": 1}, "model.experts_per_token = 2: .* nearest is 1"),
        ({"expert_every": 3}, "model.expert_every = 3 leaves none of 2 layers .* nearest is 2"),
    ],
)
def test_numbers_that_do_not_fit_are_refused(changes: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        build_model(changed(SMALL, **changes))


def test_costs_boundaries_and_axes(mesh: Mesh) -> None:
    dense, mixed = build_model(changed(SMALL, experts=0)), build_model(SMALL)
    assert mixed.axes - dense.axes == {"expert"}
    rows = Build(BACKEND, mesh, ParamStore(BACKEND, "float64", None)).rows
    assert dense.boundary(text(), "float32", rows) == (((3, 6, 8), "float32"),)
    assert mixed.boundary(text(), "float32", rows) == (((3, 6, 8), "float32"), ((1,), "float64"))
    # A second expert's two products, and the router's.
    extra = mixed.units[1].cost - dense.units[1].cost
    assert extra == 8 * 8 * 8 + 4 * 8
    stage, micro = small_stage(mesh), text()
    outputs, _ = stage.layers[0].forward((), micro)
    shapes = tuple((x.shape, str(x.dtype)) for x in outputs)
    assert shapes == mixed.boundary(micro, "float64", rows)


def test_expert_ranks_without_experts_are_refused(mesh: Mesh) -> None:
    class Fake:
        layout = ParallelSettings(data=1, expert=2)

    with pytest.raises(UserError, match=r"parallel\.expert = 2: .*no experts.*expert = 1"):
        build_model(changed(SMALL, experts=0)).check_layout(Fake().layout)
    build_model(SMALL).check_layout(Fake().layout)
