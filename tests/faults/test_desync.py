"""Ranks that go astray in training: the job ends in time, and the report names rank and call.

Long form: all 32 cases; short form: 6. Besides, what is only slow raises nothing.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest

JOB = Path(__file__).with_name("desync_job.py")
TIMEOUT = 2.0  # run.hang_timeout of these jobs
GRACE = 5.0  # within which such a job has to end
AT_ONCE = 3  # jobs that run at the same time: most of their time they wait


@dataclass(frozen=True)
class Case:
    """A fault: which rank does what, in place of which call. names: what the report has to say."""

    name: str
    layout: dict[str, Any]
    rank: int
    call: str
    axis: str
    does: str
    names: tuple[str, ...]
    nth: int = 2
    step: int = 3
    more: dict[str, Any] | None = None
    short: bool = False

    @property
    def ranks(self) -> int:
        size = 1
        for axis in ("data", "tensor", "pipe", "context", "expert"):
            size *= self.layout.get(axis, 1)
        return size

    @property
    def faults(self) -> list[dict[str, Any]]:
        mine = {"rank": self.rank, "call": self.call, "axis": self.axis, "does": self.does}
        at = {"nth": self.nth, "step": self.step}
        late = [{**mine, **at, "rank": 0, "does": "is_late", "seconds": 1.0}]
        return [{**mine, **at, **(self.more or {})}, *late * (self.does == "stops_in_a_call")]


D2, T2, P2 = {"data": 2}, {"tensor": 2}, {"pipe": 2}
PD, DT = {"pipe": 2, "data": 2}, {"data": 2, "tensor": 2}
SUMS = ("iallreduce", "replicas")
CASES = [
    # Calls left out, added or exchanged.
    Case("skips a sum under way", D2, 1, *SUMS, "skip", ("rank 1", "over replicas")),
    Case(
        "skips a sum",
        {**D2, "overlap": False},
        1,
        "allreduce",
        "world",
        "skip",
        ("rank 1", "allreduce", "over world"),
        nth=1,
    ),
    Case("skips a sum, three ranks", {"data": 3}, 2, *SUMS, "skip", ("rank 2", "over replicas"), 1),
    Case(
        "skips a gather of ZeRO",
        {**D2, "zero": 1},
        1,
        "iallgather",
        "replicas",
        "skip",
        ("rank 1", "allgather", "over replicas"),
    ),
    Case("skips a sum of a layer", T2, 1, "allreduce", "tensor", "skip", ("rank 1", "over tensor")),
    Case(
        "skips a sum of a layer, two groups",
        DT,
        3,
        "allreduce",
        "tensor",
        "skip",
        ("rank 3", "over tensor (data 1)"),
        short=True,
    ),
    Case(
        "another operation",
        T2,
        1,
        "allreduce",
        "tensor",
        "calls_another",
        ("rank 1 made another call", "over tensor", "broadcast"),
    ),
    Case(
        "another operation, three ranks",
        {"tensor": 3, "sequence": False},
        1,
        "allreduce",
        "tensor",
        "calls_a_barrier",
        ("rank 1 made another call", "over tensor", "barrier"),
    ),
    Case(
        "a barrier too many",
        T2,
        0,
        "allreduce",
        "tensor",
        "calls_a_barrier",
        ("rank 0 made another call", "over tensor", "barrier"),
    ),
    Case(
        "another size, three ranks",
        {"data": 3},
        1,
        *SUMS,
        "another_size",
        ("rank 1 made another call", "over replicas"),
        nth=1,
    ),
    Case(
        "wrong order of groups",
        {**D2, "zero": 1},
        1,
        "ireduce_scatter",
        "replicas",
        "another_group_first",
        ("rank 1 never entered reduce_scatter", "over replicas", "it is in allreduce"),
        nth=1,
        more={"first": "world"},
        short=True,
    ),
    Case(
        "wrong order of groups, two of each",
        DT,
        2,
        "allreduce",
        "model",
        "another_group_first",
        ("rank 2 never entered allreduce", "over model (data 1)", "over replicas (tensor 0)"),
        nth=1,
        more={"first": "replicas"},
    ),
    # Messages.
    Case(
        "a lost activation",
        P2,
        0,
        "isend",
        "pipe",
        "skip",
        ("rank 0 never made send", "to rank 1 over pipe"),
        short=True,
    ),
    Case(
        "a lost gradient",
        P2,
        1,
        "isend",
        "pipe",
        "skip",
        ("rank 1 never made send", "to rank 0 over pipe"),
    ),
    Case(
        "a lost message, four ranks",
        PD,
        3,
        "isend",
        "pipe",
        "skip",
        ("rank 3 never made send", "to rank 1 over pipe (data 1"),
        nth=1,
    ),
    Case(
        "a message nobody sends",
        P2,
        1,
        "irecv",
        "pipe",
        "waits_for_nothing",
        ("rank 1 ", "it is in recv #1 from rank 0 over pipe (tag 9)"),
    ),
    # Ranks that stand still.
    Case(
        "an endless loop",
        {**D2, "zero": 3},
        0,
        "iallgather",
        "replicas",
        "loops",
        ("rank 0 never entered allgather", "over replicas", "outside of any call"),
    ),
    Case(
        "an endless loop in a pipeline",
        PD,
        2,
        "isend",
        "pipe",
        "loops",
        ("rank 2 never", "outside of any call"),
    ),
    Case(
        "an endless loop in C",
        D2,
        1,
        *SUMS,
        "loops_in_c",
        ("rank 1 never entered allreduce", "keeps Python's lock", "in loops_in_c"),
    ),
    Case(
        "stopped while it computes",
        D2,
        1,
        *SUMS,
        "stops",
        ("rank 1 never entered allreduce", "stopped by a signal"),
        short=True,
    ),
    Case(
        "stopped in a call",
        T2,
        1,
        "allreduce",
        "tensor",
        "stops_in_a_call",
        ("rank 1 ", "over tensor", "stopped by a signal"),
    ),
    Case(
        "stopped in a pipeline",
        PD,
        0,
        "irecv",
        "pipe",
        "stops",
        ("rank 0 ", "stopped by a signal"),
    ),
    Case("asleep", D2, 1, *SUMS, "sleeps", ("rank 1 never entered allreduce", "in sleeps")),
    Case(
        "asleep, four ranks",
        DT,
        3,
        "allreduce",
        "tensor",
        "sleeps",
        ("rank 3 never entered allreduce", "over tensor (data 1)", "in sleeps"),
    ),
    Case(
        "left early",
        PD,
        1,
        "irecv",
        "pipe",
        "leaves",
        ("rank 1 ", "ended", "SystemExit"),
    ),
    Case("left early, two ranks", D2, 0, *SUMS, "leaves", ("rank 0 never entered allreduce",)),
    Case(
        "in the first step",
        T2,
        1,
        "allreduce",
        "tensor",
        "sleeps",
        ("rank 1 never entered allreduce", "over tensor"),
        step=0,
    ),
    Case(
        "flights on the node's own disk",
        D2,
        1,
        *SUMS,
        "stops",
        ("rank 1 never entered allreduce", "stopped by a signal"),
        more={"elsewhere": True},
        short=True,
    ),
    # Large gradients are added in shared memory, in two steps: a rank that is missing from a sum
    # may not have taken the second one of the sum before.
    Case(
        "skips a sum in shared memory",
        D2,
        1,
        *SUMS,
        "skip",
        ("rank 1", "over replicas"),
        more={"shared": True},
        short=True,
    ),
    Case(
        "skips a sum in shared memory, three ranks",
        {"data": 3},
        2,
        *SUMS,
        "skip",
        ("rank 2", "over replicas"),
        more={"shared": True},
    ),
    Case(
        "skips a gather in shared memory",
        {**D2, "zero": 1},
        1,
        "iallgather",
        "replicas",
        "skip",
        ("rank 1", "allgather", "over replicas"),
        more={"shared": True},
    ),
    Case(
        "stopped before a sum in shared memory",
        D2,
        1,
        *SUMS,
        "stops",
        ("rank 1", "allreduce", "over replicas", "stopped by a signal"),
        more={"shared": True},
    ),
]


@dataclass(frozen=True)
class Ended:
    """How a job ended: its code, what it printed, and seconds from the fault to its end."""

    code: int
    text: str
    seconds: float
    left: list[int]


def alive(pid: int) -> bool:
    """Whether there is such a process; one that nobody has taken notice of is none."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except OSError:
        return False


def run(mpirun: str, env: dict[str, str], folder: Path, case: Case, timeout: float) -> Ended:
    """One job."""
    folder.mkdir()
    elsewhere = ["elsewhere"] if case.more and case.more.get("elsewhere") else []
    command = [mpirun, "-n", str(case.ranks), sys.executable, str(JOB), str(folder), str(timeout)]
    command += [json.dumps(case.faults), json.dumps(case.layout), *elsewhere]
    done = subprocess.run(
        command,
        env=env,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        timeout=90,
        check=False,
    )
    end = time.time()
    pids = [int(path.read_text()) for path in folder.glob("pid-*")]
    deadline = time.time() + 2
    while (left := [pid for pid in pids if alive(pid)]) and time.time() < deadline:
        time.sleep(0.05)
    began = folder / "began"
    seconds = end - float(began.read_text()) if began.exists() else 0.0
    return Ended(done.returncode, done.stderr + done.stdout, seconds, left)


def told(text: str, folder: Path, environment: dict[str, str]) -> str:
    """What was reported; where MPI itself has crashed, what the doctor says."""
    if "mpillm: " in text:
        return text
    command = [sys.executable, "-m", "mpillm", "doctor", str(folder)]
    asked = subprocess.run(command, env=environment, capture_output=True, text=True, check=True)
    return text + asked.stdout


@pytest.fixture(scope="module")
def ended(
    mpirun_program: str, environment: dict[str, str], tmp_path_factory: Any, long: bool
) -> Iterator[dict[str, tuple[Case, Ended, Path]]]:
    """All jobs of this form, a few at a time."""
    folder: Path = tmp_path_factory.mktemp("desync")
    environment = {**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    cases = [case for case in CASES if long or case.short]

    def one(numbered: tuple[int, Case]) -> tuple[Case, Ended, Path]:
        number, case = numbered
        path = folder / str(number)
        return case, run(mpirun_program, environment, path, case, TIMEOUT), path

    with ThreadPoolExecutor(AT_ONCE) as pool:
        yield {case.name: (case, end, path) for case, end, path in pool.map(one, enumerate(cases))}


def wrong(case: Case, ended: Ended, path: Path, environment: dict[str, str]) -> str:
    """What is wrong with how a job ended; empty when all is right."""
    text = told(ended.text, path, environment)
    first = next(
        (line for line in text.splitlines() if line.strip().startswith(("rank", "mpillm: rank"))),
        "",
    )
    if ended.code == 0:
        return "the exit code is 0"
    if ended.seconds > TIMEOUT + GRACE:
        return f"it took {ended.seconds:.1f} s"
    if ended.left:
        return f"processes are left: {ended.left}"
    where = [name for name in case.names if name not in first and not name.startswith("in ")]
    where += [name for name in case.names if name.startswith("in ") and name not in text]
    return f"{where} not in: {first or text[-500:]}" if where else ""


def test_who_hangs_is_named(
    ended: dict[str, tuple[Case, Ended, Path]], environment: dict[str, str], table: Any
) -> None:
    problems = {
        name: problem
        for name, (case, end, path) in ended.items()
        if (problem := wrong(case, end, path, environment))
    }
    longest = max(end.seconds for _, end, _ in ended.values())
    result = f"rank and call named in {len(ended) - len(problems)}, ended within {longest:.1f} s "
    result += f"(timeout {TIMEOUT:g} s + {GRACE:g} s), no process left"
    details = "".join(f"\n{name}: {problem}" for name, problem in problems.items())
    table.row("a rank goes astray", len(ended), result + details, not problems)


def test_what_is_slow_raises_nothing(
    mpirun_program: str, environment: dict[str, str], tmp_path: Path, table: Any, long: bool
) -> None:
    """A save or an evaluation of three times the timeout, on one rank or, in a way, on all."""
    environment = {**environment, "PYTHONPATH": os.pathsep.join(filter(None, sys.path))}
    slow = {"seconds": 3 * 1.0}
    cases = [Case("slow", D2, 1, *SUMS, "saves", (), more=slow)]
    if long:
        cases += [
            Case("slow", PD, 3, "isend", "pipe", "saves", (), more=slow),
            Case("slow", T2, 0, "allreduce", "tensor", "is_late", (), more={"seconds": 0.5}),
        ]
    ends = [
        run(mpirun_program, environment, tmp_path / str(i), case, 1.0)
        for i, case in enumerate(cases)
    ]
    quiet = all(end.code == 0 and "mpillm" not in end.text for end in ends)
    text = "no alarm" if quiet else "".join(end.text for end in ends)
    table.row("a rank is slow", len(cases), text, quiet)
