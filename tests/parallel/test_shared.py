"""Calls through shared memory: the same bits as by messages, at any number of ranks of a node."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.array.backend import Backend
from mpillm.data.loader import Loader
from mpillm.models.gpt2 import Settings
from mpillm.models.settings import build_model
from mpillm.parallel import shared_calls, shared_memory
from mpillm.parallel.group import Group, Request, pairwise_sum
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.shard import split_range
from mpillm.parallel.shared_memory import Window
from mpillm.training.settings import OptimizerSettings, TrainSettings
from mpillm.training.trainer import Trainer, resolve_batch

SHAPES = [(), (1,), (3, 0), (2, 3, 7), (4_099,), (150_001,)]
DTYPES = ["float32", "float64", "float16", "int32", "uint8"]
WAYS = ["blocking", "polled", "waited"]
PATIENCE = 10.0


@pytest.fixture
def comm(world: MPI.Intracomm) -> Iterator[MPI.Intracomm]:
    own = world.Dup()
    yield own
    own.Free()


@pytest.fixture(autouse=True)
def _small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Small arrays, too, are added in shared memory."""
    monkeypatch.setattr(shared_calls, "SHARED", 0)


@pytest.fixture
def group(comm: MPI.Intracomm) -> Iterator[Group]:
    made = group_of(comm)
    yield made
    made.free()


def group_of(comm: MPI.Intracomm, limit: int = 1 << 30, **more: Any) -> Group:
    """A group with a communicator of its own."""
    return Group(
        comm.Dup(), "world", Backend.create("numpy"), Recorder(), message_limit=limit, **more
    )


def contributions(comm: MPI.Intracomm, size: Any, dtype: str, seed: int = 0) -> list[Any]:
    """What each rank brings along; of many magnitudes, so that the order of additions shows."""
    every = []
    for rank in range(comm.size):
        draw = np.random.default_rng([seed, rank])
        if np.dtype(dtype).kind == "f":
            values = draw.normal(size=size) * 10.0 ** draw.integers(-2, 3, size=size)
        else:
            values = draw.integers(0, 200, size=size)
        every.append(np.asarray(values).astype(dtype))
    return every


def total(every: list[Any]) -> Any:
    """The sum in the order that is promised."""
    if every[0].dtype == np.float16:
        return pairwise_sum([part.astype(np.float32) for part in every]).astype(np.float16)
    return pairwise_sum(every)


def same(x: np.ndarray, y: Any) -> bool:
    y = np.asarray(y)
    return x.dtype == y.dtype and x.shape == y.shape and x.tobytes() == y.tobytes()


def shared(group: Group, x: np.ndarray) -> np.ndarray:
    """A copy in shared memory."""
    room: np.ndarray = group.zeros(x.shape, x.dtype)
    room[...] = x
    assert group.size == 1 or group.shared_bytes > 0
    return room


def finish(request: Request) -> None:
    deadline = time.monotonic() + PATIENCE
    while not request.test():
        assert time.monotonic() < deadline, "the call does not come to its end"
        time.sleep(1e-5)


def call(group: Group, how: str, name: str, *arguments: Any) -> None:
    if how == "blocking":
        getattr(group, name)(*arguments)
    elif how == "polled":
        finish(getattr(group, f"i{name}")(*arguments))
    else:
        getattr(group, f"i{name}")(*arguments).wait()


def uneven(comm: MPI.Intracomm, seed: int) -> list[int]:
    """A length for each rank, some of them 0; the same list everywhere."""
    draw = np.random.default_rng([7, seed])
    return [int(n) * (draw.random() > 0.3) for n in draw.integers(0, 900, comm.size)]


# --- arrays in shared memory ---------------------------------------------------------------------


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_allreduce(comm: Any, group: Group, dtype: str, how: str) -> None:
    for seed, shape in enumerate(SHAPES):
        every = contributions(comm, shape, dtype, seed)
        x = shared(group, every[comm.rank])
        call(group, how, "allreduce", x)
        assert same(x, total(every)), shape


@pytest.mark.parametrize("op", ["max", "min"])
def test_maxima(comm: Any, group: Group, op: Any) -> None:
    every = contributions(comm, (30_000,), "float32")
    x = shared(group, every[comm.rank])
    group.allreduce(x, op)
    assert same(x, (np.maximum if op == "max" else np.minimum).reduce(every))


def test_a_part_of_an_array(comm: Any, group: Group) -> None:
    """Contiguous parts are added where they lie, others by way of a copy; the rest stays."""
    for number, part in enumerate((np.s_[3], np.s_[2:5], np.s_[:, 1:7], np.s_[::2, ::-1])):
        every = contributions(comm, (9, 400), "float64", number)
        x, expected = shared(group, every[comm.rank]), every[comm.rank].copy()
        group.allreduce(x[part])
        expected[part] = total([one[part] for one in every])
        assert same(x, expected)


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_reduce_scatter(comm: Any, group: Group, dtype: str, how: str) -> None:
    for seed in range(4):
        counts = uneven(comm, seed)
        start, stop = sum(counts[: comm.rank]), sum(counts[: comm.rank + 1])
        every = contributions(comm, (sum(counts),), dtype, seed)
        expected = total(every)[start:stop]
        x, out = shared(group, every[comm.rank]), np.zeros(stop - start, dtype)
        call(group, how, "reduce_scatter", x, out, counts)
        assert same(out, expected)
        assert same(x, every[comm.rank])
        call(group, how, "reduce_scatter", x, x[start:stop], counts)
        every[comm.rank][start:stop] = expected
        assert same(x, every[comm.rank])


def test_a_slice_may_go_to_another_part_of_the_array(comm: Any, group: Group) -> None:
    every = contributions(comm, (200 * comm.size,), "float32")
    start = 200 * comm.rank
    for low in (0, start + 1, 200 * comm.size - 200):
        if low + 200 <= 200 * comm.size:
            x, expected = shared(group, every[comm.rank]), every[comm.rank].copy()
            group.reduce_scatter(x, x[low : low + 200])
            expected[low : low + 200] = total(every)[start : start + 200]
            assert same(x, expected)
        else:  # as all ranks make each call
            group.reduce_scatter(shared(group, every[comm.rank]), np.empty(200, "float32"))


@pytest.mark.parametrize("how", WAYS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_allgather(comm: Any, group: Group, dtype: str, how: str) -> None:
    """Into a shared array, of which the part is a slice, and into another one, as with ZeRO."""
    for seed in range(4):
        counts = uneven(comm, seed)
        start, stop = sum(counts[: comm.rank]), sum(counts[: comm.rank + 1])
        whole = contributions(comm, (sum(counts),), dtype, seed)[0]
        x = shared(group, np.zeros_like(whole))
        x[start:stop] = whole[start:stop]
        call(group, how, "allgather", x[start:stop], x, counts)
        assert same(x, whole)
        part, out = shared(group, whole[start:stop]), np.zeros_like(whole)
        call(group, how, "allgather", part, out, counts)
        assert same(out, whole)


def test_a_part_that_lies_elsewhere_in_the_whole(comm: Any, group: Group) -> None:
    n = comm.size
    whole = contributions(comm, (100 * n,), "int32")[0]
    x = shared(group, np.zeros_like(whole))
    low = 100 * (n - 1 - comm.rank)
    x[low : low + 100] = whole[100 * comm.rank : 100 * comm.rank + 100]
    group.allgather(x[low : low + 100], x)
    assert same(x, whole)


def test_messages_are_not_cut(comm: Any) -> None:
    group = group_of(comm, limit=5)
    every = contributions(comm, (4_099,), "float32")
    x = shared(group, every[comm.rank])
    group.allreduce(x)
    assert same(x, total(every))
    group.free()


def test_several_under_way_on_several_groups(comm: Any, group: Group) -> None:
    """Ranks poll as often as they like and wait in different order; blocking calls come between."""
    other = group_of(comm)
    every = [contributions(comm, (5_001,), "float32", seed) for seed in range(6)]
    arrays = [
        shared(group if seed % 2 else other, one[comm.rank]) for seed, one in enumerate(every)
    ]
    requests = []
    for seed, x in enumerate(arrays):
        requests.append((group if seed % 2 else other).iallreduce(x))
        for _ in range(comm.rank * seed):
            requests[seed // 2].test()
    lone = contributions(comm, (70_000,), "float64", 9)
    y = lone[comm.rank].copy()
    group.allreduce(y)
    for number in (0, 2, 4, 1, 3, 5):
        finish(requests[number])
    assert same(y, total(lone))
    for x, one in zip(arrays, every, strict=True):
        assert same(x, total(one))
    other.free()


@pytest.mark.parametrize("other", ["operation", "size", "window"])
def test_a_rank_in_another_call_holds_all_up(comm: Any, group: Group, other: str) -> None:
    """Wrong sums would go unnoticed; a job that hangs, the watchdog looks into."""
    if comm.size == 1:
        return
    x = group.zeros((64 * comm.size,), "float32")
    x[...] = 1.0
    if other == "size":
        request = group.iallreduce(x[comm.rank :])
    elif other == "window":
        large = group.zeros((1 << 23,), "float32")
        for one in (x, large[: x.size]):  # so that there are old notes of just such calls
            group.allreduce(one)
        request = group.iallreduce(x if comm.rank else large[: x.size])
    elif comm.rank == 0:
        request = group.iallreduce(x)
    else:
        request = group.ireduce_scatter(x, np.empty(64, "float32"))
    deadline = time.monotonic() + 0.1
    while time.monotonic() < deadline:
        assert not request.test()
    comm.Barrier()
    assert (x == (comm.size if other == "window" else 1.0)).all()


# --- other arrays, in blocking calls --------------------------------------------------------------


@pytest.fixture(params=[1 << 12, 1 << 20], ids=["many pieces", "one piece"])
def staged(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(shared_calls, "STAGED", 1)
    monkeypatch.setattr(shared_calls, "HALF", request.param)


@pytest.mark.usefixtures("staged")
@pytest.mark.parametrize("dtype", DTYPES)
def test_staged(comm: Any, group: Group, dtype: str) -> None:
    for seed, size in enumerate((1, 5, 9_001)):
        every = contributions(comm, (size,), dtype, seed)
        x = every[comm.rank].copy()
        group.allreduce(x)
        assert same(x, total(every)), size
        start, stop = split_range(size, comm.size, comm.rank)
        out, expected = np.zeros(stop - start, dtype), total(every)[start:stop]
        x = every[comm.rank].copy()
        group.reduce_scatter(x, out)
        assert same(out, expected)
        assert same(x, every[comm.rank])
        group.reduce_scatter(x, x[start:stop])
        assert same(x[start:stop], expected)
        whole = np.zeros(size, dtype)
        group.allgather(out, whole)
        assert same(whole, total(every))
        group.allgather(x[start:stop], x)
        assert same(x, whole)
    assert comm.size == 1 or group.shared_bytes == 2 * shared_calls.HALF


@pytest.mark.usefixtures("staged")
def test_staged_in_uneven_parts_and_views(comm: Any, group: Group) -> None:
    for seed in range(4):
        counts = uneven(comm, seed)
        start, stop = sum(counts[: comm.rank]), sum(counts[: comm.rank + 1])
        every = contributions(comm, (sum(counts),), "float32", seed)
        out = np.zeros(2 * (stop - start), "float32")[::2]
        group.reduce_scatter(every[comm.rank], out, counts)
        assert same(out, total(every)[start:stop])
        whole = np.zeros((sum(counts), 2), "float32")[:, 1]
        group.allgather(out, whole, counts)
        assert same(whole, total(every))
    every = contributions(comm, (60, 70), "float64")
    x, expected = every[comm.rank].copy(), every[comm.rank].copy()
    group.allreduce(x[::2].T)
    expected[::2] = total([one[::2] for one in every])
    assert same(x, expected)


@pytest.mark.usefixtures("staged")
def test_staged_from_a_device(comm: Any) -> None:
    backend = Backend.create("strict")
    group = Group(comm.Dup(), "world", backend, Recorder())
    every = contributions(comm, (3_001,), "float32")
    x = backend.from_host(every[comm.rank].copy())
    group.allreduce(x)
    assert same(backend.to_host(x), total(every))
    assert group.zeros((3,), "float32").shape == (3,)
    group.free()


def test_a_call_under_way_needs_no_stage(comm: Any, group: Group) -> None:
    """It would take steps for which every rank must be there."""
    every = contributions(comm, (150_000,), "float32")
    x = every[comm.rank].copy()
    finish(group.iallreduce(x))
    assert same(x, total(every))
    assert group.shared_bytes == 0


# --- memory --------------------------------------------------------------------------------------


def test_small_arrays_share_a_window(
    comm: Any, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    if comm.size == 1:
        return
    made = []
    make = Window.make
    monkeypatch.setattr(shared_memory, "_LEAST", 1 << 12)
    monkeypatch.setattr(Window, "make", lambda *a: made.append(a[1]) or make(*a))
    arrays = [group.zeros((500,), "float32") for _ in range(5)]  # two fill a window
    arrays += [group.zeros((5_000 if comm.rank else 1,), "float32"), group.zeros((0,), "int64")]
    assert made == [1 << 12] * 3 + [20_032]
    assert group.shared_bytes == 5 * 2_048 + 20_032
    assert all(not array.any() for array in arrays)
    for number, array in enumerate(arrays):
        array[...] = number
    for number, array in enumerate(arrays):
        assert (array == number).all()
        assert array.ctypes.data % 64 == 0


Spoil = Callable[[pytest.MonkeyPatch, int], None]


def no_room(patch: pytest.MonkeyPatch, rank: int) -> None:
    patch.setattr(shared_memory, "room_of_system", lambda: 1 << 16)


def no_room_at_one(patch: pytest.MonkeyPatch, rank: int) -> None:
    patch.setattr(shared_memory, "room_of_system", lambda: 0 if rank == 0 else 1 << 40)


def no_folder(patch: pytest.MonkeyPatch, rank: int) -> None:
    patch.setattr(shared_memory, "_FOLDER", "/nowhere")


def no_window(patch: pytest.MonkeyPatch, rank: int) -> None:
    def refuse(*arguments: Any) -> None:
        raise MPI.Exception(MPI.ERR_RMA_SHARED)

    patch.setattr(Window, "__init__", refuse)


def no_window_at_one(patch: pytest.MonkeyPatch, rank: int) -> None:
    make = Window.__init__

    def refuse(self: Window, *arguments: Any) -> None:
        make(self, *arguments)
        if rank == 0:
            raise MPI.Exception(MPI.ERR_RMA_SHARED)

    patch.setattr(Window, "__init__", refuse)


SPOILS = [no_room, no_room_at_one, no_folder, no_window, no_window_at_one]


@pytest.mark.parametrize("spoil", SPOILS)
def test_where_there_is_no_shared_memory(
    comm: Any, group: Group, monkeypatch: pytest.MonkeyPatch, spoil: Spoil
) -> None:
    monkeypatch.setattr(shared_calls, "STAGED", 1)
    with monkeypatch.context() as patch:
        spoil(patch, comm.rank)
        every = contributions(comm, (40_000,), "float32")
        x = group.zeros((40_000,), "float32")
        assert not x.any()
        x[...] = every[comm.rank]
        finish(group.iallreduce(x))
        assert same(x, total(every))
        x[...] = every[comm.rank]
        group.allreduce(x)
        assert same(x, total(every))
    group.allreduce(x)  # the same way, though there is room now: all ranks remember
    assert group.shared_bytes == 0


def test_ranks_of_several_nodes_share_nothing(
    comm: Any, group: Group, monkeypatch: pytest.MonkeyPatch
) -> None:
    split = type(comm).Split
    monkeypatch.setattr(
        shared_memory, "node_of", lambda c: split(c, c.rank % 2, c.rank) if c.size > 1 else c.Dup()
    )
    x = group.zeros((100_000,), "float64")
    x[...] = comm.rank + 1.0
    group.allreduce(x)
    assert (x == sum(range(1, comm.size + 1))).all()
    assert group.shared_bytes == 0


def test_memory_is_given_back(comm: Any) -> None:
    """MPICH has 2,048 communicators, of which each window takes one."""
    taken = [MPI.COMM_SELF.Dup() for _ in range(2_000)]
    before = shared_memory.room_of_system()
    for _ in range(20):
        group = group_of(comm)
        x = group.zeros((1 << 18,), "float32")
        group.allreduce(x)
        group.allreduce(np.zeros(1 << 16, "float32"))
        del x
        group.free()
    comm.Barrier()
    for own in taken:
        own.Free()
    assert before - shared_memory.room_of_system() < 30 << 20  # others may be at work, too


# --- training ------------------------------------------------------------------------------------


@pytest.mark.parametrize("zero", range(4))
def test_training_is_the_same(world: Any, monkeypatch: pytest.MonkeyPatch, zero: int) -> None:
    def run(room: int) -> list[Any]:
        monkeypatch.setattr(shared_memory, "room_of_system", lambda: room)
        layout = fit(ParallelSettings(zero=zero, tensor=2 - world.size % 2), world.size)
        backend = Backend.create("numpy")
        mesh = Mesh(world, layout, backend, Recorder())
        train = resolve_batch(
            TrainSettings(batch_size=8, micro_batch_size=1, sequence_length=16, steps=5), layout
        )
        text = np.random.default_rng(0).integers(0, 60, 4_000).astype(np.uint16)
        loader = Loader(text, 16, train.batch_size, train.micro_batch_size, train.seed)
        model = Settings(layers=2, heads=2, width=24, vocabulary=60, context=16)
        trainer = Trainer(build_model(model), train, OptimizerSettings(), mesh, backend, loader)
        found: list[Any] = [trainer.step().loss for _ in range(3)]
        found += [values.tobytes() for *_, values in trainer.state()]
        used = mesh.replicas.shared_bytes
        assert (used > 0) == (room > 0 and mesh.replicas.size > 1)
        mesh.free()
        return found

    assert run(0) == run(1 << 40)
