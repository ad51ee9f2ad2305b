"""One rank's HDF5 file: what goes into it, and how it is written."""

from __future__ import annotations

import hashlib
import io
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import TYPE_CHECKING, Any, final

import h5py
import numpy as np
import numpy.typing as npt

from mpillm.checkpoint.files import hash_file
from mpillm.checkpoint.manifest import DTYPES, KIND, NAME, File, Piece
from mpillm.parallel.shard import Shard

if TYPE_CHECKING:
    from typing_extensions import Buffer

__all__ = ["Item", "Part", "write_shard"]

_HDF5_FORMAT = ("v110", "v110")  # its metadata carry checksums; HDF5 1.10 and later read it


@dataclass(frozen=True)
class Item:
    """A part of a global array that this rank writes. Over all ranks the parts tile the array.

    kind: "parameter", "optimizer/m", ...: lower-case words joined by slashes.
    array: on the host; of the shard's local shape or, with a range, of shape (stop - start,).
    range: None, or [start, stop) in the C-order flattened shard (a ZeRO slice).
    """

    kind: str
    name: str
    shard: Shard
    array: npt.NDArray[Any]
    range: tuple[int, int] | None = None

    def __post_init__(self) -> None:
        if not (re.match(KIND, self.kind) and re.match(NAME, self.name)):
            raise ValueError(f"kind '{self.kind}' or name '{self.name}' cannot be stored")
        if self.array.dtype.name not in DTYPES:
            raise ValueError(f"{self.name}: dtype {self.array.dtype} cannot be stored")
        start, stop = self.range or (0, self.shard.size)
        if not 0 <= start <= stop <= self.shard.size:
            raise ValueError(f"{self.name}: [{start}, {stop}) does not lie in {self.shard}")
        shape = self.shard.local_shape if self.range is None else (stop - start,)
        if self.array.shape != shape:
            raise ValueError(f"{self.name}: shape {self.array.shape}, expected {shape}")


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


def write_shard(path: Path, items: Sequence[Item]) -> tuple[File | None, tuple[Part, ...]]:
    """Write, fsync and hash a new file of the items that have elements; no file when none has.

    Raises OSError when the file system fails.
    """
    if not any(item.array.size for item in items):
        return None, tuple(_part(item, None) for item in items)
    parts: list[Part] = []
    copies: dict[str, int] = {}
    with _Sink(path) as sink:
        try:
            with h5py.File(sink, "w", libver=_HDF5_FORMAT) as file:
                for item in items:
                    parts.append(_part(item, _write_item(file, item, copies)))
                    sink.check()
        finally:
            sink.check()  # the file system's failure explains any that HDF5 has after it
        sink.sync()
    return File(path.name, path.stat().st_size, hash_file(path)), tuple(parts)


def _part(item: Item, piece: Piece | None) -> Part:
    return Part(item.kind, item.name, item.array.dtype.name, item.shard.shape, piece)


def _write_item(file: h5py.File, item: Item, copies: dict[str, int]) -> Piece | None:
    """Write an item as a dataset. copies: how many pieces of each array the file already has."""
    if not item.array.size:
        return None
    dataset = f"{item.kind}/{item.name}"
    count = copies[dataset] = copies.get(dataset, -1) + 1
    if count:
        dataset = f"{dataset}#{count}"
    data = np.asarray(item.array, dtype=DTYPES[item.array.dtype.name], order="C")
    file.create_dataset(dataset, data=data)
    digest = hashlib.sha256(data.data).hexdigest()
    return Piece(item.shard.start, item.shard.stop, item.range, 0, dataset, digest)


@final
class _Sink(io.RawIOBase):
    """A new file for HDF5 to write in that never fails.

    HDF5 2.0 leaks the file, prints, and in the end crashes the process when a write fails because
    the disk is full. So the first failure is kept for `check` to raise, and what comes after it is
    dropped.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self._file = path.open("x+b", buffering=0)
        self._place = 0
        self._error: OSError | None = None

    def check(self) -> None:
        """Raise the first failure, if there was one."""
        if self._error is not None:
            raise self._error

    def sync(self) -> None:
        """fsync."""
        os.fsync(self._file.fileno())

    def close(self) -> None:
        self._file.close()
        super().close()

    def __enter__(self) -> _Sink:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        start = (0, self._place, os.fstat(self._file.fileno()).st_size)[whence]
        self._place = start + offset
        return self._place

    def tell(self) -> int:
        return self._place

    def readinto(self, buffer: Buffer) -> int:
        count = os.preadv(self._file.fileno(), [buffer], self._place)
        self._place += count
        return count

    def write(self, data: Buffer) -> int:
        view = memoryview(data)
        done = 0
        try:
            while done < len(view) and self._error is None:
                done += os.pwrite(self._file.fileno(), view[done:], self._place + done)
        except OSError as error:
            self._error = error
        self._place += len(view)
        return len(view)

    def truncate(self, size: int | None = None) -> int:
        size = self._place if size is None else size
        try:
            os.truncate(self._file.fileno(), size)
        except OSError as error:
            self._error = self._error or error
        return size
