"""Pipeline schedules as data: who computes what, in which order.

A schedule is a pure function `(ranks, micros, chunks)` that gives every pipeline rank its list of
`Action`s; `mpillm.parallel.programs` adds the messages. Nothing here sees an array or MPI.

A rank holds `chunks` stages; the stage of (rank, chunk) is `chunk * ranks + rank`, so the ring of
ranks is walked once a chunk.

A chunk whose `weight_gradient` actions are listed has its backward split: `backward` computes only
the gradients of the inputs. Otherwise `backward` does both.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from enum import Enum
from typing import TypeAlias

from mpillm.errors import UserError

__all__ = [
    "SCHEDULES",
    "Action",
    "Actions",
    "Kind",
    "Schedule",
    "forward_only",
    "gpipe",
    "one_f_one_b",
    "peak_activations",
]


class Kind(Enum):
    """What is computed of one micro-batch in one stage."""

    FORWARD = "forward"
    BACKWARD = "backward"
    WEIGHT_GRADIENT = "weight_gradient"


@dataclass(frozen=True, slots=True)
class Action:
    """One computation of one micro-batch in one of the rank's chunks."""

    kind: Kind
    micro: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value} of micro-batch {self.micro} in chunk {self.chunk}"


Actions: TypeAlias = tuple[tuple[Action, ...], ...]
Schedule: TypeAlias = Callable[[int, int, int], Actions]


def _waves(kind: Kind, ranks: int, micros: int, chunks: int) -> tuple[Action, ...]:
    """Every (micro, chunk) once, in waves of `ranks` micro-batches that walk the ring of stages.

    A wave enters chunk c + 1 of rank 0 just as it leaves chunk c of the last rank, so full waves
    wait for nothing. Backwards walk the chunks downwards; micro-batches ascend in either case.
    """
    ring = range(chunks) if kind is Kind.FORWARD else range(chunks - 1, -1, -1)
    return tuple(
        Action(kind, micro, chunk)
        for first in range(0, micros, ranks)
        for chunk in ring
        for micro in range(first, min(first + ranks, micros))
    )


def forward_only(ranks: int, micros: int, chunks: int) -> Actions:
    """All forwards and nothing else: evaluation and generation."""
    return (_waves(Kind.FORWARD, ranks, micros, chunks),) * ranks


def gpipe(ranks: int, micros: int, chunks: int) -> Actions:
    """All forwards, then all backwards (Huang et al. 2019, "GPipe").

    The backwards run in ascending micro order, as everywhere in this project, so that the sums of
    gradients do not depend on the schedule.
    """
    forwards = _waves(Kind.FORWARD, ranks, micros, chunks)
    return (forwards + _waves(Kind.BACKWARD, ranks, micros, chunks),) * ranks


def one_f_one_b(ranks: int, micros: int, chunks: int) -> Actions:
    """Warm-up forwards, then one forward and one backward in turn, then the other backwards.

    Rank r holds at most `ranks - r` activations, however many micro-batches there are (Narayanan
    et al. 2021, "Memory-Efficient Pipeline-Parallel DNN Training"). UserError for chunks > 1.
    """
    if chunks != 1:
        raise UserError(f"schedule '1f1b' runs one chunk a rank, not {chunks}: expected chunks = 1")
    rows = []
    for rank in range(ranks):
        warm_up = min(ranks - rank - 1, micros)
        row = [Action(Kind.FORWARD, micro) for micro in range(warm_up)]
        for micro in range(micros - warm_up):
            row += [Action(Kind.FORWARD, warm_up + micro), Action(Kind.BACKWARD, micro)]
        row += [Action(Kind.BACKWARD, micro) for micro in range(micros - warm_up, micros)]
        rows.append(tuple(row))
    return tuple(rows)


SCHEDULES: dict[str, Schedule] = {"gpipe": gpipe, "1f1b": one_f_one_b}
"""The training schedules by the name that the settings use."""


def peak_activations(actions: Sequence[Sequence[Action]]) -> list[int]:
    """Per rank, the largest number of forwards whose backward is still to come.

    Forwards without a backward save nothing and do not count; nor does what a weight gradient put
    off keeps after its backward.
    """
    peaks = []
    for row in actions:
        backwards = {(a.micro, a.chunk) for a in row if a.kind is Kind.BACKWARD}
        held = peak = 0
        for action in row:
            if action.kind is Kind.FORWARD and (action.micro, action.chunk) in backwards:
                held += 1
                peak = max(peak, held)
            elif action.kind is Kind.BACKWARD:
                held -= 1
        peaks.append(peak)
    return peaks
