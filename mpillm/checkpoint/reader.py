"""Reading a checkpoint: any hyperslab of any array, from the pieces that overlap it.

Every file is opened by one guard, `_open`, and every dataset found by one guard, `_find`: regular
files of the listed size, datasets reached by hard links alone, stored in one contiguous run in the
file itself, of exactly the listed type and shape.

The first time a piece is needed it is read whole, in blocks, and its hash is checked on the very
bytes that are handed out; after that only the blocks that are needed are read. So damage never
goes unnoticed, and a rank of a large job reads no more files than it has pieces in. The metadata of
HDF5 carry checksums of their own. The hash of a whole file is for `verify` and `sha256sum`.
"""

from __future__ import annotations

import hashlib
import math
import os
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import TracebackType
from typing import Any, final

import h5py
import numpy as np
import numpy.typing as npt

from mpillm.checkpoint.files import Damaged, file_size
from mpillm.checkpoint.manifest import (
    DTYPES,
    Array,
    File,
    Manifest,
    Piece,
    read_manifest,
)
from mpillm.errors import UserError, did_you_mean
from mpillm.parallel.shard import Shard

__all__ = ["Checkpoint", "flat_boxes"]

_BLOCK = 2**22  # elements read at a time
_OPEN_FILES = 16
_HDF5_ERRORS = (OSError, RuntimeError, KeyError, ValueError, TypeError)  # all that h5py raises


def flat_boxes(
    shape: tuple[int, ...], start: int, stop: int
) -> Iterator[tuple[tuple[int, ...], tuple[int, ...]]]:
    """Cut a C-order range of an array into boxes that are contiguous in that order, in that order.

    Yields the start and stop of each box, at most 2 * axes - 1 of them.

    >>> list(flat_boxes((3, 4), 3, 10))
    [((0, 3), (1, 4)), ((1, 0), (2, 4)), ((2, 0), (3, 2))]
    """
    if start >= stop:
        return
    if not shape:
        yield (), ()
        return
    inner = math.prod(shape[1:])
    (row, begin), (last, end) = divmod(start, inner), divmod(stop, inner)
    if begin or row == last:
        for low, high in flat_boxes(shape[1:], begin, end if row == last else inner):
            yield (row, *low), (row + 1, *high)
        row += 1
    if row < last:
        yield (row, *(0 for _ in shape[1:])), (last, *shape[1:])
    if row <= last:
        for low, high in flat_boxes(shape[1:], 0, end):
            yield (last, *low), (last + 1, *high)


@dataclass
class _OpenFile:
    """An open file and the datasets in it whose hash was right."""

    handle: h5py.File
    checked: set[str] = field(default_factory=set)


@final
class Checkpoint:
    """A committed checkpoint, open for reading; close it, or use it in a `with` statement.

    No communicator is involved: each rank opens its own, or is handed a manifest that one rank
    has read.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._arrays = {(array.kind, array.name): array for array in manifest.arrays}
        self._files: OrderedDict[int, _OpenFile] = OrderedDict()

    @classmethod
    def open(cls, path: Path) -> Checkpoint:
        """Open a checkpoint's folder. Raises UserError for a manifest that cannot be trusted."""
        return cls(path, read_manifest(path))

    def __enter__(self) -> Checkpoint:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the files; a later read opens them again."""
        for file in self._files.values():
            file.handle.close()
        self._files.clear()

    def kinds(self) -> list[str]:
        """The kinds of arrays, in the order in which they were saved."""
        return list(dict.fromkeys(kind for kind, _ in self._arrays))

    def names(self, kind: str = "parameter") -> list[str]:
        """Names of the arrays of a kind, in the order in which they were saved."""
        return [name for its_kind, name in self._arrays if its_kind == kind]

    def array(self, kind: str, name: str) -> Array:
        """What the manifest says of an array. Raises UserError if there is no such array."""
        found = self._arrays.get((kind, name))
        if found is None:
            near = did_you_mean(name, self.names(kind))
            raise UserError(f"{self.path} holds no {kind} '{name}'; {near}")
        return found

    def shape(self, name: str, kind: str = "parameter") -> tuple[int, ...]:
        """Global shape of an array."""
        return self.array(kind, name).shape

    def read(
        self, kind: str, name: str, shard: Shard, range: tuple[int, int] | None = None
    ) -> npt.NDArray[Any]:
        """Read a hyperslab of an array or, with a range, that part of it.

        shard: of the array's global shape. range: [start, stop) in the C-order flattened shard (a
        ZeRO slice). Returns a new array of the stored dtype, of the shard's local shape or, with a
        range, of shape (stop - start,).

        Raises UserError if there is no such array, its global shape is another, the checkpoint
        lacks a part of what is asked for, or what it holds is not what was saved (Damaged).
        """
        array = self.array(kind, name)
        if array.shape != shard.shape:
            raise UserError(
                f"{self.path}: {kind} '{name}' has shape {array.shape}, expected {shard.shape}"
            )
        start, stop = range or (0, shard.size)
        flat = np.empty(stop - start, DTYPES[array.dtype].newbyteorder("="))
        wanted = [(box, flat[at : at + box.size]) for box, at in _boxes(shard, start, stop)]
        targets = [(box, part.reshape(box.local_shape)) for box, part in wanted]
        filled = sum(self._pour(array, piece, targets) for piece in array.pieces)
        if filled < flat.size:
            raise Damaged(
                f"{self.path}: {flat.size - filled} elements of {kind} '{name}' are in no piece"
            )
        return flat if range else flat.reshape(shard.local_shape)

    def check(self, array: Array, piece: Piece) -> None:
        """Read a piece whole. Raises Damaged if it is not what the manifest says."""
        self._pour(array, piece, None)

    def _pour(
        self, array: Array, piece: Piece, targets: list[tuple[Shard, npt.NDArray[Any]]] | None
    ) -> int:
        """Copy what targets share with a piece into them; returns the number of elements.

        With None instead of targets the piece is only checked.
        """
        hyperslab = array.shard(piece)
        if targets is not None and not any(
            box.overlap(target)
            for box, _ in _boxes(hyperslab, *piece.flat)
            for target, _ in targets
        ):
            return 0
        file = self._open(piece.file)
        checked = piece.dataset in file.checked
        where = f"{self.path / self.manifest.files[piece.file].name}, dataset '{piece.dataset}'"
        digest, filled = hashlib.sha256(), 0
        try:
            dataset = _find(file.handle, piece, DTYPES[array.dtype], where)
            for box, at in _blocks(hyperslab, *piece.flat):
                shared = [(target, out, box.overlap(target)) for target, out in targets or ()]
                if checked and not any(common for _, _, common in shared):
                    continue
                part = slice(at, at + box.size) if piece.range else hyperslab.locate(box)
                data = np.asarray(dataset[part]).reshape(box.local_shape)
                digest.update(data.data)
                for target, out, common in shared:
                    if common:
                        out[target.locate(common)] = data[box.locate(common)]
                        filled += common.size
        except _HDF5_ERRORS as error:
            raise Damaged(f"{where}: {' '.join(str(error).split())}") from None
        if not checked and digest.hexdigest() != piece.sha256:
            raise Damaged(f"{where} is damaged: its bytes do not match the manifest's sha256")
        file.checked.add(piece.dataset)
        return filled

    def _open(self, number: int) -> _OpenFile:
        """The open file of this number; the one that was longest unused may be closed for it."""
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        while len(self._files) >= _OPEN_FILES:
            self._files.popitem(last=False)[1].handle.close()
        file = self.manifest.files[number]
        self._files[number] = _OpenFile(_open(self.path / file.name, file))
        return self._files[number]


def _boxes(shard: Shard, start: int, stop: int) -> Iterator[tuple[Shard, int]]:
    """Boxes that are contiguous in the flattened shard, each with its place after `start`."""
    at = 0
    for low, high in flat_boxes(shard.local_shape, start, stop):
        box = Shard(
            shard.shape,
            tuple(base + i for base, i in zip(shard.start, low, strict=True)),
            tuple(base + i for base, i in zip(shard.start, high, strict=True)),
        )
        yield box, at
        at += box.size


def _blocks(shard: Shard, start: int, stop: int) -> Iterator[tuple[Shard, int]]:
    """`_boxes` of at most `_BLOCK` elements, cut between rows where rows are short."""
    row = math.prod(shard.local_shape[1:])
    block = max(_BLOCK // row * row, 1) if row <= _BLOCK else _BLOCK
    low = start
    while low < stop:
        high = min((low // block + 1) * block, stop)
        for box, at in _boxes(shard, low, high):
            yield box, low - start + at
        low = high


def _open(path: Path, file: File) -> h5py.File:
    """The one place that opens a checkpoint's HDF5 file. Raises Damaged for anything suspicious."""
    size = file_size(path)
    if size != file.bytes:
        raise Damaged(f"{path} is damaged: {size} bytes, expected {file.bytes}")
    try:
        handle = h5py.File(path, "r", driver="sec2", locking="best-effort")
    except _HDF5_ERRORS as error:
        raise Damaged(f"{path} is not readable HDF5: {' '.join(str(error).split())}") from None
    if not os.path.samestat(os.fstat(handle.id.get_vfd_handle()), path.lstat()):
        handle.close()
        raise Damaged(f"{path} was replaced while it was opened")
    return handle


def _find(file: h5py.File, piece: Piece, dtype: np.dtype[Any], where: str) -> h5py.Dataset:
    """The one place that finds a piece's dataset. Raises Damaged for anything suspicious."""
    node = file
    for name in piece.dataset.split("/"):
        if not isinstance(node, h5py.Group):
            raise Damaged(f"{where}: '{node.name}' is not a group")
        link = node.get(name, getlink=True)
        if link is None:
            raise Damaged(f"{where}: there is no '{name}'")
        if not isinstance(link, h5py.HardLink):
            raise Damaged(
                f"{where}: '{name}' is a link to another place; only hard links are followed"
            )
        node = node[name]
    if not isinstance(node, h5py.Dataset):
        raise Damaged(f"{where}: it is not a dataset")
    settings = node.id.get_create_plist()
    if settings.get_layout() == h5py.h5d.VIRTUAL:
        raise Damaged(f"{where}: it is a virtual dataset")
    if settings.get_external_count():
        raise Damaged(f"{where}: it keeps its elements in another file")
    if settings.get_layout() != h5py.h5d.CONTIGUOUS or settings.get_nfilters():
        raise Damaged(f"{where}: it is chunked, compact or filtered, not contiguous")
    if node.shape != piece.stored_shape:
        raise Damaged(f"{where}: it has shape {node.shape}, expected {piece.stored_shape}")
    if not node.id.get_type().equal(h5py.h5t.py_create(dtype)):
        raise Damaged(f"{where}: it has elements of type {node.dtype}, expected {dtype.name}")
    return node
