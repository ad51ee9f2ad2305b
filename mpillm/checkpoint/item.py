"""What a rank gives to be saved, as arrays or as blocks, and what it was written as."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from mpillm.checkpoint.manifest import DTYPES, KIND, NAME, Piece
from mpillm.parallel.shard import Shard

__all__ = ["BLOCK", "Blocks", "Item", "Part", "check", "flat_blocks"]

BLOCK = 2**23
"""Bytes hashed, written, compared or sent at a time."""

Blocks = Iterable[npt.NDArray[Any]]
"""Arrays that are, flattened in C order, one part of an item after another."""


@dataclass(frozen=True)
class Item:
    """A part of a global array that this rank has. Over all ranks the parts tile the array.

    kind: "parameter", "optimizer/m", ...: lower-case words joined by slashes.
    array: on the host; of the shard's local shape or, with a range, of shape (stop - start,). Or a
    function that gives its blocks when it is written, with `dtype`, the name of their type.
    range: None, or [start, stop) in the C-order flattened shard (a ZeRO slice).
    """

    kind: str
    name: str
    shard: Shard
    array: npt.NDArray[Any] | Callable[[], Blocks]
    range: tuple[int, int] | None = None
    dtype: str = ""

    def __post_init__(self) -> None:
        if not callable(self.array):
            object.__setattr__(self, "dtype", self.array.dtype.name)
        check(self.kind, self.name, self.shard, self.range, self.dtype)
        if callable(self.array):
            return
        shape = self.shard.local_shape if self.range is None else (self.size,)
        if self.array.shape != shape:
            raise ValueError(f"{self.name}: shape {self.array.shape}, expected {shape}")

    @property
    def size(self) -> int:
        """Number of elements."""
        start, stop = self.range or (0, self.shard.size)
        return stop - start

    @property
    def nbytes(self) -> int:
        """Bytes of the elements."""
        return self.size * DTYPES[self.dtype].itemsize

    def blocks(self) -> npt.NDArray[Any] | Blocks:
        """The array, or its blocks, which come once."""
        return self.array() if callable(self.array) else np.asarray(self.array)


@dataclass(frozen=True)
class Part:
    """An item as it was written, and the piece that holds it; None when it has no elements.

    A rank does not know its file's place in the manifest: `piece.file` is 0.
    """

    kind: str
    name: str
    dtype: str
    shape: tuple[int, ...]
    piece: Piece | None


def flat_blocks(
    array: npt.NDArray[Any], dtype: np.dtype[Any], size: int = BLOCK
) -> Iterator[npt.NDArray[Any]]:
    """The elements of an array in C order as flat arrays of type `dtype`.

    Of at most `size` bytes, or one row where rows are larger and not contiguous. Nothing is copied
    where the array is contiguous and of that type.
    """
    if array.flags.c_contiguous and array.dtype == dtype:
        flat, step = array.reshape(-1), max(size // dtype.itemsize, 1)
        for low in range(0, flat.size, step):
            yield flat[low : low + step]
    elif array.ndim == 0 or not array.size:
        yield array.astype(dtype).reshape(-1)
    else:
        step = max(size * len(array) // array.nbytes, 1)
        for low in range(0, len(array), step):
            yield np.asarray(array[low : low + step], dtype, order="C").reshape(-1)


def check(kind: str, name: str, shard: Shard, range: tuple[int, int] | None, dtype: str) -> None:
    """ValueError for an item that cannot be stored."""
    if not (re.match(KIND, kind) and re.match(NAME, name)):
        raise ValueError(f"kind '{kind}' or name '{name}' cannot be stored")
    if dtype not in DTYPES:
        raise ValueError(f"{name}: dtype {dtype or 'unknown'} cannot be stored")
    start, stop = range or (0, shard.size)
    if not 0 <= start <= stop <= shard.size:
        raise ValueError(f"{name}: [{start}, {stop}) does not lie in {shard}")
