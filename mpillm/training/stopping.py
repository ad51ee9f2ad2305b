"""What makes a run save, or save and end, before its last step: signals, a time limit, files.

A rank that gets a signal, and rank 0 for the others, writes a note; the ranks agree about notes
once a step, so that all of them save after the same one. While a rank is blocked in MPI no Python
signal handler runs, but every step comes back from there.
"""

from __future__ import annotations

import os
import re
import signal
import threading
import time
from pathlib import Path
from types import FrameType, TracebackType
from typing import Any

from mpillm.errors import UserError, did_you_mean
from mpillm.parallel.recorder import start_ticks
from mpillm.training.settings import RunSettings

__all__ = ["SAVE", "STOP", "Stopping", "seconds"]

NOTHING, SAVE, STOP, TIME_LIMIT = range(4)
_SIGNAL = 100  # and the signal's number
"""Notes, the weightier the higher; from STOP on the run ends."""

_LOOK_EVERY = 0.5  # seconds between looks for the files: a shared disk is slow to say "not there"


class Stopping:
    """The notes of one rank. A context: inside it, the signals are caught."""

    def __init__(self, settings: RunSettings, folder: Path, rank: int) -> None:
        """folder: of the run, where rank 0 looks for the files `STOP` and `SAVE`.

        Raises UserError for names that are no signals and a limit that is no time.
        """
        self._signals = [_signal(name) for name in settings.signals]
        self._limit = seconds(settings.time_limit)
        self._folder = folder
        self._root = rank == 0
        self._begun = time.monotonic() - _process_age()  # a job's limit counts its start-up too
        self._caught = NOTHING
        self._before: dict[int, Any] = {}
        self._looked = 0.0
        self._file = NOTHING
        # Seconds of the longest step so far, evaluation included, and of the longest save.
        self._step = self._save = 0.0

    def __enter__(self) -> Stopping:
        # Python takes signals in its main thread only; elsewhere the program around this has them.
        if threading.current_thread() is threading.main_thread():
            self._before = {number: signal.signal(number, self._catch) for number in self._signals}
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def refuse(self) -> None:
        """UserError where a run must not even begin."""
        if self._root and (self._folder / "STOP").exists():
            raise UserError(f"{self._folder / 'STOP'} stops this run; remove that file to go on")

    def took(self, *, step: float = 0.0, save: float = 0.0) -> None:
        """Note how long a step or a save has taken, for ending in time."""
        self._step, self._save = max(self._step, step), max(self._save, save)

    def note(self) -> int:
        """What this rank has to say now; 0 for nothing."""
        found = [self._caught]
        if self._root:
            found += [self._look_for_files(), TIME_LIMIT if self._time_is_up() else NOTHING]
        return max(found)

    def obeyed(self, note: int) -> None:
        """A save was asked for and is done."""
        if note == SAVE and self._root:
            (self._folder / "SAVE").unlink(missing_ok=True)
            self._file = NOTHING

    def reason(self, note: int) -> str:
        """A note in words."""
        if note >= _SIGNAL:
            return signal.Signals(note - _SIGNAL).name
        limit = f"the time limit of {self._limit:g} s"
        return {SAVE: "the file SAVE", STOP: "the file STOP", TIME_LIMIT: limit}[note]

    def _catch(self, number: int, frame: FrameType | None) -> None:
        self._caught = _SIGNAL + number

    def _look_for_files(self) -> int:
        now = time.monotonic()
        if now - self._looked >= _LOOK_EVERY:
            self._looked = now
            there = [name for name in ("STOP", "SAVE") if (self._folder / name).exists()]
            self._file = {"STOP": STOP, "SAVE": SAVE}[there[0]] if there else NOTHING
        return self._file

    def _time_is_up(self) -> bool:
        """Whether another step may leave too little time to save and to end."""
        if not self._limit:
            return False
        reserve = 2 * self._step + 2 * self._save + min(30.0, 0.02 * self._limit)
        return time.monotonic() - self._begun + reserve > self._limit


def seconds(limit: int | str) -> float:
    """A time such as 90, "90", "30:00", "02:00:00" or "1-12:00:00" (Slurm's days) in seconds.

    >>> seconds("1-12:00:30")
    129630.0
    """
    found = re.fullmatch(r"(?:(\d+)-)?(?:(?:(\d+):)?(\d+):)?(\d+)", str(limit).strip())
    if found is None:
        raise UserError(
            f"run.time_limit = {limit!r}: expected seconds, MM:SS, HH:MM:SS or D-HH:MM:SS"
        )
    days, hours, minutes, rest = (int(part or 0) for part in found.groups())
    return float(((days * 24 + hours) * 60 + minutes) * 60 + rest)


def _process_age() -> float:
    """Seconds since this process began; 0 where the system does not tell."""
    ticks = start_ticks()
    if not ticks:  # not Linux
        return 0.0
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


def _signal(name: str) -> int:
    """The number of a signal that can be caught."""
    never = {signal.SIGKILL, signal.SIGSTOP}
    names = {item.name[3:]: int(item) for item in signal.Signals if item not in never}
    short = name.upper().removeprefix("SIG")
    if short not in names:
        raise UserError(f"run.signals: no signal '{name}'; {did_you_mean(short, names)}")
    return names[short]
