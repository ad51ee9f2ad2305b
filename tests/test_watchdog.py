"""The watchdog alone: what it takes for a hang, what it leaves alone, and how it ends a job."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from mpillm.errors import EXIT_HUNG, UserError
from mpillm.parallel.flight import flight_name, read_flight
from mpillm.parallel.hang_report import REPORT, processes_of, stack_name
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.watchdog import Watchdog

BEAT = 0.1
TIMEOUT = 0.4


class Aborted:
    """Stands in for MPI: notes the exit code."""

    def __init__(self) -> None:
        self.codes: list[int] = []
        self.happened = threading.Event()

    def __call__(self, code: int) -> None:
        self.codes.append(code)
        self.happened.set()


@pytest.fixture
def aborted() -> Aborted:
    return Aborted()


Watch = Callable[..., Watchdog]


@pytest.fixture(autouse=True)
def short_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    """For stacks of ranks that have no process."""
    monkeypatch.setattr("mpillm.parallel.watchdog._STACKS", 0.3)


@pytest.fixture
def watch(tmp_path: Path, aborted: Aborted) -> Watch:
    """Makes the watchdog of rank 0 of two."""

    def make(recorder: Recorder, **options: Any) -> Watchdog:
        options = {"hang_timeout": TIMEOUT, "slow_timeout": 30.0, "beat": BEAT, **options}
        return Watchdog(recorder, tmp_path, aborted, **options)

    return make


def recorder_of(folder: Path, rank: int, size: int = 2) -> Recorder:
    return Recorder(folder / flight_name(rank), rank=rank, size=size)


def test_it_beats(watch: Watch, tmp_path: Path, aborted: Aborted) -> None:
    recorder = recorder_of(tmp_path, 0, 1)
    with watch(recorder, hang_timeout=30.0):
        time.sleep(5 * BEAT)
        flight = read_flight(tmp_path / flight_name(0))
        assert flight.heartbeat is not None and time.time() - flight.heartbeat < 5 * BEAT
    assert not aborted.codes
    assert read_flight(tmp_path / flight_name(0)).cause == "left"
    assert [path.name for path in tmp_path.iterdir()] == [flight_name(0)]  # no empty stack


def test_a_hang_is_reported_and_ended(
    watch: Watch, tmp_path: Path, aborted: Aborted, capsys: Any
) -> None:
    mine, other = recorder_of(tmp_path, 0), recorder_of(tmp_path, 1)
    begin = time.time()
    with watch(mine):
        mine.begin("data", "allreduce", 64, wait=True)
        assert aborted.happened.wait(20)
        assert TIMEOUT < time.time() - begin < TIMEOUT + 5
        del other
    assert aborted.codes == [EXIT_HUNG]
    report = (tmp_path / REPORT).read_text()
    assert "rank 1 never entered allreduce #1 over data, where rank 0 has waited" in report
    assert "test_a_hang_is_reported_and_ended" in report  # the stack of the one that waits
    assert capsys.readouterr().err.strip() == report.strip()
    assert "Thread 0x" in (tmp_path / stack_name(0)).read_text()
    assert read_flight(tmp_path / flight_name(0)).cause.startswith("hung")


def test_a_rank_that_gets_on_is_waited_for(watch: Watch, tmp_path: Path, aborted: Aborted) -> None:
    mine, other = recorder_of(tmp_path, 0), recorder_of(tmp_path, 1)
    with watch(mine):
        entry = mine.begin("data", "allreduce", 64, wait=True)
        for _ in range(20):
            time.sleep(TIMEOUT / 6)
            other.poll()
        mine.end(entry)
    assert not aborted.codes and not (tmp_path / REPORT).exists()


@pytest.mark.parametrize("where", ["here", "there"])
def test_an_activity_is_waited_for(
    watch: Watch, tmp_path: Path, aborted: Aborted, where: str
) -> None:
    mine, other = recorder_of(tmp_path, 0), recorder_of(tmp_path, 1)
    with watch(mine):
        if where == "here":
            with mine.activity("save"):
                time.sleep(3 * TIMEOUT)
        else:
            with other.activity("save"):
                entry = mine.begin("data", "allreduce", 64, wait=True)
                time.sleep(3 * TIMEOUT)
                mine.end(entry)
    assert not aborted.codes


def test_an_activity_is_not_waited_for_for_ever(
    watch: Watch, tmp_path: Path, aborted: Aborted
) -> None:
    mine = recorder_of(tmp_path, 0, 1)
    with watch(mine, slow_timeout=2 * TIMEOUT), mine.activity("evaluate"):
        begin = time.time()
        assert aborted.happened.wait(20)
    assert time.time() - begin > 2 * TIMEOUT
    assert "rank 0 has been in 'evaluate' for" in (tmp_path / REPORT).read_text()


def test_without_a_timeout_it_only_beats(watch: Watch, tmp_path: Path, aborted: Aborted) -> None:
    mine = recorder_of(tmp_path, 0)
    with watch(mine, hang_timeout=0.0):
        mine.begin("data", "allreduce", 64, wait=True)
        time.sleep(5 * BEAT)
    assert not aborted.codes
    assert read_flight(tmp_path / flight_name(0)).heartbeat is not None


def test_a_healthy_rank_touches_no_disk(watch: Watch, tmp_path: Path, aborted: Aborted) -> None:
    """Ten thousand of them would, each second. It does not even see that others hang."""
    mine = recorder_of(tmp_path, 0)
    with watch(mine):
        time.sleep(0.01)
        (tmp_path / "hang").touch()
        for _ in range(30):
            mine.poll()
            time.sleep(BEAT / 5)
        assert not (tmp_path / stack_name(0)).read_text()


def test_the_end_that_another_rank_makes(
    watch: Watch, tmp_path: Path, aborted: Aborted, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The stack is written within a beat; the job ended only if the other one fails to."""
    monkeypatch.setattr("mpillm.parallel.watchdog._PATIENCE", 1.0)
    mine = recorder_of(tmp_path, 0)
    with watch(mine):
        mine.begin("data", "allreduce", 64, wait=True)
        (tmp_path / "hang").touch()
        time.sleep(5 * BEAT)
        assert "Thread 0x" in (tmp_path / stack_name(0)).read_text()
        assert not aborted.codes
        assert aborted.happened.wait(20)
    assert aborted.codes == [EXIT_HUNG]
    assert not (tmp_path / REPORT).exists()


def test_a_hang_of_an_older_job_is_none(watch: Watch, tmp_path: Path, aborted: Aborted) -> None:
    (tmp_path / "hang").touch()
    os.utime(tmp_path / "hang", (1e9, 1e9))
    mine = recorder_of(tmp_path, 0)
    with watch(mine):
        mine.begin("data", "allreduce", 64, wait=True)
        time.sleep(TIMEOUT / 2)
        assert not (tmp_path / stack_name(0)).read_text()


def test_one_looks_for_all(watch: Watch, tmp_path: Path, aborted: Aborted) -> None:
    """A rank that waits, too, does not look before its time has come."""
    mine, _ = recorder_of(tmp_path, 0), recorder_of(tmp_path, 1)
    (tmp_path / "look").touch()
    os.utime(tmp_path / "look", (time.time() + 1.5, time.time() + 1.5))
    begin = time.time()
    with watch(mine):
        mine.begin("data", "allreduce", 64, wait=True)
        assert aborted.happened.wait(20)
    assert time.time() - begin > 1.2


def test_flights_on_a_disk_of_the_nodes_own(tmp_path: Path, aborted: Aborted) -> None:
    """They are copied to the shared folder when somebody looks, and at the end."""
    own, shared = tmp_path / "own", tmp_path / "shared"
    mine, other = recorder_of(own, 0), recorder_of(own, 1)
    with Watchdog(mine, shared, aborted, TIMEOUT, 30.0, beat=BEAT):
        mine.begin("data", "allreduce", 64, wait=True)
        assert aborted.happened.wait(20)
    assert {path.name for path in shared.glob("rank-*")} >= {
        flight_name(0),
        flight_name(1),  # of a rank of this node that does not copy its own
        stack_name(0),
    }
    assert "rank 1 never entered" in (shared / REPORT).read_text()
    assert read_flight(shared / flight_name(0)).waiting is not None
    assert read_flight(shared / flight_name(1)).rank == other.rank


def test_what_leaves_the_block_is_the_cause(watch: Watch, tmp_path: Path) -> None:
    recorder = recorder_of(tmp_path, 0, 1)
    with pytest.raises(ValueError), watch(recorder):
        raise ValueError("no such\nthing")
    assert read_flight(tmp_path / flight_name(0)).cause == "ValueError: no such thing"
    recorder = recorder_of(tmp_path, 0, 1)
    with watch(recorder):
        recorder.goodbye("complete")
    assert read_flight(tmp_path / flight_name(0)).cause == "complete"


def test_an_error_of_mpi_is_explained_once(watch: Watch, tmp_path: Path, capsys: Any) -> None:
    mine, other = recorder_of(tmp_path, 0), recorder_of(tmp_path, 1)
    error = type("Exception", (RuntimeError,), {"__module__": "mpi4py.MPI"})
    other.begin("data", "allreduce", 80)
    for _ in range(2):
        with pytest.raises(error), watch(mine):
            mine.begin("data", "allreduce", 64)
            raise error("MPI_ERR_TRUNCATE: message truncated")
    text = capsys.readouterr().err
    assert text.count("ranks 0 and 1 made different calls #1 over data") == 1
    assert (tmp_path / REPORT).read_text() == text
    flight = read_flight(tmp_path / flight_name(0))
    assert flight.cause == "MPI.Exception: MPI_ERR_TRUNCATE: message truncated"


def test_a_folder_that_cannot_be_made(tmp_path: Path, aborted: Aborted) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be written to"):
        Watchdog(Recorder(), tmp_path / "file" / "x", aborted).__enter__()


SLEEPER = """
import sys, time
from pathlib import Path
from mpillm.parallel.recorder import Recorder
recorder = Recorder(Path(sys.argv[1]), rank=1, size=2)
recorder.beat()
print("ready", flush=True)
time.sleep(1000)
"""


def test_a_stopped_process_is_told_and_let_go(
    watch: Watch, tmp_path: Path, aborted: Aborted
) -> None:
    """Not killed: the launcher ends it with the others, once it can be ended."""
    command = [sys.executable, "-c", SLEEPER, str(tmp_path / flight_name(1))]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as process:
        try:
            assert process.stdout is not None and process.stdout.readline()
            process.send_signal(signal.SIGSTOP)
            mine = recorder_of(tmp_path, 0)
            with watch(mine, hang_timeout=3.0):
                mine.begin("data", "allreduce", 64, wait=True)
                assert aborted.happened.wait(30)
            report = (tmp_path / REPORT).read_text()
            assert f"(process {process.pid} on {os.uname().nodename}: stopped by a sig" in report
            deadline = time.time() + 5
            while state(process.pid) == "T" and time.time() < deadline:
                time.sleep(0.05)
            assert state(process.pid) in "SR"
        finally:
            process.kill()
    gone = read_flight(tmp_path / flight_name(1))
    assert processes_of({1: gone}) == {1: "gone"}


def state(pid: int) -> str:
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0]
