"""How much of the gradient reduction is hidden behind the backward pass.

    mpirun -n 2 python benchmarks/overlap.py

Two trainers of the `baby` setting (6 layers, 6 heads, 384 wide, sequences of 256 characters) at
data 2, one with `parallel.overlap` and one without, do their steps in turn. What is not hidden is
the time from the moment when the last rank has ended its backward pass to that when the last rank
has all sums; the clocks of a node's processes are the same. That is compared with the same time
without overlap, and the length of whole steps with that of steps without overlap: what moves
between the products could slow them.

--thread tries the other way to drive sums on: a thread that polls while the main one computes.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any

from machine import describe, write_result

from mpillm.parallel.launch import choose_threads, keep_freed_memory, start
from mpillm.parallel.settings import ParallelSettings

ROOT = Path(__file__).resolve().parent.parent
GOAL = 0.6


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=12, help="steps of each, the first left out")
    parser.add_argument("--rows", type=int, default=16, help="sequences a step, over both ranks")
    parser.add_argument("--micros", type=int, default=1, help="micro-batches a rank")
    parser.add_argument("--thread", action="store_true", help="poll from a thread")
    parser.add_argument("--write", action="store_true", help="keep the result")
    options = parser.parse_args()
    comm = start()
    threads = choose_threads(0, comm)
    keep_freed_memory()
    trainers = {name: make(comm, name == "on", options) for name in ("off", "on")}
    if options.thread:
        Poller(trainers["on"]).start()
    reduced: dict[str, list[float]] = {name: [] for name in trainers}
    steps: dict[str, list[float]] = {name: [] for name in trainers}
    for step in range(options.steps):
        for name in ("off", "on") if step % 2 else ("on", "off"):
            comm.Barrier()
            times = watch(trainers[name])
            result = trainers[name].step()
            ends = comm.allgather(times)
            if step:
                last_pass, last_sum = (max(end[i] for end in ends) for i in range(2))
                reduced[name].append(last_sum - last_pass)
                steps[name].append(max(comm.allgather(result.seconds)))
    if comm.rank == 0:
        report(reduced, steps, threads, options)
    return 0


def make(comm: Any, overlap: bool, options: argparse.Namespace) -> Any:
    """A trainer at data = all ranks."""
    import numpy as np

    from mpillm.array.backend import Backend
    from mpillm.data.loader import Loader
    from mpillm.models.gpt2 import Settings
    from mpillm.models.settings import build_model
    from mpillm.parallel.mesh import Mesh, fit
    from mpillm.parallel.recorder import Recorder
    from mpillm.training.settings import OptimizerSettings, TrainSettings
    from mpillm.training.trainer import Trainer, resolve_batch

    backend = Backend.create("numpy")
    layout = fit(ParallelSettings(overlap=overlap), comm.size)
    mesh = Mesh(comm, layout, backend, Recorder())
    rows = options.rows // comm.size // options.micros
    train = TrainSettings(
        batch_size=options.rows, micro_batch_size=rows, sequence_length=256, steps=1000
    )
    train = resolve_batch(train, layout)
    text = np.random.default_rng(0).integers(0, 65, 100_000).astype(np.uint16)
    loader = Loader(text, 256, train.batch_size, train.micro_batch_size, train.seed)
    model = Settings(layers=6, heads=6, width=384, vocabulary=65, context=256)
    return Trainer(build_model(model), train, OptimizerSettings(), mesh, backend, loader)


def watch(trainer: Any) -> list[float]:
    """When the next step begins to wait for sums, and when it has them, by `time.perf_counter`."""
    gradients, times = trainer.gradients, list[float]()
    reduce = type(gradients).reduce

    def timed() -> None:
        times.append(time.perf_counter())
        reduce(gradients)
        times.append(time.perf_counter())

    gradients.reduce = timed
    return times


class Poller(threading.Thread):
    """Drives the sums of a trainer's gradients from beside its computations."""

    def __init__(self, trainer: Any) -> None:
        super().__init__(daemon=True)
        self._progress = trainer.progress
        self._lock = threading.Lock()
        for name in ("poll", "wait", "watch"):
            setattr(self._progress, name, self._locked(getattr(self._progress, name)))

    def _locked(self, call: Any) -> Any:
        def locked(*arguments: Any) -> Any:
            with self._lock:
                return call(*arguments)

        return locked

    def run(self) -> None:
        """Poll every millisecond."""
        while True:
            time.sleep(0.001)
            self._progress.poll()


def report(
    reduced: dict[str, list[float]],
    steps: dict[str, list[float]],
    threads: int,
    options: argparse.Namespace,
) -> None:
    """Print what was found, and keep it if wanted."""
    ratios = sorted(on / off for on, off in zip(reduced["on"], reduced["off"], strict=True))
    lengths = sorted(on / off for on, off in zip(steps["on"], steps["off"], strict=True))
    hidden = 1.0 - statistics.median(reduced["on"]) / statistics.median(reduced["off"])
    rows = [
        f"| {name} | {1e3 * statistics.median(reduced[name]):.1f} "
        f"({1e3 * min(reduced[name]):.1f} to {1e3 * max(reduced[name]):.1f}) "
        f"| {statistics.median(steps[name]):.3f} "
        f"({min(steps[name]):.3f} to {max(steps[name]):.3f}) |"
        for name in ("off", "on")
    ]
    lines = [
        "# Overlap of gradient reduction and backward pass",
        "",
        "`mpirun -n 2 python benchmarks/overlap.py`"
        + (f", {options.micros} micro-batches a rank" if options.micros > 1 else "")
        + (", polled by a thread" if options.thread else ""),
        "",
        *describe(threads, "mpi4py"),
        f"- {options.steps - 1} steps of each, in turn; {options.rows} sequences of 256 a step",
        "",
        "| overlap | ms from the last backward pass to the last sum | seconds a step |",
        "|---|---|---|",
        *rows,
        "",
        f"Hidden: {hidden:.0%} of the reduction (goal: {GOAL:.0%}). A step with overlap takes "
        f"{statistics.median(lengths):.3f} times one without ({lengths[len(lengths) // 4]:.3f} to "
        f"{lengths[-1 - len(lengths) // 4]:.3f} in the middle half; of the reduction "
        f"{statistics.median(ratios):.2f}).",
    ]
    if options.write:
        write_result(ROOT / "benchmarks" / "results", "overlap", lines)
    else:
        print("\n".join(lines))


if __name__ == "__main__":
    sys.exit(main())
