"""How long a training job lives on after a fault, and what it leaves: no process, a bad exit code.

Real training under mpirun, with the MPI that this Python has. The time is that from the fault,
noted by the rank that has it, to mpirun's end and to that of the last process with the job's mark.
How hung jobs end is in test_desync.py.

Short form: 4 cases on 2 ranks. Long form: 50 on 2 and 4 ranks, and 4 of a killed mpirun.
"""

from __future__ import annotations

import json
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from fault_jobs import Job, Mpirun, kill
from fault_table import Table

TEXT = Path(__file__).parents[2] / "LICENSE"
STEPS = 100_000  # more than any of these jobs comes to
CONFIG = f"""
[model]
layers = 1
heads = 2
width = 8
[train]
steps = {STEPS}
batch_size = 4
micro_batch_size = 1
sequence_length = 8
eval_every = 50
[checkpoint]
every = 5
[data]
text = [{json.dumps(str(TEXT))}]
"""

STEP = {"call": "mpillm.training.trainer:Trainer.step"}
EVALUATION = {"call": "mpillm.training.trainer:Trainer.evaluate"}
LOADER = {"call": "mpillm.data.loader:Loader.micro_batch"}
WRITE = {"call": "file", "match": "/.tmp-"}  # in the writing thread where saving is asynchronous


@dataclass(frozen=True)
class Fault:
    """What happens where; `options` are the job's."""

    what: str
    plan: Mapping[str, Any]
    options: tuple[str, ...] = ()


RAISES = [
    Fault("in a step", {**STEP, "nth": 12, "fault": "raise"}),
    Fault("in a thread", {**STEP, "nth": 12, "fault": "raise in a thread"}),
    Fault("in the loader", {**LOADER, "nth": 30, "fault": "raise"}),
    Fault("in an evaluation", {**EVALUATION, "nth": 1, "fault": "raise"}),
    Fault("in a save", {**WRITE, "nth": 9, "fault": "raise"}),
    Fault(
        "in the thread of an asynchronous save",
        {**WRITE, "nth": 9, "fault": "raise"},
        ("--checkpoint.async=true",),
    ),
]
KILLS = [
    Fault("in a step", {**STEP, "nth": 12, "delay": 0.001, "fault": "kill"}),
    Fault("in an evaluation", {**EVALUATION, "nth": 1, "delay": 0.002, "fault": "kill"}),
    Fault("in a save", {**WRITE, "nth": 9, "fault": "kill"}),
    Fault(
        "in an asynchronous save",
        {**WRITE, "nth": 9, "fault": "kill"},
        ("--checkpoint.async=true",),
    ),
]


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_text(CONFIG)
    return path


def cases(faults: list[Fault], long: bool, short: slice) -> Iterator[tuple[int, int, Fault]]:
    """(ranks, the one with the fault, the fault): all of them, or those of the short form."""
    if not long:
        yield from ((2, number % 2, fault) for number, fault in enumerate(faults[short]))
        return
    for ranks in (2, 4):
        for rank in (0, 1) if ranks == 2 else (0, 2, 3):
            yield from ((ranks, rank, fault) for fault in faults)


def breaks(
    start: Mpirun, folder: Path, config: Path, ranks: int, rank: int, fault: Fault
) -> tuple[float, float]:
    """Run the job to its end; seconds from the fault to that, and until no process was left."""
    run, notes = folder / "run", folder / "notes"
    plan = {"rank": rank, **fault.plan}
    job = start(ranks, notes, "train", config, f"--run.dir={run}", *fault.options, plan=plan)
    ended = job.wait(60)
    empty = job.wait_empty(10)
    happened = job.fault()
    assert happened is not None, f"ended before the fault:\n{job.said}"
    assert job.process.returncode != 0, job.said
    if "raise" in str(fault.plan["fault"]):
        assert f"rank {rank} of {ranks} (" in job.said and "an injected fault" in job.said
    return ended - happened[0], empty - happened[0]


@pytest.mark.parametrize(
    ("name", "faults", "limit", "short"),
    [("exception", RAISES, 1.0, slice(0, 2)), ("SIGKILL", KILLS, 2.0, slice(0, 2))],
    ids=["exception", "kill"],
)
def test_from_the_fault_to_the_end(
    start: Mpirun,
    tmp_path: Path,
    config: Path,
    table: Table,
    long: bool,
    name: str,
    faults: list[Fault],
    limit: float,
    short: slice,
) -> None:
    times: dict[str, list[float]] = {}
    for number, (ranks, rank, fault) in enumerate(cases(faults, long, short)):
        ended, empty = breaks(start, tmp_path / str(number), config, ranks, rank, fault)
        times.setdefault(fault.what, []).append(max(ended, empty))
    for what, seconds in times.items():
        worst = max(seconds)
        result = f"exit code not 0, no process left after {worst:.2f} s (limit {limit:g} s)"
        table.add(f"{name} of a rank {what}", len(seconds), result, worst <= limit)
    assert max(map(max, times.values())) <= limit, times


@pytest.mark.parametrize("ranks", [2, 4])
@pytest.mark.parametrize("state", ["training", "with a rank that hangs"])
def test_a_killed_mpirun_leaves_no_rank(
    start: Mpirun, tmp_path: Path, config: Path, table: Table, long: bool, ranks: int, state: str
) -> None:
    if not long:
        pytest.skip("in the long form")
    plan = {"rank": ranks - 1, **STEP, "nth": 20, "fault": "stall"} if "hangs" in state else None
    run, patience = tmp_path / "run", 3
    options = (f"--run.dir={run}", f"--run.hang_timeout={patience}")
    job = start(ranks, tmp_path / "notes", "train", config, *options, plan=plan)
    wait_for_step(run, 15, job)
    time.sleep(0.5)
    begin = time.monotonic()
    kill([job.process.pid])
    seconds = job.wait_empty(patience + 20) - begin
    # Open MPI does not take a rank with it that is outside of MPI. The watchdog ends that one, and
    # ten seconds later where the rank that was about to end them all is gone with mpirun.
    limit = patience + 15 if plan else 2
    result = f"no process left after {seconds:.2f} s (limit {limit} s)"
    table.row(f"SIGKILL of mpirun, {ranks} ranks {state}", 1, result, seconds <= limit)


def wait_for_step(run: Path, step: int, job: Job) -> None:
    """Wait until the run is so far."""
    deadline = time.monotonic() + 60
    metrics = run / "metrics.jsonl"
    while not metrics.exists() or metrics.read_bytes().count(b"\n") < step:
        assert time.monotonic() < deadline and job.process.poll() is None, job.said
        time.sleep(0.01)
