"""Programs: a schedule's actions with the messages that they take, and the proof that they run.

`lower` turns the lists of actions into one `Program` a rank, `validate` proves that the programs
run to their end, and one executor obeys them. Nothing here sees an array or a communicator.

A forward hands its outputs to the next stage, a backward the gradients of its inputs to the
previous one. With one rank there are no messages: neighbouring stages stand on the same rank, and
the executor hands over between chunks itself. With more, neighbouring stages never share a rank.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal, NoReturn, TypeAlias

from mpillm.parallel.schedules import Action, Kind

__all__ = [
    "TAG_LIMIT",
    "Compute",
    "Direction",
    "Instruction",
    "Message",
    "Program",
    "Receive",
    "ScheduleError",
    "Send",
    "Wait",
    "What",
    "lower",
    "validate",
]

TAG_LIMIT = 32768  # MPI promises the tags 0 to 32767 (MPI_TAG_UB) and no more

Direction: TypeAlias = Literal["send", "receive"]
What: TypeAlias = Literal["activation", "gradient"]


@dataclass(frozen=True, slots=True)
class Message:
    """What one stage hands to a stage on another rank.

    `source` and `target` are pipeline ranks; `source_chunk` is the chunk of the source that made
    the content, `chunk` the chunk of the target that takes it.
    """

    source: int
    target: int
    tag: int
    what: What
    micro: int
    chunk: int
    source_chunk: int

    def __str__(self) -> str:
        return (
            f"{self.what} of micro-batch {self.micro} from rank {self.source} chunk "
            f"{self.source_chunk} to rank {self.target} chunk {self.chunk} (tag {self.tag})"
        )


@dataclass(frozen=True, slots=True)
class Compute:
    """Run an action; its input has been waited for."""

    action: Action


@dataclass(frozen=True, slots=True)
class Send:
    """Post a non-blocking send."""

    message: Message


@dataclass(frozen=True, slots=True)
class Receive:
    """Post a non-blocking receive."""

    message: Message


@dataclass(frozen=True, slots=True)
class Wait:
    """Complete the posted send or receive of a message; its buffer is free, or filled, after."""

    message: Message
    direction: Direction


Instruction: TypeAlias = Compute | Send | Receive | Wait
Program: TypeAlias = tuple[Instruction, ...]


class ScheduleError(Exception):
    """A program that must not run: which rank, which instruction (from 0), and what is wrong."""

    def __init__(self, rank: int, index: int, problem: str) -> None:
        super().__init__(f"rank {rank}, instruction {index}: {problem}")
        self.rank = rank
        self.index = index


# --- lowering ------------------------------------------------------------------------------------


# The way a kind's result goes along the stages; a weight gradient stays where it is.
_STEP = {Kind.FORWARD: 1, Kind.BACKWARD: -1, Kind.WEIGHT_GRADIENT: 0}


@dataclass(frozen=True, slots=True)
class _Ring:
    """The stages of a pipeline and the routes between them."""

    ranks: int
    chunks: int

    def incoming(self, rank: int, action: Action) -> Message | None:
        """The message that brings an action its input, if one does."""
        stage = action.chunk * self.ranks + rank
        return self._message(action, stage - _STEP[action.kind], stage)

    def outgoing(self, rank: int, action: Action) -> Message | None:
        """The message that takes an action's output on, if one does."""
        stage = action.chunk * self.ranks + rank
        return self._message(action, stage, stage + _STEP[action.kind])

    def _message(self, action: Action, source: int, target: int) -> Message | None:
        """The message from stage to stage; None on one rank, or where there is no such stage.

        A tag tells apart what, chunk and micro-batch; it comes round again after
        `TAG_LIMIT / (2 * chunks)` micro-batches, long after the message is in.
        """
        stages = range(self.ranks * self.chunks)
        if self.ranks == 1 or source == target or source not in stages or target not in stages:
            return None
        source_chunk, source_rank = divmod(source, self.ranks)
        chunk, target_rank = divmod(target, self.ranks)
        what: What = "activation" if action.kind is Kind.FORWARD else "gradient"
        lanes = 2 * self.chunks
        tag = 2 * chunk + (what == "gradient") + lanes * (action.micro % (TAG_LIMIT // lanes))
        return Message(source_rank, target_rank, tag, what, action.micro, chunk, source_chunk)


def _rounds(actions: Sequence[Sequence[Action]], ring: _Ring) -> list[list[int]]:
    """The round in which each action runs when a rank runs one action a round, if its input is in.

    Actions that can never run get a number above all rounds.
    """
    never = sum(len(row) for row in actions)
    rounds = [[never] * len(row) for row in actions]
    position = [0] * len(actions)
    handed: set[Message | None] = {None}  # None stands for "needs no message"
    for now in range(never):
        ready = [
            (rank, row[position[rank]])
            for rank, row in enumerate(actions)
            if position[rank] < len(row) and ring.incoming(rank, row[position[rank]]) in handed
        ]
        if not ready:
            break
        for rank, action in ready:
            rounds[rank][position[rank]] = now
            position[rank] += 1
            handed.add(ring.outgoing(rank, action))
    return rounds


def lower(actions: Sequence[Sequence[Action]], chunks: int) -> tuple[Program, ...]:
    """Add to every rank's actions the messages that they take.

    - The receive of an action is posted before the action ahead of it runs, so that the message
      travels meanwhile, and is waited for just before its own: two receive buffers at most.
    - A send is posted right after its action, and waited for just before a later send of its kind
      to the same rank: the first one by which the receive is posted when all actions take equally
      long. In the usual schedules that is the next one, so one send of a kind is under way.

    The second rule makes deadlock impossible, even where a send moves no data until its receive is
    posted: whatever a rank waits for, the partner posts in an earlier round of one and the same
    execution. Actions that no order can run are lowered all the same; `validate` tells what is
    wrong with them.
    """
    ring = _Ring(len(actions), chunks)
    rounds = _rounds(actions, ring)
    posted: dict[Message, int] = {}  # the round after which each receive is posted
    for rank, row in enumerate(actions):
        for index, action in enumerate(row):
            if (message := ring.incoming(rank, action)) is not None:
                posted[message] = rounds[rank][index - 2] if index >= 2 else -1

    programs = []
    for rank, row in enumerate(actions):
        program: list[Instruction] = []
        under_way: defaultdict[tuple[int, What], deque[Message]] = defaultdict(deque)
        incoming = [ring.incoming(rank, action) for action in row] + [None]
        if incoming[0] is not None:
            program.append(Receive(incoming[0]))
        for index, action in enumerate(row):
            if (ahead := incoming[index + 1]) is not None:
                program.append(Receive(ahead))
            if (message := incoming[index]) is not None:
                program.append(Wait(message, "receive"))
            program.append(Compute(action))
            if (message := ring.outgoing(rank, action)) is not None:
                lane = under_way[message.target, message.what]
                now = rounds[rank][index]
                while lane and posted.get(lane[0], now) < now:
                    program.append(Wait(lane.popleft(), "send"))
                program.append(Send(message))
                lane.append(message)
        program += [Wait(message, "send") for lane in under_way.values() for message in lane]
        programs.append(tuple(program))
    return tuple(programs)


# --- validation ----------------------------------------------------------------------------------


def validate(
    programs: Sequence[Program], *, ranks: int, micros: int, chunks: int, forward_only: bool = False
) -> None:
    """Prove that the programs run to their end and do every action once; ScheduleError if not.

    Found: an action missing, doubled, out of place or before its input; a message lost, sent to
    the wrong rank, under the wrong tag, before it is made or out of order; posts and waits that do
    not pair; two messages under one tag at once; backwards, or weight gradients, of a chunk not in
    ascending micro order; a deadlock. Sends are taken as rendezvous: a wait ends only once the
    partner has posted too, so what passes here hangs under no MPI library, however it buffers.
    """
    if len(programs) != ranks:
        raise ScheduleError(
            min(ranks, len(programs)), 0, f"{len(programs)} programs for {ranks} ranks"
        )
    ring = _Ring(ranks, chunks)
    for rank, program in enumerate(programs):
        _RankCheck(rank, ring, micros, forward_only).run(program)
    _check_pairs(programs)
    _check_progress(programs)


_MAKES: dict[What, Kind] = {"activation": Kind.FORWARD, "gradient": Kind.BACKWARD}


class _RankCheck:
    """Walks one rank's program and holds it to the rules that need no other rank."""

    def __init__(self, rank: int, ring: _Ring, micros: int, forward_only: bool) -> None:
        self._rank, self._ring, self._micros = rank, ring, micros
        self._kinds = [Kind.FORWARD] if forward_only else list(Kind)
        self._index = 0
        self._done: set[Action] = set()
        self._latest: dict[tuple[Kind, int], int] = {}  # micro last run, of each kind and chunk
        self._posted: set[tuple[Direction, What, int, int]] = set()
        self._open: dict[tuple[Direction, int, int, int], Message] = {}
        self._received: set[tuple[What, int, int]] = set()

    def _fail(self, problem: str) -> NoReturn:
        raise ScheduleError(self._rank, self._index, problem)

    def run(self, program: Program) -> None:
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
        kind, micro, chunk = action.kind, action.micro, action.chunk
        within = micro in range(self._micros) and chunk in range(self._ring.chunks)
        if not within or kind not in self._kinds:
            self._fail(f"the {action} is no part of this step")
        if action in self._done:
            self._fail(f"the {action} is doubled")
        self._check_input(action)
        if kind is not Kind.FORWARD:
            before = Kind.FORWARD if kind is Kind.BACKWARD else Kind.BACKWARD
            if Action(before, micro, chunk) not in self._done:
                self._fail(f"the {action} runs before its {before.value}")
            if micro < self._latest.get((kind, chunk), -1):
                self._fail(f"the {action} does not run in ascending micro order")
            self._latest[kind, chunk] = micro
        self._done.add(action)

    def _check_input(self, action: Action) -> None:
        message = self._ring.incoming(self._rank, action)
        if message is not None:
            if (message.what, message.micro, message.chunk) not in self._received:
                self._fail(f"the {action} runs before its input was waited for: the {message}")
        elif self._ring.ranks == 1 and action.kind is not Kind.WEIGHT_GRADIENT:
            maker = replace(action, chunk=action.chunk - _STEP[action.kind])
            if maker.chunk in range(self._ring.chunks) and maker not in self._done:
                self._fail(f"the {action} runs before the {maker}")

    def _post(self, message: Message, direction: Direction) -> None:
        kind = _MAKES[message.what]
        if direction == "send":
            maker = Action(kind, message.micro, message.source_chunk)
            route = self._ring.outgoing(self._rank, maker)
        else:
            route = self._ring.incoming(self._rank, Action(kind, message.micro, message.chunk))
        if route is None:
            self._fail(f"misdirected: nothing calls for the {direction} of {message}")
        if replace(route, tag=message.tag) != message:
            self._fail(f"misdirected: {direction} of {message}, expected {route}")
        if not 0 <= message.tag < TAG_LIMIT:
            self._fail(f"the tag of {message} does not lie in 0 to {TAG_LIMIT - 1}")
        if direction == "send" and maker not in self._done:
            self._fail(f"the send of {message} comes before the {maker}")
        content = (direction, message.what, message.micro, message.chunk)
        if content in self._posted:
            self._fail(f"the {direction} of {message} is doubled")
        lane = (direction, message.source, message.target, message.tag)
        if lane in self._open:
            self._fail(f"the {direction} of {message} shares its tag with {self._open[lane]}")
        self._posted.add(content)
        self._open[lane] = message

    def _wait(self, message: Message, direction: Direction) -> None:
        lane = (direction, message.source, message.target, message.tag)
        if self._open.get(lane) != message:
            self._fail(f"waits for the {direction} of {message}, which is not posted")
        del self._open[lane]
        if direction == "receive":
            self._received.add((message.what, message.micro, message.chunk))


_Post: TypeAlias = tuple[Message, int, int]  # message, rank and index of the instruction


def _posts(programs: Sequence[Program], kind: type[Send | Receive]) -> list[_Post]:
    return [
        (step.message, rank, index)
        for rank, program in enumerate(programs)
        for index, step in enumerate(program)
        if isinstance(step, kind)
    ]


def _check_pairs(programs: Sequence[Program]) -> None:
    """Every receive has its send, under the same tag, and each kind is received as it is sent.

    Every send has its receive by now: the action that takes it stood in its rank's program, after
    its input. MPI pairs the posts of one (source, target, tag) in their order on either side; as
    no rank has two messages under one tag at once, two that crossed would be a deadlock.
    """
    sends, receives = _posts(programs, Send), _posts(programs, Receive)
    sent = {replace(message, tag=0): message for message, _, _ in sends}
    for message, rank, index in receives:
        origin = sent.get(replace(message, tag=0))
        if origin is None:
            raise ScheduleError(rank, index, f"{message} is received but never sent")
        if origin.tag != message.tag:
            raise ScheduleError(rank, index, f"{message} is sent with tag {origin.tag}")

    queues: defaultdict[tuple[int, int, What], deque[Message]] = defaultdict(deque)
    for message, _, _ in sends:
        queues[message.source, message.target, message.what].append(message)
    for message, rank, index in receives:
        first = queues[message.source, message.target, message.what].popleft()
        if first != message:
            raise ScheduleError(rank, index, f"{message} is out of order: {first} is sent first")


def _check_progress(programs: Sequence[Program]) -> None:
    """Run the programs with rendezvous; how far they come does not depend on who goes first."""
    partner = {"send": Receive, "receive": Send}
    posted: set[tuple[type[Instruction], Message]] = set()
    position = [0] * len(programs)
    blocked: dict[int, Wait] = {}
    moving = True
    while moving:
        moving = False
        for rank, program in enumerate(programs):
            blocked.pop(rank, None)
            while position[rank] < len(program):
                step = program[position[rank]]
                if isinstance(step, Wait):
                    if (partner[step.direction], step.message) not in posted:
                        blocked[rank] = step
                        break
                elif not isinstance(step, Compute):
                    posted.add((type(step), step.message))
                position[rank] += 1
                moving = True
    if not blocked:
        return
    # Every blocked rank waits for one other, which is blocked too: the chain ends in a circle.
    chain: list[int] = []
    rank = min(blocked)
    while rank not in chain:
        chain.append(rank)
        message = blocked[rank].message
        rank = message.target if blocked[rank].direction == "send" else message.source
    circle = chain[chain.index(rank) :]
    story = "; ".join(
        f"rank {r}, instruction {position[r]}, waits to {blocked[r].direction} the "
        f"{blocked[r].message}"
        for r in circle
    )
    raise ScheduleError(circle[0], position[circle[0]], f"deadlock: {story}")
