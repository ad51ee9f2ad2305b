"""Why a job stands still: which ranks are at fault, in which call, and who waits for them.

A pure function of the ranks' flights. From the ranks that wait it follows who waits for whom to the
ranks that wait for nobody, to ranks that wait for each other, and to groups whose members made
different calls.
"""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence

from mpillm.parallel.findings import ORDER, Diagnosis, Finding, Kind
from mpillm.parallel.flight import Flight
from mpillm.parallel.unlike import Departure, astray, first_difference
from mpillm.parallel.waiting import Places, Wait, cycles, outvoted, waits_of
from mpillm.parallel.wording import Wording, name_ranks

__all__ = ["SILENCE", "Diagnosis", "Finding", "diagnose"]

SILENCE = 2.5
"""Seconds without a heartbeat, of which there is one a second, after which a rank may be dead."""

_NAMED = 3  # culprits of one finding that get a sentence each
_HISTORIES = 64  # ranks whose steps are compared with each other, at most


def diagnose(
    flights: Mapping[int, Flight],
    now: float | None = None,
    timeout: float = 600.0,
    slow_timeout: float = 3600.0,
    processes: Mapping[int, str] | None = None,
) -> Diagnosis:
    """Find out why ranks wait.

    flights: by rank, at least one; ranks without are missing. now: seconds since the epoch, by
    default the clock's; of a dead job, its last sign of life. timeout: seconds without progress
    that are a hang; slow_timeout: the same for a rank in an activity. processes: what is known of
    the processes of silent ranks, in words.
    """
    moment = time.time() if now is None else now
    return _Case(flights, moment, timeout, slow_timeout, processes or {}).diagnose()


class _Case:
    """The flights and what is found in them."""

    def __init__(
        self,
        flights: Mapping[int, Flight],
        now: float,
        timeout: float,
        slow_timeout: float,
        processes: Mapping[int, str],
    ) -> None:
        self._flights = flights
        self._size = next(iter(flights.values())).size
        self._now = now
        self._timeout = timeout
        self._slow_timeout = slow_timeout
        self._silent = {
            rank: processes.get(rank, "stopped, killed, or its node is lost")
            for rank, flight in flights.items()
            if self._is_silent(flight)
        }
        places = self._places = Places(flights)
        self._words = Wording(flights, places, self._silent, now)
        self._waits = sorted(waits_of(flights, places), key=lambda wait: wait.since)
        for wait in self._waits:
            if not wait.pending and not set(wait.waiting) <= self._silent.keys():
                # All have made it. One that stands still in it may hold up the others.
                wait.passive = tuple(rank for rank in wait.members if rank in self._silent)
        # The call in which others have waited for a rank longest; one that the rank never made
        # tells more than one that it has begun.
        self._wanted: dict[int, Wait] = {}
        for missed in (True, False):
            for wait in self._waits:
                for rank in wait.pending if bool(wait.absent) == missed else ():
                    self._wanted.setdefault(rank, wait)
        self._departed: dict[int, Departure] = {}
        self._findings: list[Finding] = []

    def diagnose(self) -> Diagnosis:
        explained = self._mismatches()
        self._deadlocks(explained)
        self._roots()
        self._stuck(explained)
        self._findings.sort(
            key=lambda found: (found.due > self._now, ORDER.index(found.kind), found.axis is None)
        )
        texts = [finding.text for finding in self._findings]
        waiting = dict.fromkeys(rank for wait in self._waits for rank in wait.waiting)
        return Diagnosis(
            tuple(self._findings),
            (*texts, *self._words.waiting(self._waits)),
            self._now,
            tuple(waiting),
        )

    # -- groups whose members made different calls -----------------------------------------------

    def _mismatches(self) -> set[int]:
        """Returns the members of such groups: why they wait is explained."""
        explained: set[int] = set()
        seen: set[tuple[object, ...]] = set()
        for wait in [*self._waits, *self._under_way()]:
            if not wait.call.collective:
                if wait.match is not None and wait.match.bytes != wait.call.bytes:
                    self._unequal_message(wait)
                    explained.update(wait.members)
            elif (wait.call.axis, wait.members) not in seen:
                seen.add((wait.call.axis, wait.members))
                found = first_difference(self._flights, wait)
                if found is not None:
                    self._unequal_calls(wait, *found)
                    explained.update(wait.members)
        return explained

    def _under_way(self) -> Iterator[Wait]:
        """The collectives that are not complete, as waits: MPI may fail where nobody is blocked."""
        for rank, flight in self._flights.items():
            for call in flight.under_way():
                if call.collective and call != flight.waiting:
                    members = self._places.members(call.axis, rank)
                    yield Wait(call, members, [rank], call.begin)

    def _unequal_calls(
        self, wait: Wait, sequence: int, calls: dict[tuple[str, int, int], list[int]]
    ) -> None:
        sides = sorted(calls.items(), key=lambda side: -len(side[1]))
        most = len(sides[0][1])
        everyone = [rank for _, ranks in sides for rank in ranks]
        fewer = [rank for _, ranks in sides for rank in ranks if len(ranks) < most]
        culprits = self._astray(fewer or everyone, among=everyone)
        others = set(everyone) - set(culprits)
        made = "; ".join(
            f"{name_ranks(ranks)} made {op} of {nbytes:,} bytes"
            + (f" from root {root}" if op == "broadcast" else "")
            for (op, nbytes, root), ranks in sides
        )
        which = f"#{sequence + 1} over {self._words.group(wait)}"
        text = (
            f"{name_ranks(culprits)} made another call {which} than {name_ranks(others)}: {made}"
            if others
            else f"{name_ranks(culprits)} made different calls {which}: {made}"
        )
        op = next(op for (op, _, _), ranks in sides if culprits[0] in ranks)
        self._add("mismatch", culprits, text, wait, op=op, sequence=sequence)

    def _unequal_message(self, wait: Wait) -> None:
        rank, peer = wait.members
        assert wait.match is not None
        text = (
            f"ranks {rank} and {peer} disagree about a message: rank {rank} made "
            f"{self._words.call(rank, wait.call, size=True)}, and rank {peer} its {wait.match.op} "
            f"of {wait.match.bytes:,} bytes"
        )
        self._add("mismatch", self._astray([rank, peer], among=[rank, peer]), text, wait)

    # -- ranks that wait for each other ----------------------------------------------------------

    def _deadlocks(self, explained: set[int]) -> None:
        # A call is a node, too, with a number below 0: a thousand ranks that wait for a thousand
        # others in one call then make two thousand edges.
        edges: dict[int, tuple[int, ...]] = {}
        for number, wait in enumerate(self._waits, start=1):
            edges[-number] = wait.pending
            edges.update({rank: (-number,) for rank in wait.waiting if rank not in self._silent})
        for component in cycles(edges):
            ranks = sorted(node for node in component if node >= 0)
            if explained.intersection(ranks):
                continue
            waits = [self._waits[-node - 1] for node in component if node < 0]
            culprits = self._astray(outvoted(waits, ranks), among=ranks)
            text = f"{name_ranks(ranks)} wait for each other: "
            text += "; ".join(
                self._words.blame(rank, self._wanted.get(rank)) for rank in culprits[:_NAMED]
            )
            if len(culprits) > _NAMED:
                text += f"; and so for {name_ranks(culprits[_NAMED:])}"
            self._add("deadlock", culprits, text, self._wanted.get(culprits[0]))

    def _astray(self, ranks: Sequence[int], *, among: Sequence[int]) -> list[int]:
        """Of ranks under suspicion those that depart from what they did before, else all."""
        if len(among) <= _HISTORIES:
            self._departed.update(astray({r: self._flights.get(r) for r in among}))
        return [rank for rank in ranks if rank in self._departed] or list(ranks)

    # -- ranks that wait for nobody --------------------------------------------------------------

    def _roots(self) -> None:
        """Those that others wait for, or that stand still for too long."""
        alike: dict[tuple[Kind, int], list[int]] = {}
        for rank in range(self._size):
            kind, wait = self._kind(rank), self._wanted.get(rank)
            if kind is None or (wait is None and not self._stands_still(rank, kind)):
                continue
            alike.setdefault((kind, id(wait)), []).append(rank)
        for (kind, _), ranks in alike.items():
            wait = self._wanted.get(ranks[0])
            for rank in ranks[:_NAMED]:
                text = self._words.blame(rank, wait)
                self._add(kind, [rank], text, wait, due=self._excused(rank))
            rest = ranks[_NAMED:]
            if rest:
                text = f"and so for {name_ranks(rest)}"
                self._add(kind, rest, text, wait, due=max(map(self._excused, rest)))

    def _kind(self, rank: int) -> Kind | None:
        """What a rank that waits for nobody is; None for one that waits."""
        flight = self._flights.get(rank)
        if flight is None:
            return "missing"
        if flight.left:
            return "ended"
        if rank in self._silent:
            return "silent"
        if flight.waiting is not None:
            return None
        return "activity" if flight.activity else "outside"

    def _stands_still(self, rank: int, kind: Kind) -> bool:
        """Whether a rank that nobody waits for is worth telling."""
        return kind not in ("ended", "missing") and self._excused(rank) <= self._now

    def _excused(self, rank: int) -> float:
        """Until when a rank that waits for nobody may be slow."""
        flight = self._flights.get(rank)
        if flight is None or flight.left:
            return 0.0
        if rank in self._silent:
            return (flight.heartbeat or 0.0) + self._timeout
        patience = flight.activity.since + self._slow_timeout if flight.activity else 0.0
        return max(patience, flight.progress + self._timeout)

    def _is_silent(self, flight: Flight) -> bool:
        limit = max(SILENCE, min(self._timeout, 4 * SILENCE))
        beaten = flight.heartbeat is not None and not flight.left
        return beaten and self._now - (flight.heartbeat or 0.0) > limit

    # -- calls that all have made, and that do not end -------------------------------------------

    def _stuck(self, explained: set[int]) -> None:
        for wait in self._waits:
            ranks = wait.waiting
            if wait.pending or explained.intersection(ranks) or set(ranks) <= self._silent.keys():
                continue
            text = f"{name_ranks(ranks)} wait in {self._words.call(ranks[0], wait.call)}, "
            if wait.call.collective:
                text += "which every rank of the group has made: MPI or the network does not end it"
            else:
                text += "whose other half was made: MPI or the network has not delivered it"
            # One that has only just come together is given time.
            youngest = max(self._flights[rank].waiting_since for rank in ranks)
            self._add("stuck", ranks, text, wait, due=youngest + 2 * SILENCE)

    def _add(
        self,
        kind: Kind,
        ranks: Iterable[int],
        text: str,
        wait: Wait | None,
        *,
        op: str | None = None,
        sequence: int | None = None,
        due: float = 0.0,
    ) -> None:
        """Note a finding; it is due when somebody has waited long enough, too."""
        ranks = tuple(ranks)
        for rank in ranks[:_NAMED]:
            if rank in self._departed and kind in ("mismatch", "deadlock"):
                text += f"; {self._words.departed(rank, self._departed[rank])}"
        if wait is None:
            self._findings.append(Finding(kind, ranks, text, due))
            return
        call, due = wait.call, max(due, wait.since + self._timeout)
        number = call.sequence if sequence is None else sequence
        self._findings.append(Finding(kind, ranks, text, due, call.axis, op or call.op, number))
