"""Contestants that take turns: processes that work when told to, and sleep in between.

A contestant is started once, so that it loads, compiles and warms up once. Each of its processes
connects to a socket of the program that compares, and blocks in a read there until it is told how
many steps to do: between turns no call to MPI or gloo is under way, which would spin on the cores
that another contestant works on.
"""

from __future__ import annotations

import contextlib
import json
import os
import signal
import socket
import subprocess
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

__all__ = ["Contestant", "Turn", "memory", "serve", "timed_steps"]

_PAUSE = 0.1  # seconds for the threads of the last contestant to fall asleep
_LAST_WORDS = 3.0  # seconds for a process to end by itself


# -- in the processes at work ----------------------------------------------------------------------


def serve(path: str, rank: int, run: Callable[[int], dict[str, Any]]) -> None:
    """Do as many steps as each line from the socket at `path` says, until it is closed."""
    with socket.socket(socket.AF_UNIX) as connection:
        connection.connect(path)
        with connection.makefile("rw", encoding="utf-8") as lines:
            lines.write(json.dumps({"rank": rank, "pid": os.getpid()}) + "\n")
            lines.flush()
            for line in lines:
                lines.write(json.dumps(run(int(line))) + "\n")
                lines.flush()


def timed_steps(step: Callable[[], float], steps: int, tokens: float) -> dict[str, Any]:
    """Do steps, each of which returns its loss; what `serve` is to send of them.

    tokens: this process's share of a step's.
    """
    losses, seconds = [], []
    for _ in range(steps):
        begin = time.perf_counter()
        losses.append(step())
        seconds.append(time.perf_counter() - begin)
    return {"losses": losses, "seconds": seconds, "tokens": tokens, "memory": memory()}


def memory() -> dict[str, int]:
    """Bytes of this process: its peak; resident pages of files, and of memory shared with others.

    `mine` is what this process owns of the shared memory, each page divided by its users.
    """
    found = _kibibytes("/proc/self/status") | _kibibytes("/proc/self/smaps_rollup")
    names = {"peak": "VmHWM", "files": "RssFile", "shared": "RssShmem", "mine": "Pss_Shmem"}
    return {name: 1024 * found.get(key, 0) for name, key in names.items()}


def _kibibytes(path: str) -> dict[str, int]:
    """The lines `name: number kB` of a file."""
    try:
        text = Path(path).read_text(encoding="utf-8")
    except OSError:
        return {}
    words = (line.split() for line in text.splitlines())
    return {w[0].rstrip(":"): int(w[1]) for w in words if len(w) == 3 and w[2] == "kB"}


# -- in the program that compares ------------------------------------------------------------------


@dataclass(frozen=True)
class Turn:
    """What the processes of a contestant did in a turn.

    speed: tokens a second, the sum of those of all processes. seconds: of each step, the slowest's.
    """

    speed: float
    seconds: list[float]


@dataclass
class Contestant:
    """Processes that do the same training together, and what was measured of them.

    commands: started at the same time; together they make `processes` that connect. losses: of each
    step so far, the mean over the processes.
    """

    name: str
    commands: Sequence[Sequence[str]]
    processes: int
    environment: dict[str, str] = field(default_factory=dict)
    turns: list[Turn] = field(default_factory=list)
    losses: list[float] = field(default_factory=list)
    _memory: dict[int, dict[str, int]] = field(default_factory=dict)
    _running: list[subprocess.Popen[bytes]] = field(default_factory=list)
    _lines: list[Any] = field(default_factory=list)
    _log: Path = Path()

    def start(self, folder: Path, seconds: float = 300.0) -> None:
        """Start, and wait until all processes are ready. `folder` is for sockets and logs."""
        name = "".join(c if c.isalnum() else "-" for c in self.name)
        path, self._log = folder / f"{name}.socket", folder / f"{name}.log"
        with socket.socket(socket.AF_UNIX) as listener, self._log.open("wb") as log:
            listener.bind(str(path))
            listener.listen(self.processes)
            listener.settimeout(0.5)
            for command in self.commands:
                process = subprocess.Popen(
                    [*command, "--connect", str(path)],
                    stdin=subprocess.DEVNULL,
                    stdout=log,
                    stderr=log,
                    env={**os.environ, **self.environment},
                    start_new_session=True,
                )
                self._running.append(process)
            deadline = time.monotonic() + seconds
            while len(self._lines) < self.processes:
                try:
                    connection, _ = listener.accept()
                except TimeoutError:
                    if time.monotonic() > deadline or any(p.poll() for p in self._running):
                        raise self._failure("did not start") from None
                    continue
                connection.settimeout(None)
                with connection:
                    self._lines.append(connection.makefile("rw", encoding="utf-8"))
        for lines in self._lines:
            if not lines.readline():
                raise self._failure("did not start")

    def run(self, steps: int, keep: bool = True) -> None:
        """A turn; measured if to be kept."""
        time.sleep(_PAUSE)
        try:
            for lines in self._lines:
                lines.write(f"{steps}\n")
                lines.flush()
            answers = [lines.readline() for lines in self._lines]
        except (BrokenPipeError, ConnectionResetError):
            answers = [""]
        if not all(answers):
            raise self._failure("ended early")
        results = [json.loads(answer) for answer in answers]
        for step in zip(*(r["losses"] for r in results), strict=True):
            self.losses.append(sum(step) / len(step))
        self._memory = {rank: result["memory"] for rank, result in enumerate(results)}
        if keep:
            speed = sum(steps * r["tokens"] / sum(r["seconds"]) for r in results)
            slowest = [max(step) for step in zip(*(r["seconds"] for r in results), strict=True)]
            self.turns.append(Turn(speed, slowest))

    def stop(self) -> None:
        """End all processes."""
        for lines in self._lines:
            with contextlib.suppress(BrokenPipeError):
                lines.close()
        for process in self._running:
            for number in (signal.SIGTERM, signal.SIGKILL):
                try:
                    process.wait(_LAST_WORDS)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, number)
            process.wait()

    @property
    def speeds(self) -> list[float]:
        """Tokens a second of every turn."""
        return [turn.speed for turn in self.turns]

    @property
    def peak_memory(self) -> int:
        """Bytes: the sum of the peaks of all processes."""
        return sum(one["peak"] for one in self._memory.values())

    @property
    def peak_memory_once(self) -> int:
        """The same with what the processes share counted once: shared memory, pages of files.

        Of files, above all libraries, every process is taken to use the same pages.
        """
        parts = self._memory.values()
        files = sum(one["files"] for one in parts) - max(one["files"] for one in parts)
        return self.peak_memory - files - sum(one["shared"] - one["mine"] for one in parts)

    def _failure(self, what: str) -> RuntimeError:
        log = self._log.read_text(encoding="utf-8", errors="replace")
        return RuntimeError(f"{self.name} {what}:\n{log[-4000:]}")
