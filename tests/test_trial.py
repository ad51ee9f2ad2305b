"""How layouts are compared: sequences of unequal length, and what counts as a difference."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from mpillm.training.trial import Outcome, RaggedLoader, compare

TEXT = np.arange(500, dtype=np.uint16)
REFERENCE = Outcome([4.0, 3.0], [2.0, 0.0], [0.1, 0.2], 0.01, {})
WEIGHTS = {"a": np.array([0.5, -0.7]), "b": np.zeros((2, 2))}


def loader(batch_size: int = 9, micro_batch_size: int = 2, seed: int = 1) -> RaggedLoader:
    return RaggedLoader(TEXT, 12, batch_size, micro_batch_size, seed)


def test_counted_tokens_are_those_of_the_masks() -> None:
    ragged = loader()
    counts = set()
    for first in (0, 9, 18):
        micros = [ragged.micro_batch(first, j) for j in range(6)]
        rows = np.concatenate([micro.mask.sum(axis=1) for micro in micros])
        assert ragged.counted_tokens(first) == rows.sum()
        assert (rows[:9] >= 1).all() and (rows[9:] == 0).all()
        counts |= set(rows[:9].tolist())
        for micro in micros:  # what does not count is zero, what counts comes first
            assert not micro.tokens[~micro.mask].any() and not micro.labels[~micro.mask].any()
            assert (np.sort(~micro.mask, axis=1) == ~micro.mask).all()
    assert {1, 12} <= counts and len(counts) > 6


def test_a_sample_s_length_is_its_own() -> None:
    """However the samples are batched; of another seed it is another."""
    one = [loader().sample(number) for number in range(27)]
    for other in (loader(3, 3), loader(27, 1)):
        for number, (tokens, labels) in enumerate(one):
            again = other.sample(number)
            assert (again[0] == tokens).all() and (again[1] == labels).all()
    lengths = [len(loader(seed=2).sample(number)[0]) for number in range(27)]
    assert lengths != [len(tokens) for tokens, _ in one]


def test_the_same_is_the_same() -> None:
    found = compare(REFERENCE, WEIGHTS, REFERENCE, WEIGHTS.items())
    assert (found.loss, found.norm, found.weights) == (0.0, 0.0, 0.0)
    assert found.bitwise and not found.problems


def test_how_differences_are_measured() -> None:
    outcome = replace(REFERENCE, losses=[4.0, 3.3], norms=[2.0, 1e-300])
    weights = {"a": np.array([0.5, -0.65]), "b": np.array([[0.0, 0.0], [0.0, 0.3]])}
    found = compare(REFERENCE, WEIGHTS, outcome, weights.items())
    assert found.loss == pytest.approx(0.3 / 3.3)
    assert found.norm == 1.0
    assert found.weights == pytest.approx(0.3 / (0.0 + 0.3))  # of b; of a 0.05 / (0.7 + 0.3)
    assert not found.bitwise


@pytest.mark.parametrize("field", ["losses", "norms"])
def test_a_last_bit_is_seen(field: str) -> None:
    values = [np.nextafter(getattr(REFERENCE, field)[0], 5.0), getattr(REFERENCE, field)[1]]
    assert not compare(
        REFERENCE, WEIGHTS, replace(REFERENCE, **{field: values}), WEIGHTS.items()
    ).bitwise
    for changed in ({"a": np.nextafter(WEIGHTS["a"], 1.0)}, {"b": -WEIGHTS["b"]}):
        weights = {**WEIGHTS, **changed}
        assert not compare(REFERENCE, WEIGHTS, REFERENCE, weights.items()).bitwise


@pytest.mark.parametrize(
    ("weights", "problem"),
    [
        ({"a": WEIGHTS["a"]}, "no parameter b"),
        ({**WEIGHTS, "c": np.zeros(1)}, "the reference has no parameter c (1,) float64"),
        ({**WEIGHTS, "b": np.zeros(4)}, "the reference has no parameter b (4,) float64"),
        (
            {**WEIGHTS, "a": WEIGHTS["a"].astype(np.float32)},
            "the reference has no parameter a (2,) float32",
        ),
        ({**WEIGHTS, "a": np.array([0.5, np.nan])}, "a holds values that are not finite"),
    ],
)
def test_what_cannot_be_compared_is_a_problem(weights: dict[str, np.ndarray], problem: str) -> None:
    assert compare(REFERENCE, WEIGHTS, REFERENCE, weights.items()).problems == [problem]
