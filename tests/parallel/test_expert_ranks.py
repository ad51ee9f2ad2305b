"""Mixtures of experts over expert, tensor, context and data ranks, against one rank."""

from __future__ import annotations

import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from itertools import product
from typing import Any

import numpy as np
import pytest
from layouts import max_difference, run
from mpi4py import MPI
from msgspec.structs import replace as changed

from mpillm.array.backend import Backend
from mpillm.models.gpt2 import Settings
from mpillm.nn.experts import MixtureOfExperts
from mpillm.nn.layer import Build, Micro
from mpillm.nn.ring import context_share
from mpillm.nn.router import Mixture
from mpillm.nn.store import ParamStore
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.shard import split_range, zigzag
from mpillm.training.settings import TrainSettings

# Odd sizes: the inner width, the experts and the tokens are cut unevenly.
B, T, WIDTH, INNER = 4, 11, 8, 10
D_LOSS = 0.3


def layouts(ranks: int) -> list[ParallelSettings]:
    """Every data x expert x context x tensor with that product, the last one also by rows."""
    found = []
    for data, expert, context, tensor in product(range(1, ranks + 1), repeat=4):
        if data * expert * context * tensor == ranks:
            sizes = {"data": data, "expert": expert, "context": context, "tensor": tensor}
            rows = (False, True) if tensor > 1 else (False,)
            found += [ParallelSettings(**sizes, sequence=sequence) for sequence in rows]
    return found


def called(layout: ParallelSettings) -> str:
    axes = ("data", "expert", "context", "tensor")
    named = [f"{axis} {getattr(layout, axis)}" for axis in axes if getattr(layout, axis) > 1]
    return ", ".join([*named, "by rows"] if layout.sequence else named) or "one rank"


@dataclass
class Whole:
    """What the whole batch gives: y, balance loss and dx, and gradients by name."""

    y: np.ndarray
    loss: float
    dx: np.ndarray
    gradients: dict[str, np.ndarray]


@contextmanager
def mesh_on(
    comm: MPI.Intracomm, layout: ParallelSettings, backend: Backend, recorder: Recorder
) -> Iterator[Mesh]:
    mesh = Mesh(comm, fit(layout, comm.size), backend, recorder)
    yield mesh
    mesh.free()


def meshes(comm: MPI.Intracomm, backend: Backend) -> Iterator[tuple[str, Mesh]]:
    """A mesh for each layout, and what it is called."""
    for layout in layouts(comm.size):
        with mesh_on(comm, layout, backend, Recorder()) as mesh:
            yield called(layout), mesh


def layer_on(
    mesh: Mesh, backend: Backend, mixture: Mixture, *, bias: bool = True
) -> tuple[MixtureOfExperts, Build]:
    """The layer, whose weights depend on the seed and on nothing else."""
    store = ParamStore(backend, "float64", seed=3)
    build = Build(backend, mesh, store)
    layer = MixtureOfExperts(
        build, "experts", WIDTH, INNER, mixture, bias=bias, std=0.5, out_std=0.5, drop=0.2
    )
    store.allocate()
    for param in store.params:
        if param.name.endswith("bias"):  # which begin at zero
            whole = np.random.default_rng(4).standard_normal(param.shard.shape)
            param.value[...] = backend.from_host(whole[param.shard.slices].copy())
    return layer, build


def whole_batch() -> tuple[Micro, np.ndarray, np.ndarray]:
    """The micro-batch, x and dy; the last sequence is padding, another one is cut short."""
    rng = np.random.default_rng(6)
    mask = np.ones((B, T))
    mask[-1], mask[0, -3:] = 0, 0
    micro = Micro(
        tokens=np.zeros((B, T), dtype=np.int32),
        mask=mask,
        counted=mask.sum(axis=1),
        index=np.arange(T),
        samples=np.arange(B) + 2,
        training=True,
        key=17,
    )
    x, dy = rng.standard_normal((2, B, T, WIDTH))
    x[1, :] = x[1, 0]  # many tokens of one expert
    return micro, x, dy


def run_part(
    layer: MixtureOfExperts, build: Build, sequences: slice
) -> tuple[tuple[np.ndarray, np.ndarray, np.ndarray], np.ndarray, np.ndarray]:
    """((places in the whole batch (tokens,), y, dx), loss, chosen) of this rank's tokens."""
    backend, mesh, rows = build.backend, build.mesh, build.rows
    micro, x, dy = whole_batch()
    on_device = {
        name: backend.from_host(getattr(micro, name)[sequences].copy())
        for name in ("tokens", "mask", "counted", "samples")
    }
    micro = replace(micro, index=backend.from_host(micro.index), **on_device)
    part = context_share(micro, backend, mesh.context.size, mesh.context.rank)
    held = [slice(*run) for run in zigzag(T, mesh.context.size, mesh.context.rank)]
    if mesh.context.size == 1:
        held = [slice(0, T)]

    def mine(whole: np.ndarray) -> Any:
        parts = np.concatenate([whole[sequences, run] for run in held], axis=1)
        return rows.take(backend.from_host(parts))

    (y, loss), saved = layer.forward((mine(x),), part)
    d_loss = backend.from_host(np.array([D_LOSS]))
    (dx,) = layer.backward((mine(dy), d_loss), saved, part)
    places = mine(np.arange(B * T).reshape(B, T))
    shapes = [backend.to_host(array).reshape(-1, WIDTH) for array in (y, dx)]
    return (backend.to_host(places).reshape(-1), *shapes), backend.to_host(loss), saved[0].chosen_nk


def on_one_rank(mixture: Mixture, *, bias: bool = True) -> Whole:
    backend = Backend.create("numpy")
    with mesh_on(MPI.COMM_SELF, ParallelSettings(), backend, Recorder()) as mesh:
        layer, build = layer_on(mesh, backend, mixture, bias=bias)
        (_, y, dx), loss, _ = run_part(layer, build, slice(0, B))
    gradients = {param.name: param.grad for param in build.store.params}
    return Whole(y, float(loss[0]), dx, gradients)


def assert_close(ours: np.ndarray, exact: np.ndarray, what: str) -> None:
    assert ours.shape == exact.shape, what
    scale = max(1.0, float(np.abs(exact).max(initial=0.0)))
    assert float(np.abs(ours - exact).max(initial=0.0)) <= 1e-12 * scale, what


def compare(
    mesh: Mesh, backend: Backend, mixture: Mixture, exact: Whole, micros: int, bias: bool, what: str
) -> None:
    """Outputs, losses and all gradients, this rank's sequences in `micros` micro-batches."""
    layer, build = layer_on(mesh, backend, mixture, bias=bias)
    first, last = split_range(B, mesh.batch.size, mesh.batch.rank)
    loss = np.zeros(1)
    for number in range(micros):
        start, stop = split_range(last - first, micros, number)
        (places, y, dx), part, _ = run_part(layer, build, slice(first + start, first + stop))
        assert_close(y, exact.y[places], what)
        assert_close(dx, exact.dx[places], what)
        loss += part
    # Alike on tensor ranks; context and batch ranks have shares of it.
    assert len(set(mesh.tensor.allgather_objects(loss.tobytes()))) == 1
    total = sum(mesh.batch.allgather_objects(sum(mesh.context.allgather_objects(loss[0]))))
    assert total == pytest.approx(exact.loss, rel=1e-12, abs=1e-13), what
    assert {param.name for param in build.store.params} == set(exact.gradients)
    for param in build.store.params:
        gradient = backend.xp.ascontiguousarray(param.grad)
        for group in param.reduce_over:
            group.allreduce(gradient)
        expected = exact.gradients[param.name][param.shard.slices]
        assert_close(backend.to_host(gradient), expected, f"{what}: {param.name}")


# Name: the mixture, whether there are biases.
MIXTURES = {
    "two of five": (Mixture(5, 2, balance=0.3), True),
    "one of five": (Mixture(5, 1, balance=0.3), True),
    "two of three, without biases": (Mixture(3, 2), False),
    "capacity": (Mixture(5, 2, capacity=0.8, balance=0.3), True),
    "one, capacity": (Mixture(4, 1, capacity=1.0, balance=0.1), True),
}


def test_every_layout_gives_what_one_rank_gives(world: MPI.Intracomm) -> None:
    backend = Backend.create("numpy")
    exact = {name: on_one_rank(mixture, bias=bias) for name, (mixture, bias) in MIXTURES.items()}
    assert all(x.any() for whole in exact.values() for x in whole.gradients.values())
    for what, mesh in meshes(world, backend):
        for name, (mixture, bias) in MIXTURES.items():
            for micros in (1, 2):
                compare(mesh, backend, mixture, exact[name], micros, bias, f"{name}: {what}")


def test_on_device_arrays(world: MPI.Intracomm) -> None:
    mixture, bias = MIXTURES["capacity"]
    exact, backend = on_one_rank(mixture, bias=bias), Backend.create("strict")
    for what, mesh in meshes(world, backend):
        compare(mesh, backend, mixture, exact, 1, bias, what)


def test_capacity_drops_something(world: MPI.Intracomm) -> None:
    """Without this the comparisons above would not see it."""
    mixture, bias = MIXTURES["capacity"]
    free, bounded = (on_one_rank(replace(mixture, capacity=c), bias=bias) for c in (0.0, 0.8))
    assert np.abs(free.y - bounded.y).max() > 0.1
    assert free.loss == bounded.loss


def test_every_weight_has_one_owner(world: MPI.Intracomm) -> None:
    """Along the tensor axis; along the expert axis every rank has experts of its own."""
    backend = Backend.create("numpy")
    for what, mesh in meshes(world, backend):
        _, build = layer_on(mesh, backend, Mixture(5, 2))
        for param in build.store.params:
            times = np.zeros(param.shard.shape, dtype=np.int64)
            own = mesh.expert_replicas in param.reduce_over
            if param.owner and (own or mesh.expert.rank == 0):
                times[param.shard.slices] += 1
            mesh.model.allreduce(times)
            assert (times == 1).all(), f"{what}: {param.name}"


# -- traffic --------------------------------------------------------------------------------------


@pytest.mark.parametrize("capacity", [0.0, 0.8])
def test_bytes_over_the_expert_ranks(capacity: float, world: MPI.Intracomm) -> None:
    """The rows of all assignments, to the experts and back, forward and backward; the counts."""
    k, experts, ranks = 2, 5, world.size
    mixture = Mixture(experts, k, capacity=capacity, balance=0.3)
    backend, recorder = Backend.create("numpy"), Recorder()
    with mesh_on(world, ParallelSettings(expert=ranks), backend, recorder) as mesh:
        layer, build = layer_on(mesh, backend, mixture)
        first, last = split_range(B, ranks, world.rank)
        _, _, chosen = run_part(layer, build, slice(first, last))
    by_sequence = chosen.reshape(last - first, T, k)
    counts = np.array([(by_sequence == expert).sum(axis=(1, 2)) for expert in range(experts)])
    limit = math.ceil(capacity * k * T / experts) if capacity else T
    sent = np.minimum(counts, limit).sum(axis=1)  # rows to each expert
    assert capacity or sent.sum() == (last - first) * T * k
    held = slice(*split_range(experts, ranks, world.rank))
    arrived = np.array(world.allgather(sent.tolist()))[:, held].sum()
    found = {op: item for (axis, op), item in recorder.traffic.items() if axis == "expert"}
    if ranks == 1:
        assert found == {}
        return
    assert set(found) == {"alltoall"}
    assert found["alltoall"].calls == 5
    assert found["alltoall"].bytes == 2 * (sent.sum() + arrived) * WIDTH * 8 + experts * 8


def test_bytes_over_the_context_ranks(world: MPI.Intracomm) -> None:
    """The choices, 32 bits each, for the capacity; the counts, 64 bits, for the balance."""
    experts, k = 5, 2
    mixture = Mixture(experts, k, capacity=0.8, balance=0.3)
    backend, recorder = Backend.create("numpy"), Recorder()
    with mesh_on(world, ParallelSettings(context=world.size), backend, recorder) as mesh:
        layer, build = layer_on(mesh, backend, mixture)
        run_part(layer, build, slice(0, B))
    found = {op: item.bytes for (axis, op), item in recorder.traffic.items() if axis == "context"}
    expected = {"allgather": B * T * k * 4, "allreduce": B * experts * 8}
    assert found == (expected if world.size > 1 else {})


# -- training -------------------------------------------------------------------------------------

MODEL = Settings(
    layers=3, heads=2, width=8, vocabulary=13, context=6, dropout=0.1, init_std=0.3, experts=3,
    expert_every=2, expert_capacity=1.2, balance=0.1,
)  # fmt: skip
TRAIN = TrainSettings(
    steps=3, batch_size=7, micro_batch_size=1, sequence_length=6, dtype="float64", seed=2
)
TEXT = np.random.default_rng(0).integers(0, 13, 400).astype(np.uint16)


def test_training_is_the_same_in_every_layout(world: MPI.Intracomm) -> None:
    expected = run(MPI.COMM_SELF, MODEL, TRAIN, ParallelSettings(), text=TEXT, steps=3)
    for pipe in (pipe for pipe in range(1, world.size + 1) if world.size % pipe == 0):
        for layout in layouts(world.size // pipe):
            if layout.expert == 1 and pipe < world.size:
                continue  # test_layouts.py has them
            ours = run(world, MODEL, TRAIN, changed(layout, pipe=pipe), text=TEXT, steps=3)
            if world.rank == 0:
                assert max_difference(expected, ours) <= 1e-10, f"pipe {pipe}, {called(layout)}"
