"""What a checkpoint costs: at once, beside training, and against a plain write of the same bytes.

    mpirun -n 2 python benchmarks/checkpoint.py --write

Three ways in turn, on every rank the same number of bytes: a plain file (written, fsynced, its
sha256 taken from memory), a synchronous save, and an asynchronous one beside a loop of matrix
products that stands for training. The loop runs without a save as often, so that what the writing
takes from it is seen too, and not only how long it is kept. A synchronous save reads back what it
has written; `checkpoint.verify = false` is measured as well.
"""

from __future__ import annotations

import argparse
import hashlib
import os
import shutil
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

from machine import describe, write_result

from mpillm.parallel.launch import choose_threads, keep_freed_memory, start

ROOT = Path(__file__).resolve().parent.parent
GOAL = 0.05
FACTS: dict[str, Any] = {"samples": 0, "layout": {}, "settings": {}}
ARRAYS = 24


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--mib", type=int, default=256, help="MiB of state a rank")
    parser.add_argument("--rounds", type=int, default=8, help="of each, the first left out")
    parser.add_argument("--step", type=float, default=1.0, help="seconds of a step of the loop")
    parser.add_argument("--folder", type=Path, default=ROOT / "runs", help="on the disk to measure")
    parser.add_argument("--write", action="store_true", help="keep the result")
    options = parser.parse_args()
    comm = start()
    threads = choose_threads(0, comm)
    keep_freed_memory()
    if comm.rank == 0:
        options.folder.mkdir(parents=True, exist_ok=True)
    made = tempfile.mkdtemp(dir=options.folder) if comm.rank == 0 else None
    folder = Path(comm.bcast(made))
    try:
        times = measure(comm, folder, options)
    finally:
        comm.Barrier()
        if comm.rank == 0:
            shutil.rmtree(folder)
    if comm.rank == 0:
        report(times, comm.size, threads, options)
    return 0


def measure(comm: Any, folder: Path, options: argparse.Namespace) -> dict[str, list[float]]:
    """Seconds of the slowest rank, by what was done, a value a round."""
    import numpy as np
    from msgspec.structs import replace

    from mpillm.array.backend import Backend
    from mpillm.checkpoint.saver import Saver
    from mpillm.checkpoint.settings import CheckpointSettings
    from mpillm.checkpoint.shard_file import Item
    from mpillm.parallel.mesh import Mesh, fit
    from mpillm.parallel.recorder import Recorder
    from mpillm.parallel.settings import ParallelSettings
    from mpillm.parallel.shard import Shard

    layout = fit(ParallelSettings(), comm.size)
    mesh = Mesh(comm, layout, Backend.create("numpy"), Recorder())
    rows = options.mib * 2**20 // ARRAYS // 4 // 1024
    shape = (comm.size * rows, 1024)
    shard = Shard.split(shape, 0, comm.size, comm.rank)
    random = np.random.default_rng(comm.rank)
    arrays = [random.random((rows, 1024), dtype=np.float32) for _ in range(ARRAYS)]
    items = [Item("parameter", f"w{i}", shard, array) for i, array in enumerate(arrays)]
    settings = CheckpointSettings(keep=1)
    savers = {
        verify: Saver(folder, mesh.world, mesh.node, replace(settings, verify=verify))
        for verify in (True, False)
    }
    beside = Saver(folder, mesh.world, mesh.node, settings)
    matrix = random.random((512, 512), dtype=np.float32)
    products = count_products(matrix, options.step)
    step = 0

    def plain() -> None:
        path = folder / f"plain-{comm.rank}"
        handle = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o666)
        digest = hashlib.sha256()
        for array in arrays:
            digest.update(array.data)
            raw = memoryview(array).cast("B")
            while raw:
                raw = raw[os.write(handle, raw) :]
        os.fsync(handle)
        os.close(handle)

    def save(verify: bool) -> None:
        savers[verify].save(step, items, **FACTS)

    def train(steps: int) -> None:
        for _ in range(steps):
            for _ in range(products):
                np.matmul(matrix, matrix)
            beside.copied()
            # As the ranks of a run agree each step; all have come to the same point.
            if comm.allreduce(beside.written) == comm.size:
                beside.commit()

    times: dict[str, list[float]] = {}

    def timed(what: str, work: Callable[[], None]) -> float:
        comm.Barrier()
        begin = time.perf_counter()
        work()
        comm.Barrier()
        return note(what, time.perf_counter() - begin)

    def note(what: str, seconds: float) -> float:
        slowest = max(comm.allgather(seconds))
        times.setdefault(what, []).append(slowest)
        return slowest

    def loop(steps: int, saving: bool) -> None:
        if saving:
            beside.begin(step, items, **FACTS)
        train(steps)

    for turn in range(options.rounds):
        timed("plain", plain)
        (folder / f"plain-{comm.rank}").unlink()
        ways = [(True, "save"), (False, "save unverified")]
        for verify, what in ways if turn % 2 else ways[::-1]:
            step += 1
            timed(what, partial(save, verify))
        # As many steps as the writing may take, so that all of it falls among them.
        steps = 2 + int(4 * times["save"][-1] / options.step)
        step += 1
        for saving in (False, True) if turn % 2 else (True, False):
            timed("loop with save" if saving else "loop", partial(loop, steps, saving))
            if saving:
                note("stall", beside.stall_seconds)
                beside.finish()
    mesh.free()
    return {what: values[1:] for what, values in times.items()}


def count_products(matrix: Any, seconds: float) -> int:
    """How many products take so many seconds."""
    import numpy as np

    begin, count = time.perf_counter(), 0
    while time.perf_counter() - begin < seconds:
        np.matmul(matrix, matrix)
        count += 1
    return max(count, 1)


def report(
    times: dict[str, list[float]], ranks: int, threads: int, options: argparse.Namespace
) -> None:
    """The result as Markdown."""

    def spread(values: list[float], unit: str = "s") -> str:
        return f"{statistics.median(values):.2f} {unit} ({min(values):.2f} to {max(values):.2f})"

    def ratio(what: str, to: str) -> float:
        pairs = zip(times[what], times[to], strict=True)
        return statistics.median(a / b for a, b in pairs)

    total = options.mib * ranks
    median = {what: statistics.median(values) for what, values in times.items()}
    slower = [a - b for a, b in zip(times["loop with save"], times["loop"], strict=True)]
    stalls = [1000 * seconds for seconds in times["stall"]]
    rows = [
        ("plain file, fsync, sha256", "plain"),
        ("synchronous save", "save"),
        ("synchronous save, verify = false", "save unverified"),
    ]
    lines = [
        "# Saving a checkpoint",
        "",
        f"`mpirun -n {ranks} python benchmarks/checkpoint.py --mib {options.mib} "
        f"--rounds {options.rounds}`",
        "",
        *describe(threads, "h5py", "mpi4py"),
        f"- {options.mib} MiB of state a rank, {total} MiB in all; {options.rounds - 1} rounds, in "
        f"turn; medians (and ranges); a step of the loop takes about {options.step:g} s",
        "",
        "| | seconds | MiB/s | times plain |",
        "|---|---|---|---|",
        *(
            f"| {name} | {spread(times[what], '')} | {total / median[what]:,.0f} | "
            f"{ratio(what, 'plain'):.2f} |"
            for name, what in rows
        ),
        "",
        f"An asynchronous save keeps training for {spread(stalls, 'ms')}, "
        f"{ratio('stall', 'save'):.1%} of a synchronous save (goal: below {GOAL:.0%}).",
        "",
        f"While it is written, training is slower: the same steps take {spread(slower)} longer, of "
        f"{median['loop']:.2f} s, which is {statistics.median(slower) / median['save']:.0%} of a "
        "synchronous save. Copying, hashing and comparing need a core, and here all cores compute.",
        "",
        f"Verified saves write {median['plain'] / median['save']:.0%} of what a plain write of the "
        "same bytes writes in the same time; they hash them twice and read them back.",
    ]
    if options.write:
        write_result(ROOT / "benchmarks" / "results", "checkpoint", lines)
    else:
        print("\n".join(lines), flush=True)


if __name__ == "__main__":
    sys.exit(main())
