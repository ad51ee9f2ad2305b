"""The loss curve of a run as a picture."""

from __future__ import annotations

import math
from pathlib import Path

import numpy as np
import numpy.typing as npt

from mpillm.report.metrics import read_metrics

__all__ = ["TRAINING", "VALIDATION", "plot_losses", "smooth"]

_INK = "#30343b"
TRAINING = "#2a6fb0"
VALIDATION = "#d9541e"
_LR = "#7a7f87"


def smooth(values: npt.NDArray[np.float64], width: int) -> npt.NDArray[np.float64]:
    """Mean over a centred window of `width` values (n,), NaN left out.

    At the beginning, where losses fall fast, the window narrows to stay centred; at the end, where
    they hardly fall, only its right half does.
    """
    known = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(known, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(known)])
    at = np.arange(len(values))
    left = np.minimum(width // 2, at)
    first, last = at - left, at + np.minimum(left, len(values) - 1 - at) + 1
    count = counts[last] - counts[first]
    mean: npt.NDArray[np.float64] = np.where(
        count > 0, (sums[last] - sums[first]) / np.maximum(count, 1), math.nan
    )
    return mean


def plot_losses(metrics_path: Path, png_path: Path, title: str) -> bool:
    """Draw training loss, validation loss and learning rate over the steps of a `metrics.jsonl`.

    Returns False, and draws nothing, when matplotlib is not installed (the extra `report`).
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.ticker import MaxNLocator
    except ImportError:
        return False
    rows = read_metrics(metrics_path)
    steps = np.array([row["step"] for row in rows])
    losses = np.array([row["loss"] for row in rows], dtype=np.float64)
    evaluated = [(row["step"], row["val_loss"]) for row in rows if "val_loss" in row]

    figure = Figure(figsize=(8, 5), dpi=150, layout="constrained")
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[5, 1])
    top.plot(steps, losses, color=TRAINING, alpha=0.3, linewidth=0.8)
    dots = "o" if len(steps) < 3 else None  # a line needs two points
    width = max(1, len(steps) // 50)
    mean = smooth(losses, width)
    top.plot(steps, mean, marker=dots, color=TRAINING, linewidth=1.8, label="training")
    if evaluated:
        at, validation = zip(*evaluated, strict=True)
        label = f"validation (last {validation[-1]:.4f})"
        top.plot(at, validation, "o-", color=VALIDATION, ms=4.5, lw=1.2, mec="white", label=label)
    top.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold")
    top.set_ylabel("loss (nats per token)", color=_INK)
    top.legend(frameon=False, labelcolor=_INK)

    bottom.plot(steps, [row["lr"] for row in rows], marker=dots, color=_LR, linewidth=1.5)
    bottom.set_ylabel("learning\nrate", color=_INK)
    bottom.set_xlabel("step", color=_INK)
    peak = max((row["lr"] for row in rows), default=0.0) or 1.0
    bottom.set_ylim(0, 1.2 * peak)
    bottom.set_yticks([0, peak], ["0", f"{peak:g}"])
    bottom.xaxis.set_major_locator(
        MaxNLocator(nbins=10, integer=True, min_n_ticks=1, steps=[1, 2, 5, 10])
    )
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.spines[["left", "bottom"]].set_color("#b8bcc4")
        axes.tick_params(color="#b8bcc4", labelcolor=_INK, labelsize=9, length=3)
        axes.grid(color="#e6e8ec", linewidth=0.8)
        axes.set_axisbelow(True)
        axes.margins(x=0.015)
    figure.align_ylabels()
    figure.savefig(png_path, format="png")
    return True
