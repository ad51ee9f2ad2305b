"""The one guarded reader of HDF5 files: checkpoints, tokens, exported weights.

It reads what mpillm writes (`FORMAT`, groups, datasets in one contiguous run without filters, and
attributes of one number or string of fixed length) and refuses everything else in one line: links
other than hard ones, external storage, virtual and chunked datasets, types that are no plain
numbers, shapes whose elements are not there.

libhdf5 writes these files but does not read them here. A file whose metadata were changed and their
checksums put right makes libhdf5 2.0 crash or divide by zero in about one of a hundred cases; the
few structures that are needed are read in Python instead (`hdf5_metadata`, `hdf5_groups`), where
each access is checked, and elements are read straight from the file into the caller's array.
"""

from __future__ import annotations

import os
import struct
from pathlib import Path
from types import TracebackType
from typing import Any, final

import numpy as np

from mpillm.storage import hdf5_metadata as metadata
from mpillm.storage.disk import Damaged, open_file
from mpillm.storage.hdf5_groups import read_links
from mpillm.storage.source import Source, StoredArray, bytes_of, told

__all__ = ["FORMAT", "Hdf5File"]

FORMAT = ("v110", "v110")
"""What to give h5py as `libver` for a file that is to be read here. HDF5 1.10 and later read it,
and its metadata carry checksums."""

Scalar = str | int | float


@final
class Hdf5File:
    """An HDF5 file, open for reading; close it, or use it in a `with` statement.

    path: a regular file, not a link, of `size` bytes if that is known. Raises Damaged for anything
    that mpillm would not have written, UserError where the file cannot be read.
    """

    def __init__(self, path: Path, size: int | None = None) -> None:
        self.path = path
        self._handle = open_file(path)
        try:
            self.status = os.fstat(self._handle)
            found = self.status.st_size
            if size not in (None, found):
                raise Damaged(f"{path} is damaged: {found} bytes, expected {size}")
            self._source = Source(self._handle)
            with told(f"{path} is not readable HDF5"):
                self._root = metadata.read_superblock(self._source)
            self._groups: dict[int, dict[str, int | None]] = {}
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> Hdf5File:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; its datasets cannot be read afterwards."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def names(self, group: str = "") -> list[str]:
        """Names in a group, by default the root, in the order of the file."""
        where = f"{self.path}, group {group or '/'!r}"
        with told(where):
            return list(self._links(self._walk(group), where))

    def find(
        self, name: str, dtype: np.dtype[Any] | None = None, shape: tuple[int, ...] | None = None
    ) -> StoredArray:
        """The dataset at a path such as `parameter/head.norm.gain`.

        Raises Damaged if it is not there in full, in this file, contiguous, or of another type or
        shape than the given ones.
        """
        where = f"{self.path}, dataset {name!r}"
        with told(where):
            messages = metadata.read_header(self._source, self._walk(name))
            layout = _layout(messages)
            found = metadata.decode_dataspace(metadata.one(messages, metadata.DATASPACE))
            cursor = metadata.one(messages, metadata.DATATYPE)
            kind = metadata.decode_datatype(cursor.take(cursor.left))
            if shape is not None and shape != found:
                raise ValueError(f"it has shape {found}, expected {shape}")
            if dtype is not None and dtype != kind:
                raise ValueError(f"it has elements of type {kind}, expected {dtype}")
            address, held = struct.unpack("<QQ", layout.take(16))
            if address == metadata.NOWHERE:
                address, held = 0, 0
            needed = bytes_of(found, kind.itemsize)
            if held != needed or address + held > self._source.size:
                raise ValueError(f"it holds {held} bytes, expected {needed}")
            return StoredArray(where, self._source, address, found, kind)

    def attributes(self, name: str = "") -> dict[str, Scalar]:
        """The attributes of a group or dataset, by default the root, each one number or string."""
        with told(f"{self.path}, attributes of {name or '/'!r}"):
            messages = metadata.read_header(self._source, self._walk(name))
            for kind, content in messages:
                if kind == metadata.ATTRIBUTE_INFO and not content.endswith(b"\xff" * 16):
                    raise ValueError("there are too many")
            found = [
                metadata.decode_attribute(content)
                for kind, content in messages
                if kind == metadata.ATTRIBUTE
            ]
            if len(dict(found)) < len(found):
                raise ValueError("one stands twice")
            return dict(found)

    def _walk(self, name: str) -> int:
        """The address of the object at a path."""
        address, above = self._root, "/"
        for part in name.split("/") if name else ():
            links = self._links(address, f"'{above}'")
            if part not in links:
                raise ValueError(f"there is no {part!r}")
            there = links[part]
            if there is None:
                raise ValueError(
                    f"{part!r} is a link to another place; only hard links are followed"
                )
            address, above = there, part
        return address

    def _links(self, address: int, what: str) -> dict[str, int | None]:
        """The links of the group at an address."""
        if address not in self._groups:
            messages = metadata.read_header(self._source, address)
            if all(kind != metadata.LINK_INFO for kind, _ in messages):
                raise ValueError(f"{what} is not a group")
            self._groups[address] = read_links(self._source, messages)
        return self._groups[address]


def _layout(messages: metadata.Messages) -> metadata.Cursor:
    """Where a dataset's elements lie: an address and a number of bytes."""
    kinds = {kind for kind, _ in messages}
    if metadata.LAYOUT not in kinds:
        raise ValueError("it is not a dataset")
    if metadata.EXTERNAL_FILES in kinds:
        raise ValueError("it keeps its elements in another file")
    cursor = metadata.one(messages, metadata.LAYOUT)
    version, layout = cursor.take(2)
    if version not in (3, 4):
        raise ValueError(f"its layout has version {version}, expected that of HDF5 1.10")
    if layout == 3:
        raise ValueError("it is a virtual dataset")
    if layout != 1 or metadata.FILTERS in kinds:
        raise ValueError("it is chunked, compact or filtered, not contiguous")
    return cursor
