"""Covering sets: every pair that occurs is there, with few cases; and layouts as text."""

from __future__ import annotations

from itertools import combinations, product

import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillm.errors import UserError
from mpillm.parallel.covering import covering, pairs
from mpillm.parallel.layouts import (
    SIZES,
    factors,
    layout_text,
    layouts,
    parse_layout,
    ranks_of,
    split_list,
)
from mpillm.parallel.schedules import SCHEDULES
from mpillm.parallel.settings import ParallelSettings

BASE = ParallelSettings()
OTHER = ParallelSettings(
    data=2,
    tensor=2,
    pipe=4,
    sequence=True,
    schedule="interleaved",
    chunks=3,
    boundaries=(1, 2, 3),
    zero=1,
    overlap=False,
    reduction="library",
)

CASES = st.lists(
    st.fixed_dictionaries({name: st.integers(0, 3) for name in "abcd"}), min_size=1, max_size=60
)


@given(CASES)
def test_every_pair_that_occurs_is_covered(cases: list[dict[str, int]]) -> None:
    chosen = covering(cases)
    assert chosen == sorted(set(chosen))
    there = {pair for case in cases for pair in combinations(sorted(case.items()), 2)}
    assert {pair for number in chosen for pair in pairs(cases[number])} == there


@given(CASES)
def test_no_case_could_be_left_out(cases: list[dict[str, int]]) -> None:
    chosen = covering(cases)
    everything = {pair for case in cases for pair in pairs(case)}
    for left_out in chosen:
        rest = {pair for number in chosen if number != left_out for pair in pairs(cases[number])}
        assert rest != everything


def test_few_cases_cover_many() -> None:
    """Of the 1,024 cases of five factors with four values 16 would do."""
    cases = [dict(zip("abcde", values, strict=True)) for values in product(range(4), repeat=5)]
    assert len(covering(cases)) <= 28
    assert covering(cases) == covering(cases)
    assert covering([]) == []


@pytest.mark.parametrize(("ranks", "count"), [(1, 4), (2, 36), (4, 152), (8, 440), (6, 268)])
def test_every_layout_once(ranks: int, count: int) -> None:
    found = layouts(ranks, BASE)
    assert len(found) == len(set(found)) == count
    for layout in found:
        assert ranks_of(layout) == ranks
        assert layout.tensor > 1 or not layout.sequence
        assert layout.chunks == (2 if layout.schedule == "interleaved" else 1)
    sizes = {tuple(getattr(layout, axis) for axis in SIZES) for layout in found}
    divisors = [size for size in range(1, ranks + 1) if ranks % size == 0]
    every = product(divisors, repeat=len(SIZES))
    assert sizes == {one for one in every if one[0] * one[1] * one[2] * one[3] * one[4] == ranks}


def test_what_occurs_in_the_layouts_of_eight_ranks() -> None:
    found = [factors(layout) for layout in layouts(8, BASE)]
    values = {name: {case[name] for case in found} for name in found[0]}
    assert values == {
        **{axis: {1, 2, 4, 8} for axis in SIZES},
        "sequence": {False, True},
        "schedule": {*SCHEDULES, "none"},
        "zero": {0, 1, 2, 3},
    }


@pytest.mark.parametrize("base", [BASE, OTHER], ids=["plain", "other"])
@pytest.mark.parametrize("ranks", [1, 4, 8])
def test_a_layout_s_text_reads_back(ranks: int, base: ParallelSettings) -> None:
    for layout in layouts(ranks, base):
        assert parse_layout(layout_text(layout, base), base) == layout
    if base is OTHER:
        assert parse_layout(layout_text(OTHER, BASE), BASE) == OTHER


@pytest.mark.parametrize(
    ("text", "layout"),
    [
        ("data=4", ParallelSettings(data=4)),
        ("tensor=2,sequence", ParallelSettings(data=1, tensor=2, sequence=True)),
        ("pipe=3,boundaries=[1,4]", ParallelSettings(data=1, pipe=3, boundaries=(1, 4))),
        ("data=0,zero=2", ParallelSettings(data=0, zero=2)),
    ],
)
def test_layouts_are_read(text: str, layout: ParallelSettings) -> None:
    assert parse_layout(text, BASE) == layout


def test_settings_without_use_are_left_out() -> None:
    """Of the run's own: what is asked for by name stays, and may be refused."""
    layout = parse_layout("data=2", OTHER)
    assert (layout.sequence, layout.chunks, layout.boundaries) == (False, 1, ())
    assert (layout.zero, layout.overlap, layout.reduction) == (1, False, "library")
    assert parse_layout("data=2,sequence=true", OTHER).sequence
    assert layout_text(parse_layout("pipe=4", OTHER), OTHER) == (
        "pipe=4,schedule=interleaved,chunks=3,zero=1"
    )


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("tensr=2", "--parallel.tensr: no such setting; did you mean 'tensor'?"),
        ("data=x", "--parallel.data: expected integer >= 0, got 'x'"),
        ("pipe", "--parallel.pipe: no value given; expected --parallel.pipe=integer >= 1"),
        ("", "--parallel.: expected --section.key=value"),
    ],
)
def test_layouts_that_are_none(text: str, told: str) -> None:
    with pytest.raises(UserError) as error:
        parse_layout(text, BASE)
    assert str(error.value) == told


def test_lists_may_hold_lists() -> None:
    assert split_list("a=1,b=[2,3],c") == ["a=1", "b=[2,3]", "c"]
    assert split_list("") == [""]
