"""The traffic ledger against theory: the formulas of `docs/parallel.md` name every byte."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from itertools import product
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from msgspec.structs import replace
from traffic import Arena, Case, Ledger, arriving, step

from mpillm.array.backend import Backend
from mpillm.data.loader import Loader
from mpillm.errors import UserError
from mpillm.models.gpt2 import Settings
from mpillm.models.settings import build_model
from mpillm.nn.layer import Micro
from mpillm.nn.router import Router, Routing
from mpillm.parallel.covering import covering
from mpillm.parallel.group import Group
from mpillm.parallel.layouts import factors, layout_text, layouts
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.settings import OptimizerSettings, TrainSettings
from mpillm.training.trainer import Trainer, resolve_batch

TEXT = np.random.default_rng(0).integers(0, 65, 600).astype(np.uint16)

# Three heads, 65 types, eleven tokens and five sequences in micro-batches of two: nothing divides.
MODEL = Settings(layers=3, heads=3, width=24, vocabulary=65, context=12, dropout=0.1)
TRAIN = TrainSettings(batch_size=5, micro_batch_size=2, sequence_length=11)

MODELS = {
    "tied": MODEL,
    "untied": replace(MODEL, tied=False, bias=False),
    "experts": replace(MODEL, experts=3, experts_per_token=2, expert_every=2, balance=0.1),
    "capacity": replace(
        MODEL, experts=5, experts_per_token=1, expert_capacity=1.2, balance=0.0, tied=False
    ),
}
TRAINS = {
    "plain": TRAIN,
    "deterministic": replace(TRAIN, deterministic=True, dtype="float64"),
    "attention": replace(TRAIN, recompute="attention"),
    "block": replace(TRAIN, recompute="block"),
}


@contextmanager
def trained(
    world: MPI.Intracomm, model: Settings, train: TrainSettings, layout: ParallelSettings
) -> Iterator[tuple[Trainer, Mesh, Recorder, Case]]:
    """A trainer, with a recorder that has seen nothing of how it was made."""
    backend, recorder = Backend.create("numpy"), Recorder()
    layout = fit(layout, world.size)
    train = resolve_batch(train, layout)
    sizes = train.sequence_length, train.batch_size, train.micro_batch_size
    loader = Loader(TEXT, *sizes, train.seed)
    mesh = Mesh(world, layout, backend, recorder)
    trainer = Trainer(build_model(model), train, OptimizerSettings(), mesh, backend, loader)
    recorder.traffic.clear()
    yield trainer, mesh, recorder, Case(model, train, layout, world.rank)
    mesh.free()


@contextmanager
def counted(case: Case, mesh: Mesh) -> Iterator[dict[str, int]]:
    """Counts the assignments that this rank sends, and that arrive for its experts.

    By what the routers say, which no exchange has touched; `sent` and `arrived` are there at the
    end.
    """
    assigned = np.zeros(case.model.experts, dtype=np.int64)
    forward, numbers = Router.forward, {}

    def noted(router: Router, x: Any, micro: Micro) -> Routing:
        routing = forward(router, x, micro)
        kept = routing.chosen_nk if routing.keep_nk is None else routing.chosen_nk[routing.keep_nk]
        assigned[:] += np.bincount(kept.reshape(-1), minlength=len(assigned))
        return routing

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Router, "forward", noted)
        yield numbers
    assert not (assigned % case.block_passes).any()
    assigned //= case.block_passes
    everyone = np.array(mesh.expert.allgather_objects(assigned.tolist()), dtype=np.int64)
    first = sum(
        case.model.experts // mesh.expert.size + (rank < case.model.experts % mesh.expert.size)
        for rank in range(mesh.expert.rank)
    )
    mine = slice(first, first + case.share(case.model.experts, "expert"))
    numbers["sent"], numbers["arrived"] = int(assigned.sum()), int(everyone[:, mine].sum())


def one_step(
    world: MPI.Intracomm, model: Settings, train: TrainSettings, layout: ParallelSettings
) -> tuple[Ledger, Ledger, Case, dict[str, int]]:
    """What the recorder has counted in a step, and what the formulas say."""
    with trained(world, model, train, layout) as (trainer, mesh, recorder, case):
        with counted(case, mesh) as numbers:
            trainer.step()
        found = Counter({key: total.bytes for key, total in recorder.traffic.items()})
        return +found, step(case, **numbers), case, numbers


def possible(model: Settings, train: TrainSettings, layout: ParallelSettings) -> bool:
    """Whether this model can be trained like this under the layout."""
    try:
        build_model(model).check_layout(layout)
        resolve_batch(train, layout)
    except UserError:
        return False
    return True


@cache
def cases() -> list[tuple[str, str, ParallelSettings]]:
    """Models, ways to train and layouts of this world, in which every two choices meet once."""
    every = [
        (model, train, layout)
        for layout in layouts(MPI.COMM_WORLD.size, ParallelSettings())
        for model, train in product(MODELS, TRAINS)
        if possible(MODELS[model], TRAINS[train], layout)
    ]
    chosen = covering([{"model": m, "train": t, **factors(layout)} for m, t, layout in every])
    return [every[number] for number in chosen]


def called(case: tuple[str, str, ParallelSettings]) -> str:
    model, train, layout = case
    return f"{model}-{train}-{layout_text(layout, ParallelSettings())}"


@pytest.mark.parametrize("case", cases(), ids=called)
def test_every_byte_of_a_step_is_predicted(
    world: MPI.Intracomm, case: tuple[str, str, ParallelSettings]
) -> None:
    model, train, layout = case
    found, expected, *_ = one_step(world, MODELS[model], TRAINS[train], layout)
    assert found == expected
    assert bool(found) == (world.size > 1)


# -- single modes ----------------------------------------------------------------------------------


def odd_cases() -> list[tuple[dict[str, Any], dict[str, Any], dict[str, Any]]]:
    """(model, training, layout): what does not come up above."""
    ranks = MPI.COMM_WORLD.size
    cases = [
        # Fewer tokens than chunks, heads of one feature, sequences for one data rank only.
        ({}, {"sequence_length": 3}, {"context": ranks}),
        ({"width": 3}, {}, {"tensor": ranks}),
        ({}, {"batch_size": 1}, {"data": ranks, "zero": 2}),
        ({}, {"batch_size": 24}, {"data": ranks, "zero": 3}),
        ({"context": 40}, {"micro_batch_size": 5}, {"data": ranks, "zero": 1}),
    ]
    if ranks > 1:
        deep = {"layers": 2 * ranks - 2}
        cases += [
            (deep, {}, {"pipe": ranks, "schedule": "interleaved", "chunks": 2}),
            (deep, {}, {"pipe": ranks, "schedule": "gpipe", "chunks": 2, "zero": 3}),
            ({}, {}, {"pipe": 2, "boundaries": (1,), "zero": 3}),
        ]
    return cases


@pytest.mark.parametrize(("model", "train", "layout"), odd_cases())
def test_odd_sizes(
    world: MPI.Intracomm, model: dict[str, Any], train: dict[str, Any], layout: dict[str, Any]
) -> None:
    found, expected, *_ = one_step(
        world, replace(MODEL, **model), replace(TRAIN, **train), ParallelSettings(**layout)
    )
    assert found == expected


@pytest.mark.parametrize("change", [{"reduction": "library"}, {"overlap": False}])
def test_how_it_is_done_changes_no_byte(world: MPI.Intracomm, change: dict[str, Any]) -> None:
    tensor = 2 if world.size > 1 else 1
    layout = ParallelSettings(tensor=tensor, sequence=tensor > 1, zero=2, **change)
    found, expected, *_ = one_step(world, MODEL, TRAIN, layout)
    assert found == expected


@pytest.mark.parametrize("schedule", ["gpipe", "1f1b", "zero-bubble", "interleaved"])
def test_pipeline_messages(world: MPI.Intracomm, schedule: str) -> None:
    """One for each micro-batch, cut and array, either way; chunks make that many times the cuts."""
    if world.size == 1:
        pytest.skip("nothing is cut")
    ranks, chunks = world.size, 2 if schedule == "interleaved" else 1
    model = replace(MODELS["capacity"], layers=chunks * ranks - 1)
    layout = ParallelSettings(pipe=ranks, schedule=schedule, chunks=chunks)
    with trained(world, model, TRAIN, layout) as (trainer, mesh, recorder, case):
        trainer.step()
        sent = recorder.traffic["pipe", "send"]
        ends = (mesh.pipe.rank == 0) + (mesh.pipe.rank == ranks - 1)
        arrays = 2  # x, and the auxiliary loss
        assert sent.calls == arrays * case.micros * (2 * chunks - ends)
        assert sent.bytes == sent.calls // 2 * (case.activation + 8)
        assert recorder.traffic["pipe", "recv"].calls == sent.calls


def test_experts_rows_on_average(world: MPI.Intracomm) -> None:
    """All that expert ranks exchange is settled by the sizes; who gets it, by the routers."""
    if world.size == 1:
        pytest.skip("nothing is exchanged")
    model = MODELS["experts"]
    found, _, case, numbers = one_step(world, model, TRAIN, ParallelSettings(expert=world.size))
    assignments = case.micros * case.mixtures * case.n * model.experts_per_token
    assert numbers["sent"] == assignments
    total = world.allreduce(found["expert", "alltoall"])
    row, counts = model.width * case.itemsize, case.micros * case.mixtures * 8 * model.experts
    assert total == world.size * (4 * assignments * row + counts)


# -- published volumes -----------------------------------------------------------------------------


@pytest.mark.parametrize("micros", [1, 2])
def test_zero_against_data_parallelism(world: MPI.Intracomm, micros: int) -> None:
    """Rajbhandari et al. 2020, section 7: 1, 1, 1 and 1.5 times as much, for one micro-batch.

    With m: 1, 1, (m + 1) / 2 and 3 m / 2 times, as gradients are summed for each of them.
    """
    if world.size == 1:
        pytest.skip("nothing is summed")
    model = replace(MODEL, tied=False)
    train = replace(TRAIN, batch_size=micros * world.size, micro_batch_size=1)
    volume = {}
    for zero in range(4):
        layout = ParallelSettings(data=world.size, zero=zero)
        found, _, case, _ = one_step(world, model, train, layout)
        assert case.micros == micros
        found["replicas", "allreduce"] -= 8 * world.size * micros  # losses
        # A sum is one of each of the others.
        volume[zero] = sum(
            (2 if op == "allreduce" else 1) * nbytes
            for (axis, op), nbytes in found.items()
            if axis == "replicas"
        )
    weights = sum(arena.size for arena in case.arenas) * case.itemsize
    assert volume == {
        0: 2 * weights,
        1: 2 * weights,
        2: (micros + 1) * weights,
        3: 3 * micros * weights,
    }


def test_weights_of_a_block() -> None:
    """12 d^2 + 13 d a block, as everybody counts them, where no rounding is seen."""
    d, v, t, layers = 32, 48, 16, 3
    model = Settings(layers=layers, heads=2, width=d, vocabulary=v, context=t)
    case = Case(model, TRAIN, ParallelSettings(data=1), 0)
    blocks = layers * (12 * d * d + 13 * d)
    assert sum(arena.size for arena in case.arenas) == (v + t) * d + blocks + 2 * d


@pytest.mark.parametrize("kilobytes", [1, 96])
def test_what_reaches_a_rank(
    world: MPI.Intracomm, kilobytes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The second column of the table of calls, by what is handed to MPI."""
    group = Group(world, "test", Backend.create("numpy"), Recorder())
    n, rank = group.size, group.rank
    size = 1 << 10 if kilobytes == 1 else 96 << 10  # bytes, divisible by 8 * ranks
    x, part = np.zeros(size // 8), np.zeros(size // 8 // n)
    counts = [len(part)] * n
    got = 0
    call = Group._call

    def noted(self: Group, name: str, wait: bool, *arguments: Any) -> Any:
        nonlocal got
        if name in ("Alltoallv", "Allgatherv"):
            sizes = arguments[1][1][0]
            got += sum(sizes) - sizes[rank]
        return call(self, name, wait, *arguments)

    monkeypatch.setattr(Group, "_call", noted)
    calls = {
        "allreduce": lambda: group.allreduce(x),
        "reduce_scatter": lambda: group.reduce_scatter(x, part),
        "allgather": lambda: group.allgather(part, x),
        "alltoall": lambda: group.alltoall(x, counts, x.copy(), counts),
    }
    for op, run in calls.items():
        got = 0
        run()
        assert got == (arriving(op, size, n) if n > 1 else 0), op


# -- memory ----------------------------------------------------------------------------------------


def kept(arenas: list[Arena], itemsize: int, *, apart: bool) -> tuple[int, int, int]:
    """Bytes of weights, gradients and moments that stay; apart: gradients of each use."""
    weights = sum(a.part if a.zero == 3 else a.size for a in arenas)
    gradients = sum(a.part if a.zero >= 2 else (a.uses if apart else 1) * a.size for a in arenas)
    moments = 2 * sum(a.part if a.zero else a.size for a in arenas)
    return itemsize * weights, itemsize * gradients, itemsize * moments


@pytest.mark.parametrize("tensor", [1, 2])
@pytest.mark.parametrize("model", ["tied", "experts"])
@pytest.mark.parametrize("zero", range(4))
@pytest.mark.parametrize("deterministic", [False, True])
def test_bytes_that_stay(
    world: MPI.Intracomm, deterministic: bool, zero: int, model: str, tensor: int
) -> None:
    if world.size % tensor:
        pytest.skip("does not fit")
    layout = ParallelSettings(tensor=tensor, sequence=tensor > 1, zero=zero)
    train = replace(TRAIN, deterministic=deterministic)
    if deterministic and world.size & (world.size - 1):
        pytest.skip("needs a power of two")
    with trained(world, MODELS[model], train, layout) as (trainer, _, _, case):
        memory = trainer.memory()
        held = memory.weights, memory.gradients, memory.optimizer
        assert held == kept(case.arenas, case.itemsize, apart=deterministic)
        assert memory.working == 0


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("zero", range(4))
def test_bytes_to_work_with(world: MPI.Intracomm, zero: int, overlap: bool) -> None:
    """Gradients of three layers and their parts, weights of two: buffers are kept by their shape.

    The middle layers are alike, the first and the last one have shapes of their own.
    """
    layout = ParallelSettings(data=world.size, zero=zero, overlap=overlap)
    model = replace(MODELS["untied"], layers=4)
    with trained(world, model, TRAIN, layout) as (trainer, _, _, case):
        for _ in range(2):
            trainer.step()
        embedding, *blocks, head = case.arenas
        once = 3 if overlap else 1
        expected = 0
        if embedding.zero >= 2:
            for times, arena in ((1, embedding), (once, blocks[0]), (1, head)):
                expected += times * (arena.size + arena.part)
        if embedding.zero == 3:
            expected += embedding.size + 2 * blocks[0].size + head.size
        assert trainer.memory().working == case.itemsize * expected
