"""Who waits for whom, from the flights of all ranks.

A rank is blocked in one call at most. Of a collective it waits for the members that have not made
it; if all have, for those that have begun it and do something else meanwhile, because a call of
several steps goes on only where it is driven on. Of a message it waits for the peer's half.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

from mpillm.parallel.flight import Call, Flight
from mpillm.parallel.grid import GROUPS, Grid
from mpillm.parallel.settings import ParallelSettings

__all__ = ["Places", "Wait", "cycles", "outvoted", "waits_of"]

_COMPARED = 1 << 20  # calls of a group that are compared with each other, at most


class Places:
    """Which ranks belong together, and how a group is told apart from others of its name."""

    def __init__(self, flights: Mapping[int, Flight]) -> None:
        first = next(iter(flights.values()))
        self._grid = Grid(_layout(first.layout))
        self._members: dict[str, dict[int, tuple[int, ...]]] = {}
        nodes: dict[str, list[int]] = {}
        for rank, flight in sorted(flights.items()):
            nodes.setdefault(flight.host, []).append(rank)
        self._members["node"] = {r: tuple(ranks) for ranks in nodes.values() for r in ranks}

    def members(self, axis: str, rank: int) -> tuple[int, ...]:
        """World ranks of the group that a rank calls by this name; none when that is unknown."""
        known = self._members.setdefault(axis, {})
        if rank not in known and axis in GROUPS:
            members = self._grid.members(axis, rank)
            known.update(dict.fromkeys(members, members))
        return known.get(rank, ())

    def where(self, axis: str, rank: int) -> list[str]:
        """The place of a rank's group along the axes that it does not span: `tensor 0`, ..."""
        if axis not in GROUPS:
            return []
        place = self._grid.place(rank)
        return [
            f"{name} {place[name]}"
            for name in ("data", "tensor", "pipe", "context", "expert")
            if name not in GROUPS[axis] and self._grid.sizes[name] > 1
        ]


def _layout(sizes: Mapping[str, int]) -> ParallelSettings:
    return ParallelSettings(
        data=sizes["data"],
        tensor=sizes["tensor"],
        pipe=sizes["pipe"],
        context=sizes["context"],
        expert=sizes["expert"],
    )


@dataclass
class Wait:
    """A call that ranks are blocked in.

    call: as the first of them made it. waiting: these. absent: members that have not made it; with
    a message, the peer. passive: those that have made it, and neither completed it nor wait for it.
    """

    call: Call
    members: tuple[int, ...]
    waiting: list[int] = field(default_factory=list)
    since: float = float("inf")
    absent: tuple[int, ...] = ()
    passive: tuple[int, ...] = ()
    match: Call | None = None
    """The peer's half of a message, if it was made."""

    @property
    def pending(self) -> tuple[int, ...]:
        """The ranks that are waited for."""
        return self.absent or self.passive


def waits_of(flights: Mapping[int, Flight], places: Places) -> list[Wait]:
    """The calls that ranks are blocked in, and whom each waits for."""
    waits: dict[tuple[object, ...], Wait] = {}
    for rank, flight in flights.items():
        call = flight.waiting
        if call is None or flight.left:
            continue
        members = places.members(call.axis, rank)
        key: tuple[object, ...] = call.axis, members or rank, call.sequence
        if not call.collective:
            key = rank, call.number
        wait = waits.setdefault(key, Wait(call, members))
        wait.waiting.append(rank)
        wait.since = min(wait.since, flight.waiting_since)
    for wait in waits.values():
        if wait.call.collective:
            _who_is_absent(wait, flights)
        else:
            _the_other_half(wait, flights)
    return list(waits.values())


def _who_is_absent(wait: Wait, flights: Mapping[int, Flight]) -> None:
    axis, sequence, inside = wait.call.axis, wait.call.sequence, set(wait.waiting)
    others = [rank for rank in wait.members if rank not in inside]
    wait.absent = tuple(
        rank for rank in others if rank not in flights or flights[rank].begun(axis) <= sequence
    )
    wait.passive = tuple(
        rank
        for rank in others
        if rank in flights and flights[rank].completed(axis) <= sequence < flights[rank].begun(axis)
    )


def _the_other_half(wait: Wait, flights: Mapping[int, Flight]) -> None:
    """Look for the message's other end with the peer.

    A peer that made it so long ago that its ring has dropped it counts as one that did not: MPI
    would have delivered it.
    """
    call, (rank,) = wait.call, wait.waiting
    if call.peer >= len(wait.members):
        return
    peer = wait.members[call.peer]
    other = "send" if call.op == "recv" else "recv"
    if peer in flights:
        place = wait.members.index(rank)
        wait.match = flights[peer].find(call.axis, call.sequence, other, place, call.tag)
    wait.members = (rank, peer)
    if wait.match is None:
        wait.absent = (peer,)
    elif wait.match.end is None and (flights[peer].waiting is None or flights[peer].left):
        wait.passive = (peer,)


def cycles(edges: Mapping[int, tuple[int, ...]]) -> list[list[int]]:
    """Sets of ranks that wait for each other, each for all of the others it has an edge to.

    Strongly connected components of more than one node, by Tarjan's algorithm (1972) without
    recursion. Nodes are any numbers.
    """
    order: dict[int, int] = {}
    low: dict[int, int] = {}
    stack: list[int] = []
    held: set[int] = set()
    found: list[list[int]] = []
    for start in edges:
        if start in order:
            continue
        path = [(start, iter(edges[start]))]
        while path:
            node, following = path[-1]
            if node not in order:
                order[node] = low[node] = len(order)
                stack.append(node)
                held.add(node)
            for after in following:
                if after not in order:
                    path.append((after, iter(edges.get(after, ()))))
                    break
                if after in held:
                    low[node] = min(low[node], order[after])
            else:
                path.pop()
                if path:
                    above = path[-1][0]
                    low[above] = min(low[above], low[node])
                if low[node] == order[node]:
                    component = [stack.pop()]
                    while component[-1] != node:
                        component.append(stack.pop())
                    held.difference_update(component)
                    if len(component) > 1:
                        found.append(component)
    return found


def outvoted(waits: Iterable[Wait], ranks: Sequence[int]) -> list[int]:
    """Of ranks that wait for each other those that most calls have in the minority, else all."""
    votes: Counter[int] = Counter()
    for wait in waits:
        absent = set(wait.absent)
        present = set(wait.members) - absent
        if len(absent) != len(present):
            votes.update(min(absent, present, key=len).intersection(ranks))
    most = max(votes.values(), default=0)
    return [rank for rank in ranks if votes[rank] == most]
