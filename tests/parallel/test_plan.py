"""What a plan says a rank holds and writes, against what ranks do hold, in every kind of layout."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any

import pytest
from layouts import TEXT, TINY
from mpi4py import MPI
from msgspec.structs import replace

from mpillm.array.backend import Backend
from mpillm.models.settings import build_model
from mpillm.parallel.covering import covering
from mpillm.parallel.grid import GROUPS, Grid, fit
from mpillm.parallel.layouts import layouts
from mpillm.parallel.mesh import Mesh
from mpillm.parallel.plan import PlannedMesh
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.cases import Case, cases_of, variants_of
from mpillm.training.saving import mine, planned
from mpillm.training.trial import Trial

WORLD = MPI.COMM_WORLD.size
FILLED_IN = ["--model.context=12"]
VARY = ["model.tied=true,false", "model.experts=0,5", "train.dtype=float64,float32"]
VARIANTS = variants_of(TINY, FILLED_IN, VARY)


def tried() -> list[Case]:
    """Cases in which every two choices meet, and one that says itself where stages begin."""
    cases = [case for case in cases_of(VARIANTS, WORLD) if not case.refused]
    chosen = [cases[number] for number in covering([case.factors for case in cases])]
    if WORLD > 1:
        starts = ",".join(str(layer) for layer in range(2, WORLD + 1))
        text = f"pipe={WORLD},schedule=gpipe,boundaries=[{starts}]"
        chosen += [case for case in cases_of(VARIANTS, WORLD, named=[text]) if not case.refused]
    return chosen


def told(entries: Any) -> list[tuple[Any, ...]]:
    """Entries of a state without what they carry."""
    return [
        (kind, param.name, param.shard, param.owner, part, param.reduce_over[0].axis)
        for kind, param, part, _ in entries
    ]


@pytest.mark.parametrize("case", tried(), ids=lambda case: " ".join([case.text, *case.variant]))
def test_a_plan_is_what_the_ranks_hold(world: MPI.Intracomm, case: Case) -> None:
    settings = VARIANTS[case.variant]
    layout = fit(case.layout, world.size)
    trial = Trial(world, replace(settings, parallel=layout), TEXT)
    state = [(kind, param, part, values) for kind, param, part, values in trial.trainer.state()]
    held = [planned(build_model(settings.model), layout, rank) for rank in range(world.size)]
    assert told(held[world.rank]) == told(state)
    assert told(mine(held[world.rank])) == told(mine(state))
    kinds = {kind for kind, *_ in state}
    assert kinds == {"parameter", "optimizer/m", "optimizer/v"}
    # What the ranks write tiles every array.
    written: dict[tuple[str, str], int] = {}
    sizes: dict[tuple[str, str], int] = {}
    loads = []
    for entries in map(mine, held):
        loads.append(0)
        for kind, param, part, _ in entries:
            size = part[1] - part[0] if part else param.shard.size
            written[kind, param.name] = written.get((kind, param.name), 0) + size
            sizes[kind, param.name] = math.prod(param.shard.shape)
            loads[-1] += size
    assert written == sizes
    if layout.data == world.size > 1:
        assert max(loads) <= sum(loads) / len(loads) + max(sizes.values())
    trial.free()


def test_the_groups_of_a_plan_are_those_of_the_mesh(world: MPI.Intracomm) -> None:
    for layout in layouts(world.size, ParallelSettings()):
        if layout.zero or layout.schedule != "1f1b" or layout.sequence:
            continue
        mesh = Mesh(world, layout, Backend.create("numpy"), Recorder())
        plan = PlannedMesh(layout, world.rank)
        for name in GROUPS:
            ours, theirs = getattr(plan, name), getattr(mesh, name)
            assert (ours.axis, ours.rank, ours.size) == (name, theirs.rank, theirs.size), layout
            members = Grid(layout).members(name, world.rank)
            assert (members.index(world.rank), len(members)) == (ours.rank, ours.size)
        mesh.free()


def test_the_groups_of_a_plan_cannot_be_called() -> None:
    mesh = PlannedMesh(ParallelSettings(data=2, tensor=2), 3)
    assert (mesh.tensor.rank, mesh.tensor.size, mesh.tensor.axis) == (1, 2, "tensor")
    with pytest.raises(RuntimeError, match="allreduce over tensor: its 2 ranks are planned"):
        mesh.tensor.allreduce(None)


def test_a_plan_makes_no_arrays() -> None:
    """A layer of the model that is planned here has 200 million weights."""
    wide = [*FILLED_IN, "--model.heads=8", "--model.width=4096"]
    (settings,) = variants_of(TINY, wide, []).values()
    model = build_model(settings.model)
    tracemalloc.start()
    held = planned(model, ParallelSettings(data=4, zero=3, tensor=2), 5)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert sum(part[1] - part[0] for *_, part, _ in held if part) > 10**8
    assert peak < 2**20
