"""A pipeline's timeline, simulated or measured, as text and as a picture."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from mpillm.errors import UserError
from mpillm.parallel.schedules import Action, Kind

if TYPE_CHECKING:
    from mpillm.parallel.simulate import Span, Timeline

__all__ = ["draw_png", "draw_text", "summarize"]

_LETTERS = {Kind.FORWARD: "F", Kind.BACKWARD: "B", Kind.WEIGHT_GRADIENT: "W"}

# Of a text that does not fit, so many blocks of lines from the beginning and from the end.
_BLOCKS = 2

# A terminal's background colours: blue, red, green; with white text.
_BACKGROUNDS = {
    Kind.FORWARD: "\x1b[97;44m",
    Kind.BACKWARD: "\x1b[97;41m",
    Kind.WEIGHT_GRADIENT: "\x1b[97;42m",
}
_PLAIN = "\x1b[0m"


def summarize(timeline: Timeline, formula: float | None = None) -> list[str]:
    """Makespan, bubble (beside that of a formula, 0 to 1) and peak activations, a line each."""
    expected = "" if formula is None else f" (formula: {100 * formula:.1f} %)"
    peaks = timeline.peak_activations
    if min(peaks) == max(peaks):
        held = f"{peaks[0]} on every rank"
    elif len(peaks) <= 16:
        held = f"{' '.join(map(str, peaks))}, by rank"
    else:
        held = f"{min(peaks)} to {max(peaks)}"
    return [
        f"makespan          {timeline.makespan:g}",
        f"bubble            {100 * timeline.bubble:.1f} % of the ranks' time{expected}",
        f"peak activations  {held}",
    ]


# --- text ----------------------------------------------------------------------------------------


def draw_text(timeline: Timeline, width: int, *, colour: bool = False) -> list[str]:
    """A line a rank, and a column a unit of time, in blocks of at most `width` characters.

    Each action shows its kind's letter and its micro-batch, and its chunk where there are several,
    and dashes for as long as it lasts. Of a long timeline the middle is left out. `colour`: with
    the background colours of a terminal.
    """
    unit = _unit(timeline)
    several = any(span.action.chunk for row in timeline.rows for span in row)
    longest = (len(_label(span.action, several)) for row in timeline.rows for span in row)
    cell = 1 + max(longest, default=0)
    cells = [_cells(row, timeline, unit, cell, several, colour) for row in timeline.rows]
    names = [f"rank {rank:>{len(str(len(cells) - 1))}}  " for rank in range(len(cells))]
    columns = max(map(len, cells))
    most = max(1, (width - len(names[0])) // cell)
    per_block = -(-columns // max(1, -(-columns // most)))  # blocks alike, as few as can be

    lines = [_legend(timeline, unit, several)]
    blocks = range(0, columns, max(1, per_block))
    for number, first in enumerate(blocks):
        if len(blocks) > 2 * _BLOCKS and _BLOCKS <= number < len(blocks) - _BLOCKS:
            if number == _BLOCKS:
                last = blocks[-_BLOCKS]
                lines += ["", f"... time {first * unit:g} to {last * unit:g} is left out ..."]
            continue
        piece = slice(first, first + per_block)
        shown = range(first, min(first + per_block, columns))
        lines += ["", " " * len(names[0]) + _ruler(shown, unit, cell)]
        for name, row in zip(names, cells, strict=True):
            lines.append((name + "".join(row[piece])).rstrip())
    return lines


def _unit(timeline: Timeline) -> float:
    """The time of a column: the shortest action's, or an even part of it that fits all others."""
    times = {span.stop - span.start for row in timeline.rows for span in row}
    shortest = min((time for time in times if time > 0.0), default=1.0)
    for part in (1, 2, 3, 4):
        unit = shortest / part
        if all(abs(time / unit - round(time / unit)) < 1e-6 for time in times):
            return unit
    return shortest


def _label(action: Action, several: bool) -> str:
    """An action's cell, without and with its chunk."""
    return f"{_LETTERS[action.kind]}{action.micro}" + (f".{action.chunk}" if several else "")


def _cells(
    row: Sequence[Span], timeline: Timeline, unit: float, cell: int, several: bool, colour: bool
) -> list[str]:
    """One rank's columns, `cell` characters each, colours not counted."""

    def column(time: float) -> int:
        return math.floor((time - timeline.start) / unit + 0.5)

    cells = [".".ljust(cell)] * column(timeline.start + timeline.makespan)
    for span in row:
        first, stop = column(span.start), column(span.stop)
        text = _label(span.action, several).ljust((stop - first) * cell - 1, "-") + " "
        for place in range(first, stop):
            piece = text[(place - first) * cell : (place - first + 1) * cell]
            cells[place] = _coloured(piece, span.action.kind) if colour else piece
    return cells


def _coloured(piece: str, kind: Kind) -> str:
    """A piece of an action's text on its kind's background, the gap at its end not."""
    body = piece.rstrip()
    return f"{_BACKGROUNDS[kind]}{body}{_PLAIN}{piece[len(body) :]}"


def _ruler(columns: range, unit: float, cell: int) -> str:
    """The times of some columns, as many as fit."""
    longest = max(len(f"{column * unit:g}") for column in columns)
    step = next(step for step in (1, 2, 5, 10, 20) if step * cell > longest or step == 20)
    line = ""
    for place, column in enumerate(columns):
        if column % step == 0:
            line = line.ljust(place * cell) + f"{column * unit:g}"
    return line


def _legend(timeline: Timeline, unit: float, several: bool) -> str:
    """What the letters mean."""
    split = any(s.action.kind is Kind.WEIGHT_GRADIENT for row in timeline.rows for s in row)
    backward = "B input gradient, W weight gradient" if split else "B backward"
    chunk = "; F2.1: micro-batch 2, chunk 1" if several else "; F2: micro-batch 2"
    return f"F forward, {backward}, . idle{chunk}; a column is {unit:g}"


# --- picture -------------------------------------------------------------------------------------

_HALF = 0.43  # of a row's box, the distance of rows being 1
_INK = "#30343b"
_LINE = "#b8bcc4"
_IDLE = "#eef0f3"
_COLOURS = {Kind.FORWARD: "#2a6fb0", Kind.BACKWARD: "#d9541e", Kind.WEIGHT_GRADIENT: "#3a9563"}


def draw_png(timeline: Timeline, path: Path, title: str) -> None:
    """Draw a row of boxes a rank. UserError without matplotlib, or where `path` cannot be written.

    Later chunks are lighter; boxes bear their micro-batch's number where it can be read.
    """
    try:
        from matplotlib.figure import Figure
        from matplotlib.patches import Patch
    except ImportError:
        raise UserError(
            "--png: drawing takes matplotlib; install the extra 'report': "
            "pip install 'mpillm[report]'"
        ) from None
    ranks = len(timeline.rows)
    width = min(max(8.0, 0.3 * timeline.makespan / _unit(timeline)), 26.0)
    height = 1.6 + min(0.42 * ranks, 16.0)
    figure = Figure(figsize=(width, height), dpi=150, layout="constrained")
    axes = figure.subplots()
    axes.barh(range(ranks), timeline.makespan, height=2 * _HALF, color=_IDLE)
    points = 72 * 0.9 * width / (timeline.makespan or 1.0)  # of a unit of time
    kinds, chunks = _draw_boxes(axes, timeline, points)

    axes.set_xlim(0.0, timeline.makespan or 1.0)
    axes.set_ylim(ranks - 0.5, -0.5)
    shown = range(0, ranks, max(1, ranks // 16))
    axes.set_yticks(shown, [f"rank {rank}" for rank in shown])
    axes.set_xlabel("time", color=_INK)
    axes.tick_params(color=_LINE, labelcolor=_INK, labelsize=9, length=3)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.spines["bottom"].set_color(_LINE)
    axes.set_title(title, loc="left", color=_INK, fontsize=11, fontweight="bold")
    names = {
        Kind.FORWARD: "forward",
        Kind.BACKWARD: "input gradient" if Kind.WEIGHT_GRADIENT in kinds else "backward",
        Kind.WEIGHT_GRADIENT: "weight gradient",
    }
    handles = [Patch(color=_COLOURS[kind], label=names[kind]) for kind in Kind if kind in kinds]
    handles.append(Patch(color=_IDLE, label="idle"))
    if chunks > 1:
        handles.append(Patch(color="none", label="lighter: later chunks"))
    figure.legend(
        handles=handles,
        loc="outside lower center",
        ncols=len(handles),
        frameon=False,
        labelcolor=_INK,
        fontsize=9,
    )
    try:
        figure.savefig(path, format="png")
    except OSError as error:
        raise UserError(f"--png {path}: cannot be written: {error.strerror}") from None


def _draw_boxes(axes: Any, timeline: Timeline, points: float) -> tuple[set[Kind], int]:
    """The boxes, a unit of time being so many points wide; their kinds, and how many chunks.

    Numbers are all of one size, so that all boxes bear them or none.
    """
    spans = [(rank, span) for rank, row in enumerate(timeline.rows) for span in row]
    chunks = 1 + max((span.action.chunk for _, span in spans), default=0)
    narrowest = points * min((s.stop - s.start for _, s in spans if s.stop > s.start), default=0.0)
    digits = max((len(str(span.action.micro)) for _, span in spans), default=1)
    size = min(8.5, narrowest / (0.75 * digits))
    boxes: defaultdict[tuple[int, Kind, int], list[tuple[float, float]]] = defaultdict(list)
    for rank, (action, start, stop) in spans:
        boxes[rank, action.kind, action.chunk].append((start - timeline.start, stop - start))
        if size >= 5.0 and stop > start:
            axes.text(
                (start + stop) / 2 - timeline.start,
                rank,
                str(action.micro),
                size=size,
                color="white" if 2 * action.chunk < chunks else _INK,
                ha="center",
                va="center_baseline",
            )
    for (rank, kind, chunk), places in boxes.items():
        axes.broken_barh(
            places,
            (rank - _HALF, 2 * _HALF),
            facecolor=_lighter(_COLOURS[kind], chunk / chunks),
            edgecolor="white",
            linewidth=min(0.6, 0.1 * narrowest),
        )
    return {kind for _, kind, _ in boxes}, chunks


def _lighter(colour: str, share: float) -> tuple[float, ...]:
    """A colour `#rrggbb` mixed with white; 0 leaves it, and 1 would go two thirds of the way."""
    parts = (int(colour[at : at + 2], 16) / 255 for at in (1, 3, 5))
    return tuple(part + (1.0 - part) * share * 2 / 3 for part in parts)
