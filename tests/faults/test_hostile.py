"""Mutated files of every kind are read or refused in one line: no crash, no hang, little memory.

Short form: 50 cases of each of nine readers. Long form: 1,500 of each.
"""

from __future__ import annotations

import json
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterable
from dataclasses import dataclass, field
from pathlib import Path
from random import Random

import h5py
import pytest
from fault_table import Table
from hostile import READERS, Cases, outcome, run
from hostile_files import make_files
from hostile_hdf5 import ATTACKS

from mpillm.storage.hdf5 import FORMAT, Hdf5File

WHAT = {
    "shard": "shard of a checkpoint",
    "manifest": "manifest of a checkpoint",
    "tokens": "token file",
    "tokenizer": "tokenizer",
    "exported": "exported HDF5",
    "safetensors": "exported safetensors",
    "config": "settings",
    "metrics": "metrics.jsonl",
    "flight": "flight file",
}


@pytest.fixture(scope="module")
def files(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with whole files of every kind, twice."""
    folder = tmp_path_factory.mktemp("hostile")
    for number in (0, 1):
        make_files(folder / str(number), number)
    return folder


@dataclass
class Result:
    """What came of the cases of a reader."""

    read: int = 0
    refused: int = 0
    broken: list[str] = field(default_factory=list)

    def add(self, number: int, how: str, words: str) -> None:
        """Note a case."""
        self.read += how == "read"
        self.refused += how == "refused"
        if how == "broken":
            self.broken.append(f"case {number}: {words}")
            assert len(self.broken) < 20, self.broken


def read_cases(
    script: Path, files: Path, names: Iterable[str], count: int, environment: dict[str, str]
) -> dict[str, Result]:
    """Have a process read the first `count` cases of readers, and another where one has died."""
    results = {name: Result() for name in names}
    waiting = dict.fromkeys(results, 0)
    while any(first < count for first in waiting.values()):
        process = subprocess.run(
            [sys.executable, script, files, *(f"{n}:{k}:{count}" for n, k in waiting.items())],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        for line in process.stdout.splitlines():
            name, number, how, words = json.loads(line)
            results[name].add(number, how, words)
            waiting[name] = number + 1
        if process.returncode:
            assert process.returncode < 0, process.stderr  # else it is the script that is wrong
            name = next(name for name, first in waiting.items() if first < count)
            results[name].add(waiting[name], "broken", signal.Signals(-process.returncode).name)
            waiting[name] += 1
    return results


def test_whole_files_are_read(files: Path) -> None:
    """The readers of the cases below see nothing wrong in files that nobody has touched."""
    cases = Cases(files)
    for name, make in READERS.items():
        shutil.copytree(files / "0", cases.here)
        read = make(Random(0), cases)
        shutil.rmtree(cases.here)
        shutil.copytree(files / "0", cases.here)
        assert outcome(read) == ("read", ""), name
        shutil.rmtree(cases.here)


def test_mutated_files(files: Path, environment: dict[str, str], table: Table, long: bool) -> None:
    script = Path(__file__).with_name("hostile.py")
    results = read_cases(script, files, READERS, 1500 if long else 50, environment)
    for name, what in WHAT.items():
        result = results[name]
        good = f"{result.read:,} read, {result.refused:,} refused in one line"
        count = result.read + result.refused + len(result.broken)
        bad = "; ".join(result.broken)[:200]
        table.add(f"mutated: {what}", count, bad or good, not bad and result.refused > 0)
    assert not any(result.broken for result in results.values()), results
    assert all(result.read and result.refused for result in results.values()), results


def test_cases_that_break_their_reader_are_named(
    files: Path, tmp_path: Path, environment: dict[str, str]
) -> None:
    script = tmp_path / "script.py"
    script.write_text(
        f"""
import os, signal, sys, time
sys.path.insert(0, {str(Path(__file__).parent)!r})
import hostile
from mpillm.errors import UserError

number = -1

def read():
    match number:
        case 1: os.kill(os.getpid(), signal.SIGSEGV)
        case 2: bytearray(2 * hostile.MEMORY)
        case 3: raise UserError("two\\nlines")
        case 4: raise UserError("one line")
        case 5: time.sleep(60)
        case 6: [][0]

def make(rng, cases):
    global number
    number = rng
    return read

hostile.SECONDS = 1
hostile.READERS = {{"test": make}}
hostile.Random = lambda seed: int(seed.split()[1])
hostile.main()
"""
    )
    result = read_cases(script, files, ["test"], 8, environment)["test"]
    assert [words.partition("(")[0] for words in result.broken] == [
        "case 1: SIGSEGV",
        "case 2: MemoryError",
        r"case 3: not one line: 'two\nlines'",
        "case 5: SIGALRM",
        "case 6: IndexError",
    ]
    assert (result.read, result.refused) == (2, 1)  # cases 0 and 7, case 4


def test_the_cases_are_the_same_every_time(files: Path) -> None:
    for name in ("shard", "manifest", "exported", "config"):
        contents = []
        for _ in range(2):
            cases = Cases(files)
            run(cases, name, 3)
            made = sorted(path for path in cases.here.rglob("*") if path.is_file())
            contents.append([path.read_bytes() for path in made])
        assert contents[0] == contents[1]


@pytest.mark.parametrize("libver", [FORMAT, "earliest", "latest"])
def test_every_attack_is_possible(files: Path, tmp_path: Path, libver: str) -> None:
    """And never makes `Hdf5File` do anything but read or refuse."""
    for number, attack in enumerate(ATTACKS):
        path = tmp_path / f"{number}.h5"
        shutil.copy(files / "0" / "export.h5", path)
        name = "parameter/block.001.weight"
        with h5py.File(path, "r+", libver=libver) as file:
            attack(file, name)

        def read(path: Path = path, name: str = name) -> None:
            with Hdf5File(path) as file:
                file.attributes()
                file.find(name).read()

        how, words = outcome(read)
        assert how in ("read", "refused"), words
