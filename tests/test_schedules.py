"""Pipeline schedules: the lists, their lowering, and every kind of fault found before it runs."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import replace
from typing import Any, get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm.errors import UserError
from mpillm.parallel import programs
from mpillm.parallel.programs import (
    TAG_LIMIT,
    Compute,
    Instruction,
    Message,
    Program,
    Receive,
    ScheduleError,
    Send,
    Wait,
    lower,
    validate,
)
from mpillm.parallel.schedules import (
    SCHEDULES,
    Action,
    Actions,
    Kind,
    Schedule,
    forward_only,
    gpipe,
    one_f_one_b,
    peak_activations,
)
from mpillm.parallel.settings import ParallelSettings

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
    programs = lower(actions, chunks)
    validate(programs, ranks=len(actions), micros=micros, chunks=chunks, forward_only=only_forward)


# --- the schedules and their lowering ------------------------------------------------------------


@pytest.mark.parametrize("ranks", range(1, 9))
@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b, forward_only])
def test_every_size_lowers_and_validates(schedule: Schedule, ranks: int) -> None:
    for micros in range(1, 13):
        actions = schedule(ranks, micros, 1)
        check(actions, micros, only_forward=schedule is forward_only)


@pytest.mark.parametrize("schedule", [gpipe, forward_only])
@pytest.mark.parametrize("ranks", [1, 2, 3])
def test_several_chunks_lower_and_validate(schedule: Schedule, ranks: int) -> None:
    for micros in range(1, 8):
        for chunks in (2, 3):
            actions = schedule(ranks, micros, chunks)
            check(actions, micros, chunks, only_forward=schedule is forward_only)


def test_peak_activations() -> None:
    for ranks in range(1, 9):
        for micros in range(1, 13):
            expected = [min(ranks - rank, micros) for rank in range(ranks)]
            assert peak_activations(one_f_one_b(ranks, micros, 1)) == expected
            assert peak_activations(gpipe(ranks, micros, 1)) == [micros] * ranks
            assert peak_activations(forward_only(ranks, micros, 1)) == [0] * ranks
    assert peak_activations(gpipe(2, 3, 2)) == [6, 6]


def test_the_settings_offer_the_registered_schedules() -> None:
    assert set(get_args(get_type_hints(ParallelSettings)["schedule"])) == set(SCHEDULES)


def test_1f1b_refuses_chunks() -> None:
    with pytest.raises(UserError, match="one chunk a rank, not 2"):
        one_f_one_b(2, 4, 2)


def test_gpipe_by_hand() -> None:
    actions = gpipe(2, 3, 1)
    assert actions == parse("F0 F1 F2 B0 B1 B2", "F0 F1 F2 B0 B1 B2")
    assert [spell(program) for program in lower(actions, 1)] == [
        "F0 >a0 F1 |a0 >a1 <g0 F2 |a1 >a2 <g1 |g0 B0 <g2 |g1 B1 |g2 B2 |a2",
        "<a0 <a1 |a0 F0 <a2 |a1 F1 |a2 F2 B0 >g0 B1 |g0 >g1 B2 |g1 >g2 |g2",
    ]


def test_1f1b_by_hand() -> None:
    actions = one_f_one_b(2, 3, 1)
    assert actions == parse("F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2")
    assert [spell(program) for program in lower(actions, 1)] == [
        "F0 >a0 <g0 F1 |a0 >a1 |g0 B0 <g1 F2 |a1 >a2 <g2 |g1 B1 |g2 B2 |a2",
        "<a0 |a0 F0 <a1 B0 >g0 |a1 F1 <a2 B1 |g0 >g1 |a2 F2 B2 |g1 >g2 |g2",
    ]


def test_one_rank_needs_no_message() -> None:
    (program,) = lower(gpipe(1, 3, 2), 2)
    assert all(isinstance(step, Compute) for step in program)


def most_under_way(program: Program, kind: type[Send | Receive]) -> int:
    """The most messages of one kind and peer between their post and their wait."""
    direction = "send" if kind is Send else "receive"
    under_way: Counter[tuple[int, int, str]] = Counter()
    most = 0
    for step in program:
        if isinstance(step, kind):
            lane = (step.message.source, step.message.target, step.message.what)
            under_way[lane] += 1
            most = max(most, under_way[lane])
        elif isinstance(step, Wait) and step.direction == direction:
            under_way[step.message.source, step.message.target, step.message.what] -= 1
    return most


@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b, forward_only])
def test_few_buffers(schedule: Schedule) -> None:
    for program in lower(schedule(4, 12, 1), 1):
        assert most_under_way(program, Send) <= 1
        assert most_under_way(program, Receive) <= 2


@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b])
def test_tags_come_round_within_the_limit(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(programs, "TAG_LIMIT", 8)
    actions = schedule(3, 21, 1)
    tags = {s.message.tag for p in lower(actions, 1) for s in p if isinstance(s, Send)}
    assert tags == set(range(8))
    check(actions, 21)
    monkeypatch.setattr(programs, "TAG_LIMIT", 2)  # every activation has the same tag
    with pytest.raises(ScheduleError, match="shares its tag"):
        check(actions, 21)


INTERLEAVED = parse(
    "F0 F1 F0.1 F1.1 F2 B0.1 F3 B1.1 F2.1 B0 F3.1 B1 B2.1 B3.1 B2 B3",
    "F0 F1 F0.1 B0.1 F1.1 B1.1 F2 B0 F3 B1 F2.1 B2.1 F3.1 B3.1 B2 B3",
)
ZERO_BUBBLE = parse(
    "F0 F1 B0 W0 F2 B1 W1 F3 B2 W2 B3 W3",
    "F0 B0 F1 B1 W0 F2 B2 W1 F3 B3 W2 W3",
)
INTERLEAVED_ZERO_BUBBLE = parse(
    "F0 F1 F0.1 F1.1 B0.1 W0.1 B1.1 B0 W0 B1 W1 W1.1",
    "F0 F1 F0.1 B0.1 F1.1 B1.1 W0.1 B0 W0 B1 W1.1 W1",
)


def test_the_types_carry_virtual_stages_and_split_backwards() -> None:
    check(INTERLEAVED, 4, 2)
    check(ZERO_BUBBLE, 4)
    check(INTERLEAVED_ZERO_BUBBLE, 2, 2)
    assert peak_activations(INTERLEAVED) == [5, 3]
    assert peak_activations(ZERO_BUBBLE) == [2, 1]
    wrapped = lower(INTERLEAVED, 2)[1]
    message = next(s.message for s in wrapped if isinstance(s, Send) and s.message.chunk == 1)
    assert (message.source, message.target, message.source_chunk) == (1, 0, 0)


@given(
    ranks=st.integers(1, 4),
    micros=st.integers(1, 6),
    chunks=st.integers(1, 3),
    split=st.booleans(),
    by_wave=st.booleans(),
    rng=st.randoms(use_true_random=False),
)
@settings(max_examples=60, deadline=None)
def test_any_schedule_that_can_run_does(
    ranks: int, micros: int, chunks: int, split: bool, by_wave: bool, rng: random.Random
) -> None:
    """Forwards and backwards interleave at random, as far as their inputs allow."""
    width = ranks if by_wave else micros

    def ordered(kind: Kind, ring: Sequence[int]) -> list[Action]:
        waves = [range(first, min(first + width, micros)) for first in range(0, micros, width)]
        return [Action(kind, micro, c) for wave in waves for c in ring for micro in wave]

    forwards = ordered(Kind.FORWARD, range(chunks))
    backwards = ordered(Kind.BACKWARD, range(chunks)[::-1])
    queues = [[list(forwards), list(backwards)] for _ in range(ranks)]
    rows: list[list[Action]] = [[] for _ in range(ranks)]
    done: set[tuple[Kind, int, int]] = set()
    last = ranks * chunks - 1

    def ready(action: Action, stage: int) -> bool:
        if action.kind is Kind.FORWARD:
            return stage == 0 or (action.kind, action.micro, stage - 1) in done
        above = stage == last or (action.kind, action.micro, stage + 1) in done
        return above and (Kind.FORWARD, action.micro, stage) in done

    while any(queue for pair in queues for queue in pair):
        choices = [
            (rank, queue)
            for rank, pair in enumerate(queues)
            for queue in pair
            if queue and ready(queue[0], queue[0].chunk * ranks + rank)
        ]
        rank, queue = rng.choice(choices)
        action = queue.pop(0)
        rows[rank].append(action)
        done.add((action.kind, action.micro, action.chunk * ranks + rank))
        if split and action.kind is Kind.BACKWARD:
            rows[rank].append(replace(action, kind=Kind.WEIGHT_GRADIENT))
    check(tuple(tuple(row) for row in rows), micros, chunks)


# --- planted faults ------------------------------------------------------------------------------

Rows = list[list[Instruction]]


def sent(rows: Rows, rank: int, name: str) -> Message:
    """The message that a rank sends, by its name in `spell`."""
    return next(
        step.message for step in rows[rank] if isinstance(step, Send) and spell((step,))[1:] == name
    )


def act(word: str) -> Compute:
    return Compute(parse(word)[0][0])


def swap(row: list[Instruction], a: Instruction, b: Instruction) -> None:
    i, j = row.index(a), row.index(b)
    row[i], row[j] = row[j], row[i]


def rename(row: list[Instruction], old: Message, new: Message) -> None:
    """Another message in place of `old` in every instruction of a rank."""
    row[:] = [
        replace(step, message=new)
        if not isinstance(step, Compute) and step.message == old
        else step
        for step in row
    ]


def forget(row: list[Instruction], lost: Message) -> None:
    row[:] = [step for step in row if isinstance(step, Compute) or step.message != lost]


def redirect(rows: Rows, rank: int, **change: Any) -> None:
    """On one side, give the message a2 from rank 1 to rank 2 another envelope."""
    old = sent(rows, 1, "a2")
    rename(rows[rank], old, replace(old, **change))


def share_a_tag(rows: Rows) -> None:
    first, second = sent(rows, 0, "a0"), sent(rows, 0, "a1")
    for row in rows:
        rename(row, second, replace(second, tag=first.tag))


def send_again(rows: Rows) -> None:
    again = sent(rows, 0, "a0")
    rows[0] += [Send(again), Wait(again, "send")]


def send_for_nothing(rows: Rows) -> None:
    """The last stage sends an activation on."""
    beyond = Message(2, 0, 999, "activation", 0, 1, 0)
    rows[2] += [Send(beyond), Wait(beyond, "send")]


# Name: what is done to 1F1B on 3 ranks with 5 micro-batches, and what the error must say.
FAULTS: dict[str, tuple[Callable[[Rows], object], str]] = {
    "backward missing": (lambda p: p[0].remove(act("B4")), "backward of micro-batch 4 .* missing"),
    "backward missing, sent on": (lambda p: p[2].remove(act("B4")), "comes before the backward"),
    "action doubled": (lambda p: p[0].append(act("B4")), "is doubled"),
    "action of no micro-batch": (lambda p: p[0].append(act("F5")), "no part of this step"),
    "action of no chunk": (lambda p: p[0].append(act("F1.1")), "no part of this step"),
    "backward before its forward": (
        lambda p: swap(p[2], act("F0"), act("B0")),
        "backward of micro-batch 0 in chunk 0 runs before its forward",
    ),
    "input not waited for": (
        lambda p: swap(p[1], Wait(sent(p, 0, "a1"), "receive"), act("F1")),
        "runs before its input was waited for",
    ),
    "send before its compute": (
        lambda p: swap(p[0], act("F0"), Send(sent(p, 0, "a0"))),
        "comes before the forward",
    ),
    "send not posted": (lambda p: p[0].remove(Send(sent(p, 0, "a3"))), "which is not posted"),
    "receive not posted": (lambda p: p[1].remove(Receive(sent(p, 0, "a3"))), "which is not posted"),
    "wait before its post": (
        lambda p: swap(p[1], Receive(sent(p, 0, "a0")), Wait(sent(p, 0, "a0"), "receive")),
        "which is not posted",
    ),
    "waited for twice": (
        lambda p: p[0].append(Wait(sent(p, 0, "a3"), "send")),
        "which is not posted",
    ),
    "never waited for": (
        lambda p: p[0].remove(Wait(sent(p, 0, "a3"), "send")),
        "never waited for",
    ),
    "message lost by its source": (
        lambda p: forget(p[0], sent(p, 0, "a3")),
        "rank 1, .* is received but never sent",
    ),
    "message lost by its target": (
        lambda p: forget(p[1], sent(p, 0, "a3")),
        "rank 1, .* before its input was waited for: the activation of micro-batch 3 from rank 0",
    ),
    "message sent twice": (send_again, "is doubled"),
    "message from the last stage": (send_for_nothing, "misdirected: nothing calls for"),
    "sent to the wrong rank": (lambda p: redirect(p, 1, target=0), "rank 1, .* misdirected"),
    "sent to no rank": (lambda p: redirect(p, 1, target=3), "rank 1, .* misdirected"),
    "sent to the wrong chunk": (lambda p: redirect(p, 1, chunk=1), "rank 1, .* misdirected"),
    "received from the wrong rank": (lambda p: redirect(p, 2, source=0), "rank 2, .* misdirected"),
    "wrong tag": (lambda p: redirect(p, 1, tag=999), "is sent with tag 999"),
    "tag too large": (lambda p: redirect(p, 1, tag=TAG_LIMIT), "does not lie in 0 to 32767"),
    "tag shared": (share_a_tag, "shares its tag"),
    "receives out of order": (
        lambda p: swap(p[1], Receive(sent(p, 0, "a0")), Receive(sent(p, 0, "a1"))),
        "is out of order",
    ),
    "rank missing": (lambda p: p.pop(), "2 programs for 3 ranks"),
}


@pytest.mark.parametrize("name", FAULTS)
def test_planted_fault_is_found(name: str) -> None:
    plant, expected = FAULTS[name]
    rows: Rows = [list(program) for program in lower(one_f_one_b(3, 5, 1), 1)]
    plant(rows)
    with pytest.raises(ScheduleError, match=expected) as caught:
        validate([tuple(row) for row in rows], ranks=3, micros=5, chunks=1)
    error = caught.value
    assert str(error).startswith(f"rank {error.rank}, instruction {error.index}: ")


@pytest.mark.parametrize(
    ("actions", "chunks", "expected"),
    [
        (parse("F0 F1 B1 B0", "F0 F1 B1 B0"), 1, "ascending micro order"),
        (parse("F0 F1 B0 B1 W1 W0"), 1, "ascending micro order"),
        (parse("F0 F1 B0 W0 B1"), 1, "weight_gradient of micro-batch 1 .* is missing"),
        (parse("F0 F1 B0 W0 W1 B1"), 1, "runs before its backward"),
        (parse("F0.1 F0 F1 F1.1"), 2, "runs before the forward of micro-batch 0 in chunk 0"),
        (parse("F0 F0.1 F1 F1.1 B0 B0.1"), 2, "runs before the backward .* in chunk 1"),
        (parse("F0 F1 B0 B1", "F1 F0 B0 B1"), 1, "rank 1, .* is out of order"),
        (parse("F0 F1 B0 B1", "F0 B0"), 1, "rank 1, .*forward of micro-batch 1 .* is missing"),
        (parse("F0 B0 F1 B1", "F0 F1 B0 B1"), 1, "deadlock"),
    ],
)
def test_faulty_lists_are_found_after_lowering(
    actions: Actions, chunks: int, expected: str
) -> None:
    with pytest.raises(ScheduleError, match=expected):
        check(actions, 2, chunks)


def test_a_backward_has_no_place_in_an_evaluation() -> None:
    with pytest.raises(ScheduleError, match="no part of this step"):
        check(gpipe(2, 2, 1), 2, only_forward=True)


def test_blocking_1f1b_deadlocks() -> None:
    """Send and Recv that return when done, as in a first attempt: every rank sends to the other."""
    programs = []
    for program in lower(one_f_one_b(2, 4, 1), 1):
        row: list[Instruction] = []
        for step in program:
            if isinstance(step, Wait) and step.direction == "receive":
                row += [Receive(step.message), step]
            elif isinstance(step, Send):
                row += [step, Wait(step.message, "send")]
            elif isinstance(step, Compute):
                row.append(step)
        programs.append(tuple(row))
    with pytest.raises(ScheduleError, match="deadlock") as caught:
        validate(programs, ranks=2, micros=4, chunks=1)
    story = str(caught.value)
    assert "waits to send the activation of micro-batch 1 from rank 0" in story
    assert "waits to send the gradient of micro-batch 0 from rank 1" in story


SOUND = [
    (gpipe(3, 4, 1), 4, 1),
    (one_f_one_b(3, 4, 1), 4, 1),
    (INTERLEAVED, 4, 2),
    (ZERO_BUBBLE, 4, 1),
]


def altered(step: Instruction, draw: st.DrawFn) -> Instruction:
    """The instruction with one field changed."""
    if isinstance(step, Compute):
        action = step.action
        kind = draw(st.sampled_from([kind for kind in Kind if kind is not action.kind]))
        up = draw(st.sampled_from([-1, 1]))
        changes: dict[str, Any] = {
            "kind": kind,
            "micro": action.micro + up,
            "chunk": action.chunk + up,
        }
        field = draw(st.sampled_from(sorted(changes)))
        return Compute(replace(action, **{field: changes[field]}))
    if isinstance(step, Wait) and draw(st.booleans()):
        return replace(step, direction="send" if step.direction == "receive" else "receive")
    return replace(step, message=altered_message(step.message, draw))


def altered_message(message: Message, draw: st.DrawFn) -> Message:
    field = draw(st.sampled_from(["source", "target", "tag", "micro", "chunk", "source_chunk"]))
    if draw(st.integers(0, 6)) == 0:
        return replace(message, what="gradient" if message.what == "activation" else "activation")
    change = draw(st.sampled_from([-1, 1]))
    return replace(message, **{field: getattr(message, field) + change})


def followers(row: list[Instruction], index: int) -> list[int]:
    """Where the waits for a post stand, and the later actions on the same micro-batch."""
    step = row[index]
    if isinstance(step, Wait):
        return []
    return [
        place
        for place, later in enumerate(row)
        if place > index
        and (
            isinstance(later, Compute)
            and (later.action.micro, later.action.chunk) == (step.action.micro, step.action.chunk)
            if isinstance(step, Compute)
            else isinstance(later, Wait) and later.message == step.message
        )
    ]


@st.composite
def damaged(draw: st.DrawFn) -> tuple[list[Program], int, int]:
    """Sound programs with one fault at a place drawn at random; micros; chunks."""
    actions, micros, chunks = draw(st.sampled_from(SOUND))
    rows: Rows = [list(program) for program in lower(actions, chunks)]
    row = rows[draw(st.integers(0, len(rows) - 1))]
    index = draw(st.integers(0, len(row) - 1))
    step = row[index]
    fault = draw(st.sampled_from(["drop", "double", "alter", "rename", "lose", "reorder"]))
    later = followers(row, index)
    if fault == "double":
        row.insert(draw(st.integers(0, len(row))), step)
    elif fault == "alter":
        row[index] = altered(step, draw)
    elif fault == "rename" and not isinstance(step, Compute):
        rename(row, step.message, altered_message(step.message, draw))
    elif fault == "lose" and not isinstance(step, Compute):
        forget(row, step.message)
    elif fault == "reorder" and later:
        row.insert(index, row.pop(draw(st.sampled_from(later))))
    else:
        del row[index]
    return [tuple(row) for row in rows], micros, chunks


@given(damaged())
@settings(max_examples=400, deadline=None)
def test_any_damage_is_found(case: tuple[list[Program], int, int]) -> None:
    programs, micros, chunks = case
    with pytest.raises(ScheduleError):
        validate(programs, ranks=len(programs), micros=micros, chunks=chunks)
