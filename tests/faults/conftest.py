"""The frame of the fault campaign: `--long`, and the table that is printed at its end.

Every file here has a short form, which `make test` runs in seconds, and a long one:
`pytest tests/faults --long`, or `make test-faults` for all of it, under both MPI wheels.
"""

from __future__ import annotations

from collections.abc import Generator, Iterator
from typing import Any

import pytest
from fault_jobs import Mpirun
from fault_table import Table, render

_TABLE = pytest.StashKey[Table]()
_BEFORE = pytest.StashKey[int]()


def _table(config: pytest.Config) -> Table:
    """The session's table, made when it is first asked for."""
    if _TABLE not in config.stash:
        config.stash[_TABLE] = Table(config.getoption("--fault-table"))
    return config.stash[_TABLE]


@pytest.fixture(scope="session")
def long(request: pytest.FixtureRequest) -> bool:
    """Whether this is the long form of the campaign."""
    return bool(request.config.getoption("--long"))


@pytest.fixture(scope="session")
def table(request: pytest.FixtureRequest) -> Table:
    """Where a test notes what came of its faults: `table.row(what, count, result, ok)`."""
    return _table(request.config)


@pytest.fixture
def start(mpirun_program: str, environment: dict[str, str]) -> Iterator[Mpirun]:
    """Starts jobs with faults in them under mpirun; nothing of them outlives the test."""
    mpirun = Mpirun(mpirun_program, environment)
    yield mpirun
    mpirun.close()


def pytest_runtest_setup(item: pytest.Item) -> None:
    """Note how many rows there were before this test."""
    item.stash[_BEFORE] = len(_table(item.config).rows)


@pytest.hookimpl(hookwrapper=True)
def pytest_runtest_makereport(
    item: pytest.Item, call: pytest.CallInfo[None]
) -> Generator[None, Any, None]:
    """Make a bad row for a test that fails without having made one."""
    report = (yield).get_result()
    table = _table(item.config)
    if report.failed and all(row.ok for row in table.rows[item.stash[_BEFORE] :]):
        reason = call.excinfo.exconly().splitlines()[0] if call.excinfo else "failed"
        table.add(f"{item.path.stem}::{item.name}", 0, reason[:100], False)


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Print the table, in every form, whether tests failed or not."""
    rows = _table(terminalreporter.config).rows
    if rows:
        terminalreporter.section("faults")
        for line in render(rows):
            terminalreporter.write_line(line)
