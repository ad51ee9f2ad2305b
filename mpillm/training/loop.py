"""A training run from settings to the last checkpoint: the one place that sees all the parts."""

from __future__ import annotations

import contextlib
import time
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import replace

from mpillm.array.backend import Backend
from mpillm.checkpoint.commit import clean
from mpillm.config import dump
from mpillm.data.loader import EvaluationSet, Loader
from mpillm.data.prepare import PreparedData
from mpillm.data.tokens import TokenFile
from mpillm.errors import UserError
from mpillm.models.settings import build_model
from mpillm.parallel.launch import abort, agree, core_share
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.watchdog import Watchdog
from mpillm.report.metrics import StepMetrics
from mpillm.report.reporter import Reporter
from mpillm.storage.disk import write_atomically
from mpillm.training.checkpoints import Checkpoints
from mpillm.training.folder import take_folder
from mpillm.training.meter import Meter, Reading
from mpillm.training.replicas import check_replicas
from mpillm.training.settings import RunConfig
from mpillm.training.setup import mesh_of, open_data, open_recorder, resolve
from mpillm.training.stopping import STOP, Stopping
from mpillm.training.trainer import StepResult, Trainer

if TYPE_CHECKING:
    from mpillm.parallel.launch import Comm

__all__ = ["TrainResult", "train"]

# Tokens in a micro-batch of the validation, where the training's are not larger.
_EVALUATION_TOKENS = 4096

# Bytes a second that a rank is taken to save with, for ending in time, until it has saved once.
_SLOW_DISK = 100e6


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: steps done, the last step's loss, the last validation (nats a token).

    stopped: why it ended before its last step, saved and to be gone on with; None when complete.
    """

    folder: Path
    step: int
    loss: float | None
    val_loss: float | None
    stopped: str | None = None


def train(config: RunConfig, comm: Comm, *, fresh: bool = False) -> TrainResult:
    """Train, or go on from the newest good checkpoint in the run folder; collective over `comm`.

    fresh: start anew; a folder that holds checkpoints is kept under another name. Returns the same
    on every rank. Raises UserError on every rank for settings that do not fit, and where another
    job is at work in the folder.
    """
    folder = Path(config.run.dir)
    with agree(comm):
        config = replace(config, parallel=fit(config.parallel, comm.size))
        backend = Backend.create(config.run.backend, dtype=config.train.dtype)
        stopping = Stopping(config.run, folder, comm.rank)
    with contextlib.ExitStack() as stack:
        stack.enter_context(stopping)
        with agree(comm):
            if comm.rank == 0:
                # Released last of all, when no rank writes any more.
                stack.callback(take_folder(folder, fresh).release)
                stopping.refuse()
                clean(folder / "checkpoints")
        recorder, reports = open_recorder(config, comm)
        limits = config.run.hang_timeout, config.run.slow_timeout
        stack.enter_context(Watchdog(recorder, reports, abort, *limits))
        cores = core_share(comm)
        meter = Meter(backend, recorder, profile=config.run.profile, cores=cores)
        with recorder.activity("set up"):
            prepared, tokens = open_data(config, comm)
            with agree(comm):
                config = resolve(config, tokens)
                # Found out before any weights are made.
                model = build_model(config.model)
                text, t = tokens.read("train"), config.train
                loader = Loader(text, t.sequence_length, t.batch_size, t.micro_batch_size, t.seed)
            mesh = stack.enter_context(mesh_of(comm, config, backend, recorder))
            trainer = Trainer(
                model, t, config.optimizer, mesh, meter.backend, loader, clock=meter.clock
            )
            run = _Run(config, comm, mesh, trainer, meter, tokens, prepared, stopping)
            with recorder.activity("load"):
                run.restore()
            recorder.step, recorder.samples = trainer.step_number, trainer.samples_consumed
        result = run.go()
        recorder.goodbye(f"stopped by {result.stopped}" if result.stopped else "complete")
    return result


class _Run:
    """A run in its folder."""

    def __init__(
        self,
        config: RunConfig,
        comm: Comm,
        mesh: Mesh,
        trainer: Trainer,
        meter: Meter,
        tokens: TokenFile,
        prepared: PreparedData,
        stopping: Stopping,
    ) -> None:
        self._config = config
        self._comm = comm
        self._mesh = mesh
        self._trainer = trainer
        self._meter = meter
        self._tokens = tokens
        self._stopping = stopping
        self._folder = Path(config.run.dir)
        self._news: list[str] = []  # from before there is a reporter
        self._checkpoints = Checkpoints(
            config, comm, mesh, trainer, prepared.tokenizer, self._news.append
        )
        self._validation: EvaluationSet | None = None
        if tokens.length("validation"):
            length, rows = config.train.sequence_length, config.train.micro_batch_size
            # Without a backward pass more fits at once.
            rows = max(rows, _EVALUATION_TOKENS // length)
            self._validation = EvaluationSet(tokens.read("validation"), length, rows)

    def restore(self) -> None:
        """Go on from the newest checkpoint that is whole, if there is one; collective."""
        self._checkpoints.restore()

    def go(self) -> TrainResult:
        """Train to the last step, or to where the run is stopped; collective."""
        steps, start = self._config.train.steps, self._trainer.step_number
        if start >= steps:
            self._say_done(start)
            return TrainResult(self._folder, start, None, None)
        reporter = Reporter.silent()
        if self._comm.rank == 0:
            text = dump(self._config).encode()
            write_atomically(self._folder / "config.toml", lambda path: path.write_bytes(text))
            reporter = Reporter(self._folder, steps, start)
        try:
            self._introduce(reporter, start)
            return self._steps(reporter)
        except UserError:  # raised by all ranks alike: what has begun to be saved shall stand
            self._checkpoints.finish()
            self._tell(reporter)
            raise
        finally:
            reporter.close()

    def _steps(self, reporter: Reporter) -> TrainResult:
        """The steps that are left; collective."""
        train, checkpoint, run = self._config.train, self._config.checkpoint, self._config.run
        recorder, checkpoints, meter = self._mesh.recorder, self._checkpoints, self._meter
        while True:
            begin = time.monotonic()
            meter.begin_step()
            result = self._trainer.step(
                (self._stopping.note(), int(checkpoints.writing)), checkpoints.copied
            )
            recorder.step, recorder.samples = result.step, self._trainer.samples_consumed
            note, writing = result.notes
            last = result.step == train.steps
            stop = note >= STOP and not last
            if not writing:
                checkpoints.commit()
            with recorder.activity("measure"):
                reading = meter.end_step(result.seconds, self._mesh.world)
            if run.check_replicas and result.step % run.check_replicas == 0:
                check_replicas(self._trainer, self._mesh, self._meter.backend)
            val_loss = None
            if self._validation and not stop and _due(result.step, train.eval_every, last):
                with recorder.activity("evaluate"):
                    val_loss = self._trainer.evaluate(self._validation)
            metrics = _metrics(result, reading, self._trainer.samples_consumed, val_loss)
            reporter.step(metrics, reading.ranks)
            if result.skipped:
                reporter.line(f"step {result.step}: the update was skipped: {result.skipped}")
            self._stopping.took(step=time.monotonic() - begin)
            if note or _due(result.step, checkpoint.every, last):
                self._save(beside=checkpoint.async_ and not (note or last))
                self._stopping.obeyed(note)
            self._tell(reporter)
            if last or stop:
                break
        reporter.line(meter.summary())
        reporter.breakdown()
        if stop:
            reason = self._stopping.reason(note)
            reporter.line(f"stopped by {reason} after step {result.step}; the same command goes on")
            return TrainResult(self._folder, result.step, result.loss, None, reason)
        title = f"{self._folder.name}: {self._config.model.family}, {self._mesh.describe()}"
        with recorder.activity("plot"):
            reporter.plot(title)
        if val_loss is not None:
            reporter.line(f"validation loss {val_loss:.4f} nats a token over the whole split")
        reporter.line(f"done: {result.step} steps, all in {self._folder}")
        return TrainResult(self._folder, result.step, result.loss, val_loss)

    def _save(self, *, beside: bool) -> None:
        """Save the state, now or beside the steps that follow; collective."""
        begin = time.monotonic()
        self._checkpoints.save(beside=beside)
        self._stopping.took(save=time.monotonic() - begin)

    def _tell(self, reporter: Reporter) -> None:
        """Report what has happened to checkpoints since the last time."""
        while self._news:
            reporter.line(self._news.pop(0))

    def _introduce(self, reporter: Reporter, start: int) -> None:
        """Say what is about to be trained on what; collective."""
        config, train = self._config, self._config.train
        mine = {
            (param.name, param.shard.start): param.shard.size
            for stage in self._trainer.stages
            for param in stage.store.params
        }
        held: dict[tuple[str, tuple[int, ...]], int] = {}
        for shards in self._mesh.model.allgather_objects(mine):
            held.update(shards)
        count = sum(held.values())
        pipeline = f", {config.parallel.schedule} schedule" if config.parallel.pipe > 1 else ""
        reporter.line(
            f"{config.model.family}: {count:,} parameters, {train.dtype}; "
            f"layout {self._mesh.describe()}{pipeline}"
        )
        reporter.line(
            f"text: {self._tokens.length('train'):,} tokens to train on, "
            f"{self._tokens.length('validation'):,} to validate on, "
            f"{self._tokens.vocabulary_size} types; "
            f"{train.batch_size} x {train.sequence_length} tokens a step"
        )
        memory = self._trainer.memory()
        parts = (memory.weights, memory.gradients, memory.optimizer)
        largest = np.max(self._mesh.world.allgather_objects(parts), axis=0) / 2**20
        weights, gradients, moments = (f"{size:,.1f} MiB" for size in largest)
        sharing = f", ZeRO {config.parallel.zero}" if config.parallel.zero else ""
        reporter.line(
            f"largest rank{sharing}: weights {weights}, gradients {gradients}, optimizer {moments}"
        )
        self._stopping.took(save=float(sum(largest)) * 2**20 / _SLOW_DISK)
        self._tell(reporter)
        if start:
            reporter.line(f"resumed after step {start} from {self._checkpoints.folder}")

    def _say_done(self, step: int) -> None:
        if self._comm.rank == 0:
            print(
                f"{self._folder} is complete: {step} of {self._config.train.steps} steps; "
                "raise train.steps to go on, or start anew with --fresh"
            )


def _due(step: int, every: int, last: bool) -> bool:
    """Whether something done every so many steps, and after the last one, is due."""
    return last or (every > 0 and step % every == 0)


def _metrics(
    result: StepResult, reading: Reading, samples: int, val_loss: float | None
) -> StepMetrics:
    return StepMetrics(
        step=result.step,
        samples=samples,
        loss=result.loss,
        lr=result.lr,
        grad_norm=result.grad_norm,
        tokens_per_second=result.tokens / result.seconds,
        step_seconds=result.seconds,
        val_loss=val_loss,
        auxiliary_loss=result.auxiliary,
        skipped=result.skipped,
        gflops=reading.gflops,
        mfu=reading.mfu,
    )
