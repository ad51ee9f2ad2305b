"""Recomputed activations: the same bits, and less memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace

import msgspec
import numpy as np
import pytest
from gradcheck import scramble
from held import held_bytes
from mpi4py import MPI

from mpillm.array.backend import Backend
from mpillm.models.gpt2 import Settings
from mpillm.models.model import build_stages
from mpillm.models.settings import build_model
from mpillm.nn.layer import Micro, Recomputed
from mpillm.nn.stage import Stage
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings

BACKEND = Backend.create("numpy")
B, T, WIDTH, ITEM = 3, 8, 12, 4
MODEL = Settings(
    layers=2, heads=3, width=WIDTH, vocabulary=11, context=T, init_std=0.3, dropout=0.2
)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    mesh = Mesh(MPI.COMM_SELF, fit(ParallelSettings(), 1), BACKEND, Recorder())
    yield mesh
    mesh.free()


def build(mesh: Mesh, recompute: Recomputed, *, tied: bool = True) -> Stage:
    """The whole model."""
    model = build_model(msgspec.structs.replace(MODEL, tied=tied))
    (stage,) = build_stages(model, BACKEND, mesh, "float32", seed=1, recompute=recompute)
    scramble(stage.store)
    return stage


def micro_batch(seed: int = 0) -> Micro:
    rng = np.random.default_rng(seed)
    return Micro(
        tokens=rng.integers(0, 11, (B, T), dtype=np.int32),
        labels=rng.integers(0, 11, (B, T), dtype=np.int32),
        mask=np.ones((B, T), np.float32),
        index=np.arange(T),
        samples=np.arange(B) + B * seed,
        training=True,
        key=5,
    )


def losses_and_gradients(stage: Stage, *, put_off: bool) -> list[np.ndarray]:
    """Two micro-batches, both in flight at once."""
    micros = [micro_batch(0), micro_batch(1)]
    passes = [stage.forward((), micro) for micro in micros]
    later: list[Callable[[], None]] | None = [] if put_off else None
    for (_, saved), micro in zip(passes, micros, strict=True):
        stage.backward((0.1,), saved, micro, later)
    for work in later or ():
        work()
    return [*(outputs[0] for outputs, _ in passes), *(a.grads for a in stage.store.arenas)]


@pytest.mark.parametrize("put_off", [False, True], ids=["at once", "put off"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("recompute", ["attention", "block"])
def test_no_bit_changes(recompute: Recomputed, tied: bool, put_off: bool, mesh: Mesh) -> None:
    plain, again = build(mesh, "none", tied=tied), build(mesh, recompute, tied=tied)
    assert [p.name for p in again.store.params] == [p.name for p in plain.store.params]
    expected = losses_and_gradients(plain, put_off=False)
    for ours, exact in zip(losses_and_gradients(again, put_off=put_off), expected, strict=True):
        assert exact.any() and (ours == exact).all()


def test_what_is_held(mesh: Mesh) -> None:
    """Of a block its input, or of the attention branch what comes out of the norm before it."""

    def held(recompute: Recomputed) -> list[int]:
        """Bytes of the embedding, two blocks and the head."""
        stage = build(mesh, recompute)
        _, saved = stage.forward((), micro_batch())
        weights = [param.value for param in stage.store.params]
        return [held_bytes(of_layer, weights) for of_layer in saved]

    first, *blocks, last = held("none")
    features = B * T * WIDTH
    assert held("block") == [first, features * ITEM, features * ITEM, last]
    # Queries, keys, values, the heads' outputs and where dropout struck; the branch's input stays.
    least = features * (4 * ITEM + 1)
    same_first, *fewer, same_last = held("attention")
    assert (same_first, same_last) == (first, last)
    assert all(a <= b - least for a, b in zip(fewer, blocks, strict=True))


def test_nothing_is_held_when_not_training(mesh: Mesh) -> None:
    micro = replace(micro_batch(), training=False, want="logits")
    (expected,), _ = build(mesh, "none").forward((), micro)
    for recompute in ("attention", "block"):
        (logits,), saved = build(mesh, recompute).forward((), micro)
        assert saved == [None] * 4
        assert (logits == expected).all()


@pytest.mark.parametrize("recompute", ["attention", "block"])
def test_decoding(recompute: Recomputed, mesh: Mesh) -> None:
    stage, micro = build(mesh, recompute), replace(micro_batch(), training=False, want="logits")
    (whole,), _ = stage.forward((), micro)
    state = stage.new_state(B, T)
    assert len(state) == MODEL.layers
    for place in range(T):
        tokens, index = micro.tokens[:, place : place + 1], micro.index[place : place + 1]
        part = replace(micro, tokens=tokens, index=index, want="last_logits", state=state)
        (logits,), _ = stage.forward((), part)
        assert np.abs(logits[:, 0] - whole[:, place]).max() < 1e-4
