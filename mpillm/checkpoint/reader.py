"""Reading a checkpoint: any hyperslab of any array, from the pieces that overlap it.

Files are read by `storage.hdf5` alone: regular files of the listed size, datasets reached by hard
links alone, stored in one contiguous run in the file itself, of exactly the listed type and shape.

The first time a piece is needed it is read whole, in blocks, and its hash is checked on the very
bytes that are handed out; after that, unless its file has changed, only the blocks that are needed
are read. So damage never goes unnoticed, and a rank of a large job reads no more files than it has
pieces in. The metadata of HDF5 carry checksums of their own. The hash of a whole file is for
`verify` and `sha256sum`.
"""

from __future__ import annotations

import hashlib
import math
from collections import OrderedDict
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any, Protocol, final

import numpy as np
import numpy.typing as npt

from mpillm.checkpoint.manifest import (
    DTYPES,
    Array,
    Manifest,
    Piece,
    manifest_bytes,
    read_manifest,
)
from mpillm.errors import UserError, did_you_mean
from mpillm.parallel.shard import Shard
from mpillm.storage.disk import Damaged
from mpillm.storage.hdf5 import Hdf5File

__all__ = ["Checkpoint", "flat_boxes"]

_BLOCK = 2**22  # elements read at a time
_OPEN_FILES = 16


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


class World(Protocol):
    """What opening a checkpoint together needs of a communicator."""

    @property
    def rank(self) -> int:
        """This rank."""

    def broadcast_object(self, value: Any, /) -> Any:
        """Rank 0's value on every rank."""


@final
class Checkpoint:
    """A committed checkpoint, open for reading; close it, or use it in a `with` statement.

    No communicator is involved in reading: each rank reads what it needs for itself.
    """

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self.path = path
        self.manifest = manifest
        self._arrays = {(array.kind, array.name): array for array in manifest.arrays}
        self._files: OrderedDict[int, Hdf5File] = OrderedDict()
        # By file: what it was like, and the datasets in it whose hash was right. It outlives the
        # closing of the file, so that reading here and there in many files hashes nothing twice.
        self._checked: dict[int, tuple[tuple[int, ...], set[str]]] = {}

    @classmethod
    def open(cls, path: Path, world: World | None = None) -> Checkpoint:
        """Open a checkpoint's folder. Raises UserError for a manifest that cannot be trusted.

        With a communicator, a collective call: rank 0 reads the manifest for all ranks, and what is
        wrong with it is raised on each of them.
        """
        if world is None:
            return cls(path, read_manifest(path))
        raw: bytes | UserError = b""
        if world.rank == 0:
            try:
                raw = manifest_bytes(path)
            except UserError as error:
                raw = error
        raw = world.broadcast_object(raw)
        if isinstance(raw, UserError):
            raise raw
        return cls(path, read_manifest(path, raw))

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
            file.close()
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
        checked = self._checked[piece.file][1]
        is_checked = piece.dataset in checked
        stored = file.find(piece.dataset, DTYPES[array.dtype], piece.stored_shape)
        digest, filled = hashlib.sha256(), 0
        for box, at in _blocks(hyperslab, *piece.flat):
            shared = [(target, out, box.overlap(target)) for target, out in targets or ()]
            if is_checked and not any(common for _, _, common in shared):
                continue
            data = stored.read(at, at + box.size).reshape(box.local_shape)
            if not is_checked:
                digest.update(data.data)
            for target, out, common in shared:
                if common:
                    out[target.locate(common)] = data[box.locate(common)]
                    filled += common.size
        if not is_checked and digest.hexdigest() != piece.sha256:
            raise Damaged(
                f"{stored.where} is damaged: its bytes do not match the manifest's sha256"
            )
        checked.add(piece.dataset)
        return filled

    def _open(self, number: int) -> Hdf5File:
        """The open file of this number; the one that was longest unused may be closed for it."""
        if number in self._files:
            self._files.move_to_end(number)
            return self._files[number]
        while len(self._files) >= _OPEN_FILES:
            self._files.popitem(last=False)[1].close()
        listed = self.manifest.files[number]
        file = self._files[number] = Hdf5File(self.path / listed.name, listed.bytes)
        like = file.status.st_dev, file.status.st_ino, file.status.st_size, file.status.st_mtime_ns
        if self._checked.get(number, ((), set()))[0] != like:
            self._checked[number] = like, set()
        return file


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
