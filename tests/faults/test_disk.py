"""A disk that is full, read-only or broken at any one call of a save.

The n-th call that changes the disk fails, for every n, and every call after it too (a full disk
stays full) or none (a passing error). Short form: a full disk, at every third call. Long form: four
errors at every call, passing and staying.
"""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_fakes import items_of, save_ranks, state
from disk_calls import Call, DiskCalls
from fault_table import Table

from mpillm.checkpoint.commit import clean
from mpillm.checkpoint.files import latest, list_checkpoints
from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.verify import verify
from mpillm.errors import UserError
from mpillm.parallel.shard import Shard

Run = Callable[..., "subprocess.CompletedProcess[str]"]

WAYS: dict[str, dict[str, Any]] = {
    "synchronous save": {},
    "asynchronous save": {"beside": True},
    "save by one writer": {"writers_per_node": 1},
    "asynchronous save by one writer": {"writers_per_node": 1, "beside": True},
}
FAILING = ("create", "write", "fsync", "rename", "mkdir", "open")


class Failing(DiskCalls):
    """Fails the n-th call that changes the disk, and, if it stays, all after it."""

    def __init__(self, folder: Path, number: int, code: int, stays: bool) -> None:
        super().__init__(folder, self._fail)
        self.left, self._code, self._stays = number, code, stays
        self.failed: Call | None = None

    def _fail(self, call: Call) -> None:
        if call.name not in FAILING:
            return
        # Not of these: a file that cannot be looked at counts as damaged, and nothing is removed
        # for its sake; what cannot be removed is left for the next save.
        name = Path(call.path).name
        if call.name == "open" and (Path(name).suffix or name.startswith(".tmp-removed")):
            return
        self.left -= 1
        if self.left == 0 or (self.left < 0 and self._stays):
            self.failed = self.failed or call
            raise OSError(self._code, os.strerror(self._code), call.path)


def holds(path: Path) -> int:
    """See that a checkpoint is whole; returns the seed of its state."""
    assert verify(path) == []
    with Checkpoint.open(path) as checkpoint:
        seed = int(checkpoint.manifest.state["seed"])
        for name, array in state(seed).items():
            got = checkpoint.read("parameter", name, Shard.whole(array.shape))
            assert np.array_equal(got, array)
    return seed


def cases(
    before: Path, folder: Path, code: int, stays: bool, stride: int, options: dict[str, Any]
) -> Iterator[str]:
    """Fail each call of a save that replaces a checkpoint, in turn; yields the messages.

    before: a folder with the checkpoints of steps 1 and 2. Returns when the save has no more calls.
    """
    for number in range(1, 1000, stride):
        shutil.rmtree(folder, ignore_errors=True)
        shutil.copytree(before, folder)
        failing = Failing(folder, number, code, stays)
        try:
            with failing:
                save_ranks(folder, 2, items_of(3, 3), keep=1, state={"seed": 3}, **options)
        except UserError as error:
            message = str(error)
        else:
            assert failing.failed is None, f"nobody has noticed: {failing.failed}"
            assert holds(folder / "step-00000002") == 3
            return
        call = failing.failed
        assert call is not None, message
        assert "\n" not in message and os.strerror(code) in message, message
        newest = latest(folder)
        assert newest is not None and f"{newest.name} is the last complete one" in message
        assert holds(newest) >= 2
        assert all(holds(path) for path in list_checkpoints(folder))
        # Nothing of it is in the way of the next one, and of what it leaves nothing stays.
        clean(folder)
        save_ranks(folder, 2, items_of(4, 3), keep=1, state={"seed": 4}, **options)
        assert os.listdir(folder) == ["step-00000002"]
        assert holds(folder / "step-00000002") == 4
        yield message


@pytest.fixture
def before(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A folder with two checkpoints; the disk is not waited for, as no power is cut here."""
    monkeypatch.setattr(os, "fsync", lambda descriptor: None)
    for step in (1, 2):
        save_ranks(tmp_path / "before", step, items_of(step, 3), state={"seed": step})
    return tmp_path / "before"


@pytest.mark.parametrize("way", WAYS)
def test_each_call_of_a_save_fails(
    tmp_path: Path, before: Path, long: bool, table: Table, way: str
) -> None:
    for code in (errno.ENOSPC, errno.EROFS, errno.EIO, errno.EDQUOT) if long else (errno.ENOSPC,):
        count = 0
        for stays in (True, False) if long else (True,):
            found = cases(before, tmp_path / "now", code, stays, 1 if long else 3, WAYS[way])
            count += len(list(found))
        result = "the last commit is whole; one clear line on every rank; the next save works"
        table.row(f"{os.strerror(code)} at each call of a {way}", count, result, count >= 6)
