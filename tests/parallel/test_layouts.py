"""One loss curve: every data x tensor x pipe layout against one rank."""

from __future__ import annotations

import time
from functools import cache
from typing import Any

import numpy as np
import pytest
from layouts import Run, layouts, max_difference, run
from mpi4py import MPI

from mpillm.errors import UserError
from mpillm.models.gpt2 import Settings
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.settings import OptimizerSettings, TrainSettings

TOLERANCE = {"float64": 1e-10, "float32": 2e-5}
# In float32 a gradient that happens to be near zero is rounding noise, which Adam with its usual
# epsilon of 1e-8 turns into a part of a full step: one weight in tens of thousands then differs by
# up to 1e-4 between layouts. With a larger epsilon the update is a smooth function of the gradient,
# which also shows a gradient of the wrong size; the first updates otherwise show its sign alone.
OPTIMIZER = {
    "float64": OptimizerSettings(lr=1e-3, min_lr=1e-4, warmup=1),
    "float32": OptimizerSettings(lr=1e-3, min_lr=1e-4, warmup=1, eps=1e-3),
}
TEXT = np.random.default_rng(0).integers(0, 65, 3000).astype(np.uint16)

# Five layers on up to eight stages, three heads and 65 types on up to eight tensor ranks: nothing
# divides. Weights large enough that no gradient is lost beside Adam's epsilon.
MODEL = {"layers": 5, "heads": 3, "width": 24, "vocabulary": 65, "context": 12, "init_std": 0.1}

# Nine sequences in micro-batches of two: five, the last with a padded row, and no number of data
# ranks above one divides five.
TRAIN = {"batch_size": 9, "micro_batch_size": 2, "sequence_length": 12}


def settings(tied: bool, dtype: str, **train: Any) -> tuple[Settings, TrainSettings]:
    """The model and the training of these tests."""
    model = Settings(**MODEL, dropout=0.1, tied=tied)
    return model, TrainSettings(**{**TRAIN, **train}, dtype=dtype)


@cache
def one_rank(tied: bool, dtype: str, steps: int, **train: Any) -> Run | None:
    """The run on one rank, computed by rank 0 while the others sleep; None on these."""
    result = None
    if MPI.COMM_WORLD.rank == 0:
        model, train_settings = settings(tied, dtype, **train)
        result = run(
            MPI.COMM_SELF,
            model,
            train_settings,
            ParallelSettings(),
            text=TEXT,
            steps=steps,
            optimizer=OPTIMIZER[dtype],
        )
    # A blocking barrier would spin on the core that rank 0 needs.
    arrived = MPI.COMM_WORLD.Ibarrier()
    while not arrived.Test():
        time.sleep(0.005)
    return result


def cases() -> list[tuple[tuple[int, int, int], str]]:
    """Every layout of this world, pipelines under both schedules."""
    return [
        (layout, schedule)
        for layout in layouts(MPI.COMM_WORLD.size)
        if layout[2] <= MODEL["layers"] + 2
        for schedule in (("gpipe", "1f1b") if layout[2] > 1 else ("1f1b",))
    ]


def parallel(layout: tuple[int, int, int], schedule: str) -> ParallelSettings:
    """Settings of a (data, tensor, pipe) layout."""
    return ParallelSettings(data=layout[0], tensor=layout[1], pipe=layout[2], schedule=schedule)


@pytest.mark.parametrize("dtype", ["float64", "float32"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize(("layout", "schedule"), cases())
def test_three_steps_equal_one_rank(
    world: MPI.Intracomm, layout: tuple[int, int, int], schedule: str, tied: bool, dtype: str
) -> None:
    expected = one_rank(tied, dtype, 3)
    model, train = settings(tied, dtype)
    result = run(
        world,
        model,
        train,
        parallel(layout, schedule),
        text=TEXT,
        steps=3,
        optimizer=OPTIMIZER[dtype],
    )
    if world.rank == 0:
        assert expected is not None
        assert max_difference(expected, result) <= TOLERANCE[dtype]


def test_the_comparison_sees_a_difference(world: MPI.Intracomm) -> None:
    """Another seed is far outside the tolerance: the test above can fail."""
    expected = one_rank(True, "float64", 3)
    model, train = settings(True, "float64", seed=2)
    result = run(world, model, train, ParallelSettings(), text=TEXT, steps=3)
    if world.rank == 0:
        assert expected is not None
        assert max_difference(expected, result) > 1e-3


@pytest.mark.parametrize("batch_size", [8, 7])
@pytest.mark.parametrize(
    ("layout", "schedule"), [case for case in cases() if case[0][1] == 1 and case[0][0] <= 4]
)
def test_deterministic_mode_is_bitwise(
    world: MPI.Intracomm, layout: tuple[int, int, int], schedule: str, batch_size: int
) -> None:
    """Twenty steps, the same bits over data x pipe x accumulation; 7 leaves a padded row."""
    changes = {"deterministic": True, "batch_size": batch_size, "micro_batch_size": 2}
    expected = one_rank(True, "float32", 20, **changes)
    model, train = settings(True, "float32", **changes)
    result = run(
        world,
        model,
        train,
        parallel(layout, schedule),
        text=TEXT,
        steps=20,
        optimizer=OPTIMIZER["float32"],
    )
    if world.rank == 0:
        assert expected is not None and expected.weights is not None and result.weights is not None
        assert result.losses == expected.losses
        assert result.norms == expected.norms
        for name, values in expected.weights.items():
            assert (values == result.weights[name]).all(), name


def test_the_strict_backend_equals_numpy(world: MPI.Intracomm) -> None:
    """The code path of a GPU, with arrays that MPI cannot read, under the last layout."""
    layout, schedule = cases()[-1]
    model, train = settings(True, "float64")
    numpy, strict = (
        run(world, model, train, parallel(layout, schedule), text=TEXT, steps=2, backend=backend)
        for backend in ("numpy", "strict")
    )
    if world.rank == 0:
        assert max_difference(numpy, strict) <= 1e-12


def test_small_messages_change_no_bit(world: MPI.Intracomm) -> None:
    """Messages cut into pieces of 1,000 bytes."""
    layout, schedule = cases()[-1]
    model, train = settings(True, "float32")
    whole, cut = (
        run(
            world, model, train, parallel(layout, schedule), text=TEXT, steps=1, message_limit=limit
        )
        for limit in (1 << 30, 1000)
    )
    if world.rank == 0:
        assert max_difference(whole, cut) == 0.0


def test_library_reduction_is_close(world: MPI.Intracomm) -> None:
    model, train = settings(True, "float64")
    expected = one_rank(True, "float64", 3)
    layout = ParallelSettings(reduction="library")
    result = run(world, model, train, layout, text=TEXT, steps=3)
    if world.rank == 0:
        assert expected is not None
        assert max_difference(expected, result) <= TOLERANCE["float64"]


def test_too_long_a_pipeline_is_refused(world: MPI.Intracomm) -> None:
    """As many stages as ranks, for a model with one unit less."""
    model = Settings(**{**MODEL, "layers": max(1, world.size - 3)}, dropout=0.0)
    _, train = settings(True, "float64")
    if world.size <= 3:
        pytest.skip("every pipeline fits into three ranks")
    with pytest.raises(UserError, match=rf"pipe = {world.size}.*at most {world.size - 1} stages"):
        run(world, model, train, ParallelSettings(pipe=world.size), text=TEXT, steps=1)


@pytest.mark.parametrize("axis", ["context", "expert"])
def test_an_axis_without_use_is_refused(world: MPI.Intracomm, axis: str) -> None:
    if world.size == 1:
        pytest.skip("every axis has size 1")
    model, train = settings(True, "float64")
    with pytest.raises(UserError, match=rf"parallel.{axis} = {world.size}.*data, pipe, tensor"):
        run(world, model, train, ParallelSettings(**{axis: world.size}), text=TEXT, steps=1)


def test_deterministic_mode_refuses_blocks_that_are_no_power_of_two(world: MPI.Intracomm) -> None:
    if world.size == 1:
        pytest.skip("one data rank takes any number")
    train = TrainSettings(
        **{**TRAIN, "batch_size": 6 * world.size}, dtype="float32", deterministic=True
    )
    model, _ = settings(True, "float32")
    with pytest.raises(UserError, match="3 micro-batches a rank, which must be a power of two"):
        run(world, model, train, ParallelSettings(data=world.size), text=TEXT, steps=1)


def test_optimizer_settings_reach_the_update(world: MPI.Intracomm) -> None:
    """Without warm-up and with a constant rate of nearly nothing, the weights stay."""
    model, train = settings(True, "float64")
    still = OptimizerSettings(lr=1e-12, min_lr=0.0, warmup=0, schedule="constant")
    first = run(world, model, train, ParallelSettings(), text=TEXT, steps=1, optimizer=still)
    second = run(world, model, train, ParallelSettings(), text=TEXT, steps=2, optimizer=still)
    if world.rank == 0:
        assert first.weights is not None and second.weights is not None
        for name, values in first.weights.items():
            assert np.abs(values - second.weights[name]).max() <= 2e-12
