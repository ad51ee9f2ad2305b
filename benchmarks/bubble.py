"""Whether pipelines leave the bubble that `simulate` says they leave.

    mpirun -n 4 python benchmarks/bubble.py
    mpirun -n 2 python benchmarks/bubble.py

The first runs every schedule on 4 pipeline ranks whose stages sleep in place of computing, so that
it can be measured on fewer cores than ranks. The second runs them on 2 ranks with matrix products,
of which the second rank has half as many again. Either goes through the executor that training
uses, messages and all, on one node (the ranks' clocks must be the same).

Each step's bubble, the idle share of all ranks' time, is compared with the simulated one, given
the mean time of each kind of action in each stage of the same step, and that of a message between
the first two ranks, just before it.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import time
from collections import defaultdict
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import describe, write_result

from mpillm.errors import UserError
from mpillm.parallel.launch import choose_threads, end_in_error, keep_freed_memory, start
from mpillm.parallel.programs import lower, validate
from mpillm.parallel.schedules import SCHEDULES, Actions, Kind
from mpillm.parallel.simulate import Costs, Span, Timeline, bubble_fraction, simulate

if TYPE_CHECKING:
    import numpy as np

    from mpillm.array.backend import Backend
    from mpillm.parallel.group import Group
    from mpillm.parallel.launch import Comm
    from mpillm.parallel.progress import Progress

ROOT = Path(__file__).resolve().parent.parent
GOAL = 0.1

# Schedules and their chunks.
CASES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("zero-bubble", 1)]

# Products: rows and columns of an activation, and by the number of chunks the products of each
# stage. By either list the first rank has 4 and the second 6.
ROWS, WIDTH = 256, 768
LENGTHS = {1: [4, 6], 2: [2, 3, 2, 3]}


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--steps", type=int, default=7, help="measured steps of each schedule")
    parser.add_argument("--micros", type=int, default=0, help="micro-batches (default: 2 a rank)")
    parser.add_argument("--sleep", type=float, default=40.0, help="ms of a rank's forward pass")
    parser.add_argument("--write", action="store_true", help="keep the result")
    options = parser.parse_args()
    comm = start()
    try:
        if comm.size not in (2, 4):
            raise UserError(f"{comm.size} ranks; expected mpirun -n 2 or -n 4")
        threads = choose_threads(0, comm)  # before NumPy is imported
        keep_freed_memory()
        micros = options.micros or 2 * comm.size
        pipelines = [Pipeline(comm, name, chunks, micros, options) for name, chunks in CASES]
        for step in range(1 + options.steps):  # the first one warms up
            for pipeline in pipelines:
                pipeline.step(keep=step > 0)
        if comm.rank == 0:
            report(pipelines, threads, options)
    except UserError as error:
        return end_in_error(error)
    return 0


# -- stages ----------------------------------------------------------------------------------------


class Sleeper:
    """A stage that sleeps: as long for a forward, for input gradients and for weight gradients."""

    def __init__(self, seconds: float, last: bool, backend: Backend) -> None:
        self._seconds = seconds
        self._last = last
        self._array = backend.zeros((1,), "float32")

    def forward(self, inputs: tuple[Any, ...], micro: int) -> tuple[tuple[Any, ...], Any]:
        """Sleep."""
        time.sleep(self._seconds)
        return (self._array.copy(),), ()

    def backward(
        self, d_outputs: tuple[Any, ...], saved: Any, micro: int, later: list[Any] | None = None
    ) -> tuple[Any, ...]:
        """Sleep, twice as long unless half of it can be put off."""
        if later is None:
            time.sleep(2 * self._seconds)
        else:
            time.sleep(self._seconds)
            later.append(lambda: time.sleep(self._seconds))
        return (self._array.copy(),)


class Products:
    """A stage of products with square matrices, one after another."""

    def __init__(self, length: int, first: bool, backend: Backend, progress: Progress) -> None:
        import numpy as np

        draw = np.random.default_rng(length)
        self._ops = backend.ops
        self._progress = progress
        shape = (length, WIDTH, WIDTH)
        self._weights = (draw.standard_normal(shape) / WIDTH**0.5).astype(np.float32)
        self._gradients = np.zeros_like(self._weights)
        self._start = draw.standard_normal((ROWS, WIDTH)).astype(np.float32) if first else None

    def forward(self, inputs: tuple[Any, ...], micro: int) -> tuple[tuple[Any, ...], Any]:
        """x W1 W2 ..."""
        x: np.ndarray = inputs[0] if self._start is None else self._start
        saved = []
        for weight in self._weights:
            saved.append(x)
            x = self._ops.matmul(x, weight)
            self._progress.poll()
        return (x,), saved

    def backward(
        self, d_outputs: tuple[Any, ...], saved: Any, micro: int, later: list[Any] | None = None
    ) -> tuple[Any, ...]:
        """The derivatives, by hand."""
        (dy,) = d_outputs

        def add_gradient(x: np.ndarray, dy: np.ndarray, gradient: np.ndarray) -> None:
            self._ops.matmul(x.T, dy, out=gradient, accumulate=True)

        for weight, gradient in zip(self._weights[::-1], self._gradients[::-1], strict=True):
            work = (saved.pop(), dy, gradient)
            if later is None:
                add_gradient(*work)
            else:
                later.append(lambda work=work: add_gradient(*work))
            dy = self._ops.matmul(dy, weight.T)
            self._progress.poll()
        return (dy,)


# -- measuring -------------------------------------------------------------------------------------


@dataclass
class Result:
    """Bubbles of the steps, 0 to 1, and their makespans in seconds."""

    measured: list[float] = field(default_factory=list)
    simulated: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    @property
    def ratios(self) -> list[float]:
        """Measured over simulated, step by step, in ascending order."""
        return sorted(a / b for a, b in zip(self.measured, self.simulated, strict=True))


class Pipeline:
    """One schedule on all ranks, and what was measured of it on rank 0."""

    def __init__(
        self, comm: Comm, name: str, chunks: int, micros: int, options: argparse.Namespace
    ) -> None:
        from mpillm.array.backend import Backend
        from mpillm.parallel.group import Group
        from mpillm.parallel.pipeline import Executor
        from mpillm.parallel.progress import Progress
        from mpillm.parallel.recorder import Recorder

        self.name, self.chunks, self.micros, self.ranks = name, chunks, micros, comm.size
        self.sleeps = comm.size == 4
        self.result = Result()
        self._comm = comm
        backend, progress = Backend.create("numpy"), Progress()
        pipe = Group(comm, "pipe", backend, Recorder())
        numbers = [chunk * comm.size + comm.rank for chunk in range(chunks)]
        last = chunks * comm.size - 1
        stages: list[Any]
        if self.sleeps:
            shape: tuple[int, ...] = (1,)
            seconds = options.sleep / 1e3 / chunks
            stages = [Sleeper(seconds, number == last, backend) for number in numbers]
        else:
            shape = (ROWS, WIDTH)
            lengths = LENGTHS[chunks]
            stages = [Products(lengths[n], n == 0, backend, progress) for n in numbers]
        self._executor = Executor(pipe, stages, lambda _: ((shape, "float32"),), backend, progress)
        self._d_outputs = (backend.xp.ones(shape, "float32"),)
        self._actions: Actions = SCHEDULES[name](comm.size, micros, chunks)
        programs = lower(self._actions, chunks)
        validate(programs, ranks=comm.size, micros=micros, chunks=chunks)
        self._program = programs[comm.rank]
        self._pipe, self._message = pipe, backend.zeros(shape, "float32")

    def step(self, keep: bool) -> None:
        """Run the schedule once."""
        row: list[Span] = []
        transfer = transfer_seconds(self._pipe, self._message)
        self._comm.Barrier()
        self._executor.run(self._program, range(self.micros), self._d_outputs, timeline=row)
        rows: list[list[Span]] | None = self._comm.gather(row)
        if rows is not None and keep:
            measured = Timeline(rows)
            simulated = simulate(self._actions, self._costs(measured, transfer))
            self.result.measured.append(measured.bubble)
            self.result.simulated.append(simulated.bubble)
            self.result.seconds.append(measured.makespan)

    def _costs(self, timeline: Timeline, transfer: float) -> Costs:
        """Mean times of a step's actions, by kind and stage."""
        times: defaultdict[tuple[Kind, int], list[float]] = defaultdict(list)
        for rank, row in enumerate(timeline.rows):
            for (kind, _, chunk), begin, end in row:
                times[kind, chunk * self.ranks + rank].append(end - begin)
        forward, backward, weight_gradient = (
            [
                statistics.fmean(times[kind, stage] or [0.0])
                for stage in range(self.chunks * self.ranks)
            ]
            for kind in (Kind.FORWARD, Kind.BACKWARD, Kind.WEIGHT_GRADIENT)
        )
        return Costs(forward, backward, weight_gradient, transfer)


def transfer_seconds(pipe: Group, array: Any) -> float:
    """Seconds of a message from rank to rank, half of a median round trip between the first two."""
    times = []
    for _ in range(11):
        pipe.barrier()
        begin = time.perf_counter()
        if pipe.rank == 0:
            pipe.send(array, 1)
            pipe.recv(array, 1)
        elif pipe.rank == 1:
            pipe.recv(array, 0)
            pipe.send(array, 0)
        times.append((time.perf_counter() - begin) / 2)
    return float(pipe.broadcast_object(statistics.median(times)))


# -- telling ---------------------------------------------------------------------------------------


def report(pipelines: list[Pipeline], threads: int, options: argparse.Namespace) -> None:
    """Print what was found, and keep it if wanted."""
    some = pipelines[0]
    work = (
        f"stages that sleep: {options.sleep:g} ms a rank for each of forward, input gradient and "
        "weight gradient"
        if some.sleeps
        else f"stages of {LENGTHS[1][0]} and {LENGTHS[1][1]} products of {ROWS} x {WIDTH} with "
        f"{WIDTH} x {WIDTH}, float32"
    )
    lines = [
        f"# Bubbles at pipe {some.ranks}, measured and simulated",
        "",
        f"`mpirun -n {some.ranks} python benchmarks/bubble.py`",
        "",
        *describe(threads, "mpi4py"),
        f"- {some.micros} micro-batches; {work}",
        f"- {options.steps} steps of each schedule, in turn; medians, and ratios with their lowest "
        "and highest",
        "",
        "| schedule | ms a step | bubble measured | simulated | formula | measured / simulated | |",
        "| --- | ---: | ---: | ---: | ---: | ---: | --- |",
        *(line(pipeline) for pipeline in pipelines),
        "",
        f"Goal: within {GOAL:.0%}. The simulation is given the mean times of the same step's "
        "actions, and that of a message. "
        + (
            "The formula is that for stages that take equally long."
            if some.sleeps
            else "There is no formula for stages that differ."
        ),
    ]
    if options.write:
        write_result(ROOT / "benchmarks" / "results", f"bubble-pipe-{some.ranks}", lines)
    else:
        print("\n".join(lines))


def line(pipeline: Pipeline) -> str:
    """A schedule's row of the table."""
    result = pipeline.result
    name = pipeline.name + (f", {pipeline.chunks} chunks" if pipeline.chunks > 1 else "")
    ratios = result.ratios
    ratio = statistics.median(ratios)
    size = (pipeline.ranks, pipeline.micros, pipeline.chunks)
    formula = bubble_fraction(pipeline.name, *size, 1.0, 1.0, 1.0) if pipeline.sleeps else None
    return (
        f"| {name} | {1e3 * statistics.median(result.seconds):.0f} "
        f"| {statistics.median(result.measured):.1%} | {statistics.median(result.simulated):.1%} "
        f"| {'' if formula is None else f'{formula:.1%}'} "
        f"| {ratio:.3f} ({ratios[0]:.3f} to {ratios[-1]:.3f}) "
        f"| {'within' if abs(ratio - 1.0) <= GOAL else 'MISSED'} |"
    )


if __name__ == "__main__":
    sys.exit(main())
