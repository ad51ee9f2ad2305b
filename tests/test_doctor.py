"""What `mpillm doctor` tells of runs that died in all sorts of ways."""

from __future__ import annotations

import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import msgspec
import pytest

from mpillm.checkpoint.manifest import encode, read_manifest
from mpillm.config import dump, load
from mpillm.errors import UserError
from mpillm.parallel.flight import flight_name
from mpillm.parallel.hang_report import REPORT, stack_name
from mpillm.parallel.recorder import Recorder
from mpillm.training.doctor import examine
from mpillm.training.folder import private_folder
from mpillm.training.settings import RunConfig

SAMPLE = Path(__file__).parent / "samples" / "run-v1"
CHECKPOINT = SAMPLE / "checkpoints" / "step-00000003"

Clock = Callable[[float], None]


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    """Moves the clock on; it begins in 2001. The jobs' processes are not to be looked for."""
    monkeypatch.setattr("mpillm.parallel.recorder.start_ticks", lambda: 0)
    now = [1e9]
    monkeypatch.setattr(time, "time", lambda: now[0])

    def forward(seconds: float) -> None:
        now[0] += seconds

    monkeypatch.setattr(Run, "forward", staticmethod(forward))
    return forward


class Run:
    """A run's folder, in the making."""

    forward: Clock = staticmethod(lambda seconds: None)

    def __init__(self, folder: Path, *overrides: str) -> None:
        self.folder = folder
        folder.mkdir()
        self.config = load(RunConfig, {"model": {"family": "gpt2"}}, overrides)
        (folder / "config.toml").write_text(dump(self.config))

    def start(self, size: int = 2, attempt: int = 1, own: Path | None = None) -> list[Recorder]:
        place = self.folder / "flight" / f"{attempt:05d}"
        place.mkdir(parents=True)
        files = place if own is None else private_folder(own, self.folder) / place.name
        return [Recorder(files / flight_name(rank), rank=rank, size=size) for rank in range(size)]

    def save(self, step: int) -> Path:
        """A checkpoint that is whole, if not of this run."""
        target = self.folder / "checkpoints" / f"step-{step:08d}"
        shutil.copytree(CHECKPOINT, target)
        manifest = msgspec.structs.replace(read_manifest(CHECKPOINT), step=step)
        (target / "manifest.json").write_bytes(encode(manifest))
        return target

    def told(self, **options: Any) -> str:
        """What the doctor tells a minute later."""
        self.forward(60.0)
        return "\n".join(examine(self.folder, **options))


def section(text: str, title: str) -> list[str]:
    """The lines of a section."""
    lines = text.splitlines()
    begin = lines.index(f"{title}:") + 1
    return [line.strip() for line in lines[begin : [*lines, ""].index("", begin)]]


def steps(ranks: list[Recorder], first: int, last: int, clock: Clock) -> None:
    """Steps of a second; rank 0 computes all of it, the others wait for it half of the time."""
    for rank in ranks:
        rank.step = first
    for step in range(first, last):
        clock(0.5)
        entries = [rank.begin("data", "allreduce", 8, wait=True) for rank in ranks[1:]]
        clock(0.5)
        ranks[0].end(ranks[0].begin("data", "allreduce", 8, wait=True))
        for rank, entry in zip(ranks[1:], entries, strict=True):
            rank.end(entry)
        for rank in ranks:
            rank.step, rank.samples = step + 1, 8 * (step + 1)
            rank.beat()


def test_a_run_that_is_complete(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path / "run", "--train.steps=10", "--checkpoint.every=5")
    ranks = run.start()
    steps(ranks, 0, 10, clock)
    run.save(5), run.save(10)
    for rank in ranks:
        rank.goodbye("complete")
    text = run.told()
    assert "2 ranks, data 2, on " in text
    assert "10 steps and 80 samples done" in text
    assert [line[14:] for line in section(text, "how it ended")] == ["ranks 0 and 1: complete"]
    assert "where the ranks stood" not in text
    assert section(text, "checkpoints")[0].startswith("the last complete one: step 10 (")
    assert section(text, "what to do")[0].startswith("nothing: the run is complete")


def test_a_rank_that_was_killed(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path / "run", "--train.steps=100", "--checkpoint.every=5", "--checkpoint.keep=2")
    ranks = run.start(3)
    steps(ranks, 0, 12, clock)
    run.save(5), run.save(10)
    clock(0.25)
    ranks[0].begin("data", "allreduce", 8, wait=True)
    ranks[2].begin("data", "allreduce", 8, wait=True)
    clock(1.5)
    for rank in (ranks[0], ranks[2]):
        rank.beat()
    text = run.told()
    (ending,) = section(text, "how it ended")
    assert "ranks 0, 1 and 2: without a word: killed" in ending and "rank 1 first" in ending
    stood = section(text, "where the ranks stood")
    assert "rank 1 never entered allreduce #13 over data, where ranks 0 and 2 have" in stood[0]
    assert section(text, "checkpoints") == [
        f"the last complete one: step 10 ({run.folder}/checkpoints/step-00000010)"
    ]
    advice = "run the same command again to go on from step 10; 2 steps are to be done again"
    assert section(text, "what to do") == [advice]


def test_an_exception_comes_before_those_that_were_ended(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path / "run")
    ranks = run.start(3)
    steps(ranks, 0, 3, clock)
    ranks[1].goodbye("ZeroDivisionError: division by zero")
    clock(0.1)
    ranks[0].begin("data", "allreduce", 8, wait=True)
    (run.folder / "flight" / "00001" / stack_name(2)).write_text(
        "Fatal Python error: Segmentation fault\n\nThread 0x1 (most recent call first):\n"
    )
    text = run.told()
    assert [line[14:] for line in section(text, "how it ended")] == [
        "rank 1: ZeroDivisionError: division by zero",
        "ranks 0 and 2: without a word, as the job was ended",
        "rank 2: Fatal Python error: Segmentation fault",
    ]
    stood = section(text, "where the ranks stood")
    assert "rank 1 never entered allreduce #4 over data" in stood[0]
    assert "it ended 0.1 s ago: ZeroDivisionError: division by zero" in stood[0]
    assert section(run.told(), "what to do")[0].startswith("run the same command again to start")


def test_a_hang(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path / "run")
    ranks = run.start(2)
    steps(ranks, 0, 3, clock)
    run.save(3)
    ranks[0].begin("data", "broadcast", 8, wait=True)
    clock(601)
    (run.folder / "flight" / "00001" / REPORT).touch()
    for rank in ranks:
        rank.beat()
        rank.goodbye("hung: ended by the watchdog, see report.txt")
    text = run.told()
    assert "ranks 0 and 1: hung: ended by the watchdog" in section(text, "how it ended")[0]
    stood = section(text, "where the ranks stood")
    assert (
        "rank 1 never entered broadcast #4 over data, where rank 0 has waited for 601.0" in stood[0]
    )
    assert stood[-1].endswith(f"flight/00001/{REPORT}")
    assert section(text, "what to do") == [
        "find out why it hung, then run the same command again to go on from step 3"
    ]


def test_a_job_that_runs(tmp_path: Path) -> None:
    run = Run(tmp_path / "run")
    ranks = run.start(2)
    for rank in ranks:
        rank.step = 1
        rank.beat()
    ranks[0].begin("data", "allreduce", 8, wait=True)
    text = run.told()
    assert ", and runs: a sign of life 0." in text
    assert "rank 0 waits in allreduce #1 over data" in section(text, "who waits for whom")[-1]
    assert "how it ended" not in text
    assert section(text, "what to do") == ["the job runs; wait, or look again later"]


def test_the_slowest_ranks(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path / "run")
    steps(run.start(4), 0, 10, clock)
    first, second = section(run.told(), "slowest ranks")
    assert "rank 0 100 %, rank 1 50 %" in first and "median rank 50 %" in first
    assert second.startswith("rank 0: slower than the others")


def test_missing_damaged_and_unfinished_checkpoints(tmp_path: Path, clock: Clock) -> None:
    run = Run(
        tmp_path / "run",
        "--train.steps=1000",
        "--checkpoint.every=10",
        "--checkpoint.keep=3",
        "--checkpoint.keep_every=40",
    )
    steps(run.start(), 25, 125, clock)
    for step in (40, 80, 100, 110):
        run.save(step)
    shard = next((run.folder / "checkpoints" / "step-00000110").glob("shard-*"))
    shard.write_bytes(shard.read_bytes()[:-1])
    (run.folder / "checkpoints" / "step-00000040" / "manifest.json").unlink()
    (run.folder / "checkpoints" / ".tmp-00000120").mkdir()
    lines = section(run.told(), "checkpoints")
    assert lines[0].startswith("the last complete one: step 100 (")
    assert "step-00000040/manifest.json is missing" in lines[1]
    assert f"{shard} is damaged" in lines[2]
    assert lines[3] == "unfinished: .tmp-00000120"
    assert lines[4] == "due and not there: step 120"
    assert "from step 100; 25 steps" in section(run.told(), "what to do")[0]


def test_what_this_attempt_did_not_pass_is_not_missing(tmp_path: Path, clock: Clock) -> None:
    """An earlier one may have had other settings."""
    run = Run(tmp_path / "run", "--train.steps=99", "--checkpoint.every=10", "--checkpoint.keep=9")
    steps(run.start(), 30, 45, clock)
    assert section(run.told(), "checkpoints")[1:] == ["due and not there: step 40"]
    run.save(40)
    assert len(section(run.told(), "checkpoints")) == 1


def test_the_attempt_is_chosen(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path / "run")
    for attempt in (2, 3):
        for rank in run.start(attempt=attempt):
            rank.goodbye(f"ValueError: number {attempt}")
    assert "attempt 3 of 3" in run.told() and "number 3" in run.told()
    assert "number 2" in run.told(attempt=2)
    with pytest.raises(UserError, match="has no attempt 1; there are 2, 3 kept"):
        run.told(attempt=1)


def test_flights_on_this_nodes_own_disk(tmp_path: Path, clock: Clock) -> None:
    own = tmp_path / "own"
    run = Run(tmp_path / "run", f"--run.flight_dir={own}")
    for rank in run.start(own=own):
        rank.goodbye("KeyError: 'x'")
    assert "ranks 0 and 1: KeyError: 'x'" in run.told()


def test_a_rank_without_a_flight(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path / "run")
    run.start(3)
    (run.folder / "flight" / "00001" / flight_name(1)).unlink()
    (run.folder / "flight" / "00001" / flight_name(2)).write_bytes(b"x" * 5000)
    text = run.told()
    assert "rank 1 has left no flight file" in text
    assert f"{flight_name(2)} is no flight file of mpillm" in text


def test_settings_that_are_not_there_or_damaged(tmp_path: Path, clock: Clock) -> None:
    run = Run(tmp_path / "run")
    run.start()
    (run.folder / "config.toml").write_text("[model\n")
    assert "config.toml: not TOML" in run.told()
    (run.folder / "config.toml").unlink()
    assert "no config.toml: no attempt has come to its first step" in run.told()


def test_no_such_run(tmp_path: Path) -> None:
    (tmp_path / "kjv").mkdir()
    with pytest.raises(UserError, match=r"kjb: no such run; did you mean 'kjv'\?"):
        examine(tmp_path / "kjb")
    with pytest.raises(UserError, match=r"kjv is not a run that was trained here"):
        examine(tmp_path / "kjv")
    (tmp_path / "kjv" / "flight" / "00001").mkdir(parents=True)
    with pytest.raises(UserError, match="holds no flight file"):
        examine(tmp_path / "kjv")


def test_the_command_needs_no_mpi(tmp_path: Path, clock: Clock, python: Any) -> None:
    run = Run(tmp_path / "run")
    for rank in run.start():
        rank.goodbye("complete")
    program = """
import sys
sys.modules["mpi4py"] = None  # importing it fails
from mpillm.__main__ import main
sys.exit(main(["doctor", sys.argv[1], *sys.argv[2:]]))
"""
    result = python("-c", program, run.folder)
    assert (result.returncode, result.stderr) == (0, "")
    assert "ranks 0 and 1: complete" in result.stdout
    result = python("-c", program, run.folder, "--attempt", "x")
    assert result.returncode == 2
    assert (
        result.stderr == "mpillm: error: doctor: argument --attempt: expected an integer, got 'x'\n"
    )


def test_a_training_run_that_is_killed(mpirun: Any, python: Any, tmp_path: Path) -> None:
    """The real thing: a rank kills itself in the second step."""
    shutil.copy(SAMPLE / "text.txt", tmp_path)
    program = tmp_path / "job.py"
    program.write_text(JOB)
    killed = mpirun(2, program, cwd=tmp_path)
    assert killed.returncode != 0
    assert (tmp_path / "run").exists(), killed.stderr
    result = python("-m", "mpillm", "doctor", "run", cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    assert "2 ranks, data 2, on " in result.stdout
    assert "1 steps and 4 samples done" in result.stdout
    assert "without a word" in result.stdout
    assert "the last complete one: step 1 (run/checkpoints/step-00000001)" in result.stdout
    assert "run the same command again to go on from step 1\n" in result.stdout


JOB = """
import os, signal
import mpillm
from mpillm.training.trainer import Trainer

step = Trainer.step
def killed(trainer, *arguments):
    if trainer.step_number == 1 and trainer._mesh.world.rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    return step(trainer, *arguments)
Trainer.step = killed
mpillm.train({
    "model": {"family": "gpt2", "layers": 1, "heads": 1, "width": 8},
    "train": {"steps": 3, "batch_size": 4, "sequence_length": 8},
    "data": {"text": ["text.txt"], "tokenizer": "character"},
    "checkpoint": {"every": 1},
    "run": {"dir": "run"},
})
"""
