"""What the flights of a job say, in words: calls, ranks, who waits and who is waited for."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence

from mpillm.parallel.flight import Call, Flight
from mpillm.parallel.unlike import Departure
from mpillm.parallel.waiting import Places, Wait

__all__ = ["Wording", "name_ranks"]

_LINES = 20  # about those who wait


class Wording:
    """Sentences about the ranks at a moment.

    silent: the ranks without a heartbeat, with what is known of their processes. now: seconds since
    the epoch.
    """

    def __init__(
        self,
        flights: Mapping[int, Flight],
        places: Places,
        silent: Mapping[int, str],
        now: float,
    ) -> None:
        self._flights = flights
        self._places = places
        self._silent = silent
        self._now = now

    def blame(self, rank: int, wait: Wait | None) -> str:
        """What others wait for in vain, and what the rank does instead."""
        state = self.state(rank)
        if wait is None:
            return f"rank {rank} {state}"
        call, others = wait.call, [other for other in wait.waiting if other != rank]
        waited = f"{name_ranks(others)} {_has(others)} waited for {self._ago(wait.since)}"
        if call.collective:
            what = f"{call.op} #{call.sequence + 1} over {self.group(wait)}"
            if rank in wait.absent:
                return f"rank {rank} never entered {what}, where {waited}; it {state}"
            return f"rank {rank} entered {what} and does not go on, where {waited}; it {state}"
        half = "send" if call.op == "recv" else "recv"
        what = f"{half} #{call.sequence + 1} {'to' if half == 'send' else 'from'} rank {others[0]}"
        what += f" over {self._group(call, others[0])}"
        if rank in wait.absent:
            return f"rank {rank} never made {what}, for which {waited}; it {state}"
        return f"rank {rank} made {what} and does not go on, for which {waited}; it {state}"

    def state(self, rank: int) -> str:
        """What a rank does, as the end of a sentence about it."""
        flight = self._flights.get(rank)
        if flight is None:
            return "has left no flight file that can be read"
        if flight.left and flight.ended is not None:
            return f"ended {self._ago(flight.ended)} ago: {flight.cause}"
        if rank in self._silent and flight.heartbeat is not None:
            return (
                f"has given no sign of life for {self._ago(flight.heartbeat)} (process "
                f"{flight.pid} on {flight.host}: {self._silent[rank]}); it was last "
                f"{self._doing(flight)}"
            )
        return ("is " if flight.waiting else "has been ") + self._doing(flight)

    def departed(self, rank: int, departure: Departure) -> str:
        """How a rank does otherwise than it did."""
        made = departure.made and self.call(rank, departure.made, size=True)
        left_out = departure.left_out and self.call(rank, departure.left_out, size=True)
        if made is None or departure.resumed:
            return f"rank {rank} left out {left_out}, which it made in the step before"
        if left_out is None or departure.extra:
            return f"rank {rank} made {made}, which it did not in the step before"
        return f"rank {rank} made {made}, and in the step before {left_out}"

    def call(self, rank: int, call: Call, size: bool = False) -> str:
        """A call as a rank made it."""
        text = f"{call.op} #{call.sequence + 1}"
        if not call.collective:
            members = self._places.members(call.axis, rank)
            peer = members[call.peer] if call.peer < len(members) else f"{call.peer} of the group"
            text += f" {'from' if call.op == 'recv' else 'to'} rank {peer}"
        text += f" over {self._group(call, rank)}"
        return f"{text} of {call.bytes:,} bytes" if size else text

    def group(self, wait: Wait) -> str:
        """The group of a call, told apart from others of its name."""
        return self._group(wait.call, wait.waiting[0])

    def waiting(self, waits: Sequence[Wait]) -> list[str]:
        """Who waits in which call, how long, and for whom; a line each, but not thousands."""
        lines = [
            f"{name_ranks(wait.waiting)} {'wait' if len(wait.waiting) > 1 else 'waits'} in "
            f"{self.call(wait.waiting[0], wait.call)} for {self._ago(wait.since)}"
            + (f", for {name_ranks(wait.pending)}" if wait.pending else "")
            for wait in waits
        ]
        if len(lines) > _LINES:
            rest = waits[_LINES - 1 :]
            ranks = sum(len(wait.waiting) for wait in rest)
            lines[_LINES - 1 :] = [f"and {ranks:,} more ranks wait in {len(rest):,} more calls"]
        return lines

    def _doing(self, flight: Flight) -> str:
        call, last, steps = flight.waiting, flight.last_completed, f"{flight.step:,} steps done"
        if call is not None:
            return f"in {self.call(flight.rank, call)} for {self._ago(flight.waiting_since)}"
        after = (
            f", {steps}" if last is None else f", {steps}, last in {self.call(flight.rank, last)}"
        )
        if flight.activity:
            ago = self._ago(flight.activity.since)
            return f"in '{flight.activity.name}' for {ago}, outside of any call{after}"
        return f"outside of any call for {self._ago(flight.progress)}{after}"

    def _group(self, call: Call, rank: int) -> str:
        place = self._places.where(call.axis, rank)
        if not call.collective and call.tag:
            place.append(f"tag {call.tag}")
        return call.axis + (f" ({', '.join(place)})" if place else "")

    def _ago(self, since: float) -> str:
        return f"{max(0.0, self._now - since):,.1f} s"


def name_ranks(ranks: Iterable[int]) -> str:
    """Ranks in words, those of many runs cut short.

    >>> name_ranks([0, 1, 2, 3, 7])
    'ranks 0 to 3 and 7'
    """
    runs: list[list[int]] = []
    for rank in sorted(ranks):
        if runs and rank == runs[-1][1] + 1:
            runs[-1][1] = rank
        else:
            runs.append([rank, rank])
    parts: list[str] = []
    for first, last in runs[:8]:
        if last > first + 2:
            parts.append(f"{first} to {last}")
        else:
            parts += [str(rank) for rank in range(first, last + 1)]
    if len(runs) > 8:
        parts.append(f"{sum(last + 1 - first for first, last in runs[8:]):,} more")
    if len(parts) == 1 and runs[0][0] == runs[0][1]:
        return f"rank {parts[0]}"
    *most, end = parts
    return f"ranks {', '.join(most)} and {end}" if most else f"ranks {end}"


def _has(ranks: Sequence[int]) -> str:
    return "have" if len(ranks) > 1 else "has"
