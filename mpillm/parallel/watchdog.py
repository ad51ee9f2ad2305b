"""The watchdog of a rank: a thread that says that the process lives, and ends a job that hangs.

Each second it beats. When the main thread has been blocked in one call for `hang_timeout`, or has
made no progress outside of calls for as long, it looks at the flights of all ranks. Where these say
that the job will not go on by itself, every rank's stack is written, one rank composes the report
`report.txt`, prints it and aborts the job.

Files in the attempt's folder, besides the flights: `look`, whose time says when the next one may
look, so that of ten thousand waiting ranks one does; `hang`, made by the one that ends the job.
"""

from __future__ import annotations

import contextlib
import faulthandler
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType

from mpillm.errors import EXIT_HUNG, UserError
from mpillm.parallel.diagnosis import SILENCE, diagnose
from mpillm.parallel.findings import Diagnosis
from mpillm.parallel.flight import HUNG, Flight, Flights, flight_name, parse, read_flights
from mpillm.parallel.hang_report import (
    DEAD,
    REPORT,
    is_running,
    processes_of,
    report_of,
    silence,
    stack_name,
)
from mpillm.parallel.recorder import Recorder

__all__ = ["Watchdog"]

_STACKS = 2.0  # seconds that the report waits for the stacks of ranks that are alive
_LEASE = 10.0  # seconds for one look
_LONGEST = 60.0  # seconds between looks, at most
_PATIENCE = 10.0  # seconds after which a rank ends a hanging job that another should have ended


class Watchdog:
    """Beats and watches as long as its block runs.

    Leaving the block by an exception notes it as the cause of the rank's end. Where MPI reports an
    error because ranks made different calls, the ranks and the calls are printed.
    """

    def __init__(
        self,
        recorder: Recorder,
        folder: Path,
        abort: Callable[[int], object],
        hang_timeout: float = 600.0,
        slow_timeout: float = 3600.0,
        *,
        beat: float = 1.0,
    ) -> None:
        """folder: this attempt's flight folder, on a disk that all ranks share.

        The recorder's own file may lie elsewhere, on a node's own disk: it is then copied to
        `folder` when somebody looks, and at the end. abort: ends the job with an exit code, from
        any thread. hang_timeout: seconds; 0: nothing is watched. slow_timeout: the same while a
        rank that others wait for is in an activity. beat: seconds between two beats.
        """
        self._recorder = recorder
        self._folder = folder
        self._abort = abort
        self._hang_timeout = hang_timeout
        self._slow_timeout = slow_timeout
        self._beat = beat
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="watchdog", daemon=True)
        path = recorder.path
        self._elsewhere = path is not None and path.parent.resolve() != folder.resolve()
        self._stack_path = (path.parent if path else folder) / stack_name(recorder.rank)
        self._published = 0.0
        self._parent = os.getppid()

    def __enter__(self) -> Watchdog:
        """Begin. Raises UserError where the folder cannot be made."""
        try:
            self._folder.mkdir(parents=True, exist_ok=True)
            self._stack = self._stack_path.open("w", encoding="utf-8")
        except OSError as error:
            raise UserError(
                f"flight folder {self._folder} cannot be written to: {error.strerror}"
            ) from None
        self._begun = time.time()
        self._fatal = not faulthandler.is_enabled()
        if self._fatal:  # a crash in C leaves its stack, too
            faulthandler.enable(self._stack)
        self._recorder.beat()
        self._arm()
        self._thread.start()
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        value: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """End. What went wrong becomes the cause of this rank's end, unless one was noted."""
        self._stop.set()
        self._thread.join()
        if value is None:
            self._recorder.goodbye("left")
        else:
            of_mpi = type(value).__module__.startswith("mpi4py")
            self._recorder.goodbye(f"{'MPI.' * of_mpi}{type(value).__name__}: {value}")
            if of_mpi:
                self._explain()
        faulthandler.cancel_dump_traceback_later()
        if self._fatal:
            faulthandler.disable()
        self._stack.close()
        with contextlib.suppress(OSError):  # its only use is over
            if not self._stack_path.stat().st_size:
                self._stack_path.unlink()
        if self._elsewhere:
            self._publish()

    # -- the thread ------------------------------------------------------------------------------

    def _run(self) -> None:
        while not self._stop.wait(self._beat):
            self._recorder.beat()
            if self._recorder.size > 1 and os.getppid() != self._parent:
                # Without their launcher the ranks would wait for each other, and keep the run.
                self._recorder.goodbye("the launcher is gone")
                self._abort(1)
            if self._hang_timeout:
                self._arm()
                self._watch()

    def _arm(self) -> None:
        """Have the stack written from C should this thread get no turn for too long."""
        if self._hang_timeout:
            faulthandler.dump_traceback_later(self._hang_timeout + self._beat / 2, file=self._stack)

    def _watch(self) -> None:
        now, mine = time.time(), self._mine()
        still = now - (mine.progress if mine.waiting is None else mine.waiting_since)
        if still < 1.5 * self._beat and not self._elsewhere:
            return  # nobody will ask: a healthy job does not touch the disk
        if self._is_there("hang"):
            self._wait_for_the_end()
        looked = self._time_of("look")
        if looked != self._published and looked > now:
            self._published = looked
            self._publish()
        if self._is_suspicious(mine, now) and looked <= now:
            self._look(now)

    def _pause(self, seconds: float) -> None:
        """Wait, and beat."""
        end = time.time() + seconds
        while not self._stop.wait(max(0.0, min(self._beat, end - time.time()))):
            self._recorder.beat()
            if time.time() >= end:
                break

    def _mine(self) -> Flight:
        return parse(self._recorder.contents(), self._folder / flight_name(self._recorder.rank))

    def _is_suspicious(self, mine: Flight, now: float) -> bool:
        """Whether this rank has stood still for too long."""
        if mine.left:
            return False
        if mine.waiting is not None:
            return now - mine.waiting_since >= self._hang_timeout
        if mine.activity is not None and now - mine.activity.since < self._slow_timeout:
            return False
        return now - mine.progress >= self._hang_timeout

    # -- looking ---------------------------------------------------------------------------------

    def _look(self, now: float) -> None:
        """Look at all ranks, and end the job if it hangs."""
        self._set_time_of("look", now + _LEASE)
        self._published = self._time_of("look")
        self._publish()
        found = read_flights(self._folder)
        if found.problems or any(f.host != os.uname().nodename for f in found.flights.values()):
            # Others publish what they know within a beat.
            self._pause(2 * self._beat)
            found = read_flights(self._folder)
        diagnosis = self._diagnose(found)
        recent = [r for r, f in found.flights.items() if silence(f) > 1.5 * self._beat]
        if diagnosis.hung and any(silence(found.flights[r]) < SILENCE for r in recent):
            self._pause(self._beat)  # whether these live will show
            found = read_flights(self._folder)
            diagnosis = self._diagnose(found)
        if self._stop.is_set():
            return
        if diagnosis.hung and self._is_suspicious(self._mine(), time.time()):
            self._end(found)
        else:
            pause = min(_LONGEST, self._hang_timeout / 2, max(0.0, diagnosis.due - time.time()))
            self._set_time_of("look", time.time() + pause)

    def _diagnose(self, found: Flights) -> Diagnosis:
        return diagnose(
            found.flights,
            time.time(),
            self._hang_timeout,
            self._slow_timeout,
            processes_of(found.flights),
        )

    def _publish(self) -> None:
        """Have others see this rank's flight, and those of silent ranks of this node."""
        if not self._elsewhere:
            self._recorder.flush()
            return
        assert self._recorder.path is not None
        with contextlib.suppress(OSError):  # a full disk hides this rank, and must not end it
            _copy(self._recorder.contents(), self._folder / flight_name(self._recorder.rank))
            for path in self._recorder.path.parent.glob("rank-*.bin"):
                target = self._folder / path.name
                old = not target.exists() or target.stat().st_mtime < time.time() - _LEASE
                if old and path != self._recorder.path:
                    _copy(path.read_bytes(), target)

    # -- the end ---------------------------------------------------------------------------------

    def _end(self, found: Flights) -> None:
        """End the job with a report, unless another rank does."""
        with contextlib.suppress(OSError):  # without a disk, several may report
            try:
                os.close(os.open(self._folder / "hang", os.O_CREAT | os.O_EXCL | os.O_WRONLY))
            except FileExistsError:
                self._wait_for_the_end()
                return
        self._write_stack()
        self._wait_for_stacks(found)
        with contextlib.suppress(UserError):
            found = read_flights(self._folder)
        report = report_of(found, self._diagnose(found), self._folder, self._hang_timeout)
        with contextlib.suppress(OSError):
            _copy(report.encode(), self._folder / REPORT)
        with contextlib.suppress(OSError):  # the launcher may be gone, and this is an orphan
            print(report, file=sys.stderr, flush=True)
        self._finish(found)

    def _wait_for_the_end(self) -> None:
        """Another rank ends the job; this one gives its stack, and ends the job if that fails."""
        self._write_stack()
        self._publish()
        self._pause(_PATIENCE)
        if not self._stop.is_set():
            with contextlib.suppress(UserError):
                self._signal_silent(read_flights(self._folder), signal.SIGKILL)
            self._abort(EXIT_HUNG)

    def _finish(self, found: Flights) -> None:
        """Abort. Ranks of this node that are stopped go on to be ended, whatever the launcher."""
        # Should MPI not manage even that, this process ends by itself.
        faulthandler.dump_traceback_later(_PATIENCE, exit=True, file=self._stack)
        time.sleep(0.2)  # for the launcher to pass the report on
        self._signal_silent(found, signal.SIGCONT)
        self._abort(EXIT_HUNG)

    def _signal_silent(self, found: Flights, number: signal.Signals) -> None:
        """Send a signal to the silent ranks of this node."""
        for rank, flight in found.flights.items():
            if rank != self._recorder.rank and silence(flight) > SILENCE and is_running(flight):
                with contextlib.suppress(OSError):  # gone by now
                    os.kill(flight.pid, number)

    def _write_stack(self) -> None:
        self._recorder.goodbye(f"{HUNG}: ended by the watchdog, see {REPORT}")
        faulthandler.cancel_dump_traceback_later()
        with contextlib.suppress(OSError):
            faulthandler.dump_traceback(self._stack)
            if self._elsewhere:
                _copy(self._stack_path.read_bytes(), self._folder / self._stack_path.name)

    def _wait_for_stacks(self, found: Flights) -> None:
        dead = {r for r, what in processes_of(found.flights).items() if what in DEAD}
        alive = [r for r, f in found.flights.items() if not f.left and r not in dead]
        paths = [self._folder / stack_name(rank) for rank in alive]
        deadline = time.time() + _STACKS
        while time.time() < deadline and not all(_size(path) for path in paths):
            time.sleep(0.1)

    def _explain(self) -> None:
        """After an error of MPI: print whether ranks made different calls, which leads to one."""
        # Without flights there is nothing to tell, and one rank tells it.
        with contextlib.suppress(UserError, OSError):
            flights = read_flights(self._folder).flights
            findings = diagnose(flights, timeout=self._hang_timeout).findings
            texts = [f"mpillm: {found.text}\n" for found in findings if found.kind == "mismatch"]
            if texts:
                with (self._folder / REPORT).open("x", encoding="utf-8") as file:
                    file.writelines(texts)
                print("".join(texts), end="", file=sys.stderr, flush=True)

    # -- files -----------------------------------------------------------------------------------

    def _is_there(self, name: str) -> bool:
        """Whether there is such a file, made since this watchdog began."""
        return self._time_of(name) > self._begun - 1

    def _time_of(self, name: str) -> float:
        try:
            return (self._folder / name).stat().st_mtime
        except OSError:
            return 0.0

    def _set_time_of(self, name: str, when: float) -> None:
        with contextlib.suppress(OSError):  # two may look at once then
            path = self._folder / name
            path.touch()
            os.utime(path, (when, when))


def _size(path: Path) -> int:
    try:
        return path.stat().st_size
    except OSError:
        return 0


def _copy(content: bytes, target: Path) -> None:
    """Write a file that others may read at any moment."""
    temporary = target.with_name(f".tmp-{target.name}-{os.getpid()}")
    temporary.write_bytes(content)
    temporary.replace(target)
