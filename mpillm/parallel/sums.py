"""Sums of arrays as a tree, the order of additions that the package promises."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from mpillm.parallel.buffers import is_half

__all__ = ["add_up", "pairwise_sum"]

# Bytes of all parts that are added at once: they stay in a core's cache until the sum is written.
_TILE = 1 << 19


def pairwise_sum(parts: Sequence[Any]) -> Any:
    """Sum of arrays as a tree: the first half is the largest power of two below their number.

    Aligned blocks of a power of two are subtrees, so that a sum over micro-batches is the same
    whether the blocks are added here or on the ranks that own them.

    >>> pairwise_sum([1.0, 2.0, 3.0])
    6.0
    """
    count = len(parts)
    if count == 1:
        return parts[0]
    half = 1 << ((count - 1).bit_length() - 1)
    return pairwise_sum(parts[:half]) + pairwise_sum(parts[half:])


def add_up(parts: Sequence[np.ndarray], outs: Sequence[np.ndarray]) -> None:
    """Write the pairwise sum of flat arrays of one size and type to each of `outs`.

    The bits are those of `pairwise_sum`, but no array of the whole size is made: sums are made and
    written in tiles. `outs` may be parts themselves. 16-bit floats accumulate in float32.
    """
    dtype = parts[0].dtype
    step = max(1, _TILE // (len(parts) * dtype.itemsize))
    # Two parts can be added in place; of more, one might be overwritten before it is added.
    alone = len(parts) > 2 and not is_half(dtype)
    rooms = np.empty((len(parts).bit_length(), min(step, parts[0].size)), dtype) if alone else None
    for low in range(0, parts[0].size, step):
        tiles = [part[low : low + step] for part in parts]
        first = outs[0][low : low + step]
        if is_half(dtype):
            with np.errstate(over="ignore"):  # a sum beyond the type is infinite
                first[...] = pairwise_sum([tile.astype(np.float32) for tile in tiles])
        elif rooms is None:
            _tree(tiles, [first])
        else:
            total = rooms[:, : len(first)]
            _tree(tiles, total)
            first[...] = total[0]
        for out in outs[1:]:
            out[low : low + step] = first


def _tree(parts: Sequence[np.ndarray], rooms: Any) -> None:
    """The pairwise sum, written to rooms[0]; each level of the tree takes a room more."""
    count = len(parts)
    if count <= 2:
        np.add(parts[0], parts[1], out=rooms[0]) if count == 2 else np.copyto(rooms[0], parts[0])
        return
    half = 1 << ((count - 1).bit_length() - 1)
    _tree(parts[:half], rooms)
    if count - half == 1:
        np.add(rooms[0], parts[half], out=rooms[0])
        return
    _tree(parts[half:], rooms[1:])
    np.add(rooms[0], rooms[1], out=rooms[0])
