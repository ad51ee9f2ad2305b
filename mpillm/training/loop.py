"""A training run from settings to the last checkpoint: the one place that sees all the parts."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from msgspec.structs import asdict, replace

from mpillm.array.backend import Backend
from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.store import Item, latest, save
from mpillm.config import dump, to_table
from mpillm.data.loader import EvaluationSet, Loader
from mpillm.data.prepare import PreparedData, prepare
from mpillm.data.tokens import TokenFile
from mpillm.errors import UserError
from mpillm.models.settings import build_model
from mpillm.parallel.launch import agree
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.report.metrics import StepMetrics
from mpillm.report.reporter import Reporter
from mpillm.training.settings import RunConfig
from mpillm.training.trainer import StepResult, Trainer, resolve_batch

if TYPE_CHECKING:
    from mpillm.parallel.launch import Comm

__all__ = ["TrainResult", "make_folder", "open_data", "resolve", "train"]

# Tokens in a micro-batch of the validation, where the training's are not larger.
_EVALUATION_TOKENS = 4096


@dataclass(frozen=True)
class TrainResult:
    """How a run ended: steps done, the last step's loss, the last validation (nats a token)."""

    folder: Path
    step: int
    loss: float | None
    val_loss: float | None


def train(config: RunConfig, comm: Comm, *, fresh: bool = False) -> TrainResult:
    """Train, or go on from the newest checkpoint in the run folder; collective over `comm`.

    fresh: start anew; a folder that holds checkpoints is kept under another name. Returns the same
    on every rank. Raises UserError on every rank for settings that do not fit.
    """
    folder = Path(config.run.dir)
    with agree(comm):
        config = replace(config, parallel=fit(config.parallel, comm.size))
        backend = Backend.create(config.run.backend)
        if comm.rank == 0:
            make_folder(folder, fresh)
    prepared, tokens = open_data(config, comm)
    with agree(comm):
        config = resolve(config, tokens)
        # Found out before any weights are made.
        model = build_model(config.model)
        train_text = tokens.read("train")
        t = config.train
        loader = Loader(train_text, t.sequence_length, t.batch_size, t.micro_batch_size, t.seed)
    recorder = Recorder(folder / "flight" / f"rank-{comm.rank:05d}.bin")
    mesh = Mesh(comm, config.parallel, backend, recorder)
    try:
        trainer = Trainer(model, t, config.optimizer, mesh, backend, loader)
        run = _Run(config, comm, mesh, trainer, tokens, prepared)
        run.restore()
        result = run.go()
    except UserError:  # raised by all ranks alike; another exception must not wait for them here
        mesh.free()
        raise
    mesh.free()
    return result


def make_folder(folder: Path, fresh: bool) -> None:
    """Make the run folder; a fresh start keeps an older run beside it, under another name."""
    if fresh and latest(folder / "checkpoints") is not None:
        number = 1
        while (kept := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(kept)
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise UserError(f"run.dir = {str(folder)!r}: cannot be made: {error.strerror}") from None


def open_data(config: RunConfig, comm: Comm) -> tuple[PreparedData, TokenFile]:
    """The text of a run as tokens in the run's folder, which is there; collective."""
    folder = Path(config.run.dir)
    with agree(comm):
        trained = latest(folder / "checkpoints") is not None
        prepared = prepare(config.data, folder, write=comm.rank == 0, replace=not trained)
    with agree(comm):
        return prepared, TokenFile(prepared.tokens)


def resolve(config: RunConfig, tokens: TokenFile) -> RunConfig:
    """The settings with everything that was left open filled in, and checked against each other."""
    model, length = config.model, config.train.sequence_length
    if model.vocabulary and model.vocabulary < tokens.vocabulary_size:
        raise UserError(
            f"model.vocabulary = {model.vocabulary}: the text has {tokens.vocabulary_size} token "
            f"types; set model.vocabulary >= {tokens.vocabulary_size}, or 0"
        )
    if model.context and model.context < length:
        raise UserError(
            f"train.sequence_length = {length} is longer than model.context = {model.context}; "
            f"set train.sequence_length <= {model.context}"
        )
    return replace(
        config,
        model=replace(
            model,
            vocabulary=model.vocabulary or tokens.vocabulary_size,
            context=model.context or length,
        ),
        train=resolve_batch(config.train, config.parallel),
    )


class _Run:
    """A run in its folder."""

    def __init__(
        self,
        config: RunConfig,
        comm: Comm,
        mesh: Mesh,
        trainer: Trainer,
        tokens: TokenFile,
        prepared: PreparedData,
    ) -> None:
        self._config = config
        self._comm = comm
        self._mesh = mesh
        self._trainer = trainer
        self._tokens = tokens
        self._folder = Path(config.run.dir)
        self._checkpoints = self._folder / "checkpoints"
        self._tokenizer_hash = hashlib.sha256(prepared.tokenizer.read_bytes()).hexdigest()
        self._validation: EvaluationSet | None = None
        if tokens.length("validation"):
            length, rows = config.train.sequence_length, config.train.micro_batch_size
            # Without a backward pass more fits at once.
            rows = max(rows, _EVALUATION_TOKENS // length)
            self._validation = EvaluationSet(tokens.read("validation"), length, rows)

    # -- checkpoints -------------------------------------------------------------------------------

    def restore(self) -> None:
        """Go on from the newest checkpoint, if there is one; collective."""
        newest = self._mesh.world.broadcast_object(
            latest(self._checkpoints) if self._comm.rank == 0 else None
        )
        if newest is None:
            return
        with agree(self._comm), Checkpoint.open(newest) as checkpoint:
            self._check_same_run(checkpoint)
            manifest = checkpoint.manifest
            self._trainer.restore(
                manifest.step,
                manifest.samples,
                (
                    checkpoint.read(kind, param.name, param.shard, part)
                    for kind, param, part, _ in self._trainer.optimizer.state()
                ),
            )

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        """UserError where the checkpoint is of another model or another tokenizer."""
        if checkpoint.manifest.extra.get("tokenizer.json") != self._tokenizer_hash:
            raise UserError(
                f"{self._folder / 'tokenizer.json'} is not the one that {checkpoint.path} was "
                "trained with; put that one back, or start anew with --fresh or another run.dir"
            )
        stored, now = checkpoint.manifest.settings["model"], asdict(self._config.model)
        for key in sorted(stored.keys() | now.keys()):
            if stored.get(key) != now.get(key):
                raise UserError(
                    f"model.{key} = {now.get(key)!r}, but {checkpoint.path} has {stored.get(key)!r}"
                    "; set it back, or start anew with --fresh or another run.dir"
                )

    def _save(self) -> Path:
        """Commit a checkpoint; collective."""
        items, wholes = [], 0
        for kind, param, part, values in self._trainer.state():
            if not param.owner:
                continue
            # What replicas hold alike they share the writing of.
            replicas = param.reduce_over[0]
            if part is not None or wholes % replicas.size == replicas.rank:
                items.append(Item(kind, param.name, param.shard, values, part))
            wholes += part is None
        return save(
            self._checkpoints,
            self._trainer.step_number,
            items,
            self._mesh.world,
            samples=self._trainer.samples_consumed,
            layout=to_table(self._config.parallel),
            settings=to_table(self._config),
            keep=self._config.checkpoint.keep,
            extra={"tokenizer.json": self._tokenizer_hash},
        )

    # -- the loop ----------------------------------------------------------------------------------

    def go(self) -> TrainResult:
        """Train to the last step; collective."""
        steps, start = self._config.train.steps, self._trainer.step_number
        if start >= steps:
            self._say_done(start)
            return TrainResult(self._folder, start, None, None)
        reporter = Reporter.silent()
        if self._comm.rank == 0:
            (self._folder / "config.toml").write_text(dump(self._config), encoding="utf-8")
            reporter = Reporter(self._folder, steps, start)
        try:
            self._introduce(reporter, start)
            return self._steps(reporter)
        finally:
            reporter.close()

    def _steps(self, reporter: Reporter) -> TrainResult:
        """The steps that are left; collective."""
        train, checkpoint = self._config.train, self._config.checkpoint
        while True:
            result = self._trainer.step()
            last = result.step == train.steps
            val_loss = None
            if self._validation is not None and _due(result.step, train.eval_every, last):
                val_loss = self._trainer.evaluate(self._validation)
            reporter.step(_metrics(result, val_loss))
            if _due(result.step, checkpoint.every, last):
                path = self._save()
                reporter.line(f"checkpoint {path}")
            if last:
                break
        reporter.plot(f"{self._folder.name}: {self._config.model.family}, {self._mesh.describe()}")
        if val_loss is not None:
            reporter.line(f"validation loss {val_loss:.4f} nats a token over the whole split")
        reporter.line(f"done: {result.step} steps, all in {self._folder}")
        return TrainResult(self._folder, result.step, result.loss, val_loss)

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
        if start:
            reporter.line(f"resumed after step {start} from {self._checkpoints}")

    def _say_done(self, step: int) -> None:
        if self._comm.rank == 0:
            print(
                f"{self._folder} is complete: {step} of {self._config.train.steps} steps; "
                "raise train.steps to go on, or start anew with --fresh"
            )


def _due(step: int, every: int, last: bool) -> bool:
    """Whether something done every so many steps, and after the last one, is due."""
    return last or (every > 0 and step % every == 0)


def _metrics(result: StepResult, val_loss: float | None) -> StepMetrics:
    return StepMetrics(
        step=result.step,
        loss=result.loss,
        lr=result.lr,
        grad_norm=result.grad_norm,
        tokens_per_second=result.tokens / result.seconds,
        step_seconds=result.seconds,
        val_loss=val_loss,
        auxiliary_loss=result.auxiliary,
    )
