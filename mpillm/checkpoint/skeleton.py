"""An HDF5 file without its elements: HDF5 lays it out in memory and never touches the disk.

HDF5 2.0 leaks the file, prints, and in the end crashes the process when a write fails because the
disk is full; a thread that is inside HDF5 when the process ends crashes or hangs it. Both are out
of the way when HDF5 only says where each dataset's elements belong, and what stands between them.
"""

from __future__ import annotations

import io
import os
from typing import TYPE_CHECKING, Any, final

import h5py
import numpy as np

from mpillm.storage.hdf5 import FORMAT

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Skeleton"]

_PAGE = 4096


@final
class Skeleton:
    """The metadata of a new HDF5 file of contiguous datasets; `close` it when all are reserved."""

    def __init__(self) -> None:
        self._memory = _SparseMemory()
        self._file = h5py.File(self._memory, "w", libver=FORMAT)
        self._links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        self._links.set_create_intermediate_group(True)
        self._settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        self._settings.set_layout(h5py.h5d.CONTIGUOUS)
        self._settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        self._settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        self._settings.set_obj_track_times(False)

    def note(self, name: str, value: str | int) -> None:
        """Give the file an attribute: text, of fixed length, or a number."""
        content = np.bytes_(value.encode()) if isinstance(value, str) else np.int64(value)
        self._file.attrs.create(name, content)

    def reserve(self, dataset: str, shape: tuple[int, ...], dtype: np.dtype[Any]) -> int:
        """Make a dataset; returns where in the file its elements begin, 0 where it has none."""
        space = h5py.h5s.create_simple(shape) if shape else h5py.h5s.create(h5py.h5s.SCALAR)
        made = h5py.h5d.create(
            self._file.id,
            dataset.encode(),
            h5py.h5t.py_create(dtype),
            space,
            self._settings,
            self._links,
        )
        return int(made.get_offset() or 0)

    def close(self) -> int:
        """Have HDF5 write its metadata, to memory; returns the size of the whole file in bytes."""
        self._file.close()
        return self._memory.size

    def between(self, start: int, stop: int) -> bytes:
        """The bytes of a stretch of the file, elements as zeros."""
        return self._memory.read(start, stop)


@final
class _SparseMemory(io.RawIOBase):
    """A file in memory, of which only the pages that were written take room."""

    def __init__(self) -> None:
        super().__init__()
        self._pages: dict[int, bytearray] = {}
        self._place = 0
        self.size = 0

    def read(self, start: int, stop: int) -> bytes:  # type: ignore[override]
        parts = []
        while start < stop:
            page, low = divmod(start, _PAGE)
            high = min(_PAGE, low + stop - start)
            parts.append(bytes(self._pages[page][low:high] if page in self._pages else high - low))
            start += high - low
        return b"".join(parts)

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        self._place = (0, self._place, self.size)[whence] + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Buffer) -> int:
        view = memoryview(buffer).cast("B")
        count = max(min(len(view), self.size - self._place), 0)
        view[:count] = self.read(self._place, self._place + count)
        self._place += count
        return count

    def write(self, data: Buffer) -> int:
        view = memoryview(data).cast("B")
        done = 0
        while done < len(view):
            page, low = divmod(self._place + done, _PAGE)
            count = min(_PAGE - low, len(view) - done)
            content = self._pages.setdefault(page, bytearray(_PAGE))
            content[low : low + count] = view[done : done + count]
            done += count
        self._place += done
        self.size = max(self.size, self._place)
        return done

    def truncate(self, size: int | None = None) -> int:
        self.size = self._place if size is None else size
        return self.size
