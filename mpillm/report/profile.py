"""Where the time of training steps went: `profile.jsonl`, a line a step, and a table at the end.

A line is flat: `step, seconds, gflops, mfu`, and seconds by kind of work, the mean over the ranks
(`products`, `waiting`, ...). Where there are several, `slowest_rank` is the one that waited least,
whom the others waited for, and its seconds follow (`slowest.products`, ...). The kinds add up to
the step; those that took no time are left out.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence

from mpillm.report.metrics import StepMetrics

__all__ = ["Breakdown"]

Seconds = Mapping[str, float]

# Kinds of work in the order of the table, and their names there.
_NAMES = {
    "products": "matrix products",
    "attention": "attention",
    "norms": "norms",
    "activations": "activations",
    "sums": "residual and bias sums",
    "dropout": "dropout",
    "embedding": "embedding",
    "routing": "routing to experts",
    "loss": "loss",
    "conversions": "conversions of types",
    "optimizer": "optimizer",
    "input": "input",
    "checkpoint": "waiting for a checkpoint",
    "communication": "communication",
    "waiting": "waiting for ranks",
    "other": "Python and other",
}

# Kinds in the short form, and letters of a kind's name in the table.
_IN_SHORT = 4
_WIDE = 30

# Seconds of a step that are not 0.00 ms, which the table leaves out.
_SHOWN = 5e-6


class Breakdown:
    """Adds up the seconds of all ranks over the steps; the first, which warms up, only if alone."""

    def __init__(self) -> None:
        self.steps = 0
        self._added = 0
        self._totals: list[defaultdict[str, float]] = []
        self._last: Seconds = {}

    def add(self, metrics: StepMetrics, ranks: Sequence[Seconds]) -> dict[str, float]:
        """Add a step of which each rank gives its seconds by kind. Returns its line of the file."""
        if self.steps <= 1:
            self._totals, self._added = [defaultdict(float) for _ in ranks], 0
        self.steps += 1
        self._added += 1
        for total, seconds in zip(self._totals, ranks, strict=True):
            for kind, value in seconds.items():
                total[kind] += value
        self._last = _mean(ranks)
        row: dict[str, float] = {"step": metrics.step, "seconds": sum(self._last.values())}
        measured = {"gflops": metrics.gflops, "mfu": metrics.mfu}
        row |= {name: value for name, value in measured.items() if value is not None}
        row |= {kind: self._last[kind] for kind in _ordered(self._last)}
        if len(ranks) > 1:
            row["slowest_rank"] = slowest = _slowest(ranks)
            row |= {f"slowest.{kind}": ranks[slowest][kind] for kind in _ordered(ranks[slowest])}
        return row

    def in_short(self) -> str:
        """What took longest in the last step, in a few words."""
        whole = sum(self._last.values())
        longest = sorted(self._last, key=self._last.__getitem__, reverse=True)[:_IN_SHORT]
        return "  ".join(f"{_name(kind)} {self._last[kind] / whole:.0%}" for kind in longest)

    def table(self) -> str:
        """Milliseconds and shares of a step: the mean over the ranks, and the slowest rank's."""
        columns = {"mean of ranks": _mean(self._totals)}
        title = f"where the time went, of {self._added} step{'s' * (self._added > 1)}"
        lines = [title]
        if len(self._totals) > 1:
            slowest = _slowest(self._totals)
            columns[f"rank {slowest}"] = self._totals[slowest]
            lines = [f"{title}, rank {slowest} having waited least"]
            lines.append(" " * _WIDE + "".join(f"{name:>23}" for name in columns))
        shown = {
            kind
            for seconds in columns.values()
            for kind, part in seconds.items()
            if part > _SHOWN * self._added
        }
        for kind in _ordered(shown):
            cells = (self._cell(seconds, seconds.get(kind, 0.0)) for seconds in columns.values())
            lines.append(f"{_name(kind):{_WIDE}}" + "".join(cells))
        cells = (self._cell(seconds, sum(seconds.values())) for seconds in columns.values())
        lines.append(f"{'the step':{_WIDE}}" + "".join(cells))
        return "\n".join(lines)

    def _cell(self, seconds: Seconds, part: float) -> str:
        return f"{1e3 * part / self._added:>12,.2f} ms{part / sum(seconds.values()):>8.1%}"


def _mean(ranks: Sequence[Seconds]) -> dict[str, float]:
    kinds = {kind for seconds in ranks for kind in seconds}
    return {kind: sum(s.get(kind, 0.0) for s in ranks) / len(ranks) for kind in kinds}


def _slowest(ranks: Sequence[Seconds]) -> int:
    """The rank that waited least."""
    return min(range(len(ranks)), key=lambda rank: ranks[rank].get("waiting", 0.0))


def _ordered(kinds: Iterable[str]) -> list[str]:
    """In the order of the table; the axes of communication by name."""
    order = list(_NAMES)
    return sorted(kinds, key=lambda kind: (order.index(kind.partition(".")[0]), kind))


def _name(kind: str) -> str:
    """`communication.data` is `communication, data`."""
    name, _, axis = kind.partition(".")
    return _NAMES[name] + f", {axis}" * bool(axis)
