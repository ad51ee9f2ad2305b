"""Flights of jobs that never ran: recorders told of calls, and read back."""

from __future__ import annotations

import time
from collections.abc import Iterable
from typing import Any

from mpillm.parallel.diagnosis import diagnose
from mpillm.parallel.findings import Diagnosis
from mpillm.parallel.flight import Flight, parse
from mpillm.parallel.recorder import Entry, Recorder


class Job:
    """The recorders of a job's ranks. Their clock is the real one; `diagnose` looks later."""

    def __init__(self, **layout: int) -> None:
        size = 1
        for count in layout.values():
            size *= count
        self.size = size
        self.ranks = [Recorder(rank=rank, size=size, layout=layout) for rank in range(size)]

    def begin(
        self, rank: int, axis: str, op: str, nbytes: int = 64, *, wait: bool = True, **more: int
    ) -> Entry:
        """A call that is made; `wait`: and that the rank is blocked in."""
        entry = self.ranks[rank].begin(axis, op, nbytes, **more)
        if wait:
            self.ranks[rank].wait(entry)
        return entry

    def call(self, ranks: Iterable[int], axis: str, op: str, nbytes: int = 64, **more: int) -> None:
        """A call that these ranks make and complete."""
        for rank in ranks:
            self.ranks[rank].end(self.begin(rank, axis, op, nbytes, **more))

    def send(self, source: int, target: int, axis: str, peers: tuple[int, int], tag: int) -> None:
        """A message that is sent and received; `peers`: source and target in the group."""
        self.call([source], axis, "send", peer=peers[1], tag=tag)
        self.call([target], axis, "recv", peer=peers[0], tag=tag)

    def step(self, number: int) -> None:
        """All have done a step."""
        for recorder in self.ranks:
            recorder.step = number

    def flights(self) -> dict[int, Flight]:
        return {r: parse(recorder.contents(), f"rank {r}") for r, recorder in enumerate(self.ranks)}  # type: ignore[arg-type]

    def diagnose(self, after: float = 700.0, **options: Any) -> Diagnosis:
        """What is found so many seconds later, when nothing has changed."""
        return diagnose(self.flights(), time.time() + after, **options)
