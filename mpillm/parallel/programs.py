"""Programs: a schedule's actions with the messages that they take, and the proof that they run.

`lower` turns the lists of actions into one `Program` a rank, `validate` proves that the programs
run to their end, and one executor obeys them. Nothing here sees an array or a communicator.

A forward hands its outputs to the next stage, a backward the gradients of its inputs to the
previous one; see `mpillm.parallel.instructions.Ring` for who that is.
"""

from __future__ import annotations

from collections import defaultdict, deque
from collections.abc import Sequence

from mpillm.parallel.checks import RankCheck, ScheduleError, check_pairs, check_progress
from mpillm.parallel.instructions import (
    Compute,
    Instruction,
    Message,
    Program,
    Receive,
    Ring,
    Send,
    Wait,
    What,
)
from mpillm.parallel.schedules import Action, Kind

__all__ = ["Program", "ScheduleError", "lower", "turns_at_once", "validate"]

_Routes = list[list["Message | None"]]  # by rank and action

_UNDER_WAY = 2  # sends of a kind to a rank, where no rule keeps more of them


def lower(actions: Sequence[Sequence[Action]], chunks: int) -> tuple[Program, ...]:
    """Add to every rank's actions the messages that they take.

    - The receive of an action is posted before the action ahead of it runs, so that the message
      travels meanwhile, and is waited for just before its own: two receive buffers at most.
    - A send is posted right after its action, and waited for just before the next send but one of
      its kind to the same rank: a message may travel for the time of an action, and the next one
      be under way, before a rank that sends ahead of its time is held up.
    - That wait comes later still where the receive is not posted in an earlier round, when all
      actions take equally long.

    The last rule makes deadlock impossible, even where a send moves no data until its receive is
    posted: whatever a rank waits for, the partner posts in an earlier round of one and the same
    execution. Actions that no order can run are lowered all the same; `validate` tells what is
    wrong with them.
    """
    ring = Ring(len(actions), chunks)
    incoming: _Routes = [[ring.incoming(r, a) for a in row] for r, row in enumerate(actions)]
    outgoing: _Routes = [[ring.outgoing(r, a) for a in row] for r, row in enumerate(actions)]
    rounds = _rounds(incoming, outgoing)
    posted = {  # the round after which each receive is posted
        message: rounds[rank][index - 2] if index >= 2 else -1
        for rank, row in enumerate(incoming)
        for index, message in enumerate(row)
        if message is not None
    }
    return tuple(
        _lower_rank(*lists, posted)
        for lists in zip(actions, incoming, outgoing, rounds, strict=True)
    )


def _lower_rank(
    row: Sequence[Action],
    incoming: Sequence[Message | None],
    outgoing: Sequence[Message | None],
    rounds: Sequence[int],
    posted: dict[Message, int],
) -> Program:
    """One rank's program, from its actions with their messages and rounds."""
    program: list[Instruction] = []
    under_way: defaultdict[tuple[int, What], deque[Message]] = defaultdict(deque)
    if row and incoming[0] is not None:
        program.append(Receive(incoming[0]))
    for action, mine, ahead, message, now in zip(
        row, incoming, [*incoming[1:], None], outgoing, rounds, strict=True
    ):
        if ahead is not None:
            program.append(Receive(ahead))
        if mine is not None:
            program.append(Wait(mine, "receive"))
        program.append(Compute(action))
        if message is not None:
            lane = under_way[message.target, message.what]
            while len(lane) >= _UNDER_WAY and posted.get(lane[0], now) < now:
                program.append(Wait(lane.popleft(), "send"))
            program.append(Send(message))
            lane.append(message)
    program += [Wait(message, "send") for lane in under_way.values() for message in lane]
    return tuple(program)


def _rounds(incoming: _Routes, outgoing: _Routes) -> list[list[int]]:
    """The round in which each action runs when a rank runs one action a round, if its input is in.

    Actions that can never run get a number above all rounds.
    """
    never = sum(len(row) for row in incoming)
    rounds: list[list[int]] = [[] for _ in incoming]
    made: dict[Message, int] = {}  # the round in which the content of a message is made
    waiting: dict[Message, int] = {}
    ready = list(range(len(incoming)))
    while ready:
        rank = ready.pop()
        mine = rounds[rank]
        now = mine[-1] + 1 if mine else 0
        for index in range(len(mine), len(incoming[rank])):
            message = incoming[rank][index]
            if message is not None:
                if message not in made:
                    waiting[message] = rank
                    break
                now = max(now, made[message] + 1)
            mine.append(now)
            result = outgoing[rank][index]
            if result is not None:
                made[result] = now
                if result in waiting:
                    ready.append(waiting.pop(result))
            now += 1
    return [
        mine + [never] * (len(row) - len(mine)) for mine, row in zip(rounds, incoming, strict=True)
    ]


def validate(
    programs: Sequence[Program], *, ranks: int, micros: int, chunks: int, forward_only: bool = False
) -> None:
    """Prove that the programs run to their end and do every action once; ScheduleError if not.

    Found: an action missing, doubled, out of place or before its input; a message lost, sent to
    the wrong rank, under the wrong tag, before it is made or out of order; posts and waits that do
    not pair; two messages under one tag at once; backwards, or weight gradients, of a chunk not in
    ascending micro order; a weight gradient missing in a chunk that has any; a deadlock. Sends are
    taken as rendezvous: a wait ends only once the partner has posted too, so what passes here hangs
    under no MPI library, however it buffers.
    """
    if len(programs) != ranks:
        raise ScheduleError(
            min(ranks, len(programs)), 0, f"{len(programs)} programs for {ranks} ranks"
        )
    ring = Ring(ranks, chunks)
    for rank, program in enumerate(programs):
        RankCheck(rank, ring, micros, forward_only).run(program)
    check_pairs(programs)
    check_progress(programs)


def turns_at_once(program: Program, chunk: int, *, weights: bool) -> bool:
    """Whether a rank goes from every forward pass of a chunk right over to its backward pass.

    weights: its weight gradient, where that is an action of its own, must follow at once, too.
    """
    actions = [step.action for step in program if isinstance(step, Compute)]
    apart = Kind.WEIGHT_GRADIENT in {a.kind for a in actions if a.chunk == chunk}
    expected = [Kind.BACKWARD, Kind.WEIGHT_GRADIENT] if weights and apart else [Kind.BACKWARD]
    return all(
        [Action(kind, action.micro, chunk) for kind in expected]
        == actions[place + 1 : place + 1 + len(expected)]
        for place, action in enumerate(actions)
        if action.kind is Kind.FORWARD and action.chunk == chunk
    )
