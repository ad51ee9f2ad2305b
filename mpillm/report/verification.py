"""The table of `mpillm verify-layouts`: how far each layout's run is from one rank's.

A row is a layout of a variant of the settings. Differences are the largest of all steps (losses and
gradient norms, relative) and of all parameters (weights, see `mpillm.training.trial`).
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mpillm.errors import UserError

__all__ = ["HEADER", "Row", "RowsFile", "line", "markdown", "summary"]

HEADER = f"{'loss':>8} {'norm':>8} {'weights':>8}  bits  result   {'ms':>8}  layout"

_INDENT = 45  # where the column `layout` begins


@dataclass(frozen=True, kw_only=True)
class Row:
    """What came of a layout.

    layout: as `--layouts` reads it. variant: the settings that were varied, such as
    `model.tied=true`. required: whether it is a failure when the layout is refused. refused: why it
    is, if it is. loss, norm, weights: the largest differences; bitwise: whether there is none
    at all. seconds: of a step. sent: bytes a step by axis, of the busiest rank. problems: what else
    is wrong.
    """

    layout: str
    ranks: int
    dtype: str
    variant: tuple[str, ...] = ()
    required: bool = False
    refused: str = ""
    loss: float = 0.0
    norm: float = 0.0
    weights: float = 0.0
    bitwise: bool = False
    tolerance: float = 0.0
    seconds: float = 0.0
    sent: dict[str, int] | None = None
    problems: tuple[str, ...] = ()

    @property
    def result(self) -> str:
        """`pass`, `fail` or `refused`."""
        if self.refused:
            return "refused"
        within = self._within("loss", "norm", "weights")
        return "pass" if within and not self.problems else "fail"

    @property
    def failed(self) -> bool:
        """Whether the verification fails by this row."""
        return self.result == "fail" or (self.required and bool(self.refused))

    @property
    def only_weights(self) -> bool:
        """Whether losses and norms agree, and weights do not."""
        return self.result == "fail" and self._within("loss", "norm") and not self.problems

    def _within(self, *differences: str) -> bool:
        """Whether differences are at most the tolerance."""
        return all(getattr(self, name) <= self.tolerance for name in differences)


@dataclass(frozen=True)
class _Entry:
    """A line of a `RowsFile`."""

    key: str
    row: Row


class RowsFile:
    """Rows that are done, by key, in a file that outlives the job: a JSON object a line."""

    def __init__(self, path: Path, fresh: bool) -> None:
        """Read the file, or empty it. A line that is no row, such as one cut short, is passed over.

        UserError for a file that cannot be read or written.
        """
        self.rows: dict[str, Row] = {}
        try:
            path.touch()
            lines = [] if fresh else path.read_bytes().splitlines()
            self._file = path.open("w" if fresh else "a", encoding="utf-8")
        except OSError as error:
            raise UserError(f"{path}: cannot hold results: {error.strerror}") from None
        for line in lines:
            try:
                entry = msgspec.json.decode(line, type=_Entry)
            except (msgspec.DecodeError, UnicodeDecodeError, RecursionError):
                continue
            self.rows[entry.key] = entry.row
        if lines:
            self._file.write("\n")  # the last line may have been cut short

    def write(self, key: str, row: Row) -> None:
        """Append a row; it is in the file when this returns."""
        self._file.write(msgspec.json.encode(_Entry(key, row)).decode() + "\n")
        self._file.flush()

    def close(self) -> None:
        """Close the file."""
        self._file.close()


def line(row: Row) -> str:
    """A row of the table; what there is to say about it stands below."""
    if row.refused:
        return f"{'refused':>39}{'':{_INDENT - 39}}{row.layout}\n{'':{_INDENT}}{row.refused}"
    numbers = f"{row.loss:8.1e} {row.norm:8.1e} {row.weights:8.1e}"
    bits = "same" if row.bitwise else ""
    text = (
        f"{numbers}  {bits:<4}  {row.result:<7}  {row.seconds * 1e3:8.1f}  "
        f"{row.layout:<40}  {_sent_text(row)}"
    )
    return "\n".join([text.rstrip(), *(f"{'':{_INDENT}}{problem}" for problem in row.problems)])


def summary(rows: Sequence[Row], steps: int) -> str:
    """What came of all rows; those that failed, once more."""
    failed = [row for row in rows if row.failed]
    passed = [row for row in rows if row.result == "pass"]
    refused = sum(bool(row.refused) for row in rows)
    limits = {row.dtype: row.tolerance for row in rows}
    tolerances = ", ".join(f"{limit:g} in {dtype}" for dtype, limit in limits.items())
    lines = [
        f"{len(rows)} {'layout' if len(rows) == 1 else 'layouts'}: in {steps} steps "
        f"{len(passed)} gave one rank's run "
        f"(to {tolerances}), {sum(row.bitwise for row in passed)} of them bit for bit; "
        f"{refused} refused; {len(failed)} failed"
    ]
    lines += [f"failed: {' '.join([*row.variant, row.layout])}" for row in failed]
    if any(row.only_weights and row.dtype != "float64" for row in failed):
        lines.append(
            "Where only weights differ: an optimizer.eps as small as the gradients' rounding noise "
            "turns noise into steps; --optimizer.eps=1e-3 or --train.dtype=float64 tell it from a "
            "mistake."
        )
    return "\n".join(lines)


def markdown(rows: Iterable[Row]) -> str:
    """Tables of what ran, one a dtype, and the layouts refused by reason; worst over variants."""
    text: list[str] = []
    tables: dict[str, dict[str, list[Row]]] = {}
    refused: dict[str, list[str]] = {}
    for row in rows:
        if row.refused:
            layouts = refused.setdefault(row.refused, [])
            layouts += [row.layout] if row.layout not in layouts else []
        else:
            tables.setdefault(row.dtype, {}).setdefault(row.layout, []).append(row)
    for dtype, table in tables.items():
        first = next(iter(table.values()))[0]
        text += [
            f"## {dtype}, to {first.tolerance:g}",
            "",
            "| ranks | layout | loss | norm | weights | same bits | passed | ms a step | bytes a "
            "step |",
            "|---|---|---|---|---|---|---|---|---|",
        ]
        text += [_markdown_row(same) for same in table.values()]
        text.append("")
    if refused:
        text += ["## Refused", ""]
        for reason, names in refused.items():
            listed = ", ".join(f"`{name}`" for name in names)
            text.append(f"- {reason}: {listed}")
        text.append("")
    return "\n".join(text)


def _markdown_row(rows: Sequence[Row]) -> str:
    """One layout, worst over the variants; time and bytes of the first."""
    first, count = rows[0], len(rows)
    cells = [
        str(first.ranks),
        f"`{first.layout}`",
        *(f"{max(getattr(row, name) for row in rows):.1e}" for name in ("loss", "norm", "weights")),
        _of(sum(row.bitwise for row in rows), count),
        _of(sum(row.result == "pass" for row in rows), count),
        f"{first.seconds * 1e3:.1f}",
        _sent_text(first),
    ]
    return "| " + " | ".join(cells) + " |"


def _of(some: int, count: int) -> str:
    """How many of the variants, in a word where it is all of them or none."""
    return {0: "no", count: "yes"}.get(some, f"{some} of {count}")


def _sent_text(row: Row) -> str:
    """Bytes a step by axis."""
    return ", ".join(f"{axis} {_bytes_text(count)}" for axis, count in (row.sent or {}).items())


def _bytes_text(count: float) -> str:
    """A number of bytes in few letters.

    >>> _bytes_text(12345)
    '12.3 kB'
    """
    for unit in ("B", "kB", "MB", "GB"):
        if count < 1000:
            return f"{count:.3g} {unit}"
        count /= 1000
    return f"{count:.3g} TB"
