"""The split rule and hyperslabs, against sets of indices."""

from __future__ import annotations

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillm.parallel.shard import Shard, split_range, zigzag

Shape = tuple[int, ...]

shapes = st.lists(st.integers(0, 5), min_size=1, max_size=3).map(tuple)


@st.composite
def shards(draw: st.DrawFn, shape: Shape | None = None) -> Shard:
    """Any hyperslab, empty ones included, of any array or one of the given shape."""
    shape = draw(shapes) if shape is None else shape
    bounds = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return Shard(shape, tuple(a for a, _ in bounds), tuple(b for _, b in bounds))


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Shard, Shard]:
    """Two shards of one array."""
    shape = draw(shapes)
    return draw(shards(shape)), draw(shards(shape))


def numbered(shape: Shape) -> np.ndarray:
    """An array in which every element is its own flat index."""
    return np.arange(math.prod(shape)).reshape(shape)


def elements(shard: Shard) -> set[int]:
    """The flat indices that belong to a shard, element by element."""
    within = np.ones(shard.shape, dtype=bool)
    for axis, index in enumerate(np.indices(shard.shape)):
        within &= (shard.start[axis] <= index) & (index < shard.stop[axis])
    return set(np.flatnonzero(within).tolist())


# --- split_range ---------------------------------------------------------------------------------


@given(st.integers(0, 1_000), st.integers(1, 64))
def test_parts_tile_the_range_in_order_and_are_even(total: int, parts: int) -> None:
    ranges = [split_range(total, parts, index) for index in range(parts)]
    assert [i for start, stop in ranges for i in range(start, stop)] == list(range(total))
    sizes = [stop - start for start, stop in ranges]
    assert sizes == sorted(sizes, reverse=True)
    assert sizes[0] - sizes[-1] in (0, 1)


@given(st.integers(0, 10**15), st.integers(1, 10**6), st.data())
def test_neighbouring_parts_meet(total: int, parts: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, parts - 1))
    start, stop = split_range(total, parts, index)
    assert start == (split_range(total, parts, index - 1)[1] if index > 0 else 0)
    assert stop == (split_range(total, parts, index + 1)[0] if index + 1 < parts else total)


def test_three_heads_on_four_ranks() -> None:
    assert [split_range(3, 4, rank) for rank in range(4)] == [(0, 1), (1, 2), (2, 3), (3, 3)]


@pytest.mark.parametrize(("parts", "index"), [(3, 3), (3, -1), (0, 0)])
def test_a_part_that_does_not_exist(parts: int, index: int) -> None:
    with pytest.raises(ValueError, match=f"part {index} of {parts} does not exist"):
        split_range(10, parts, index)


# --- zigzag --------------------------------------------------------------------------------------


@given(st.integers(0, 200), st.integers(1, 9))
def test_a_sequence_is_dealt_out_in_zigzag(length: int, ranks: int) -> None:
    runs = [zigzag(length, ranks, rank) for rank in range(ranks)]
    there_and_back = [low for low, _ in runs] + [high for _, high in reversed(runs)]
    places = [place for start, stop in there_and_back for place in range(start, stop)]
    assert places == list(range(length))
    sizes = [stop - start for start, stop in there_and_back]
    assert max(sizes) - min(sizes) <= 1


@given(st.integers(0, 200), st.integers(1, 9))
def test_under_a_causal_mask_all_ranks_see_as_many_keys(length: int, ranks: int) -> None:
    """The query at place p sees p + 1 keys; uneven chunks differ by less than two whole rows."""
    seen = [
        sum(place + 1 for run in zigzag(length, ranks, rank) for place in range(*run))
        for rank in range(ranks)
    ]
    assert max(seen) - min(seen) <= 2 * length
    if length % (2 * ranks) == 0:
        assert max(seen) == min(seen)


def test_one_rank_has_two_halves() -> None:
    assert zigzag(5, 1, 0) == ((0, 3), (3, 5))


@pytest.mark.parametrize("rank", [-1, 2, 3])
def test_a_rank_that_does_not_exist(rank: int) -> None:
    with pytest.raises(ValueError, match=f"rank {rank} of 2 does not exist"):
        zigzag(10, 2, rank)


# --- Shard ---------------------------------------------------------------------------------------


@given(shards())
def test_slices_shape_and_size_are_those_of_the_elements(shard: Shard) -> None:
    part = numbered(shard.shape)[shard.slices]
    assert part.shape == shard.local_shape
    assert part.size == shard.size
    assert set(part.reshape(-1).tolist()) == elements(shard)


@given(shapes)
def test_the_whole(shape: Shape) -> None:
    whole = Shard.whole(shape)
    assert whole.is_whole
    assert whole.local_shape == shape
    assert elements(whole) == set(range(math.prod(shape)))


@given(shards())
def test_only_the_whole_is_whole(shard: Shard) -> None:
    assert shard.is_whole == (shard == Shard.whole(shard.shape))


@given(shapes, st.integers(1, 7), st.data())
def test_a_split_tiles_the_array(shape: Shape, parts: int, data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    split = [Shard.split(shape, axis, parts, index) for index in range(parts)]
    whole = np.concatenate([numbered(shape)[shard.slices] for shard in split], axis=axis)
    assert (whole == numbered(shape)).all()
    for index, shard in enumerate(split):
        assert (shard.start[axis], shard.stop[axis]) == split_range(shape[axis], parts, index)


@given(pairs())
def test_an_overlap_is_what_both_hold(two: tuple[Shard, Shard]) -> None:
    a, b = two
    common = a.overlap(b)
    assert (set() if common is None else elements(common)) == elements(a) & elements(b)
    assert common is None or common.size > 0
    assert common == b.overlap(a)


@given(pairs())
def test_an_overlap_is_found_in_the_local_arrays(two: tuple[Shard, Shard]) -> None:
    """What a checkpoint reader does: from one rank's piece to another's."""
    a, b = two
    common = a.overlap(b)
    if common is not None:
        array = numbered(a.shape)
        for shard in two:
            local = array[shard.slices]
            assert (local[shard.locate(common)] == array[common.slices]).all()


@given(shards())
def test_a_shard_overlaps_itself_unless_it_is_empty(shard: Shard) -> None:
    assert shard.overlap(shard) == (shard if shard.size else None)


def test_the_overlap_of_shards_of_different_arrays() -> None:
    with pytest.raises(ValueError, match="shards of different arrays"):
        Shard.whole((2, 3)).overlap(Shard.whole((3, 2)))


@pytest.mark.parametrize(
    ("start", "stop"), [((0,), (4,)), ((-1,), (2,)), ((2,), (1,)), ((4,), (4,))]
)
def test_a_shard_lies_within_its_array(start: Shape, stop: Shape) -> None:
    with pytest.raises(ValueError, match="does not lie in an axis of 3"):
        Shard((3,), start, stop)


def test_a_shard_has_the_axes_of_its_array() -> None:
    with pytest.raises(ValueError, match="axes disagree"):
        Shard((3, 3), (0,), (3,))


def test_an_array_without_axes_has_one_element() -> None:
    whole = Shard.whole(())
    assert whole.size == 1
    assert whole.is_whole
    assert whole.overlap(whole) == whole


@given(shards())
def test_shards_are_values(shard: Shard) -> None:
    again = Shard(shard.shape, shard.start, shard.stop)
    assert again == shard
    assert len({shard, again}) == 1
