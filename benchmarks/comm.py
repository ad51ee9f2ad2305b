"""What the calls of a Group take, against the MPI library's bare calls and against memory itself.

    mpirun -n 2 python benchmarks/comm.py

Every call of a Group, blocking, for float32 arrays of 1 KiB to 64 MiB in the memory of one rank,
and the call of the MPI library that does the same, in turn. A call's time is that of the rank that
takes longest, from a barrier on. Memory bandwidth is measured between the calls: each rank copies
an array far larger than its cache, all ranks at once. The last column compares with that: how often
the array could have been copied in the time that the Group took.

"shared" are arrays in memory that the ranks of a node share (`Group.zeros`), where gradients lie.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

from machine import describe, write_result

from mpillm.parallel.launch import choose_threads, keep_freed_memory, mpi_library, start

ROOT = Path(__file__).resolve().parent.parent
SIZES = [1 << shift for shift in (10, 14, 18, 20, 22, 24, 26)]
REDUCTIONS: tuple[Literal["ordered", "library"], ...] = ("ordered", "library")
COPIED = 1 << 26  # bytes of the array that shows the bandwidth

Run = Callable[[], Any]


@dataclass
class Row:
    """One call at one size: the two contestants, and the seconds that they took."""

    name: str
    nbytes: int
    group: Run
    bare: Run
    took: dict[str, list[float]] = field(default_factory=lambda: {"group": [], "bare": []})


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--seconds", type=float, default=60.0, help="about how long to measure")
    parser.add_argument("--only", default="", help="calls whose name contains this")
    parser.add_argument("--write", action="store_true", help="keep the result")
    options = parser.parse_args()
    comm = start()
    threads = choose_threads(0, comm)
    keep_freed_memory()
    copies: list[float] = []
    rows = []
    for nbytes in SIZES:
        bench = Bench(comm, nbytes)
        copies += bench.copy()
        chosen = {name: runs for name, runs in calls(bench).items() if options.only in name}
        for name, (group, bare) in chosen.items():
            rows.append(Row(name, nbytes, group, bare))
            bench.alternate(rows[-1], options.seconds / len(chosen) / len(SIZES))
        bench.free()
    if comm.rank == 0:
        report(rows, copies, comm.size, threads, options.write)
    return 0


class Bench:
    """Groups and arrays for one size."""

    def __init__(self, comm: Any, nbytes: int) -> None:
        import numpy as np

        from mpillm.array.backend import Backend
        from mpillm.parallel.group import Group
        from mpillm.parallel.recorder import Recorder
        from mpillm.parallel.shard import split_range

        self.comm, self.nbytes = comm, nbytes
        backend = Backend.create("numpy")
        self.ordered, self.library = (
            Group(comm.Dup(), "world", backend, Recorder(), reduction) for reduction in REDUCTIONS
        )
        # Zeros, as sums are made in place, again and again; filled, so that no page is missing.
        size = nbytes // 4
        self.x, self.y = np.empty(size, "float32"), np.empty(size, "float32")
        self.x.fill(0.0)
        self.y.fill(0.0)
        self.shared = self.ordered.zeros((size,), "float32")
        cuts = [split_range(size, comm.size, rank) for rank in range(comm.size)]
        self.shares = [stop - start for start, stop in cuts]
        self.part = slice(*cuts[comm.rank])

    def free(self) -> None:
        """Give back communicators and shared memory."""
        del self.shared
        self.ordered.free()
        self.library.free()

    def copy(self) -> list[float]:
        """Bytes that a rank copies in a second while all others do."""
        import numpy as np

        a, b = np.ones(COPIED // 8), np.zeros(COPIED // 8)
        took = [self._time(lambda: np.copyto(b, a)) for _ in range(5)]
        return [COPIED / seconds for seconds in took[1:]]

    def alternate(self, row: Row, seconds: float) -> None:
        """Take turns for about so many seconds."""
        runs = {"group": row.group, "bare": row.bare}
        for run in runs.values():
            self._time(run)  # makes connections and buffers
        once = sum(self._time(run) for run in runs.values())
        turns = self.comm.bcast(min(max(math.ceil(seconds / once), 5), 200))
        for turn in range(turns):
            for name in runs if turn % 2 else reversed(runs):
                row.took[name].append(self._time(runs[name]))

    def _time(self, run: Run) -> float:
        """Seconds of the slowest rank. Small calls are repeated: clocks and barriers are slow."""
        from mpi4py import MPI

        repeats = 10 if self.nbytes <= 1 << 14 else 1
        self.comm.Barrier()
        begin = time.perf_counter()
        for _ in range(repeats):
            run()
        took = (time.perf_counter() - begin) / repeats
        return float(self.comm.allreduce(took, MPI.MAX))


# -- the calls -------------------------------------------------------------------------------------


def calls(b: Bench) -> dict[str, tuple[Run, Run]]:
    """By name: the Group's call, and the library's that does the same."""
    from mpi4py import MPI

    ordered, library, comm, x, y, shared = b.ordered, b.library, b.comm, b.x, b.y, b.shared
    part, shares = b.part, b.shares
    equal = [len(x) // comm.size] * comm.size
    send, receive = x[: sum(equal)], y[: sum(equal)]
    reduce_scatter = partial(comm.Reduce_scatter, x, y[part], shares)
    allreduce = partial(comm.Allreduce, MPI.IN_PLACE, x)
    allgather = partial(comm.Allgatherv, x[part], [y, shares])
    return {
        "allreduce, ordered": (partial(ordered.allreduce, x), allreduce),
        "allreduce, ordered, shared": (partial(ordered.allreduce, shared), allreduce),
        "allreduce, library": (partial(library.allreduce, x), allreduce),
        "reduce_scatter, ordered": (partial(ordered.reduce_scatter, x, y[part]), reduce_scatter),
        "reduce_scatter, ordered, shared": (
            partial(ordered.reduce_scatter, shared, shared[part]),
            reduce_scatter,
        ),
        "allgather": (partial(ordered.allgather, x[part], y), allgather),
        "allgather, shared": (partial(ordered.allgather, shared[part], shared), allgather),
        "alltoall": (
            partial(ordered.alltoall, send, equal, receive, equal),
            partial(comm.Alltoall, send, receive),
        ),
        "broadcast": (partial(ordered.broadcast, x), partial(comm.Bcast, x)),
        "send, recv": (
            partial(message, comm, ordered.send, ordered.recv, x),
            partial(message, comm, comm.Send, comm.Recv, x),
        ),
    }


def message(comm: Any, send: Callable[..., Any], recv: Callable[..., Any], x: Any) -> None:
    """A message from each even rank to the next one."""
    peer = comm.rank ^ 1
    if peer < comm.size:
        (recv if comm.rank % 2 else send)(x, peer)


# -- the table -------------------------------------------------------------------------------------


def report(rows: list[Row], copies: list[float], ranks: int, threads: int, write: bool) -> None:
    """Print what was found, and keep it if wanted."""
    bandwidth = statistics.median(copies)
    lines = [
        "# Calls of a Group",
        "",
        f"`mpirun -n {ranks} python benchmarks/comm.py`",
        "",
        *describe(threads, "mpi4py"),
        f"- {mpi_library()}",
        f"- copying {COPIED >> 20} MiB on {ranks} ranks at once: {1e-9 * bandwidth:.1f} GB "
        f"of array a second and rank ({1e-9 * min(copies):.1f} to {1e-9 * max(copies):.1f})",
        "",
        "Microseconds: median (least). Ratio: Group over MPI, medians. Copies: how often each rank "
        "could have copied the array in that time.",
        "",
        "| call | array | Group | MPI | ratio | copies |",
        "|---|---|---|---|---|---|",
    ]
    names = list(dict.fromkeys(row.name for row in rows))
    for row in sorted(rows, key=lambda row: names.index(row.name)):  # stable: sizes ascend
        ours, bare = (row.took[name] for name in ("group", "bare"))
        ratio = statistics.median(ours) / statistics.median(bare)
        copied = statistics.median(ours) * bandwidth / row.nbytes
        lines.append(
            f"| {row.name} | {size_of(row.nbytes)} | {times(ours)} | {times(bare)} | {ratio:.2f} "
            f"| {copied:.1f} |"
        )
    if write:
        library = "openmpi" if "Open MPI" in mpi_library() else "mpich"
        write_result(ROOT / "benchmarks" / "results", f"comm-{library}-{ranks}", lines)
    else:
        print("\n".join(lines))


def times(seconds: list[float]) -> str:
    """Median and least, in microseconds."""
    return f"{1e6 * statistics.median(seconds):,.0f} ({1e6 * min(seconds):,.0f})"


def size_of(nbytes: int) -> str:
    """Bytes in words."""
    return f"{nbytes >> 20} MiB" if nbytes >> 20 else f"{nbytes >> 10} KiB"


if __name__ == "__main__":
    sys.exit(main())
