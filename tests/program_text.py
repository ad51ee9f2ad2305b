"""Schedules and programs as short texts, for tests."""

from __future__ import annotations

from mpillm.errors import UserError
from mpillm.parallel.instructions import Compute, Instruction, Program, Send, Wait
from mpillm.parallel.programs import lower, validate
from mpillm.parallel.schedules import SCHEDULES, Action, Actions, Kind

LETTERS = {"F": Kind.FORWARD, "B": Kind.BACKWARD, "W": Kind.WEIGHT_GRADIENT}


def parse(*rows: str) -> Actions:
    """Action lists from text: "F0 B0 W0" in chunk 0, "F2.1" the forward of micro 2 in chunk 1."""

    def action(word: str) -> Action:
        micro, _, chunk = word[1:].partition(".")
        return Action(LETTERS[word[0]], int(micro), int(chunk or 0))

    return tuple(tuple(action(word) for word in row.split()) for row in rows)


def spell(program: Program) -> str:
    """A program as text: "F0", and a0 or g0 sent ">", received "<", each waited for "|"."""

    def word(step: Instruction) -> str:
        if isinstance(step, Compute):
            return step.action.kind.value[0].upper() + str(step.action.micro)
        name = step.message.what[0] + str(step.message.micro)
        if isinstance(step, Wait):
            return f"|{name}"
        return f">{name}" if isinstance(step, Send) else f"<{name}"

    return " ".join(word(step) for step in program)


def check(actions: Actions, micros: int, chunks: int = 1, *, only_forward: bool = False) -> None:
    """Lower and validate."""
    programs = lower(actions, chunks)
    validate(programs, ranks=len(actions), micros=micros, chunks=chunks, forward_only=only_forward)


def chunks_of(name: str) -> list[int]:
    """Numbers of chunks, of 1 to 3, that a registered schedule runs."""
    taken = []
    for chunks in (1, 2, 3):
        try:
            SCHEDULES[name](2, 2, chunks)
        except UserError:
            continue
        taken.append(chunks)
    return taken


# Every registered schedule with every number of chunks that it runs.
TRAINING = [(name, chunks) for name in SCHEDULES for chunks in chunks_of(name)]
