"""The checks that programs must pass, see `mpillm.parallel.programs.validate`."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from itertools import zip_longest
from typing import NoReturn

from mpillm.parallel.instructions import (
    Compute,
    Direction,
    Message,
    Program,
    Receive,
    Ring,
    Send,
    Wait,
    What,
)
from mpillm.parallel.schedules import Action, Kind
from mpillm.parallel.walk import walk

__all__ = ["RankCheck", "ScheduleError", "check_pairs", "check_progress"]


class ScheduleError(Exception):
    """A program that must not run: which rank, which instruction (from 0), and what is wrong."""

    def __init__(self, rank: int, index: int, problem: str) -> None:
        super().__init__(f"rank {rank}, instruction {index}: {problem}")
        self.rank = rank
        self.index = index


class RankCheck:
    """Walks one rank's program and holds it to the rules that need no other rank."""

    def __init__(self, rank: int, ring: Ring, micros: int, forward_only: bool) -> None:
        self._rank, self._ring, self._micros = rank, ring, micros
        self._kinds = [Kind.FORWARD] if forward_only else list(Kind)
        self._index = 0
        self._done: set[Action] = set()
        self._latest: dict[tuple[Kind, int], int] = {}  # micro last run, of each kind and chunk
        self._posted: set[tuple[Direction, Message]] = set()
        self._open: dict[tuple[Direction, int, int, int], Message] = {}
        self._received: set[Message] = set()

    def _fail(self, problem: str) -> NoReturn:
        raise ScheduleError(self._rank, self._index, problem)

    def run(self, program: Program) -> None:
        """Check the whole program; ScheduleError at the first rule that is broken."""
        for self._index, step in enumerate(program):
            if isinstance(step, Compute):
                self._compute(step.action)
            elif isinstance(step, Wait):
                self._wait(step.message, step.direction)
            else:
                self._post(step.message, "send" if isinstance(step, Send) else "receive")
        self._index = len(program)
        for (direction, *_), message in self._open.items():
            self._fail(f"the {direction} of {message} is never waited for")
        for action in self._required():
            if action not in self._done:
                self._fail(f"the {action} is missing")

    def _required(self) -> list[Action]:
        """Every action of the step; weight gradients in the chunks that have any."""
        split = {a.chunk for a in self._done if a.kind is Kind.WEIGHT_GRADIENT}
        return [
            Action(kind, micro, chunk)
            for kind in self._kinds
            for chunk in range(self._ring.chunks)
            if kind is not Kind.WEIGHT_GRADIENT or chunk in split
            for micro in range(self._micros)
        ]

    def _compute(self, action: Action) -> None:
        kind, micro, chunk = action
        within = 0 <= micro < self._micros and 0 <= chunk < self._ring.chunks
        if not within or kind not in self._kinds:
            self._fail(f"the {action} is no part of this step")
        if action in self._done:
            self._fail(f"the {action} is doubled")
        message = self._ring.incoming(self._rank, action)
        if message is not None and message not in self._received:
            self._fail(f"the {action} runs before its input was waited for: the {message}")
        maker = self._ring.before(self._rank, action)
        if maker is not None and maker not in self._done:
            self._fail(f"the {action} runs before the {maker}")
        if kind is not Kind.FORWARD:
            before = Kind.FORWARD if kind is Kind.BACKWARD else Kind.BACKWARD
            if Action(before, micro, chunk) not in self._done:
                self._fail(f"the {action} runs before its {before.value}")
            if micro < self._latest.get((kind, chunk), -1):
                self._fail(f"the {action} does not run in ascending micro order")
            self._latest[kind, chunk] = micro
        self._done.add(action)

    def _post(self, message: Message, direction: Direction) -> None:
        if direction == "send":
            route = self._ring.outgoing(self._rank, message.maker)
        else:
            route = self._ring.incoming(self._rank, message.taker)
        if route is None:
            self._fail(f"misdirected: nothing calls for the {direction} of {message}")
        if route != message:
            self._fail(f"misdirected: {direction} of {message}, expected {route}")
        if direction == "send" and message.maker not in self._done:
            self._fail(f"the send of {message} comes before the {message.maker}")
        if (direction, message) in self._posted:
            self._fail(f"the {direction} of {message} is doubled")
        lane = (direction, message.source, message.target, message.tag)
        if lane in self._open:
            self._fail(f"the {direction} of {message} shares its tag with {self._open[lane]}")
        self._posted.add((direction, message))
        self._open[lane] = message

    def _wait(self, message: Message, direction: Direction) -> None:
        lane = (direction, message.source, message.target, message.tag)
        if self._open.get(lane) != message:
            self._fail(f"waits for the {direction} of {message}, which is not posted")
        del self._open[lane]
        if direction == "receive":
            self._received.add(message)


_Lanes = defaultdict[tuple[int, int, What], list[Message]]


def check_pairs(programs: Sequence[Program]) -> None:
    """Every receive has its send, and each kind is received in the order in which it is sent.

    Every send has its receive by now: the action that takes it stood in its rank's program, after
    its input. MPI pairs the posts of one (source, target, tag) in their order on either side; as
    no rank has two messages under one tag at once, two that crossed would be a deadlock.
    """
    sends = _lanes(programs, Send)
    for lane, messages in _lanes(programs, Receive).items():
        if messages == sends[lane]:
            continue
        pairs = zip_longest(messages, sends[lane])
        message, first = next(pair for pair in pairs if pair[0] != pair[1])
        index = programs[message.target].index(Receive(message))
        if message not in sends[lane]:
            problem = f"{message} is received but never sent"
        else:
            problem = f"{message} is out of order: {first} is sent first"
        raise ScheduleError(message.target, index, problem)


def _lanes(programs: Sequence[Program], kind: type[Send | Receive]) -> _Lanes:
    """The messages of all posts of a kind, by source, target and what, in order."""
    lanes: _Lanes = defaultdict(list)
    for program in programs:
        for step in program:
            if isinstance(step, kind):
                message = step.message
                lanes[message.source, message.target, message.what].append(message)
    return lanes


def check_progress(programs: Sequence[Program]) -> None:
    """Run the programs with rendezvous; they must come to their end."""
    stuck = walk(programs, lambda rank, action: 0.0).stuck
    if not stuck:
        return
    # Every rank that is stuck waits for one other, which is stuck too: the chain ends in a circle.
    chain: list[int] = []
    rank = min(stuck)
    while rank not in chain:
        chain.append(rank)
        _, wait = stuck[rank]
        rank = wait.message.target if wait.direction == "send" else wait.message.source
    circle = [(rank, *stuck[rank]) for rank in chain[chain.index(rank) :]]
    story = "; ".join(
        f"rank {rank}, instruction {index}, waits to {wait.direction} the {wait.message}"
        for rank, index, wait in circle
    )
    raise ScheduleError(*circle[0][:2], f"deadlock: {story}")
