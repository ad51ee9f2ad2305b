"""Who holds a run folder, as its lock says, and whether that job still lives."""

from __future__ import annotations

import os
import re
import time
import uuid
from collections.abc import Mapping
from datetime import datetime, timezone
from enum import Enum
from pathlib import Path
from typing import Annotated

import msgspec

__all__ = ["Record", "State", "Watch", "decode", "is_local"]

_JOBS = ("SLURM_JOB_ID", "PBS_JOBID", "LSB_JOBID", "COBALT_JOBID")
# What is shown to users stays within a line, whoever wrote the file.
_Text = Annotated[str, msgspec.Meta(max_length=128, pattern="^[ -~]*$")]


class Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """Who holds a run folder."""

    host: _Text
    machine: _Text  # one boot of one kernel, and the table of its processes that `pid` is from
    pid: Annotated[int, msgspec.Meta(ge=1)]
    started: int  # of the process, in clock ticks after the boot
    job: _Text  # of a scheduler
    since: _Text
    token: _Text  # nobody else has it
    beat: int = 0

    @classmethod
    def own(cls, environment: Mapping[str, str] = os.environ) -> Record:
        """The record of this process."""
        jobs = (f"{name} {environment[name]}" for name in _JOBS if environment.get(name))
        return cls(
            host=_printable(os.uname().nodename),
            machine=_machine(),
            pid=os.getpid(),
            started=_started(os.getpid()) or 0,
            job=_printable(next(jobs, "")),
            since=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            token=uuid.uuid4().hex,
        )

    def __str__(self) -> str:
        job = f" ({self.job})" if self.job else ""
        return f"process {self.pid} on {self.host}{job} since {self.since}"


class State(Enum):
    """What is known of a record's job."""

    FREE = "ended, or there is none"
    ALIVE = "alive"
    UNKNOWN = "still watched"


class Watch:
    """Judges a lock's record by all that has been seen of it so far."""

    def __init__(self, patience: float) -> None:
        self.record: Record | None = None
        self._patience = patience
        self._first: tuple[bytes, float] | None = None

    def judge(self, raw: bytes) -> State:
        """What is known of the job whose record has these bytes now."""
        now, self.record = time.monotonic(), decode(raw)
        if not raw.strip():
            return State.FREE
        if self.record is not None and is_local(self.record):
            return State.ALIVE if _alive(self.record) else State.FREE
        if self._first is None:
            self._first = raw, now
        if raw != self._first[0]:
            return State.ALIVE
        return State.FREE if now - self._first[1] > self._patience else State.UNKNOWN


def decode(raw: bytes) -> Record | None:
    """The record of these bytes; None for anything else."""
    try:
        return msgspec.json.decode(raw, type=Record)
    except (msgspec.DecodeError, UnicodeDecodeError):
        return None


def _printable(text: str) -> str:
    """The text as a record may hold it."""
    return re.sub("[^ -~]", "?", text)[:128]


def _machine() -> str:
    """This boot of this kernel and its process table; empty where the system does not tell."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot} {os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def is_local(record: Record | None) -> bool:
    """Whether the record is of a process whose life can be seen from here."""
    return record is not None and record.machine != "" and record.machine == _machine()


def _started(pid: int) -> int | None:
    """When a process started, in clock ticks after the boot; None for one that ends or is gone."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except OSError:
        return None
    # After the name, which may hold anything: state, ..., flags (7th), ..., start (20th); proc(5).
    fields = text.rpartition(")")[2].split()
    exiting = 0x4  # PF_EXITING of the kernel's sched.h
    return None if fields[0] in "ZXx" or int(fields[6]) & exiting else int(fields[19])


def _alive(record: Record) -> bool:
    """Whether the local process that wrote the record still runs."""
    return _started(record.pid) == record.started
