"""Flight recorder and traffic ledger: every call of every Group passes here.

The recorder keeps the last calls in a ring of fixed-size records, in memory or in a memory-mapped
file that outlives the process, and sums of calls, bytes and seconds for each (axis, operation).
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["RECORD", "Entry", "Recorder", "Traffic"]

# One call. `number` counts this rank's calls from 1, 0 marks an unused record; `sequence` counts
# the calls of one operation kind on one axis (collectives together, messages by direction and peer
# apart), so that it means the same on every rank; `end` is 0 while the call is under way; times are
# seconds since the epoch.
RECORD = np.dtype(
    [
        ("number", "<u8"),
        ("sequence", "<u8"),
        ("axis", "S15"),
        ("op", "S15"),
        ("peer", "<i4"),
        ("bytes", "<i8"),
        ("begin", "<f8"),
        ("end", "<f8"),
    ]
)


@dataclass
class Traffic:
    """Sums over the calls of one operation on one axis: bytes are payload handed to the calls."""

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


@dataclass(frozen=True)
class Entry:
    """A call that has begun."""

    number: int
    axis: str
    op: str
    begin: float


class Recorder:
    """The last `capacity` calls of this rank, and the sums of all."""

    def __init__(self, path: Path | None = None, capacity: int = 1024) -> None:
        """With `path`, the ring is that file, readable after the process was killed."""
        if path is None:
            self._ring: Any = np.zeros(capacity, dtype=RECORD)
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._ring = np.memmap(path, dtype=RECORD, mode="w+", shape=(capacity,))
        self._count = 0
        self._sequences: dict[tuple[str, str, int], int] = {}
        self.traffic: dict[tuple[str, str], Traffic] = {}

    def begin(self, axis: str, op: str, nbytes: int, peer: int = -1) -> Entry:
        """Note that a call begins; `peer` is a rank of the group, -1 for a collective."""
        key = (axis, op if peer >= 0 else "", peer)
        sequence = self._sequences.get(key, 0)
        self._sequences[key] = sequence + 1
        number, self._count = self._count, self._count + 1
        now = time.time()
        self._ring[number % len(self._ring)] = (
            self._count,
            sequence,
            axis,
            op,
            peer,
            nbytes,
            now,
            0.0,
        )
        total = self.traffic.setdefault((axis, op), Traffic())
        total.calls += 1
        total.bytes += nbytes
        return Entry(number, axis, op, now)

    def end(self, entry: Entry) -> None:
        """Note that the call is complete."""
        now = time.time()
        if self._count - entry.number <= len(self._ring):  # else the ring has come round
            self._ring[entry.number % len(self._ring)]["end"] = now
        self.traffic[entry.axis, entry.op].seconds += now - entry.begin

    def last(self, count: int | None = None) -> np.ndarray:
        """The last calls, oldest first, as an array of RECORD."""
        kept = min(self._count, len(self._ring))
        count = kept if count is None else min(count, kept)
        slots = np.arange(self._count - count, self._count) % len(self._ring)
        calls: np.ndarray = np.array(self._ring[slots])
        return calls
