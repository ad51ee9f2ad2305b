"""A model in training on a mesh: what a step and an evaluation do."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
from msgspec.structs import replace

from mpillm.array.backend import Backend
from mpillm.array.random import fold
from mpillm.data.loader import EvaluationSet, Loader, MicroBatch
from mpillm.errors import UserError
from mpillm.models.model import Model, build_stage
from mpillm.nn.layer import GradientSink, Micro
from mpillm.nn.param import Param
from mpillm.parallel.group import pairwise_sum
from mpillm.parallel.mesh import Mesh
from mpillm.parallel.pipeline import Executor
from mpillm.parallel.programs import Program, lower, validate
from mpillm.parallel.schedules import SCHEDULES, forward_only
from mpillm.training.gradients import Gradients
from mpillm.training.learning_rate import learning_rate
from mpillm.training.optimizer import AdamW
from mpillm.training.settings import OptimizerSettings, TrainSettings

__all__ = ["StepResult", "Trainer", "resolve_batch"]


@dataclass(frozen=True)
class StepResult:
    """What a step did: `step` counts from 1, loss in nats a token, times in seconds."""

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float


def resolve_batch(settings: TrainSettings, data_ranks: int) -> TrainSettings:
    """The settings with `micro_batch_size = 0` replaced by a data rank's share of the batch.

    UserError where deterministic mode cannot keep its promise: its tree over the micro-batches
    must have each data rank's block as a subtree.
    """
    micro = settings.micro_batch_size or -(-settings.batch_size // data_ranks)
    settings = replace(settings, micro_batch_size=min(micro, settings.batch_size))
    if settings.deterministic and data_ranks > 1:

        def fits(size: int) -> bool:
            rounds = _micros_a_rank(replace(settings, micro_batch_size=size), data_ranks)
            return rounds & (rounds - 1) == 0

        size = settings.micro_batch_size
        if not fits(size):
            # The whole batch in one micro-batch always fits.
            near = min(filter(fits, range(1, settings.batch_size + 1)), key=lambda m: abs(m - size))
            raise UserError(
                f"train.deterministic: {settings.batch_size} sequences in micro-batches of {size} "
                f"over {data_ranks} data ranks make {_micros_a_rank(settings, data_ranks)} "
                "micro-batches a rank, which must be a power of two; the nearest that fits is "
                f"train.micro_batch_size = {near}"
            )
    return settings


def _micros_a_rank(settings: TrainSettings, data_ranks: int) -> int:
    """Micro-batches that every data rank runs in a step; the last ones may be padding."""
    micros = -(-settings.batch_size // settings.micro_batch_size)
    return -(-micros // data_ranks)


class Trainer:
    """One rank's part of a training run. Every method is collective over the mesh."""

    def __init__(
        self,
        model: Model,
        train: TrainSettings,
        optimizer: OptimizerSettings,
        mesh: Mesh,
        backend: Backend,
        loader: Loader,
    ) -> None:
        """`train` must have been through `resolve_batch` for the mesh's batch group."""
        model.check_layout(mesh)
        self._train = train
        self._optimizer_settings = optimizer
        self._mesh = mesh
        self._backend = backend
        self._loader = loader
        self._dtype = backend.dtype(train.dtype)
        self.stages = [build_stage(model, backend, mesh, self._dtype, train.seed)]
        self._gradients = Gradients(self.stages, mesh, backend, train.deterministic)
        self.optimizer = AdamW(self.stages, backend, optimizer)
        self._executor = Executor(
            mesh.pipe, self.stages, lambda micro: model.boundary(micro, self._dtype), backend
        )
        # Micro-batches that this rank runs in a step.
        self._rounds = _micros_a_rank(train, mesh.batch.size)
        stages, chunks = mesh.pipe.size, 1
        programs = lower(SCHEDULES[mesh.layout.schedule](stages, self._rounds, chunks), chunks)
        validate(programs, ranks=stages, micros=self._rounds, chunks=chunks)
        self._program = programs[mesh.pipe.rank]
        self._forward_programs: dict[int, Program] = {}
        # Steps done, and sequences that they took from the data, over all ranks.
        self.step_number = 0
        self.samples_consumed = 0

    def step(self) -> StepResult:
        """One optimizer step."""
        begin = time.perf_counter()
        tokens = self._loader.counted_tokens(self.samples_consumed)
        key = fold(self._train.seed, "step", self.step_number)
        sink = GradientSink()
        first = self._mesh.batch.rank * self._rounds
        micros = [
            self._micro(self._loader.micro_batch(self.samples_consumed, j), key, sink)
            for j in range(first, first + self._rounds)
        ]
        self._gradients.begin_step()
        outputs = self._executor.run(
            self._program, micros, (1.0 / tokens,), self._gradients.after_backward
        )
        self._gradients.reduce()
        # Data rank d has the micro-batches [d * micros, (d + 1) * micros).
        loss = pairwise_sum(self._losses(outputs, self._rounds).reshape(-1).tolist()) / tokens
        norm = self._gradients.norm()
        lr = learning_rate(self.step_number, self._train.steps, self._optimizer_settings)
        if not (np.isfinite(loss) and np.isfinite(norm)):
            raise UserError(
                f"step {self.step_number + 1}: the loss is {loss} and the gradient norm {norm}; "
                "the update was not applied; lower optimizer.lr or go back to an older checkpoint"
            )
        self.step_number += 1
        self.samples_consumed += self._train.batch_size
        self.optimizer.step(self.step_number, lr, norm)
        self._backend.synchronize()
        seconds = time.perf_counter() - begin
        return StepResult(self.step_number, loss, lr, norm, tokens, seconds)

    def evaluate(self, data: EvaluationSet) -> float:
        """Mean loss over every target of `data`, nats a token."""
        ranks, stages = self._mesh.batch.size, self._mesh.pipe.size
        rounds = -(-len(data) // ranks)
        losses: list[float] = []
        # A few micro-batches a stage at a time: enough to fill the pipeline, few to hold.
        for low in range(0, rounds, 4 * stages):
            count = min(4 * stages, rounds - low)
            program = self._forward_program(count)
            # In round r, rank d has micro-batch r * ranks + d.
            numbers = [r * ranks + self._mesh.batch.rank for r in range(low, low + count)]
            micros = [self._micro(data.micro_batch(j)) for j in numbers]
            outputs = self._executor.run(program, micros)
            losses += self._losses(outputs, count).T.reshape(-1).tolist()
        return float(pairwise_sum(losses)) / data.counted_tokens

    def _forward_program(self, micros: int) -> Program:
        """This rank's program for `micros` forward passes and nothing else."""
        if micros not in self._forward_programs:
            programs = lower(forward_only(self._mesh.pipe.size, micros, 1), 1)
            self._forward_programs[micros] = programs[self._mesh.pipe.rank]
        return self._forward_programs[micros]

    def state(self) -> Iterator[tuple[str, Param, np.ndarray]]:
        """(kind, parameter, host copy) of all that this rank holds of the training state."""
        for kind, param, view in self.optimizer.state():
            yield kind, param, self._backend.to_host(view)

    def restore(
        self, step_number: int, samples_consumed: int, values: Iterable[np.ndarray]
    ) -> None:
        """Put back what `state` gave, in its order, and go on after step `step_number`."""
        for (_, _, view), value in zip(self.optimizer.state(), values, strict=True):
            view[...] = self._backend.from_host(value)
        self.step_number = step_number
        self.samples_consumed = samples_consumed

    def _micro(self, batch: MicroBatch, key: int = 0, sink: GradientSink | None = None) -> Micro:
        """A micro-batch on the device; for training when there is a sink for gradients."""
        backend = self._backend
        return Micro(
            tokens=backend.from_host(batch.tokens),
            index=backend.xp.arange(batch.tokens.shape[1]),
            samples=backend.from_host(batch.samples),
            labels=backend.from_host(batch.labels),
            mask=backend.from_host(batch.mask.astype(self._dtype)),
            training=sink is not None,
            key=key,
            gradients=sink or GradientSink(),
        )

    def _losses(self, outputs: dict[int, Any], micros: int) -> np.ndarray:
        """Losses of the micro-batches of every data rank, float64 (ranks, micros), on every rank.

        outputs: by number, the last stage's, each a 0-dimensional float64; empty elsewhere.
        """
        mesh, backend = self._mesh, self._backend
        losses = backend.zeros((mesh.batch.size, micros), "float64")
        if outputs:
            losses[mesh.batch.rank] = backend.xp.stack([outputs[j][0] for j in range(micros)])
            mesh.batch.allreduce(losses)  # all terms but one are zero
        mesh.pipe.broadcast(losses, root=mesh.pipe.size - 1)
        return backend.to_host(losses)
