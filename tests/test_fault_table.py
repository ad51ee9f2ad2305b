"""The frame of the fault campaign: every failure is a bad row, and one table has all rows."""

from __future__ import annotations

import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]

HERE = Path(__file__).parent

TESTS = """
import pytest

def test_good(table, long):
    table.row("cut off", 1200, f"all found, long: {long}", True)

def test_bad(table):
    table.row("turned upside down", 2, "1 lost", False)

def test_broken():
    raise ValueError("of no use\\nat all")

@pytest.fixture
def nothing():
    raise KeyError("not there")

def test_without_what_it_needs(nothing): ...
"""


@pytest.fixture
def campaign(tmp_path: Path) -> Path:
    """A campaign of a few tests in the frame of the real one."""
    (tmp_path / "faults").mkdir()
    (tmp_path / "pytest.ini").write_text("[pytest]\n")
    shutil.copy(HERE / "conftest.py", tmp_path)
    for name in ("conftest.py", "fault_table.py", "fault_jobs.py", "faulty.py"):
        shutil.copy(HERE / "faults" / name, tmp_path / "faults")
    (tmp_path / "faults" / "test_some.py").write_text(TESTS)
    return tmp_path


def test_one_table_has_all_rows_of_all_sessions(python: Run, campaign: Path) -> None:
    file = campaign / "new" / "table.jsonl"
    for folder, form in ((campaign, "--quiet"), (campaign / "faults", "--long")):
        arguments = ("-m", "pytest", folder, form, f"--fault-table={file}")
        result = python(*arguments, "-p", "no:cacheprovider", cwd=campaign)
        assert result.returncode == 1
        lines = [" ".join(line.split()) for line in result.stdout.splitlines()]
        begin = next(i for i, line in enumerate(lines) if line.startswith("fault MPI cases"))
        rows = lines[begin + 2 : begin + 6]
        assert rows[0].startswith("cut off ")
        assert rows[0].endswith(f" 1,200 ok all found, long: {form == '--long'}")
        assert rows[1].startswith("turned upside down ") and rows[1].endswith(" 2 BAD 1 lost")
        assert rows[2].startswith("test_some::test_broken ")
        assert rows[2].endswith(" 0 BAD ValueError: of no use")
        assert rows[3].startswith("test_some::test_without_what_it_needs ")
        assert rows[3].endswith(" 0 BAD KeyError: 'not there'")
        assert lines[begin + 7] == "1,202 cases in 4 rows, 3 of them bad"
    result = python(HERE / "faults" / "fault_table.py", file)
    assert result.returncode == 1
    assert result.stdout.splitlines()[-1] == "2,404 cases in 8 rows, 6 of them bad"
    good = [line for line in file.read_text().splitlines() if '"ok": true' in line]
    file.write_text("\n".join(good) + "\n")
    assert python(HERE / "faults" / "fault_table.py", file).returncode == 0
    file.unlink()
    assert python(HERE / "faults" / "fault_table.py", file).returncode == 1, (
        "no rows are no success"
    )
