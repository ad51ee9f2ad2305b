"""Training a small model under a layout, and comparing what comes out with another run."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpillm.models.settings import ModelSettings
from mpillm.parallel.launch import wait_idle
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.settings import OptimizerSettings, RunConfig, RunSettings, TrainSettings
from mpillm.training.trial import Outcome, Trial, compare

__all__ = ["TEXT", "TINY", "Run", "max_difference", "one_rank", "run", "run_config"]

# The settings that `make verify-all` uses, and a text for them.
TINY = Path(__file__).parents[2] / "jobs" / "verify-tiny.toml"
TEXT = np.random.default_rng(0).integers(0, 65, 3000).astype(np.uint16)


@dataclass(frozen=True)
class Run:
    """What some steps gave, and the final weights, whole, by name (rank 0 only)."""

    outcome: Outcome
    weights: dict[str, np.ndarray]


def run_config(
    comm: MPI.Intracomm,
    config: RunConfig,
    steps: int,
    *,
    text: np.ndarray = TEXT,
    message_limit: int = 1 << 30,
) -> Run:
    """Train `steps` steps on all ranks of `comm`. All replicas must hold the same bits."""
    trial = Trial(comm, config, text, message_limit=message_limit)
    result = Run(trial.run(steps), dict(trial.weights()))
    assert not trial.problems
    trial.free()
    return result


def run(
    comm: MPI.Intracomm,
    model: ModelSettings,
    train: TrainSettings,
    parallel: ParallelSettings,
    *,
    text: np.ndarray,
    steps: int,
) -> Run:
    """The same with the sections of the settings."""
    optimizer = OptimizerSettings(lr=1e-3, min_lr=1e-4, warmup=1)
    config = RunConfig(
        model=model, train=train, parallel=parallel, optimizer=optimizer, run=RunSettings()
    )
    return run_config(comm, config, steps, text=text)


@cache
def one_rank(config: RunConfig, steps: int) -> Run | None:
    """The run on one rank, computed by rank 0 while the others sleep; None on these."""
    result = None
    if MPI.COMM_WORLD.rank == 0:
        result = run_config(MPI.COMM_SELF, config, steps)
    wait_idle(MPI.COMM_WORLD)
    return result


def max_difference(a: Run, b: Run) -> float:
    """Largest difference of losses, norms and weights, as `verify-layouts` measures them."""
    found = compare(a.outcome, a.weights, b.outcome, b.weights.items())
    assert not found.problems
    return max(found.loss, found.norm, found.weights)
