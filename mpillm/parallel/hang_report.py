"""The report of a job that hangs, and what the system knows of its processes."""

from __future__ import annotations

import os
import time
from collections.abc import Mapping
from pathlib import Path

from mpillm.parallel.diagnosis import SILENCE
from mpillm.parallel.findings import Diagnosis
from mpillm.parallel.flight import Flight, Flights
from mpillm.parallel.recorder import start_ticks

__all__ = [
    "DEAD",
    "REPORT",
    "is_running",
    "processes_of",
    "report_of",
    "silence",
    "stack_name",
]

REPORT = "report.txt"

_SHOWN = 3  # culprits whose stacks stand in the report


def stack_name(rank: int) -> str:
    """Name of the file with a rank's Python stack."""
    return f"rank-{rank:05d}.stack.txt"


def report_of(found: Flights, diagnosis: Diagnosis, folder: Path, timeout: float) -> str:
    """The diagnosis, and the stacks of the culprits and of one rank that waits.

    folder: where the stacks lie. timeout: seconds, as in the settings.
    """
    lines = [
        f"mpillm: the job hangs (a rank stands still for {timeout:g} s, run.hang_timeout)",
        *diagnosis.lines,
        *found.problems.values(),
    ]
    culprits = diagnosis.culprits[:_SHOWN]
    others = [rank for rank in diagnosis.waiting if rank not in culprits]
    for rank in (*culprits, *others[:1]):
        stack = _main_stack(folder / stack_name(rank))
        if stack:
            what = "" if rank in culprits else ", which waits"
            lines += ["", f"Python stack of rank {rank}{what} (most recent call first):", stack]
    return "\n".join([*lines, "", f"stacks and flights of all ranks: {folder}"])


def _main_stack(path: Path) -> str:
    """Of what faulthandler has written, the last thread: the one that the process began with."""
    try:
        text = path.read_text(encoding="utf-8", errors="replace")
    except OSError:
        return ""
    return text.strip().rpartition("(most recent call first):\n")[2]


# --- processes -----------------------------------------------------------------------------------

DEAD = ("gone", "ended", "stopped by a signal", "stopped by a debugger")
"""What `processes_of` says of those that can do nothing more."""

_STATES = {
    "": "gone",
    "X": "ended",
    "Z": "ended",
    "T": "stopped by a signal",
    "t": "stopped by a debugger",
    "D": "waiting for a disk or a device",
}


def processes_of(flights: Mapping[int, Flight]) -> dict[int, str]:
    """What the system knows of the processes of silent ranks of this machine, in words."""
    states = {r: _state(flight) for r, flight in flights.items() if silence(flight) > SILENCE}
    return {
        rank: _STATES.get(state, "running, but one of its threads keeps Python's lock")
        for rank, state in states.items()
        if state is not None
    }


def is_running(flight: Flight) -> bool | None:
    """Whether the rank's process is there, be it stopped; None where that cannot be known."""
    state = _state(flight)
    return None if state is None else state not in ("", "X", "Z")


def silence(flight: Flight) -> float:
    """Seconds since the last heartbeat; 0 where none is expected."""
    return 0.0 if flight.heartbeat is None or flight.left else time.time() - flight.heartbeat


def _state(flight: Flight) -> str | None:
    """The system's letter for the process, empty where it is gone, None on another machine."""
    if flight.host != os.uname().nodename or not flight.ticks:
        return None
    # By number alone it could be a later one.
    if start_ticks(flight.pid) != flight.ticks:
        return ""
    try:
        return Path(f"/proc/{flight.pid}/stat").read_text().rpartition(")")[2].split()[0]
    except OSError:
        return ""
