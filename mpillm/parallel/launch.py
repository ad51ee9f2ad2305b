"""Starting and ending a job: MPI, the abort hook, agreement on users' mistakes, thread counts.

NumPy is not imported here, so that `choose_threads` can still tell its BLAS how many threads to
use; mpi4py is imported by `start`, so that commands without MPI run where MPI does not start.

How a job ends:

- An exception that nobody expected, on any rank: its traceback and its rank are printed and `Abort`
  ends the other ranks, which would otherwise wait in MPI for ever.
- A `UserError` inside `agree`: every rank raises the same error.
- A `UserError` that leaves the program on every rank: one line, printed once, exit code 2.
- A `UserError` that leaves the program on some ranks only: each of them waits a moment for the
  others, prints its line and aborts the job with code 2.
"""

from __future__ import annotations

import contextlib
import ctypes
import os
import sys
import threading
import time
import traceback
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any

from mpillm.errors import EXIT_USER_ERROR, UserError

if TYPE_CHECKING:
    from mpi4py import MPI

    Comm = MPI.Intracomm  # for annotations elsewhere, where mpi4py is not to be imported

__all__ = [
    "abort",
    "agree",
    "choose_threads",
    "core_share",
    "end_in_error",
    "end_interrupted",
    "keep_freed_memory",
    "mpi_library",
    "rank_hint",
    "start",
    "wait_idle",
]

# Seconds that a rank with a user's mistake waits for the other ranks to report it too.
_PATIENCE = 2.0

# Seconds for a launcher to pass a rank's last words on: one that ends a job drops what it has not
# read yet.
_LAST_WORDS = 0.2

_RANK_VARIABLES = ("PMI_RANK", "PMIX_RANK", "OMPI_COMM_WORLD_RANK", "MV2_COMM_WORLD_RANK")

_THREAD_VARIABLES = (
    "OMP_NUM_THREADS",
    "OPENBLAS_NUM_THREADS",
    "MKL_NUM_THREADS",
    "BLIS_NUM_THREADS",
    "NUMEXPR_NUM_THREADS",
    "VECLIB_MAXIMUM_THREADS",
)


# glibc's malloc.h
_M_TRIM_THRESHOLD = -1
_M_MMAP_THRESHOLD = -3


# --- starting ------------------------------------------------------------------------------------


def start() -> Comm:
    """Initialize MPI, install the abort hook, return a communicator of all ranks.

    The communicator is a duplicate of MPI's world. The world itself stays silent while a job runs
    well, so that `end_in_error` can use it whatever the other ranks are waiting in. Collective.
    """
    # Open MPI's other way to make windows is not for shared memory, and says so on every one made.
    os.environ.setdefault("OMPI_MCA_osc", "^ucx")
    from mpi4py import MPI

    world = MPI.COMM_WORLD
    _abort_on_exceptions(world)
    return world.Dup()


def _abort_on_exceptions(world: Comm) -> None:
    """From now on an uncaught exception, in any thread, ends the whole job."""
    name = f"rank {world.rank} of {world.size} ({os.uname().nodename})"

    def end(
        kind: type[BaseException], value: BaseException | None, trace: TracebackType | None
    ) -> None:
        text = "".join(traceback.format_exception(kind, value, trace))
        _print_error(f"{name}: {text}")
        if world.size > 1:
            time.sleep(_LAST_WORDS)
            world.Abort(1)

    def end_thread(args: threading.ExceptHookArgs) -> None:
        if args.exc_type is not SystemExit:
            end(args.exc_type, args.exc_value, args.exc_traceback)

    sys.excepthook = end
    threading.excepthook = end_thread


def rank_hint(environment: Mapping[str, str] = os.environ) -> int:
    """This process's rank as its launcher tells it, without MPI; 0 when there is no launcher."""
    # The shell of a Slurm batch script has a SLURM_PROCID too; only a job step has ranks.
    slurm = ("SLURM_PROCID",) if "SLURM_STEP_ID" in environment else ()
    for name in _RANK_VARIABLES + slurm:
        if environment.get(name, "").isdigit():
            return int(environment[name])
    return 0


def mpi_library() -> str:
    """Name and version of the MPI library, in one line."""
    from mpi4py import MPI

    return " ".join(MPI.Get_library_version().split("\n")[0].split("\0")[0].split())


def wait_idle(comm: Comm) -> None:
    """Wait for all ranks of `comm`, asleep: a barrier would spin on cores that others work on."""
    arrived = comm.Ibarrier()
    while not arrived.Test():
        time.sleep(0.002)


# --- ending --------------------------------------------------------------------------------------


@contextlib.contextmanager
def agree(comm: Comm) -> Iterator[None]:
    """Turn a `UserError` of some ranks inside the block into one that all ranks raise.

    Kind and message are those of the lowest rank with an error. Collective over `comm`, and so
    nothing in the block may be: a rank with a mistake waits at its end for all others. Other
    exceptions pass through: the abort hook ends the ranks that wait here.
    """
    mistake: tuple[type[UserError], str] | None = None
    try:
        yield
    except UserError as error:
        mistake = type(error), str(error)
    mistakes: list[tuple[type[UserError], str] | None] = comm.allgather(mistake)
    failed = [(rank, found) for rank, found in enumerate(mistakes) if found is not None]
    if failed:
        rank, (kind, text) = failed[0]
        seen = f" (seen on rank {rank})" if len(failed) < len(mistakes) else ""
        raise kind(text + seen)


def end_in_error(error: UserError) -> int:
    """Print a `UserError` that is about to end the program; return the exit code.

    Where MPI runs, only rank 0 prints when every rank is here. When some ranks do not come, this
    rank alone knows the mistake: it prints and aborts the job.
    """
    line = f"mpillm: error: {error}\n"
    world = _running_world()
    if world is None:
        if rank_hint() == 0:
            _print_error(line)
        else:
            time.sleep(_PATIENCE)  # a launcher may end the job at the first rank that exits
    elif world.size == 1:
        _print_error(line)
    elif _all_arrive(world):
        if world.rank == 0:
            _print_error(line)
            time.sleep(_LAST_WORDS)
        world.Barrier()  # as above: nobody exits before the line is out
    else:
        _print_error(line)
        time.sleep(_LAST_WORDS)
        world.Abort(EXIT_USER_ERROR)
    return EXIT_USER_ERROR


def abort(code: int) -> None:
    """End all ranks of the job at once, from any thread; `code` becomes the job's exit code."""
    world = _running_world()
    if world is not None:
        world.Abort(code)
    os._exit(code)


def end_interrupted() -> int:
    """End the program after Ctrl-C; return the exit code, 130 as shells have it."""
    code = 130
    world = _running_world()
    if world is not None and world.size > 1:
        world.Abort(code)
    return code


def _running_world() -> Comm | None:
    """MPI's world where MPI runs in this process; nothing is imported or started."""
    module: Any = sys.modules.get("mpi4py.MPI")
    if module is None or not module.Is_initialized() or module.Is_finalized():
        return None
    world: Comm = module.COMM_WORLD
    return world


def _all_arrive(world: Comm) -> bool:
    """Whether every rank calls this within a moment."""
    request = world.Ibarrier()
    deadline = time.monotonic() + _PATIENCE
    while not request.Test():
        if time.monotonic() > deadline:
            return False
        time.sleep(0.005)
    return True


def _print_error(text: str) -> None:
    """Write to standard error at once, in one piece, so that ranks do not mix their lines."""
    with contextlib.suppress(OSError):  # a launcher that is gone must not keep a rank from its end
        sys.stdout.flush()
        sys.stderr.write(text)
        sys.stderr.flush()


# --- threads -------------------------------------------------------------------------------------


def choose_threads(threads: int, comm: Comm) -> int:
    """Tell BLAS to use `threads` threads; 0: this rank's fair share of the cores. Collective.

    Takes effect through environment variables, hence only before NumPy is imported: a program that
    has imported it already made its own choice. For 0, so did a user who set OMP_NUM_THREADS or
    one of its relatives. Returns the number chosen, the same on every rank.
    """
    if threads == 0:
        preset = [os.environ.get(name, "") for name in _THREAD_VARIABLES]
        counts = [int(text) for text in preset if text.isdigit() and int(text) > 0]
        threads = counts[0] if counts else _fair_share(comm)
    threads = min(comm.allgather(threads))
    if "numpy" not in sys.modules:
        os.environ.update(dict.fromkeys(_THREAD_VARIABLES, str(threads)))
    return threads


def keep_freed_memory() -> None:
    """Tell the C library to keep what is freed, up to a GiB, for the next step's temporaries.

    By default glibc gives every large array back to the system, and the next one faults its pages
    in again. For the whole process; without effect under another C library.
    """
    mallopt = getattr(ctypes.CDLL(None), "mallopt", None)
    if mallopt is not None:
        for parameter in (_M_MMAP_THRESHOLD, _M_TRIM_THRESHOLD):
            mallopt(parameter, 1 << 30)


def _node(comm: Comm) -> MPI.Comm:
    """The ranks of `comm` on this rank's node."""
    from mpi4py import MPI

    return comm.Split_type(MPI.COMM_TYPE_SHARED)


def core_share(comm: Comm) -> float:
    """Cores for this rank, a part of one where ranks are more: each is shared by those on it.

    Collective.
    """
    node = _node(comm)
    cores: list[set[int]] = node.allgather(_own_cores())
    mine = cores[node.rank]
    share = sum(1 / sum(core in other for other in cores) for core in mine)
    share = min(share, _core_quota() / node.size)
    node.Free()
    return share


def _fair_share(comm: Comm) -> int:
    """Whole cores for this rank, at least 1."""
    return max(1, int(core_share(comm) + 1e-6))  # six times one sixth is a little less than 1


def _own_cores() -> set[int]:
    """The cores that this process may run on."""
    if hasattr(os, "sched_getaffinity"):
        return set(os.sched_getaffinity(0))
    return set(range(os.cpu_count() or 1))


def _core_quota(file: Path = Path("/sys/fs/cgroup/cpu.max")) -> float:
    """Cores' worth of time that a container grants (cgroup version 2); infinite without a limit."""
    try:
        quota, period = file.read_text().split()
        return float(quota) / float(period)
    except (OSError, ValueError):  # no such file, or "max 100000"
        return float("inf")
