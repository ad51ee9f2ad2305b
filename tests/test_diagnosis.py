"""Every kind of cause is found, told from the ranks that only wait, and put into words."""

from __future__ import annotations

import random
import time
from typing import Any

import pytest
from flights import Job

from mpillm.parallel.diagnosis import diagnose
from mpillm.parallel.findings import Diagnosis
from mpillm.parallel.waiting import cycles
from mpillm.parallel.wording import name_ranks


def kinds(found: Diagnosis) -> list[tuple[str, tuple[int, ...]]]:
    return [(finding.kind, finding.ranks) for finding in found.findings]


def calls(found: Diagnosis) -> tuple[Any, ...]:
    first = found.findings[0]
    return first.axis, first.op, first.sequence


# --- ranks that wait for nobody ----------------------------------------------------------------


def test_nothing_is_wrong() -> None:
    job = Job(data=4)
    job.call(range(4), "data", "allreduce")
    found = job.diagnose(after=1.0)
    assert not found.findings and not found.lines and not found.hung


def test_a_rank_that_never_came() -> None:
    job = Job(pipe=2, data=2, tensor=2)
    job.call(range(8), "data", "allreduce")
    job.begin(0, "data", "allreduce", 4096)  # pipe 0, tensor 0: with rank 2
    found = job.diagnose()
    assert kinds(found)[0] == ("outside", (2,))
    assert calls(found) == ("data", "allreduce", 1)
    assert "rank 2 never entered allreduce #2 over data (tensor 0, pipe 0)" in found.lines[0]
    assert "rank 0 has waited for 700" in found.lines[0]
    assert "outside of any call for 700" in found.lines[0]
    assert "last in allreduce #1 over data" in found.lines[0]
    assert found.hung and found.culprits[0] == 2


def test_the_chain_is_followed_to_its_root() -> None:
    """The report of the issue: who is waited for waits itself."""
    job = Job(pipe=2, data=2, tensor=1)
    job.begin(0, "data", "allreduce")  # for rank 1
    job.begin(1, "pipe", "recv", peer=1, tag=7)  # for rank 3
    job.begin(2, "world", "barrier")
    found = job.diagnose()
    assert kinds(found)[0] == ("outside", (3,))
    assert "rank 3 never made send #1 to rank 1 over pipe (data 1, tag 7)" in found.lines[0]
    assert any("rank 0 waits in allreduce #1 over data (pipe 0)" in line for line in found.lines)


def test_a_slow_rank_is_given_time() -> None:
    job = Job(data=2)
    job.begin(0, "data", "allreduce")
    found = job.diagnose(after=599.0)
    assert kinds(found) == [("outside", (1,))] and not found.hung
    assert 0.5 < found.due - found.now < 1.5
    assert job.diagnose(after=601.0).hung


def test_a_declared_activity_is_given_more() -> None:
    job = Job(data=2)
    job.begin(0, "data", "allreduce")
    with job.ranks[1].activity("save"):
        found = job.diagnose(after=3000.0)
        assert kinds(found) == [("activity", (1,))] and not found.hung
        assert "in 'save' for 3,000" in found.lines[0]
        assert job.diagnose(after=3700.0).hung
    assert job.diagnose(after=3000.0).hung


def test_an_activity_excuses_no_deadlock() -> None:
    job = Job(data=2)
    for rank, axis in enumerate(("data", "world")):
        with job.ranks[rank].activity("evaluate"):
            job.begin(rank, axis, "allreduce")
    assert job.diagnose().hung


def test_a_rank_without_a_heartbeat() -> None:
    job = Job(data=2)
    job.begin(0, "data", "allreduce")
    job.ranks[1].beat()
    found = job.diagnose(processes={1: "stopped by a signal"})
    assert kinds(found) == [("silent", (1,))]
    assert "no sign of life for 700" in found.lines[0]
    assert "stopped by a signal" in found.lines[0]


def test_a_rank_that_stands_still_in_a_call_that_all_have_made() -> None:
    job = Job(data=3)
    for rank in range(3):
        job.begin(rank, "data", "allreduce")
    job.ranks[1].beat()
    found = job.diagnose()
    assert kinds(found) == [("silent", (1,))]
    assert "entered allreduce #1 over data and does not go on" in found.lines[0]


def test_a_rank_that_has_ended() -> None:
    job = Job(data=2)
    job.begin(0, "data", "allreduce")
    job.ranks[1].goodbye("ZeroDivisionError: division by zero")
    found = job.diagnose()
    assert kinds(found) == [("ended", (1,))]
    assert "ended 700.0 s ago: ZeroDivisionError: division by zero" in found.lines[0]


def test_the_watchdogs_own_goodbye_hides_nothing() -> None:
    job = Job(data=2)
    job.begin(0, "data", "allreduce")
    for recorder in job.ranks:
        recorder.goodbye("hung: ended by the watchdog")
    assert kinds(job.diagnose()) == [("outside", (1,))]


def test_a_rank_without_a_file() -> None:
    job = Job(data=2)
    job.begin(0, "data", "allreduce")
    flights = job.flights()
    del flights[1]
    found = diagnose(flights, time.time() + 700)
    assert kinds(found) == [("missing", (1,))] and found.hung


def test_a_rank_that_hangs_alone() -> None:
    job = Job(data=1)
    assert kinds(job.diagnose(after=601.0)) == [("outside", (0,))]
    assert not job.diagnose(after=599.0).findings


# --- calls under way ---------------------------------------------------------------------------


def test_what_is_only_under_way_is_no_wait() -> None:
    """A receive posted long before its message comes blames nobody."""
    job = Job(pipe=3)
    job.begin(1, "pipe", "recv", wait=False, peer=2, tag=1)  # for later
    job.begin(1, "pipe", "recv", peer=0, tag=0)
    job.begin(2, "pipe", "recv", peer=1, tag=0)
    found = job.diagnose()
    assert kinds(found) == [("outside", (0,))]
    assert not any("rank 2 never" in line for line in found.lines)


def test_a_sum_that_a_rank_does_not_drive_on() -> None:
    """A call of several steps goes on only where all wait or poll."""
    job = Job(data=2, tensor=2)
    job.begin(1, "data", "allreduce", wait=False)
    job.begin(3, "data", "allreduce")
    job.begin(1, "tensor", "allreduce")
    found = job.diagnose()
    assert found.findings[0].ranks == (0,)
    assert any("rank 3 waits in allreduce #1 over data" in x and "rank 1" in x for x in found.lines)
    job = Job(data=2)
    job.begin(0, "data", "allreduce")
    job.begin(1, "data", "allreduce", wait=False)
    found = job.diagnose()
    assert kinds(found) == [("outside", (1,))]
    assert "entered allreduce #1 over data and does not go on" in found.lines[0]


def test_a_call_never_made_tells_more_than_one_begun() -> None:
    """Rank 2 loops with a sum under way, for which another has waited longer."""
    job = Job(pipe=2, data=2)
    job.begin(2, "replicas", "allreduce", wait=False)
    job.begin(3, "replicas", "allreduce")
    time.sleep(0.01)
    job.begin(0, "pipe", "recv", peer=1)
    job.begin(1, "world", "barrier")
    found = job.diagnose()
    assert kinds(found) == [("outside", (2,))]
    assert found.lines[0].startswith("rank 2 never ")


def test_a_message_that_was_made_and_not_delivered() -> None:
    job = Job(pipe=2)
    job.call([0], "pipe", "send", peer=1, tag=3)
    job.begin(1, "pipe", "recv", peer=0, tag=3)
    job.begin(0, "world", "barrier")
    found = job.diagnose()
    assert ("stuck", (1,)) in kinds(found)


def test_a_call_that_all_have_made() -> None:
    job = Job(data=4)
    for rank in range(4):
        job.begin(rank, "data", "allreduce")
    found = job.diagnose()
    assert kinds(found) == [("stuck", (0, 1, 2, 3))] and found.hung
    assert not job.diagnose(after=1.0).hung


# --- deadlocks ---------------------------------------------------------------------------------


def test_two_ranks_that_call_in_different_orders() -> None:
    job = Job(data=2)
    job.begin(0, "data", "allreduce")
    job.begin(1, "world", "allreduce")
    found = job.diagnose()
    assert kinds(found) == [("deadlock", (0, 1))]
    assert "ranks 0 and 1 wait for each other" in found.lines[0]


def test_the_minority_is_at_fault() -> None:
    job = Job(data=4)
    for rank in (0, 1, 3):
        job.begin(rank, "data", "allreduce")
    job.begin(2, "world", "allreduce")
    found = job.diagnose()
    assert kinds(found) == [("deadlock", (2,))]
    assert calls(found) == ("data", "allreduce", 0)
    assert "rank 2 never entered allreduce #1 over data" in found.lines[0]
    assert "it is in allreduce #1 over world" in found.lines[0]


def steps(job: Job, count: int) -> None:
    """Steps of two ranks: two sums, a message each way, a norm."""
    for number in range(count):
        job.call([0, 1], "data", "allreduce", 100)
        job.call([0, 1], "data", "allreduce", 200)
        job.call([0, 1], "world", "allreduce", 8)
        job.step(number + 1)


@pytest.mark.parametrize("astray", [0, 1])
def test_of_two_the_one_that_does_otherwise_than_before_is_at_fault(astray: int) -> None:
    job = Job(data=2)
    steps(job, 3)
    job.call([0, 1], "data", "allreduce", 100)
    job.begin(1 - astray, "data", "allreduce", 200)
    job.begin(astray, "world", "allreduce", 8)
    found = job.diagnose()
    assert kinds(found) == [("deadlock", (astray,))]
    text = f"rank {astray} left out allreduce #8 over data of 200 bytes"
    assert text in found.lines[0]


def test_a_call_too_many() -> None:
    job = Job(data=2)
    steps(job, 3)
    job.begin(0, "data", "allreduce", 100)
    job.begin(1, "world", "barrier", 0)
    job.begin(1, "data", "allreduce", 100, wait=False)
    found = job.diagnose()
    assert kinds(found) == [("deadlock", (1,))]
    assert "rank 1 made barrier #4 over world of 0 bytes, which it did not" in found.lines[0]


def test_a_step_that_differs_on_purpose_blames_nobody() -> None:
    job = Job(data=2)
    steps(job, 3)
    job.call([0, 1], "batch", "allreduce", 5)  # both
    job.begin(0, "data", "allreduce", 100)
    job.begin(1, "world", "allreduce", 8)
    assert kinds(job.diagnose()) == [("deadlock", (0, 1))]


def test_calls_in_activities_are_no_part_of_a_step() -> None:
    job = Job(data=2)
    steps(job, 3)
    with job.ranks[0].activity("save"):
        job.call([0], "world", "gather", 0)
    job.call([1], "world", "gather", 0)  # without saying so: it departs
    job.begin(0, "data", "allreduce", 100)
    job.begin(1, "world", "allreduce", 8)
    assert kinds(job.diagnose()) == [("deadlock", (1,))]


def test_a_lost_message() -> None:
    job = Job(pipe=2)
    for number in range(3):
        for tag in range(2):
            job.send(0, 1, "pipe", (0, 1), tag)
        job.send(1, 0, "pipe", (1, 0), 5)
        job.step(number + 1)
    job.send(0, 1, "pipe", (0, 1), 0)
    job.begin(1, "pipe", "recv", peer=0, tag=1)
    job.begin(0, "pipe", "recv", peer=1, tag=5)  # has not sent the one with tag 1
    found = job.diagnose()
    assert kinds(found) == [("deadlock", (0,))]
    assert "rank 0 never made send #4 to rank 1 over pipe (tag 1)" in found.lines[0]
    assert "rank 0 left out send #4 to rank 1 over pipe (tag 1)" in found.lines[0]


# --- different calls ---------------------------------------------------------------------------


def test_another_operation() -> None:
    job = Job(data=3)
    job.call(range(3), "data", "allreduce", 100)
    job.begin(0, "data", "allreduce", 64)
    job.begin(1, "data", "broadcast", 64)
    job.begin(2, "data", "allreduce", 64)
    found = job.diagnose()
    assert kinds(found) == [("mismatch", (1,))]
    assert calls(found) == ("data", "broadcast", 1)
    assert "rank 1 made another call #2 over data than ranks 0 and 2" in found.lines[0]


def test_another_size_and_another_root() -> None:
    job = Job(data=2)
    job.begin(0, "data", "allreduce", 64)
    job.begin(1, "data", "allreduce", 80)
    assert kinds(job.diagnose()) == [("mismatch", (0, 1))]
    job = Job(data=3)
    for rank in range(3):
        job.begin(rank, "data", "broadcast", 64, tag=int(rank == 2))
    found = job.diagnose()
    assert kinds(found) == [("mismatch", (2,))]
    assert "from root 1" in found.lines[0]


def test_sizes_that_may_differ() -> None:
    job = Job(expert=2)
    job.begin(0, "expert", "alltoall", 64)
    job.begin(1, "expert", "alltoall", 80)
    assert kinds(job.diagnose()) == [("stuck", (0, 1))]


def test_the_first_difference_counts() -> None:
    """A rank that has left out a call is one ahead from there on."""
    job = Job(data=3)
    for number, size in enumerate((10, 20, 30, 40)):
        ranks = (0, 1) if number == 1 else (0, 1, 2)
        job.call(ranks, "data", "allreduce", size)
    for rank in range(3):
        job.begin(rank, "data", "allreduce", 50)
    found = job.diagnose()
    assert kinds(found)[0] == ("mismatch", (2,))
    assert calls(found) == ("data", "allreduce", 1)


def test_a_message_of_another_size() -> None:
    job = Job(pipe=2)
    job.begin(0, "pipe", "send", 64, wait=False, peer=1, tag=2)
    job.begin(1, "pipe", "recv", 32, peer=0, tag=2)
    found = job.diagnose()
    assert found.findings[0].kind == "mismatch"
    assert "64 bytes" in found.lines[0] and "32 bytes" in found.lines[0]


def test_an_error_of_mpi_in_a_call_that_nobody_waits_in() -> None:
    job = Job(data=2)
    job.begin(0, "data", "allreduce", 64, wait=False)
    job.begin(1, "data", "allreduce", 80, wait=False)
    assert ("mismatch", (0, 1)) in kinds(job.diagnose(after=1.0))


# --- many ranks --------------------------------------------------------------------------------


def test_one_of_a_thousand() -> None:
    job = Job(data=250, tensor=4)
    job.call(range(1000), "tensor", "allreduce")
    for rank in range(1000):
        if rank != 615:
            job.begin(rank, "world", "allreduce")
    flights = job.flights()
    begin = time.perf_counter()
    found = diagnose(flights, time.time() + 700)
    assert time.perf_counter() - begin < 2.0
    assert kinds(found) == [("outside", (615,))]
    assert "ranks 0 to 614 and 616 to 999 have waited" in found.lines[0]


def test_a_thousand_in_many_groups() -> None:
    job = Job(data=125, tensor=8)
    for rank in range(1000):
        if rank % 8:
            job.begin(rank, "tensor", "allreduce")
    flights = job.flights()
    begin = time.perf_counter()
    found = diagnose(flights, time.time() + 700)
    assert time.perf_counter() - begin < 2.0
    assert found.culprits == tuple(range(0, 1000, 8))
    assert any("more ranks wait in" in line for line in found.lines)
    assert len([line for line in found.lines if " wait in " in line]) <= 20


def test_cycles_are_those_of_an_independent_search() -> None:
    draw = random.Random(1)
    for _ in range(200):
        nodes = range(draw.randint(1, 9))
        edges = {
            node: tuple(draw.sample(nodes, draw.randint(0, min(3, len(nodes))))) for node in nodes
        }

        def reach(start: int, edges: dict[int, tuple[int, ...]] = edges) -> set[int]:
            found: set[int] = set()
            left = list(edges[start])
            while left:
                node = left.pop()
                if node not in found:
                    found.add(node)
                    left += edges[node]
            return found

        expected = {frozenset(b for b in nodes if b in reach(a) and a in reach(b)) for a in nodes}
        assert {frozenset(c) for c in cycles(edges)} == {c for c in expected if len(c) > 1}


@pytest.mark.parametrize(
    ("ranks", "text"),
    [
        ([3], "rank 3"),
        ([0, 1], "ranks 0 and 1"),
        ([5, 0, 1, 2], "ranks 0, 1, 2 and 5"),
        (range(1000), "ranks 0 to 999"),
        (range(0, 40, 2), "ranks 0, 2, 4, 6, 8, 10, 12, 14 and 12 more"),
    ],
)
def test_names_of_ranks(ranks: Any, text: str) -> None:
    assert name_ranks(ranks) == text
