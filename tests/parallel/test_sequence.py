"""Sequence parallelism: tensor ranks that share out the tokens, against one rank."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import Any

import msgspec
import numpy as np
import pytest
from gradcheck import scramble
from held import held_bytes
from mpi4py import MPI

from mpillm.array.backend import Backend
from mpillm.models.gpt2 import Settings
from mpillm.models.model import Model, build_stages
from mpillm.models.settings import build_model
from mpillm.nn.layer import GradientSink, Micro, Recomputed
from mpillm.nn.param import Param
from mpillm.nn.rows import SharedRows
from mpillm.nn.stage import Stage
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings

# Three heads on four ranks leave one without; 13 types and an inner width of 40 divide by few.
WIDTH, VOCABULARY, CONTEXT, LAYERS, ITEM = 12, 13, 9, 2, 8
MODEL = Settings(
    layers=LAYERS,
    heads=3,
    width=WIDTH,
    vocabulary=VOCABULARY,
    context=CONTEXT,
    init_std=0.3,
    dropout=0.2,
)
TOLERANCE = 1e-12

# (b, t): rows that two and four ranks share evenly, unevenly, fewer than four, and a single one.
SHAPES = [(4, 6), (3, 7), (1, 3), (1, 1)]
shapes = pytest.mark.parametrize("shape", SHAPES, ids=str)


@dataclass
class Part:
    """All or the middle layers of a model on the ranks of a tensor group."""

    model: Model
    stage: Stage
    backend: Backend
    recorder: Recorder
    rows: SharedRows

    def traffic(self) -> dict[str, int]:
        """Bytes of the calls over the tensor group so far, by operation."""
        sums = self.recorder.traffic.items()
        return {op: total.bytes for (axis, op), total in sums if axis == "tensor"}


class Meshes:
    """All ranks as one tensor group, or one rank alone; made once, as that takes long."""

    def __init__(self) -> None:
        self._made: dict[tuple[Any, ...], tuple[Mesh, Backend, Recorder]] = {}

    def get(
        self, comm: MPI.Intracomm, sequence: bool, backend: str
    ) -> tuple[Mesh, Backend, Recorder]:
        """The mesh, its backend and its recorder, which has recorded nothing yet."""
        # Sharing rows out over one rank would be refused.
        settings = ParallelSettings(tensor=comm.size, sequence=sequence and comm.size > 1)
        key = (comm.size, settings.sequence, backend)
        if key not in self._made:
            device, recorder = Backend.create(backend), Recorder()
            mesh = Mesh(comm, fit(settings, comm.size), device, recorder)
            self._made[key] = (mesh, device, recorder)
        self._made[key][2].traffic.clear()
        return self._made[key]

    def free(self) -> None:
        """Every rank calls."""
        for mesh, _, _ in self._made.values():
            mesh.free()


@pytest.fixture(scope="module")
def meshes() -> Iterator[Meshes]:
    meshes = Meshes()
    yield meshes
    meshes.free()


def build(
    meshes: Meshes,
    comm: MPI.Intracomm,
    *,
    sequence: bool = False,
    middle: bool = False,
    tied: bool = True,
    backend: str = "numpy",
    recompute: Recomputed = "none",
) -> Part:
    """The model, with weights that are no zeros or ones, the same for any number of ranks."""
    model = build_model(msgspec.structs.replace(MODEL, tied=tied))
    if middle:
        model = replace(model, units=model.units[1:-1])
    alone, host, _ = meshes.get(MPI.COMM_SELF, False, "numpy")
    (whole,) = build_stages(model, host, alone, "float64", seed=1)
    scramble(whole.store)
    values = {param.name: param.value for param in whole.store.params}
    mesh, device, recorder = meshes.get(comm, sequence, backend)
    (stage,) = build_stages(model, device, mesh, "float64", seed=None, recompute=recompute)
    for param in stage.store.params:
        mine = values[param.name][param.shard.slices]
        param.value[...] = device.from_host(np.ascontiguousarray(mine))
    rows = SharedRows(mesh.tensor, device, sequence)
    return Part(model, stage, device, recorder, rows)


class Collect(GradientSink):
    """Does the work at once and keeps the parameters that it was for."""

    def __init__(self) -> None:
        self.params: list[Param] = []

    def add(self, params: tuple[Param, ...], work: Callable[[], None]) -> None:
        """Do the work."""
        work()
        self.params += [param for param in params if param not in self.params]

    def gradients(self, backend: Backend) -> dict[str, np.ndarray]:
        """This rank's shards by name, on the host, all uses and ranks added up."""
        total: dict[str, Any] = {}
        for param in self.params:
            grad = param.grad.copy()
            for group in param.reduce_over:
                group.allreduce(grad)
            total[param.name] = total[param.name] + grad if param.name in total else grad
        return {name: backend.to_host(grad) for name, grad in total.items()}


def micro_batch(backend: Backend, shape: tuple[int, int], **changes: Any) -> Micro:
    """A batch of more than one row has some that are not counted."""
    rng = np.random.default_rng(3)
    b, t = shape
    mask = np.ones(shape)
    mask[-1, t // 2 + 1 :] = 0
    put = backend.from_host
    micro = Micro(
        tokens=put(rng.integers(0, VOCABULARY, shape, dtype=np.int32)),
        labels=put(rng.integers(0, VOCABULARY, shape, dtype=np.int32)),
        mask=put(mask),
        samples=put(np.arange(b) + 4),
        index=backend.xp.arange(t),
        training=True,
        key=17,
    )
    return replace(micro, **changes)


class PutOffArrays(GradientSink):
    """Never does the work, and knows the arrays that it holds."""

    def __init__(self) -> None:
        self.arrays: list[np.ndarray] = []

    def add(self, params: tuple[Param, ...], work: Callable[[], None]) -> None:
        """Look what it holds."""
        cells = [cell.cell_contents for cell in work.__closure__ or ()]  # type: ignore[attr-defined]
        self.arrays += [item for item in cells if isinstance(item, np.ndarray)]


Result = tuple[float, dict[str, np.ndarray]]


def train(part: Part, micro: Micro, *, put_off: bool = False) -> Result:
    """The loss and this rank's shards of the gradients."""
    sink = Collect()
    micro = replace(micro, gradients=sink)
    (loss,), saved = part.stage.forward((), micro)
    later: list[Callable[[], None]] | None = [] if put_off else None
    part.stage.backward((0.125,), saved, micro, later)
    for work in later or ():
        work()
    return float(loss), sink.gradients(part.backend)


def check(part: Part, ours: Result, exact: Result) -> None:
    """The loss, and this rank's part of every gradient, are those of one rank."""
    assert abs(ours[0] - exact[0]) <= TOLERANCE * abs(exact[0])
    assert ours[1].keys() == exact[1].keys()
    largest = max(float(np.linalg.norm(grad)) for grad in exact[1].values())
    for param in part.stage.store.params:
        expected = exact[1][param.name]
        difference = np.linalg.norm(ours[1][param.name] - expected[param.shard.slices])
        assert difference <= TOLERANCE * max(np.linalg.norm(expected), 1e-3 * largest), param.name


@shapes
@pytest.mark.parametrize("backend", ["numpy", "strict"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_the_whole_model(
    world: MPI.Intracomm, meshes: Meshes, shape: tuple[int, int], tied: bool, backend: str
) -> None:
    one = build(meshes, MPI.COMM_SELF, tied=tied)
    exact = train(one, micro_batch(one.backend, shape))
    part = build(meshes, world, tied=tied, sequence=True, backend=backend)
    check(part, train(part, micro_batch(part.backend, shape)), exact)


def test_places_by_row(world: MPI.Intracomm, meshes: Meshes) -> None:
    index = np.array([[0, 1, 2, 3, 4], [6, 2, 8, 1, 3], [0, 5, 5, 7, 1]])
    one = build(meshes, MPI.COMM_SELF)
    exact = train(one, micro_batch(one.backend, index.shape, index=index))
    part = build(meshes, world, sequence=True)
    check(part, train(part, micro_batch(part.backend, index.shape, index=index)), exact)


@shapes
def test_shared_rows_change_no_bit_but_where_rows_are_summed(
    world: MPI.Intracomm, meshes: Meshes, shape: tuple[int, int]
) -> None:
    """A sum that is shared out has the bits of one that all have: only the norms' gradients, which
    are sums over rows, are added up in another order."""
    results = []
    for sequence in (False, True):
        part = build(meshes, world, sequence=sequence)
        results.append(train(part, micro_batch(part.backend, shape)))
    (loss, grads), (shared_loss, shared_grads) = results
    assert loss == shared_loss
    assert any(grad.any() for grad in grads.values())
    for name, grad in grads.items():
        assert "norm" in name or (grad == shared_grads[name]).all(), name


@shapes
def test_layers_in_the_middle(world: MPI.Intracomm, meshes: Meshes, shape: tuple[int, int]) -> None:
    """What goes in and comes out, forward and backward, is this rank's rows, as the model says."""
    rng = np.random.default_rng(4)
    x, dy = rng.standard_normal((2, *shape, WIDTH))

    def passes(part: Part) -> tuple[np.ndarray, np.ndarray]:
        micro = micro_batch(part.backend, shape)
        (y,), saved = part.stage.forward((part.rows.take(x),), micro)
        (dx,) = part.stage.backward((part.rows.take(dy).copy(),), saved, micro)
        ((expected, dtype),) = part.model.boundary(micro, "float64", part.rows)
        assert y.shape == dx.shape == expected and y.dtype == dx.dtype == dtype
        return y, dx

    exact = passes(build(meshes, MPI.COMM_SELF, middle=True))
    part = build(meshes, world, middle=True, sequence=True)
    for ours, whole in zip(passes(part), exact, strict=True):
        difference = np.abs(ours - part.rows.take(whole)).max(initial=0.0)
        assert difference <= TOLERANCE * np.abs(whole).max()


@pytest.mark.parametrize("recompute", ["none", "attention", "block"])
def test_weight_gradients_put_off_and_activations_recomputed(
    world: MPI.Intracomm, meshes: Meshes, recompute: Recomputed
) -> None:
    """Neither changes a bit: rows are gathered in the same order on all ranks, whenever that is."""
    part = build(meshes, world, sequence=True)
    loss, grads = train(part, micro_batch(part.backend, (3, 7)))
    part = build(meshes, world, sequence=True, recompute=recompute)
    again, ours = train(part, micro_batch(part.backend, (3, 7)), put_off=True)
    assert again == loss
    for name, grad in grads.items():
        assert (grad == ours[name]).all(), name


# -- costs ----------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize(("recompute", "again"), [("none", 0), ("attention", 1), ("block", 2)])
def test_traffic(
    world: MPI.Intracomm,
    meshes: Meshes,
    shape: tuple[int, int],
    recompute: Recomputed,
    again: int,
) -> None:
    """Payload of the calls over the tensor group, with m = b * t * d elements and L blocks.

    Whole rows: an allreduce of m for the embedding, two in a block's forward pass and two in its
    backward pass, one in the head's backward pass: 4 L + 2.

    Shared rows: each becomes a reduce_scatter of m, 4 L + 2 in all, and an allgather of m before a
    product or, for the embedding, in its backward pass: together they move what the allreduce did,
    as a ring's allreduce is one of each. Another allgather brings back the inputs of the products
    that were not kept: 2 L for the weight gradients of blocks, one for the head. In all 6 L + 3.

    Recomputing adds what a forward pass of the branches takes, again: L or 2 L of each.

    Both: three numbers a token for the loss, over the cut vocabulary.
    """
    m, loss = shape[0] * shape[1] * WIDTH * ITEM, 3 * shape[0] * shape[1] * ITEM
    expected = {
        False: {"allreduce": ((4 + again) * LAYERS + 2) * m + loss},
        True: {
            "reduce_scatter": ((4 + again) * LAYERS + 2) * m,
            "allgather": ((6 + again) * LAYERS + 3) * m,
            "allreduce": loss,
        },
    }
    for sequence in (False, True):
        part = build(meshes, world, sequence=sequence, recompute=recompute)
        sink = Collect()
        micro = micro_batch(part.backend, shape, gradients=sink)
        _, saved = part.stage.forward((), micro)
        part.stage.backward((1.0,), saved, micro)
        once = part.traffic()
        assert once == (expected[sequence] if world.size > 1 else {})
        # Once a step the gradients of 2 L + 1 norms are summed, where rows are shared.
        sink.gradients(part.backend)
        summed = part.traffic().get("allreduce", 0) - once.get("allreduce", 0)
        shared = sequence and world.size > 1
        assert summed == ((2 * LAYERS + 1) * 2 * WIDTH * ITEM if shared else 0)


@shapes
def test_memory(world: MPI.Intracomm, meshes: Meshes, shape: tuple[int, int]) -> None:
    """Of what is kept by row, that of other ranks' rows is not held any more, and nothing new is.

    Between the passes, a row: of each norm d + 1 elements, of each product with gathered inputs and
    of the head d, and of each dropout d bytes. By weight gradients that are put off: d elements of
    each product with gathered inputs, and of the embedding.
    """
    saved_bytes, put_off_bytes = [], []
    for sequence in (False, True):
        part = build(meshes, world, sequence=sequence)
        micro = micro_batch(part.backend, shape)
        _, saved = part.stage.forward((), micro)
        weights = [param.value for param in part.stage.store.params]
        saved_bytes.append(held_bytes(saved, weights))
        sink = PutOffArrays()
        part.stage.backward((0.125,), saved, replace(micro, gradients=sink))
        put_off_bytes.append(held_bytes(sink.arrays))
        others = shape[0] * shape[1] - part.rows.take(micro.tokens).size
    sites = 2 * LAYERS + 1  # norms; products with gathered inputs, and one more; dropouts
    elements = sites * (WIDTH + 1) + sites * WIDTH
    assert saved_bytes[0] - saved_bytes[1] == others * (elements * ITEM + sites * WIDTH)
    assert put_off_bytes[0] - put_off_bytes[1] == others * sites * WIDTH * ITEM


# -- logits ---------------------------------------------------------------------------------------


@shapes
def test_logits(world: MPI.Intracomm, meshes: Meshes, shape: tuple[int, int]) -> None:
    """Of all tokens, and of the last ones, which may be another rank's rows."""
    found = []
    for comm in (MPI.COMM_SELF, world):
        part = build(meshes, comm, sequence=comm is world)
        micro = micro_batch(part.backend, shape, training=False, want="logits")
        (logits,), _ = part.stage.forward((), micro)
        (last,), _ = part.stage.forward((), replace(micro, want="last_logits"))
        found.append((logits, last))
    whole = found[0][0]
    for logits, last in found:
        assert np.abs(logits - whole).max() <= TOLERANCE * np.abs(whole).max()
        assert last.shape == (shape[0], 1, VOCABULARY)
        assert np.abs(last - whole[:, -1:]).max() <= TOLERANCE * np.abs(whole).max()


@pytest.mark.parametrize("b", [1, 3])
def test_decoding(world: MPI.Intracomm, meshes: Meshes, b: int) -> None:
    """Token by token: b rows at a time, and ranks without any."""
    part = build(meshes, world, sequence=True)
    micro = micro_batch(part.backend, (b, CONTEXT), training=False, want="logits")
    (whole,), _ = part.stage.forward((), micro)
    state = part.stage.new_state(b, CONTEXT)
    for place in range(CONTEXT):
        here = slice(place, place + 1)
        token = replace(
            micro,
            tokens=micro.tokens[:, here],
            index=micro.index[here],
            want="last_logits",
            state=state,
        )
        (logits,), _ = part.stage.forward((), token)
        difference = np.abs(logits[:, 0] - whole[:, place]).max()
        assert difference <= TOLERANCE * np.abs(whole).max()


# -- rows -----------------------------------------------------------------------------------------


@shapes
@pytest.mark.parametrize("backend", ["numpy", "strict"])
@pytest.mark.parametrize("sequence", [False, True])
def test_rows(
    world: MPI.Intracomm, meshes: Meshes, shape: tuple[int, int], sequence: bool, backend: str
) -> None:
    mesh, device, _ = meshes.get(world, sequence, backend)
    rows = SharedRows(mesh.tensor, device, sequence)
    x = np.random.default_rng(0).standard_normal((*shape, 5))
    mine = rows.take(device.from_host(x))
    assert mine.shape == rows.shape(*shape, 5)
    held = world.allgather(mine.size // 5)
    if rows.shared:
        assert sum(held) == shape[0] * shape[1] and max(held) - min(held) <= 1
    else:
        assert held == [shape[0] * shape[1]] * world.size
    assert (device.to_host(rows.gather(mine, *shape)) == x).all()
    total = rows.sum(device.from_host(x * (world.rank + 1)))
    factor = world.size * (world.size + 1) / 2
    expected = rows.take(device.from_host(x * factor))
    close = np.abs(device.to_host(total) - device.to_host(expected)) <= 1e-13
    assert total.shape == mine.shape and close.all()
