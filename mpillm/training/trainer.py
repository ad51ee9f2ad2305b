"""A model in training on a mesh: what a step and an evaluation do."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np

from mpillm.array.backend import Backend
from mpillm.array.random import fold
from mpillm.array.tally import Clock
from mpillm.data.loader import EvaluationSet, Loader, MicroBatch
from mpillm.models.model import Model, build_stages
from mpillm.nn.layer import GradientSink, Layer, Micro
from mpillm.nn.param import Param
from mpillm.nn.ring import context_share
from mpillm.nn.rows import SharedRows
from mpillm.parallel.group import pairwise_sum
from mpillm.parallel.mesh import Mesh
from mpillm.parallel.pipeline import Executor
from mpillm.parallel.programs import Program, lower, turns_at_once, validate
from mpillm.parallel.progress import Progress
from mpillm.parallel.schedules import SCHEDULES, forward_only
from mpillm.training.batch import micros_a_rank, resolve_batch, takes_turns
from mpillm.training.gradients import Gradients
from mpillm.training.health import Health, Verdict
from mpillm.training.learning_rate import learning_rate
from mpillm.training.optimizer import AdamW
from mpillm.training.settings import OptimizerSettings, TrainSettings
from mpillm.training.verdict import Verdicts
from mpillm.training.watch import Watch

__all__ = ["Memory", "StepResult", "Trainer", "resolve_batch"]


@dataclass(frozen=True)
class StepResult:
    """What a step did: `step` counts from 1, loss in nats a token, times in seconds.

    reduce_seconds: of these, waiting for sums of gradients after the last backward pass. auxiliary:
    what mixtures of experts add to the loss that is minimized, else None. skipped: why the update
    was not applied, "not finite: ..." or "spike: ...", the same on every rank; None where it was.
    notes: the largest of each note over all ranks.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens: int
    seconds: float
    reduce_seconds: float
    auxiliary: float | None = None
    skipped: str | None = None
    notes: tuple[int, ...] = ()


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
        clock: Clock | None = None,
    ) -> None:
        """Collective. `train` must have been through `resolve_batch` for the mesh's layout.

        clock: started and stopped with every step, of whose time it is to keep account.

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
        self._clock = clock or Clock()
        self._dtype = backend.dtype(train.dtype)
        self.progress = Progress(mesh.recorder)
        self.stages = build_stages(
            model,
            backend,
            mesh,
            self._dtype,
            train.seed,
            recompute=train.recompute,
            # Only the sums of deterministic mode are of one use each.
            uses_apart=train.deterministic,
            progress=self.progress,
        )
        # Micro-batches that this rank runs in a step, by their numbers in the step.
        rank, ranks = mesh.batch.rank, mesh.batch.size
        rounds = micros_a_rank(train, ranks)
        self._numbers = (
            range(rank, rank + rounds * ranks, ranks)
            if takes_turns(layout)
            else range(rank * rounds, (rank + 1) * rounds)
        )
        self._watch = Watch(model, self.stages, mesh, backend, self._numbers)
        self.gradients = Gradients(
            self.stages,
            mesh,
            backend,
            self.progress,
            micros=rounds,
            deterministic=train.deterministic,
            watch=self._watch,
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
        # Deterministic mode wants each micro-batch's gradient for itself, the head's too.
        self._fused = turns_at_once(self._program, layout.chunks - 1, weights=train.deterministic)
        self._forward_programs: dict[int, Program] = {}
        # Steps done, and sequences that they took from the data, over all ranks.
        self.step_number = 0
        self.samples_consumed = 0
        self.health = Health(train)
        self._verdicts = Verdicts(mesh, backend, self.health, self._watch)

    # What is not finite is told by the verdict; NumPy's warnings would come from every rank.
    @np.errstate(over="ignore", divide="ignore", invalid="ignore")
    def step(
        self, notes: Sequence[int] = (), before_update: Callable[[], None] | None = None
    ) -> StepResult:
        """One optimizer step.

        Its update is skipped on all ranks where the loss, the gradient norm or what the optimizer
        would make of them is not finite, or the loss a spike; the step counts as done, as the same
        batch would give the same again. UserError, on every rank alike, after `train.max_skipped`
        of these in a row.

        notes: numbers to agree about, as many on every rank; they travel with the verdicts.
        before_update: called right before weights or moments are changed.
        """
        clock = self._clock
        clock.start()
        self._watch.begin_step()
        with clock.during("optimizer"):
            self.gradients.begin_step()
        with clock.during("input"):
            tokens = self._loader.counted_tokens(self.samples_consumed)
            scale = 1.0 / tokens
            micros = self._micros(scale if self._fused else None)
        outputs = self._executor.run(self._program, micros, (scale,))
        computed = time.perf_counter()
        self.gradients.reduce()
        reduce_seconds = time.perf_counter() - computed
        of_micros = [self._in_order(kind) for kind in self._losses(outputs, len(self._numbers))]
        loss, *auxiliary = losses = [pairwise_sum(x.tolist()) / tokens for x in of_micros]
        with clock.during("optimizer"):
            norm = self.gradients.norm()
        lr = learning_rate(self.step_number, self._train.steps, self._optimizer_settings)
        clean, overflows = self._watch.clean(), self.optimizer.overflows(norm)
        mine = self.health.judge(losses, norm, clean=clean, overflows=overflows)
        verdict, agreed = self._verdicts.agree(mine[0], notes)
        skipped = None
        if verdict is not Verdict.GOOD:
            skipped = self._verdicts.explain(
                verdict, mine, of_micros, self.optimizer.state(), self._repeat
            )
        self.step_number += 1
        self.samples_consumed += self._train.batch_size
        if skipped is None:
            if before_update is not None:
                with clock.during("checkpoint"):
                    before_update()
            with clock.during("optimizer"):
                self.optimizer.step(self.step_number - self.health.skipped, lr, norm)
            self.health.accept(loss)
        else:
            self.health.skip(self.step_number, skipped)
        self._backend.synchronize()
        seconds = clock.stop()
        return StepResult(
            self.step_number,
            loss,
            lr,
            norm,
            tokens,
            seconds,
            reduce_seconds,
            auxiliary[0] if auxiliary else None,
            skipped,
            agreed,
        )

    def _micros(self, scale: float | None = None) -> list[Micro]:
        """This rank's micro-batches of the step; scale: see `Micro`."""
        key = fold(self._train.seed, "step", self.step_number)
        batches = (self._loader.micro_batch(self.samples_consumed, j) for j in self._numbers)
        return [
            replace(
                self._micro(batch, key, self.gradients.sink(place), self._watch.outputs_of(place)),
                scale=scale,
            )
            for place, batch in enumerate(batches)
        ]

    def _repeat(self) -> None:
        """Run the step's forward passes once more, one by one: each is kept to its end."""
        for micro in self._micros():
            self._executor.run(self._forward_program(1), [micro])

    def _in_order(self, losses: np.ndarray) -> np.ndarray:
        """Losses (ranks, micros) in the order of the micro-batches' numbers, (ranks * micros,)."""
        return (losses.T if takes_turns(self._mesh.layout) else losses).reshape(-1)

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

    def extra_state(self) -> dict[str, Any]:
        """What a checkpoint keeps beside arrays, step and samples; JSON-able, the same anywhere."""
        return {"health": self.health.state()}

    def restore(
        self,
        step_number: int,
        samples_consumed: int,
        values: Iterable[np.ndarray],
        extra_state: Mapping[str, Any] | None = None,
    ) -> None:
        """Put back what `state` gave, in its order, and go on after step `step_number`.

        extra_state: what `extra_state` gave; without it, or parts of it, these begin anew.
        """
        self.health.restore((extra_state or {}).get("health", {}), step_number)
        for (_, _, _, view), value in zip(self.optimizer.state(), values, strict=True):
            view[...] = self._backend.from_host(value)
        self.step_number = step_number
        self.samples_consumed = samples_consumed

    def _micro(
        self,
        batch: MicroBatch,
        key: int = 0,
        sink: GradientSink | None = None,
        watch: Callable[[Layer, tuple[Any, ...]], None] | None = None,
    ) -> Micro:
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
            watch=watch,
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
