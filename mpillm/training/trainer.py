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
from mpillm.models.model import Model, build_stages
from mpillm.nn.layer import GradientSink, Micro
from mpillm.nn.param import Param
from mpillm.nn.ring import context_share
from mpillm.nn.rows import SharedRows
from mpillm.parallel.group import pairwise_sum
from mpillm.parallel.mesh import Mesh
from mpillm.parallel.pipeline import Executor
from mpillm.parallel.programs import Program, lower, validate
from mpillm.parallel.progress import Progress
from mpillm.parallel.schedules import SCHEDULES, forward_only
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.gradients import Gradients
from mpillm.training.learning_rate import learning_rate
from mpillm.training.optimizer import AdamW
from mpillm.training.settings import OptimizerSettings, TrainSettings

__all__ = ["Memory", "StepResult", "Trainer", "resolve_batch"]


@dataclass(frozen=True)
class StepResult:
    """What a step did: `step` counts from 1, loss in nats a token, times in seconds.

    reduce_seconds: of these, waiting for sums of gradients after the last backward pass. auxiliary:
    what mixtures of experts add to the loss that is minimized, else None.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    reduce_seconds: float
    auxiliary: float | None = None


@dataclass(frozen=True)
class Memory:
    """Bytes on a rank.

    weights, gradients, optimizer: what stays, see `docs/parallel.md` for the formula. working: what
    ZeRO has needed so far for gathered weights and for gradients in the making.
    """

    weights: int
    gradients: int
    optimizer: int
    working: int


def resolve_batch(settings: TrainSettings, layout: ParallelSettings) -> TrainSettings:
    """The settings with `micro_batch_size = 0` replaced by a data rank's share of the batch.

    UserError where deterministic mode cannot keep its promise: its tree over the micro-batches
    must have each data rank's block, or each round of all data ranks, as a subtree.
    """
    data_ranks = layout.data * layout.expert
    if settings.deterministic and layout.reduction != "ordered":
        raise UserError(
            f"train.deterministic: parallel.reduction = {layout.reduction!r} promises no bits; set "
            "parallel.reduction = 'ordered'"
        )
    micro = settings.micro_batch_size or -(-settings.batch_size // data_ranks)
    settings = replace(settings, micro_batch_size=min(micro, settings.batch_size))
    if settings.deterministic and _takes_turns(layout):
        if data_ranks & (data_ranks - 1):
            raise UserError(
                f"train.deterministic: with parallel.zero = {layout.zero} the number of data ranks "
                f"(data x expert) must be a power of two, and it is {data_ranks}; use "
                f"{1 << data_ranks.bit_length() - 1} of them"
            )
    elif settings.deterministic and data_ranks > 1:

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


def _takes_turns(layout: ParallelSettings) -> bool:
    """Whether data ranks take micro-batches in turn, and not a block of them each.

    Sharded gradients are summed over the ranks after each micro-batch: the micro-batches of a round
    then stand side by side in the tree over all.
    """
    return layout.zero >= 2


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
        """Collective. `train` must have been through `resolve_batch` for the mesh's layout.

        UserError, on every rank alike, for a layout that the model cannot use.
        """
        model.check_layout(mesh.layout)
        layout = mesh.layout
        self._model = model
        self._train = train
        self._optimizer_settings = optimizer
        self._mesh = mesh
        self._backend = backend
        self._loader = loader
        self._dtype = backend.dtype(train.dtype)
        self.progress = Progress()
        self.stages = build_stages(
            model,
            backend,
            mesh,
            self._dtype,
            train.seed,
            recompute=train.recompute,
            progress=self.progress,
        )
        # Micro-batches that this rank runs in a step, by their numbers in the step.
        rank, ranks = mesh.batch.rank, mesh.batch.size
        rounds = _micros_a_rank(train, ranks)
        self._numbers = (
            range(rank, rank + rounds * ranks, ranks)
            if _takes_turns(layout)
            else range(rank * rounds, (rank + 1) * rounds)
        )
        self.gradients = Gradients(
            self.stages,
            mesh,
            backend,
            self.progress,
            micros=rounds,
            deterministic=train.deterministic,
        )
        self.optimizer = AdamW(self.stages, backend, optimizer, self.progress)
        rows = SharedRows(mesh.tensor, backend, layout.sequence)
        self._executor = Executor(
            mesh.pipe,
            self.stages,
            lambda micro: model.boundary(micro, self._dtype, rows),
            backend,
            self.progress,
        )
        programs = lower(
            SCHEDULES[layout.schedule](layout.pipe, rounds, layout.chunks), layout.chunks
        )
        validate(programs, ranks=layout.pipe, micros=rounds, chunks=layout.chunks)
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
        micros = [
            self._micro(
                self._loader.micro_batch(self.samples_consumed, j), key, self.gradients.sink(place)
            )
            for place, j in enumerate(self._numbers)
        ]
        self.gradients.begin_step()
        outputs = self._executor.run(self._program, micros, (1.0 / tokens,))
        computed = time.perf_counter()
        self.gradients.reduce()
        reduce_seconds = time.perf_counter() - computed
        loss, *auxiliary = (
            pairwise_sum(self._in_order(losses).tolist()) / tokens
            for losses in self._losses(outputs, len(micros))
        )
        norm = self.gradients.norm()
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
        return StepResult(
            self.step_number, loss, lr, norm, tokens, seconds, reduce_seconds, *auxiliary
        )

    def _in_order(self, losses: np.ndarray) -> np.ndarray:
        """Losses (ranks, micros) in the order of the micro-batches' numbers, (ranks * micros,)."""
        return (losses.T if _takes_turns(self._mesh.layout) else losses).reshape(-1)

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
            losses += self._losses(outputs, count)[0].T.reshape(-1).tolist()
        return float(pairwise_sum(losses)) / data.counted_tokens

    def memory(self) -> Memory:
        """Bytes of the training state on this rank; not collective."""
        stores = [stage.store for stage in self.stages]
        held = [arena.stored_bytes for store in stores for arena in store.arenas]
        return Memory(
            weights=sum(weights for weights, _ in held),
            gradients=sum(gradients for _, gradients in held),
            optimizer=self.optimizer.bytes,
            working=stores[0].pool.bytes,  # which all stores share
        )

    def _forward_program(self, micros: int) -> Program:
        """This rank's program for `micros` forward passes and nothing else."""
        if micros not in self._forward_programs:
            pipe, chunks = self._mesh.layout.pipe, self._mesh.layout.chunks
            programs = lower(forward_only(pipe, micros, chunks), chunks)
            self._forward_programs[micros] = programs[self._mesh.pipe.rank]
        return self._forward_programs[micros]

    def state(self) -> Iterator[tuple[str, Param, tuple[int, int] | None, np.ndarray]]:
        """(kind, parameter, range, host copy) of all that this rank keeps of the training state.

        Without a range the array has the shape of the parameter's shard, and all replicas hold the
        same; with one it is that part of the flattened shard, and this rank's alone among them.
        """
        for kind, param, part, view in self.optimizer.state():
            yield kind, param, part, self._backend.to_host(view)

    def restore(
        self, step_number: int, samples_consumed: int, values: Iterable[np.ndarray]
    ) -> None:
        """Put back what `state` gave, in its order, and go on after step `step_number`."""
        for (_, _, _, view), value in zip(self.optimizer.state(), values, strict=True):
            view[...] = self._backend.from_host(value)
        self.step_number = step_number
        self.samples_consumed = samples_consumed

    def _micro(self, batch: MicroBatch, key: int = 0, sink: GradientSink | None = None) -> Micro:
        """This rank's part of a micro-batch; for training when there is a sink for gradients."""
        backend, context = self._backend, self._mesh.context
        mask = backend.from_host(batch.mask.astype(self._dtype))
        whole = Micro(
            tokens=backend.from_host(batch.tokens),
            index=backend.xp.arange(batch.tokens.shape[1]),
            samples=backend.from_host(batch.samples),
            labels=backend.from_host(batch.labels),
            mask=mask,
            counted=mask.sum(axis=1),
            training=sink is not None,
            key=key,
            gradients=sink or GradientSink(),
            progress=self.progress,
        )
        return context_share(whole, backend, context.size, context.rank)

    def _losses(self, outputs: dict[int, Any], micros: int) -> np.ndarray:
        """Losses of the micro-batches of every data rank, float64 (kinds, ranks, micros).

        The same on every rank. kinds: the loss and, where the model has one, the auxiliary loss.
        outputs: by number, the last stage's, float64 of one element each; empty elsewhere.
        """
        mesh, backend, kinds = self._mesh, self._backend, 1 + self._model.auxiliary
        losses = backend.zeros((kinds, mesh.batch.size, micros), "float64")
        if outputs:
            for kind in range(kinds):
                of_kind = [outputs[j][kind].reshape(()) for j in range(micros)]
                losses[kind, mesh.batch.rank] = backend.xp.stack(of_kind)
            # All terms but those of the ranks that share a sequence are zero.
            mesh.replicas.allreduce(losses)
        mesh.pipe.broadcast(losses, root=mesh.pipe.size - 1)
        return backend.to_host(losses)
