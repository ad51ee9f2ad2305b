"""The run folder: made, locked, and the numbers of its attempts."""

from __future__ import annotations

import hashlib
import os
import re
import shutil
from pathlib import Path

from mpillm.checkpoint.store import latest
from mpillm.errors import UserError
from mpillm.storage import disk
from mpillm.training.run_lock import RunLock

__all__ = ["RunLock", "make_folder", "next_attempt", "private_folder", "take_folder"]


def take_folder(folder: Path, fresh: bool) -> RunLock:
    """Make the run folder and lock it; for rank 0, which releases the lock after the last write.

    fresh: a folder that holds checkpoints is kept beside it, under another name. Raises UserError,
    and has changed nothing, where another job works in the folder.
    """
    make_folder(folder)
    lock = RunLock(folder)
    lock.acquire()
    if not fresh or latest(folder / "checkpoints") is None:
        return lock
    try:
        number = 1
        while (kept := folder.with_name(f"{folder.name}.{number}")).exists():
            number += 1
        folder.rename(kept)
    except OSError as error:
        raise UserError(
            f"run.dir = {str(folder)!r}: cannot be renamed to {kept.name}: {error.strerror}"
        ) from None
    finally:
        lock.release()
    make_folder(folder)
    lock = RunLock(folder)
    lock.acquire()
    return lock


def make_folder(folder: Path) -> None:
    """Make the folder and those above it, where they are not there."""
    try:
        disk.make_folder(folder)
    except OSError as error:
        raise UserError(f"run.dir = {str(folder)!r}: cannot be made: {error.strerror}") from None


def private_folder(base: Path, folder: Path) -> Path:
    """The folder below `base` that belongs to the run folder alone; not made.

    `base` may be node-local and serve many runs: the name is the run's and a hash of where it lies.
    """
    where = hashlib.sha256(os.fsencode(folder.absolute())).hexdigest()[:8]
    return base / f"{folder.name}-{where}"


def next_attempt(folder: Path, keep: int = 5) -> int:
    """Make `flight/<number>` for this attempt at the run, and return its number, from 1.

    Only the `keep` newest such folders remain. For rank 0 of the job that holds the run folder.
    """
    flight = folder / "flight"
    flight.mkdir(exist_ok=True)
    names = [path.name for path in flight.iterdir() if path.is_dir() and not path.is_symlink()]
    past = sorted(int(name) for name in names if re.fullmatch("[0-9]{5,9}", name))
    number = past[-1] + 1 if past else 1
    (flight / f"{number:05d}").mkdir()
    for old in past[: max(0, len(past) + 1 - keep)]:
        shutil.rmtree(flight / f"{old:05d}", ignore_errors=True)
    return number
