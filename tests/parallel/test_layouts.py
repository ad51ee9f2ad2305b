"""One loss curve: layouts in which every two modes meet, against one rank.

`make verify-all` tries every layout.
"""

from __future__ import annotations

import pytest
from layouts import TEXT, TINY, max_difference, one_rank, run_config
from mpi4py import MPI
from msgspec.structs import replace

from mpillm.config import load
from mpillm.errors import UserError
from mpillm.parallel.covering import covering
from mpillm.parallel.layouts import SIZES
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.cases import Case, cases_of, variants_of
from mpillm.training.settings import RunConfig
from mpillm.training.trial import Trial
from mpillm.training.verify import TOLERANCE

WORLD = MPI.COMM_WORLD.size
FILLED_IN = ["--model.context=12"]  # which a run takes from its sequence length
VARY = ["model.tied=true,false", "model.experts=0,5", "train.dtype=float64,float32"]
VARIANTS = variants_of(TINY, FILLED_IN, VARY)
DETERMINISTIC = variants_of(
    TINY,
    [*FILLED_IN, "--train.deterministic=true", "--train.dtype=float32"],
    ["model.tied=true,false", "train.batch_size=8,7"],  # seven leave a padded row
)
ONE_RANK = ParallelSettings(data=1)


def config(*overrides: str, layout: ParallelSettings = ONE_RANK) -> RunConfig:
    """The small model with other settings."""
    return replace(load(RunConfig, TINY, [*FILLED_IN, *overrides]), parallel=layout)


def axes(case: Case) -> int:
    """Number of axes that are in use."""
    return sum(getattr(case.layout, axis) > 1 for axis in SIZES)


def tried() -> list[Case]:
    """Cases in which every two choices meet; from 8 ranks on, of those of as many axes as can be.

    Fewer axes are the business of fewer ranks.
    """
    cases = [case for case in cases_of(VARIANTS, WORLD) if not case.refused]
    if WORLD >= 8:
        most = max(map(axes, cases))
        cases = [case for case in cases if axes(case) == most]
    return [cases[number] for number in covering([case.factors for case in cases])]


def bitwise() -> list[Case]:
    """Those that promise the bits of one rank."""
    cases = [
        case
        for case in cases_of(DETERMINISTIC, WORLD)
        if case.layout.data * case.layout.pipe == WORLD and case.layout.zero <= 2
        if not case.refused
    ]
    return [cases[number] for number in covering([case.factors for case in cases])]


def told(case: Case) -> str:
    """A test's name."""
    return " ".join([case.text, *case.variant])


TRIED = tried()
FEW = TRIED[::8]


@pytest.mark.parametrize("case", TRIED, ids=told)
def test_a_layout_gives_one_rank_s_run(world: MPI.Intracomm, case: Case) -> None:
    settings = VARIANTS[case.variant]
    expected = one_rank(replace(settings, parallel=ONE_RANK), 2)
    result = run_config(world, replace(settings, parallel=case.layout), 2)
    if world.rank == 0:
        assert expected is not None
        assert max_difference(expected, result) <= TOLERANCE[settings.train.dtype]


def test_the_comparison_sees_a_difference(world: MPI.Intracomm) -> None:
    """Another seed is far outside the tolerance: the test above can fail."""
    expected = one_rank(config(), 2)
    result = run_config(world, config("--train.seed=2", layout=ParallelSettings()), 2)
    if world.rank == 0:
        assert expected is not None
        assert max_difference(expected, result) > 1e-3


@pytest.mark.parametrize("case", bitwise(), ids=told)
def test_deterministic_mode_is_bitwise(world: MPI.Intracomm, case: Case) -> None:
    """Ten steps, the same bits over data x pipe x accumulation x ZeRO 0 to 2."""
    settings = DETERMINISTIC[case.variant]
    expected = one_rank(replace(settings, parallel=ONE_RANK), 10)
    result = run_config(world, replace(settings, parallel=case.layout), 10)
    if world.rank == 0:
        assert expected is not None
        assert result.outcome.losses == expected.outcome.losses
        assert result.outcome.norms == expected.outcome.norms
        assert result.weights.keys() == expected.weights.keys()
        for name, values in expected.weights.items():
            assert (values == result.weights[name]).all(), name


@pytest.mark.parametrize("case", FEW, ids=told)
def test_the_strict_backend_equals_numpy(world: MPI.Intracomm, case: Case) -> None:
    """The code path of a GPU, with arrays that MPI cannot read."""
    numpy, strict = (
        run_config(
            world,
            config(
                *(f"--{setting}" for setting in case.variant),
                "--train.dtype=float64",
                f"--run.backend={backend}",
                layout=case.layout,
            ),
            1,
        )
        for backend in ("numpy", "strict")
    )
    if world.rank == 0:
        assert max_difference(numpy, strict) <= 1e-12


@pytest.mark.parametrize("case", FEW, ids=told)
def test_small_messages_change_no_bit(world: MPI.Intracomm, case: Case) -> None:
    """Messages cut into pieces of 1,000 bytes."""
    settings = replace(VARIANTS[case.variant], parallel=case.layout)
    whole, cut = (run_config(world, settings, 1, message_limit=limit) for limit in (1 << 30, 1000))
    if world.rank == 0:
        assert max_difference(whole, cut) == 0.0


def test_library_reduction_is_close(world: MPI.Intracomm) -> None:
    expected = one_rank(config(), 2)
    result = run_config(world, config(layout=ParallelSettings(reduction="library")), 2)
    if world.rank == 0:
        assert expected is not None
        assert max_difference(expected, result) <= TOLERANCE["float64"]


def test_replicas_that_differ_are_told(world: MPI.Intracomm) -> None:
    """One weight of the last rank is changed behind the trainer's back."""
    trial = Trial(world, config(layout=ParallelSettings()), TEXT)
    for kind, param, _, values in trial.trainer.state():
        if world.rank == world.size - 1 and (kind, param.name) == ("parameter", "head.norm.gain"):
            values[3] += 1e-9
    list(trial.weights())
    trial.free()
    if world.rank == 0:
        told = f"replicas of head.norm.gain differ (ranks 0 and {world.size - 1})"
        assert trial.problems == ([told] if world.size > 1 else [])


def test_too_long_a_pipeline_is_refused(world: MPI.Intracomm) -> None:
    """As many stages as ranks, for a model with one unit less."""
    if world.size <= 3:
        pytest.skip("every pipeline fits into three ranks")
    settings = config(f"--model.layers={world.size - 3}", "--model.expert_every=1")
    with pytest.raises(UserError, match=rf"pipe = {world.size}.*at most {world.size - 1} stages"):
        Trial(world, replace(settings, parallel=ParallelSettings(pipe=world.size)), TEXT)


def test_experts_that_are_not_there_are_refused(world: MPI.Intracomm) -> None:
    if world.size == 1:
        pytest.skip("every axis has size 1")
    with pytest.raises(UserError, match=rf"parallel.expert = {world.size}: .*no experts"):
        Trial(world, config(layout=ParallelSettings(expert=world.size)), TEXT)


def test_deterministic_mode_refuses_blocks_that_are_no_power_of_two(world: MPI.Intracomm) -> None:
    if world.size == 1:
        pytest.skip("one data rank takes any number")
    settings = config(f"--train.batch_size={6 * world.size}", "--train.deterministic")
    with pytest.raises(UserError, match="3 micro-batches a rank, which must be a power of two"):
        Trial(world, replace(settings, parallel=ParallelSettings(data=world.size)), TEXT)


def test_optimizer_settings_reach_the_update(world: MPI.Intracomm) -> None:
    """Without warm-up and with a constant rate of nearly nothing, the weights stay."""
    settings = config(
        "--optimizer.lr=1e-12",
        "--optimizer.min_lr=0",
        "--optimizer.warmup=0",
        "--optimizer.schedule=constant",
        layout=ParallelSettings(),
    )
    first, second = (run_config(world, settings, steps) for steps in (1, 2))
    for name, values in first.weights.items():  # on rank 0
        assert abs(values - second.weights[name]).max() <= 2e-12
