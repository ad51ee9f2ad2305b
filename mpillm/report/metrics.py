"""The numbers of a run, step by step: `metrics.jsonl`, one JSON object a line.

A line has `step, samples, loss, lr, grad_norm, tokens_per_second, step_seconds`, where the model
was evaluated after the step `val_loss`, with mixtures of experts `auxiliary_loss`, and where the
update was skipped the reason, `skipped`. A step's number is how many steps are then done, so the
first is 1; `samples` is how many sequences they have taken from the data. Numbers have all their
digits. JSON has no NaN and no infinity: both are written as null, which every JSON parser reads,
and `read_metrics` gives them back as NaN.
"""

from __future__ import annotations

import json
import math
import os
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from mpillm.errors import UserError

__all__ = ["MetricsFile", "StepMetrics", "read_metrics"]


@dataclass(frozen=True)
class StepMetrics:
    """What is known after a step. Losses in nats a token, over all ranks."""

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


class MetricsFile:
    """A `metrics.jsonl` that grows by a line a step; the line is there when `write` returns."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._file = path.open("a", encoding="utf-8")

    def write(self, metrics: StepMetrics) -> None:
        """Append a step."""
        fields = {name: value for name, value in asdict(metrics).items() if value is not None}
        line = {name: _json_number(value) for name, value in fields.items()}
        self._file.write(json.dumps(line, allow_nan=False) + "\n")
        self._file.flush()

    def rewind(self, step: int) -> None:
        """Drop the steps after `step`, and a last line cut short: a run goes on from there."""
        kept = [line for number, line in _lines(self._path) if number <= step]
        self._file.close()
        temporary = self._path.with_name(self._path.name + ".tmp")
        with temporary.open("w", encoding="utf-8") as file:
            file.writelines(kept)
            file.flush()
            os.fsync(file.fileno())
        temporary.replace(self._path)
        self._file = self._path.open("a", encoding="utf-8")

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def read_metrics(path: Path) -> list[dict[str, Any]]:
    """The lines of a `metrics.jsonl`; NaN for null. A last line cut short is left out.

    Raises UserError when there is no such file or another line is damaged.
    """
    rows = [json.loads(line) for _, line in _lines(path)]
    return [{k: math.nan if v is None else v for k, v in row.items()} for row in rows]


def _json_number(value: float | str) -> float | str | None:
    """The number as an int or float of Python's, which JSON takes; None if it is not finite."""
    if isinstance(value, int | str):
        return value
    return float(value) if math.isfinite(value) else None


def _lines(path: Path) -> list[tuple[int, str]]:
    """Step and text of every whole line."""
    try:
        text = path.read_text(encoding="utf-8")
    except FileNotFoundError:
        raise UserError(f"{path}: there is no such metrics file") from None
    *whole, _cut = text.split("\n")  # what follows the last newline was cut short by a kill
    lines = []
    for number, line in enumerate(whole, start=1):
        try:
            lines.append((int(json.loads(line)["step"]), line + "\n"))
        except (ValueError, KeyError, TypeError):
            raise UserError(
                f"{path}, line {number}: expected a JSON object with a step, found {line[:60]!r}"
            ) from None
    return lines
