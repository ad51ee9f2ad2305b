"""SIGKILL at any moment of a run: no checkpoint that was told of is lost, no byte is wrong.

A run is started again and again in its folder, by `mpillm train` under mpirun, and each of its
lives but the last is ended by SIGKILL: of one rank, of all, or of mpirun too; at a random time, or
at a random call in a certain part of the work. After each kill:

- every checkpoint that the log has told of, and that is not to be removed by now, is there;
- every checkpoint that is there verifies, and its arrays are bitwise those of a run that nobody
  disturbed (the layout stays the same);
- the next life goes on from the newest of them.

The run that is at last let through ends with the same losses, weights and optimizer, bit for bit.

Short form: 7 kills on 2 ranks. Long form: 224 kills on 2 and 4 ranks, half of them while saving is
asynchronous.
"""

from __future__ import annotations

import itertools
import json
import random
import re
import time
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any

from fault_jobs import Job, Mpirun, kill
from fault_table import Table
from run_content import Content, content, difference, losses, told

from mpillm.checkpoint.files import list_checkpoints, step_name, step_of
from mpillm.checkpoint.verify import verify

TEXT = Path(__file__).parents[2] / "LICENSE"
KEEP, KEEP_EVERY = 2, 40
CONFIG = f"""
[model]
layers = 2
heads = 2
width = 8
dropout = 0.1
[train]
batch_size = 4
micro_batch_size = 1
sequence_length = 8
eval_every = 10
[optimizer]
warmup = 2
[checkpoint]
every = 4
keep = {KEEP}
keep_every = {KEEP_EVERY}
[data]
text = [{json.dumps(str(TEXT))}]
"""


@dataclass(frozen=True, eq=False)
class Moment:
    """A part of the work; `calls`: how many of its calls a short life has on each rank."""

    what: str
    plan: Mapping[str, Any] | None
    calls: int = 1
    root: bool = False  # only rank 0 does it
    delay: float = 0.0  # seconds after the call, at most


MOMENTS = [
    Moment("at any time", None),
    Moment("in a save", {"call": "file", "match": "/.tmp-0"}, 30),
    Moment("in a step", {"call": "mpillm.training.trainer:Trainer.step"}, 25, delay=0.005),
    Moment("in the rotation", {"call": "file", "match": "/.tmp-removed"}, 10, root=True),
    Moment("in a load", {"call": "mpillm.checkpoint.reader:Checkpoint.read"}, 40, delay=0.001),
    Moment("in an evaluation", {"call": "mpillm.training.trainer:Trainer.evaluate"}, 3, delay=0.01),
    Moment("at a change of a file", {"call": "file"}, 80),
]


@dataclass(frozen=True)
class Kind:
    """Runs that are killed: their ranks and options, and how often."""

    ranks: int
    options: tuple[str, ...]
    kills: int
    steps: int

    @property
    def saving(self) -> str:
        return "asynchronous" if ASYNC in self.options else "synchronous"


ASYNC = "--checkpoint.async=true"
SHORT = [Kind(2, ("--parallel.data=2", "--parallel.zero=1", ASYNC), 7, 80)]
LONG = [
    Kind(2, ("--parallel.data=2", "--parallel.zero=1"), 56, 200),
    Kind(2, ("--parallel.tensor=2", ASYNC), 56, 200),
    Kind(4, ("--parallel.data=2", "--parallel.pipe=2"), 56, 200),
    Kind(4, ("--parallel.data=4", "--parallel.zero=3", ASYNC), 56, 200),
]


@dataclass
class Tally:
    """What came of the kills in one moment."""

    kills: int = 0
    whom: Counter[str] = field(default_factory=Counter)
    restarts: int = 0  # after them, as far as they came to training
    checked: int = 0  # checkpoints found after them and compared
    lost: list[str] = field(default_factory=list)
    wrong: list[str] = field(default_factory=list)
    astray: list[str] = field(default_factory=list)  # restarts that did not resume

    def __add__(self, other: Tally) -> Tally:
        names = (each.name for each in fields(self))
        return Tally(**{name: getattr(self, name) + getattr(other, name) for name in names})

    @property
    def failures(self) -> list[str]:
        return [*self.lost, *self.wrong, *self.astray]

    @property
    def result(self) -> str:
        return (
            f"{len(self.lost)} lost, {len(self.wrong)} wrong of {self.checked} checkpoints; "
            f"{self.restarts - len(self.astray)} of {self.restarts} restarts resumed"
            + (f": {self.failures[0]}" if self.failures else "")
        )


# --- a run that is not killed ---------------------------------------------------------------------


class Reference:
    """A run that nobody disturbs, with all its checkpoints."""

    def __init__(self, run: Path) -> None:
        self.losses = losses(run)
        self._folder = run / "checkpoints"
        self._contents: dict[int, Content] = {}

    def difference(self, path: Path, step: int) -> str | None:
        """What is not bitwise the same in a checkpoint of this step."""
        if step not in self._contents:
            self._contents[step] = content(self._folder / step_name(step))
        return difference(self._contents[step], content(path))


# --- a run that is killed -------------------------------------------------------------------------


class Victim:
    """One run folder and its lives."""

    def __init__(
        self, start: Mpirun, folder: Path, config: Path, kind: Kind, rng: random.Random
    ) -> None:
        self.run = folder / "run"
        self._start, self._folder, self._config, self._kind = start, folder, config, kind
        self._rng = rng
        self._lives = 0
        self._tally = Tally()  # of the moment of the last kill

    def live(self, moment: Moment | None, tally: Tally) -> bool:
        """One life, to be ended in that moment; whether it was, or came to the run's end."""
        self._lives += 1
        before = max(told(self.run), default=0)
        log = self.run / "log.txt"
        offset = log.stat().st_size if log.exists() else 0
        plan = self._plan(moment) if moment and moment.plan else None
        options = (f"--run.dir={self.run}", f"--train.steps={self._kind.steps}")
        notes = self._folder / f"life-{self._lives}"
        job = self._start(
            self._kind.ranks, notes, "train", self._config, *options, *self._kind.options, plan=plan
        )
        whom = self._kill_in_time(job) if moment and not moment.plan else None
        job.wait(60)
        job.wait_empty(10)
        if plan and job.fault():
            whom = "one rank" if plan["fault"] == "kill" else "all ranks"
        self._check_resumed(before, log.read_bytes()[offset:].decode() if log.exists() else "")
        if whom is None or job.process.returncode == 0:  # it was over before the kill
            assert job.process.returncode == 0, f"not killed, but:\n{job.said}"
            return False
        tally.kills += 1
        tally.whom[whom] += 1
        self._tally = tally
        return True

    def _plan(self, moment: Moment) -> dict[str, Any]:
        """A random call in the moment, on a random rank."""
        rng = self._rng
        return {
            **(moment.plan or {}),
            "rank": 0 if moment.root else rng.randrange(self._kind.ranks),
            "nth": rng.randint(1, moment.calls),
            "when": rng.choice(["before", "after"]),
            "delay": rng.uniform(0, moment.delay),
            "fault": rng.choice(["kill", "kill all"]),
        }

    def _kill_in_time(self, job: Job) -> str | None:
        """SIGKILL from outside at a random time; whom it met, None when the job was over."""
        moment = job.begun + self._rng.uniform(0.1, 1.0 + 0.3 * self._kind.ranks)
        while time.monotonic() < moment:
            if job.process.poll() is not None:
                return None
            time.sleep(0.001)
        processes = job.processes()
        ranks = [pid for pid, rank in processes.items() if rank is not None]
        whom = self._rng.choice(["one rank", "all ranks", "all ranks and mpirun"])
        if whom == "one rank" and ranks:
            kill([self._rng.choice(ranks)])
        elif whom == "all ranks" and ranks:
            kill(ranks)
        else:
            whom = "all ranks and mpirun"
            kill(processes)
        return whom

    def _check_resumed(self, before: int, log: str) -> None:
        """Whether this life, as far as it came, went on from what earlier ones have told of."""
        resumed = re.search(r"resumed after step (\d+)", log)
        if before and (resumed or re.search(r" step +\d+/", log)):
            self._tally.restarts += 1
            if resumed is None or int(resumed[1]) < before:
                self._tally.astray.append(f"{resumed[0] if resumed else 'anew'}, told of {before}")

    def check(self, reference: Reference) -> None:
        """Look at every checkpoint there is, and for those that ought to be."""
        tally = self._tally
        present: set[int] = set()
        for path in list_checkpoints(self.run / "checkpoints"):
            step = step_of(path.name) or 0
            present.add(step)
            tally.checked += 1
            problem = next(iter(verify(path)), None) or reference.difference(path, step)
            if problem:
                tally.wrong.append(f"{path.name}: {problem}")
        acknowledged = told(self.run)
        newest = sorted(present.union(acknowledged))[-KEEP:]
        for step in acknowledged:
            if (step in newest or step % KEEP_EVERY == 0) and step not in present:
                tally.lost.append(f"step {step} after life {self._lives} in {self._folder.name}")

    def check_end(self, reference: Reference) -> None:
        """The run is complete: compare all that it has measured, too."""
        self.check(reference)
        assert max(told(self.run)) == self._kind.steps
        if losses(self.run) != reference.losses:
            self._tally.wrong.append(f"the losses of {self._folder.name}")


def campaign(
    start: Mpirun, base: Path, config: Path, kind: Kind, rng: random.Random
) -> dict[Moment, Tally]:
    """Kill runs of a kind as often as it says, and let the last one through."""
    all_kept = replace(kind, options=(*kind.options, "--checkpoint.keep=10000"))
    whole = Victim(start, base / "whole", config, all_kept, rng)
    assert not whole.live(None, Tally())
    reference = Reference(whole.run)
    tallies = {moment: Tally() for moment in MOMENTS}
    order: list[Moment] = []
    for number in itertools.count():
        victim = Victim(start, base / f"run-{number}", config, kind, rng)
        while (done := sum(tally.kills for tally in tallies.values())) < kind.kills:
            order = order or (rng.sample(MOMENTS, len(MOMENTS)) if done else MOMENTS[::-1])
            moment = order.pop()
            if not victim.live(moment, tallies[moment]):
                break
            victim.check(reference)
        else:
            assert not victim.live(None, Tally())
        victim.check_end(reference)
        if done == kind.kills:
            return tallies
    raise AssertionError


def test_kills(start: Mpirun, tmp_path: Path, table: Table, long: bool) -> None:
    config = tmp_path / "run.toml"
    config.write_text(CONFIG)
    failures = []
    found: dict[tuple[str, str], list[Tally]] = {}
    for number, kind in enumerate(LONG if long else SHORT):
        tallies = campaign(start, tmp_path / str(number), config, kind, random.Random(number))
        for moment, tally in tallies.items():
            found.setdefault((moment.what, kind.saving), []).append(tally)
    for (what, saving), parts in found.items():
        tally = sum(parts[1:], parts[0])
        failures += tally.failures
        if long and not tally.kills:
            failures.append(f"no kill {what}: it was never reached")
        table.add(
            f"SIGKILL {what}, {saving} saving",
            tally.kills,
            tally.result,
            not tally.failures and (tally.kills > 0 or not long),
        )
    assert not failures
