"""Power cuts: a log of every write, fsync and rename of saves, cut at every point.

SIGKILL keeps the page cache, so it cannot show that an fsync is missing. Here the calls of a
sequence of saves are noted, and played on a model of a file system that keeps nothing that was not
fsynced (`disk_model.py`). Short form: every point, 6 outcomes at each. Long form: 200 at each.
"""

from __future__ import annotations

import hashlib
import subprocess
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from random import Random

import numpy as np
import pytest
from checkpoint_fakes import items_of, save_ranks, state
from disk_calls import Call, DiskCalls
from disk_model import Disk, Lost, Tree, folders, read_tree, write_tree
from fault_table import Table

from mpillm.checkpoint.commit import clean
from mpillm.checkpoint.files import step_of
from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.verify import verify
from mpillm.errors import UserError
from mpillm.parallel.shard import Shard

Run = Callable[..., "subprocess.CompletedProcess[str]"]

FOLDER = ("run", "checkpoints")
KEEP = {"keep": 2, "keep_every": 3}


class Died(BaseException):
    """Stands for the end of a process."""


def saves(root: Path, disk: DiskCalls) -> None:
    """The first save, more, replaced ones, rotation, fewer writers, asynchronous ones, a death.

    Notes `begin STEP SEED` and, when it is acknowledged, `done STEP SEED`.
    """
    folder, seed = root.joinpath(*FOLDER), 0

    def save(step: int, ranks: int = 2, **options: object) -> None:
        nonlocal seed
        seed += 1
        disk.note(f"begin {step} {seed}")
        save_ranks(folder, step, items_of(seed, ranks), state={"seed": seed}, **KEEP, **options)
        disk.note(f"done {step} {seed}")

    save(1)
    save(2, beside=True)
    save(2)
    save(3, ranks=3, writers_per_node=1)
    save(4)
    save(5, ranks=3, writers_per_node=2, node=3, beside=True)
    save(5, beside=True)
    disk.dies_after = 5
    with pytest.raises(Died):
        save(6, ranks=1)
    disk.dies_after = None
    assert clean(folder) == [".tmp-00000006"]
    save(6, ranks=1, verify=False)
    save(7)


class Mortal(DiskCalls):
    """The calls of a process that may die after so many of them."""

    dies_after: int | None = None

    def __init__(self, folder: Path) -> None:
        super().__init__(folder, self._live)

    def _live(self, call: Call) -> None:
        if self.dies_after is not None:
            self.dies_after -= 1
            if self.dies_after < 0:
                raise Died


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that the saves are made in."""
    return tmp_path_factory.mktemp("disk")


@pytest.fixture(scope="module")
def log(root: Path) -> list[Call]:
    """The calls of `saves`."""
    with Mortal(root) as disk:
        saves(root, disk)
    return disk.log


def test_the_log_is_complete(root: Path, log: list[Call]) -> None:
    """Played, it makes the very bytes that lie on the disk."""
    disk = Disk(root)
    for call in log:
        disk.play(call)
    assert disk.now() == read_tree(root)
    kept = [name for name, _ in folders(disk.now(), *FOLDER)]
    assert sorted(kept) == [f"step-0000000{step}" for step in (3, 6, 7)]


AUDIT = """
import os, sys
from collections import Counter
from pathlib import Path

root = sys.argv[1]
from test_replay import Mortal, saves

seen = Counter()

def hook(event, arguments):
    if not event.startswith(("open", "os.", "shutil.")):
        return
    names = [os.fspath(name) for name in arguments if isinstance(name, (str, Path))]
    inside = any(name.startswith(root) or not os.path.isabs(name) for name in names[:1])
    if event == "open":
        if inside and arguments[2] & (os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC):
            seen["create"] += 1
    elif inside and event not in ("os.listdir", "os.scandir", "shutil.rmtree"):
        seen[event.removeprefix("os.").replace("remove", "unlink")] += 1

with Mortal(Path(root)) as disk:
    sys.addaudithook(hook)
    saves(Path(root), disk)
kinds = ("create", "rename", "mkdir", "unlink", "rmdir")
noted = Counter(call.name for call in disk.log if call.name in kinds)
print(sorted(noted.items()) == sorted(seen.items()), sorted(noted.items()), sorted(seen.items()))
"""


def test_nothing_bypasses_the_log(tmp_path: Path, python: Run) -> None:
    """Python's own audit events, in another process, name no file or folder that was not noted."""
    here = Path(__file__).parent
    lines = f"import sys; sys.path[:0] = {[str(here), str(here.parent), str(here.parents[1])]}\n"
    done = python("-c", lines + AUDIT, tmp_path / "disk")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("True "), done.stdout


@dataclass(frozen=True)
class Promise:
    """What must be true after a cut at some point of the log."""

    done: int
    """The seed of the last save that was acknowledged; 0: none was."""
    begun: int
    """That of the last one that has begun."""
    steps: frozenset[int]
    """Steps that were there at the last acknowledgement and are at the next."""


def promises(root: Path, log: list[Call]) -> Iterator[Promise]:
    """The promise after each call."""
    disk, present = Disk(root), [(0, frozenset[int]())]
    for call in log:
        disk.play(call)
        if call.name == "note" and call.path.startswith("done"):
            steps = frozenset(step_of(name) or 0 for name, _ in folders(disk.now(), *FOLDER))
            present.append((int(call.path.split()[2]), steps))
    place = begun = 0
    for call in log:
        if call.name == "note":
            what, _, seed = call.path.split()
            begun = int(seed)
            place += what == "done"
        coming = present[min(place + 1, len(present) - 1)][1]
        yield Promise(present[place][0], begun, present[place][1] & coming)


class Judge:
    """Says what is wrong with what a cut has left; looks at equal folders once."""

    def __init__(self, scratch: Path) -> None:
        self._scratch = scratch
        self._known: dict[bytes, int | str] = {}

    def broken(self, tree: Tree, promise: Promise) -> str:
        """What is broken of the promise; empty when nothing is."""
        found: dict[int, int] = {}
        for name, content in folders(tree, *FOLDER):
            step = step_of(name)
            if step is None:
                continue
            seed = self._seed(name, content)
            if isinstance(seed, str):
                return f"{name} is not whole: {seed}"
            if seed > promise.begun:
                return f"{name} is of a save that has not begun"
            found[step] = max(seed, found.get(step, 0))
        if lost := promise.steps - found.keys():
            return f"steps {sorted(lost)} are lost"
        newest = found[max(found)] if found else 0
        return (
            "" if newest >= promise.done else f"{promise.done} was acknowledged, {newest} is left"
        )

    def _seed(self, name: str, content: Tree) -> int | str:
        """The seed of the state in a checkpoint's folder, or what is wrong with it."""
        digest = hashlib.sha256(repr((name, sorted(content.items()))).encode()).digest()
        if digest not in self._known:
            path = self._scratch / str(len(self._known)) / name
            write_tree(content, path)
            self._known[digest] = look(path)
        return self._known[digest]


def look(path: Path) -> int | str:
    """The seed of the state that a checkpoint says it holds and does hold."""
    if problems := verify(path):
        return problems[0]
    try:
        with Checkpoint.open(path) as checkpoint:
            seed = int(checkpoint.manifest.state["seed"])
            for name, array in state(seed).items():
                for kind, expected in (("parameter", array), ("optimizer/m", 2 * array)):
                    got = checkpoint.read(kind, name, Shard.whole(array.shape))
                    if not np.array_equal(got, expected):
                        return f"{kind} {name} has other numbers"
    except UserError as error:
        return str(error)
    return seed


def cut_everywhere(
    root: Path, log: list[Call], judge: Judge, outcomes: int, dropped: Callable[[int], bool]
) -> Iterator[str]:
    """What is broken, if anything, for each outcome of each cut; some fsyncs do nothing."""
    random, disk = Random(0), Disk(root)
    for number, (call, promise) in enumerate(zip(log, promises(root, log), strict=True)):
        if not dropped(number):
            disk.play(call)
        for outcome in range(outcomes):
            share = (0.0, 1.0)[outcome] if outcome < 2 else random.random()
            try:
                yield judge.broken(disk.cut(random, share), promise)
            except Lost as lost:
                yield str(lost)


def test_a_power_cut_at_any_point(
    root: Path, log: list[Call], tmp_path: Path, long: bool, table: Table
) -> None:
    judge = Judge(tmp_path)
    outcomes = 200 if long else 6
    broken = list(cut_everywhere(root, log, judge, outcomes, lambda number: False))
    bad = [what for what in broken if what]
    result = bad[0] if bad else "the last acknowledged checkpoint is whole, and all that are kept"
    table.row(f"power cut at each of {len(log)} calls of a save", len(broken), result, not bad)


def fsyncs(log: list[Call]) -> dict[str, set[int]]:
    """The fsyncs of the protocol by what they are for: their places in the log."""
    kinds: dict[str, set[int]] = {}
    renamed = ""
    for number, call in enumerate(log):
        if call.name == "rename":
            renamed = Path(call.target).name
        if call.name == "fsync":
            name = Path(call.path).name
            if name == FOLDER[-1]:
                name += " after a rename to " + (
                    ".old"
                    if renamed.endswith(".old") and renamed[0] != "."
                    else renamed.split("-")[0]
                )
            kinds.setdefault("".join(c for c in name if not c.isdigit()), set()).add(number)
    return kinds


def test_every_fsync_is_needed(root: Path, log: list[Call], tmp_path: Path, table: Table) -> None:
    """Without any one kind of them some cut breaks a promise: the model would find a missing one.

    An fsync has no other effect than on what a cut leaves, so that it can be left out of the log.
    """
    kinds = fsyncs(log)
    first = next(number for number, call in enumerate(log) if call.name == "fsync")
    assert set(kinds) == {
        Path(log[first].path).name.translate(str.maketrans("", "", "0123456789")),
        "run",
        "shard-.h",
        "manifest.json",
        ".tmp-",
        "checkpoints after a rename to .old",
        "checkpoints after a rename to step",
        "checkpoints after a rename to .tmp",
    }
    unnoticed = [
        kind
        for kind, places in kinds.items()
        if not any(cut_everywhere(root, log, Judge(tmp_path / kind), 12, places.__contains__))
    ]
    result = f"not noticed: {unnoticed}" if unnoticed else "each is noticed"
    table.row("one kind of fsync left out of a save", len(kinds), result, not unnoticed)
