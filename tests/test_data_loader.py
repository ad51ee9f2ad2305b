"""Which text a sample is, and that nothing else decides it."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm.data.loader import EvaluationSet, Loader, MicroBatch
from mpillm.errors import UserError

lengths = st.integers(1, 9)
seeds = st.integers(0, 2**64 - 1)


def text(size: int) -> np.ndarray:
    """Tokens that tell their own place."""
    return np.arange(size, dtype=np.uint16)


@given(st.integers(0, 300), lengths, seeds, st.integers(0, 10**12))
def test_every_sample_is_a_window_of_the_text(
    extra: int, length: int, seed: int, sample: int
) -> None:
    loader = Loader(text(length + 1 + extra), length, 1, 1, seed)
    inputs, labels = loader.sample(sample)
    start = loader.start(sample)
    assert start >= 0 and start + length + 1 <= length + 1 + extra
    assert inputs.tolist() == list(range(start, start + length))
    assert labels.tolist() == list(range(start + 1, start + length + 1))


@settings(max_examples=50)
@given(st.integers(0, 300), lengths, seeds, st.integers(0, 10**6))
def test_an_epoch_is_one_phase_of_windows_each_once(
    extra: int, length: int, seed: int, epoch: int
) -> None:
    loader = Loader(text(length + 1 + extra), length, 1, 1, seed)
    windows = loader.samples_per_epoch
    starts = sorted(loader.start(epoch * windows + place) for place in range(windows))
    assert starts == [starts[0] + length * i for i in range(windows)]
    # What the epoch leaves out, at both ends together, is less than two windows.
    assert length + extra - windows * length < 2 * length


def test_over_the_epochs_every_target_is_used_at_every_place() -> None:
    size, length = 23, 4
    loader = Loader(text(size), length, 1, 1, seed=7)
    uses = np.zeros((size, length), dtype=int)
    epochs = 2000
    for sample in range(epochs * loader.samples_per_epoch):
        start = loader.start(sample)
        uses[np.arange(start + 1, start + length + 1), np.arange(length)] += 1
    inner = uses[2 * length : -2 * length]
    assert inner.min() > 0.9 * epochs / length and inner.max() < 1.1 * epochs / length
    assert uses.sum(axis=1)[1:].min() > 0 and uses[0].sum() == 0


def test_orders_differ_between_epochs_and_seeds() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        loader = Loader(text(1001), 10, 1, 1, seed)
        windows = loader.samples_per_epoch
        starts = [loader.start(epoch * windows + place) for place in range(windows)]
        return [(start - min(starts)) // 10 for start in starts]

    orders = [order(seed, epoch) for seed in (0, 1) for epoch in (0, 1)]
    assert all(sorted(one) == list(range(99)) for one in orders)
    assert len({tuple(one) for one in orders}) == 4


def test_the_order_stays_what_it_is() -> None:
    """A resumed run depends on it: a change here needs a new version of the checkpoint format."""
    loader = Loader(text(1000), 10, 1, 1, seed=1337)
    starts = [loader.start(sample) for sample in (0, 1, 2, 98, 99, 10**9)]
    assert starts == [395, 305, 545, 983, 153, 169]


def rows(batches: list[MicroBatch]) -> list[tuple[int, list[int], list[int]]]:
    """The sequences that count: number in the step, tokens, labels."""
    return [
        (int(sample), batch.tokens[row].tolist(), batch.labels[row].tolist())
        for batch in batches
        for row, sample in enumerate(batch.samples)
        if batch.mask[row].any()
    ]


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 12), st.integers(0, 1000), seeds)
def test_samples_do_not_depend_on_the_batching(
    batch: int, micro: int, other: int, first: int, seed: int
) -> None:
    tokens, length = text(200), 5
    loader = Loader(tokens, length, batch, micro, seed)
    count = -(-batch // micro)
    got = rows([loader.micro_batch(first, j) for j in range(count + 2)])
    plain = Loader(tokens, length, other, other, seed)
    assert got == [(i, *(part.tolist() for part in plain.sample(first + i))) for i in range(batch)]


def test_the_shape_of_a_step() -> None:
    loader = Loader(text(200), 5, batch_size=6, micro_batch_size=4, seed=0)
    batches = [loader.micro_batch(12, j) for j in range(3)]
    for j, batch in enumerate(batches):
        assert batch.tokens.shape == batch.labels.shape == batch.mask.shape == (4, 5)
        assert batch.tokens.dtype == batch.labels.dtype == np.int32
        assert batch.mask.dtype == np.bool_ and batch.samples.dtype == np.int64
        assert batch.samples.tolist() == [4 * j, 4 * j + 1, 4 * j + 2, 4 * j + 3]
        padding = ~batch.mask
        assert not batch.tokens[padding].any() and not batch.labels[padding].any()
    assert [batch.mask.all(axis=1).tolist() for batch in batches] == [
        [True] * 4,
        [True, True, False, False],
        [False] * 4,
    ]
    assert loader.counted_tokens(12) == sum(int(batch.mask.sum()) for batch in batches) == 30


def test_a_text_too_short_names_the_numbers() -> None:
    with pytest.raises(UserError, match=r"at least 11 tokens, and it has 10; .*length <= 9"):
        Loader(text(10), 10, 1, 1, 0)
    assert Loader(text(11), 10, 1, 1, 0).start(5) == 0
    for size in (0, 1):
        with pytest.raises(UserError, match=f"leaves {size} tokens"):
            EvaluationSet(text(size), 10, 1)


@given(st.integers(2, 200), st.integers(1, 70), st.integers(1, 7))
def test_evaluation_counts_every_target_once(size: int, length: int, micro: int) -> None:
    evaluation = EvaluationSet(text(size), length, micro)
    batches = [evaluation.micro_batch(j) for j in range(len(evaluation) + 1)]
    assert all(batch.tokens.shape == (micro, length) for batch in batches)
    assert all(batch.mask.any() for batch in batches[:-1]) and not batches[-1].mask.any()
    inputs = np.concatenate([batch.tokens[batch.mask] for batch in batches])
    labels = np.concatenate([batch.labels[batch.mask] for batch in batches])
    assert inputs.tolist() == list(range(size - 1)) and labels.tolist() == list(range(1, size))
    assert evaluation.counted_tokens == size - 1
    samples = np.concatenate([batch.samples for batch in batches])
    assert samples.tolist() == list(range(len(samples)))
    padding = np.concatenate([batch.tokens[~batch.mask] for batch in batches])
    assert not padding.any()
