"""Bytes and arrays of an open file, read within its bounds."""

from __future__ import annotations

import math
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any, final

import numpy as np
import numpy.typing as npt

from mpillm.errors import UserError
from mpillm.storage.disk import Damaged

__all__ = ["Source", "StoredArray", "bytes_of", "told"]

_LONGEST_READ = 2**30  # bytes; some systems read less than 2 GiB at a time
_LARGEST_ARRAY = 2**60  # bytes; NumPy makes no array beyond its addresses, not even an empty one


@final
class Source:
    """An open file's bytes. Reading beyond its end raises ValueError, before memory is taken."""

    def __init__(self, handle: int) -> None:
        self._handle = handle
        self.size = os.fstat(handle).st_size

    def read(self, address: int, count: int) -> bytes:
        """The bytes at an address."""
        self._check(address, count)
        buffer = bytearray(count)
        self.read_into(memoryview(buffer), address)
        return bytes(buffer)

    def read_into(self, buffer: memoryview, address: int) -> None:
        """Fill a buffer of bytes from an address."""
        self._check(address, len(buffer))
        done = 0
        while done < len(buffer):
            part = buffer[done : done + _LONGEST_READ]
            count = os.preadv(self._handle, [part], address + done)
            if not count:
                raise ValueError(f"it was cut short to {address + done} bytes while it was read")
            done += count

    def _check(self, address: int, count: int) -> None:
        if not 0 <= address <= address + count <= self.size:
            raise ValueError(f"{count} bytes at {address} do not lie in {self.size}")


@final
class StoredArray:
    """An array whose elements lie in one run of a file, in C order."""

    def __init__(
        self,
        where: str,
        source: Source,
        address: int,
        shape: tuple[int, ...],
        dtype: np.dtype[Any],
    ) -> None:
        self.where = where
        self.shape = shape
        self.dtype = dtype
        self.size = math.prod(shape)
        self._source = source
        self._address = address

    def read(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Elements [start, stop) of the flattened array, all by default.

        Returns a new array of shape (stop - start,) and the file's dtype. Raises Damaged where the
        file has become shorter, UserError where it cannot be read, ValueError for a range that does
        not lie in the array.
        """
        stop = self.size if stop is None else stop
        if not 0 <= start <= stop <= self.size:
            raise ValueError(f"[{start}, {stop}) does not lie in the {self.size} of {self.where}")
        out = np.empty(stop - start, self.dtype)
        with told(self.where):
            address = self._address + start * self.dtype.itemsize
            self._source.read_into(memoryview(out.view(np.uint8).data), address)
        return out

    def rows(self, start: int = 0, stop: int | None = None) -> npt.NDArray[Any]:
        """Rows [start, stop) along the first axis, all by default, of an array that has axes.

        Returns a new array of shape (stop - start, ...). Raises as `read` does.
        """
        count, row = self.shape[0], math.prod(self.shape[1:])
        stop = count if stop is None else stop
        if not 0 <= start <= stop <= count:
            raise ValueError(f"rows [{start}, {stop}) do not lie in the {count} of {self.where}")
        return self.read(start * row, stop * row).reshape(stop - start, *self.shape[1:])


def bytes_of(shape: Sequence[int], itemsize: int) -> int:
    """Bytes of an array's elements. Raises ValueError for a shape that no array can have."""
    if math.prod(max(count, 1) for count in shape) * itemsize > _LARGEST_ARRAY:
        raise ValueError(f"shape {tuple(shape)} is larger than any")
    return math.prod(shape) * itemsize


@contextmanager
def told(where: str) -> Iterator[None]:
    """Raise what is wrong with a file's bytes as Damaged, in one line that begins with `where`.

    What the file system refuses becomes a UserError.
    """
    try:
        yield
    except ValueError as error:
        raise Damaged(f"{where}: {error}") from None
    except OSError as error:
        raise UserError(f"{where}: cannot be read: {error.strerror}") from None
