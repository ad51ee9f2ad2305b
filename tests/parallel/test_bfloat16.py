"""Layouts with products of bfloat16 operands: what promises bits keeps them, the rest is near.

Partial products that ranks add up are float32, so cutting a product over ranks rounds no more; but
what follows is rounded to bfloat16, and now and then to a neighbouring number.
"""

from __future__ import annotations

from typing import Any

import pytest
from layouts import TINY, max_difference, one_rank, run_config
from mpi4py import MPI
from msgspec.structs import replace

from mpillm.array.backend import Backend
from mpillm.config import load
from mpillm.errors import UserError
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.settings import RunConfig
from mpillm.training.verify import TOLERANCE

WORLD = MPI.COMM_WORLD.size
ONE_RANK = ParallelSettings(data=1)

# Of the model's seven layers and eight sequences.
BITWISE: list[dict[str, Any]] = [
    {"data": WORLD},
    {"data": WORLD, "zero": 2},
    {"pipe": WORLD},
    {"pipe": WORLD, "schedule": "zero-bubble"},
]
NEAR: list[dict[str, Any]] = [
    {"data": WORLD, "zero": 3},
    {"tensor": WORLD},
    {"tensor": WORLD, "sequence": True},
    {"context": WORLD},
]


@pytest.fixture(autouse=True, scope="module")
def _needs_bfloat16() -> None:
    """Whether it can be had is the same on all ranks, which share this machine."""
    try:
        Backend.create("numpy", dtype="bfloat16")
    except UserError as error:
        pytest.skip(str(error))


def config(layout: ParallelSettings, *overrides: str) -> RunConfig:
    """The small model, with layers as wide as fill a few tiles of a product."""
    settings = ("--model.context=12", "--train.batch_size=8", "--model.width=48")
    dtype = "--train.dtype=bfloat16"
    return replace(load(RunConfig, TINY, [*settings, dtype, *overrides]), parallel=layout)


@pytest.mark.parametrize("layout", BITWISE, ids=str)
def test_deterministic_mode_is_bitwise(world: MPI.Intracomm, layout: dict[str, Any]) -> None:
    settings = "--train.deterministic=true"
    expected = one_rank(config(ONE_RANK, settings), 3)
    result = run_config(world, config(ParallelSettings(**layout), settings), 3)
    if world.rank == 0:
        assert expected is not None
        assert result.outcome.losses == expected.outcome.losses
        assert result.outcome.norms == expected.outcome.norms
        for name, values in expected.weights.items():
            assert values.dtype == "float32"
            assert (values == result.weights[name]).all(), name


@pytest.mark.parametrize("layout", NEAR, ids=str)
def test_a_layout_gives_one_rank_s_run(world: MPI.Intracomm, layout: dict[str, Any]) -> None:
    expected = one_rank(config(ONE_RANK), 2)
    result = run_config(world, config(ParallelSettings(**layout)), 2)
    if world.rank == 0:
        assert expected is not None
        assert max_difference(expected, result) <= TOLERANCE["bfloat16"]
        assert result.outcome.losses == pytest.approx(expected.outcome.losses, rel=1e-3)
        assert result.outcome.norms == pytest.approx(expected.outcome.norms, rel=5e-3)


@pytest.mark.parametrize("layout", [{"expert": WORLD}, {"tensor": WORLD}], ids=str)
def test_experts_learn_the_same(world: MPI.Intracomm, layout: dict[str, Any]) -> None:
    """A token whose choices are nearly a tie may go to another expert: losses are near, no more."""
    settings = "--model.experts=5"
    expected = one_rank(config(ONE_RANK, settings), 3)
    result = run_config(world, config(ParallelSettings(**layout), settings), 3)
    if world.rank == 0:
        assert expected is not None
        assert result.outcome.losses == pytest.approx(expected.outcome.losses, rel=1e-2)
