"""The trigram yardstick, against a plain program and on real text."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm.data.corpus import read_text
from mpillm.data.ngram import trigram_loss
from mpillm.data.tokenizer import CharacterTokenizer
from mpillm.errors import UserError


def probability(train: list[int], vocabulary: int, context: tuple[int, ...], token: int) -> float:
    """Modified Kneser-Ney as the paper writes it, one n-gram at a time."""

    def count(ngram: tuple[int, ...]) -> int:
        """Occurrences of a trigram; of a shorter n-gram, the different tokens before it."""
        if len(ngram) == 3:
            return occurrences[ngram]
        return len({longer[0] for longer in seen[len(ngram) + 1] if longer[1:] == ngram})

    def chance(context: tuple[int, ...], token: int) -> float:
        order = len(context) + 1
        counts = {t: count((*context, t)) for t in range(vocabulary)}
        lower = chance(context[1:], token) if context else 1 / vocabulary
        total = sum(counts.values())
        if not total:
            return lower
        every = Counter(count(ngram) for ngram in possible[order] if count(ngram))
        discounts = [0.0, 0.5, 1.0, 1.5]
        if every[1] and every[2] and every[3]:
            y = every[1] / (every[1] + 2 * every[2])
            estimate = [0.0] + [i - (i + 1) * y * every[i + 1] / every[i] for i in (1, 2, 3)]
            if min(estimate[1:]) > 0:
                discounts = estimate
        spared = sum(discounts[min(c, 3)] for c in counts.values())
        return (counts[token] - discounts[min(counts[token], 3)] + spared * lower) / total

    occurrences = Counter(zip(train, train[1:], train[2:], strict=False))
    seen: dict[int, set[tuple[int, ...]]] = {2: set(itertools.pairwise(train)), 3: set(occurrences)}
    possible = {
        3: list(seen[3]),
        2: sorted({ngram[1:] for ngram in seen[3]}),
        1: sorted({ngram[1:] for ngram in seen[2]}),
    }
    return chance(context, token)


@given(
    st.lists(st.integers(0, 3), max_size=60), st.lists(st.integers(0, 3), min_size=2, max_size=6)
)
def test_it_is_modified_kneser_ney(train: list[int], validation: list[int]) -> None:
    expected = [
        -math.log(probability(train, 4, tuple(validation[max(0, i - 2) : i]), validation[i]))
        for i in range(1, len(validation))
    ]
    loss = trigram_loss(np.array(train, dtype=np.uint16), np.array(validation), 4)
    assert loss == pytest.approx(sum(expected) / len(expected), rel=1e-12)


@settings(max_examples=50)
@given(st.lists(st.integers(0, 4), max_size=80), st.integers(0, 4), st.integers(0, 4))
def test_probabilities_add_up_to_one(train: list[int], a: int, b: int) -> None:
    def joint(c: int) -> float:
        pair = -trigram_loss(np.array(train, dtype=np.int64), np.array([a, b]), 5)
        both = -2 * trigram_loss(np.array(train, dtype=np.int64), np.array([a, b, c]), 5)
        return math.exp(both - pair)

    assert sum(joint(c) for c in range(5)) == pytest.approx(1, abs=1e-9)


def test_what_a_trigram_can_and_cannot_learn() -> None:
    rng = np.random.default_rng(0)
    noise = rng.integers(0, 8, 200_000)
    assert trigram_loss(noise[:150_000], noise[150_000:], 8) == pytest.approx(math.log(8), abs=3e-3)
    cycle = np.tile(np.arange(8), 1000)
    assert trigram_loss(cycle, cycle[:1000], 8) < 0.01
    # The third last decides: out of a trigram's sight, within a four-gram's.
    hidden = noise.copy()
    for i in range(3, len(hidden)):
        hidden[i] = (hidden[i - 3] + (noise[i] == 0)) % 8
    assert trigram_loss(hidden[:150_000], hidden[150_000:], 8) > 0.9 * math.log(8)


def test_a_token_of_validation_alone_costs_a_finite_loss() -> None:
    assert trigram_loss(np.array([0, 1] * 50), np.array([0, 2, 1, 2]), 3) < math.log(1000)


def test_too_little_text_is_told() -> None:
    with pytest.raises(UserError, match="2 validation tokens or more, got 1"):
        trigram_loss(np.arange(5), np.arange(1), 5)


def test_tiny_shakespeare() -> None:
    source = Path(__file__).parents[1] / "../shared/data/tinyshakespeare/input.txt"
    if not source.is_file():
        pytest.skip("no tiny Shakespeare")
    text = read_text([str(source)]).text
    tokenizer = CharacterTokenizer.train(text)
    ids = tokenizer.encode(text)
    assert trigram_loss(ids[:1_003_854], ids[1_003_854:], 65) == pytest.approx(2.0381, abs=5e-5)
