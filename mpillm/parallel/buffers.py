"""Runs of elements in flat host arrays: what a collective of uneven parts sends and receives."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from mpi4py import MPI

__all__ = ["Room", "cut", "is_half", "offsets", "pack", "runs", "unpack"]


class Room:
    """Memory that is used again: a page that was touched once need not be faulted in again."""

    def __init__(self) -> None:
        self._bytes = np.empty(0, np.uint8)

    def take(self, size: int, dtype: np.dtype[Any]) -> np.ndarray:
        """A flat array with undefined contents, for use until the next one is taken."""
        nbytes = size * dtype.itemsize
        if nbytes > self._bytes.size:
            self._bytes = np.empty(nbytes, np.uint8)
        return self._bytes[:nbytes].view(dtype)


def offsets(counts: Sequence[int]) -> list[int]:
    """Where each run begins when runs of these lengths lie one after another."""
    starts, total = [], 0
    for count in counts:
        starts.append(total)
        total += count
    return starts


def runs(x: np.ndarray, counts: Sequence[int]) -> list[Any]:
    """What mpi4py needs to move the runs of a flat array, as bytes."""
    sizes = [x.itemsize * count for count in counts]
    return [x.view(np.uint8), (sizes, offsets(sizes)), MPI.BYTE]


def cut(counts: Sequence[int], low: int, stride: int) -> list[int]:
    """How much of each run lies in [low, low + stride)."""
    return [max(0, min(count - low, stride)) for count in counts]


def pack(x: np.ndarray, starts: Sequence[int], sizes: Sequence[int], low: int) -> np.ndarray:
    """Elements from `low` on of each run, one after another."""
    places = zip(starts, sizes, strict=True)
    return np.concatenate([x[start + low : start + low + size] for start, size in places])


def unpack(
    packed: np.ndarray, x: np.ndarray, starts: Sequence[int], sizes: Sequence[int], low: int
) -> None:
    """Put what was packed back in its place."""
    for start, size, place in zip(starts, sizes, offsets(sizes), strict=True):
        x[start + low : start + low + size] = packed[place : place + size]


def is_half(dtype: np.dtype[Any]) -> bool:
    """Whether it is a 16-bit floating type; bfloat16 has no kind of NumPy's."""
    return dtype.itemsize == 2 and dtype.kind not in "iu"
