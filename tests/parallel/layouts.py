"""Training a small model under a layout, and comparing what comes out with one rank's run."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from mpi4py import MPI

from mpillm.array.backend import Backend
from mpillm.data.loader import Loader
from mpillm.models.settings import build_model
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.settings import OptimizerSettings, TrainSettings
from mpillm.training.trainer import Trainer, resolve_batch

__all__ = ["Run", "layouts", "max_difference", "run"]


@dataclass
class Run:
    """Losses and gradient norms by step, and the final weights, whole, by name (rank 0 only)."""

    losses: list[float]
    norms: list[float]
    rates: list[float]
    weights: dict[str, np.ndarray] | None


def layouts(ranks: int) -> list[tuple[int, int, int]]:
    """Every (data, tensor, pipe) with that product."""
    return [
        (data, tensor, ranks // data // tensor)
        for data in range(1, ranks + 1)
        if ranks % data == 0
        for tensor in range(1, ranks // data + 1)
        if (ranks // data) % tensor == 0
    ]


def run(
    comm: MPI.Intracomm,
    model: Any,
    train: TrainSettings,
    parallel: ParallelSettings,
    *,
    text: np.ndarray,
    steps: int,
    optimizer: OptimizerSettings | None = None,
    backend: str = "numpy",
    message_limit: int = 1 << 30,
) -> Run:
    """Train `steps` steps on all ranks of `comm`."""
    device = Backend.create(backend)
    mesh = Mesh(comm, fit(parallel, comm.size), device, Recorder(), message_limit)
    train = resolve_batch(train, mesh.layout)
    loader = Loader(
        text, train.sequence_length, train.batch_size, train.micro_batch_size, train.seed
    )
    optimizer = optimizer or OptimizerSettings(lr=1e-3, min_lr=1e-4, warmup=1)
    trainer = Trainer(build_model(model), train, optimizer, mesh, device, loader)
    results = [trainer.step() for _ in range(steps)]
    weights = gather_weights(trainer, mesh)
    mesh.free()
    return Run(
        [result.loss for result in results],
        [result.grad_norm for result in results],
        [result.lr for result in results],
        weights,
    )


def gather_weights(trainer: Trainer, mesh: Mesh) -> dict[str, np.ndarray] | None:
    """The whole weights on rank 0. Every replica of a shard must be bitwise the same."""
    mine = [
        (param.name, param.shard, part, values.copy())
        for kind, param, part, values in trainer.state()
        if kind == "parameter"
    ]
    gathered = mesh.world.gather_objects(mine)
    if gathered is None:
        return None
    whole: dict[str, np.ndarray] = {}
    written: dict[str, np.ndarray] = {}
    for held in gathered:
        for name, shard, part, values in held:
            array = whole.setdefault(name, np.zeros(shard.shape, values.dtype))
            seen = written.setdefault(name, np.zeros(shard.shape, bool))
            start, stop = part or (0, shard.size)
            flat, again = array[shard.slices].reshape(-1), seen[shard.slices].reshape(-1)
            old, new = flat[start:stop][again[start:stop]], values.reshape(-1)[again[start:stop]]
            assert (old == new).all(), f"replicas of {name} differ"
            flat[start:stop] = values.reshape(-1)
            again[start:stop] = True
            array[shard.slices] = flat.reshape(shard.local_shape)
            seen[shard.slices] = again.reshape(shard.local_shape)
    assert all(seen.all() for seen in written.values())
    return whole


def max_difference(a: Run, b: Run) -> float:
    """Largest of the differences of losses, norms and weights, by the metrics of the design.

    Losses and norms are relative; weights are max|a - b| / (max|a| + sum of learning rates).
    """
    assert a.weights is not None and b.weights is not None
    assert a.weights.keys() == b.weights.keys()
    worst = 0.0
    for ours, theirs in ((a.losses, b.losses), (a.norms, b.norms)):
        for x, y in zip(ours, theirs, strict=True):
            worst = max(worst, abs(x - y) / abs(x))
    for name, x in a.weights.items():
        scale = float(np.abs(x).max()) + sum(a.rates)
        worst = max(worst, float(np.abs(x - b.weights[name]).max()) / scale)
    return worst
