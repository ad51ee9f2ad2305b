"""Saving: the writers write their files, then rank 0 commits them all; at once or beside training.

No parallel HDF5: nothing is collective but two gathers and three small broadcasts. `commit.py` has
the protocol on disk, `node.py` the way to fewer writers, `docs/checkpoint-format.md` the format.

Beside training, a thread copies this rank's items, and then writes them while the arrays change.
When all ranks have written, rank 0 commits, in a thread as well. The threads call neither MPI nor
HDF5, and a process may end while they run: what they leave is an unfinished folder.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from copy import deepcopy
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from mpillm.checkpoint.commit import commit, discard, prepare, retire, temporary_folder
from mpillm.checkpoint.copies import Copies
from mpillm.checkpoint.files import latest, step_name
from mpillm.checkpoint.item import Item, Part
from mpillm.checkpoint.manifest import File
from mpillm.checkpoint.node import Handing, Node
from mpillm.checkpoint.settings import CheckpointSettings
from mpillm.checkpoint.shard_file import ShardWriter, Slot, write_shard
from mpillm.checkpoint.store import Facts, Report, World, manifest_of, reason
from mpillm.checkpoint.task import Task
from mpillm.errors import UserError

__all__ = ["Saver"]

_METADATA = 1024  # bytes of HDF5 and manifest that the free-space check allows for an item


class Saver:
    """Saves the checkpoints of a run; every rank makes one and the same calls.

    Only one save is under way at a time: the next one waits for it. What fails on one rank, such as
    a disk that is full, raises the same UserError on every rank, by `save`, `begin`, `commit` or
    `finish`, and leaves the checkpoints that were there.
    """

    def __init__(
        self,
        folder: Path,
        world: World,
        node: Node,
        settings: CheckpointSettings,
        activity: Callable[[str], AbstractContextManager[Any]] | None = None,
    ) -> None:
        """`folder` is where the checkpoints lie, on a disk that every rank sees.

        node: the ranks of this rank's node. activity: entered as "save" around whatever keeps the
        caller waiting.
        """
        self.folder = folder
        self.committed: Path | None = None
        """The last checkpoint that is known to stand: on rank 0 at once, on others by `finish`."""
        self.stall_seconds = 0.0
        """How long the last save, and what waited for it, has kept the caller, in seconds."""
        self._world = world
        self._node = node
        self._settings = settings
        self._activity = activity or (lambda name: nullcontext())
        self._copies = Copies()
        self._job: _Job | None = None

    @property
    def under_way(self) -> bool:
        """Whether a save has begun that `commit` was not yet called for; the same on all ranks."""
        return self._job is not None and not self._job.gathered

    @property
    def written(self) -> bool:
        """Whether this rank has nothing left to write; not collective."""
        return self._job is None or self._job.written()

    def save(
        self,
        step: int,
        items: Sequence[Item],
        *,
        samples: int,
        layout: Mapping[str, Any],
        settings: Mapping[str, Any],
        state: Mapping[str, Any] | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> Path:
        """Write and commit the checkpoint of a step; collective. Returns its folder.

        items: what this rank has to write, maybe nothing. samples: consumed since the start of the
        run. state: a table of plain values that the run goes on from. extra: sha256 of other files
        that the run depends on, by name. A checkpoint of the same step is replaced; older ones are
        removed as the settings say.

        Items that do not tile their arrays raise ValueError on every rank.
        """
        facts = Facts(step, samples, layout, settings, state or {}, extra or {})
        with self._held(anew=True):
            self._finish()
            handing, path = self._prepare(step, items)
            handing.send()
            verify = self._settings.verify
            report = self._reported(lambda: write_shard(path, handing.items, verify=verify))
            if report.error:
                handing.drain()
            self._job = _Job(facts, lambda: report)
            self._finish()
        return self.folder / step_name(step)

    def begin(
        self,
        step: int,
        items: Sequence[Item],
        *,
        samples: int,
        layout: Mapping[str, Any],
        settings: Mapping[str, Any],
        state: Mapping[str, Any] | None = None,
        extra: Mapping[str, str] | None = None,
    ) -> None:
        """Begin what `save` does, and return while it is under way; collective.

        The items' arrays must stay as they are until `copied` has returned. Once `written` is true
        on all ranks they call `commit`, or `finish` at any time. Takes as much memory as the items
        have bytes, once for all saves.
        """
        facts = deepcopy(Facts(step, samples, layout, settings, state or {}, extra or {}))
        with self._held(anew=True):
            self._finish()
            handing, path = self._prepare(step, items)
            handing.send()
            writer = ShardWriter(path, verify=self._settings.verify)
            slots = [
                writer.reserve(i.kind, i.name, i.shard, i.range, i.dtype) for i in handing.items
            ]
            writer.seal()
            copies, later = self._copies.take(handing.items)
            copied = threading.Event()

            def write() -> Report:
                try:
                    for copy, array in later:
                        np.copyto(copy, array)
                finally:
                    copied.set()
                return self._reported(lambda: _fill(writer, slots, copies))

            task = Task(write)
            self._job = _Job(facts, task.result, lambda: task.done, copied)

    def copied(self) -> None:
        """Wait until the arrays of the save that has begun may change; not collective."""
        if self._job is not None and not self._job.copied.is_set():
            with self._held():
                self._job.copied.wait()

    def commit(self) -> None:
        """Have rank 0 commit what all ranks have written, if anything is under way; collective."""
        if self.under_way:
            with self._held():
                self._commit()

    def finish(self) -> Path | None:
        """Wait until the save that is under way is committed; collective.

        Returns its folder; None when there is none.
        """
        if self._job is None:
            return None
        with self._held():
            return self._finish()

    # -- how it is done ----------------------------------------------------------------------------

    @contextmanager
    def _held(self, *, anew: bool = False) -> Iterator[None]:
        """Count how long the caller is kept."""
        start = time.perf_counter()
        self.stall_seconds *= not anew
        try:
            with self._activity("save"):
                yield
        finally:
            self.stall_seconds += time.perf_counter() - start

    def _prepare(self, step: int, items: Sequence[Item]) -> tuple[Handing, Path]:
        """Make the folder to write in; what this rank is to write, and to which file."""
        sizes = self._world.gather_objects(sum(item.nbytes + _METADATA for item in items))
        error = None
        if sizes is not None:
            work = partial(prepare, self.folder, step, sum(sizes))
            error = self._attempt(f"write the checkpoint of step {step}", work)
        self._raise(error)
        path = temporary_folder(self.folder, step) / f"shard-{self._world.rank:05d}.h5"
        return Handing(items, self._node, self._settings.writers_per_node), path

    def _reported(self, write: Callable[[], tuple[File | None, tuple[Part, ...]]]) -> Report:
        """Write this rank's file; a failure of the file system becomes a report."""
        try:
            return Report(None, *write())
        except (OSError, UserError) as error:
            rank = self._world.rank
            return Report(f"shard-{rank:05d}.h5 on rank {rank}: {reason(error)}")

    def _commit(self) -> None:
        job = self._job
        if job is None or job.gathered:
            return
        reports = self._world.gather_objects(job.report())
        job.gathered = True
        if reports is not None:
            job.conclusion = Task(partial(self._conclude, job.facts, reports))
        if self._world.broadcast_object(any(report.error for report in reports or ())):
            self._finish()

    def _finish(self) -> Path | None:
        self._commit()
        job, self._job = self._job, None
        if job is None:
            return None
        self._raise(job.conclusion.result() if job.conclusion else None)
        self.committed = self.folder / step_name(job.facts.step)
        return self.committed

    def _conclude(self, facts: Facts, reports: Sequence[Report]) -> Exception | None:
        """Commit, then remove what is no longer wanted; on rank 0, maybe in a thread."""
        step, settings = facts.step, self._settings

        def work() -> None:
            self.committed = commit(self.folder, manifest_of(facts, reports))

        error = self._attempt(f"write the checkpoint of step {step}", work)
        if error:
            discard(temporary_folder(self.folder, step))
            return error
        work = partial(retire, self.folder, step, settings.keep, settings.keep_every)
        return self._attempt("remove old checkpoints", work)

    def _attempt(self, task: str, work: Callable[[], None]) -> Exception | None:
        """What all ranks are to raise when work on rank 0 fails."""
        try:
            work()
        except (OSError, UserError) as cause:
            last = latest(self.folder)
            remains = f"{last.name} is the last complete one" if last else "none is complete"
            return UserError(f"cannot {task} in {self.folder}: {reason(cause)}; {remains}")
        except ValueError as cause:
            return cause
        return None

    def _raise(self, error: Exception | None) -> None:
        """Raise rank 0's error, if there is one, on every rank."""
        error = self._world.broadcast_object(error)
        if error is not None:
            raise error


@dataclass
class _Job:
    """A save that is under way."""

    facts: Facts
    report: Callable[[], Report]
    """Waits for this rank's writing."""
    written: Callable[[], bool] = lambda: True
    copied: threading.Event = field(default_factory=threading.Event)
    gathered: bool = False
    conclusion: Task[Exception | None] | None = None


def _fill(
    writer: ShardWriter, slots: Sequence[Slot | None], arrays: Sequence[npt.NDArray[Any]]
) -> tuple[File | None, tuple[Part, ...]]:
    """Write a file whose items have been reserved."""
    with writer:
        for slot, array in zip(slots, arrays, strict=True):
            writer.fill(slot, array)
        return writer.close()
