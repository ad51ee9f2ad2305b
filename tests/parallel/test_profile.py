"""Measured steps on several ranks: the same bits, kinds that add up, waiting that is found."""

from __future__ import annotations

import time
from dataclasses import dataclass

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.array.backend import Backend
from mpillm.array.metered import KINDS
from mpillm.array.tally import OTHER, WAITING, communication
from mpillm.data.loader import Loader
from mpillm.models.gpt2 import Settings
from mpillm.models.settings import build_model
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings
from mpillm.training import meter as meter_module
from mpillm.training.meter import Meter, Reading
from mpillm.training.settings import OptimizerSettings, TrainSettings
from mpillm.training.trainer import StepResult, Trainer, resolve_batch

RANKS = MPI.COMM_WORLD.size
TEXT = np.random.default_rng(0).integers(0, 31, 3000).astype(np.uint16)
MODEL = Settings(layers=max(3, RANKS), heads=4, width=16, vocabulary=31, context=24, dropout=0.1)
EXPERTS = Settings(
    layers=2, heads=2, width=16, vocabulary=31, context=24, experts=5, experts_per_token=2
)
TRAIN = TrainSettings(batch_size=2 * RANKS, micro_batch_size=1, sequence_length=24, dtype="float64")

# By name: the layout, the model, and the axis along which most is sent.
LAYOUTS = {
    "data": (ParallelSettings(data=RANKS), MODEL, "replicas"),
    "at the end": (ParallelSettings(data=RANKS, overlap=False), MODEL, "replicas"),
    "zero": (ParallelSettings(data=RANKS, zero=3), MODEL, "replicas"),
    "tensor": (ParallelSettings(tensor=RANKS, data=1), MODEL, "tensor"),
    "sequence": (ParallelSettings(tensor=RANKS, data=1, sequence=RANKS > 1), MODEL, "tensor"),
    "pipe": (ParallelSettings(pipe=RANKS, data=1), MODEL, "pipe"),
    "context": (ParallelSettings(context=RANKS, data=1), MODEL, "context"),
    "expert": (ParallelSettings(expert=RANKS, data=1), EXPERTS, "expert"),
}
if RANKS % 2 == 0:
    mixed = ParallelSettings(data=RANKS // 2, pipe=2, schedule="zero-bubble", zero=1)
    LAYOUTS["mixed"] = mixed, MODEL, "pipe"

# Seconds that one rank comes late.
LATE = 0.1


@dataclass
class Steps:
    """What some steps gave on this rank, and the weights after them."""

    results: list[StepResult]
    readings: list[Reading]
    kinds: list[dict[str, float]]
    flops: int
    weights: list[bytes]


def run(
    comm: MPI.Intracomm,
    layout: ParallelSettings,
    model: Settings,
    *,
    profile: bool,
    steps: int = 2,
    late: bool = False,
) -> Steps:
    """Train; with `late`, the last step begins later on the first rank than on the others."""
    backend, recorder = Backend.create("numpy"), Recorder()
    meter = Meter(backend, recorder, profile=profile)
    layout = fit(layout, comm.size)
    train = resolve_batch(TRAIN, layout)
    mesh = Mesh(comm, layout, meter.backend, recorder)
    sizes = train.sequence_length, train.batch_size, train.micro_batch_size
    loader = Loader(TEXT, *sizes, train.seed)
    settings = OptimizerSettings()
    trainer = Trainer(
        build_model(model), train, settings, mesh, meter.backend, loader, clock=meter.clock
    )
    done = Steps([], [], [], 0, [])
    for step in range(steps):
        meter.begin_step()
        if late and step == steps - 1:
            comm.Barrier()
            time.sleep(LATE if comm.rank == 0 else 0.0)
        done.results.append(trainer.step())
        done.flops = meter._tally.flops
        done.readings.append(meter.end_step(done.results[-1].seconds, mesh.world))
        if meter.clock is not None:
            done.kinds.append(meter.clock.last)
    done.weights = [view.tobytes() for _, _, _, view in trainer.optimizer.state()]
    mesh.free()
    return done


@pytest.fixture(autouse=True)
def short_probes(monkeypatch: pytest.MonkeyPatch) -> None:
    """As without a profile."""
    monkeypatch.setattr(meter_module, "_WITH_PROFILE", meter_module._SHORTEST)


@pytest.mark.parametrize("name", LAYOUTS)
def test_a_profile_changes_no_bit_and_its_kinds_add_up(world: MPI.Intracomm, name: str) -> None:
    layout, model, axis = LAYOUTS[name]
    plain, profiled = (run(world, layout, model, profile=profile) for profile in (False, True))
    assert [(r.loss, r.grad_norm) for r in plain.results] == [
        (r.loss, r.grad_norm) for r in profiled.results
    ]
    assert plain.weights == profiled.weights
    assert plain.flops == profiled.flops
    for steps in (plain, profiled):
        assert all(0 < (r.mfu or 0.0) <= 1 for r in steps.readings)
        total = world.allreduce(steps.flops)
        for result, reading in zip(steps.results, steps.readings, strict=True):
            assert reading.gflops == pytest.approx(total / result.seconds / 1e9)
    assert all(reading.ranks is None for reading in plain.readings)
    for result, kinds in zip(profiled.results, profiled.kinds, strict=True):
        assert sum(kinds.values()) == pytest.approx(result.seconds, rel=1e-9)
        assert min(kinds.values()) >= 0
        known = {*KINDS.values(), "input", WAITING, OTHER}
        moved = {kind for kind in kinds if kind.startswith("communication.")}
        assert kinds.keys() <= known | moved
        assert (communication(axis) in moved) == (RANKS > 1)
        assert (WAITING in kinds) == (RANKS > 1)
    everyone = world.gather(profiled.kinds[-1])
    assert profiled.readings[-1].ranks == everyone  # None but on the first rank


@pytest.mark.parametrize("name", [name for name in LAYOUTS if name != "mixed"])
def test_whoever_has_to_wait_is_found_waiting(world: MPI.Intracomm, name: str) -> None:
    layout, model, _ = LAYOUTS[name]
    kinds = run(world, layout, model, profile=True, steps=1, late=True).kinds[-1]
    if world.rank > 0:
        assert kinds[WAITING] > 0.8 * LATE


@pytest.mark.parametrize("name", ["data", "zero", "tensor", "expert"])
def test_ranks_share_out_the_flops_of_one(world: MPI.Intracomm, name: str) -> None:
    layout, model, _ = LAYOUTS[name]
    alone = run(MPI.COMM_SELF, ParallelSettings(data=1), model, profile=False, steps=1)
    assert world.allreduce(run(world, layout, model, profile=False, steps=1).flops) == alone.flops
