"""Jobs that are broken on purpose: started by mpirun, found by a mark in their environment."""

from __future__ import annotations

import contextlib
import json
import os
import re
import signal
import subprocess
import sys
import time
import uuid
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from faulty import NOTE

__all__ = ["MARK", "Job", "Mpirun"]

MARK = "MPILLM_FAULT_JOB"
DRIVER = Path(__file__).parent / "faulty.py"
_RANKS = re.compile(rb"(?:^|\0)(?:PMI_RANK|OMPI_COMM_WORLD_RANK|PMIX_RANK)=(\d+)(?:\0|$)")


class Job:
    """A job under mpirun; its processes carry a mark that no other has."""

    def __init__(
        self, command: list[str], environment: Mapping[str, str], folder: Path, cwd: Path | None
    ) -> None:
        self.folder = folder
        self._mark = uuid.uuid4().hex
        self.begun = time.monotonic()
        with self.log.open("wb") as log:
            self.process = subprocess.Popen(
                command,
                env={**environment, MARK: self._mark},
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=subprocess.STDOUT,
                cwd=cwd,
                start_new_session=True,
            )

    @property
    def log(self) -> Path:
        """What the job has printed."""
        return self.folder / "job.log"

    @property
    def said(self) -> str:
        """The same, as text."""
        return self.log.read_text(encoding="utf-8", errors="replace")

    def fault(self) -> tuple[float, str] | None:
        """When (of the monotonic clock) and where the planned fault was, if it was."""
        note = self.folder / NOTE
        if not note.exists():
            return None
        when, _, where = note.read_text(encoding="utf-8").splitlines()[0].partition(" ")
        return float(when), where

    def processes(self) -> dict[int, int | None]:
        """The job's processes that live, mpirun too, with the rank of those that have one."""
        found: dict[int, int | None] = {}
        mark = f"{MARK}={self._mark}".encode()
        for entry in os.scandir("/proc"):
            if not entry.name.isdigit():
                continue
            with contextlib.suppress(OSError):  # it has ended meanwhile
                environment = Path(entry.path, "environ").read_bytes()
                if mark in environment:
                    rank = _RANKS.search(environment)
                    found[int(entry.name)] = int(rank[1]) if rank else None
        return found

    def ranks(self) -> dict[int, int]:
        """Process numbers of the ranks that run, by rank."""
        return {rank: pid for pid, rank in self.processes().items() if rank is not None}

    def wait(self, timeout: float) -> float:
        """Wait for mpirun's end; returns when it was, of the monotonic clock."""
        deadline = time.monotonic() + timeout
        while self.process.poll() is None:
            if time.monotonic() > deadline:
                raise TimeoutError(f"the job did not end in {timeout} s:\n{self.said}")
            time.sleep(0.002)
        return time.monotonic()

    def wait_empty(self, timeout: float) -> float:
        """Wait until none of the job's processes is left; returns when that was."""
        deadline = time.monotonic() + timeout
        while left := self.processes():
            if time.monotonic() > deadline:
                raise TimeoutError(f"processes {left} of the job are left after {timeout} s")
            time.sleep(0.005)
        return time.monotonic()

    def clean_up(self) -> None:
        """Leave nothing behind."""
        kill(self.processes())
        self.process.wait()


class Mpirun:
    """Starts jobs of this Python; ends those that are left when it is closed."""

    def __init__(self, program: str, environment: Mapping[str, str]) -> None:
        self._program = program
        self._environment = environment
        self._jobs: list[Job] = []

    def __call__(
        self,
        ranks: int,
        folder: Path,
        *arguments: str | Path,
        plan: Mapping[str, Any] | None = None,
        cwd: Path | None = None,
    ) -> Job:
        """Start `mpillm` with these arguments and a fault; makes `folder` for the job's notes."""
        folder.mkdir(parents=True)
        text = json.dumps({"folder": str(folder), **(plan or {})})
        command = [self._program, "-n", str(ranks), sys.executable, DRIVER, text, *arguments]
        job = Job([str(part) for part in command], self._environment, folder, cwd)
        self._jobs.append(job)
        return job

    def close(self) -> None:
        """End what is left of all jobs."""
        for job in self._jobs:
            job.clean_up()


def kill(pids: Iterable[int]) -> None:
    """SIGKILL all of these processes that are there, as nearly at once as can be."""
    for pid in pids:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
