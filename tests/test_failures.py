"""How a parallel job ends when something goes wrong, under the MPI at hand."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from pathlib import Path

import pytest

Run = Callable[..., "subprocess.CompletedProcess[str]"]

# A command of three ranks with one fault, run by the real entry point.
COMMAND = """
import os, signal, sys, threading
import mpillm.__main__ as program
from mpillm.errors import UserError
from mpillm.parallel.launch import agree, start

def run(arguments):
    world = start()
    fault, middle = arguments[0], world.rank == 1
    if fault == "exception on one rank" and middle:
        raise RuntimeError("a fault")
    if fault == "exception in a thread" and middle:
        threading.Thread(target=lambda: {}["a fault"]).start()
    if fault == "killed" and middle:
        os.kill(os.getpid(), signal.SIGKILL)
    if fault == "mistake on all ranks":
        raise UserError("a mistake")
    if fault == "mistake on one rank" and middle:
        raise UserError("a mistake")
    if fault == "mistake on one rank, others done":
        if middle:
            raise UserError("a mistake")
        return 0
    if fault == "agreed mistake on all ranks":
        with agree(world):
            raise UserError("a mistake")
    if fault == "agreed mistake on some ranks":
        with agree(world):
            if world.rank > 0:
                raise UserError(f"a mistake of {world.rank}")
    if fault == "exception on one rank, others agree":
        with agree(world):
            if middle:
                raise RuntimeError("a fault")
    if fault == "interrupt on one rank" and middle:
        raise KeyboardInterrupt
    if fault == "nothing":
        with agree(world):
            pass
        return 0
    world.Barrier()
    world.Barrier()
    return 0

program._run = run
program.entry()
"""


@pytest.fixture(scope="module")
def command(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("failures") / "command.py"
    path.write_text(COMMAND)
    return path


def error_lines(stderr: str) -> list[str]:
    """What mpillm itself said; launchers add words of their own."""
    return [line for line in stderr.splitlines() if line.startswith("mpillm: error:")]


def test_a_killed_rank_ends_the_job(mpirun: Run, command: Path) -> None:
    begin = time.monotonic()
    assert mpirun(3, command, "killed").returncode != 0
    assert time.monotonic() - begin < 20


@pytest.mark.parametrize("fault", ["exception on one rank", "exception on one rank, others agree"])
def test_an_exception_ends_the_job_with_its_rank(mpirun: Run, command: Path, fault: str) -> None:
    begin = time.monotonic()
    result = mpirun(3, command, fault)
    assert result.returncode == 1
    assert "rank 1 of 3 (" in result.stderr
    assert "Traceback (most recent call last)" in result.stderr
    assert "RuntimeError: a fault" in result.stderr
    assert time.monotonic() - begin < 20


def test_an_exception_in_a_thread_ends_the_job(mpirun: Run, command: Path) -> None:
    result = mpirun(3, command, "exception in a thread")
    assert result.returncode == 1
    assert "rank 1 of 3 (" in result.stderr and "KeyError: 'a fault'" in result.stderr


@pytest.mark.parametrize(
    ("fault", "line"),
    [
        ("mistake on all ranks", "a mistake"),
        ("mistake on one rank", "a mistake"),
        ("mistake on one rank, others done", "a mistake"),
        ("agreed mistake on all ranks", "a mistake"),
        ("agreed mistake on some ranks", "a mistake of 1 (seen on rank 1)"),
    ],
)
def test_a_mistake_is_told_once(mpirun: Run, command: Path, fault: str, line: str) -> None:
    result = mpirun(3, command, fault)
    assert error_lines(result.stderr) == [f"mpillm: error: {line}"]
    assert "Traceback" not in result.stderr
    assert result.returncode == 2


def test_an_interrupt_on_one_rank_ends_the_job(mpirun: Run, command: Path) -> None:
    result = mpirun(3, command, "interrupt on one rank")
    assert result.returncode == 130
    assert "Traceback" not in result.stderr


def test_nothing_wrong(mpirun: Run, command: Path) -> None:
    result = mpirun(3, command, "nothing")
    assert (result.returncode, result.stdout, result.stderr) == (0, "", "")


JOB = '[model]\nfamily = "gpt2"\n[train]\nsteps = 2\n'


@pytest.mark.parametrize(
    ("arguments", "line"),
    [
        (["jib.toml"], "jib.toml: no such file; did you mean 'job.toml'?"),
        (["bad.toml"], "bad.toml: train.stops: no such setting; did you mean 'steps'?"),
        (["job.toml", "--train.steps=x"], "--train.steps: expected integer >= 1, got 'x'"),
        (["job.toml", "--steps=3"], "--steps: no such section; did you mean 'train.steps'?"),
        (["job.toml", "--frsh"], "train: no option --frsh; did you mean '--fresh'?"),
    ],
)
def test_mistakes_in_a_training_command(
    mpirun: Run, tmp_path: Path, arguments: list[str], line: str
) -> None:
    (tmp_path / "job.toml").write_text(JOB)
    (tmp_path / "bad.toml").write_text(JOB.replace("steps", "stops"))
    result = mpirun(3, "-m", "mpillm", "train", *arguments, cwd=tmp_path)
    assert error_lines(result.stderr) == [f"mpillm: error: {line}"]
    assert "Traceback" not in result.stderr
    assert result.returncode == 2


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["train", "--help"]])
def test_help_is_printed_once(mpirun: Run, arguments: list[str]) -> None:
    result = mpirun(3, "-m", "mpillm", *arguments)
    assert result.returncode == 0
    first = result.stdout.splitlines()[0]
    assert result.stdout.splitlines().count(first) == 1
