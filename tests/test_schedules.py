"""Pipeline schedules: the lists, what they hold at most, and their lowering."""

from __future__ import annotations

import random
import time
from collections import Counter
from collections.abc import Sequence
from typing import get_args, get_type_hints

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from program_text import TRAINING, check, parse, spell

from mpillm.errors import UserError
from mpillm.parallel import instructions
from mpillm.parallel.instructions import Compute, Program, Receive, Send, Wait
from mpillm.parallel.programs import ScheduleError, lower, turns_at_once, validate
from mpillm.parallel.schedules import (
    SCHEDULES,
    Action,
    Kind,
    Schedule,
    forward_only,
    gpipe,
    interleaved,
    one_f_one_b,
    peak_activations,
    zero_bubble,
)
from mpillm.parallel.settings import ParallelSettings

EVERY = pytest.mark.parametrize(("name", "chunks"), TRAINING)


# --- the schedules -------------------------------------------------------------------------------


@pytest.mark.parametrize("ranks", [1, 2, 3, 4, 5, 8])
@EVERY
def test_every_size_lowers_and_validates(name: str, chunks: int, ranks: int) -> None:
    for micros in (*range(1, 9), 11, 17):
        check(SCHEDULES[name](ranks, micros, chunks), micros, chunks)


@pytest.mark.parametrize("ranks", [1, 2, 3, 5])
@pytest.mark.parametrize("chunks", [1, 2, 3])
def test_evaluation_lowers_and_validates(chunks: int, ranks: int) -> None:
    for micros in range(1, 12):
        check(forward_only(ranks, micros, chunks), micros, chunks, only_forward=True)


def test_the_settings_offer_the_registered_schedules() -> None:
    assert set(get_args(get_type_hints(ParallelSettings)["schedule"])) == set(SCHEDULES)


def test_what_runs_several_chunks() -> None:
    taken = {name: [chunks for of, chunks in TRAINING if of == name] for name in SCHEDULES}
    assert taken == {"gpipe": [1, 2, 3], "1f1b": [1], "interleaved": [2, 3], "zero-bubble": [1]}
    for name, chunks, line in (
        ("1f1b", 2, "'1f1b' runs one chunk a rank, and parallel.chunks = 2; set parallel.chunks"),
        ("zero-bubble", 3, "'zero-bubble' runs one chunk a rank, and parallel.chunks = 3; set "),
        ("interleaved", 1, "with parallel.chunks = 1 is '1f1b'; set parallel.chunks >= 2$"),
        ("gpipe", 16385, r"parallel.chunks = 16385: .* set parallel.chunks <= 16384$"),
    ):
        with pytest.raises(UserError, match=line):
            lower(SCHEDULES[name](2, 4, chunks), chunks)


def test_gpipe_by_hand() -> None:
    actions = gpipe(2, 3, 1)
    assert actions == parse("F0 F1 F2 B0 B1 B2", "F0 F1 F2 B0 B1 B2")
    assert [spell(program) for program in lower(actions, 1)] == [
        "F0 >a0 F1 >a1 <g0 F2 |a0 >a2 <g1 |g0 B0 <g2 |g1 B1 |g2 B2 |a1 |a2",
        "<a0 <a1 |a0 F0 <a2 |a1 F1 |a2 F2 B0 >g0 B1 >g1 B2 |g0 >g2 |g1 |g2",
    ]


def test_1f1b_by_hand() -> None:
    actions = one_f_one_b(2, 3, 1)
    assert actions == parse("F0 F1 B0 F2 B1 B2", "F0 B0 F1 B1 F2 B2")
    assert [spell(program) for program in lower(actions, 1)] == [
        "F0 >a0 <g0 F1 >a1 |g0 B0 <g1 F2 |a0 >a2 <g2 |g1 B1 |g2 B2 |a1 |a2",
        "<a0 |a0 F0 <a1 B0 >g0 |a1 F1 <a2 B1 >g1 |a2 F2 B2 |g0 >g2 |g1 |g2",
    ]


def test_interleaved_by_hand() -> None:
    """On 2 ranks with 4 micro-batches Megatron's order; 5 are a group of 3 and one of 2."""
    assert interleaved(2, 4, 2) == parse(
        "F0 F1 F0.1 F1.1 F2 B0.1 F3 B1.1 F2.1 B0 F3.1 B1 B2.1 B3.1 B2 B3",
        "F0 F1 F0.1 B0.1 F1.1 B1.1 F2 B0 F3 B1 F2.1 B2.1 F3.1 B3.1 B2 B3",
    )
    first, second = interleaved(2, 5, 2)
    assert first[:7] == parse("F0 F1 F2 F0.1 F1.1 F2.1 B0.1")[0]
    assert second[:6] == parse("F0 F1 F2 F0.1 B0.1 F1.1")[0]
    assert second[-4:] == parse("B3.1 B4.1 B3 B4")[0]


def test_zero_bubble_by_hand() -> None:
    assert zero_bubble(3, 4, 1) == parse(
        "F0 F1 F2 B0 W0 F3 B1 W1 B2 W2 B3 W3",
        "F0 F1 B0 F2 B1 W0 F3 B2 W1 B3 W2 W3",
        "F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3",
    )
    assert zero_bubble(3, 1, 1) == parse("F0 B0 W0", "F0 B0 W0", "F0 B0 W0")


@pytest.mark.parametrize("ranks", range(1, 9))
def test_zero_bubble_is_1f1b_and_weight_gradients(ranks: int) -> None:
    for micros in range(1, 13):
        for row, plain in zip(
            zero_bubble(ranks, micros, 1), one_f_one_b(ranks, micros, 1), strict=True
        ):
            assert [a for a in row if a.kind is not Kind.WEIGHT_GRADIENT] == list(plain)


def test_peak_activations() -> None:
    for ranks in range(1, 9):
        for micros in range(1, 13):
            # Narayanan et al. 2021; Qi et al. 2023: nowhere more than 1F1B's first rank.
            expected = [min(ranks - rank, micros) for rank in range(ranks)]
            assert peak_activations(one_f_one_b(ranks, micros, 1)) == expected
            assert peak_activations(zero_bubble(ranks, micros, 1)) == [min(ranks, micros)] * ranks
            assert peak_activations(gpipe(ranks, micros, 1)) == [micros] * ranks
            assert peak_activations(gpipe(ranks, micros, 3)) == [3 * micros] * ranks
            assert peak_activations(forward_only(ranks, micros, 1)) == [0] * ranks


@pytest.mark.parametrize("chunks", [2, 3, 4])
def test_peak_activations_of_interleaved(chunks: int) -> None:
    """Warm-up and one more; with groups of `ranks` as in Korthikanti et al. 2022, 4.2.3."""
    for ranks in range(1, 7):
        for micros in range(1, 20):
            group = -(-micros // max(1, micros // ranks))
            most = [2 * (ranks - rank - 1) + (chunks - 1) * group + 1 for rank in range(ranks)]
            expected = [min(peak, chunks * micros) for peak in most]
            actions = interleaved(ranks, micros, chunks)
            assert peak_activations(actions) == expected
            if micros % ranks == 0 and micros > ranks:
                # The paper: 1 + (p - 1) / (p v) times the p v that 1F1B would hold.
                assert expected[0] == ranks * chunks + ranks - 1


def test_an_activation_is_held_until_its_weight_gradient() -> None:
    assert peak_activations(parse("F0 B0 F1 W0 B1 W1", "F0 B0 W0 F1 B1 W1")) == [2, 1]
    # Chunk 1 alone has its backward split.
    assert peak_activations(parse("F0 F0.1 B0.1 B0 F1 W0.1 F1.1 B1.1 W1.1 B1")) == [2]


# --- lowering ------------------------------------------------------------------------------------


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


@pytest.mark.parametrize(
    ("schedule", "chunks"),
    [(gpipe, 1), (one_f_one_b, 1), (zero_bubble, 1), (forward_only, 1), (forward_only, 2)],
)
def test_few_buffers(schedule: Schedule, chunks: int) -> None:
    for program in lower(schedule(4, 12, chunks), chunks):
        assert most_under_way(program, Send) <= 2
        assert most_under_way(program, Receive) <= 2


def test_the_wrapped_message_of_a_virtual_stage() -> None:
    last = lower(interleaved(2, 4, 2), 2)[1]
    message = next(s.message for s in last if isinstance(s, Send) and s.message.chunk == 1)
    assert (message.source, message.target, message.source_chunk) == (1, 0, 0)
    assert message.maker == parse("F0")[0][0] and message.taker == parse("F0.1")[0][0]


@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b, zero_bubble])
def test_tags_come_round_within_the_limit(
    schedule: Schedule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(instructions, "TAG_LIMIT", 8)
    actions = schedule(3, 21, 1)
    tags = {s.message.tag for p in lower(actions, 1) for s in p if isinstance(s, Send)}
    assert tags == set(range(8))
    check(actions, 21)
    monkeypatch.setattr(instructions, "TAG_LIMIT", 2)  # every activation has the same tag
    with pytest.raises(ScheduleError, match="shares its tag"):
        check(actions, 21)


def test_large_pipelines_are_lowered_and_validated_quickly() -> None:
    """Every rank does this as training starts; 0.3 s on the machine this was written on."""
    actions = one_f_one_b(32, 256, 1)
    begin = time.process_time()
    programs = lower(actions, 1)
    validate(programs, ranks=32, micros=256, chunks=1)
    assert time.process_time() - begin < 2.0


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
    weights = ordered(Kind.WEIGHT_GRADIENT, range(chunks)[::-1]) if split else []
    queues = [[list(forwards), list(backwards), list(weights)] for _ in range(ranks)]
    rows: list[list[Action]] = [[] for _ in range(ranks)]
    done: set[tuple[Kind, int, int]] = set()
    last = ranks * chunks - 1

    def ready(action: Action, stage: int) -> bool:
        if action.kind is Kind.FORWARD:
            return stage == 0 or (action.kind, action.micro, stage - 1) in done
        if action.kind is Kind.WEIGHT_GRADIENT:
            return (Kind.BACKWARD, action.micro, stage) in done
        above = stage == last or (action.kind, action.micro, stage + 1) in done
        return above and (Kind.FORWARD, action.micro, stage) in done

    while any(queue for three in queues for queue in three):
        choices = [
            (rank, queue)
            for rank, three in enumerate(queues)
            for queue in three
            if queue and ready(queue[0], queue[0].chunk * ranks + rank)
        ]
        rank, queue = rng.choice(choices)
        action = queue.pop(0)
        rows[rank].append(action)
        done.add((action.kind, action.micro, action.chunk * ranks + rank))
    check(tuple(tuple(row) for row in rows), micros, chunks)


@pytest.mark.parametrize(
    ("name", "ranks", "micros", "chunks", "backward", "all_of_it"),
    [
        ("gpipe", 1, 1, 1, True, True),
        ("gpipe", 2, 4, 1, False, False),
        ("1f1b", 1, 3, 1, True, True),
        ("1f1b", 4, 8, 1, True, True),
        ("interleaved", 2, 4, 2, True, True),
        ("zero-bubble", 1, 3, 1, True, True),
        ("zero-bubble", 4, 8, 1, True, False),  # weight gradients are put off
    ],
)
def test_which_last_stages_turn_at_once(
    name: str, ranks: int, micros: int, chunks: int, backward: bool, all_of_it: bool
) -> None:
    program = lower(SCHEDULES[name](ranks, micros, chunks), chunks)[-1]
    assert turns_at_once(program, chunks - 1, weights=False) == backward
    assert turns_at_once(program, chunks - 1, weights=True) == all_of_it


def test_a_first_stage_of_several_does_not_turn_at_once() -> None:
    program = lower(SCHEDULES["1f1b"](2, 4, 1), 1)[0]
    assert not turns_at_once(program, 0, weights=False)
