"""Runs that are asked to save, or to save and end: by signals, a time limit, files."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest

from mpillm.checkpoint.files import latest, step_of
from mpillm.checkpoint.reader import Checkpoint
from mpillm.errors import EXIT_REQUEUE, UserError
from mpillm.parallel.shard import Shard
from mpillm.training.settings import RunSettings
from mpillm.training.stopping import SAVE, STOP, Stopping, seconds

Command = Callable[..., "subprocess.CompletedProcess[str]"]

TEXT = Path(__file__).parent.parent / "LICENSE"
CONFIG = f"""
[model]
layers = 1
heads = 2
width = 16
dropout = 0.1
[train]
steps = 100000
batch_size = 4
sequence_length = 16
[data]
text = [{json.dumps(str(TEXT))}]
"""


# --- one rank's notes ----------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [(0, 0), (90, 90), ("90", 90), ("10:05", 605), ("02:00:00", 7200), ("1-12:00:30", 129630)],
)
def test_times(text: int | str, expected: float) -> None:
    assert seconds(text) == expected


@pytest.mark.parametrize("text", ["", "soon", "1:2:3:4", "-5", "1.5", "2h", "1-"])
def test_what_is_no_time_is_refused(text: str) -> None:
    with pytest.raises(UserError, match=r"^run.time_limit = .*expected seconds, MM:SS, HH:MM:SS"):
        seconds(text)


def test_a_name_that_is_no_signal_is_refused(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"no signal 'USR3'; did you mean 'USR[12]'\?"):
        Stopping(RunSettings(signals=("USR3",)), tmp_path, 0)
    with pytest.raises(UserError, match="no signal 'KILL'"):
        Stopping(RunSettings(signals=("KILL",)), tmp_path, 0)


def test_signals_are_caught_inside_the_context_only(tmp_path: Path) -> None:
    before = signal.getsignal(signal.SIGUSR1)
    with Stopping(RunSettings(signals=("SIGUSR1",)), tmp_path, 1) as stopping:
        assert stopping.note() == 0
        os.kill(os.getpid(), signal.SIGUSR1)
        assert stopping.note() >= STOP
        assert stopping.reason(stopping.note()) == "SIGUSR1"
    assert signal.getsignal(signal.SIGUSR1) is before


def test_another_thread_leaves_signals_alone(tmp_path: Path) -> None:
    """A program that trains in a thread of its own has its signals for itself."""
    before = signal.getsignal(signal.SIGUSR1)
    seen = []

    def work() -> None:
        with Stopping(RunSettings(), tmp_path, 0) as stopping:
            seen.extend([stopping.note(), signal.getsignal(signal.SIGUSR1)])

    thread = threading.Thread(target=work)
    thread.start()
    thread.join()
    assert seen == [0, before]


def test_files_are_seen_by_rank_0(tmp_path: Path) -> None:
    first, second = (Stopping(RunSettings(), tmp_path, rank) for rank in (0, 1))
    (tmp_path / "SAVE").touch()
    assert (first.note(), second.note()) == (SAVE, 0)
    first.obeyed(SAVE)
    assert first.note() == 0 and not (tmp_path / "SAVE").exists()
    (tmp_path / "STOP").touch()
    assert Stopping(RunSettings(), tmp_path, 0).note() == STOP
    with pytest.raises(UserError, match="STOP stops this run; remove that file"):
        first.refuse()
    second.refuse()  # rank 0 is the one who looks


def test_a_time_limit_leaves_time_for_a_step_and_a_save(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    stopping = Stopping(RunSettings(time_limit=10_000), tmp_path, 0)
    begin = time.monotonic()
    now = begin
    monkeypatch.setattr(time, "monotonic", lambda: now)
    stopping.took(step=100)
    stopping.took(save=500)
    assert stopping.note() == 0
    now = begin + 10_000 - 2 * 600 - 1_000  # this process is older than this test
    assert stopping.note() == 0
    now = begin + 10_000 - 2 * 600 - 29
    assert stopping.reason(stopping.note()) == "the time limit of 10000 s"


# --- whole runs ----------------------------------------------------------------------------------


class Job:
    """A training job under mpirun."""

    def __init__(self, command: list[str], environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            command, env=environment, text=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )

    def end(self) -> tuple[int, str]:
        """Exit code and output."""
        output, _ = self.process.communicate(timeout=60)
        return self.process.returncode, output


@pytest.fixture
def start(
    mpirun_program: str, environment: dict[str, str], tmp_path: Path
) -> Iterator[Callable[..., Job]]:
    """Starts a run of two ranks in `tmp_path / "run"`."""
    config = tmp_path / "run.toml"
    config.write_text(CONFIG)
    jobs: list[Job] = []

    def begin(*more: str) -> Job:
        program = ["-m", "mpillm", "train", str(config), f"--run.dir={tmp_path / 'run'}", *more]
        jobs.append(Job([mpirun_program, "-n", "2", sys.executable, *program], environment))
        return jobs[-1]

    yield begin
    for job in jobs:
        if job.process.poll() is None:
            job.process.kill()
            job.process.wait()


def steps_done(folder: Path) -> int:
    """Lines of the metrics."""
    path = folder / "metrics.jsonl"
    return path.read_text().count("\n") if path.exists() else 0


def wait_for(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + 40
    while not condition():
        assert time.monotonic() < deadline, "it did not happen"
        time.sleep(0.005)


def saved(folder: Path) -> int:
    """Step of the newest checkpoint; 0 when there is none."""
    newest = latest(folder / "checkpoints")
    return (step_of(newest.name) or 0) if newest else 0


def test_files_signals_and_limits_save_and_end(start: Callable[..., Job], tmp_path: Path) -> None:
    run = tmp_path / "run"
    job = start()
    wait_for(lambda: steps_done(run) >= 3)
    (run / "SAVE").touch()
    wait_for(lambda: saved(run) > 0 and not (run / "SAVE").exists())
    first, seen = saved(run), steps_done(run)
    wait_for(lambda: steps_done(run) > seen)  # it goes on
    (run / "STOP").touch()
    code, output = job.end()
    assert code == EXIT_REQUEUE
    stopped = int(re.search(r"stopped by the file STOP after step (\d+)", output)[1])  # type: ignore[index]
    assert stopped == saved(run) == steps_done(run) > first

    code, output = start().end()  # a scheduler that starts it again does not get past the file
    assert code == 2 and "STOP stops this run; remove that file to go on" in output
    assert output.count("mpillm: error:") == 1
    (run / "STOP").unlink()

    job = start("--checkpoint.async=true", "--checkpoint.every=5")
    wait_for(lambda: steps_done(run) > stopped + 3)
    job.process.send_signal(signal.SIGUSR1)
    code, output = job.end()
    assert code == EXIT_REQUEUE and f"resumed after step {stopped}" in output
    assert "stopped by SIGUSR1" in output
    signalled = saved(run)
    assert signalled == steps_done(run) > stopped

    begin = time.monotonic()
    code, output = start("--run.time_limit=5").end()
    assert code == EXIT_REQUEUE and "stopped by the time limit of 5 s" in output
    assert time.monotonic() - begin < 8  # the limit counts from rank 0's beginning
    assert saved(run) == steps_done(run) > signalled


def state(folder: Path) -> dict[tuple[str, str], bytes]:
    """Every array of the newest checkpoint."""
    newest = latest(folder / "checkpoints")
    assert newest is not None
    with Checkpoint.open(newest) as checkpoint:
        return {
            (kind, name): np.ascontiguousarray(
                checkpoint.read(kind, name, Shard.whole(checkpoint.shape(name, kind)))
            ).tobytes()
            for kind in checkpoint.kinds()
            for name in checkpoint.names(kind)
        }


def test_a_stopped_run_goes_on_bitwise(start: Callable[..., Job], tmp_path: Path) -> None:
    """SIGTERM to one of the ranks, in the middle of a run, changes nothing in what it becomes."""
    run, steps = tmp_path / "run", "--train.steps=150"
    job = start(steps)
    wait_for(lambda: steps_done(run) >= 3)
    rank = int(json.loads((run / "lock").read_text())["pid"])
    os.kill(rank, signal.SIGTERM)
    code, output = job.end()
    assert code == EXIT_REQUEUE, output
    assert 0 < saved(run) < 150
    code, output = start(steps).end()
    assert code == 0 and "resumed after step" in output, output
    interrupted = state(run)
    run.rename(tmp_path / "interrupted")
    assert start(steps).end()[0] == 0
    assert state(run) == interrupted
