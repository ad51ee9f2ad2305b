"""Tests for any number of ranks: `mpirun -n N python -m pytest tests/parallel`.

Every rank runs every test. Rank 0 prints the report. A test that fails or hangs on one rank ends
them all at once and says which test and which rank. Without mpirun this is a world of one.
"""

from __future__ import annotations

import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator
from typing import TYPE_CHECKING, TextIO

import pytest

from mpillm.parallel.launch import rank_hint, start

if TYPE_CHECKING:
    from mpillm.parallel.launch import Comm

# Seconds that one test may take, far more than any needs.
TIME_LIMIT = float(os.environ.get("MPILLM_TEST_SECONDS", "120"))

_WORLD: pytest.StashKey[Comm] = pytest.StashKey()
_STDERR: pytest.StashKey[TextIO] = pytest.StashKey()


@pytest.hookimpl(tryfirst=True)
def pytest_configure(config: pytest.Config) -> None:
    """Start MPI; give the ranks but the first a reporter that writes to nowhere."""
    config.stash[_STDERR] = os.fdopen(os.dup(2), "w")  # past the capture, which is off just now
    if rank_hint() > 0:
        sys.stdout = open(os.devnull, "w")  # noqa: SIM115 - the reporter, made next, keeps what it finds here
    config.stash[_WORLD] = start()


@pytest.fixture(scope="session")
def world(pytestconfig: pytest.Config) -> Comm:
    """The communicator of all ranks."""
    return pytestconfig.stash[_WORLD]


@pytest.fixture(autouse=True)
def _together(request: pytest.FixtureRequest, world: Comm) -> Iterator[None]:
    """Begin each test together, so that the test that hangs is the one that is named."""

    main = threading.get_ident()

    def give_up() -> None:
        stack = traceback.format_stack(sys._current_frames()[main])
        place = "".join(line for line in stack if "site-packages" not in line)
        text = f"{request.node.nodeid} took more than {TIME_LIMIT:g} s; this rank is at\n{place}"
        _end(request.config, text)

    timer = threading.Timer(TIME_LIMIT, give_up)
    timer.daemon = True
    timer.start()
    world.Barrier()
    yield
    timer.cancel()


def pytest_exception_interact(
    node: pytest.Item | pytest.Collector, report: pytest.TestReport | pytest.CollectReport
) -> None:
    """A failure on this rank: the others may wait for it in MPI for ever."""
    if node.config.stash[_WORLD].size > 1:
        _end(node.config, f"{node.nodeid} failed\n{report.longreprtext}")


def pytest_sessionfinish(session: pytest.Session, exitstatus: int) -> None:
    """Whatever else ends pytest early on this rank."""
    if session.config.stash[_WORLD].size > 1 and exitstatus not in (
        pytest.ExitCode.OK,
        pytest.ExitCode.NO_TESTS_COLLECTED,
    ):
        _end(session.config, f"pytest ended with code {int(exitstatus)}")


def _end(config: pytest.Config, text: str) -> None:
    """Print why, past pytest's capture, and end all ranks."""
    world = config.stash[_WORLD]
    print(f"rank {world.rank} of {world.size}: {text}", file=config.stash[_STDERR], flush=True)
    time.sleep(0.2)  # for mpirun to pass it on
    world.Abort(1)
