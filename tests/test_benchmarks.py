"""What compares speeds: contestants that take turns, and what they tell."""

from __future__ import annotations

import os
import signal
import sys
import time
from pathlib import Path
from types import ModuleType

import pytest

from mpillm.errors import UserError
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.settings import TrainSettings

BENCHMARKS = Path(__file__).resolve().parent.parent / "benchmarks"

# Losses 10, 11, ... on rank 0 and 20, 21, ... on rank 1; a step takes 10 or 20 ms.
WORKER = """
import os, sys, time
sys.path.insert(0, {benchmarks!r})
from turns import serve, timed_steps
rank, path = int(sys.argv[1]), sys.argv[3]
number = 0
def step():
    global number
    number += 1
    if number == {last}:
        print("no more steps")
        sys.exit(3)
    time.sleep(0.01 * (1 + rank))
    return 10.0 * (1 + rank) + number - 1
serve(path, rank, lambda steps: timed_steps(step, steps, 50))
"""


@pytest.fixture
def turns(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    import turns

    return turns


def contestant(turns: ModuleType, folder: Path, processes: int = 2, last: int = 0):
    script = folder / "worker.py"
    script.write_text(WORKER.format(benchmarks=str(BENCHMARKS), last=last))
    commands = [[sys.executable, str(script), str(rank)] for rank in range(processes)]
    return turns.Contestant("some workers", commands, processes)


def pids(one) -> list[int]:
    return [process.pid for process in one._running]


def test_turns_of_two_processes(turns, tmp_path):
    one = contestant(turns, tmp_path)
    one.start(tmp_path)
    try:
        one.run(2, keep=False)
        assert one.losses == [15.0, 16.0]
        assert one.turns == []
        one.run(3)
    finally:
        one.stop()
    assert one.losses == [15.0, 16.0, 17.0, 18.0, 19.0]
    (turn,) = one.turns
    assert all(0.02 <= seconds < 0.1 for seconds in turn.seconds)
    # 50 tokens in 10 ms and 50 in 20 ms, of a sleep that is a little longer.
    assert 3000 < one.speeds[0] <= 7500
    assert [process.poll() for process in one._running] == [0, 0]
    # Two Pythons that do nothing: what they share is counted once, not nothing.
    assert 5e6 < one.peak_memory_once < one.peak_memory < 200e6


def test_between_turns_nobody_computes(turns, tmp_path):
    one = contestant(turns, tmp_path)
    one.start(tmp_path)
    try:
        one.run(1)
        before = [ticks(pid) for pid in pids(one)]
        time.sleep(0.3)
        assert [ticks(pid) for pid in pids(one)] == before
    finally:
        one.stop()


def ticks(pid: int) -> int:
    """CPU time of a process, in hundredths of a second."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return int(fields[11]) + int(fields[12])


def test_a_contestant_that_does_not_start(turns, tmp_path):
    command = [sys.executable, "-c", "raise SystemExit('no such setting')"]
    one = turns.Contestant("nobody", [command], 1)
    with pytest.raises(RuntimeError, match="nobody did not start:\nno such setting"):
        one.start(tmp_path)
    one.stop()


def test_a_contestant_that_ends_in_a_turn(turns, tmp_path):
    one = contestant(turns, tmp_path, last=3)
    one.start(tmp_path)
    one.run(2)
    with pytest.raises(RuntimeError, match="some workers ended early:\nno more steps"):
        one.run(2)
    one.stop()
    assert all(process.poll() is not None for process in one._running)


def test_a_contestant_that_is_killed(turns, tmp_path):
    one = contestant(turns, tmp_path)
    one.start(tmp_path)
    os.kill(pids(one)[1], signal.SIGKILL)
    with pytest.raises(RuntimeError, match="ended early"):
        one.run(2)
    one.stop()
    assert all(process.poll() is not None for process in one._running)


def test_layouts_in_words(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from step import read_layout

    base = TrainSettings(batch_size=12)
    text = "data=2,overlap=false,train.micro_batch_size=3,run.backend=onednn"
    config = read_layout(text, base)
    parallel, train = config.parallel, config.train
    assert parallel == ParallelSettings(data=2, overlap=False)
    assert train == TrainSettings(batch_size=12, micro_batch_size=3)
    assert config.run.backend == "onednn"
    assert read_layout("", base).parallel == ParallelSettings(data=1)
    assert read_layout("", base).train == base
    with pytest.raises(UserError, match=r"parallel.date: .*did you mean 'data'\?"):
        read_layout("date=2", base)


def test_flops_are_those_of_the_products(monkeypatch):
    monkeypatch.syspath_prepend(str(BENCHMARKS))
    from settings import SETTINGS

    s = SETTINGS["gpt2-124m"]
    n, d, v, t = 4 * 256, 768, 50257, 256
    block = [(d, 3 * d), (d, d), (d, 4 * d), (4 * d, d)]
    products = 12 * sum(2 * n * i * o for i, o in block) + 2 * n * d * v
    # For each sequence and layer, queries by visible keys, and probabilities by values.
    scores = 12 * 4 * 2 * sum(2 * keys * d for keys in range(1, t + 1))
    assert s.flops == 3 * (products + scores)


def test_compare_runs(python, mpirun_program):
    """The whole program, without PyTorch; losses do not depend on the layout."""
    options = ("--rounds", "1", "--steps", "1", "--ours", "data=1", "data=2,zero=1", "--torch")
    done = python(BENCHMARKS / "compare.py", "baby-cpu", *options, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "to 0.0001 the losses are the same." in done.stdout
    rows = [line for line in done.stdout.splitlines() if line.startswith("| mpillm data=")]
    assert len(rows) == 4  # speeds, then losses, of two


def test_scaling_runs(python, mpirun_program):
    options = ("--rounds", "1", "--steps", "1", "--scaling")
    done = python(BENCHMARKS / "compare.py", "baby-cpu", *options, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "Of its ceiling, by round: median " in done.stdout


def test_compare_says_what_is_wrong(python):
    done = python(BENCHMARKS / "compare.py", "baby-cpu", "--ours", "data=3,zero=7", "--torch")
    assert done.returncode == 2
    assert done.stderr.startswith("compare.py: error: ")
    assert "zero" in done.stderr
    assert done.stderr.count("\n") == 1
