"""What happens, and when, as programs run side by side."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from mpillm.parallel.instructions import Compute, Message, Program, Send, Wait
from mpillm.parallel.schedules import Action

__all__ = ["Span", "Walk", "walk"]


class Span(NamedTuple):
    """An action of a rank, from start to stop, in seconds."""

    action: Action
    start: float
    stop: float


@dataclass
class Walk:
    """What a walk has come to.

    rows: by rank, its actions in order. stuck: by rank, where a rank waits for ever: the number of
    the instruction, and the wait.
    """

    rows: list[list[Span]]
    stuck: dict[int, tuple[int, Wait]] = field(default_factory=dict)


def walk(
    programs: Sequence[Program], seconds: Callable[[int, Action], float], transfer: float = 0.0
) -> Walk:
    """Run the programs against a clock.

    An action takes `seconds(rank, action)`, posts take no time. A message is on its way once its
    send and its receive are both posted (rendezvous), arrives `transfer` seconds later whatever the
    ranks do meanwhile, and until then a wait for either end of it lasts. How far the ranks come
    does not depend on who goes first.
    """
    result = Walk([[] for _ in programs])
    clock = [0.0] * len(programs)
    position = [0] * len(programs)
    sent: dict[Message, float] = {}
    expected: dict[Message, float] = {}
    waiting: defaultdict[Message, list[int]] = defaultdict(list)
    ready = list(range(len(programs)))
    while ready:
        rank = ready.pop()
        program, row, now = programs[rank], result.rows[rank], clock[rank]
        for index in range(position[rank], len(program)):
            step = program[index]
            if isinstance(step, Compute):
                start, now = now, now + seconds(rank, step.action)
                row.append(Span(step.action, start, now))
                continue
            message = step.message
            if isinstance(step, Wait):
                if message not in sent or message not in expected:
                    waiting[message].append(rank)
                    result.stuck[rank] = index, step
                    position[rank] = index
                    break
                now = max(now, sent[message] + transfer, expected[message] + transfer)
            else:
                (sent if isinstance(step, Send) else expected)[message] = now
                if message in waiting:
                    ready += waiting.pop(message)
        else:
            result.stuck.pop(rank, None)
        clock[rank] = now
    return result
