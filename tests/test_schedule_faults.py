"""Planted faults: whatever would go wrong in a run, `validate` finds before anything runs."""

from __future__ import annotations

import itertools
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import pytest
from hypothesis import event, given, settings
from hypothesis import strategies as st
from program_text import TRAINING, check, parse, spell

from mpillm.parallel.instructions import (
    TAG_LIMIT,
    Compute,
    Direction,
    Instruction,
    Message,
    Program,
    Receive,
    Send,
    Wait,
)
from mpillm.parallel.programs import ScheduleError, lower, validate
from mpillm.parallel.schedules import (
    SCHEDULES,
    Actions,
    Kind,
    forward_only,
    gpipe,
    interleaved,
    one_f_one_b,
    zero_bubble,
)

Rows = list[list[Instruction]]


def sent(rows: Rows, rank: int, name: str, chunk: int = 0) -> Message:
    """The message that a rank sends to a chunk, by its name in `spell`."""
    return next(
        step.message
        for step in rows[rank]
        if isinstance(step, Send) and spell((step,))[1:] == name and step.message.chunk == chunk
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
    rename(rows[rank], old, old._replace(**change))


def share_a_tag(rows: Rows) -> None:
    first, second = sent(rows, 0, "a0"), sent(rows, 0, "a1")
    for row in rows:
        rename(row, second, second._replace(tag=first.tag))


def send_again(rows: Rows) -> None:
    again = sent(rows, 0, "a0")
    rows[0] += [Send(again), Wait(again, "send")]


def send_for_nothing(rows: Rows) -> None:
    """The last stage sends an activation on."""
    beyond = Message(2, 0, 999, "activation", 0, 1, 0)
    rows[2] += [Send(beyond), Wait(beyond, "send")]


def to_the_other_chunk(rows: Rows) -> None:
    """The last rank returns the first chunk's activation into the first chunk, not the second."""
    old = sent(rows, 2, "a0", chunk=1)
    rename(rows[2], old, old._replace(chunk=0))


# Name: what is done to 5 micro-batches on 3 ranks, and what the error must say.
Fault = tuple[Callable[[Rows], object], str]

FAULTS_1F1B: dict[str, Fault] = {
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
    "wrong tag": (lambda p: redirect(p, 1, tag=999), "tag 999.*expected .*tag 4"),
    "tag too large": (lambda p: redirect(p, 1, tag=TAG_LIMIT), "tag 32768.*expected .*tag 4"),
    "tag shared": (share_a_tag, "activation of micro-batch 1 .*tag 0.*expected .*tag 2"),
    "receives out of order": (
        lambda p: swap(p[1], Receive(sent(p, 0, "a0")), Receive(sent(p, 0, "a1"))),
        "is out of order",
    ),
    "rank missing": (lambda p: p.pop(), "2 programs for 3 ranks"),
}

FAULTS_ZERO_BUBBLE: dict[str, Fault] = {
    "weight gradient before its backward": (
        lambda p: swap(p[2], act("B4"), act("W4")),
        "rank 2, .*weight_gradient of micro-batch 4 in chunk 0 runs before its backward",
    ),
    "weight gradient missing": (
        lambda p: p[1].remove(act("W2")),
        "rank 1, .*weight_gradient of micro-batch 2 in chunk 0 is missing",
    ),
    "weight gradient doubled": (lambda p: p[1].append(act("W2")), "is doubled"),
    "weight gradients out of order": (
        lambda p: swap(p[2], act("W3"), act("W4")),
        "does not run in ascending micro order",
    ),
    "backward missing": (lambda p: p[0].remove(act("B4")), "runs before its backward"),
    "backward before its forward": (
        lambda p: swap(p[2], act("F1"), act("B1")),
        "runs before its forward",
    ),
    "gradient lost": (
        lambda p: forget(p[2], sent(p, 2, "g1")),
        "rank 1, .* is received but never sent",
    ),
    "gradient sent before it is made": (
        lambda p: swap(p[1], act("B2"), Send(sent(p, 1, "g2"))),
        "comes before the backward",
    ),
}

FAULTS_INTERLEAVED: dict[str, Fault] = {
    "sent to the wrong chunk": (to_the_other_chunk, "rank 2, .*misdirected"),
    "chunks in the wrong order": (
        lambda p: swap(p[0], act("F0"), act("F0.1")),
        "rank 0, .*runs before its input was waited for",
    ),
    "backward of the wrong chunk": (
        lambda p: swap(p[2], act("B0"), act("B0.1")),
        "rank 2, .*runs before its input was waited for",
    ),
    "forward missing in one chunk": (
        lambda p: p[0].remove(act("F3.1")),
        "rank 0, .*comes before the forward of micro-batch 3 in chunk 1",
    ),
    "weight gradient in one chunk, not all of them": (
        lambda p: p[0].insert(1 + p[0].index(act("B0.1")), act("W0.1")),
        "weight_gradient of micro-batch 1 in chunk 1 is missing",
    ),
    "wrapped message lost": (
        lambda p: forget(p[2], sent(p, 2, "a1", chunk=1)),
        "rank 0, .*activation of micro-batch 1 from rank 2 chunk 0 to rank 0 chunk 1 .*never sent",
    ),
}

FAULTS = {
    (of, name): (schedule, chunks, *fault)
    for of, schedule, chunks, faults in (
        ("1f1b", one_f_one_b, 1, FAULTS_1F1B),
        ("zero-bubble", zero_bubble, 1, FAULTS_ZERO_BUBBLE),
        ("interleaved", interleaved, 2, FAULTS_INTERLEAVED),
    )
    for name, fault in faults.items()
}


@pytest.mark.parametrize("name", FAULTS, ids=" ".join)
def test_planted_fault_is_found(name: tuple[str, str]) -> None:
    schedule, chunks, plant, expected = FAULTS[name]
    rows: Rows = [list(program) for program in lower(schedule(3, 5, chunks), chunks)]
    plant(rows)
    with pytest.raises(ScheduleError, match=expected) as caught:
        validate([tuple(row) for row in rows], ranks=3, micros=5, chunks=chunks)
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


# --- damage at random ----------------------------------------------------------------------------
#
# Every instruction is needed, and no two are the same: one that is left out, done twice, or changed
# in any field is a fault, and so is one that is moved before what it depends on. (With one
# exception, which `sound` does not draw: a chunk's only weight gradient may be left out, for then
# its backward is not split.) Two instructions that change places, however, may do no harm. A
# receive may be posted earlier, a send waited for later, a weight gradient put off further, and of
# two actions neither of which waits for the other, even by way of other ranks, either may go first.
# Whether such a program is sound is told by running it, see `outcome`.


@dataclass
class Sound:
    """Programs that are sound."""

    programs: tuple[Program, ...]
    micros: int
    chunks: int
    forward_only: bool = False

    def validate(self, programs: Sequence[Sequence[Instruction]]) -> None:
        validate(
            [tuple(row) for row in programs],
            ranks=len(self.programs),
            micros=self.micros,
            chunks=self.chunks,
            forward_only=self.forward_only,
        )


@st.composite
def sound(draw: st.DrawFn) -> Sound:
    """Any registered schedule, or an evaluation, of any small size."""
    ranks, micros = draw(st.integers(1, 4)), draw(st.integers(2, 6))
    if draw(st.integers(0, 5)) == 0:
        chunks = draw(st.integers(1, 2))
        return Sound(lower(forward_only(ranks, micros, chunks), chunks), micros, chunks, True)
    name, chunks = draw(st.sampled_from(TRAINING))
    return Sound(lower(SCHEDULES[name](ranks, micros, chunks), chunks), micros, chunks)


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
        name = draw(st.sampled_from(sorted(changes)))
        return Compute(action._replace(**{name: changes[name]}))
    if isinstance(step, Wait) and draw(st.booleans()):
        return replace(step, direction="send" if step.direction == "receive" else "receive")
    return replace(step, message=altered_message(step.message, draw))


def altered_message(message: Message, draw: st.DrawFn) -> Message:
    name = draw(st.sampled_from(["source", "target", "tag", "micro", "chunk", "source_chunk"]))
    if draw(st.integers(0, 6)) == 0:
        other = "gradient" if message.what == "activation" else "activation"
        return message._replace(what=other)
    change = draw(st.sampled_from([-1, 1]))
    return message._replace(**{name: getattr(message, name) + change})


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
def damaged(draw: st.DrawFn) -> tuple[Sound, Rows]:
    """Sound programs, and the same with one fault at a place drawn at random."""
    whole = draw(sound())
    rows: Rows = [list(program) for program in whole.programs]
    row = rows[draw(st.integers(0, len(rows) - 1))]
    index = draw(st.integers(0, len(row) - 1))
    step = row[index]
    fault = draw(st.sampled_from(["drop", "double", "alter", "redirect", "lose", "reorder"]))
    later = followers(row, index)
    if fault == "double":
        row.insert(draw(st.integers(0, len(row))), step)
    elif fault == "alter":
        row[index] = altered(step, draw)
    elif fault == "redirect" and not isinstance(step, Compute):
        rename(row, step.message, altered_message(step.message, draw))
    elif fault == "lose" and not isinstance(step, Compute):
        forget(row, step.message)
    elif fault == "reorder" and later:
        row.insert(index, row.pop(draw(st.sampled_from(later))))
    else:
        del row[index]
    return whole, rows


@given(damaged())
@settings(max_examples=400)
def test_any_damage_is_found(case: tuple[Sound, Rows]) -> None:
    whole, rows = case
    whole.validate(whole.programs)
    with pytest.raises(ScheduleError):
        whole.validate(rows)


# --- instructions that change places -------------------------------------------------------------


@dataclass
class Request:
    """One end of a message under way."""

    message: Message
    partner: Request | None = None
    content: Any = None


@dataclass
class Machine:
    """One rank of a machine that does what programs say, whatever comes of it."""

    inbox: dict[tuple[str, int, int], Any] = field(default_factory=dict)
    outbox: dict[tuple[str, int, int], Any] = field(default_factory=dict)
    requests: dict[tuple[Message, Direction], Request] = field(default_factory=dict)
    log: list[tuple[str, int, int, Any]] = field(default_factory=list)
    saved: dict[tuple[str, int, int], Any] = field(default_factory=dict)


class Broken(Exception):
    """The machine cannot go on."""


def outcome(programs: Sequence[Sequence[Instruction]], chunks: int) -> list[Any]:
    """What a run gives: by rank the results of its actions, each kind and chunk in order.

    An action's result is a text that tells which results it was made of. Messages pair up as in
    MPI, by source, target and tag in the order of their posts, and a wait lasts until there is a
    pair. Broken where the run stops or uses what is not there. Written apart from `validate`, and
    knowing nothing of routes or rules.
    """
    ranks = len(programs)
    machines = [Machine() for _ in programs]
    unpaired: defaultdict[tuple[str, int, int, int], list[Request]] = defaultdict(list)
    position = [0] * ranks

    def post(rank: int, message: Message, direction: Direction) -> None:
        request = Request(message)
        source = rank if direction == "send" else message.source
        target = message.target if direction == "send" else rank
        if direction == "send":
            key = message.what, message.micro, message.source_chunk
            request.content = take(machines[rank].outbox, key)
        other = unpaired["receive" if direction == "send" else "send", source, target, message.tag]
        if other:
            request.partner = other.pop(0)
            request.partner.partner = request
        else:
            unpaired[direction, source, target, message.tag].append(request)
        if (message, direction) in machines[rank].requests:
            raise Broken
        machines[rank].requests[message, direction] = request

    def take(box: dict[Any, Any], key: Any) -> Any:
        if key not in box:
            raise Broken
        return box.pop(key)

    def wait(rank: int, message: Message, direction: Direction) -> bool:
        machine = machines[rank]
        if (message, direction) not in machine.requests:
            raise Broken
        partner = machine.requests[message, direction].partner
        if partner is None:
            return False
        del machine.requests[message, direction]
        if direction == "receive":
            machine.inbox[message.what, message.micro, message.chunk] = partner.content
        return True

    def compute(rank: int, kind: str, micro: int, chunk: int) -> None:
        machine, stage = machines[rank], chunk * ranks + rank
        first, last = stage == 0, stage == ranks * chunks - 1
        if kind == "forward":
            given = "in" if first else take(machine.inbox, ("activation", micro, chunk))
            result = machine.saved["backward", micro, chunk] = f"F{micro}.{stage}({given})"
            what, out, step = "activation", not last, 1
        elif kind == "backward":
            given = "d" if last else take(machine.inbox, ("gradient", micro, chunk))
            saved = take(machine.saved, ("backward", micro, chunk))
            result = machine.saved["weight", micro, chunk] = f"B{micro}.{stage}({given}, {saved})"
            what, out, step = "gradient", not first, -1
        else:
            result = f"W({take(machine.saved, ('weight', micro, chunk))})"
            what, out, step = "", False, 0
        machine.log.append((kind, chunk, micro, result))
        if out and ranks == 1:
            machine.inbox[what, micro, chunk + step] = result
        elif out:
            machine.outbox[what, micro, chunk] = result

    def advance(rank: int) -> bool:
        step = programs[rank][position[rank]]
        if isinstance(step, Compute):
            compute(rank, step.action.kind.value, step.action.micro, step.action.chunk)
        elif isinstance(step, Wait):
            if not wait(rank, step.message, step.direction):
                return False
        else:
            post(rank, step.message, "send" if isinstance(step, Send) else "receive")
        position[rank] += 1
        return True

    moving = True
    while moving:
        moving = False
        for rank in range(ranks):
            while position[rank] < len(programs[rank]) and advance(rank):
                moving = True
    if any(position[rank] < len(programs[rank]) for rank in range(ranks)):
        raise Broken
    if any(machine.requests or machine.outbox for machine in machines):
        raise Broken
    # The order of forwards is free, and so is the order between kinds and chunks.
    order = {"forward": lambda entry: entry[2], "backward": None, "weight_gradient": None}
    results = []
    for machine in machines:
        of: dict[tuple[str, int], list[Any]] = {}
        for kind, chunk, micro, result in machine.log:
            of.setdefault((kind, chunk), []).append((kind, chunk, micro, result))
        for (kind, _), entries in of.items():
            if order[kind] is not None:
                entries.sort(key=order[kind])
        results.append(of)
    return results


def verdict(whole: Sound, rows: Rows, expected: list[Any]) -> str:
    """Whether a program is found faulty, and whether it is."""
    try:
        whole.validate(rows)
        found = False
    except ScheduleError:
        found = True
    try:
        faulty = outcome(rows, whole.chunks) != expected
    except Broken:
        faulty = True
    return f"{'faulty' if faulty else 'harmless'}, {'found' if found else 'passed'}"


@pytest.mark.parametrize(
    ("name", "ranks", "micros", "chunks"),
    [
        ("gpipe", 2, 3, 1),
        ("gpipe", 2, 2, 2),
        ("1f1b", 3, 3, 1),
        ("interleaved", 2, 2, 2),
        ("zero-bubble", 3, 3, 1),
        ("zero-bubble", 1, 3, 1),
    ],
)
def test_of_all_swaps_the_harmful_ones_are_found(
    name: str, ranks: int, micros: int, chunks: int
) -> None:
    programs = lower(SCHEDULES[name](ranks, micros, chunks), chunks)
    whole = Sound(programs, micros, chunks)
    expected = outcome(programs, chunks)
    verdicts: defaultdict[str, int] = defaultdict(int)
    for rank, program in enumerate(programs):
        for i, j in itertools.combinations(range(len(program)), 2):
            rows: Rows = [list(row) for row in programs]
            rows[rank][i], rows[rank][j] = rows[rank][j], rows[rank][i]
            verdicts[verdict(whole, rows, expected)] += 1
    assert verdicts["faulty, passed"] == 0
    assert verdicts["faulty, found"] > 0 and verdicts["harmless, passed"] > 0
    # Refused for no need are only receives that are not posted in the order of the sends.
    assert verdicts["harmless, found"] <= verdicts["harmless, passed"]


@st.composite
def shuffled(draw: st.DrawFn) -> tuple[Sound, Rows]:
    """Sound programs, and the same with some instructions moved."""
    whole = draw(sound())
    rows: Rows = [list(program) for program in whole.programs]
    for _ in range(draw(st.integers(1, 3))):
        row = rows[draw(st.integers(0, len(rows) - 1))]
        index = draw(st.integers(0, len(row) - 1))
        step = row.pop(index)
        row.insert(max(0, index + draw(st.integers(-4, 4))), step)
    return whole, rows


@given(shuffled())
@settings(max_examples=250)
def test_of_all_moves_the_harmful_ones_are_found(case: tuple[Sound, Rows]) -> None:
    whole, rows = case
    result = verdict(whole, rows, outcome(whole.programs, whole.chunks))
    event(result)
    assert result != "faulty, passed"
