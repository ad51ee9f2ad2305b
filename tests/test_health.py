"""Verdicts about a step: not finite, overflow, spikes, rows of skipped updates, their state."""

from __future__ import annotations

import json
import math
import re
import statistics
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillm.array.backend import Backend
from mpillm.errors import UserError
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.health import Health, Verdict, z_score
from mpillm.training.replicas import check_comparable
from mpillm.training.settings import RunSettings, TrainSettings
from mpillm.training.watch import Finding, Kind, all_finite

NAN, INF = math.nan, math.inf


def health(**settings: Any) -> Health:
    return Health(TrainSettings(**settings))


def judge(one: Health, loss: float, norm: float = 1.0) -> Verdict:
    return one.judge([loss], norm)[0]


# --- numbers that are not finite -----------------------------------------------------------------


@pytest.mark.parametrize(
    ("losses", "norm"),
    [([NAN], 1.0), ([INF], 1.0), ([-INF], 1.0), ([2.0], NAN), ([2.0], INF), ([2.0, NAN], 1.0)],
)
def test_what_is_not_finite_is_bad(losses: list[float], norm: float) -> None:
    verdict, why = health().judge(losses, norm)
    assert verdict is Verdict.BAD
    assert why.startswith(f"not finite: loss {losses[0]:g}") and why.endswith(f"norm {norm:g}")


def test_what_is_finite_is_good() -> None:
    for loss, norm in ((0.0, 0.0), (-1.0, 1e300), (1e300, 5e-324)):
        assert health().judge([loss, 0.1], norm) == (Verdict.GOOD, "")


def test_an_overflow_in_the_optimizer_is_bad() -> None:
    verdict, why = health().judge([2.0], 1e30, overflows=True)
    assert verdict is Verdict.BAD and "overflows (norm 1e+30" in why


def test_a_gradient_that_the_norm_does_not_count_is_bad() -> None:
    verdict, why = health().judge([2.0], 1.5, clean=False)
    assert verdict is Verdict.BAD and why.endswith("neither loss 2 nor gradient norm 1.5 shows")


def test_the_worst_verdict_is_the_largest() -> None:
    """Ranks agree by a maximum."""
    assert Verdict.GOOD < Verdict.SPIKE < Verdict.BAD


# --- spikes --------------------------------------------------------------------------------------


@given(st.lists(st.floats(0.1, 20), min_size=2, max_size=50), st.floats(0, 100))
def test_the_score_is_that_of_the_textbook(losses: list[float], loss: float) -> None:
    mean, deviation = statistics.fmean(losses), statistics.pstdev(losses)
    expected = (loss - mean) / max(deviation, 1e-3 * mean)
    assert z_score(loss, losses) == pytest.approx(expected, rel=1e-6, abs=1e-9)


def test_losses_that_are_all_the_same_have_no_spike_in_the_last_bit() -> None:
    assert z_score(np.nextafter(2.0, 3.0), [2.0] * 30) < 1e-6
    assert z_score(2.2, [2.0] * 30) == pytest.approx(100)
    assert z_score(0.0, [0.0] * 30) == 0.0


def test_a_spike_is_found_and_a_fall_is_not() -> None:
    one = health(spike_zscore=5.0, spike_window=50)
    noise = np.random.default_rng(0).normal(2.5, 0.05, 200)
    for loss in noise:
        assert judge(one, loss) is Verdict.GOOD
        one.accept(loss)
    verdict, why = one.judge([3.5], 1.0)
    assert verdict is Verdict.SPIKE
    found = re.fullmatch(
        r"spike: loss 3\.5 is (\d+\.\d) standard deviations above (2\.\d+), the mean of the last "
        r"50 \(train\.spike_zscore = 5\)",
        why,
    )
    assert found and float(found[1]) == pytest.approx(20, abs=5)
    assert judge(one, 0.1) is Verdict.GOOD
    assert one.judge([3.5], NAN)[0] is Verdict.BAD  # the worse verdict


def test_a_steady_fall_has_no_spikes() -> None:
    one = health(spike_zscore=4.0, spike_window=100)
    noise = np.random.default_rng(1).normal(0, 0.03, 2000)
    for step, wobble in enumerate(noise):
        loss = 2.0 + 9.0 * math.exp(-step / 100) + wobble
        assert judge(one, loss) is Verdict.GOOD, step
        one.accept(loss)


@pytest.mark.parametrize(("window", "enough"), [(2, 2), (7, 7), (20, 20), (100, 20)])
def test_no_loss_is_judged_by_too_few(window: int, enough: int) -> None:
    one = health(spike_zscore=3.0, spike_window=window)
    for _ in range(enough):
        assert judge(one, 1e6) is Verdict.GOOD
        one.accept(1.0)
    assert judge(one, 1e6) is Verdict.SPIKE


def test_without_a_score_nothing_is_a_spike_or_kept() -> None:
    one = health()
    for _ in range(30):
        one.accept(1.0)
    assert judge(one, 1e9) is Verdict.GOOD
    assert one.state()["losses"] == []


def test_what_was_skipped_never_enters_the_window() -> None:
    one = health(spike_zscore=3.0, spike_window=20)
    for _ in range(20):
        one.accept(2.0)
    for step in range(5):
        one.skip(step, "not finite: loss nan")
    assert one.state()["losses"] == [2.0] * 20
    assert judge(one, 3.0) is Verdict.SPIKE


# --- rows of skipped updates ---------------------------------------------------------------------


def test_so_many_in_a_row_end_the_run() -> None:
    one = health(max_skipped=3)
    one.skip(5, "not finite: a")
    one.skip(6, "not finite: b")
    one.accept(2.0)
    one.skip(8, "not finite: c; first in x")
    one.skip(9, "spike: d")
    assert (one.skipped, one.in_a_row) == (4, 2)
    with pytest.raises(UserError) as error:
        one.skip(10, "not finite: e")
    assert str(error.value) == (
        "3 updates in a row were skipped (train.max_skipped = 3), the last one at step 10: not "
        "finite: e; it began at step 8: not finite: c; first in x; lower optimizer.lr, or go on "
        "from a checkpoint from before that step"
    )


def test_one_may_be_enough() -> None:
    with pytest.raises(UserError, match=r"^1 update was skipped .* = 1\); it began at step 2: why"):
        health(max_skipped=1).skip(2, "why")


# --- state ---------------------------------------------------------------------------------------


@given(st.lists(st.floats(1e-3, 20), max_size=40), st.integers(0, 4), st.integers(2, 30))
def test_state_goes_through_json_and_back(losses: list[float], skipped: int, window: int) -> None:
    one = health(spike_zscore=3.0, spike_window=window)
    for loss in losses:
        one.accept(loss)
    for step in range(skipped):
        one.skip(step + 1, "not finite: 'a', \"b\"")
    other = health(spike_zscore=3.0, spike_window=window)
    other.restore(json.loads(json.dumps(one.state(), allow_nan=False)), 50)
    assert other.state() == one.state()
    for loss in (0.5, 2.0, 30.0):
        assert one.judge([loss], 1.0) == other.judge([loss], 1.0)
    if skipped:
        texts = []
        for any_one in (one, other):
            with pytest.raises(UserError) as error:
                for step in range(10):
                    any_one.skip(60 + step, "again")
            texts.append(str(error.value))
        assert texts[0] == texts[1] and "it began at step 1:" in texts[0]


def test_a_checkpoint_without_state_begins_anew() -> None:
    one = health(spike_zscore=3.0)
    one.accept(2.0)
    one.skip(2, "why")
    one.located = True
    one.restore({}, 100)
    assert one.state() == health().state() and not one.located


def test_a_shorter_window_keeps_the_last_losses() -> None:
    one, other = health(spike_zscore=3.0), health(spike_zscore=3.0, spike_window=2)
    for loss in (1.0, 2.0, 3.0):
        one.accept(loss)
    other.restore(one.state(), 3)
    assert other.state()["losses"] == [2.0, 3.0]


@pytest.mark.parametrize(
    "state",
    [
        {"skipped": -1},
        {"skipped": 11},  # of 10 steps
        {"skipped": 1, "in_a_row": 2},
        {"skipped": "one"},
        {"skipped": 1.5},
        {"losses": [1.0, None]},
        {"losses": [NAN]},
        {"losses": "12"},
        {"row": 3},
        [],
        "state",
    ],
)
def test_a_state_that_cannot_be_is_refused(state: Any) -> None:
    with pytest.raises(UserError, match="^the checkpoint's state of skipped updates: ") as error:
        health().restore(state, 10)
    assert "\n" not in str(error.value)


# --- looking -------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["numpy", "strict"])
@pytest.mark.parametrize("dtype", ["float32", "float64"])
@pytest.mark.parametrize("value", [NAN, INF, -INF, 3e38, -1e-45, 1.0])
def test_one_element_tells(name: str, dtype: str, value: float) -> None:
    """Wherever it stands; large numbers, whose squares overflow, are finite."""
    backend = Backend.create(name)
    for shape, place in (((1,), 0), ((3, 5), 14), ((1000, 70), 31_234), ((), 0)):
        host = np.full(shape, 2e38 if value == 3e38 else 0.5, dtype)
        host.reshape(-1)[place] = value
        found = all_finite(backend, backend.from_host(host))
        assert bool(found) == math.isfinite(value)
        assert (found is True) == (name == "numpy" and math.isfinite(value))
    assert bool(all_finite(backend, backend.zeros((0,), dtype)))
    assert bool(all_finite(backend, backend.zeros((4, 6), dtype).T))


def test_findings_are_in_the_order_of_appearance() -> None:
    order = [
        Finding(Kind.WEIGHTS, -1, (7, 0), "w"),
        Finding(Kind.MOMENTS, -1, (1, 0), "m"),
        Finding(Kind.OUTPUT, 0, (3, 0), "late layer"),
        Finding(Kind.OUTPUT, 1, (2, 0), "early layer of a later micro-batch"),
        Finding(Kind.LOSS, 0, (0, 0), "l"),
        Finding(Kind.GRADIENT, 0, (-4, 0), "head"),
        Finding(Kind.GRADIENT, 0, (-3, 1), "block"),
        Finding(Kind.SUM, -1, (-4, 0), "s"),
    ]
    backwards = list(reversed(order))
    assert sorted(backwards) == order


# --- settings ------------------------------------------------------------------------------------


def test_replicas_are_compared_where_bits_are_promised() -> None:
    library = ParallelSettings(reduction="library")
    check_comparable(RunSettings(check_replicas=5), ParallelSettings())
    check_comparable(RunSettings(), library)
    with pytest.raises(UserError, match=r"run\.check_replicas = 5: .*'library'.*set parallel"):
        check_comparable(RunSettings(check_replicas=5), library)
