"""Pipeline schedules as data: who computes what, in which order.

A schedule is a pure function `(ranks, micros, chunks)` that gives every pipeline rank its list of
`Action`s; `mpillm.parallel.programs` adds the messages. Nothing here sees an array or MPI.

A rank holds `chunks` stages; the stage of (rank, chunk) is `chunk * ranks + rank`, so the ring of
ranks is walked once a chunk.

A chunk whose `weight_gradient` actions are listed has its backward split: `backward` computes only
the gradients of the inputs. Otherwise `backward` does both. In every schedule the backwards of a
chunk, and its weight gradients, run in ascending micro order, so that the sums of gradients do not
depend on the schedule.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from enum import Enum
from typing import NamedTuple, TypeAlias

from mpillm.errors import UserError
from mpillm.parallel.shard import split_range

__all__ = [
    "SCHEDULES",
    "Action",
    "Actions",
    "Kind",
    "Schedule",
    "forward_only",
    "gpipe",
    "interleaved",
    "one_f_one_b",
    "peak_activations",
    "zero_bubble",
]


class Kind(Enum):
    """What is computed of one micro-batch in one stage."""

    FORWARD = "forward"
    BACKWARD = "backward"
    WEIGHT_GRADIENT = "weight_gradient"

    # Members are single objects. Enum hashes their names, in Python, which shows in large programs.
    __hash__ = object.__hash__


class Action(NamedTuple):
    """One computation of one micro-batch in one of the rank's chunks."""

    kind: Kind
    micro: int
    chunk: int = 0

    def __str__(self) -> str:
        return f"{self.kind.value} of micro-batch {self.micro} in chunk {self.chunk}"


Actions: TypeAlias = tuple[tuple[Action, ...], ...]
Schedule: TypeAlias = Callable[[int, int, int], Actions]


# --- schedules -----------------------------------------------------------------------------------


def forward_only(ranks: int, micros: int, chunks: int) -> Actions:
    """All forwards and nothing else: evaluation and generation."""
    return (_walks(Kind.FORWARD, ranks, micros, chunks),) * ranks


def gpipe(ranks: int, micros: int, chunks: int) -> Actions:
    """All forwards, then all backwards (Huang et al. 2019, "GPipe")."""
    forwards = _walks(Kind.FORWARD, ranks, micros, chunks)
    return (forwards + _walks(Kind.BACKWARD, ranks, micros, chunks),) * ranks


def one_f_one_b(ranks: int, micros: int, chunks: int) -> Actions:
    """Warm-up forwards, then one forward and one backward in turn, then the other backwards.

    Rank r holds at most `ranks - r` activations, however many micro-batches there are (Narayanan
    et al. 2021, "Memory-Efficient Pipeline-Parallel DNN Training"). UserError for chunks > 1.
    """
    _expect_one_chunk("1f1b", chunks)
    forwards = _walks(Kind.FORWARD, ranks, micros, 1)
    backwards = _walks(Kind.BACKWARD, ranks, micros, 1)
    return tuple(_in_turn(forwards, backwards, ranks - rank - 1) for rank in range(ranks))


def interleaved(ranks: int, micros: int, chunks: int) -> Actions:
    """1F1B over several chunks a rank, which divides its bubble by their number.

    Narayanan et al. 2021, "Efficient Large-Scale Language Model Training on GPU Clusters Using
    Megatron-LM", section 2.2.2: groups of micro-batches walk the chunks in turn, and rank r warms
    up with 2 (ranks - r - 1) + (chunks - 1) g forwards, where g is the size of a group. There a
    group is as large as there are ranks, and the number of micro-batches a multiple of that. Here
    any number will do: it is dealt out to groups of at least that size, see `_groups`, and no group
    waits for itself. A larger group holds more activations, though: chunks - 1 for each of its
    micro-batches above `ranks`. UserError for chunks = 1.
    """
    if chunks == 1:
        raise UserError(
            "parallel.schedule = 'interleaved' with parallel.chunks = 1 is '1f1b'; "
            "set parallel.chunks >= 2"
        )
    forwards = _walks(Kind.FORWARD, ranks, micros, chunks)
    backwards = _walks(Kind.BACKWARD, ranks, micros, chunks)
    ahead = (chunks - 1) * len(_groups(ranks, micros)[0])
    return tuple(
        _in_turn(forwards, backwards, 2 * (ranks - rank - 1) + ahead) for rank in range(ranks)
    )


def zero_bubble(ranks: int, micros: int, chunks: int) -> Actions:
    """1F1B with the weight gradients put off into what were bubbles.

    ZB-H1 of Qi et al. 2023, "Zero Bubble Pipeline Parallelism", section 2.1: the forwards and
    backwards of 1F1B, where rank r computes a weight gradient r micro-batches late. Every rank
    holds at most `ranks` activations, as the first one does in 1F1B. UserError for chunks > 1.
    """
    _expect_one_chunk("zero-bubble", chunks)
    rows = []
    for rank, row in enumerate(one_f_one_b(ranks, micros, 1)):
        actions: list[Action] = []
        for action in row:
            actions.append(action)
            if action.kind is Kind.BACKWARD and action.micro >= rank:
                actions.append(Action(Kind.WEIGHT_GRADIENT, action.micro - rank))
        left = range(max(0, micros - rank), micros)
        rows.append((*actions, *(Action(Kind.WEIGHT_GRADIENT, micro) for micro in left)))
    return tuple(rows)


SCHEDULES: dict[str, Schedule] = {
    "gpipe": gpipe,
    "1f1b": one_f_one_b,
    "interleaved": interleaved,
    "zero-bubble": zero_bubble,
}
"""The training schedules by the name that the settings use."""


# --- what they are made of -----------------------------------------------------------------------


def _groups(ranks: int, micros: int) -> list[range]:
    """Micro-batches in even groups, none smaller than `ranks` where there are as many; at least 1.

    The forwards of a group in one chunk take as long as one micro-batch needs round the ring, or
    longer: so the group enters its next chunk without waiting for itself.
    """
    count = max(1, micros // ranks)
    return [range(*split_range(micros, count, index)) for index in range(count)]


def _walks(kind: Kind, ranks: int, micros: int, chunks: int) -> tuple[Action, ...]:
    """Every (micro, chunk) once: each group walks the chunks, backwards from the last to the first.

    Micro-batches ascend in either case.
    """
    ring = range(chunks) if kind is Kind.FORWARD else range(chunks - 1, -1, -1)
    groups = _groups(ranks, micros) if chunks > 1 else [range(micros)]
    return tuple(
        Action(kind, micro, chunk) for group in groups for chunk in ring for micro in group
    )


def _in_turn(
    forwards: tuple[Action, ...], backwards: tuple[Action, ...], warm_up: int
) -> tuple[Action, ...]:
    """`warm_up` forwards, then one forward and one backward in turn, then the other backwards."""
    steady = len(forwards) - min(warm_up, len(forwards))
    pairs = zip(forwards[warm_up:], backwards[:steady], strict=True)
    middle = (action for pair in pairs for action in pair)
    return (*forwards[:warm_up], *middle, *backwards[steady:])


def _expect_one_chunk(name: str, chunks: int) -> None:
    if chunks != 1:
        raise UserError(
            f"parallel.schedule = '{name}' runs one chunk a rank, and parallel.chunks = {chunks}; "
            "set parallel.chunks = 1, or parallel.schedule = 'interleaved'"
        )


# --- what they cost ------------------------------------------------------------------------------


def peak_activations(actions: Sequence[Sequence[Action]]) -> list[int]:
    """Per rank, the most activations of a (micro-batch, chunk) that are held at once.

    Held from the forward until the last action that needs them: the weight gradient where the
    backward is split, else the backward. Forwards without a backward save nothing.
    """
    peaks = []
    for row in actions:
        last = {(a.micro, a.chunk): a.kind for a in row}
        held = peak = 0
        for action in row:
            ends = last[action.micro, action.chunk]
            if action.kind is Kind.FORWARD and ends is not Kind.FORWARD:
                held += 1
                peak = max(peak, held)
            elif action.kind is ends and ends is not Kind.FORWARD:
                held -= 1
        peaks.append(peak)
    return peaks
