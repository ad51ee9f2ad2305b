"""Attention over sequences that the context ranks share out, against one rank with all of it."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from itertools import pairwise
from typing import TYPE_CHECKING, Any

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.array.backend import Backend
from mpillm.array.ops import Ops
from mpillm.nn.attention import SelfAttention
from mpillm.nn.layer import Build, Keys, Micro
from mpillm.nn.ring import RingAttention, context_share, merge_shares
from mpillm.nn.store import ParamStore
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.progress import Progress
from mpillm.parallel.recorder import Recorder, Traffic
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.shard import zigzag

if TYPE_CHECKING:
    from mpillm.parallel.launch import Comm

BACKENDS = {name: Backend.create(name) for name in ("numpy", "strict")}
NUMPY = BACKENDS["numpy"]
REFERENCE = Ops(np)
B, E, SCALE = 2, 4, 0.7

# Tokens in a sequence: even chunks at 1, 2, 3 and 4 ranks; uneven ones; fewer tokens than chunks.
LENGTHS = [24, 13, 3, 1]


def numbers(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape)


def whole_micro(length: int, packed: bool = False, **changes: Any) -> Micro:
    """A micro-batch of whole sequences; with `packed`, of several documents each."""
    rng = np.random.default_rng(3)
    starts = rng.random((B, length)) < 0.3
    micro = Micro(
        tokens=rng.integers(0, 50, (B, length), dtype=np.int32),
        labels=rng.integers(0, 50, (B, length), dtype=np.int32),
        mask=rng.random((B, length)),
        index=np.arange(length),
        samples=np.arange(B) + 4,
        documents=np.cumsum(starts, axis=1) if packed else None,
        training=True,
        key=17,
    )
    return replace(micro, **changes)


def to_device(micro: Micro, backend: Backend) -> Micro:
    names = ("tokens", "labels", "mask", "index", "samples", "documents")
    held = {name: getattr(micro, name) for name in names}
    moved = {name: None if x is None else backend.from_host(x) for name, x in held.items()}
    return replace(micro, **moved)


def share(x: np.ndarray, axis: int, length: int, ranks: int, rank: int) -> np.ndarray:
    """The tokens of one context rank."""
    places = [place for start, stop in zigzag(length, ranks, rank) for place in range(start, stop)]
    return np.take(x, places, axis=axis)


def close(ours: np.ndarray, exact: np.ndarray, tolerance: float) -> None:
    """Relative to the largest element, or to the operands, which are about 1, if that is larger."""
    assert ours.shape == exact.shape
    infinite = np.isinf(exact)
    assert (ours[infinite] == exact[infinite]).all()
    scale = np.abs(exact[~infinite]).max(initial=1.0)
    assert np.abs(ours[~infinite] - exact[~infinite]).max(initial=0.0) <= tolerance * scale


Meshes = Callable[..., Mesh]


@pytest.fixture(scope="module")
def meshes(world: Comm) -> Iterator[Meshes]:
    """The mesh that has all ranks along the context axis, or another one; each is made once."""
    made: dict[Any, Mesh] = {}

    def mesh(
        backend: Backend = NUMPY,
        recorder: Recorder | None = None,
        message_limit: int = 1 << 30,
        **layout: Any,
    ) -> Mesh:
        settings = fit(ParallelSettings(**{"context": world.size, **layout}), world.size)
        key = (backend.name, recorder, message_limit, settings)
        if key not in made:
            made[key] = Mesh(world, settings, backend, recorder or Recorder(), message_limit)
        return made[key]

    yield mesh
    for one in made.values():
        one.free()


Passes = tuple[tuple[Any, Any], Callable[[], tuple[Any, Any, Any]]]


@dataclass(frozen=True)
class Attention:
    """An attention over whole sequences and random operands of it."""

    length: int
    causal: bool = True
    packed: bool = False
    drop: float = 0.0
    heads: int = 2
    key_heads: int = 2
    e: int = E
    dtype: str = "float64"

    def micro(self) -> Micro:
        return whole_micro(self.length, self.packed)

    def operands(self) -> dict[str, np.ndarray]:
        sizes = {"q": self.heads, "k": self.key_heads, "v": self.key_heads, "d_out": self.heads}
        operands = {
            name: numbers(seed, B, heads, self.length, self.e).astype(self.dtype)
            for seed, (name, heads) in enumerate(sizes.items())
        }
        shape = (B, self.heads, self.length)
        keys = np.random.default_rng(9).integers(0, 2**64, shape, dtype=np.uint64)
        return {**operands, "row_keys": keys}

    def dense(self, **changes: np.ndarray) -> dict[str, np.ndarray]:
        """What one rank gets, in float64."""
        x, micro = {**self.operands(), **changes}, self.micro()
        q, k, v, d_out = (x[name].astype("float64") for name in ("q", "k", "v", "d_out"))
        index, documents = micro.index, micro.documents
        out, lse, saved = REFERENCE.attention_forward(
            q,
            k,
            v,
            index,
            index,
            documents,
            documents,
            causal=self.causal,
            scale=SCALE,
            drop=self.drop,
            row_keys=x["row_keys"] if self.drop else None,
        )
        dq, dk, dv = REFERENCE.attention_backward(d_out, out, lse, saved)
        return {"out": out, "lse": lse, "dq": dq, "dk": dk, "dv": dv}

    def ring(self, mesh: Mesh, backend: Backend) -> tuple[RingAttention, Micro]:
        build = Build(backend, mesh, ParamStore(backend, self.dtype, seed=1))
        ring = mesh.context
        micro = to_device(self.micro(), backend)
        micro = context_share(micro, backend, ring.size, ring.rank)
        if ring.size == 1:  # is a ring, too, if it is told what it holds
            keys = Keys(micro.index, micro.documents)
            micro = replace(micro, keys=(keys,), length=self.length)
        return RingAttention(build, causal=self.causal, scale=SCALE), micro

    def local(self, mesh: Mesh, backend: Backend) -> dict[str, Any]:
        ring = mesh.context
        return {
            name: backend.from_host(share(x, 2, self.length, ring.size, ring.rank))
            for name, x in self.operands().items()
        }

    def forward(self, mesh: Mesh, backend: Backend, **changes: Any) -> Passes:
        """The forward pass on this rank of the ring; gives its results and the backward pass."""
        ring, micro = self.ring(mesh, backend)
        micro, x = replace(micro, **changes), self.local(mesh, backend)
        keys = x["row_keys"] if self.drop else None
        out, lse, saved = ring.forward(x["q"], x["k"], x["v"], micro, self.drop, keys)
        return (out, lse), lambda: ring.backward(x["d_out"], out, lse, saved, micro)

    def run(self, mesh: Mesh, backend: Backend, **changes: Any) -> dict[str, np.ndarray]:
        """What this rank of the ring gets of it."""
        results, backward = self.forward(mesh, backend, **changes)
        names = ("out", "lse", "dq", "dk", "dv")
        arrays = (*results, *backward())
        return {name: backend.to_host(x) for name, x in zip(names, arrays, strict=True)}


# -- the operation --------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("heads", [(2, 2), (4, 2), (3, 1)], ids=["alike", "grouped", "one key"])
@pytest.mark.parametrize("drop", [0.0, 0.3])
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("causal", [True, False], ids=["causal", "all to all"])
def test_a_ring_equals_one_rank(
    meshes: Meshes,
    causal: bool,
    packed: bool,
    drop: float,
    heads: tuple[int, int],
    length: int,
    backend: str,
) -> None:
    attention = Attention(length, causal, packed, drop, *heads)
    mesh = meshes(BACKENDS[backend])
    ring = mesh.context
    ours, exact = attention.run(mesh, BACKENDS[backend]), attention.dense()
    for name, whole in exact.items():
        close(ours[name], share(whole, 2, length, ring.size, ring.rank), 1e-12)


@pytest.mark.parametrize("limit", [1 << 30, 1000])
def test_messages_of_any_size(meshes: Meshes, limit: int) -> None:
    """Larger than what MPI sends unasked; and cut into pieces."""
    attention = Attention(length=301, e=64)
    mesh = meshes(message_limit=limit)
    ring = mesh.context
    ours, exact = attention.run(mesh, NUMPY), attention.dense()
    for name, whole in exact.items():
        close(ours[name], share(whole, 2, 301, ring.size, ring.rank), 1e-12)


def test_a_rank_without_heads(meshes: Meshes) -> None:
    results = Attention(13, heads=0, key_heads=0).run(meshes(), NUMPY)
    assert all(x.shape[1] == 0 for x in results.values())


def test_single_precision(meshes: Meshes) -> None:
    attention = Attention(24, packed=True, drop=0.3, dtype="float32")
    mesh = meshes()
    ring = mesh.context
    ours, exact = attention.run(mesh, NUMPY), attention.dense()
    for name, whole in exact.items():
        assert ours[name].dtype == "float32"
        close(ours[name], share(whole, 2, 24, ring.size, ring.rank), 1e-5)


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("backend", BACKENDS)
def test_a_query_that_sees_no_key(meshes: Meshes, backend: str) -> None:
    """It gives nothing and takes nothing, and the others are what they are without it."""
    attention = Attention(13, packed=True)
    device = BACKENDS[backend]
    mesh = meshes(device)
    size, rank = mesh.context.size, mesh.context.rank
    blind = np.arange(13) % 3 == 1
    documents = share(np.where(blind, 99, attention.micro().documents), 1, 13, size, rank)
    ours = attention.run(mesh, device, documents=device.from_host(documents))
    d_out = np.where(blind[:, None], 0.0, attention.operands()["d_out"])
    exact = attention.dense(d_out=d_out)
    exact["out"][:, :, blind], exact["lse"][:, :, blind] = 0.0, -np.inf
    for name, whole in exact.items():
        close(ours[name], share(whole, 2, 13, size, rank), 1e-12)


# -- what is computed and what is sent -------------------------------------------------------------


@pytest.mark.parametrize("length", [48, 50, 7])
def test_hidden_chunks_are_left_out_and_all_ranks_have_as_much_to_do(
    meshes: Meshes, monkeypatch: pytest.MonkeyPatch, length: int
) -> None:
    mesh = meshes()
    size, rank = mesh.context.size, mesh.context.rank
    holder = {i: r for r in range(size) for run in zigzag(length, size, r) for i in range(*run)}
    scores = [0] * size  # of this rank's queries by the keys of each rank

    def count(operation: str) -> None:
        original = getattr(NUMPY.ops, operation)

        def counted(*arguments: Any, **options: Any) -> Any:
            q, k, _, _, k_index = arguments[:5]
            if k_index.size:
                scores[holder[k_index[0]]] += q.shape[2] * k.shape[2]
            return original(*arguments, **options)

        monkeypatch.setattr(NUMPY.ops, operation, counted)

    count("attention_forward")
    _, backward = Attention(length).forward(mesh, NUMPY)
    first = list(scores)
    count("attention_saved")
    backward()
    assert scores == [2 * count for count in first]
    work = mesh.context.allgather_objects(sum(first))
    assert max(work) - min(work) <= 2 * length
    if length % (2 * size) == 0:
        chunk = length // (2 * size)
        assert first == [(3 if r == rank else 2) * chunk**2 for r in range(size)]


@pytest.mark.parametrize("length", [24, 13, 3])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
def test_bytes_sent_are_those_of_the_formula(meshes: Meshes, length: int, dtype: str) -> None:
    recorder = Recorder()
    mesh = meshes(recorder=recorder)
    ring, traffic = mesh.context, recorder.traffic
    attention = Attention(length, heads=4, key_heads=2, drop=0.1, dtype=dtype)
    _, backward = attention.forward(mesh, NUMPY)
    a_token = 2 * B * 2 * E * np.dtype(dtype).itemsize
    held = [sum(b - a for a, b in zigzag(length, ring.size, rank)) for rank in range(ring.size)]
    keys_values = a_token * (length - held[(ring.rank + 1) % ring.size])

    def sent() -> tuple[int, int]:
        total = traffic.get(("context", "send"), Traffic())
        return total.calls, total.bytes

    assert sent() == (ring.size - 1, keys_values)
    backward()
    assert sent() == (3 * ring.size - 2, 2 * keys_values + a_token * length)
    assert {op for axis, op in traffic if axis == "context"} == {"send", "recv"}


def test_messages_are_under_way_while_blocks_are_computed(
    meshes: Meshes, monkeypatch: pytest.MonkeyPatch
) -> None:
    mesh, progress = meshes(), Progress()
    ring = mesh.context
    events: list[str] = []

    def note(target: Any, name: str, event: str) -> None:
        original = getattr(target, name)

        def noted(*arguments: Any, **options: Any) -> Any:
            events.append(event)
            return original(*arguments, **options)

        monkeypatch.setattr(target, name, noted)

    note(ring, "isend", "send")
    note(ring, "irecv", "recv")
    note(NUMPY.ops, "attention_forward", "compute")
    note(NUMPY.ops, "attention_backward", "compute")
    note(progress, "poll", "poll")
    note(progress, "wait", "wait")

    def calls() -> list[str]:
        """Those since the last time; something is polled between any two computations."""
        assert "compute" not in [b for a, b in pairwise(events) if a == "compute"]
        made = [event for event in events if event != "poll"]
        events.clear()
        return made

    _, backward = Attention(24).forward(mesh, NUMPY, progress=progress)
    expected = []
    for left in reversed(range(ring.size)):
        visible = 3 if left == ring.size - 1 else 2
        expected += ["recv", "send"] * (left > 0) + ["compute"] * visible
        expected += ["wait", "wait"] * (left > 0)
    assert calls() == expected
    backward()
    expected = []
    for left in reversed(range(ring.size)):
        first = left == ring.size - 1
        expected += ["recv", "send"] * (left > 0) + ["recv"] * (not first)
        expected += ["compute"] * (3 if first else 2)
        expected += ["wait", "wait"] * (not first) + ["send"] + ["wait", "wait"] * (left > 0)
    assert calls() == [*expected, "recv", "wait", "wait"]


# -- the layer -------------------------------------------------------------------------------------

WIDTH = 8


def build_layer(
    mesh: Mesh, backend: Backend, heads: int, drop: float, causal: bool
) -> tuple[SelfAttention, ParamStore]:
    store = ParamStore(backend, "float64", seed=1)
    build = Build(backend, mesh, store)
    layer = SelfAttention(
        build,
        "attention",
        WIDTH,
        heads,
        bias=True,
        std=0.4,
        out_std=0.4,
        drop=drop,
        causal=causal,
    )
    store.allocate()
    return layer, store


@pytest.fixture
def alone() -> Iterator[Mesh]:
    """The mesh of a process that works for itself."""
    mesh = Mesh(MPI.COMM_SELF, fit(ParallelSettings(), 1), NUMPY, Recorder())
    yield mesh
    mesh.free()


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("length", [13, 3])
@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("heads", [1, 2])
@pytest.mark.parametrize(
    ("causal", "packed", "drop"), [(True, False, 0.0), (True, True, 0.3), (False, True, 0.3)]
)
def test_the_layer_equals_that_of_one_rank(
    meshes: Meshes,
    alone: Mesh,
    world: Comm,
    causal: bool,
    packed: bool,
    drop: float,
    heads: int,
    tensor: int,
    length: int,
    backend: str,
) -> None:
    """One head on two tensor ranks: one of them sends nothing but empty messages."""
    if world.size % tensor:
        pytest.skip(f"{world.size} ranks")
    x, dy = numbers(1, B, length, WIDTH), numbers(2, B, length, WIDTH)
    whole = whole_micro(length, packed)

    layer, store = build_layer(alone, NUMPY, heads, drop, causal)
    (y,), saved = layer.forward((x,), whole)
    (dx,) = layer.backward((dy.copy(),), saved, whole)
    weights = {param.name: param.grad for param in store.params}

    device = BACKENDS[backend]
    mesh = meshes(device, tensor=tensor, context=world.size // tensor)
    size, rank = mesh.context.size, mesh.context.rank
    layer, store = build_layer(mesh, device, heads, drop, causal)
    micro = context_share(to_device(whole, device), device, size, rank)
    ours, slope = (device.from_host(share(array, 1, length, size, rank)) for array in (x, dy))
    (our_y,), saved = layer.forward((ours,), micro)
    (our_dx,) = layer.backward((slope,), saved, micro)
    close(device.to_host(our_y), share(y, 1, length, size, rank), 1e-12)
    close(device.to_host(our_dx), share(dx, 1, length, size, rank), 1e-12)
    for param in store.params:
        total = device.to_host(mesh.context.allreduce(param.grad))
        close(total, weights[param.name][param.shard.slices], 1e-12)


def test_what_is_saved_is_this_ranks_own(meshes: Meshes) -> None:
    """Queries, keys and values (one array), the result, and the log-sum-exp; no other's block."""
    mesh = meshes()
    attention = Attention(24)
    ring, micro = attention.ring(mesh, NUMPY)
    x = attention.local(mesh, NUMPY)
    _, _, saved = ring.forward(x["q"], x["k"], x["v"], micro)
    kept = [array for array in saved if isinstance(array, np.ndarray)]
    assert all(any(array is given for given in x.values()) for array in kept)


# -- a micro-batch ---------------------------------------------------------------------------------


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("packed", [False, True], ids=["whole", "documents"])
@pytest.mark.parametrize("length", LENGTHS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_a_micro_batch_is_shared_out(ranks: int, length: int, packed: bool, backend: str) -> None:
    device = BACKENDS[backend]
    whole = whole_micro(length, packed, counted=np.arange(B))
    shares = [context_share(to_device(whole, device), device, ranks, r) for r in range(ranks)]
    places = np.concatenate([device.to_host(part.index) for part in shares])
    assert sorted(places.tolist()) == list(range(length))
    for rank, part in enumerate(shares):
        assert part.length == length and part.counted is whole.counted and part.training
        here = share(np.arange(length), 0, length, ranks, rank)
        assert device.to_host(part.index).tolist() == here.tolist()
        for name in ("tokens", "labels", "mask", "documents"):
            ours, all_of_it = getattr(part, name), getattr(whole, name)
            if all_of_it is None:
                assert ours is None
                continue
            assert (device.to_host(ours) == all_of_it[:, here]).all()
            assert ours.dtype == all_of_it.dtype
        for theirs, keys in zip(shares, part.keys, strict=True):
            assert (device.to_host(keys.index) == device.to_host(theirs.index)).all()
            if packed:
                assert (device.to_host(keys.documents) == device.to_host(theirs.documents)).all()
            else:
                assert keys.documents is None


def test_one_rank_has_the_micro_batch_itself() -> None:
    micro = whole_micro(5)
    assert context_share(micro, NUMPY, 1, 0) is micro


# -- decoding --------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("parts", [[1] * 7, [5, 1, 1], [2, 5], [7]])
def test_decoding_with_a_cache_that_is_shared_out(
    meshes: Meshes,
    alone: Mesh,
    monkeypatch: pytest.MonkeyPatch,
    parts: list[int],
    causal: bool,
    backend: str,
) -> None:
    """All ranks give what one rank gives, in any split of the text, each from its share of it."""
    device = BACKENDS[backend]
    mesh = meshes(device)
    ring = mesh.context
    layer, _ = build_layer(mesh, device, 2, 0.3, causal)
    single, _ = build_layer(alone, NUMPY, 2, 0.3, causal)
    x = numbers(1, B, 7, WIDTH)
    state, whole = layer.new_state(B, 7), single.new_state(B, 7)
    seen: list[int] = []
    original = device.ops.attention_forward

    def watched(*arguments: Any, **options: Any) -> Any:
        seen.append(arguments[1].shape[2])
        return original(*arguments, **options)

    start = 0
    for count in parts:
        places = slice(start, start + count)
        micro = whole_micro(count, training=False)
        index = np.arange(start, start + count)
        (exact,), _ = single.forward((x[:, places],), replace(micro, index=index, state=whole))
        with monkeypatch.context() as patch:
            patch.setattr(device.ops, "attention_forward", watched)
            (y,), saved = layer.forward(
                (device.from_host(x[:, places]),),
                replace(to_device(micro, device), index=device.from_host(index), state=state),
            )
        start += count
        assert saved is None
        close(device.to_host(y), exact, 1e-12)
        assert seen.pop() == len(range(ring.rank, start, ring.size))
        rows = mesh.context.allgather_objects(device.to_host(y).tobytes())
        assert len(set(rows)) == 1
    with pytest.raises(ValueError, match="8 tokens in a cache of 7"):
        state["attention"].extend(*device.from_host(numbers(1, 2, B, 2, 1, WIDTH // 2)))


def test_the_shares_of_a_cache_are_merged_by_one_message(meshes: Meshes) -> None:
    recorder = Recorder()
    context = meshes(recorder=recorder).context
    out, lse = numbers(1, B, 2, 3, E), numbers(2, B, 2, 3)
    merged = merge_shares(out, lse, context, NUMPY)
    close(merged, out, 1e-14)  # of the same share on every rank
    total = recorder.traffic.get(("context", "allgather"), Traffic())
    messages = int(context.size > 1)
    assert (total.calls, total.bytes) == (
        messages,
        messages * 8 * context.size * B * 2 * 3 * (E + 1),
    )
