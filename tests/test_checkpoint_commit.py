"""The commit protocol: kills, full disks, failing ranks, retention; what is complete stays so."""

from __future__ import annotations

import contextlib
import errno
import itertools
import multiprocessing
import os
import random
import shutil
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from checkpoint_fakes import items_of, save_ranks, state

from mpillm.checkpoint import saver
from mpillm.checkpoint.files import latest, list_checkpoints
from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.store import Item
from mpillm.checkpoint.verify import verify
from mpillm.errors import UserError
from mpillm.parallel.shard import Shard

needs_proc = pytest.mark.skipif(
    not Path("/proc/self/fd").exists(), reason="the paths of open files are read from /proc"
)


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def holds(path: Path, step: int) -> None:
    """See that a checkpoint is whole and holds `state(step)`."""
    assert verify(path) == []
    with Checkpoint.open(path) as checkpoint:
        for name, array in state(step).items():
            got = checkpoint.read("parameter", name, Shard.whole(array.shape))
            assert np.array_equal(got, array)


def write_for_ever(folder: Path, pipe: Connection) -> None:
    """Save steps, every second one again as a replacement, and send what is committed."""
    for count in itertools.count(1):
        array = np.full((2, 100_000), count, np.float32)
        shards = [Shard.split(array.shape, 0, 2, rank) for rank in range(2)]
        items = [[Item("parameter", "w", shard, array[shard.slices])] for shard in shards]
        path = save_ranks(folder, 1 + count // 2, items, keep=2)
        pipe.send((path.name, count))


def test_a_killed_writer_leaves_only_complete_checkpoints(tmp_path: Path) -> None:
    # Not forked: pytest has threads, which a fork would leave behind.
    spawn = multiprocessing.get_context("spawn")
    moments = random.Random(0)
    unfinished = 0
    for turn in range(8):
        folder = tmp_path / str(turn)
        pipe, child_pipe = spawn.Pipe(duplex=False)
        writer = spawn.Process(target=write_for_ever, args=(folder, child_pipe))
        writer.start()
        child_pipe.close()
        acknowledged = pipe.recv()
        time.sleep(moments.uniform(0, 0.05))
        writer.kill()
        writer.join()
        with contextlib.suppress(EOFError):
            while True:
                acknowledged = pipe.recv()
        found = list_checkpoints(folder)
        for checkpoint in found:
            assert verify(checkpoint) == []
        name, count = acknowledged
        assert found[-1].name.removesuffix(".old") >= name
        with Checkpoint.open(found[-1]) as newest:
            array = newest.read("parameter", "w", Shard.whole((2, 100_000)))
        assert array.min() == array.max() >= count
        unfinished += any(folder.glob(".tmp-*"))
        save_ranks(folder, 10**6, items_of(1), keep=1)
        assert names(folder) == ["step-01000000"]
    assert unfinished > 0


@needs_proc
def test_the_order_of_a_save(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Everything is fsynced before the rename, the manifest after the shards, the parent last."""
    events: list[str] = []

    def fsync(handle: int) -> None:
        events.append(f"fsync {os.path.relpath(os.readlink(f'/proc/self/fd/{handle}'), tmp_path)}")

    plain = os.rename

    def rename(path: Path, target: Path) -> None:
        events.append(f"rename {path.relative_to(tmp_path)} {target.relative_to(tmp_path)}")
        plain(path, target)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "rename", rename)
    folder = tmp_path / "run" / "checkpoints"
    save_ranks(folder, 7, items_of(7))
    temporary, final = "run/checkpoints/.tmp-00000007", "run/checkpoints/step-00000007"
    assert events[:2] == ["fsync .", "fsync run"]
    assert sorted(events[2:4]) == [f"fsync {temporary}/shard-0000{rank}.h5" for rank in (0, 1)]
    commit = [
        f"fsync {temporary}/manifest.json",
        f"fsync {temporary}",
        f"rename {temporary} {final}",
        "fsync run/checkpoints",
    ]
    assert events[4:] == commit
    events.clear()
    save_ranks(folder, 7, items_of(8))
    commit[2:2] = [f"rename {final} {final}.old", "fsync run/checkpoints"]
    assert events[2:-2] == commit
    assert events[-2:] == [
        f"rename {final}.old run/checkpoints/.tmp-removed-step-00000007.old",
        "fsync run/checkpoints",
    ]


def test_the_newest_are_kept(tmp_path: Path) -> None:
    for step in (10, 20, 30):
        save_ranks(tmp_path, step, items_of(step), keep=2)
    assert names(tmp_path) == ["step-00000020", "step-00000030"]
    save_ranks(tmp_path, 15, items_of(15), keep=1)  # a run that went back
    assert names(tmp_path) == ["step-00000015", "step-00000020", "step-00000030"]
    assert latest(tmp_path) == tmp_path / "step-00000030"
    save_ranks(tmp_path, 100_000_000, items_of(1), keep=3)
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000020",
        "step-00000030",
        "step-100000000",
    ]
    assert list_checkpoints(tmp_path / "none") == []
    assert latest(tmp_path / "none") is None


def test_only_real_folders_of_steps_count(tmp_path: Path) -> None:
    path = save_ranks(tmp_path, 1, items_of(1))
    (tmp_path / "step-00000002").symlink_to(path)
    (tmp_path / "step-00000003").write_text("")
    (tmp_path / "step-4").mkdir()
    assert list_checkpoints(tmp_path) == [path]


def test_saving_a_step_again_replaces_it(tmp_path: Path) -> None:
    save_ranks(tmp_path, 5, items_of(1))
    path = save_ranks(tmp_path, 5, items_of(2))
    assert names(tmp_path) == ["step-00000005"]
    holds(path, 2)


@pytest.mark.parametrize("renames", [1, 2, 3])
def test_a_crash_while_a_step_is_replaced(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, renames: int
) -> None:
    """Cut before each rename: away with the old, in with the new, the old to be removed."""
    save_ranks(tmp_path, 5, items_of(1), keep=1)
    left, plain = [renames], os.rename

    def rename(path: Path, target: Path) -> None:
        left[0] -= 1
        if left[0] == 0:
            raise KeyboardInterrupt
        plain(path, target)

    with monkeypatch.context() as patch:
        patch.setattr(os, "rename", rename)
        with pytest.raises(KeyboardInterrupt):
            save_ranks(tmp_path, 5, items_of(2, 1), keep=1)
    expected = {1: ("step-00000005", 1), 2: ("step-00000005.old", 1), 3: ("step-00000005", 2)}
    name, step = expected[renames]
    newest = latest(tmp_path)
    assert newest is not None
    assert newest.name == name
    holds(newest, step)
    path = save_ranks(tmp_path, 5, items_of(3), keep=1)
    assert names(tmp_path) == ["step-00000005"]
    holds(path, 3)


def test_an_old_one_without_its_replacement_is_retired_like_any_other(tmp_path: Path) -> None:
    save_ranks(tmp_path, 5, items_of(1)).rename(tmp_path / "step-00000005.old")
    save_ranks(tmp_path, 6, items_of(2))
    assert names(tmp_path) == ["step-00000005.old", "step-00000006"]
    save_ranks(tmp_path, 7, items_of(2))
    assert names(tmp_path) == ["step-00000006", "step-00000007"]


def test_leftovers_of_dead_writes_are_removed(tmp_path: Path) -> None:
    (tmp_path / ".tmp-00000003" / "deep").mkdir(parents=True)
    (tmp_path / ".tmp-removed-step-00000001").mkdir()
    save_ranks(tmp_path, 3, items_of(3))
    assert names(tmp_path) == ["step-00000003"]


def failing(folder: Path, step: int = 2, ranks: int = 3) -> str:
    """Save on some ranks; see that each gets the same UserError of one line; returns it."""
    with pytest.raises(UserError) as caught:
        save_ranks(folder, step, items_of(step, ranks), keep=1)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_no_room(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    save_ranks(tmp_path, 1, items_of(1))
    usage = shutil.disk_usage(tmp_path)._replace(free=2**20)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    message = failing(tmp_path)
    assert message == (
        f"cannot write the checkpoint of step 2 in {tmp_path}: it needs 1.0 MiB and 1.0 MiB are "
        "free (make room or lower checkpoint.keep); step-00000001 is the last complete one"
    )
    assert names(tmp_path) == ["step-00000001"]


@needs_proc
@pytest.mark.parametrize("code", [errno.EROFS, errno.ENOSPC, errno.EIO])
@pytest.mark.parametrize("moment", ["shard-00002.h5", "manifest.json", ".tmp-00000002", "rename"])
def test_a_write_that_fails_on_one_rank_fails_on_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: int, moment: str
) -> None:
    save_ranks(tmp_path, 1, items_of(1))
    plain = os.fsync

    def fsync(handle: int) -> None:
        if Path(os.readlink(f"/proc/self/fd/{handle}")).name == moment:
            raise OSError(code, os.strerror(code))
        plain(handle)

    def rename(path: Path, target: Path) -> None:
        raise OSError(code, os.strerror(code))

    with monkeypatch.context() as patch:
        patch.setattr(os, "fsync", fsync)
        if moment == "rename":
            patch.setattr(os, "rename", rename)
        message = failing(tmp_path)
    assert os.strerror(code) in message
    assert ("shard-00002.h5 on rank 2" in message) == (moment == "shard-00002.h5")
    assert "step-00000001 is the last complete one" in message
    assert names(tmp_path) == ["step-00000001"]
    holds(tmp_path / "step-00000001", 1)
    holds(save_ranks(tmp_path, 2, items_of(2)), 2)


def test_a_folder_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    message = failing(tmp_path / "file" / "checkpoints")
    assert "Not a directory; none is complete" in message


def test_a_file_that_rank_0_does_not_see(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = saver.write_shard

    def lose(path: Path, items: Any, **options: Any) -> Any:
        written = plain(path, items, **options)
        if path.name == "shard-00002.h5":
            path.rename(tmp_path / "on another disk")
        return written

    monkeypatch.setattr(saver, "write_shard", lose)
    assert "must be on a shared disk" in failing(tmp_path / "run")


FULL_DISK = """
import resource, sys
from pathlib import Path
import numpy as np
from checkpoint_fakes import save_ranks
from mpillm.checkpoint.store import Item
from mpillm.errors import UserError
from mpillm.parallel.shard import Shard

folder = Path(sys.argv[1])
arrays = [np.full(5000, i, np.float32) for i in range(10)]
items = [[Item("parameter", f"w{i}", Shard.whole(a.shape), a) for i, a in enumerate(arrays)]]
save_ranks(folder, 1, items)
whole = (folder / "step-00000001" / "shard-00000.h5").stat().st_size
for limit in (0, 10, 3000, 30_000, whole - 1):
    resource.setrlimit(resource.RLIMIT_FSIZE, (limit, resource.RLIM_INFINITY))
    try:
        save_ranks(folder, 2, items)
    except UserError as error:
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        print(error, [path.name for path in folder.iterdir()])
"""


def test_a_file_system_that_stops_in_the_middle_of_a_file(tmp_path: Path) -> None:
    """A limit on the size of files stands in for a disk that fills up while HDF5 writes."""
    source = Path(__file__).parent
    done = subprocess.run(
        [sys.executable, "-c", FULL_DISK, str(tmp_path)],
        env={**os.environ, "PYTHONPATH": os.pathsep.join([str(source), str(source.parent)])},
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    lines = done.stdout.splitlines()
    assert len(lines) == 5
    for line in lines:
        assert "shard-00000.h5 on rank 0: File too large; step-00000001 is the last" in line
        assert line.endswith("['step-00000001']")
    assert verify(tmp_path / "step-00000001") == []
