"""Reading flight files: where each rank of a job stood, or stands.

Nothing here needs MPI. A file may be that of a live rank, and may be damaged: what it says is
bounded and checked, and half a record is no record.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from mpillm.errors import UserError
from mpillm.parallel.flight_format import HEADER, MAGIC, RECORD, VERSION
from mpillm.parallel.grid import AXES
from mpillm.storage.disk import read_file

__all__ = [
    "HUNG",
    "Activity",
    "Call",
    "Flight",
    "Flights",
    "call_from",
    "flight_name",
    "parse",
    "read_flight",
    "read_flights",
]

HUNG = "hung"
"""How the cause begins that the watchdog notes: the rank still stands where it hung."""

_MOST_CALLS = 1 << 16  # of a ring
_MOST_RANKS = 1 << 24


@dataclass(frozen=True)
class Call:
    """One call of a rank; `end` is None while it is under way. See `flight_format.RECORD`."""

    number: int
    sequence: int
    axis: str
    op: str
    peer: int
    tag: int
    bytes: int
    step: int
    begin: float
    end: float | None

    @property
    def collective(self) -> bool:
        """Whether it is one of a whole group."""
        return self.peer < 0


@dataclass(frozen=True)
class Activity:
    """Something slow that a rank has declared, and since when."""

    name: str
    since: float


@dataclass(frozen=True)
class Flight:
    """Where a rank stands. Times are seconds since the epoch, None for what never was."""

    rank: int
    size: int
    layout: dict[str, int]
    host: str
    pid: int
    ticks: int
    start: float
    heartbeat: float | None
    first_step: int
    step: int
    samples: int
    activity: Activity | None
    progress: float
    calls: int
    waited: float
    waiting: Call | None
    waiting_since: float
    groups: dict[str, tuple[int, int]]
    ended: float | None
    cause: str
    ring: Any = field(repr=False)
    """The whole records of the ring, oldest first, as an array of RECORD."""

    @property
    def left(self) -> bool:
        """Whether the rank has gone, and said why."""
        return self.ended is not None and not self.cause.startswith(HUNG)

    @property
    def seen(self) -> float:
        """The last sign of life."""
        return max(self.start, self.progress, self.heartbeat or 0.0, self.ended or 0.0)

    def begun(self, axis: str) -> int:
        """Number of collectives of an axis that the rank has made."""
        return self._counts(axis)[0]

    def completed(self, axis: str) -> int:
        """Number of them that are complete."""
        return self._counts(axis)[1]

    def collectives(self, axis: str) -> np.ndarray:
        """The kept collectives of an axis, oldest first."""
        kept: np.ndarray = self.ring[(self.ring["axis"] == axis.encode()) & (self.ring["peer"] < 0)]
        return kept

    def find(
        self, axis: str, sequence: int, op: str = "", peer: int = -1, tag: int = 0
    ) -> Call | None:
        """A collective by its number, or a message also by operation, peer and tag; if kept."""
        ring = self.ring
        here = (ring["axis"] == axis.encode()) & (ring["sequence"] == sequence)
        if peer < 0:
            here &= ring["peer"] < 0
        else:
            here &= (ring["op"] == op.encode()) & (ring["peer"] == peer) & (ring["tag"] == tag)
        found = np.flatnonzero(here)
        return call_from(ring[found[-1]]) if len(found) else None

    def under_way(self) -> Iterator[Call]:
        """The kept calls that are not complete."""
        return (call_from(record) for record in self.ring[self.ring["end"] == 0])

    @property
    def last_completed(self) -> Call | None:
        """The call that was completed last."""
        ends = self.ring["end"]
        return call_from(self.ring[int(np.argmax(ends))]) if len(ends) and ends.max() else None

    def _counts(self, axis: str) -> tuple[int, int]:
        return self.groups.get(axis) or self._counts_of_ring.get(axis, (0, 0))

    @cached_property
    def _counts_of_ring(self) -> dict[str, tuple[int, int]]:
        """For groups that the header has no room for: what the ring tells."""
        counts = {}
        for axis in {_text(name) for name in self.ring["axis"]} - self.groups.keys():
            calls = self.collectives(axis)
            if len(calls):
                begun = int(calls["sequence"][-1]) + 1
                counts[axis] = begun, begun - int((calls["end"] == 0).sum())
        return counts


@dataclass(frozen=True)
class Flights:
    """The flights of an attempt by rank; what is wrong with those that are not there."""

    flights: dict[int, Flight]
    problems: dict[int, str]

    @property
    def size(self) -> int:
        """Ranks of the job."""
        return next(iter(self.flights.values())).size


def flight_name(rank: int) -> str:
    """Name of a rank's flight file."""
    return f"rank-{rank:05d}.bin"


def read_flights(*folders: Path, ranks: Iterable[int] | None = None) -> Flights:
    """The flights of an attempt; those that are nowhere or damaged become problems.

    folders: where the files may lie; the first that has a rank's counts. ranks: only these. Raises
    UserError where there is not one flight.
    """
    flights: dict[int, Flight] = {}
    problems: dict[int, str] = {}
    wanted = None if ranks is None else set(ranks)
    for rank, path in _files(folders):
        if rank in flights or (wanted is not None and rank not in wanted):
            continue
        try:
            flight = read_flight(path)
            first = next(iter(flights.values()), flight)
            if flight.rank != rank:
                raise UserError(f"{path} is that of rank {flight.rank}")
            if flight.layout != first.layout:
                raise UserError(f"{path} is of another job than that of rank {first.rank}")
            flights[rank] = flight
            problems.pop(rank, None)
        except UserError as error:
            problems[rank] = str(error)
    if not flights:
        raise UserError(
            next(iter(problems.values()), f"{folders[0]} holds no flight file ({flight_name(0)})")
        )
    size = next(iter(flights.values())).size
    for rank in sorted(wanted) if wanted is not None else range(size):
        if rank not in flights:
            problems.setdefault(rank, f"rank {rank} has left no flight file")
    return Flights(dict(sorted(flights.items())), dict(sorted(problems.items())))


def read_flight(path: Path) -> Flight:
    """One rank's flight file. Raises UserError, in one line, for what is none."""
    return parse(read_file(path, HEADER.itemsize + _MOST_CALLS * RECORD.itemsize), path)


def parse(content: bytes, where: Path) -> Flight:
    """What a flight file says. Raises UserError, naming `where`."""

    def refuse(why: str) -> UserError:
        return UserError(f"{where} is no flight file of mpillm: {why}")

    if len(content) < HEADER.itemsize or not content.startswith(MAGIC):
        raise refuse(f"{len(content)} bytes that do not begin with {MAGIC.decode()!r}")
    header = np.frombuffer(content, dtype=HEADER, count=1)[0]
    if header["version"] != VERSION:
        raise refuse(f"version {header['version']}; this mpillm reads {VERSION}")
    capacity, rank, size = (int(header[name]) for name in ("capacity", "rank", "size"))
    if capacity > _MOST_CALLS or len(content) != HEADER.itemsize + capacity * RECORD.itemsize:
        raise refuse(f"{len(content)} bytes do not hold {capacity} calls")
    layout = {axis: int(header["layout"][axis]) for axis in AXES}
    if not (rank < size <= _MOST_RANKS and math.prod(layout.values()) == size):
        raise refuse(f"rank {rank} of {size} in a layout {layout}")
    times = [float(header[name]) for name in _TIMES]
    if not all(0 <= time < 1e12 for time in times):
        raise refuse("a time that is none")
    start, heartbeat, progress, waited, waiting_since, ended = times
    ring = np.frombuffer(content, dtype=RECORD, offset=HEADER.itemsize)
    ring = ring[_whole(ring)]
    ring = ring[np.argsort(ring["number"], kind="stable")]
    return Flight(
        rank=rank,
        size=size,
        layout=layout,
        host=_text(header["host"]),
        pid=int(header["pid"]),
        ticks=int(header["ticks"]),
        start=start,
        heartbeat=heartbeat or None,
        first_step=int(header["first_step"]),
        step=int(header["step"]),
        samples=int(header["samples"]),
        activity=_activity(header),
        progress=progress,
        calls=int(header["calls"]),
        waited=waited,
        waiting=_waiting(header, ring),
        waiting_since=waiting_since,
        groups={
            _text(group["name"]): (int(group["begun"]), int(group["completed"]))
            for group in header["groups"]
            if group["name"]
        },
        ended=ended or None,
        cause=_text(header["cause"]),
        ring=ring,
    )


_TIMES = ("start", "heartbeat", "progress", "waited", "waiting_since", "ended")


def _files(folders: Iterable[Path]) -> Iterator[tuple[int, Path]]:
    """Flight files by their names."""
    for folder in folders:
        for path in sorted(folder.iterdir()) if folder.is_dir() else ():
            found = re.fullmatch(r"rank-([0-9]{5,8})\.bin", path.name)
            if found:
                yield int(found[1]), path


def _whole(records: np.ndarray) -> np.ndarray:
    """Which records are in use and whole."""
    times = np.isfinite(records["begin"]) & np.isfinite(records["end"])
    whole: np.ndarray = (records["number"] > 0) & (records["number"] == records["check"]) & times
    return whole


def _waiting(header: Any, ring: np.ndarray) -> Call | None:
    """The call that the rank is blocked in: from the ring, else the header's copy of it."""
    number, copy = header["waiting"], header["waiting_call"]
    if not number:
        return None
    place = int(np.searchsorted(ring["number"], number))
    if place < len(ring) and ring["number"][place] == number:
        return call_from(ring[place])
    return call_from(copy) if copy["number"] == number and _whole(copy) else None


def _activity(header: Any) -> Activity | None:
    """The innermost activity."""
    depth = int(header["depth"])
    if not 0 < depth <= len(header["activities"]):
        return None
    innermost = header["activities"][depth - 1]
    since = float(innermost["since"])
    return Activity(_text(innermost["name"]), since) if math.isfinite(since) else None


def call_from(record: Any) -> Call:
    """A call from its record."""
    return Call(
        number=int(record["number"]),
        sequence=int(record["sequence"]),
        axis=_text(record["axis"]),
        op=_text(record["op"]),
        peer=int(record["peer"]),
        tag=int(record["tag"]),
        bytes=int(record["bytes"]),
        step=int(record["step"]),
        begin=float(record["begin"]),
        end=float(record["end"]) or None,
    )


def _text(raw: bytes) -> str:
    """Printable text, whatever the bytes are."""
    text = bytes(raw).decode("utf-8", "replace")
    return "".join(c if c.isprintable() else "?" for c in text)
