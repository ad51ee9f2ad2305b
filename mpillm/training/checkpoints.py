"""The checkpoints of a run: gone on from, and written."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import asdict

from mpillm.checkpoint.files import list_checkpoints
from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.saver import Saver
from mpillm.checkpoint.shard_file import Item
from mpillm.config import to_table
from mpillm.errors import UserError
from mpillm.parallel.launch import agree
from mpillm.parallel.mesh import Mesh
from mpillm.storage.disk import Damaged
from mpillm.training.saving import mine
from mpillm.training.settings import RunConfig
from mpillm.training.trainer import Trainer

if TYPE_CHECKING:
    from mpillm.parallel.launch import Comm

__all__ = ["Checkpoints"]


class Checkpoints:
    """What a run saves and goes on from. Methods are collective, unless they say they are not."""

    def __init__(
        self,
        config: RunConfig,
        comm: Comm,
        mesh: Mesh,
        trainer: Trainer,
        tokenizer: Path,
        say: Callable[[str], None],
    ) -> None:
        """tokenizer: the file that the run's token ids come from. say: tells the user a line."""
        self.folder = Path(config.run.dir) / "checkpoints"
        self._config = config
        self._comm = comm
        self._mesh = mesh
        self._trainer = trainer
        self._tokenizer = tokenizer
        self._tokenizer_hash = hashlib.sha256(tokenizer.read_bytes()).hexdigest()
        self._say = say
        self._told: Path | None = None
        self._beside = False  # whether the save that is told of next is one beside the training
        self._saver = Saver(
            self.folder, mesh.world, mesh.node, config.checkpoint, mesh.recorder.activity
        )

    # -- going on ----------------------------------------------------------------------------------

    def restore(self) -> None:
        """Go on from the newest checkpoint that is whole, if there is any.

        One that is damaged is named, and the one before it is tried. UserError when none is whole,
        and for one that is not of this run.
        """
        found = list_checkpoints(self.folder) if self._comm.rank == 0 else []
        found = self._mesh.world.broadcast_object(found[::-1])
        first = None
        for path in found:
            try:
                with Checkpoint.open(path, self._mesh.world) as checkpoint, agree(self._comm):
                    self._load(checkpoint)
                return
            except Damaged as damage:
                first = first or damage
                self._say(f"{path.name} cannot be used, and the one before is tried: {damage}")
        if first is not None:
            raise UserError(
                f"none of the {len(found)} checkpoints in {self.folder} is whole ({first}); put a "
                "good copy back, or start anew with --fresh"
            )

    def _load(self, checkpoint: Checkpoint) -> None:
        """Put the checkpoint's state into the trainer; not collective."""
        self._check_same_run(checkpoint)
        manifest, trainer = checkpoint.manifest, self._trainer
        values = (
            checkpoint.read(kind, param.name, param.shard, part)
            for kind, param, part, _ in trainer.optimizer.state()
        )
        trainer.restore(manifest.step, manifest.samples, values, manifest.state)

    def _check_same_run(self, checkpoint: Checkpoint) -> None:
        """UserError where the checkpoint is of another model or another tokenizer."""
        if checkpoint.manifest.extra.get("tokenizer.json") != self._tokenizer_hash:
            raise UserError(
                f"{self._tokenizer} is not the one that {checkpoint.path} was trained with; put "
                "that one back, or start anew with --fresh or another run.dir"
            )
        stored, now = checkpoint.manifest.settings["model"], asdict(self._config.model)
        for key in sorted(stored.keys() | now.keys()):
            if stored.get(key) != now.get(key):
                raise UserError(
                    f"model.{key} = {now.get(key)!r}, but {checkpoint.path} has {stored.get(key)!r}"
                    "; set it back, or start anew with --fresh or another run.dir"
                )

    # -- saving ------------------------------------------------------------------------------------

    @property
    def writing(self) -> bool:
        """Whether this rank still writes a checkpoint beside the training; not collective."""
        return not self._saver.written

    def copied(self) -> None:
        """Wait until what is being saved may be changed; not collective."""
        self._saver.copied()

    def save(self, *, beside: bool) -> None:
        """Save the state; with `beside`, training may go on while it is written."""
        self.finish()
        self._beside = beside
        items = [
            Item(kind, param.name, param.shard, values, part)
            for kind, param, part, values in mine(self._trainer.state())
        ]
        write = self._saver.begin if beside else self._saver.save
        write(
            self._trainer.step_number,
            items,
            samples=self._trainer.samples_consumed,
            layout=to_table(self._config.parallel),
            settings=to_table(self._config),
            state=self._trainer.extra_state(),
            extra={"tokenizer.json": self._tokenizer_hash},
        )
        self._tell()

    def commit(self) -> None:
        """Every rank has written what a save beside the training has: make it count."""
        self._saver.commit()
        self._tell()

    def finish(self) -> None:
        """Complete what is being written."""
        self._saver.finish()
        self._tell()

    def _tell(self) -> None:
        """Say which checkpoint now stands; on rank 0, who knows first."""
        path, kept = self._saver.committed, self._saver.stall_seconds
        if path is not None and path != self._told:
            waited = f" (training waited {kept:.3f} s)" if self._beside else ""
            self._say(f"checkpoint {path}{waited}")
            self._told = path
