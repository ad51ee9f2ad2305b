"""Training steps of this package and of PyTorch, in turn: speed, memory, losses.

    python benchmarks/compare.py baby
    python benchmarks/compare.py gpt2-124m --dtype bfloat16 --ours data=1 data=2,zero=1
    python benchmarks/compare.py baby --scaling

All contestants are started and warmed up, then take turns: while one works the others sleep, and a
machine that speeds up or slows down does so for all. Neighbouring turns are compared, those of the
fastest layout of this package with those of the fastest mode of PyTorch. All begin with the same
weights and take the same batches, so that their first losses must agree.

--scaling compares two ranks of data parallelism with two processes that do the same work and do
not speak with each other.
"""

from __future__ import annotations

import argparse
import signal
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from machine import cores, describe, free_memory, mpirun, write_result
from settings import SETTINGS, Setting
from step import read_layout
from turns import Contestant

from mpillm.errors import UserError
from mpillm.parallel.layouts import ranks_of
from mpillm.training.settings import TrainSettings

HERE = Path(__file__).resolve().parent
GIB = 1 << 30

# How far the losses of the first steps may be apart, relative. In bfloat16 each product's operands
# are rounded to 8 bits, and PyTorch rounds the results, too.
FIRST = 5
TOLERANCE = {"float32": 1e-4, "bfloat16": 1e-3}
PACKAGES = {"float32": ["mpi4py"], "bfloat16": ["mpi4py", "onednn-cpu-gomp"]}
LEAST_FREE = 1 << 30  # bytes; with less the machine may end processes
SCALING_GOAL = 0.97


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--rounds", type=int, default=12, help="turns of each")
    parser.add_argument("--steps", type=int, default=0, help="steps of a turn (0: the setting's)")
    parser.add_argument("--ours", nargs="*", help="layouts, such as data=1 data=2,zero=1")
    parser.add_argument("--torch", nargs="*", help="modes, see torch_step.py")
    parser.add_argument("--scaling", action="store_true", help="data parallelism and its ceiling")
    parser.add_argument("--write", action="store_true", help="keep the result")
    options = parser.parse_args()
    setting = SETTINGS[options.setting]
    command = "python benchmarks/compare.py " + " ".join(sys.argv[1:])
    signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # which ends the contestants, too
    try:
        with tempfile.TemporaryDirectory() as name:
            folder = Path(name)
            if options.scaling:
                sides = scaling_sides(setting, options.dtype)
            else:
                sides = both_sides(setting, options, folder)
            compete([*sides[0], *sides[1]], setting, options, folder)
    except UserError as error:
        print(f"compare.py: error: {error}", file=sys.stderr)
        return 2
    what = "scaling" if options.scaling else "step"
    lines = (report_scaling if options.scaling else report)(sides, setting, options.dtype, command)
    if options.write:
        write_result(HERE / "results", f"{what}-{setting.name}-{options.dtype}", lines)
    else:
        print("\n".join(lines))
    return 0


# -- contestants -----------------------------------------------------------------------------------

Sides = tuple[list[Contestant], list[Contestant]]


def ranks_in(layout: str) -> int:
    """Ranks that a layout takes."""
    return ranks_of(read_layout(layout, TrainSettings()).parallel)


def our_command(setting: Setting, dtype: str, layout: str, *more: str) -> list[str]:
    """How `step.py` is started, on the ranks of the layout."""
    ranks = ranks_in(layout)
    command = [sys.executable, str(HERE / "step.py"), setting.name, "--dtype", dtype]
    command += ["--layout", layout, *more]
    return [*mpirun(ranks), *command] if ranks > 1 else command


def both_sides(setting: Setting, options: argparse.Namespace, folder: Path) -> Sides:
    """The layouts of this package and the modes of PyTorch."""
    weights = folder / "weights.npz"
    command = our_command(setting, options.dtype, "data=1", "--export", str(weights))
    if code := subprocess.run(command, check=False).returncode:
        raise SystemExit(code)  # it has said why
    ours = []
    for layout in setting.ours if options.ours is None else options.ours:
        ranks = ranks_in(layout)
        threads = max(1, cores() // ranks)
        command = our_command(setting, options.dtype, layout, "--threads", str(threads))
        ours.append(Contestant(f"mpillm {layout}", [command], ranks))
    theirs = []
    for mode in setting.torch if options.torch is None else options.torch:
        command = [sys.executable, str(HERE / "torch_step.py"), setting.name, "--mode", mode]
        command += ["--dtype", options.dtype, "--weights", str(weights)]
        ranks = cores() if mode.startswith("ddp") else 1
        theirs.append(Contestant(f"PyTorch {mode}", [command], ranks))
    return ours, theirs


def scaling_sides(setting: Setting, dtype: str) -> Sides:
    """Two ranks of data parallelism, and two processes with half of the batch each."""
    thread = ("--threads", "1")
    together = our_command(setting, dtype, "data=2", *thread)
    alone = our_command(setting, dtype, "data=1", "--part-of", "2", *thread)
    return [Contestant("data=2", [together], 2)], [Contestant("alone, twice", [alone, alone], 2)]


def compete(
    contestants: Sequence[Contestant], setting: Setting, options: argparse.Namespace, folder: Path
) -> None:
    """Start, warm up, and let all take their turns, every other round in reverse order."""
    steps = options.steps or setting.steps
    try:
        for one in contestants:
            one.start(folder)
            one.run(setting.warmup, keep=False)
            say(f"{one.name}: ready, {one.peak_memory / GIB:.2f} GiB")
            if free_memory() < LEAST_FREE:
                raise UserError(
                    f"with {one.name} less than {LEAST_FREE / GIB:g} GiB of memory is free; let "
                    "fewer compete at once: --ours and --torch"
                )
        for number in range(options.rounds):
            for one in contestants if number % 2 else contestants[::-1]:
                one.run(steps)
            speeds = ", ".join(f"{one.name} {one.speeds[-1]:,.0f}" for one in contestants)
            say(f"round {number + 1} of {options.rounds}: tokens/s {speeds}")
    finally:
        for one in contestants:
            one.stop()


def say(text: str) -> None:
    """How far it is; not part of the result."""
    print(text, file=sys.stderr, flush=True)


# -- telling ---------------------------------------------------------------------------------------


def report(sides: Sides, setting: Setting, dtype: str, command: str) -> list[str]:
    """The result as Markdown."""
    ours, theirs = sides
    lines = [
        f"# Training steps of `{setting.name}`, {dtype}: mpillm and PyTorch",
        "",
        *heading(setting, command, *PACKAGES[dtype], *(["torch"] if theirs else [])),
        "",
        *table([*ours, *theirs], setting),
    ]
    if not ours or not theirs:
        return [*lines, "", *losses([*ours, *theirs], dtype)]
    best, other = (max(side, key=lambda one: statistics.median(one.speeds)) for side in sides)
    goal = setting.goals.get(dtype)
    ratios = [a / b for a, b in zip(best.speeds, other.speeds, strict=True)]
    leanest = min(one.peak_memory for one in theirs)
    once = best.peak_memory_once / other.peak_memory_once
    return [
        *lines,
        "",
        f"{best.name} over {other.name}, the fastest of either side, by round: "
        f"{spread(ratios, '.2f')}"
        + (f"; {verdict(statistics.median(ratios), goal)}." if goal else "."),
        "",
        f"Peak memory over that of {other.name}: {best.peak_memory / other.peak_memory:.2f} "
        f"({once:.2f} with shared pages counted once); over that of the leanest mode of PyTorch: "
        f"{best.peak_memory / leanest:.2f}; "
        f"{verdict(1.0, best.peak_memory / other.peak_memory, '<= 1')}.",
        "",
        *losses([*theirs, *ours], dtype),
    ]


def report_scaling(sides: Sides, setting: Setting, dtype: str, command: str) -> list[str]:
    """The result of --scaling as Markdown."""
    (together,), (alone,) = sides
    ratios = [a / b for a, b in zip(together.speeds, alone.speeds, strict=True)]
    return [
        f"# Data parallelism of two ranks on `{setting.name}`, {dtype}, and its ceiling",
        "",
        *heading(setting, command, *PACKAGES[dtype]),
        "- the ceiling: two processes with half of the batch each, at the same time, that do not "
        "speak with each other; a thread each, as each of the two ranks",
        "",
        *table([together, alone], setting),
        "",
        f"Of its ceiling, by round: {spread(ratios, '.3f')}; "
        f"{verdict(statistics.median(ratios), SCALING_GOAL)}.",
    ]


def heading(setting: Setting, command: str, *packages: str) -> list[str]:
    """What the figures depend on."""
    s = setting
    return [
        f"`{command}`",
        "",
        *describe(0, *packages),
        f"- {s.layers} layers, {s.heads} heads, {s.width} wide, vocabulary {s.vocabulary:,}, "
        f"{'biases' if s.bias else 'no biases'}, tied head, no dropout; {s.batch} x {s.length} "
        f"tokens a step; AdamW, gradients clipped",
    ]


def table(contestants: Sequence[Contestant], setting: Setting) -> list[str]:
    """Speeds and memory."""
    lines = [
        "| | tokens/s: median | quartiles | lowest to highest | GFLOP/s | peak memory, GiB "
        "| shared pages once |",
        "| --- | ---: | ---: | ---: | ---: | ---: | ---: |",
    ]
    for one in contestants:
        speeds = sorted(one.speeds)
        low, median, high = quartiles(speeds)
        rate = median * setting.flops / setting.tokens / 1e9
        lines.append(
            f"| {one.name} | {median:,.0f} | {low:,.0f} to {high:,.0f} "
            f"| {speeds[0]:,.0f} to {speeds[-1]:,.0f} | {rate:.0f} "
            f"| {one.peak_memory / GIB:.2f} | {one.peak_memory_once / GIB:.2f} |"
        )
    return [
        *lines,
        "",
        f"Medians of {len(contestants[0].turns)} turns of {len(contestants[0].turns[0].seconds)} "
        "steps, every contestant in turn. GFLOP/s are those of the products that a step needs, "
        "visible scores only. Memory is the sum of the peaks of all processes since their start.",
    ]


def losses(contestants: Sequence[Contestant], dtype: str) -> list[str]:
    """Losses of the first steps, and of the last that all have done, against the first one's."""
    reference = contestants[0]
    last = min(len(one.losses) for one in contestants)
    first = min(FIRST, last)
    lines = [
        f"| loss, nats a token | step 1 | step {first} | step {last} | largest relative difference "
        f"to step {first} |",
        "| --- | ---: | ---: | ---: | ---: |",
    ]
    worst = 0.0
    for one in contestants:
        pairs = list(zip(one.losses[:first], reference.losses, strict=False))
        difference = max(abs(a - b) / abs(b) for a, b in pairs)
        worst = max(worst, difference)
        values = " | ".join(f"{one.losses[step - 1]:.6f}" for step in (1, first, last))
        lines.append(f"| {one.name} | {values} | {difference:.1e} |")
    limit = TOLERANCE[dtype]
    same = "the same" if worst <= limit else "NOT THE SAME"
    return [
        *lines,
        "",
        f"Differences are from {reference.name}; to {limit:g} the losses are {same}.",
    ]


def quartiles(values: Sequence[float]) -> tuple[float, float, float]:
    """Lower quartile, median, upper quartile."""
    if len(values) < 2:
        return (values[0],) * 3
    low, median, high = statistics.quantiles(values, n=4, method="inclusive")
    return low, median, high


def spread(values: Sequence[float], form: str) -> str:
    """Median, quartiles and range in words."""
    low, median, high = quartiles(values)
    return (
        f"median {median:{form}}, quartiles {low:{form}} to {high:{form}}, "
        f"lowest to highest {min(values):{form}} to {max(values):{form}}"
    )


def verdict(value: float, goal: float, text: str = "") -> str:
    """A goal, and whether it is reached."""
    return f"goal {text or f'>= {goal:g}'}: {'reached' if value >= goal else 'MISSED'}"


if __name__ == "__main__":
    sys.exit(main())
