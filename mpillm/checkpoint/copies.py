"""Copies of what is saved while it changes: one buffer that is used again from save to save."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import accumulate
from typing import Any

import numpy as np
import numpy.typing as npt

from mpillm.checkpoint.item import Item
from mpillm.checkpoint.manifest import DTYPES

__all__ = ["Copies"]

Array = npt.NDArray[Any]

_ALIGNMENT = 64  # bytes, of each copy


class Copies:
    """Room for flat copies of items, in the byte order in which they are stored."""

    def __init__(self) -> None:
        self._buffer = np.empty(0, np.uint8)

    def take(self, items: Sequence[Item]) -> tuple[list[Array], list[tuple[Array, Array]]]:
        """Copy the items that come as blocks now; make room for copies of those with an array.

        Returns the copies of all, in the room of those that were made before; and, for those that
        are still to be made, where to and from what, by `numpy.copyto`.
        """
        ends = list(accumulate(-(-item.nbytes // _ALIGNMENT) * _ALIGNMENT for item in items))
        if ends and self._buffer.nbytes < ends[-1]:
            self._buffer = np.empty(ends[-1], np.uint8)
        copies: list[Array] = []
        later: list[tuple[Array, Array]] = []
        for start, item in zip([0, *ends], items, strict=False):
            copy = self._buffer[start : start + item.nbytes].view(DTYPES[item.dtype])
            copies.append(copy)
            blocks = item.blocks()
            if isinstance(blocks, np.ndarray):
                later.append((copy.reshape(blocks.shape), blocks))
                continue
            for block in blocks:
                copy[: block.size].reshape(block.shape)[...] = block
                copy = copy[block.size :]
        return copies, later
