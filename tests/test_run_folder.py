"""The run folder: its lock, which keeps jobs apart, and the numbers of its attempts."""

from __future__ import annotations

import errno
import fcntl
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import msgspec
import pytest

from mpillm.checkpoint.store import latest
from mpillm.errors import UserError
from mpillm.training import lock_record, run_lock
from mpillm.training.folder import make_folder, next_attempt, take_folder
from mpillm.training.lock_record import Record, State, Watch, decode
from mpillm.training.run_lock import RunLock

# A process that takes the lock of a folder, says so, and keeps it.
HOLDER = """
import sys, time
from pathlib import Path
from mpillm.training.run_lock import RunLock
if sys.argv[2] == "without locks":
    import errno, fcntl
    def flock(handle, how):
        raise OSError(errno.ENOSYS, "not implemented")
    fcntl.flock = flock
RunLock(Path(sys.argv[1]), beat=0.2, patience=1).acquire()
print("held", flush=True)
time.sleep(60)
"""


@pytest.fixture(autouse=True)
def _short_grace(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(run_lock, "_GRACE", 0.2)


@pytest.fixture(params=["locks", "without locks"])
def locks(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """A file system with locks, and one without."""
    if request.param == "without locks":
        take_locks_away(monkeypatch, errno.ENOSYS)
    return str(request.param)


def take_locks_away(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    def flock(handle: int, how: int) -> None:
        raise OSError(number, os.strerror(number))

    monkeypatch.setattr(fcntl, "flock", flock)


def quick(folder: Path, lost: Callable[[str], None] | None = None) -> RunLock:
    """A lock with little patience."""
    return RunLock(folder, beat=0.1, patience=0.4, lost=lost)


@contextmanager
def holder(
    folder: Path, environment: dict[str, str], locks: str = "locks"
) -> Iterator[subprocess.Popen[str]]:
    """Another process that holds the folder."""
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, folder, locks],
        env={**environment, "SLURM_JOB_ID": "4711"},
        stdout=subprocess.PIPE,
        text=True,
    ) as process:
        try:
            assert process.stdout is not None and process.stdout.readline() == "held\n"
            yield process
        finally:
            process.kill()


def foreign(**changes: object) -> Record:
    """A record of another machine."""
    record = msgspec.structs.replace(Record.own(), host="node7", machine="another boot", token="x")
    return msgspec.structs.replace(record, **changes)


def leave(folder: Path, record: Record) -> None:
    """What a job of another machine writes, in place as a beat does."""
    handle = os.open(folder / "lock", os.O_WRONLY | os.O_CREAT)
    os.pwrite(handle, msgspec.json.encode(record).ljust(1023) + b"\n", 0)
    os.close(handle)


# --- one holder -----------------------------------------------------------------------------------


def test_taken_released_and_taken_again(tmp_path: Path, locks: str) -> None:
    for _ in range(3):
        with quick(tmp_path):
            found = decode((tmp_path / "lock").read_bytes())
            assert found is not None and found.pid == os.getpid()
        assert (tmp_path / "lock").read_bytes() == b""


def test_a_second_job_is_refused_and_told_who_has_it(
    tmp_path: Path, environment: dict[str, str], locks: str
) -> None:
    with holder(tmp_path, environment, locks) as process:
        before = sorted(path.name for path in tmp_path.iterdir())
        with pytest.raises(UserError) as refusal:
            quick(tmp_path).acquire()
        text = str(refusal.value)
        assert "\n" not in text and "another run.dir" in text
        assert f"process {process.pid} on {os.uname().nodename} (SLURM_JOB_ID 4711) since" in text
        record = decode((tmp_path / "lock").read_bytes())
        assert record is not None and record.pid == process.pid
        assert sorted(path.name for path in tmp_path.iterdir()) == before


def test_a_job_that_stands_still_is_no_dead_one(
    tmp_path: Path, environment: dict[str, str], locks: str
) -> None:
    with holder(tmp_path, environment, locks) as process:
        process.send_signal(signal.SIGSTOP)
        with pytest.raises(UserError, match="is in use by process"):
            quick(tmp_path).acquire()
        process.send_signal(signal.SIGCONT)


def test_a_killed_job_leaves_the_folder_at_once(
    tmp_path: Path, environment: dict[str, str], locks: str
) -> None:
    with holder(tmp_path, environment, locks) as process:
        process.kill()
        begin = time.monotonic()  # and it is not waited for: it may be on its way out
        with RunLock(tmp_path, beat=0.1):
            assert time.monotonic() - begin < 1
            process.wait()


def test_a_reused_process_number_is_no_living_job(tmp_path: Path) -> None:
    own = Record.own()
    leave(tmp_path, msgspec.structs.replace(own, started=own.started - 1, token="x"))
    begin = time.monotonic()
    with quick(tmp_path):
        assert time.monotonic() - begin < 0.2


def test_another_open_file_does_not_let_go_of_the_lock(tmp_path: Path) -> None:
    with quick(tmp_path):
        (tmp_path / "lock").read_bytes()  # a POSIX record lock would end with this
        handle = os.open(tmp_path / "lock", os.O_RDWR)
        with pytest.raises(BlockingIOError):
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        os.close(handle)


# --- other machines -------------------------------------------------------------------------------


def test_a_silent_record_of_another_machine_is_taken_over(tmp_path: Path, locks: str) -> None:
    leave(tmp_path, foreign())
    begin = time.monotonic()
    with quick(tmp_path):
        assert time.monotonic() - begin > 0.4


def test_a_beating_record_of_another_machine_is_not(tmp_path: Path, locks: str) -> None:
    done = threading.Event()

    def beat() -> None:
        count = 0
        while not done.wait(0.1):
            leave(tmp_path, foreign(beat=(count := count + 1), job="PBS_JOBID 12.server"))

    leave(tmp_path, foreign())
    thread = threading.Thread(target=beat)
    thread.start()
    try:
        with pytest.raises(UserError, match=r"on node7 \(PBS_JOBID 12.server\) since"):
            quick(tmp_path).acquire()
    finally:
        done.set()
        thread.join()


def test_a_record_that_says_nothing_is_watched_like_one_of_another_machine(tmp_path: Path) -> None:
    for raw in (b"\0" * 1024, b"{", b"[" * 1024, b"\xff\xfe", b'{"pid": -1}', b"1" * 10_000):
        watch = Watch(0.01)
        assert watch.judge(raw) is State.UNKNOWN
        time.sleep(0.02)
        assert watch.judge(raw) is State.FREE
    (tmp_path / "lock").write_bytes(b"\0" * 1024)
    begin = time.monotonic()
    with quick(tmp_path):
        assert time.monotonic() - begin > 0.4


@pytest.mark.parametrize("number", [errno.ENOLCK, errno.ENOSYS, errno.EOPNOTSUPP])
def test_file_systems_without_locks_are_known_by_their_answers(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, number: int
) -> None:
    take_locks_away(monkeypatch, number)
    with quick(tmp_path), pytest.raises(UserError, match="is in use by"):
        quick(tmp_path).acquire()


def test_a_holder_whose_record_is_replaced_ends(tmp_path: Path, locks: str) -> None:
    told: list[str] = []
    lock = quick(tmp_path, told.append)
    lock.acquire()
    leave(tmp_path, foreign())
    deadline = time.monotonic() + 5
    while not told and time.monotonic() < deadline:
        time.sleep(0.01)
    assert len(told) == 1 and "was taken over by process" in told[0] and "node7" in told[0]
    lock.release()
    record = decode((tmp_path / "lock").read_bytes())
    assert record is not None and record.token == "x", "another's record is not removed"


def test_a_lost_folder_ends_the_process(tmp_path: Path, environment: dict[str, str]) -> None:
    with holder(tmp_path, environment) as process:
        leave(tmp_path, foreign())
        assert process.wait(10) == 2


def test_the_beat_survives_a_disk_that_stumbles(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    told: list[str] = []
    with quick(tmp_path, told.append):

        def fail(path: Path) -> bytes:
            raise OSError(errno.EIO, "input/output error")

        with monkeypatch.context() as patch:
            patch.setattr(run_lock, "_read", fail)
            time.sleep(0.25)
        before = (tmp_path / "lock").read_bytes()
        time.sleep(0.35)
        assert (tmp_path / "lock").read_bytes() != before and not told


# --- many at once ---------------------------------------------------------------------------------


@pytest.mark.parametrize("left", ["nothing", "one of this machine", "one of another machine"])
def test_exactly_one_of_many_gets_it(tmp_path: Path, locks: str, left: str) -> None:
    for number in range(2):
        folder = tmp_path / str(number)
        folder.mkdir()
        if left == "one of this machine":
            leave(folder, msgspec.structs.replace(Record.own(), started=0, token="x"))
        elif left == "one of another machine":
            leave(folder, foreign())
        held: list[RunLock] = []
        refused: list[UserError] = []
        told: list[str] = []
        gate = threading.Barrier(8)

        def compete() -> None:
            lock = RunLock(folder, beat=0.3, patience=0.4, lost=told.append)  # noqa: B023
            gate.wait()  # noqa: B023
            try:
                lock.acquire()
                held.append(lock)  # noqa: B023
            except UserError as error:
                refused.append(error)  # noqa: B023

        threads = [threading.Thread(target=compete) for _ in range(8)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        deadline = time.monotonic() + 2  # one that was too late finds out at its next beat
        while len(held) - len(told) > 1 and time.monotonic() < deadline:
            time.sleep(0.01)
        assert (len(held) - len(told), len(held) + len(refused)) == (1, 8)
        for lock in held:
            lock.release()


@pytest.mark.parametrize("kind", ["locks", "without locks"])
def test_exactly_one_of_many_processes_gets_it(
    tmp_path: Path, environment: dict[str, str], kind: str
) -> None:
    command = [sys.executable, "-c", HOLDER, tmp_path, kind]
    pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
    processes = [subprocess.Popen(command, env=environment, **pipes) for _ in range(6)]
    try:
        deadline = time.monotonic() + 30
        while sum(process.poll() is None for process in processes) > 1:
            assert time.monotonic() < deadline
            time.sleep(0.02)
        (winner,) = (process for process in processes if process.poll() is None)
        assert winner.stdout is not None and winner.stdout.readline() == b"held\n"
        record = decode((tmp_path / "lock").read_bytes())
        assert record is not None and record.pid == winner.pid
        for process in processes:
            if process is not winner:
                output, error = process.communicate()
                assert output == b"" and b"is in use by" in error
    finally:
        for process in processes:
            process.kill()
            process.communicate()


def test_a_lock_that_was_moved_away_is_not_the_folders(tmp_path: Path) -> None:
    """A job that waits for a folder which another moves away does not get the moved one."""
    run, kept = tmp_path / "run", tmp_path / "kept"
    run.mkdir()
    first = quick(run)
    first.acquire()
    second = RunLock(run, beat=0.1, patience=2)
    thread = threading.Thread(target=second.acquire)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(run_lock, "_GRACE", 20.0)
        thread.start()
        time.sleep(0.2)
        run.rename(kept)
        first.release()
        time.sleep(0.2)
        run.mkdir()
        thread.join(10)
    record = decode((run / "lock").read_bytes())
    assert record is not None and (kept / "lock").read_bytes() == b""
    second.release()


# --- files that are no lock -----------------------------------------------------------------------


@pytest.mark.parametrize("kind", ["a link", "a folder", "a pipe", "a read-only file"])
def test_what_is_no_lock_is_refused(tmp_path: Path, kind: str) -> None:
    path, target = tmp_path / "lock", tmp_path / "target"
    target.write_text("dear")
    if kind == "a link":
        path.symlink_to(target)
    elif kind == "a folder":
        path.mkdir()
    elif kind == "a pipe":
        os.mkfifo(path)
    else:
        path.touch(0o444)
        if os.access(path, os.W_OK):
            pytest.skip("root may write read-only files")
    with pytest.raises(UserError, match="its file 'lock' cannot be used"):
        quick(tmp_path).acquire()
    assert target.read_text() == "dear"


def test_a_full_disk_is_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*_: object) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UserError, match="No space left on device"):
            quick(tmp_path).acquire()
    quick(tmp_path).acquire()


def test_a_record_never_breaks_a_line(monkeypatch: pytest.MonkeyPatch) -> None:
    record = Record.own({"SLURM_JOB_ID": "1\n2\x1b[31m" + "x" * 500})
    assert "\n" not in str(record) and "\x1b" not in str(record)
    assert decode(msgspec.json.encode(record)) == record
    assert decode(msgspec.json.encode(msgspec.structs.replace(record, host="a\nb"))) is None
    assert len(msgspec.json.encode(msgspec.structs.replace(record, host="x" * 128))) < 1024


def test_without_a_process_table_records_are_judged_by_their_beat(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(lock_record, "_machine", lambda: "")
    watch, raw = Watch(0.05), msgspec.json.encode(Record.own())
    assert watch.judge(raw) is State.UNKNOWN
    time.sleep(0.1)
    assert watch.judge(raw) is State.FREE
    assert watch.judge(raw + b" ") is State.ALIVE


# --- the folder -----------------------------------------------------------------------------------


def test_a_fresh_start_moves_a_run_away_only_when_nobody_works_in_it(tmp_path: Path) -> None:
    run = tmp_path / "run"
    first = take_folder(run, fresh=True)
    (run / "checkpoints" / "step-00000001").mkdir(parents=True)
    with pytest.raises(UserError, match="is in use by"):
        take_folder(run, fresh=True)
    assert latest(run / "checkpoints") is not None and not (tmp_path / "run.1").exists()
    first.release()
    take_folder(run, fresh=False).release()
    assert latest(run / "checkpoints") is not None
    second = take_folder(run, fresh=True)
    assert latest(run / "checkpoints") is None
    assert latest(tmp_path / "run.1" / "checkpoints") is not None
    assert (tmp_path / "run.1" / "lock").read_bytes() == b""
    with pytest.raises(UserError, match="is in use by"):
        take_folder(run, fresh=False)
    second.release()
    take_folder(run, fresh=True).release()
    assert not (tmp_path / "run.2").exists(), "there was nothing to keep"


def test_a_folder_that_cannot_be_made_is_told(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made: Not a directory"):
        make_folder(tmp_path / "file" / "run")


def test_attempts_are_numbered_and_the_last_ones_kept(tmp_path: Path) -> None:
    (tmp_path / "flight").mkdir()
    (tmp_path / "flight" / "rank-00000.bin").touch()  # of an older version; not an attempt
    assert [next_attempt(tmp_path) for _ in range(8)] == list(range(1, 9))
    names = sorted(path.name for path in (tmp_path / "flight").iterdir())
    assert names == ["00004", "00005", "00006", "00007", "00008", "rank-00000.bin"]
    assert next_attempt(tmp_path, keep=1) == 9
    names = sorted(path.name for path in (tmp_path / "flight").iterdir())
    assert names == ["00009", "rank-00000.bin"]


# --- the command ----------------------------------------------------------------------------------

CONFIG = """
[model]
layers = 1
heads = 1
width = 4
[train]
steps = 100000
batch_size = 1
sequence_length = 4
[checkpoint]
every = 20
"""


def test_a_second_command_is_refused_and_after_a_kill_it_resumes(
    environment: dict[str, str], tmp_path: Path
) -> None:
    config, run = tmp_path / "run.toml", tmp_path / "run"
    text = Path(__file__).parent.parent / "LICENSE"
    config.write_text(f'{CONFIG}[data]\ntext = ["{text}"]\n')
    command = [sys.executable, "-m", "mpillm", "train", config, f"--run.dir={run}"]
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    first = subprocess.Popen(command, env=environment, **quiet)
    try:
        wait_for(lambda: latest(run / "checkpoints") is not None, first)
        for options in ([], ["--fresh"]):
            before = names(run)
            second = subprocess.run(
                [*command, *options], env=environment, capture_output=True, text=True, timeout=60
            )
            assert second.returncode == 2
            assert second.stdout == "" and second.stderr.count("\n") == 1
            assert f"is in use by process {first.pid} on " in second.stderr
            assert names(run) == before and not (tmp_path / "run.1").exists()
        assert first.poll() is None
        first.kill()  # and not waited for
        third = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True
        )
        try:
            assert third.stderr is not None
            lines = iter(third.stderr.readline, "")
            assert any("resumed after step" in line for line in lines)
        finally:
            third.kill()
            third.communicate()
    finally:
        first.kill()
        first.wait()


def names(run: Path) -> list[str]:
    """Files and folders that a running job does not add to."""
    return sorted(path.name for path in [*run.iterdir(), *(run / "flight").iterdir()])


def wait_for(condition: Callable[[], bool], process: subprocess.Popen[bytes]) -> None:
    deadline = time.monotonic() + 60
    while not condition():
        assert process.poll() is None and time.monotonic() < deadline
        time.sleep(0.01)
