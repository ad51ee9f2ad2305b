"""The ring of last calls and the sums of all, also after the process was killed."""

from __future__ import annotations

import signal
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillm.parallel.recorder import RECORD, Recorder

CALLS = st.lists(
    st.tuples(
        st.sampled_from(["data", "tensor"]),
        st.sampled_from(["allreduce", "broadcast", "send", "recv"]),
        st.integers(0, 1 << 40),
        st.integers(0, 2),
    ),
    max_size=30,
)


def is_message(op: str) -> bool:
    return op in ("send", "recv")


def fields(calls: Any, *names: str) -> list[Any]:
    return [tuple(call[name].item() for name in names) for call in calls]


def test_a_call_from_begin_to_end() -> None:
    recorder = Recorder()
    before = time.time()
    entry = recorder.begin("tensor", "allreduce", 4096)
    (call,) = recorder.last()
    assert call["axis"] == b"tensor"
    assert call["op"] == b"allreduce"
    assert call["peer"] == -1
    assert call["bytes"] == 4096
    assert before <= call["begin"] <= time.time()
    assert call["end"] == 0.0
    recorder.end(entry)
    (call,) = recorder.last()
    assert call["begin"] <= call["end"] <= time.time()


def test_what_was_handed_out_does_not_change() -> None:
    recorder = Recorder()
    entry = recorder.begin("data", "broadcast", 1)
    calls = recorder.last()
    recorder.end(entry)
    recorder.begin("data", "broadcast", 2)
    assert calls["end"].tolist() == [0.0]


@given(CALLS)
def test_sequence_numbers_count_collectives_and_each_way_of_messages(calls: Any) -> None:
    """Two ranks that have made the same calls on an axis give them the same numbers."""
    recorder = Recorder()
    for axis, op, nbytes, peer in calls:
        recorder.end(recorder.begin(axis, op, nbytes, peer if is_message(op) else -1))
    lanes = [
        (axis, op, peer) if is_message(op) else (axis, "collective", -1)
        for axis, op, _, peer in calls
    ]
    expected = [lanes[:place].count(lane) for place, lane in enumerate(lanes)]
    assert recorder.last()["sequence"].tolist() == expected


@given(CALLS)
def test_traffic_is_summed_by_axis_and_operation(calls: Any) -> None:
    recorder = Recorder(capacity=4)
    for axis, op, nbytes, peer in calls:
        recorder.end(recorder.begin(axis, op, nbytes, peer))
    assert set(recorder.traffic) == {(axis, op) for axis, op, _, _ in calls}
    for key, total in recorder.traffic.items():
        sizes = [nbytes for axis, op, nbytes, _ in calls if (axis, op) == key]
        assert total.calls == len(sizes)
        assert total.bytes == sum(sizes)
        assert total.seconds >= 0.0


def test_seconds_are_those_between_begin_and_end() -> None:
    recorder = Recorder()
    first, second = recorder.begin("data", "recv", 8, 0), recorder.begin("data", "recv", 8, 1)
    time.sleep(0.02)
    recorder.end(second)
    recorder.end(first)
    spent = recorder.last()["end"] - recorder.last()["begin"]
    assert (spent >= 0.02).all()
    assert recorder.traffic["data", "recv"].seconds == pytest.approx(spent.sum(), abs=1e-5)


@given(st.integers(1, 9), st.integers(0, 40), st.integers(0, 12))
def test_the_ring_keeps_the_last_calls(capacity: int, calls: int, asked: int) -> None:
    recorder = Recorder(capacity=capacity)
    for number in range(calls):
        recorder.end(recorder.begin("data", "allreduce", number))
    kept = list(range(max(0, calls - capacity), calls))
    assert recorder.last()["bytes"].tolist() == kept
    assert recorder.last(asked)["bytes"].tolist() == kept[len(kept) - min(asked, len(kept)) :]
    assert recorder.last()["sequence"].tolist() == kept


def test_the_end_of_a_call_that_the_ring_has_dropped_marks_no_other_call() -> None:
    recorder = Recorder(capacity=2)
    entry = recorder.begin("data", "recv", 8, 0)
    for _ in range(4):
        recorder.begin("data", "send", 8, 0)
        recorder.end(entry)
        assert (recorder.last()[-1:]["end"] == 0.0).all()
    assert recorder.last()["end"].tolist() == [0.0, 0.0]


def test_the_end_of_a_dropped_call_is_told_apart_when_the_clock_stands_still(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Clocks are set back, and coarse ones tick seldom."""
    monkeypatch.setattr(time, "time", lambda: 1000.0)
    recorder = Recorder(capacity=2)
    entry = recorder.begin("data", "recv", 8, 0)
    for _ in range(2):
        recorder.begin("data", "send", 8, 0)
    recorder.end(entry)
    assert recorder.last()["end"].tolist() == [0.0, 0.0]


def test_the_file_is_the_ring(tmp_path: Path) -> None:
    path = tmp_path / "flight" / "rank-00003.bin"
    recorder = Recorder(path, capacity=8)
    for number in range(11):
        recorder.end(recorder.begin("pipe", "send", number, 1))
    assert path.stat().st_size == 8 * RECORD.itemsize
    stored = np.sort(np.fromfile(path, dtype=RECORD), order="sequence")
    assert (stored == recorder.last()).all()


KILLED = """
import os, signal, sys
from pathlib import Path
from mpillm.parallel.recorder import Recorder
recorder = Recorder(Path(sys.argv[1]), capacity=16)
for number in range(20):
    recorder.end(recorder.begin("data", "allreduce", number))
recorder.begin("pipe", "recv", 77, 3)
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_file_outlives_a_killed_process(python: Any, tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.bin"
    result = python("-c", KILLED, path)
    assert result.returncode == -signal.SIGKILL
    calls = np.fromfile(path, dtype=RECORD)
    calls = calls[np.argsort(calls["begin"], kind="stable")]
    assert len(calls) == 16
    done, open_ = calls[calls["end"] > 0], calls[calls["end"] == 0]
    assert fields(open_, "axis", "op", "peer", "bytes") == [(b"pipe", b"recv", 3, 77)]
    assert done["sequence"].tolist() == list(range(5, 20))
    assert done["bytes"].tolist() == list(range(5, 20))
