"""Damage to a committed checkpoint: every case is found and named, and no wrong byte is loaded.

Checkpoints of several layouts, one of them by fewer writers than ranks. Short form: 15 flipped bits
a file. Long form: a bit of every byte.
"""

from __future__ import annotations

import os
import shutil
from collections.abc import Iterator
from pathlib import Path
from random import Random

import numpy as np
import pytest
from checkpoint_fakes import items_of, save_ranks, state
from fault_table import Table

from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.verify import verify
from mpillm.errors import UserError
from mpillm.parallel.shard import Shard

LAYOUTS = {
    "one rank": {"ranks": 1},
    "three ranks": {"ranks": 3},
    "four ranks, one writer a node of two": {"ranks": 4, "node": 2, "writers_per_node": 1},
    "two ranks, asynchronous": {"ranks": 2, "beside": True},
}


@pytest.fixture(scope="module")
def committed(tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Of each layout, the newer one of two checkpoints."""
    paths = []
    for layout in LAYOUTS.values():
        options = dict(layout)
        folder, ranks = tmp_path_factory.mktemp("damage"), options.pop("ranks")
        for step in (1, 2):
            path = save_ranks(folder, step, items_of(step, ranks), **options)
        paths.append(path)
    return paths


def restored(paths: list[Path]) -> Iterator[Path]:
    """The files of checkpoints in turn, each as it was when the next one's turn comes."""
    for path in paths:
        for file in sorted(path.iterdir()):
            raw = file.read_bytes()
            yield file
            if file.is_symlink() or file.exists():
                file.unlink()
            file.write_bytes(raw)
        assert verify(path) == []


def caught(file: Path) -> bool:
    """Whether verify names the file. What is loaded must be right, or refused by name."""
    path = file.parent
    named = any(str(file) in problem and "\n" not in problem for problem in verify(path))
    try:
        with Checkpoint.open(path) as checkpoint:
            for name, array in state(2).items():
                for kind, expected in (("parameter", array), ("optimizer/m", 2 * array)):
                    try:
                        got = checkpoint.read(kind, name, Shard.whole(array.shape))
                    except UserError as error:
                        assert file.name in str(error) and "\n" not in str(error)
                    else:
                        assert np.array_equal(got, expected), f"{kind} {name}: wrong numbers"
    except UserError as error:
        assert file.name == "manifest.json" and str(file) in str(error)
    return named


def test_flipped_bits(committed: list[Path], long: bool, table: Table) -> None:
    random, count, missed = Random(0), 0, []
    for file in restored(committed):
        raw = file.read_bytes()
        places = {0, 1, 7, 8, len(raw) // 2, len(raw) - 2, len(raw) - 1}
        places |= set(range(len(raw)) if long else random.sample(range(len(raw)), 8))
        for place in sorted(places):
            bit = 1 << random.randrange(8)
            file.write_bytes(raw[:place] + bytes([raw[place] ^ bit]) + raw[place + 1 :])
            count += 1
            if not caught(file):
                missed.append((file.name, place, bit))
    result = f"missed: {missed[:3]}" if missed else "all found and named, no wrong byte loaded"
    table.row("bit flipped in a file of a checkpoint", count, result, not missed)


def test_other_damage(committed: list[Path], table: Table) -> None:
    counts = dict.fromkeys(("truncated", "extended", "removed", "swapped", "linked"), 0)
    found = dict(counts)
    for file in restored(committed):
        raw, other = file.read_bytes(), file.parent.with_name("step-00000001") / file.name

        def tried(what: str, file: Path = file) -> None:
            counts[what] += 1
            found[what] += caught(file)

        for size in sorted({0, 1, len(raw) // 2, len(raw) - 1}):
            file.write_bytes(raw[:size])
            tried("truncated")
        for more in (b"\0", b"\n", raw):
            file.write_bytes(raw + more)
            tried("extended")
        file.unlink()
        tried("removed")
        shutil.copy(other, file)
        tried("swapped")
        file.unlink()
        os.link(other, file)
        tried("swapped")
        file.unlink()
        file.symlink_to(other)
        tried("linked")
    for what, count in counts.items():
        result = f"{found[what]} found and named, no wrong byte loaded"
        table.row(f"file of a checkpoint {what}", count, result, found[what] == count)
