"""Mutated files of every kind are read or refused in one line: no crash, no hang, little memory.

Short form: 50 cases of each of nine readers. Long form: 1,500 of each.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
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


def test_whole_files_are_read(files: Path) -> None:
    """The readers of the cases below see nothing wrong in files that nobody has touched."""
    for change in ("bytes", "hdf5", "write_manifest", "seal"):
        assert hasattr(Cases, change)
    cases = Cases(files)
    shutil.copytree(files / "0", cases.here)
    for name in READERS:
        read = READERS[name](Random(0), cases)
        shutil.rmtree(cases.here)
        shutil.copytree(files / "0", cases.here)
        assert outcome(read) == ("read", ""), name


def test_mutated_files(
    files: Path,
    tmp_path: Path,
    environment: dict[str, str],
    table: Table,
    long: bool,
) -> None:
    count = 1500 if long else 50
    waiting = [(name, 0) for name in READERS]
    found = {name: {"read": 0, "refused": 0} for name in READERS}
    broken: dict[str, list[str]] = {name: [] for name in READERS}
    while waiting:
        process = subprocess.run(
            [sys.executable, Path(__file__).with_name("hostile.py"), files]
            + [f"{name}:{first}:{count}" for name, first in waiting],
            capture_output=True,
            text=True,
            env=environment,
            check=False,
        )
        for line in process.stdout.splitlines():
            result = json.loads(line)
            name = result["reader"]
            found[name] = {how: found[name][how] + result[how] for how in found[name]}
            broken[name] += [f"case {number}: {words}" for number, words in result["broken"]]
            del waiting[0]
        if process.returncode:  # killed at a case: go on after it
            name, number = (files / "case").read_text().split(":")
            assert name == waiting[0][0], process.stderr
            broken[name].append(f"case {number}: exit code {process.returncode}")
            waiting[0] = name, int(number) + 1
            assert len(broken[name]) < 20, broken
    for name, what in WHAT.items():
        kept = found[name]["read"], found[name]["refused"]
        lost = "; ".join(broken[name][:3])
        table.add(
            f"mutated: {what}",
            sum(kept) + len(broken[name]),
            lost[:200] or f"{kept[0]:,} read, {kept[1]:,} refused in one line",
            not broken[name] and kept[1] > 0,
        )
    assert not any(broken.values()), broken
    assert all(min(counts.values()) > 0 for counts in found.values()), found


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
