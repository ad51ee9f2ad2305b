"""Every call of a Group against a dense reference that each rank computes for itself."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.array.backend import Backend
from mpillm.parallel.group import Group, Request, pairwise_sum
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.shard import split_range

Shape = tuple[int, ...]

# The last two are beyond what an ordered sum gathers on every rank.
SHAPES: list[Shape] = [(), (0,), (1,), (3, 0, 2), (2, 3, 7), (64, 129), (20_001,)]
DTYPES = ["float32", "float64", "float16", "int32", "int64", "uint8"]
# Backends, and ways to make a call.
MODES = [("numpy", "blocking"), ("numpy", "polled"), ("strict", "waited")]
LIMITS = [5, 40, 1 << 30]  # bytes a message

# Seconds after which a call counts as hung.
PATIENCE = 10.0


@pytest.fixture
def comm(world: MPI.Intracomm) -> Iterator[MPI.Intracomm]:
    """A communicator of all ranks on which no other test has left a message."""
    own = world.Dup()
    yield own
    own.Free()


@pytest.fixture(params=["numpy", "strict"])
def backend(request: pytest.FixtureRequest) -> Backend:
    return Backend.create(request.param)


@pytest.fixture(params=MODES, ids="-".join)
def mode(request: pytest.FixtureRequest) -> tuple[Backend, str]:
    name, how = request.param
    return Backend.create(name), how


def group_of(
    comm: MPI.Intracomm,
    backend: Backend,
    *,
    ordered: bool = True,
    limit: int = 1 << 30,
    recorder: Recorder | None = None,
) -> Group:
    reduction: Any = "ordered" if ordered else "library"
    return Group(comm, "world", backend, recorder or Recorder(), reduction, limit)


def contributions(comm: MPI.Intracomm, shape: Shape, dtype: str, seed: int = 0) -> list[Any]:
    """What each rank brings along, by rank: the same list everywhere."""
    every = []
    for rank in range(comm.size):
        draw = np.random.default_rng([seed, rank])
        if np.dtype(dtype).kind == "f":
            # Of many magnitudes, so that the order of additions shows in the bits.
            values = draw.normal(size=shape) * 10.0 ** draw.integers(-2, 3, size=shape)
            every.append(np.asarray(values, dtype=dtype))
        else:
            every.append(draw.integers(0, 250 // comm.size + 1, size=shape).astype(dtype))
    return every


def reference(every: list[Any], op: str) -> Any:
    """The sum in the order that is promised, the maximum, or the minimum."""
    if op != "sum":
        return (np.maximum if op == "max" else np.minimum).reduce(every)
    if every[0].dtype == np.float16:
        return pairwise_sum([part.astype(np.float32) for part in every]).astype(np.float16)
    return pairwise_sum(every)


def same(device: Any, host: Any, backend: Backend) -> bool:
    """Whether a device array has the type, the shape and the bits of a host array."""
    found = backend.to_host(device)
    host = np.asarray(host)
    return found.dtype == host.dtype and found.shape == host.shape and _bits(found) == _bits(host)


def _bits(array: Any) -> bytes:
    return bytes(np.ascontiguousarray(array).tobytes())


def finish(request: Request) -> None:
    """Poll until a call is complete; a test that would hang fails instead."""
    deadline = time.monotonic() + PATIENCE
    while not request.test():
        assert time.monotonic() < deadline, "the call does not come to its end"
        time.sleep(1e-5)  # where there are more ranks than cores, another one's turn


def call(group: Group, how: str, name: str, *arguments: Any) -> None:
    """Run a collective in its blocking form, or in the other one and wait in either way."""
    if how == "blocking":
        getattr(group, name)(*arguments)
        return
    request = getattr(group, f"i{name}")(*arguments)
    if how == "polled":
        finish(request)
    request.wait()
    assert request.done
    assert request.test()


def ragged(comm: MPI.Intracomm, seed: int, largest: int) -> list[int]:
    """A random length for each rank, often 0; the same list everywhere."""
    draw = np.random.default_rng([99, seed])
    lengths = draw.integers(0, largest + 1, size=comm.size)
    lengths[draw.random(comm.size) < 0.3] = 0
    return [int(length) for length in lengths]


# --- sums, maxima, minima ------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("op", ["sum", "max", "min"])
def test_allreduce(comm: Any, mode: tuple[Backend, str], op: str, dtype: str) -> None:
    backend, how = mode
    group = group_of(comm, backend)
    for seed, shape in enumerate(SHAPES):
        every = contributions(comm, shape, dtype, seed)
        x = backend.from_host(every[comm.rank].copy())
        call(group, how, "allreduce", x, op)
        assert same(x, reference(every, op), backend), (shape, op)


def test_allreduce_returns_its_argument(comm: Any, backend: Backend) -> None:
    x = backend.zeros((3,), "float32")
    assert group_of(comm, backend).allreduce(x) is x


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("limit", LIMITS)
def test_allreduce_cut_into_messages(
    comm: Any, mode: tuple[Backend, str], limit: int, ordered: bool
) -> None:
    """Integers, whose sums are exact in any order."""
    backend, how = mode
    group = group_of(comm, backend, ordered=ordered, limit=limit)
    for size in (1, 4, 5, 6, 33):
        for dtype in ("uint8", "int64"):
            every = contributions(comm, (size,), dtype, size)
            x = backend.from_host(every[comm.rank].copy())
            call(group, how, "allreduce", x)
            assert same(x, reference(every, "sum"), backend)


def test_a_large_ordered_sum_cut_into_messages(comm: Any) -> None:
    backend = Backend.create("numpy")
    every = contributions(comm, (20_011,), "float32")
    for limit in (4_001, 30_000, 80_044):
        x = every[comm.rank].copy()
        group_of(comm, backend, limit=limit).allreduce(x)
        assert same(x, reference(every, "sum"), backend)


VIEWS: dict[str, Callable[[Any], Any]] = {
    "transposed": lambda a: a.T,
    "strided": lambda a: a[::2, 1::3],
    "reversed": lambda a: a[::-1, ::-1],
    "column": lambda a: a[:, 2],
    "window": lambda a: a[3:9, 1:4],
    "element": lambda a: a[1, 1, ...],
}


@pytest.mark.parametrize("view", VIEWS.values(), ids=VIEWS.keys())
@pytest.mark.parametrize("op", ["sum", "max"])
@pytest.mark.parametrize("rows", [12, 2_000])
def test_allreduce_of_a_view_leaves_the_rest_alone(
    comm: Any, backend: Backend, view: Callable[[Any], Any], op: Any, rows: int
) -> None:
    every = contributions(comm, (rows, 10), "float64", rows)
    expected = every[comm.rank].copy()
    view(expected)[...] = reference([view(part) for part in every], op)
    whole = backend.from_host(every[comm.rank].copy())
    group_of(comm, backend).allreduce(view(whole), op)
    assert same(whole, expected, backend)


@pytest.mark.parametrize("size", [40, 30_000])
def test_an_ordered_sum_does_not_depend_on_the_place(comm: Any, size: int) -> None:
    group = group_of(comm, Backend.create("numpy"))
    mine = contributions(comm, (size,), "float32")[comm.rank]
    order = np.random.default_rng(5).permutation(size)
    straight, permuted = mine.copy(), mine[order]
    group.allreduce(straight)
    group.allreduce(permuted)
    assert _bits(straight[order]) == _bits(permuted)


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16"])
def test_small_and_large_ordered_sums_have_the_same_bits(comm: Any, dtype: str) -> None:
    """A small array is added on every rank, a large one in slices."""
    group = group_of(comm, Backend.create("numpy"))
    mine = contributions(comm, (50_000,), dtype)[comm.rank]
    large, small = mine.copy(), mine[17:117].copy()
    group.allreduce(large)
    group.allreduce(small)
    assert _bits(large[17:117]) == _bits(small)


@pytest.mark.parametrize("ordered", [True, False])
def test_all_ranks_get_the_same_bits(comm: Any, backend: Backend, ordered: bool) -> None:
    group = group_of(comm, backend, ordered=ordered)
    for size in (10, 30_000):
        x = backend.from_host(contributions(comm, (size,), "float32")[comm.rank])
        group.allreduce(x)
        assert len(set(group.allgather_objects(_bits(backend.to_host(x))))) == 1


@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int64"])
def test_the_librarys_sum_is_close(comm: Any, mode: tuple[Backend, str], dtype: str) -> None:
    backend, how = mode
    group = group_of(comm, backend, ordered=False)
    for seed, shape in enumerate(SHAPES):
        every = contributions(comm, shape, dtype, seed)
        x = backend.from_host(every[comm.rank].copy())
        call(group, how, "allreduce", x)
        exact = np.sum(np.asarray(every, dtype=np.float64), axis=0)
        scale = np.sum(np.abs(np.asarray(every, dtype=np.float64)), axis=0)
        bound = (np.finfo(dtype).eps if np.dtype(dtype).kind == "f" else 0.0) * comm.size
        assert (np.abs(backend.to_host(x).astype(np.float64) - exact) <= bound * scale).all()


@pytest.mark.parametrize("ordered", [True, False])
def test_sums_of_float16_accumulate_in_float32(comm: Any, backend: Backend, ordered: bool) -> None:
    """In float16 2048 + 1 is 2048, so that three ranks or more would lose their ones."""
    group = group_of(comm, backend, ordered=ordered)
    for size in (3, 30_000):
        mine = np.full(size, 2048 if comm.rank == 0 else 1, dtype=np.float16)
        x = group.allreduce(backend.from_host(mine))
        assert same(x, np.full(size, 2048 + comm.size - 1, dtype=np.float16), backend)


@pytest.mark.parametrize("ordered", [True, False])
@pytest.mark.parametrize("dtype", ["float32", "float64", "float16", "int32"])
def test_reduce_scatter(comm: Any, mode: tuple[Backend, str], dtype: str, ordered: bool) -> None:
    backend, how = mode
    for size in (0, 1, 2, 5, 64, 9_001):
        every = contributions(comm, (size,), dtype, size)
        start, stop = split_range(size, comm.size, comm.rank)
        for limit in (30, 1 << 30) if size < 100 else (10_000, 1 << 30):
            x = backend.from_host(every[comm.rank].copy())
            out = backend.zeros((stop - start,), dtype)
            group = group_of(comm, backend, ordered=ordered, limit=limit)
            call(group, how, "reduce_scatter", x, out)
            expected = reference(every, "sum")[start:stop]
            if ordered or np.dtype(dtype).kind == "i":
                assert same(out, expected, backend)
            else:
                tolerance = 10 * float(np.finfo(dtype).eps)
                np.testing.assert_allclose(
                    backend.to_host(out), expected, rtol=tolerance, atol=1e3 * tolerance
                )
            assert same(x, every[comm.rank], backend), "x was not left as it was"


def test_reduce_scatter_then_allgather_is_allreduce(comm: Any, backend: Backend) -> None:
    group = group_of(comm, backend)
    mine = contributions(comm, (1_003,), "float32")[comm.rank]
    start, stop = split_range(1_003, comm.size, comm.rank)
    x = backend.from_host(mine.copy())
    part = group.reduce_scatter(x, backend.empty((stop - start,), "float32"))
    gathered = group.allgather(part, backend.empty((1_003,), "float32"))
    assert same(gathered, backend.to_host(group.allreduce(x)), backend)


def test_each_rank_works_on_its_slice_of_one_array(comm: Any, backend: Backend) -> None:
    """As an optimizer with sharded states does with gradients and weights."""
    group = group_of(comm, backend)
    for size in (11, 20_000):
        every = contributions(comm, (size,), "float32", size)
        x = backend.from_host(every[comm.rank].copy())
        start, stop = split_range(size, comm.size, comm.rank)
        group.reduce_scatter(x, x[start:stop])
        group.allgather(x[start:stop], x)
        assert same(x, reference(every, "sum"), backend)


# --- gathering, exchanging, broadcasting ---------------------------------------------------------


@pytest.mark.parametrize("dtype", DTYPES)
def test_allgather(comm: Any, mode: tuple[Backend, str], dtype: str) -> None:
    backend, how = mode
    for size in (0, 1, 3, 4 * comm.size, 4 * comm.size + 1, 10_007):
        whole = contributions(comm, (size,), dtype, size)[0]
        start, stop = split_range(size, comm.size, comm.rank)
        for limit in (5, 1 << 30) if size < 100 else (10_000, 1 << 30):
            out = backend.zeros((size,), dtype)
            part = backend.from_host(whole[start:stop].copy())
            call(group_of(comm, backend, limit=limit), how, "allgather", part, out)
            assert same(out, whole, backend)


@pytest.mark.parametrize("limit", LIMITS)
def test_allgather_of_given_counts(comm: Any, mode: tuple[Backend, str], limit: int) -> None:
    backend, how = mode
    for seed in range(4):
        counts = [0] * comm.size if seed == 0 else ragged(comm, seed, 12)
        ends = np.cumsum(counts)
        whole = contributions(comm, (sum(counts),), "float32", seed)[0]
        part = whole[ends[comm.rank] - counts[comm.rank] : ends[comm.rank]]
        out = backend.zeros((sum(counts),), "float32")
        call(
            group_of(comm, backend, limit=limit),
            how,
            "allgather",
            backend.from_host(part.copy()),
            out,
            counts,
        )
        assert same(out, whole, backend)


def test_allgather_of_parts_and_into_arrays_of_several_dimensions(
    comm: Any, backend: Backend
) -> None:
    """They are read and written in C order, also where they do not lie in memory like that."""
    every = contributions(comm, (6, 4), "float64")
    part = backend.from_host(every[comm.rank].copy()).T
    room = backend.zeros((comm.size, 4, 12), "float64")
    group_of(comm, backend).allgather(part, room[..., ::2])
    expected = np.zeros((comm.size, 4, 12))
    expected[..., ::2] = np.stack([one.T for one in every])
    assert same(room, expected, backend)


@pytest.mark.parametrize("limit", LIMITS)
def test_alltoall(comm: Any, mode: tuple[Backend, str], limit: int) -> None:
    backend, how = mode
    group = group_of(comm, backend, limit=limit)
    for seed in range(4):
        # matrix[s][d]: what rank s sends to rank d.
        matrix = [ragged(comm, 7 * seed + s, 0 if seed == 0 else 11) for s in range(comm.size)]
        counts = matrix[comm.rank]
        out_counts = [row[comm.rank] for row in matrix]
        sent = [contributions(comm, (sum(row),), "int64", seed)[s] for s, row in enumerate(matrix)]
        expected = np.concatenate(
            [
                sent[s][sum(row[: comm.rank]) : sum(row[: comm.rank + 1])]
                for s, row in enumerate(matrix)
            ]
        )
        x = backend.from_host(sent[comm.rank].copy())
        out = backend.zeros((sum(out_counts),), "int64")
        call(group, how, "alltoall", x, counts, out, out_counts)
        assert same(out, expected, backend)
        assert same(x, sent[comm.rank], backend)


@pytest.mark.parametrize("limit", LIMITS)
def test_broadcast(comm: Any, mode: tuple[Backend, str], limit: int) -> None:
    backend, how = mode
    group = group_of(comm, backend, limit=limit)
    for root in range(comm.size):
        for dtype in ("float16", "float64"):
            for shape in [(), (4, 0), (3, 4)]:
                every = contributions(comm, shape, dtype, root)
                x = backend.from_host(every[comm.rank].copy())
                call(group, how, "broadcast", x, root)
                assert same(x, every[root], backend)


def test_broadcast_into_a_view(comm: Any, backend: Backend) -> None:
    every = contributions(comm, (8, 6), "float32")
    x = backend.from_host(every[comm.rank].copy())
    root = comm.size - 1
    group_of(comm, backend).broadcast(x[::3].T, root)
    expected = every[comm.rank].copy()
    expected[::3] = every[root][::3]
    assert same(x, expected, backend)


def test_a_barrier_holds_everyone_back(comm: Any) -> None:
    group = group_of(comm, Backend.create("numpy"))
    if comm.rank == comm.size - 1:
        time.sleep(0.05)
    entered = time.time()
    group.barrier()
    left = time.time()
    assert left >= max(group.allgather_objects(entered)) - 0.02  # nodes' clocks may differ


# --- messages ------------------------------------------------------------------------------------


def test_send_and_receive_along_a_line(comm: Any, backend: Backend) -> None:
    group = group_of(comm, backend)
    for dtype in DTYPES:
        for shape in SHAPES:
            first = contributions(comm, shape, dtype)[0]
            x = backend.from_host(first.copy() if comm.rank == 0 else np.zeros(shape, dtype))
            if comm.rank > 0:
                assert group.recv(x, comm.rank - 1, tag=3) is x
            if comm.rank < comm.size - 1:
                group.send(x, comm.rank + 1, tag=3)
            assert same(x, first, backend)


def exchange_of_all(
    comm: MPI.Intracomm, backend: Backend, sizes: Callable[[int, int, int], int], limit: int
) -> Iterator[tuple[list[Request], Callable[[], None]]]:
    """Post messages of three tags between every two ranks, oneself included.

    Yields the requests, to be completed in any order, and a check of what was received.
    """
    group = group_of(comm, backend, limit=limit)
    requests, rooms = [], []
    for tag in (5, 0, 32_767):
        for peer in range(comm.size):
            size = sizes(peer, comm.rank, tag)
            room = backend.zeros((size,), "int64")
            rooms.append((room, np.arange(size) * 1_000 + 100 * peer + 10 * comm.rank + tag % 7))
            requests.append(group.irecv(room, peer, tag))
    for tag in (0, 32_767, 5):
        for peer in range(comm.size):
            size = sizes(comm.rank, peer, tag)
            text = np.arange(size) * 1_000 + 100 * comm.rank + 10 * peer + tag % 7
            requests.append(group.isend(backend.from_host(text), peer, tag))

    def check() -> None:
        for room, expected in rooms:
            assert same(room, expected, backend)

    yield requests, check


@pytest.mark.parametrize("order", ["posted", "reversed", "shuffled"])
@pytest.mark.parametrize("limit", [1 << 30, 24])
def test_messages_between_all_ranks_polled_together(
    comm: Any, backend: Backend, order: str, limit: int
) -> None:
    def sizes(source: int, target: int, tag: int) -> int:
        return (3 * source + 5 * target + tag) % 11

    for requests, check in exchange_of_all(comm, backend, sizes, limit):
        if order == "reversed":
            requests.reverse()
        if order == "shuffled":
            np.random.default_rng(comm.rank).shuffle(requests)
        deadline = time.monotonic() + PATIENCE
        while requests:
            assert time.monotonic() < deadline
            requests = [request for request in requests if not request.test()]
            time.sleep(1e-5)
        check()


def test_waiting_by_tag_out_of_order(comm: Any, backend: Backend) -> None:
    group = group_of(comm, backend)
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    texts = {tag: np.arange(4, dtype="float32") + 10 * tag for tag in range(4)}
    sends = {tag: group.isend(backend.from_host(texts[tag]), to, tag) for tag in texts}
    rooms = {tag: backend.zeros((4,), "float32") for tag in texts}
    receives = {tag: group.irecv(rooms[tag], source, tag) for tag in reversed(texts)}
    for tag in (2, 0, 3, 1):
        receives[tag].wait()
        assert same(rooms[tag], texts[tag], backend)
    for tag in (3, 1, 0, 2):
        sends[tag].wait()


def test_messages_of_one_tag_arrive_in_order(comm: Any, backend: Backend) -> None:
    group = group_of(comm, backend)
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    rooms = [backend.zeros((5,), "int32") for _ in range(6)]
    requests = [group.irecv(room, source) for room in rooms]
    requests += [group.isend(backend.from_host(np.full(5, i, "int32")), to) for i in range(6)]
    for request in requests:
        finish(request)
    for i, room in enumerate(rooms):
        assert same(room, np.full(5, i, "int32"), backend)


def test_a_view_is_sent_and_received(comm: Any, backend: Backend) -> None:
    group = group_of(comm, backend)
    whole = np.arange(48, dtype="float64").reshape(6, 8)
    x = backend.zeros((8, 12), "float64")
    request = group.irecv(x[:, ::2].T, (comm.rank - 1) % comm.size)
    group.isend(backend.from_host(whole.copy())[::-1], (comm.rank + 1) % comm.size).wait()
    request.wait()
    expected = np.zeros((8, 12))
    expected[:, ::2] = whole[::-1].T
    assert same(x, expected, backend)


@pytest.mark.parametrize("limit", [8, 40, 1_000])
def test_cut_messages_of_one_tag_do_not_mix(comm: Any, backend: Backend, limit: int) -> None:
    """As a pipeline sends the arrays of a cut: all under one tag, all under way at once."""
    group = group_of(comm, backend, limit=limit)
    to, source = (comm.rank + 1) % comm.size, (comm.rank - 1) % comm.size
    texts = [np.arange(size, dtype="int64") + 1_000 * size for size in (300, 0, 7, 301)]
    rooms = [backend.zeros(text.shape, "int64") for text in texts]
    receives = [group.irecv(room, source) for room in rooms]
    sends = [group.isend(backend.from_host(text), to) for text in texts]
    for request in receives[::-1] + sends:
        finish(request)
    for room, text in zip(rooms, texts, strict=True):
        assert same(room, text, backend)


def test_a_cut_message_does_not_wait_for_another(comm: Any) -> None:
    """Sender and receiver may complete two messages in opposite order, cut or not.

    The pieces are far too long for MPI to take before the receiver asks for them.
    """
    group = group_of(comm, Backend.create("numpy"), limit=1 << 20)
    texts = [np.full(3 << 17, tag, dtype="float64") for tag in (1, 2)]  # 3 MiB
    if comm.rank % 2 == 0 and comm.rank + 1 < comm.size:
        sends = [group.isend(text, comm.rank + 1, tag) for tag, text in enumerate(texts)]
        for send in sends:
            finish(send)
    elif comm.rank % 2 == 1:
        rooms = [np.zeros_like(text) for text in texts]
        receives = [group.irecv(room, comm.rank - 1, tag) for tag, room in enumerate(rooms)]
        for tag in (1, 0):
            finish(receives[tag])
            assert (rooms[tag] == texts[tag]).all()


# --- several calls under way ---------------------------------------------------------------------


@pytest.mark.parametrize("size", [100, 20_000])
@pytest.mark.parametrize("ordered", [True, False])
def test_sums_under_way_together(comm: Any, backend: Backend, size: int, ordered: bool) -> None:
    """Ranks may wait for them in different order, as for any other calls of MPI."""
    group = group_of(comm, backend, ordered=ordered)
    every = [contributions(comm, (size,), "float64", seed) for seed in range(4)]
    arrays = [backend.from_host(one[comm.rank].copy()) for one in every]
    requests = [group.iallreduce(x) for x in arrays]
    for i in range(4):
        finish(requests[(i + comm.rank) % 4])
    for x, one in zip(arrays, every, strict=True):
        np.testing.assert_allclose(backend.to_host(x), reference(one, "sum"), rtol=1e-9)


@pytest.mark.parametrize("size", [100, 20_000])
def test_another_call_while_a_sum_is_under_way(comm: Any, backend: Backend, size: int) -> None:
    """How often a rank has polled must not matter to what its calls mean."""
    group = group_of(comm, backend)
    every = contributions(comm, (size,), "float64")
    x = backend.from_host(every[comm.rank].copy())
    request = group.iallreduce(x)
    if comm.rank % 2 == 1:
        deadline = time.monotonic() + 0.05
        while time.monotonic() < deadline:
            request.test()
    whole = contributions(comm, (size,), "float64", 1)[0]
    start, stop = split_range(size, comm.size, comm.rank)
    out = backend.zeros((size,), "float64")
    gather = group.iallgather(backend.from_host(whole[start:stop].copy()), out)
    finish(gather)
    finish(request)
    assert same(out, whole, backend)
    assert same(x, reference(every, "sum"), backend)


# --- objects, groups of one, copies --------------------------------------------------------------


def test_objects(comm: Any) -> None:
    group = group_of(comm, Backend.create("numpy"))
    everyone = [{"rank": rank, "name": "x" * rank} for rank in range(comm.size)]
    mine = everyone[comm.rank]
    assert group.gather_objects(mine) == (everyone if comm.rank == 0 else None)
    assert group.allgather_objects(mine) == everyone
    assert group.broadcast_object(mine) == everyone[0]


def test_a_group_of_one_copies_and_talks_to_nobody(backend: Backend) -> None:
    recorder = Recorder()
    group = group_of(MPI.COMM_SELF, backend, recorder=recorder)
    host = np.arange(6, dtype="float32")
    for how in ("blocking", "polled", "waited"):
        x = backend.from_host(host.copy())
        call(group, how, "allreduce", x, "sum")
        call(group, how, "broadcast", x, 0)
        assert same(x, host, backend)
        for name, arguments in [
            ("reduce_scatter", ()),
            ("allgather", ()),
            ("allgather", ([6],)),
        ]:
            out = backend.zeros((6,), "float32")
            call(group, how, name, x, out, *arguments)
            assert same(out, host, backend)
        out = backend.zeros((6,), "float32")
        call(group, how, "alltoall", x, [6], out, [6])
        assert same(out, host, backend)
    group.barrier()
    assert recorder.last().size == 0
    assert not recorder.traffic


def test_only_what_is_sent_is_copied_from_the_device(comm: Any) -> None:
    if comm.size == 1:
        return  # nothing is copied at all
    backend = Backend.create("strict")
    group = group_of(comm, backend)
    transfers = backend.xp.transfers
    x = backend.zeros((1_000,), "float64")  # 8,000 bytes
    start, stop = split_range(1_000, comm.size, comm.rank)

    def copied(work: Callable[[], Any]) -> int:
        before = transfers.bytes_to_host
        work()
        return int(transfers.bytes_to_host - before)

    root = comm.size - 1
    part, equal = x[start:stop], [1_000 // comm.size] * comm.size
    exchanged = x[: sum(equal)]
    assert copied(lambda: group.allreduce(x)) == 8_000
    assert copied(lambda: group.broadcast(x, root)) == (8_000 if comm.rank == root else 0)
    assert copied(lambda: group.allgather(part, x)) == part.nbytes
    out = backend.zeros((sum(equal),), "float64")
    assert copied(lambda: group.alltoall(exchanged, equal, out, equal)) == exchanged.nbytes
    request = group.isend(x, (comm.rank + 1) % comm.size)
    assert copied(lambda: group.recv(x, (comm.rank - 1) % comm.size)) == 0
    request.wait()


# --- the recorder --------------------------------------------------------------------------------


def test_the_recorder_sees_every_call(comm: Any, backend: Backend) -> None:
    recorder = Recorder()
    group = group_of(comm, backend, recorder=recorder)
    size, rank = comm.size, comm.rank
    x = backend.zeros((4 * size,), "float32")
    part = backend.zeros((4,), "float32")
    equal = [4] * size
    right, left = (rank + 1) % size, (rank - 1) % size
    group.allreduce(x)
    group.iallreduce(x, "max").wait()
    group.reduce_scatter(x, part)
    group.allgather(part, x)
    group.alltoall(x, equal, backend.empty((4 * size,), "float32"), equal)
    group.broadcast(x, size - 1)
    group.barrier()
    requests = [group.irecv(backend.empty((4,), "float32"), left, 8)]
    requests += [group.isend(part, right, 8)]
    requests += [group.irecv(backend.empty((4,), "float32"), left, 9)]
    requests += [group.isend(part, right, 9)]
    for request in requests:
        request.wait()

    collectives = [
        ("allreduce", 16 * size),
        ("allreduce", 16 * size),
        ("reduce_scatter", 16 * size),
        ("allgather", 16 * size),
        ("alltoall", 16 * size),
        ("broadcast", 16 * size),
        ("barrier", 0),
    ]
    # A broadcast has its root for a tag. Messages are counted by tag.
    expected = [
        (i, op.encode(), -1, (size - 1) * (op == "broadcast"), n)
        for i, (op, n) in enumerate(collectives)
        if size > 1
    ]
    for tag in (8, 9):
        expected += [(0, b"recv", left, tag, 16), (0, b"send", right, tag, 16)]
    calls = recorder.last()
    found = [(c["sequence"], c["op"], c["peer"], c["tag"], c["bytes"]) for c in calls]
    assert found == expected
    assert (calls["axis"] == b"world").all()
    assert (calls["end"] >= calls["begin"]).all()
    assert (np.diff(calls["begin"]) >= 0).all()
    totals = {op: (t.calls, t.bytes) for (_, op), t in recorder.traffic.items()}
    assert totals["send"] == totals["recv"] == (2, 32)
    if size > 1:
        assert totals["allreduce"] == (2, 32 * size)


def test_the_recorder_sees_objects_too(comm: Any) -> None:
    """A rank that is missing from one of these hangs the others like any other call."""
    recorder = Recorder()
    group = group_of(comm, Backend.create("numpy"), recorder=recorder)
    group.gather_objects(1)
    group.allgather_objects(1)
    group.broadcast_object(1)
    if comm.size > 1:
        assert recorder.last()["sequence"].tolist() == [0, 1, 2]
        assert all(recorder.last()["end"] > 0)


def test_a_call_under_way_has_no_end(comm: Any, backend: Backend) -> None:
    recorder = Recorder()
    group = group_of(comm, backend, recorder=recorder)
    request = group.irecv(backend.zeros((3,), "float32"), comm.rank)
    assert recorder.last()["end"].tolist() == [0.0]
    assert not request.test()
    group.isend(backend.zeros((3,), "float32"), comm.rank).wait()
    finish(request)
    assert (recorder.last()["end"] > 0).all()
