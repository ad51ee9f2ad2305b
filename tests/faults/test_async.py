"""Asynchronous saving: the same bytes, the same failures, and hardly a stall.

Short form: what it does. Long form: also how long training is kept, 8 saves of 256 MiB each way.
"""

from __future__ import annotations

import errno
import os
import statistics
import subprocess
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import pytest
from checkpoint_fakes import FACTS, ThreadWorld, items_of, on_ranks, same, save_ranks, state
from fault_table import Table

from mpillm.checkpoint import saver as saver_module
from mpillm.checkpoint.commit import clean
from mpillm.checkpoint.files import list_checkpoints
from mpillm.checkpoint.manifest import read_manifest
from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.saver import Saver
from mpillm.checkpoint.settings import CheckpointSettings
from mpillm.checkpoint.store import Item
from mpillm.checkpoint.verify import verify
from mpillm.errors import UserError
from mpillm.parallel.shard import Shard

Run = Callable[..., "subprocess.CompletedProcess[str]"]


def owned(items: list[Item]) -> list[Item]:
    """The items with arrays of their own, which may be overwritten."""
    return [Item(i.kind, i.name, i.shard, np.array(i.array), i.range) for i in items]


@pytest.mark.parametrize("writers", [0, 1, 2])
def test_the_bytes_are_those_of_a_synchronous_save(tmp_path: Path, writers: int) -> None:
    """Though the arrays are overwritten as soon as `copied` allows it, in three saves in a row."""
    seen: list[str] = []

    @contextmanager
    def activity(name: str) -> Iterator[None]:
        seen.append(name)
        yield

    def work(world: ThreadWorld) -> list[Path | None]:
        settings = CheckpointSettings(keep=3, writers_per_node=writers)
        saver = Saver(tmp_path / "beside", world, world.node, settings, activity)
        paths = []
        for step in (1, 2, 3):
            items = owned(items_of(step, 3)[world.rank])
            saver.begin(step, items, samples=16 * step, **FACTS)
            assert saver.under_way
            saver.copied()
            for item in items:
                assert isinstance(item.array, np.ndarray)
                item.array.fill(7)
            while not saver.written:
                time.sleep(0.001)
            world.allgather_objects(None)  # all have written
            saver.commit()
            assert not saver.under_way
            saver.commit()  # does nothing
            assert saver.stall_seconds > 0
            if step == 2:
                assert saver.finish() == saver.committed == tmp_path / "beside" / "step-00000002"
            paths.append(saver.committed)
        saver.finish()
        assert saver.finish() is None
        return [*paths, saver.committed]

    paths = on_ranks(3, work)[2]
    assert isinstance(paths, list) and paths[-1] == tmp_path / "beside" / "step-00000003"
    assert set(seen) == {"save"}
    for step in (1, 2, 3):
        options = {"keep": 3, "writers_per_node": writers}
        path = save_ranks(tmp_path / "at once", step, items_of(step, 3), **options)
        manifest, other = read_manifest(path), read_manifest(tmp_path / "beside" / path.name)
        assert (manifest.files, manifest.arrays) == (other.files, other.arrays)
        assert len(manifest.files) == (writers or 3)


def test_a_second_save_waits_for_the_first(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    order: list[str] = []
    fill, prepare = saver_module._fill, saver_module.prepare

    def slow(*arguments: object) -> object:
        time.sleep(0.2)
        order.append("written")
        return fill(*arguments)  # type: ignore[arg-type]

    def noted(folder: Path, step: int, needed: int) -> None:
        order.append(f"prepare {step}")
        prepare(folder, step, needed)

    monkeypatch.setattr(saver_module, "_fill", slow)
    monkeypatch.setattr(saver_module, "prepare", noted)

    def work(world: ThreadWorld) -> Path:
        saver = Saver(tmp_path, world, world.node, CheckpointSettings(keep=5))
        saver.begin(1, items_of(1, 1)[0], samples=16, **FACTS)
        assert not saver.written
        saver.begin(2, items_of(2, 1)[0], samples=32, **FACTS)
        assert saver.stall_seconds > 0.2  # the wait counts
        assert [path.name for path in list_checkpoints(tmp_path)] == ["step-00000001"]
        return saver.save(3, items_of(3, 1)[0], samples=48, **FACTS)

    same(on_ranks(1, work))
    assert order == ["prepare 1", "written", "prepare 2", "written", "prepare 3"]
    assert all(verify(path) == [] for path in list_checkpoints(tmp_path))
    assert len(list_checkpoints(tmp_path)) == 3


@pytest.mark.parametrize("call", ["commit", "finish", "begin"])
def test_a_disk_that_fails_in_the_thread(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """The same error on all ranks, once, as a synchronous save gives; the next save works."""
    items = items_of(1, 2)

    def full(writer: object, slots: object, copies: object) -> object:
        raise OSError(errno.ENOSPC, "No space left on device")

    def work(world: ThreadWorld) -> Path:
        saver = Saver(tmp_path, world, world.node, CheckpointSettings())
        with pytest.raises(UserError) as caught, monkeypatch.context() as patch:
            if world.rank == 1:
                patch.setattr(saver_module, "_fill", full)
            world.allgather_objects(None)
            saver.begin(1, items[world.rank], samples=16, **FACTS)
            saver.copied()
            if call == "begin":
                saver.begin(2, items[world.rank], samples=16, **FACTS)
            getattr(saver, call)()
        assert "No space left on device; none is complete" in str(caught.value)
        assert "\n" not in str(caught.value)
        world.allgather_objects(None)
        assert saver.finish() is None
        return saver.save(1, items[world.rank], samples=16, **FACTS)

    path = same(on_ranks(2, work))
    assert verify(path) == []
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_defect_in_the_thread_is_raised_as_it_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def broken(*arguments: object) -> object:
        raise ZeroDivisionError

    monkeypatch.setattr(saver_module, "_fill", broken)

    def work(world: ThreadWorld) -> Path | None:
        saver = Saver(tmp_path, world, world.node, CheckpointSettings())
        saver.begin(1, items_of(1, 1)[0], samples=16, **FACTS)
        saver.copied()
        return saver.finish()

    with pytest.raises(ZeroDivisionError):
        same(on_ranks(1, work))


DIES = """
import os, sys, time
from pathlib import Path
import numpy as np
from checkpoint_fakes import FACTS, ThreadWorld, _Meeting
from mpillm.checkpoint.saver import Saver
from mpillm.checkpoint.settings import CheckpointSettings
from mpillm.checkpoint.store import Item
from mpillm.parallel.shard import Shard

world = ThreadWorld(0, _Meeting(1))
saver = Saver(Path(sys.argv[1]), world, world, CheckpointSettings())
arrays = [np.full(200_000, i, np.float32) for i in range(40)]
items = [Item("parameter", f"w{i}", Shard.whole(a.shape), a) for i, a in enumerate(arrays)]
saver.begin(2, items, samples=0, **FACTS)
time.sleep(float(sys.argv[2]))
raise SystemExit(3)
"""


def test_a_process_that_ends_while_it_writes(
    tmp_path: Path, python: Run, long: bool, table: Table
) -> None:
    """It ends at once, by its own exit code, and leaves the last checkpoint and a leftover."""
    tests, count, unfinished = Path(__file__).parents[1], 40 if long else 4, 0
    lines = f"import sys; sys.path[:0] = {[str(tests), str(tests.parent)]}\n"
    for turn in range(count):
        folder = tmp_path / str(turn)
        path = save_ranks(folder, 1, items_of(1))
        done = python("-c", lines + DIES, folder, str(0.06 * turn / count))
        assert (done.returncode, done.stderr) == (3, "")
        assert verify(path) == []
        for checkpoint in list_checkpoints(folder):
            assert verify(checkpoint) == []
        unfinished += bool(clean(folder))
    assert unfinished > 0
    result = "ends at once; the last checkpoint is whole"
    table.row("end of a process in an asynchronous save", count, result, True)


def test_the_last_save_is_of_the_moment_it_began(tmp_path: Path) -> None:
    """The state's table too, which the trainer goes on changing."""
    table = {"skipped": 1, "window": [1.5, 2.5]}

    def work(world: ThreadWorld) -> Path | None:
        saver = Saver(tmp_path, world, world.node, CheckpointSettings())
        saver.begin(1, items_of(1, 1)[0], samples=16, state=table, **FACTS)
        table["skipped"] = 2
        table["window"].append(9.0)  # type: ignore[attr-defined]
        return saver.finish()

    path = same(on_ranks(1, work))
    assert path is not None
    assert read_manifest(path).state == {"skipped": 1, "window": [1.5, 2.5]}
    with Checkpoint.open(path) as checkpoint:
        got = checkpoint.read("parameter", "head.gain", Shard.whole((4,)))
    assert np.array_equal(got, state(1)["head.gain"])


def test_the_stall(tmp_path: Path, long: bool, table: Table) -> None:
    """Less than 5 % of the time that a synchronous save takes, while the main thread computes."""
    if not long:
        pytest.skip("a measurement: only in the long form")
    arrays = [np.random.default_rng(i).random(2**21) for i in range(16)]  # 16 MiB each
    items = [Item("parameter", f"w{i}", Shard.whole(a.shape), a) for i, a in enumerate(arrays)]
    a = np.random.default_rng(0).random((768, 768), dtype=np.float32)

    def compute(seconds: float) -> None:
        end = time.perf_counter() + seconds
        while time.perf_counter() < end:
            np.matmul(a, a)

    def work(world: ThreadWorld) -> tuple[list[float], list[float]]:
        saver = Saver(tmp_path, world, world.node, CheckpointSettings(keep=1))
        at_once, beside = [], []
        for turn in range(8):
            saver.save(2 * turn + 1, items, samples=0, **FACTS)
            at_once.append(saver.stall_seconds)
            saver.begin(2 * turn + 2, items, samples=0, **FACTS)
            while not saver.written:
                compute(1)  # a forward and a backward pass
                saver.copied()
            saver.commit()
            compute(0.2)
            stall = saver.stall_seconds
            saver.finish()
            beside.append(stall)
        return at_once, beside

    at_once, beside = same(on_ranks(1, work))
    share = statistics.median(beside) / statistics.median(at_once)
    result = f"{share:.1%} of a synchronous save's {statistics.median(at_once):.2f} s"
    table.row("stall of asynchronous saves of 256 MiB", len(beside), result, share < 0.05)
    assert threading.active_count() < 20
