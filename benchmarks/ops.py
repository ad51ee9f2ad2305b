"""Each operation of this package against PyTorch's, forward and backward.

    python benchmarks/ops.py
    python benchmarks/ops.py --settings baby --only gelu attention
    python benchmarks/ops.py --dtype bfloat16

At the shapes that one of two data-parallel ranks has in each setting: half of the batch, and one
thread. The two take turns in one process, after their results were compared. A forward pass keeps
what its backward pass needs, so that work may move from one to the other: the sum of both counts.
PyTorch's backward is that of its autograd. Where this package adds to a gradient, that is set to
zero first, and timed. Ratios are PyTorch's time over this package's: above 1 the latter is faster.
"""

from __future__ import annotations

import argparse
import math
import statistics
import sys
from pathlib import Path

from machine import describe, write_result
from op_case import Case
from op_cases import cases
from settings import SETTINGS

from mpillm.parallel.launch import choose_threads, keep_freed_memory, start

HERE = Path(__file__).resolve().parent
SLOWER = 0.9  # a ratio below this needs a reason

# Why an operation is slower, by its name.
_PASSES = "a dozen passes over a tile in cache, where PyTorch's kernel has one"
REASONS: dict[str, str] = {
    "attention": "short sequences: calls from Python and transposed views take a third of the time",
    "layer norm": _PASSES,
    "embedding": "rows are sorted by id, so that equal ids are added in one order",
    "cross-entropy": "few columns: PyTorch does a row in one pass",
    "AdamW": _PASSES,
    "sum of squares": "added in float64, by blocks that no layout changes; PyTorch: in float32",
}


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("--settings", nargs="*", choices=SETTINGS, default=[*SETTINGS])
    parser.add_argument("--only", nargs="*", default=[], help="operations whose name has a word")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=1.0, help="for each operation and side")
    parser.add_argument("--write", action="store_true", help="keep the result")
    options = parser.parse_args()
    choose_threads(options.threads, start())  # before NumPy is imported
    keep_freed_memory()

    import torch

    torch.set_num_threads(options.threads)
    command = "python benchmarks/ops.py " + " ".join(sys.argv[1:])
    lines = [
        f"# Operations, {options.dtype}: mpillm and PyTorch",
        "",
        f"`{command.strip()}`",
        "",
        *describe(options.threads, "torch"),
        f"- medians of {options.seconds:g} s of each side, in turn",
    ]
    for name in options.settings:
        rows = []
        for case in cases(SETTINGS[name], options.dtype):
            if not options.only or any(word in case.name for word in options.only):
                rows.append(measure(case, options.seconds))
                print(rows[-1], file=sys.stderr, flush=True)
        lines += ["", f"## `{name}`", "", *HEADER, *rows]
    lines += [
        "",
        "Times are ns an element of the shape: mpillm / PyTorch. Ratios: PyTorch's time over "
        "mpillm's. GFLOP/s: of both passes together, visible scores only.",
    ]
    if options.write:
        write_result(HERE / "results", f"ops-{options.dtype}", lines)
    else:
        print("\n".join(lines))
    return 0


# -- measuring -------------------------------------------------------------------------------------


HEADER = [
    "| operation | shape | forward, ns | backward, ns | GFLOP/s | ratio: forward | backward | both "
    "| reason |",
    "| --- | --- | ---: | ---: | ---: | ---: | ---: | ---: | --- |",
]


def measure(case: Case, seconds: float) -> str:
    """The case's row of the table."""
    case.check()
    ours: list[tuple[float, float]] = []
    theirs: list[tuple[float, float]] = []
    for side in (case.ours, case.theirs):
        side.once()  # warms up
    spent, turn = 0.0, 0
    while spent < 2 * seconds or turn < 4:
        pair = [(case.ours, ours), (case.theirs, theirs)]
        for side, times in pair if turn % 2 else pair[::-1]:
            # Five in a row, the first of which finds the other's data in the caches.
            some = [side.once() for _ in range(5)]
            times += some[1:]
            spent += sum(map(sum, some))
        turn += 1
    a, b = (
        [statistics.median(one) for one in zip(*times, strict=True)] for times in (ours, theirs)
    )
    both = sum(b) / sum(a)
    size = math.prod(case.shape)
    backward = case.ours.backward is not None
    rates = " / ".join(f"{case.flops / sum(x) / 1e9:.0f}" for x in (a, b)) if case.flops else ""
    why = REASONS.get(case.name, "NO REASON GIVEN") if both < SLOWER else ""
    cells = [
        case.name,
        " x ".join(map(str, case.shape)),
        " / ".join(f"{1e9 * x[0] / size:.3f}" for x in (a, b)),
        " / ".join(f"{1e9 * x[1] / size:.3f}" for x in (a, b)) if backward else "",
        rates,
        f"{b[0] / a[0]:.2f}",
        f"{b[1] / a[1]:.2f}" if backward else "",
        f"{both:.2f}",
        why,
    ]
    return f"| {' | '.join(cells)} |"


if __name__ == "__main__":
    sys.exit(main())
