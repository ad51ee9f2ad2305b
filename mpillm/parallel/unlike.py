"""Calls that should have been alike: on the members of a group, and on a rank from step to step."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np

from mpillm.parallel.flight import Call, Flight, call_from
from mpillm.parallel.flight_format import IN_ACTIVITY
from mpillm.parallel.waiting import Wait

__all__ = ["Departure", "astray", "departures", "first_difference"]

_COMPARED = 1 << 20  # calls of a group that are compared with each other, at most
_UNEVEN = "alltoall"  # to which every rank brings as much as it likes


def first_difference(
    flights: Mapping[int, Flight], wait: Wait
) -> tuple[int, dict[tuple[str, int, int], list[int]]] | None:
    """The first kept collective of a group that is not the same on all of its members.

    Its number, and the ranks by what they called: (operation, bytes, root); bytes are 0 where ranks
    may differ in them. None where all are alike.
    """
    axis, sequence = wait.call.axis, wait.call.sequence
    members = [rank for rank in wait.members if rank in flights and flights[rank].begun(axis)]
    entered = [rank for rank in members if flights[rank].begun(axis) > sequence]
    for ranks, last in ((members, None), (entered, sequence)):
        different = _earliest([flights[rank].collectives(axis) for rank in ranks], last)
        if different is not None:
            calls: dict[tuple[str, int, int], list[int]] = {}
            for rank in ranks:
                call = flights[rank].find(axis, different)
                if call is not None:
                    size = 0 if call.op == _UNEVEN else call.bytes
                    calls.setdefault((call.op, size, call.tag), []).append(rank)
            if len(calls) > 1:
                return different, calls
    return None


def _earliest(rings: list[np.ndarray], last: int | None) -> int | None:
    """The lowest number under which the rings do not hold the same call; `last`: only that."""
    if len(rings) < 2 or not all(len(ring) for ring in rings):
        return None
    stop = min(int(ring["sequence"][-1]) for ring in rings) if last is None else last
    start = max(int(ring["sequence"][0]) for ring in rings) if last is None else last
    start = max(start, stop + 1 - max(1, _COMPARED // len(rings)))
    if start > stop:
        return None
    table = np.zeros((len(rings), stop + 1 - start), dtype=[("op", "S16"), ("rest", "<i8", 2)])
    for row, ring in zip(table, rings, strict=True):
        chosen = ring[(ring["sequence"] >= start) & (ring["sequence"] <= stop)]
        places = (chosen["sequence"] - start).astype(np.int64)
        row["op"][places] = chosen["op"]
        row["rest"][places, 0] = _bytes(chosen)
        row["rest"][places, 1] = chosen["tag"]
    known = (table["op"] != b"").all(axis=0)  # a record may be half written
    unlike = (table["op"] != table["op"][0]).any(axis=0)
    unlike |= (table["rest"] != table["rest"][0]).any(axis=(0, 2))
    places = np.flatnonzero(known & unlike)
    return start + int(places[0]) if len(places) else None


@dataclass(frozen=True)
class Departure:
    """Where a rank's calls of a step depart from its own of the step before.

    left_out: what it had made there, with the number that the call would have had now; None where
    it had made nothing more. made: what it made instead; None where it made nothing more. Where
    `extra`, what was left out comes after it; where `resumed`, the rank goes on as if it had made
    that.
    """

    left_out: Call | None
    made: Call | None
    extra: bool
    resumed: bool


def departures(flight: Flight) -> dict[int, Departure]:
    """Where a rank does otherwise than in the step before, by the number of steps done then.

    Steps are alike, hence of two ranks that disagree the one that departs from itself has gone
    astray. Steps that the ring has not kept whole are not compared, nor what is done in activities.
    """
    ring = flight.ring[flight.ring["flags"] & IN_ACTIVITY == 0]
    found: dict[int, Departure] = {}
    if not len(ring):
        return found
    # The oldest step is whole only if nothing was ever dropped.
    oldest = int(ring["step"][0]) + int(flight.ring["number"][0] > 1)
    for step in map(int, np.unique(ring["step"])):
        if step <= oldest:
            continue
        now, before = ring[ring["step"] == step], ring[ring["step"] == step - 1]
        length = min(len(now), len(before))
        unlike = np.flatnonzero(~_alike(now[:length], before[:length]))
        place = int(unlike[0]) if len(unlike) else length
        done = step < flight.step  # else there is more to come
        if length and (place < len(now) or (done and place < len(before))):
            found[step] = _departure(flight, now, before, place)
    return found


def astray(flights: Mapping[int, Flight | None]) -> dict[int, Departure]:
    """Of ranks that disagree those that depart from what they did before, and where first.

    Where all of them do in the same step, that step differs on purpose.
    """
    found = {rank: departures(flight) for rank, flight in flights.items() if flight is not None}
    common = set.intersection(*(set(steps) for steps in found.values())) if found else set()
    return {
        rank: steps[min(steps.keys() - common)]
        for rank, steps in found.items()
        if steps.keys() - common
    }


def _departure(flight: Flight, now: np.ndarray, before: np.ndarray, place: int) -> Departure:
    made = call_from(now[place]) if place < len(now) else None
    there = call_from(before[place]) if place < len(before) else None
    if there is not None:
        upto = int(now[place - 1]["number"]) + 1 if made is None else made.number
        there = replace(there, sequence=_next_sequence(flight, there, upto))
    return Departure(
        there,
        made,
        extra=there is None or _same(now, place + 1, before, place),
        resumed=made is None or _same(now, place, before, place + 1),
    )


def _same(a: np.ndarray, i: int, b: np.ndarray, j: int) -> bool:
    """Whether both rows have such a place and hold the same call there."""
    return i < len(a) and j < len(b) and bool(_alike(a[i : i + 1], b[j : j + 1])[0])


def _alike(a: np.ndarray, b: np.ndarray) -> np.ndarray:
    """Which of two rows of as many records are of the same calls, made at different times."""
    same: np.ndarray = _bytes(a) == _bytes(b)
    for name in ("axis", "op", "peer", "tag"):
        same = same & (a[name] == b[name])
    return same


def _bytes(records: np.ndarray) -> np.ndarray:
    """Sizes of calls, 0 where ranks and steps may differ in them."""
    sizes: np.ndarray = np.where(records["op"] == _UNEVEN.encode(), 0, records["bytes"])
    return sizes


def _next_sequence(flight: Flight, call: Call, before: int) -> int:
    """The number that a call like this one would have had in place of the rank's call `before`."""
    ring = flight.ring[flight.ring["number"] < before]
    alike = (ring["axis"] == call.axis.encode()) & (ring["peer"] == call.peer)
    if not call.collective:
        alike &= (ring["op"] == call.op.encode()) & (ring["tag"] == call.tag)
    return int(ring["sequence"][alike].max(initial=call.sequence)) + 1
