"""Schedules against the clock: the papers' bubbles, and timelines by hand."""

from __future__ import annotations

import itertools

import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from program_text import TRAINING, parse

from mpillm.parallel.instructions import Send
from mpillm.parallel.programs import ScheduleError, lower
from mpillm.parallel.schedules import (
    SCHEDULES,
    Kind,
    forward_only,
    gpipe,
    interleaved,
    one_f_one_b,
    peak_activations,
    zero_bubble,
)
from mpillm.parallel.simulate import Costs, Span, Timeline, bubble_fraction, simulate

# Seconds of forward, backward and weight gradient.
TIMES = [(1.0, 1.0, 1.0), (1.0, 2.0, 0.5), (3.0, 1.25, 1.0), (0.7, 0.9, 0.6)]
RANKS = [1, 2, 3, 4, 6]


def bubble(name: str, ranks: int, micros: int, chunks: int, times: tuple[float, ...]) -> float:
    """The simulated bubble where all stages are alike."""
    costs = Costs.even(ranks * chunks, *times)
    return simulate(SCHEDULES[name](ranks, micros, chunks), costs).bubble


# --- the papers' formulas ------------------------------------------------------------------------


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("name", ["gpipe", "1f1b"])
def test_gpipe_and_1f1b(name: str, times: tuple[float, ...]) -> None:
    """(p - 1) / (m + p - 1), for any number of micro-batches and any times."""
    for p, m in itertools.product(RANKS, [1, 2, 3, 5, 8, 13]):
        expected = (p - 1) / (m + p - 1)
        assert bubble(name, p, m, 1, times) == pytest.approx(expected, abs=1e-12)
        assert bubble_fraction(name, p, m, 1, *times) == pytest.approx(expected, abs=1e-12)


@pytest.mark.parametrize("times", TIMES)
@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize("name", ["interleaved", "gpipe"])
def test_several_chunks(name: str, chunks: int, times: tuple[float, ...]) -> None:
    """(p - 1) / (v m + p - 1), for multiples of p and for all other m >= p."""
    for p in RANKS:
        for m in (p, p + 1, 2 * p - 1, 2 * p, 2 * p + 1, 3 * p):
            if m < p:
                continue
            expected = (p - 1) / (chunks * m + p - 1)
            assert bubble(name, p, m, chunks, times) == pytest.approx(expected, abs=1e-12)
            assert bubble_fraction(name, p, m, chunks, *times) == pytest.approx(expected)


@pytest.mark.parametrize("name", ["interleaved", "gpipe"])
def test_fewer_micro_batches_than_ranks(name: str) -> None:
    """The last one goes through p v stages after m - 1 others: p v + m - 1 forwards, backwards."""
    for p, v in itertools.product([2, 4, 6], [2, 3]):
        for m in range(1, p):
            expected = 1 - v * m / (p * v + m - 1)
            for times in TIMES:
                assert bubble(name, p, m, v, times) == pytest.approx(expected, abs=1e-12)
                assert bubble_fraction(name, p, m, v, *times) == pytest.approx(expected)


@pytest.mark.parametrize("times", TIMES)
def test_zero_bubble(times: tuple[float, ...]) -> None:
    """Every rank idles for (p - 1) (F + B - W) if m >= p and W <= F, B (Qi et al. 2023, 2.3)."""
    f, b, w = times
    for p in RANKS:
        for m in (p, p + 1, 2 * p, 3 * p + 1):
            timeline = simulate(zero_bubble(p, m, 1), Costs.even(p, *times))
            idle = (p - 1) * (f + b - w)
            assert timeline.idle == pytest.approx([idle] * p, abs=1e-9)
            expected = idle / (m * (f + b + w) + idle)
            assert timeline.bubble == pytest.approx(expected, abs=1e-12)
            assert bubble_fraction("zero-bubble", p, m, 1, *times) == pytest.approx(expected)


def test_zero_bubble_leaves_a_third_of_the_bubble_of_1f1b() -> None:
    """Where all three take equally long (Qi et al. 2023, section 2.1)."""
    for p, m in ((2, 4), (4, 8), (6, 7)):
        idle = [
            simulate(schedule(p, m, 1), Costs.even(p, 1.0, 1.0, 1.0)).idle[0]
            for schedule in (zero_bubble, one_f_one_b)
        ]
        assert idle == pytest.approx([p - 1, 3 * (p - 1)])


@given(
    p=st.integers(1, 6),
    m=st.integers(1, 14),
    times=st.tuples(*[st.floats(0.1, 4.0)] * 3),
)
def test_zero_bubble_outside_of_the_papers_range(
    p: int, m: int, times: tuple[float, float, float]
) -> None:
    """Fewer micro-batches than ranks, or weight gradients that take longer than the rest."""
    expected = bubble_fraction("zero-bubble", p, m, 1, *times)
    assume(expected is not None)
    assert bubble("zero-bubble", p, m, 1, times) == pytest.approx(expected, abs=1e-9)


def test_where_no_formula_is_known() -> None:
    assert bubble_fraction("zero-bubble", 4, 2, 1, 1.0, 1.0, 2.0) is None


# --- peaks ---------------------------------------------------------------------------------------


@pytest.mark.parametrize(("name", "chunks"), TRAINING)
def test_peaks_are_those_of_the_lists(name: str, chunks: int) -> None:
    for p, m in ((1, 3), (3, 2), (3, 7), (4, 8)):
        actions = SCHEDULES[name](p, m, chunks)
        timeline = simulate(actions, Costs.even(p * chunks, 1.0, 2.0, 1.0))
        assert timeline.peak_activations == peak_activations(actions)


# --- by hand -------------------------------------------------------------------------------------


def starts(timeline: Timeline, rank: int) -> str:
    """A rank's actions with their starts."""
    return " ".join(
        f"{s.action.kind.name[0]}{s.action.micro}@{s.start:g}" for s in timeline.rows[rank]
    )


def test_1f1b_by_hand() -> None:
    """Forwards take 1, backwards 2 on the first rank and 3 on the second."""
    costs = Costs([1.0, 1.0], [1.5, 2.0], [0.5, 1.0])
    timeline = simulate(one_f_one_b(2, 3, 1), costs)
    assert starts(timeline, 0) == "F0@0 F1@1 B0@5 F2@7 B1@9 B2@13"
    assert starts(timeline, 1) == "F0@1 B0@2 F1@5 B1@6 F2@9 B2@10"
    assert timeline.makespan == 15.0
    assert timeline.busy == [9.0, 12.0]
    assert timeline.idle == [6.0, 3.0]
    assert timeline.bubble == 9.0 / 30.0
    assert timeline.peak_activations == [2, 1]


def test_messages_by_hand() -> None:
    """A message takes 0.5; the next forward of its rank runs meanwhile."""
    costs = Costs([1.0, 1.0], [1.0, 1.0], [0.0, 0.0], transfer=0.5)
    timeline = simulate(gpipe(2, 2, 1), costs)
    assert starts(timeline, 0) == "F0@0 F1@1 B0@5 B1@6"
    assert starts(timeline, 1) == "F0@1.5 F1@2.5 B0@3.5 B1@4.5"


def test_a_message_waits_for_its_receive() -> None:
    """Rendezvous: two sends are under way, and the third holds up a rank that is ahead."""
    costs = Costs([1.0, 10.0], [1.0, 1.0], [0.0, 0.0])
    timeline = simulate(forward_only(2, 6, 1), costs)
    # The third message's receive is posted as the second forward begins, at 11, and so on.
    assert starts(timeline, 0) == "F0@0 F1@1 F2@2 F3@3 F4@4 F5@11"
    assert timeline.makespan == 61.0


def test_a_split_backward_does_not_add_the_weight_gradient() -> None:
    actions = parse("F0 F0.1 B0.1 B0 W0.1")  # chunk 1 alone is split
    timeline = simulate(actions, Costs([1.0, 1.0], [2.0, 4.0], [8.0, 16.0]))
    assert [span.stop - span.start for span in timeline.rows[0]] == [1.0, 1.0, 4.0, 10.0, 16.0]


def test_programs_and_actions_are_the_same() -> None:
    actions = interleaved(3, 5, 2)
    costs = Costs([1.0, 1.5, 0.5] * 2, [2.0] * 6, [1.0] * 6, transfer=0.1)
    assert simulate(lower(actions, 2), costs) == simulate(actions, costs)


@given(
    case=st.sampled_from(TRAINING),
    ranks=st.integers(1, 4),
    micros=st.integers(1, 7),
    data=st.data(),
)
def test_timelines_hold_together(
    case: tuple[str, int], ranks: int, micros: int, data: st.DataObject
) -> None:
    """With any costs: nothing overlaps on a rank, and nothing starts before its input is in."""
    name, chunks = case
    stages = ranks * chunks
    draw = st.lists(st.floats(0.0, 3.0), min_size=stages, max_size=stages)
    costs = Costs(*(data.draw(draw) for _ in range(3)), transfer=data.draw(st.floats(0.0, 1.0)))
    actions = SCHEDULES[name](ranks, micros, chunks)
    timeline = simulate(actions, costs)
    assert [tuple(s.action for s in timeline.rows[rank]) for rank in range(ranks)] == list(actions)
    start_of = {(s.action, rank): s.start for rank, row in enumerate(timeline.rows) for s in row}
    stop = {(s.action, rank): s.stop for rank, row in enumerate(timeline.rows) for s in row}
    for spans in timeline.rows:
        assert all(a.stop <= b.start for a, b in itertools.pairwise(spans))
    delay = costs.transfer if ranks > 1 else 0.0
    for (action, rank), start in start_of.items():
        step = {Kind.FORWARD: -1, Kind.BACKWARD: 1, Kind.WEIGHT_GRADIENT: 0}[action.kind]
        before, of = divmod(action.chunk * ranks + rank + step, ranks)
        source = stop.get((action._replace(chunk=before), of)) if step else None
        if source is not None:
            assert start >= source + delay
    idle = [timeline.makespan - busy for busy in timeline.busy]
    assert timeline.idle == pytest.approx(idle)
    assert 0.0 <= timeline.bubble < 1.0


def test_a_measured_timeline_starts_anywhere() -> None:
    action = parse("F0")[0][0]
    timeline = Timeline([[Span(action, 7.0, 8.0)], [Span(action, 8.5, 11.0)], []])
    assert (timeline.start, timeline.makespan) == (7.0, 4.0)
    assert timeline.idle == [3.0, 1.5, 4.0]
    assert timeline.bubble == 8.5 / 12.0
    assert Timeline([[]]).bubble == 0.0


def test_what_does_not_fit() -> None:
    with pytest.raises(ValueError, match="costs of 3 stages do not fit 2 ranks"):
        simulate(gpipe(2, 2, 1), Costs.even(3, 1.0, 1.0, 1.0))
    with pytest.raises(ValueError, match="do not fit"):
        simulate(gpipe(2, 2, 1), Costs([1.0] * 2, [1.0] * 2, [1.0] * 4))
    programs = [
        tuple(s for s in program if not isinstance(s, Send)) for program in lower(gpipe(2, 1, 1), 1)
    ]
    with pytest.raises(ScheduleError, match="rank ., instruction .*: waits for ever"):
        simulate(programs, Costs.even(2, 1.0, 1.0, 1.0))
