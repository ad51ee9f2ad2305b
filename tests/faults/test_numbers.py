"""Bad numbers and flipped bits in real trainers: none applied, every one located.

Short form: every fault once in 3 layouts of 2 ranks and in 3 of 4. Long form: three times in so
many layouts of 2 ranks, models and ways to train that every two meet, twice in those of 4 ranks.
"""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING

import pytest

if TYPE_CHECKING:
    import subprocess

    from fault_table import Table

    Run = Callable[..., "subprocess.CompletedProcess[str]"]

CAMPAIGN = Path(__file__).parents[1] / "parallel" / "bad_numbers.py"

# Ranks, seed, rounds, which cases.
SHORT = [(2, 5, 1, "3"), (4, 6, 1, "3")]
LONG = [(2, 1, 3, "pairs"), (4, 2, 2, "pairs")]


def test_numbers(mpirun: Run, table: Table, long: bool) -> None:
    counts: dict[str, int] = {}
    wrong: dict[str, list[str]] = {}
    for ranks, *arguments in LONG if long else SHORT:
        command = ("-m", "mpi4py", CAMPAIGN, *map(str, arguments))
        result = mpirun(ranks, *command, timeout=3600 if long else 240)
        assert result.returncode == 0, result.stderr
        for kind, (count, texts) in json.loads(result.stdout).items():
            counts[kind] = counts.get(kind, 0) + count
            wrong.setdefault(kind, []).extend(f"{ranks} ranks, {text}" for text in texts)
    for kind, count in counts.items():
        expected = "no false alarm" if kind.startswith("none") else "none applied, all located"
        if kind.startswith("one bit"):
            expected = "all found and located"
        texts = wrong[kind]
        table.row(kind, count, f"{len(texts)} wrong: {texts[0]}" if texts else expected, not texts)
    if not counts:
        pytest.fail("nothing was tried")
