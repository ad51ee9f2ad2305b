"""The ring of last calls and the sums of all, also after the process was killed."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm.errors import UserError
from mpillm.parallel.diagnosis import diagnose
from mpillm.parallel.flight import parse, read_flight, read_flights
from mpillm.parallel.flight_format import DEPTH, HEADER, RECORD
from mpillm.parallel.recorder import Recorder, start_ticks

CALLS = st.lists(
    st.tuples(
        st.sampled_from(["data", "tensor"]),
        st.sampled_from(["allreduce", "broadcast", "send", "recv"]),
        st.integers(0, 1 << 40),
        st.integers(0, 2),
        st.integers(0, 1),
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
    """Two ranks that have made the same calls on an axis give them the same numbers.

    So do the two ends of a message: MPI pairs those of one tag in their order.
    """
    recorder = Recorder()
    for axis, op, nbytes, peer, tag in calls:
        recorder.end(recorder.begin(axis, op, nbytes, peer if is_message(op) else -1, tag))
    lanes = [
        (axis, op, peer, tag) if is_message(op) else (axis, "collective", -1, 0)
        for axis, op, _, peer, tag in calls
    ]
    expected = [lanes[:place].count(lane) for place, lane in enumerate(lanes)]
    assert recorder.last()["sequence"].tolist() == expected


@given(CALLS)
def test_traffic_is_summed_by_axis_and_operation(calls: Any) -> None:
    recorder = Recorder(capacity=4)
    for axis, op, nbytes, peer, tag in calls:
        recorder.end(recorder.begin(axis, op, nbytes, peer, tag))
    assert set(recorder.traffic) == {(axis, op) for axis, op, *_ in calls}
    for key, total in recorder.traffic.items():
        sizes = [nbytes for axis, op, nbytes, *_ in calls if (axis, op) == key]
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


def test_the_file_is_a_page_and_the_ring(tmp_path: Path) -> None:
    path = tmp_path / "flight" / "rank-00003.bin"
    recorder = Recorder(path, capacity=8, rank=3, size=4)
    for number in range(11):
        recorder.end(recorder.begin("pipe", "send", number, 1))
    assert HEADER.itemsize == 4096
    assert path.stat().st_size == HEADER.itemsize + 8 * RECORD.itemsize
    stored = np.fromfile(path, dtype=RECORD, offset=HEADER.itemsize)
    assert (np.sort(stored, order="number") == recorder.last()).all()
    assert (read_flight(path).ring == recorder.last()).all()
    assert path.read_bytes() == recorder.contents()


def test_a_file_that_cannot_be_made(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match=r"cannot be made: .*; set run\.flight_dir to a folder"):
        Recorder(tmp_path / "file" / "rank-00000.bin")


# --- the header ----------------------------------------------------------------------------------


def test_who_and_where(tmp_path: Path) -> None:
    layout = {"pipe": 1, "data": 3, "expert": 1, "context": 1, "tensor": 2}
    before = time.time()
    Recorder(tmp_path / "rank-00004.bin", rank=4, size=6, layout=layout)
    flight = read_flight(tmp_path / "rank-00004.bin")
    assert (flight.rank, flight.size, flight.layout) == (4, 6, layout)
    assert (flight.host, flight.pid) == (os.uname().nodename, os.getpid())
    assert flight.ticks == start_ticks(os.getpid()) > 0
    assert before <= flight.start == flight.progress <= time.time()
    assert flight.heartbeat is flight.activity is flight.ended is flight.waiting is None
    assert start_ticks(2**22 + 1) == 0


def now(recorder: Recorder) -> Any:
    return parse(recorder.contents(), Path("memory"))


def test_steps_and_samples() -> None:
    recorder = Recorder()
    for step in (40, 41, 42):
        recorder.step, recorder.samples = step, 8 * step
    flight = now(recorder)
    assert (flight.first_step, flight.step, flight.samples) == (40, 42, 336)
    assert (recorder.step, recorder.samples) == (42, 336)
    recorder.begin("data", "allreduce", 8)
    assert recorder.last()["step"].tolist() == [42]


def test_activities_are_nested() -> None:
    recorder = Recorder()
    with pytest.raises(ZeroDivisionError), recorder.activity("set up"):
        outer = now(recorder).activity
        with recorder.activity("load"):
            assert now(recorder).activity.name == "load"
            assert now(recorder).activity.since >= outer.since
        assert now(recorder).activity == outer
        raise ZeroDivisionError
    assert now(recorder).activity is None
    with contextlib.ExitStack() as stack:
        for depth in range(DEPTH + 3):
            stack.enter_context(recorder.activity(f"number {depth}"))
        assert now(recorder).activity.name == f"number {DEPTH - 1}"
    assert now(recorder).activity is None


def test_goodbye() -> None:
    recorder = Recorder()
    recorder.goodbye("ValueError: two\nlines " + "x" * 1000)
    recorder.goodbye("a second one")
    flight = now(recorder)
    assert flight.cause.startswith("ValueError: two lines xxx") and len(flight.cause) == 256
    assert flight.left and flight.ended <= time.time()
    recorder = Recorder()
    recorder.goodbye("hung: ended by the watchdog")
    assert not now(recorder).left and now(recorder).ended is not None


def test_a_heartbeat_is_no_progress() -> None:
    recorder = Recorder()
    before = now(recorder).progress
    time.sleep(0.01)
    recorder.beat()
    assert now(recorder).progress == before < now(recorder).heartbeat
    recorder.poll()
    assert now(recorder).progress > before


def test_collectives_are_counted_beyond_the_ring() -> None:
    recorder = Recorder(capacity=4)
    entries = [recorder.begin("data", "allreduce", 8) for _ in range(20)]
    for entry in entries[:15]:
        recorder.end(entry)
    recorder.end(recorder.begin("pipe", "send", 8, 1))
    recorder.end(recorder.begin("made up", "barrier", 0))
    flight = now(recorder)
    assert (flight.begun("data"), flight.completed("data")) == (20, 15)
    assert (flight.begun("pipe"), flight.completed("pipe")) == (0, 0)
    assert (flight.begun("made up"), flight.completed("made up")) == (1, 1)
    assert flight.calls == 22


def test_waiting_is_measured_where_the_rank_is_blocked() -> None:
    recorder = Recorder()
    sum_, norm = recorder.begin("data", "allreduce", 8), recorder.begin("world", "allreduce", 9)
    assert now(recorder).waiting is None
    time.sleep(0.1)  # computing, with two calls under way
    before = time.time()
    recorder.wait(sum_)
    recorder.wait(sum_)
    assert now(recorder).waiting.axis == "data"
    since = now(recorder).waiting_since
    time.sleep(0.02)
    recorder.end(norm)  # another one
    assert now(recorder).waiting.axis == "data" and now(recorder).waiting_since == since
    recorder.end(sum_)
    assert now(recorder).waiting is None
    assert 0.02 <= now(recorder).waited <= time.time() - before
    entry = recorder.begin("data", "barrier", 0, wait=True)
    assert now(recorder).waiting.op == "barrier"
    time.sleep(0.02)
    recorder.end(entry)
    assert 0.04 <= now(recorder).waited <= time.time() - before


def test_the_call_that_the_rank_is_blocked_in_outlives_the_ring() -> None:
    recorder = Recorder(capacity=2)
    entry = recorder.begin("data", "allgather", 77)
    recorder.wait(entry)
    for _ in range(5):
        recorder.end(recorder.begin("pipe", "send", 8, 1))
    waiting = now(recorder).waiting
    assert (waiting.number, waiting.op, waiting.bytes) == (1, "allgather", 77)


# --- reading -------------------------------------------------------------------------------------


def test_half_a_record_is_none(tmp_path: Path) -> None:
    recorder = Recorder(capacity=4)
    for number in range(3):
        recorder.begin("data", "allreduce", number)
    content = bytearray(recorder.contents())
    place = HEADER.itemsize + RECORD.itemsize
    content[place + RECORD.fields["check"][1]] ^= 1  # type: ignore[index]
    flight = parse(bytes(content), tmp_path)
    assert flight.ring["bytes"].tolist() == [0, 2]
    assert flight.find("data", 1) is None and flight.find("data", 2) is not None


def test_a_file_is_read_while_it_is_written(python: Any, tmp_path: Path) -> None:
    """Whatever moment it is read at, all that counts is whole."""
    path = tmp_path / "rank-00000.bin"
    writer = subprocess.Popen([sys.executable, "-c", WRITER, str(path)])
    try:
        deadline = time.time() + 30
        seen: set[int] = set()
        while len(seen) < 50:
            assert time.time() < deadline
            with contextlib.suppress(UserError):  # before its first page is there
                flight = read_flight(path)
                ring = flight.ring
                assert (ring["bytes"] == ring["sequence"] * 3).all()
                assert (ring["op"] == b"allreduce").all()
                assert flight.waiting is None or flight.waiting.bytes % 3 == 0
                seen.add(flight.calls)
    finally:
        writer.kill()
        writer.wait()


WRITER = """
import sys
from pathlib import Path
from mpillm.parallel.recorder import Recorder
recorder = Recorder(Path(sys.argv[1]), capacity=8)
for number in range(10**9):
    recorder.end(recorder.begin("data", "allreduce", 3 * number, wait=True))
"""


@pytest.mark.parametrize(
    ("field", "value", "why"),
    [
        ("magic", b"MPILLM-F", "do not begin with"),
        ("version", 2, "version 2; this mpillm reads 1"),
        ("version", 1 << 56, "version"),  # another byte order
        ("capacity", 7, "do not hold 7 calls"),
        ("capacity", 1 << 60, "do not hold"),
        ("rank", 6, "rank 6 of 6"),
        ("size", 0, "of 0 in a layout"),
        ("size", 1 << 40, "in a layout"),
        ("start", float("nan"), "a time that is none"),
        ("ended", -1.0, "a time that is none"),
        ("heartbeat", float("inf"), "a time that is none"),
    ],
)
def test_what_is_no_flight_file(tmp_path: Path, field: str, value: Any, why: str) -> None:
    path = tmp_path / "rank-00000.bin"
    content = bytearray(Recorder(capacity=8, size=6).contents())
    header = np.frombuffer(content, dtype=HEADER, count=1)
    header[field] = value
    path.write_bytes(content)
    with pytest.raises(UserError, match=why) as caught:
        read_flight(path)
    assert str(path) in str(caught.value) and "\n" not in str(caught.value)


@settings(max_examples=40)
@given(st.data())
def test_damage_is_refused_or_read_as_something(data: Any) -> None:
    """Never a crash, nor anything that a diagnosis would stumble over."""
    recorder = Recorder(capacity=3, rank=1, size=2)
    recorder.begin("data", "allreduce", 8, wait=True)
    content = bytearray(recorder.contents())
    used = int(HEADER.fields["reserved"][1])  # type: ignore[index]
    places = st.integers(8, used - 1) | st.integers(HEADER.itemsize, len(content) - 1)
    for _ in range(data.draw(st.integers(1, 30))):
        content[data.draw(places)] = data.draw(st.integers(0, 255))
    try:
        flight = parse(bytes(content), Path("x"))
    except UserError:
        return
    diagnose({flight.rank: flight}, time.time())


def test_all_ranks_of_an_attempt(tmp_path: Path) -> None:
    for rank in (0, 1, 3, 4):
        Recorder(tmp_path / f"rank-{rank:05d}.bin", rank=rank, size=6)
    (tmp_path / "rank-00001.bin").write_bytes(b"")
    Recorder(tmp_path / "rank-00005.bin", rank=2, size=6)
    (tmp_path / "rank-00002.stack.txt").touch()
    found = read_flights(tmp_path)
    assert list(found.flights) == [0, 3, 4] and found.size == 6
    assert list(found.problems) == [1, 2, 5]
    assert "no flight file of mpillm: 0 bytes" in found.problems[1]
    assert found.problems[2] == "rank 2 has left no flight file"
    assert "is that of rank 2" in found.problems[5]
    assert list(read_flights(tmp_path, ranks=[3, 2]).flights) == [3]


def test_the_first_folder_with_a_ranks_file_counts(tmp_path: Path) -> None:
    for place, folder in enumerate(("own", "shared")):
        for rank in range(place, 2):
            recorder = Recorder(tmp_path / folder / f"rank-{rank:05d}.bin", rank=rank, size=2)
            recorder.step = place
    found = read_flights(tmp_path / "own", tmp_path / "shared").flights
    assert {rank: flight.step for rank, flight in found.items()} == {0: 0, 1: 0}
    found = read_flights(tmp_path / "none", tmp_path / "shared").flights
    assert {rank: flight.step for rank, flight in found.items()} == {1: 1}


def test_no_flight_at_all(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="holds no flight file"):
        read_flights(tmp_path)
    with pytest.raises(UserError, match="holds no flight file"):
        read_flights(tmp_path / "none")


# --- after a kill --------------------------------------------------------------------------------

KILLED = """
import os, signal, sys
from pathlib import Path
from mpillm.parallel.recorder import Recorder
recorder = Recorder(Path(sys.argv[1]), capacity=16)
recorder.step, recorder.samples = 7, 56
for number in range(20):
    recorder.end(recorder.begin("data", "allreduce", number))
recorder.beat()
with recorder.activity("save"):
    recorder.wait(recorder.begin("pipe", "recv", 77, 3, 5))
    os.kill(os.getpid(), signal.SIGKILL)
"""


def test_the_file_outlives_a_killed_process(python: Any, tmp_path: Path) -> None:
    path = tmp_path / "rank-00000.bin"
    result = python("-c", KILLED, path)
    assert result.returncode == -signal.SIGKILL
    flight = read_flight(path)
    calls = flight.ring
    assert len(calls) == 16
    done, open_ = calls[calls["end"] > 0], calls[calls["end"] == 0]
    assert fields(open_, "axis", "op", "peer", "tag", "bytes") == [(b"pipe", b"recv", 3, 5, 77)]
    assert done["sequence"].tolist() == list(range(5, 20))
    assert done["bytes"].tolist() == list(range(5, 20))
    assert (flight.step, flight.samples, flight.activity.name) == (7, 56, "save")
    assert flight.waiting.bytes == 77 and flight.waiting == next(flight.under_way())
    assert flight.last_completed.bytes == 19
    assert flight.heartbeat and flight.ended is None and not flight.cause
