"""The numbers of a run, step by step: `metrics.jsonl`, one JSON object a line.

A line has `step, samples, loss, lr, grad_norm, tokens_per_second, step_seconds, gflops, mfu` (the
last two are explained in `docs/profile.md`), where the model was evaluated after the step
`val_loss`, with mixtures of experts `auxiliary_loss`, and where the update was skipped the reason,
`skipped`. A step's number is how many steps are then done, so the first is 1; `samples` is how many
sequences they have taken from the data. Numbers have all their digits. JSON has no NaN and no
infinity: both are written as null, which every JSON parser reads,
and `read_metrics` gives them back as NaN.
"""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, asdict, dataclass, fields
from pathlib import Path
from typing import Any

from mpillm.errors import UserError
from mpillm.storage.disk import Damaged, open_file, write_atomically
from mpillm.storage.strict_json import parse_json

__all__ = ["MetricsFile", "StepFile", "StepMetrics", "read_metrics", "read_steps"]


@dataclass(frozen=True)
class StepMetrics:
    """What is known after a step. Losses in nats a token, over all ranks.

    gflops: of the matrix products of all ranks, 10^9 FLOP/s. mfu: these over the best rate.
    """

    step: int
    loss: float
    lr: float
    grad_norm: float
    tokens_per_second: float
    step_seconds: float
    val_loss: float | None = None
    auxiliary_loss: float | None = None
    samples: int | None = None
    skipped: str | None = None
    gflops: float | None = None
    mfu: float | None = None


_REQUIRED = frozenset(entry.name for entry in fields(StepMetrics) if entry.default is MISSING)
_LONGEST_LINE = 2**16  # bytes


class StepFile:
    """A file that grows by a line of numbers a step; it is there when `write_row` returns."""

    required = frozenset({"step"})
    """What a line must have."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def write_row(self, row: Mapping[str, float | str]) -> None:
        """Append a step."""
        line = {name: _json_number(value) for name, value in row.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Drop the steps after `step`, and a last line cut short: a run goes on from there."""

        def write(temporary: Path) -> None:
            with temporary.open("wb") as file:
                file.writelines(raw for row, raw in self._rows() if row["step"] <= step)

        self._file.close()
        write_atomically(self._path, write)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._file.close()

    def _rows(self) -> Iterator[tuple[dict[str, Any], bytes]]:
        return _lines(self._path, self.required)


class MetricsFile(StepFile):
    """A `metrics.jsonl`."""

    required = _REQUIRED

    def write(self, metrics: StepMetrics) -> None:
        """Append a step."""
        self.write_row({k: value for k, value in asdict(metrics).items() if value is not None})


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; NaN for null. A last line cut short is left out.

    Raises UserError when there is no such file or another line is damaged.
    """
    return read_steps(path, _REQUIRED)


def read_steps(path: Path, required: frozenset[str] = StepFile.required) -> list[dict[str, Any]]:
    """The same of any `StepFile`, whose lines must have all that is `required`."""
    return [
        {name: math.nan if value is None else value for name, value in row.items()}
        for row, _ in _lines(path, required)
    ]


def _json_number(value: float | str) -> float | str | None:
    """The number as an int or float of Python's, which JSON takes; None if it is not finite."""
    if isinstance(value, int | str):
        return value
    return float(value) if math.isfinite(value) else None


def _lines(path: Path, required: frozenset[str]) -> Iterator[tuple[dict[str, Any], bytes]]:
    """Every whole line, read and as it is."""
    if not path.exists():
        raise UserError(f"{path}: there is no such metrics file")
    with open(open_file(path), "rb") as file:
        for number in itertools.count(1):
            raw = file.readline(_LONGEST_LINE)
            if len(raw) < _LONGEST_LINE and not raw.endswith(b"\n"):
                return  # the end, or a line cut short by a kill
            try:
                row = parse_json(raw, path)
            except Damaged:
                row = None
            if not _is_row(row, required):
                raise UserError(
                    f"{path}, line {number}: expected a JSON object with the numbers of a step,"
                    f" found {raw[:60].decode(errors='replace')!r}"
                )
            yield row, raw


def _is_row(row: Any, required: frozenset[str]) -> bool:
    """Whether a line holds what `StepFile` writes: all that every step has, and no nesting."""
    if not isinstance(row, dict) or not row.keys() >= required or type(row["step"]) is not int:
        return False
    return all(
        value is None or type(value) in (int, float) or (name == "skipped" and type(value) is str)
        for name, value in row.items()
    )
