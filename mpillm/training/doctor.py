"""What became of a run: from its flight files, its settings and its checkpoints, without MPI."""

from __future__ import annotations

import re
import statistics
import time
from collections.abc import Iterable
from pathlib import Path

from mpillm.checkpoint.files import list_checkpoints, step_of
from mpillm.checkpoint.manifest import read_manifest
from mpillm.config import load
from mpillm.errors import UserError, did_you_mean
from mpillm.parallel.diagnosis import SILENCE, diagnose
from mpillm.parallel.flight import HUNG, Flight, Flights, read_flights
from mpillm.parallel.hang_report import REPORT, is_running, processes_of, stack_name
from mpillm.parallel.wording import name_ranks
from mpillm.storage.disk import file_size
from mpillm.training.folder import private_folder
from mpillm.training.settings import RunConfig

__all__ = ["examine"]

COMPLETE, STOPPED = "complete", "stopped"
"""How the causes begin of ranks that ended as they should."""

_SLOWEST = 3  # ranks that are told of
_STRAGGLES = 0.1  # more of its time spent computing than the median rank: it holds up the others


def examine(folder: Path, attempt: int | None = None) -> list[str]:
    """All that can be told of an attempt at a run, by default the last, a line each.

    Raises UserError where there is no such run or attempt, or not one flight file in it.
    """
    attempts = _attempts(folder)
    number = attempts[-1] if attempt is None else attempt
    if number not in attempts:
        raise UserError(
            f"{folder} has no attempt {number}; there {_are(attempts)} kept, choose one of them"
        )
    reports = folder / "flight" / f"{number:05d}"
    config, problem = _settings(folder)
    places = [reports]
    if config and config.run.flight_dir:  # where it is this node's, it is the newer one
        places.insert(0, private_folder(Path(config.run.flight_dir), folder) / reports.name)
    found = read_flights(*places)
    case = _Case(folder, reports, found, config)
    lines = [f"{folder}, attempt {number} of {attempts[-1]}", *case.facts(), *problem]
    for title, section in (
        ("how it ended" if not case.alive else "ranks that have ended", case.endings()),
        ("who waits for whom" if case.alive else "where the ranks stood", case.diagnosis()),
        ("slowest ranks", case.stragglers()),
        ("checkpoints", case.checkpoints()),
        ("what to do", [case.advice()]),
    ):
        if section:
            lines += ["", f"{title}:", *(f"  {line}" for line in section)]
    return lines


def _attempts(folder: Path) -> list[int]:
    """Numbers of the attempts that are kept."""
    if not folder.is_dir():
        near = [path.name for path in folder.parent.iterdir()] if folder.parent.is_dir() else []
        raise UserError(f"{folder}: no such run; {did_you_mean(folder.name, near)}")
    flight = folder / "flight"
    names = [path.name for path in flight.iterdir()] if flight.is_dir() else []
    numbers = sorted(int(name) for name in names if re.fullmatch("[0-9]{5,9}", name))
    if not numbers:
        raise UserError(f"{folder} is not a run that was trained here: it has no flight/00001")
    return numbers


def _are(attempts: list[int]) -> str:
    named = ", ".join(map(str, attempts))
    return f"is {named}" if len(attempts) == 1 else f"are {named}"


def _settings(folder: Path) -> tuple[RunConfig | None, list[str]]:
    """The run's settings; what is wrong with them, if anything."""
    path = folder / "config.toml"
    if not path.exists():
        return None, [f"no {path.name}: no attempt has come to its first step"]
    try:
        return load(RunConfig, path), []
    except UserError as error:
        return None, [str(error)]


class _Case:
    """One attempt."""

    def __init__(
        self, folder: Path, reports: Path, found: Flights, config: RunConfig | None
    ) -> None:
        self._folder = folder
        self._reports = reports
        self._found = found
        self._flights = found.flights
        self._config = config
        self._seen = max(flight.seen for flight in self._flights.values())
        self._step = max(flight.step for flight in self._flights.values())
        clock = time.time()
        # Of ranks elsewhere only their beats tell, one a second.
        recent = clock - self._seen < 2 * SILENCE
        running = [is_running(flight) for flight in self._flights.values() if not flight.ended]
        self.alive = True in running or (recent and None in running)
        self._now = clock if self.alive else self._seen
        # Checkpoints by step: where the whole ones are, what is wrong with the others.
        self._whole: dict[int, Path] = {}
        self._damaged: dict[int, str] = {}
        self._look()

    def facts(self) -> list[str]:
        """What ran where and when."""
        first = next(iter(self._flights.values()))
        hosts = sorted({flight.host for flight in self._flights.values()})
        sizes = [f"{axis} {size}" for axis, size in first.layout.items() if size > 1]
        start = min(flight.start for flight in self._flights.values())
        named = ", ".join(hosts[:4]) + (f" and {len(hosts) - 4} more" if len(hosts) > 4 else "")
        ranks = f"{first.size} ranks, {' x '.join(sizes)}" if sizes else "1 rank"
        return [
            f"{ranks}, on {named}",
            f"started {_date(start)}, "
            + (
                f"and runs: a sign of life {time.time() - self._seen:.1f} s ago"
                if self.alive
                else f"last sign of life {_date(self._seen)}, {_duration(self._seen - start)} later"
            ),
            f"{self._step:,} steps and {max(f.samples for f in self._flights.values()):,} samples "
            f"done, of these {self._step - first.first_step:,} steps in this attempt",
            *self._found.problems.values(),
        ]

    def endings(self) -> list[str]:
        """How each rank ended, the first first; ranks that say the same together."""
        alike: dict[str, list[Flight]] = {}
        for flight in self._flights.values():
            if flight.ended is not None:
                alike.setdefault(flight.cause, []).append(flight)
        endings = [(_first(flights), cause, flights) for cause, flights in alike.items()]
        silent = [flight for flight in self._flights.values() if flight.ended is None]
        if silent and not self.alive:
            # A rank that is ended is seen until then or, with its last beat, up to a second less.
            first = min(flight.seen for flight in silent)
            told = [when for when, cause, _ in endings if not cause.startswith(COMPLETE)]
            if told and min(told) < first + 1.5:
                endings.append((max(first, *told), "without a word, as the job was ended", silent))
            else:
                endings.append((first, self._killed(silent), silent))
        lines = [
            f"{_clock(when)}  {name_ranks(flight.rank for flight in flights)}: {cause}"
            for when, cause, flights in sorted(endings, key=lambda ending: ending[0])
        ]
        return lines + [text for flight in silent for text in self._crash(flight)]

    def _killed(self, silent: list[Flight]) -> str:
        """In words, that ranks were killed; which was first, if that can be told."""
        first, *others = sorted(silent, key=lambda flight: flight.seen)
        text = "without a word: killed (kill -9, out of memory, a time limit, a lost node)"
        if others and others[0].seen - first.seen > 1.5:
            text += f", rank {first.rank} first"
        return text

    def _crash(self, flight: Flight) -> list[str]:
        """What the fault handler has written, should the rank have crashed."""
        try:
            text = (self._reports / stack_name(flight.rank)).read_text(errors="replace")
        except OSError:
            return []
        found = re.search(r"^Fatal Python error: .*$", text, re.MULTILINE)
        return [f"{_clock(flight.seen)}  rank {flight.rank}: {found[0]}"] if found else []

    def diagnosis(self) -> list[str]:
        """Why ranks wait, as the watchdog would tell."""
        settings = self._config.run if self._config else None
        if not self.alive and all(
            f.cause.startswith((COMPLETE, STOPPED)) for f in self._flights.values()
        ):
            return []
        found = diagnose(
            self._flights,
            self._now,
            settings.hang_timeout if settings and settings.hang_timeout else 600.0,
            settings.slow_timeout if settings else 3600.0,
            processes_of(self._flights) if self.alive else None,
        )
        report = self._reports / REPORT
        lines = list(found.lines)
        if report.exists():
            lines.append(f"with stacks, the watchdog's report: {report}")
        return lines

    def stragglers(self) -> list[str]:
        """The ranks that spend the most of their time computing: the others wait for them."""
        if len(self._flights) < 2 or not self._step:
            return []
        shares = {rank: self._share(flight) for rank, flight in self._flights.items()}
        median = statistics.median(shares.values())
        slowest = sorted(shares, key=lambda rank: -shares[rank])[:_SLOWEST]
        line = "computing, and not waiting for others: " + ", ".join(
            f"rank {rank} {100 * shares[rank]:.0f} %" for rank in slowest
        )
        lines = [f"{line} of the time; the median rank {100 * median:.0f} %"]
        slow = [rank for rank, share in shares.items() if share > median + _STRAGGLES]
        if slow:
            lines.append(f"{name_ranks(slow)}: slower than the others, who wait for it")
        return lines

    def _share(self, flight: Flight) -> float:
        """What part of its time a rank was not blocked, up to where it stands."""
        lasted = flight.progress - flight.start
        return max(0.0, 1.0 - flight.waited / lasted) if lasted > 0 else 0.0

    # -- checkpoints -----------------------------------------------------------------------------

    def checkpoints(self) -> list[str]:
        """The last whole one, and what is damaged, unfinished or missing."""
        whole, lines = self._whole, []
        if whole:
            lines.append(f"the last complete one: step {max(whole):,} ({whole[max(whole)]})")
        else:
            lines.append("there is no complete one")
        lines += self._damaged.values()
        left = sorted((self._folder / "checkpoints").glob(".tmp-*"))
        if left:
            lines.append(f"unfinished: {', '.join(path.name for path in left)}")
        missing = self._missing({*whole, *self._damaged})
        if missing:
            named = ", ".join(f"{step:,}" for step in missing[:8])
            more = f" and {len(missing) - 8} more" if len(missing) > 8 else ""
            lines.append(f"due and not there: step {named}{more}")
        return lines

    def _look(self) -> None:
        """Sort the checkpoints. Hashes are the business of `mpillm checkpoint verify`."""
        for path in list_checkpoints(self._folder / "checkpoints"):
            step = step_of(path.name) or 0
            try:
                for file in read_manifest(path).files:
                    if file_size(path / file.name) != file.bytes:
                        raise UserError(f"{path / file.name} is damaged: not {file.bytes} bytes")
                self._whole[step] = path
            except UserError as error:
                self._damaged[step] = str(error)

    def _missing(self, there: set[int]) -> list[int]:
        """Steps whose checkpoints this attempt should have made and kept."""
        if self._config is None:
            return []
        settings, last = self._config.checkpoint, self._step
        first = min(flight.first_step for flight in self._flights.values())
        every = settings.every
        due = set(range(first - first % every + every, last + 1, every)) if every else set()
        if last == self._config.train.steps > first:
            due.add(last)
        kept = set(sorted(there | due)[-settings.keep :])
        if settings.keep_every:
            kept |= {step for step in due if step % settings.keep_every == 0}
        return sorted((kept & due) - there)

    def advice(self) -> str:
        """The next step, in one line."""
        whole = self._whole
        causes = [flight.cause for flight in self._flights.values()]
        if self.alive:
            return "the job runs; wait, or look again later"
        if all(cause.startswith(COMPLETE) for cause in causes):
            return "nothing: the run is complete; raise train.steps to go on"
        if not whole:
            return "run the same command again to start anew; set checkpoint.every to lose less"
        again = self._step - max(whole)
        lost = f"; {again:,} steps are to be done again" if again > 0 else ""
        why = "find out why it hung, then " if any(c.startswith(HUNG) for c in causes) else ""
        return f"{why}run the same command again to go on from step {max(whole):,}{lost}"


def _first(flights: Iterable[Flight]) -> float:
    return min(flight.ended or flight.seen for flight in flights)


def _date(when: float) -> str:
    return time.strftime("%Y-%m-%d %H:%M:%S", time.localtime(when))


def _clock(when: float) -> str:
    return f"{time.strftime('%H:%M:%S', time.localtime(when))}.{int(1000 * (when % 1)):03d}"


def _duration(seconds: float) -> str:
    """A time span for people.

    >>> _duration(3725.2)
    '1 h 2 min'
    """
    minutes, left = divmod(round(seconds), 60)
    if not minutes:
        return f"{seconds:.1f} s"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if hours else f"{minutes} min {left} s"
