"""Layers on one rank: slopes, dropout, decoding, and the parameters that they ask for."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gradcheck import check_layer, scramble
from held import held_bytes
from mpi4py import MPI

from mpillm.array.backend import Backend
from mpillm.array.random import fold
from mpillm.nn import head as head_module
from mpillm.nn.attention import KeyValueCache, SelfAttention
from mpillm.nn.block import PreNormBlock
from mpillm.nn.dropout import Dropout
from mpillm.nn.embedding import Embedding
from mpillm.nn.head import LanguageModelHead
from mpillm.nn.layer import Build, GradientSink, Layer, Micro
from mpillm.nn.linear import ColumnLinear, RowLinear
from mpillm.nn.mlp import MLP
from mpillm.nn.norm import LayerNorm
from mpillm.nn.param import Param
from mpillm.nn.recompute import Recompute
from mpillm.nn.stage import Stage
from mpillm.nn.store import ParamStore
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings

BACKEND = Backend.create("numpy")
B, T, WIDTH, HEADS, VOCABULARY, CONTEXT = 3, 5, 8, 2, 11, 12


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    mesh = Mesh(MPI.COMM_SELF, fit(ParallelSettings(), 1), BACKEND, Recorder())
    yield mesh
    mesh.free()


Make = Callable[[Build], Layer]


def make(factory: Make, mesh: Mesh, *, random: bool = True) -> tuple[Layer, ParamStore]:
    store = ParamStore(BACKEND, "float64", seed=1)
    layer = factory(Build(BACKEND, mesh, store))
    store.allocate()
    if random:
        scramble(store)
    return layer, store


def stage(*factories: Make) -> Callable[[Build], Any]:
    def built(build: Build) -> Stage:
        layers = []
        for factory in factories:
            layers.append(factory(build))
            build.store.next_layer()
        return Stage(layers, build.store)

    return built


def micro_batch(b: int = B, t: int = T, *, training: bool = True, **changes: Any) -> Micro:
    """The last sequence is padding."""
    rng = np.random.default_rng(3)
    mask = np.ones((b, t))
    mask[-1] = 0
    mask[0, -2:] = 0
    micro = Micro(
        tokens=rng.integers(0, VOCABULARY, (b, t), dtype=np.int32),
        labels=rng.integers(0, VOCABULARY, (b, t), dtype=np.int32),
        mask=mask,
        index=np.arange(t),
        samples=np.arange(b) + 4,
        training=training,
        key=17,
    )
    return replace(micro, **changes)


def watch(monkeypatch: pytest.MonkeyPatch, operation: str) -> list[tuple[Any, dict[str, Any]]]:
    """The arguments of every call of an operation from now on."""
    calls, original = [], getattr(BACKEND.ops, operation)

    def watched(*args: Any, **options: Any) -> Any:
        calls.append((args, options))
        return original(*args, **options)

    monkeypatch.setattr(BACKEND.ops, operation, watched)
    return calls


def numbers(*shape: int, seed: int = 5) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def hidden(b: int = B, t: int = T) -> np.ndarray:
    return numbers(b, t, WIDTH)


# -- the layers -----------------------------------------------------------------------------------


def norm(bias: bool = True, name: str = "norm") -> Make:
    return lambda build: LayerNorm(build, name, WIDTH, bias=bias, eps=1e-2)


def attention(bias: bool = True, drop: float = 0.0, causal: bool = True) -> Make:
    return lambda build: SelfAttention(
        build,
        "attention",
        WIDTH,
        HEADS,
        bias=bias,
        std=0.4,
        out_std=0.4,
        drop=drop,
        causal=causal,
    )


def mlp(bias: bool = True, drop: float = 0.0) -> Make:
    return lambda build: MLP(build, "mlp", WIDTH, 10, bias=bias, std=0.4, out_std=0.4, drop=drop)


def block(bias: bool = True, drop: float = 0.0) -> Make:
    return lambda build: PreNormBlock(
        build,
        norm(bias, "norm1")(build),
        attention(bias, drop)(build),
        norm(bias, "norm2")(build),
        mlp(bias, drop)(build),
    )


def again(factory: Make) -> Make:
    return lambda build: Recompute(factory(build))


def dropout(drop: float = 0.3, name: str = "dropout") -> Make:
    return lambda build: Dropout(build, name, drop)


def embedding(tied: bool = False, drop: float = 0.0) -> Make:
    return lambda build: Embedding(build, VOCABULARY, CONTEXT, WIDTH, std=0.4, drop=drop, tied=tied)


def head(tied: bool = False, bias: bool = True) -> Make:
    return lambda build: LanguageModelHead(
        build, norm(bias, "head.norm")(build), VOCABULARY, WIDTH, std=0.4, tied=tied
    )


def column(bias: bool = True) -> Make:
    return lambda build: ColumnLinear(build, "column", WIDTH, (3, 2), 1, bias=bias, std=0.4)


def row(bias: bool = True) -> Make:
    return lambda build: RowLinear(build, "row", (2, 3), 7, 0, bias=bias, std=0.4)


BY_ROW = {"index": np.array([[0, 1, 2, 3, 4], [6, 2, 9, 1, 3], [0, 5, 5, 7, 11]])}
PACKED = {"documents": np.array([[0, 0, 1, 1, 1], [0, 0, 0, 0, 0], [0, 1, 2, 2, 3]])}

# Name: the layer, what goes in, and what is special about the micro-batch.
LAYERS: dict[str, tuple[Callable[[Build], Any], tuple[np.ndarray, ...], dict[str, Any]]] = {
    "column": (column(), (hidden(),), {}),
    "column without bias": (column(bias=False), (hidden(),), {}),
    "row": (row(), (numbers(B, T, 6),), {}),
    "row without bias": (row(bias=False), (numbers(B, T, 6),), {}),
    "norm": (norm(), (hidden(),), {}),
    "norm without bias": (norm(bias=False), (hidden(),), {}),
    "dropout": (dropout(), (hidden(),), {}),
    "dropout by row": (dropout(), (hidden(),), BY_ROW),
    "no dropout": (dropout(0.0), (hidden(),), {}),
    "attention": (attention(), (hidden(),), {}),
    "attention without bias": (attention(bias=False), (hidden(),), {}),
    "attention with dropout": (attention(drop=0.3), (hidden(),), {}),
    "attention, not causal": (attention(causal=False), (hidden(),), {}),
    "attention with dropout, by row": (attention(drop=0.3), (hidden(),), BY_ROW),
    "attention, documents": (attention(), (hidden(),), PACKED),
    "mlp": (mlp(), (hidden(),), {}),
    "mlp without bias, with dropout": (mlp(bias=False, drop=0.3), (hidden(),), {}),
    "block": (block(), (hidden(),), {}),
    "block without bias, with dropout": (block(bias=False, drop=0.2), (hidden(),), {}),
    "recomputed block with dropout": (again(block(drop=0.2)), (hidden(),), {}),
    "embedding": (embedding(), (), {}),
    "embedding with dropout": (embedding(drop=0.3), (), {}),
    "embedding, index by row": (embedding(tied=True), (), BY_ROW),
    "head": (head(), (hidden(),), {}),
    "tied head": (head(tied=True, bias=False), (hidden(),), {}),
    "embedding and head": (stage(embedding(), head()), (), {}),
    "embedding and tied head": (stage(embedding(tied=True), head(tied=True)), (), {}),
}


def has_loss(name: str) -> bool:
    return "head" in name


@pytest.mark.parametrize("name", LAYERS)
def test_slopes(name: str, mesh: Mesh) -> None:
    factory, inputs, changes = LAYERS[name]
    layer, store = make(factory, mesh)
    micro = micro_batch(**changes)
    d_outputs = (0.125,) if has_loss(name) else None  # the head takes the weight of a token's loss
    gradients = check_layer(layer, store, inputs, micro, d_outputs)
    assert all(gradient.any() for gradient in gradients.values())


@pytest.mark.parametrize("name", LAYERS)
def test_gradients_of_weights_are_added_up_by_the_sink(name: str, mesh: Mesh) -> None:
    """Nothing is written before the sink does the work, and twice the work gives twice as much."""
    factory, inputs, changes = LAYERS[name]
    layer, store = make(factory, mesh)
    put_off: list[tuple[tuple[Param, ...], Callable[[], None]]] = []

    class Later(GradientSink):
        def add(self, params: tuple[Param, ...], work: Callable[[], None]) -> None:
            put_off.append((params, work))

    def backward(sink: GradientSink) -> None:
        micro = micro_batch(**changes, gradients=sink)
        outputs, saved = layer.forward(inputs, micro)
        layer.backward(
            (0.1,) if has_loss(name) else tuple(map(np.ones_like, outputs)), saved, micro
        )

    backward(Later())
    assert not any(arena.grads.any() for arena in store.arenas)
    named = {param.name for params, _ in put_off for param in params}
    assert named == {param.name for param in store.params}
    for _, work in put_off:
        work()
    once = [arena.grads.copy() for arena in store.arenas]
    backward(GradientSink())
    for arena, gradient in zip(store.arenas, once, strict=True):
        assert np.abs(arena.grads - 2 * gradient).max() <= 1e-12 * np.abs(gradient).max()


@pytest.mark.parametrize("name", LAYERS)
def test_nothing_is_saved_when_not_training(name: str, mesh: Mesh) -> None:
    factory, inputs, changes = LAYERS[name]
    layer, _ = make(factory, mesh)
    kept = [x.copy() for x in inputs]
    outputs, saved = layer.forward(inputs, micro_batch(training=False, **changes))
    assert saved is None or (isinstance(layer, Stage) and saved == [None, None])
    assert all((x == y).all() for x, y in zip(inputs, kept, strict=True))
    in_training, saved = layer.forward(inputs, micro_batch(**changes))
    equal = all((x == y).all() for x, y in zip(outputs, in_training, strict=True))
    assert equal == ("dropout" not in name or name == "no dropout")


@pytest.mark.parametrize("name", LAYERS)
def test_no_weight_is_saved(name: str, mesh: Mesh) -> None:
    """Where weights are sharded, they are gone, and elsewhere again by the backward pass."""
    factory, inputs, changes = LAYERS[name]
    layer, store = make(factory, mesh)
    _, saved = layer.forward(inputs, micro_batch(**changes))
    weights = [param.value for param in store.params]
    assert held_bytes(saved, weights) == held_bytes(saved)


def test_linear_layers_are_products_with_the_weight(mesh: Mesh) -> None:
    x = hidden()
    layer, store = make(column(), mesh)
    weight, bias = (param.value for param in store.params)
    assert (weight.shape, bias.shape) == ((3, 2, WIDTH), (3, 2))
    (y,), _ = layer.forward((x,), micro_batch())
    assert (
        np.abs(y.reshape(B, T, 3, 2) - (np.einsum("bti,poi->btpo", x, weight) + bias)).max() < 1e-13
    )
    layer, store = make(row(), mesh)
    weight, bias = (param.value for param in store.params)
    assert (weight.shape, bias.shape) == ((7, 2, 3), (7,))
    (z,), _ = layer.forward((y,), micro_batch())
    plain = np.einsum("btpe,ope->bto", y.reshape(B, T, 2, 3), weight) + bias
    assert np.abs(z - plain).max() < 1e-12


def test_a_bias_at_rest_stays_at_rest(mesh: Mesh) -> None:
    def factory(build: Build) -> Layer:
        return ColumnLinear(build, "c", WIDTH, (3, 2), 1, bias=True, std=0.4, bias_at_rest=1)

    layer, store = make(factory, mesh)
    dy = numbers(B, T, 3, 2)
    dy[:, :, 1] -= dy[:, :, 1].mean(axis=(0, 1))  # what makes the loss not depend on that bias
    gradients = check_layer(layer, store, (hidden(),), micro_batch(), (dy.reshape(B, T, 6),))
    bias = gradients["c.bias"].reshape(3, 2)
    assert not bias[1].any() and bias[0].all() and bias[2].all()


def test_the_loss_does_not_depend_on_the_bias_of_the_keys(mesh: Mesh) -> None:
    layer, store = make(attention(drop=0.2), mesh)
    (bias,) = (param.value for param in store.params if param.name == "attention.qkv.bias")
    (before,), _ = layer.forward((hidden(),), micro_batch())
    bias[1] += 3.0
    (after,), _ = layer.forward((hidden(),), micro_batch())
    assert np.abs(after - before).max() < 1e-13
    bias[2] += 3.0
    (other,), _ = layer.forward((hidden(),), micro_batch())
    assert np.abs(other - before).max() > 0.1


# -- the head -------------------------------------------------------------------------------------


def head_loss(layer: Layer, x: np.ndarray, micro: Micro) -> tuple[float, np.ndarray]:
    (loss,), saved = layer.forward((x,), micro)
    assert loss.shape == () and loss.dtype == np.float64
    (dx,) = layer.backward((0.5,), saved, micro)
    return float(loss), dx


@pytest.mark.parametrize("logits_at_once", [1, 2 * VOCABULARY, 4 * VOCABULARY + 3])
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_in_several_chunks(
    logits_at_once: int, tied: bool, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    layer, store = make(head(tied=tied), mesh)
    x, micro = hidden(), micro_batch()
    loss, dx = head_loss(layer, x, micro)
    gradients = [arena.grad.copy() for arena in store.arenas]
    monkeypatch.setattr(head_module, "_CHUNK", logits_at_once)
    calls = watch(monkeypatch, "row_max")
    for arena in store.arenas:
        arena.grads.fill(0.0)
    chunked_loss, chunked_dx = head_loss(layer, x, micro)
    sizes = [args[0].size for args, _ in calls]
    assert len(sizes) > 1 and max(sizes) <= max(logits_at_once, VOCABULARY)
    assert sum(sizes) == B * T * VOCABULARY
    assert chunked_loss == pytest.approx(loss, rel=1e-14)
    assert np.abs(chunked_dx - dx).max() < 1e-14
    for arena, gradient in zip(store.arenas, gradients, strict=True):
        assert np.abs(arena.grad - gradient).max() < 1e-13
    check_layer(layer, store, (x,), micro, (0.5,))


@pytest.mark.parametrize("logits_at_once", [2 * VOCABULARY, 1 << 20])
@pytest.mark.parametrize("tied", [False, True])
def test_the_head_gives_the_same_bits_with_both_passes_in_one(
    logits_at_once: int, tied: bool, mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("mpillm.nn.head._CHUNK", logits_at_once)
    products = watch(monkeypatch, "matmul")
    results = []
    for micro in (micro_batch(), micro_batch(scale=0.5)):
        layer, store = make(head(tied=tied), mesh)
        products.clear()
        loss, dx = head_loss(layer, hidden(), micro)
        gradients = b"".join(arena.grads.tobytes() for arena in store.arenas)
        results.append((loss, dx.tobytes(), gradients))
        chunks = len(products) / (3 if micro.scale else 4)
        assert chunks == -(-B * T * VOCABULARY // logits_at_once)
    assert results[0] == results[1]


def test_the_head_refuses_another_scale_than_it_was_told(mesh: Mesh) -> None:
    layer, _ = make(head(), mesh)
    with pytest.raises(ValueError, match=r"reckoned with 0\.25, not with 0\.5"):
        head_loss(layer, hidden(), micro_batch(scale=0.25))


def test_what_the_head_gives(mesh: Mesh) -> None:
    layer, store = make(head(), mesh)
    x, micro = hidden(), micro_batch()
    (logits,), saved = layer.forward((x,), replace(micro, want="logits"))
    assert logits.shape == (B, T, VOCABULARY) and saved is None
    gain, bias, weight = (param.value for param in store.params)
    centred = x - x.mean(axis=-1, keepdims=True)
    normed = centred / np.sqrt(centred.var(axis=-1, keepdims=True) + 1e-2) * gain + bias
    assert np.abs(logits - normed @ weight.T).max() < 1e-13
    (last,), _ = layer.forward((x,), replace(micro, want="last_logits"))
    assert last.shape == (B, 1, VOCABULARY)
    assert np.abs(last - logits[:, -1:]).max() < 1e-13
    log_sum = np.log(np.exp(logits).sum(axis=-1))
    target = np.take_along_axis(logits, micro.labels[..., None], axis=-1)[..., 0]
    assert head_loss(layer, x, micro)[0] == pytest.approx(
        float(((log_sum - target) * micro.mask).sum()), rel=1e-13
    )


def test_padding_adds_nothing(mesh: Mesh) -> None:
    """Neither to the loss nor to a gradient, whatever its tokens and labels are."""
    layer, store = make(stage(embedding(drop=0.2), block(drop=0.2), head()), mesh)

    def gradients(micro: Micro) -> list[np.ndarray]:
        for arena in store.arenas:
            arena.grads.fill(0.0)
        (loss,), saved = layer.forward((), micro)
        layer.backward((1.0,), saved, micro)
        return [loss, *(arena.grad.copy() for arena in store.arenas)]

    full = micro_batch()
    assert not full.mask[-1].any()
    rows = {name: getattr(full, name)[:-1] for name in ("tokens", "labels", "mask", "samples")}
    without = gradients(replace(full, **rows))
    other = replace(full, tokens=full.tokens.copy(), labels=full.labels.copy())
    other.tokens[-1], other.labels[-1] = 0, 0
    for micro in (full, other):
        for ours, expected in zip(gradients(micro), without, strict=True):
            assert np.abs(ours - expected).max() < 1e-12


# -- dropout --------------------------------------------------------------------------------------

# Name: the layer for a rate of dropout, and whether it takes an input.
RANDOM: dict[str, tuple[Callable[[float], Make], bool]] = {
    "dropout": (dropout, True),
    "attention": (lambda drop: attention(drop=drop), True),
    "mlp": (lambda drop: mlp(drop=drop), True),
    "block": (lambda drop: block(drop=drop), True),
    "embedding": (lambda drop: embedding(drop=drop), False),
}


def run(layer: Layer, takes_input: bool, micro: Micro, x: np.ndarray) -> np.ndarray:
    (y,), _ = layer.forward((x,) if takes_input else (), micro)
    return np.asarray(y)


@pytest.mark.parametrize("name", RANDOM)
def test_nothing_is_dropped_when_not_training(name: str, mesh: Mesh) -> None:
    factory, takes_input = RANDOM[name]
    layer, _ = make(factory(0.3), mesh)
    without, _ = make(factory(0.0), mesh)
    x = hidden()
    plain = run(without, takes_input, micro_batch(), x)
    assert (run(layer, takes_input, micro_batch(training=False), x) == plain).all()
    assert (run(layer, takes_input, micro_batch(), x) != plain).any()


@pytest.mark.parametrize("name", RANDOM)
def test_dropout_does_not_depend_on_the_rest_of_the_batch(name: str, mesh: Mesh) -> None:
    factory, takes_input = RANDOM[name]
    layer, _ = make(factory(0.3), mesh)
    samples = np.array([7, 3, 1000, 4])
    whole, x = micro_batch(4, samples=samples), hidden(4)
    together = run(layer, takes_input, whole, x)
    for rows in ([0], [2], [3, 1], [1, 2, 3, 0]):
        part = replace(whole, tokens=whole.tokens[rows], samples=samples[rows])
        assert np.abs(run(layer, takes_input, part, x[rows]) - together[rows]).max() < 1e-13
    other = replace(whole, samples=samples + 1)
    assert np.abs(run(layer, takes_input, other, x) - together).max() > 0.1
    other = replace(whole, key=18)
    assert np.abs(run(layer, takes_input, other, x) - together).max() > 0.1


@pytest.mark.parametrize("name", RANDOM)
def test_dropout_does_not_depend_on_the_order_of_the_tokens(name: str, mesh: Mesh) -> None:
    """As when a sequence is dealt to ranks in zigzag: a token's index decides, not its place."""
    factory, takes_input = RANDOM[name]
    layer, _ = make(factory(0.3), mesh)
    micro, x, order = micro_batch(), hidden(), np.array([3, 0, 4, 1, 2])
    straight = run(layer, takes_input, micro, x)
    shuffled = replace(micro, tokens=micro.tokens[:, order], index=order)
    assert np.abs(run(layer, takes_input, shuffled, x[:, order]) - straight[:, order]).max() < 1e-13
    by_row = replace(shuffled, index=np.tile(order, (B, 1)))
    assert np.abs(run(layer, takes_input, by_row, x[:, order]) - straight[:, order]).max() < 1e-13


def test_layers_steps_samples_places_and_heads_have_masks_of_their_own(
    mesh: Mesh, monkeypatch: pytest.MonkeyPatch
) -> None:
    masks = []
    for name in ("a", "b"):
        layer, _ = make(dropout(0.5, name), mesh)
        for step in range(2):
            micro = micro_batch(16, 16, key=fold(0, "step", step))
            y = run(layer, True, micro, np.ones((16, 16, 64)))
            masks.append((y > 0).reshape(-1, 64))
    rows = np.concatenate(masks)
    assert len(np.unique(rows, axis=0)) == len(rows) == 4 * 256

    # Those within attention: each (sample, head, query) has a key of its own.
    layer, _ = make(attention(drop=0.5), mesh)
    calls = watch(monkeypatch, "attention_forward")
    for step in range(2):
        run(layer, True, micro_batch(key=fold(0, "step", step)), hidden())
    keys = [options["row_keys"] for _, options in calls]
    assert all(k.shape == (B, HEADS, T) for k in keys)
    assert len(np.unique(np.stack(keys))) == 2 * B * HEADS * T


# -- parts of a layer -----------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4])
@pytest.mark.parametrize("factory", [attention(False, 0.3), mlp(False, 0.3)], ids=["heads", "mlp"])
def test_the_parts_of_tensor_ranks_add_up(factory: Make, ranks: int, mesh: Mesh) -> None:
    """Two heads on up to four ranks: some have none. Without biases all is a sum over ranks."""
    x, dy, micro = hidden(), numbers(B, T, WIDTH, seed=6), micro_batch()

    def passes(rank: int, size: int) -> tuple[np.ndarray, np.ndarray, ParamStore]:
        tensor = SimpleNamespace(rank=rank, size=size, allreduce=lambda x: x)
        part: Any = SimpleNamespace(**{**vars(mesh), "tensor": tensor})
        layer, store = make(factory, part, random=False)
        (y,), saved = layer.forward((x,), micro)
        (dx,) = layer.backward((dy.copy(),), saved, micro)
        return y, dx, store

    whole_y, whole_dx, whole = passes(0, 1)
    parts = [passes(rank, ranks) for rank in range(ranks)]
    assert np.abs(sum(y for y, _, _ in parts) - whole_y).max() < 1e-14
    assert np.abs(sum(dx for _, dx, _ in parts) - whole_dx).max() < 1e-14
    for _, _, store in parts:
        for ours, param in zip(store.params, whole.params, strict=True):
            assert (ours.value == param.value[ours.shard.slices]).all()
            close = np.abs(ours.grad - param.grad[ours.shard.slices]) < 1e-13
            assert close.all()
    covered = sum(param.shard.size for _, _, store in parts for param in store.params)
    assert covered == sum(param.shard.size for param in whole.params)


# -- decoding -------------------------------------------------------------------------------------


@pytest.mark.parametrize("parts", [[1] * T, [3, 1, 1], [2, 3], [T]])
def test_decoding_in_parts_equals_the_whole(parts: list[int], mesh: Mesh) -> None:
    factory = stage(embedding(tied=True, drop=0.1), block(drop=0.1), head(tied=True))
    layer, _ = make(factory, mesh)
    micro = micro_batch(training=False, want="logits")
    (whole,), _ = layer.forward((), micro)
    state = layer.new_state(B, CONTEXT)
    assert list(state) == ["attention"]
    start = 0
    for count in parts:
        places = slice(start, start + count)
        part = replace(
            micro,
            tokens=micro.tokens[:, places],
            index=np.arange(CONTEXT)[places],
            want="last_logits",
            state=state,
        )
        (logits,), _ = layer.forward((), part)
        start += count
        assert np.abs(logits[:, 0] - whole[:, start - 1]).max() < 1e-12
        assert state["attention"].length == start


@pytest.mark.parametrize("ranks", [1, 2, 4, 8])
def test_a_cache_keeps_what_it_was_given(ranks: int) -> None:
    """Each rank its share of it: all places once, and as many on every rank."""
    caches = [
        KeyValueCache(BACKEND, 2, 3, 6, 4, "float64", ranks=ranks, rank=rank)
        for rank in range(ranks)
    ]
    k, v = numbers(2, 3, 6, 4), numbers(2, 3, 6, 4, seed=6)
    for a, b in pairwise([0, 1, 4, 4, 6]):
        held = []
        for cache in caches:
            keys, values, index = cache.extend(k[:, :, a:b], v[:, :, a:b])
            assert (keys == k[:, :, index]).all() and (values == v[:, :, index]).all()
            assert cache.length == b
            held.append(index.tolist())
        assert sorted(place for places in held for place in places) == list(range(b))
        assert max(map(len, held)) - min(map(len, held)) <= 1


@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("count", [1, 2])
def test_a_full_cache_takes_no_more(count: int, rank: int) -> None:
    cache = KeyValueCache(BACKEND, 1, 1, 4, 2, "float64", ranks=2, rank=rank)
    cache.extend(numbers(1, 1, 4, 2), numbers(1, 1, 4, 2))
    with pytest.raises(ValueError, match=f"{4 + count} tokens in a cache of 4"):
        cache.extend(numbers(1, 1, count, 2), numbers(1, 1, count, 2))
