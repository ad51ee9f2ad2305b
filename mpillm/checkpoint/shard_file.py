"""One writer's HDF5 file: what goes into it, how it is written, and read back before it counts."""

from __future__ import annotations

import hashlib
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from types import TracebackType
from typing import Any, final

import msgspec
import numpy as np
import numpy.typing as npt

from mpillm.checkpoint.item import BLOCK, Blocks, Item, Part, check, flat_blocks
from mpillm.checkpoint.manifest import DTYPES, File, Piece
from mpillm.checkpoint.skeleton import Skeleton
from mpillm.errors import UserError
from mpillm.parallel.shard import Shard

__all__ = ["Item", "Part", "ShardWriter", "Slot", "write_shard"]


def write_shard(
    path: Path, items: Iterable[Item], *, verify: bool = True
) -> tuple[File | None, tuple[Part, ...]]:
    """Write, fsync and hash a new file of the items that have elements; no file when none has.

    Raises OSError when the file system fails, UserError when it gives back other bytes.
    """
    with ShardWriter(path, verify=verify) as writer:
        for item in items:
            writer.add(item.kind, item.name, item.shard, item.range, item.dtype, item.blocks())
        return writer.close()


@dataclass
class Slot:
    """Where in the file an item's elements belong, as bytes."""

    part: Part
    piece: Piece
    start: int
    stop: int
    sha256: str = ""
    source: npt.NDArray[np.uint8] | None = field(default=None, repr=False)
    """The elements' bytes, where they lie in memory until the file is closed."""


@final
class ShardWriter:
    """A new HDF5 file, written block by block: nothing larger than a block is ever copied.

    with ShardWriter(path) as writer:
        writer.add("parameter", "w", shard, None, "float32", blocks)
        file, parts = writer.close()

    The same items in the same order make the same bytes, however they are cut into blocks. An item
    without elements is a part without a piece; a file without elements is not made. The file is
    made by the first `add` or `fill`; one that is left without `close` is not complete.

    `reserve` and `seal` call HDF5, `fill` and `close` after them do not: a thread may run them.
    """

    def __init__(self, path: Path, *, verify: bool = True) -> None:
        """verify: read back what was written, from the disk where the system allows it."""
        self.path = path
        self._verify = verify
        self._skeleton = Skeleton()
        self._size: int | None = None
        self._copies: dict[str, int] = {}
        self._parts: list[Part | Slot] = []
        self._handle: int | None = None
        self._result: tuple[File | None, tuple[Part, ...]] | None = None

    def __enter__(self) -> ShardWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        if kind is None:
            self.close()
        self._release()

    def add(
        self,
        kind: str,
        name: str,
        shard: Shard,
        range: tuple[int, int] | None,
        dtype: str,
        blocks: npt.NDArray[Any] | Blocks,
    ) -> None:
        """Write an item: `reserve` and `fill`.

        blocks: its elements, of type `dtype`: one array, which must stay as it is until `close`, or
        arrays that are successive parts of the item flattened in C order, which need not.

        Raises OSError when the file system fails, ValueError for blocks that do not fit.
        """
        self.fill(self.reserve(kind, name, shard, range, dtype), blocks)

    def reserve(
        self, kind: str, name: str, shard: Shard, range: tuple[int, int] | None, dtype: str
    ) -> Slot | None:
        """Make room for an item; None where it has no elements."""
        check(kind, name, shard, range, dtype)
        start, stop = range or (0, shard.size)
        part = Part(kind, name, dtype, shard.shape, None)
        if start == stop:
            self._parts.append(part)
            return None
        dataset = f"{kind}/{name}"
        count = self._copies[dataset] = self._copies.get(dataset, -1) + 1
        if count:
            dataset = f"{dataset}#{count}"
        piece = Piece(shard.start, shard.stop, range, 0, dataset, "0" * 64)
        offset = self._skeleton.reserve(dataset, piece.stored_shape, DTYPES[dtype])
        size = (stop - start) * DTYPES[dtype].itemsize
        slot = Slot(part, piece, offset, offset + size)
        self._parts.append(slot)
        return slot

    def seal(self) -> None:
        """Nothing more is reserved."""
        if self._size is None:
            self._size = self._skeleton.close()

    def fill(self, slot: Slot | None, blocks: npt.NDArray[Any] | Blocks) -> None:
        """Write the elements that a slot was reserved for; `blocks` as in `add`."""
        whole = blocks if isinstance(blocks, np.ndarray) else None
        place, stop = (slot.start, slot.stop) if slot else (0, 0)
        digest = hashlib.sha256()
        for array in (whole,) if whole is not None else blocks:
            dtype = DTYPES[slot.part.dtype] if slot else array.dtype
            if array.dtype.name != dtype.name or array.nbytes > stop - place:
                raise ValueError(f"{self.path}: {array.shape} {array.dtype} does not fit {slot}")
            for block in flat_blocks(array, dtype):
                raw = block.view(np.uint8).data
                digest.update(raw)
                self._write(raw, place)
                place += len(raw)
        if place != stop:
            raise ValueError(f"{self.path}: {stop - place} bytes are missing of {slot}")
        if slot:
            slot.sha256 = digest.hexdigest()
            if whole is not None and whole.flags.c_contiguous and whole.dtype == dtype:
                slot.source = whole.reshape(-1).view(np.uint8)

    def close(self) -> tuple[File | None, tuple[Part, ...]]:
        """Complete, fsync, hash and check the file; returns it and the parts as they were added.

        Raises OSError when the file system fails, UserError when it gives back other bytes.
        """
        if self._result is None:
            self.seal()
            slots = [part for part in self._parts if isinstance(part, Slot)]
            file = self._complete(slots) if slots else None
            self._result = file, tuple(map(_finished, self._parts))
            self._release()
        return self._result

    def _complete(self, slots: list[Slot]) -> File:
        """Write what stands between the elements; fsync, hash and check the file."""
        if any(not slot.sha256 for slot in slots):
            raise ValueError(f"{self.path}: a slot was not filled")
        size = self._size or 0
        for start, stop in _gaps(slots, size):
            self._write(memoryview(self._skeleton.between(start, stop)), start)
        os.fsync(self._open())
        return File(self.path.name, size, self._read_back(slots, size))

    def _read_back(self, slots: list[Slot], size: int) -> str:
        """sha256 of the file as it is on the disk; UserError where that is not what was written."""
        if self._verify and hasattr(os, "posix_fadvise"):
            os.posix_fadvise(self._open(), 0, 0, os.POSIX_FADV_DONTNEED)
        stretches: list[tuple[int, int, Slot | None]] = []
        stretches += [(slot.start, slot.stop, slot) for slot in slots]
        stretches += [(start, stop, None) for start, stop in _gaps(slots, size)]
        whole, buffer = hashlib.sha256(), np.empty(min(BLOCK, size), np.uint8)
        for start, stop, slot in sorted(stretches, key=lambda stretch: stretch[0]):
            source = slot.source if slot else None
            if slot is None:
                source = np.frombuffer(self._skeleton.between(start, stop), np.uint8)
            digest, same = hashlib.sha256(), True
            for low in range(start, stop, BLOCK):
                block = self._read(low, buffer[: min(BLOCK, stop - low)])
                whole.update(block.data)
                if self._verify and source is not None:
                    same &= np.array_equal(block, source[low - start : low - start + block.size])
                elif self._verify:
                    digest.update(block.data)
            if self._verify and source is None:
                same = slot is not None and digest.hexdigest() == slot.sha256
            if not same or os.fstat(self._open()).st_size != size:
                what = f"dataset '{slot.piece.dataset}'" if slot else "the metadata of HDF5"
                raise UserError(
                    f"{what} in {self.path}: what is read back is not what was written; the disk, "
                    "or the memory or network before it, is failing"
                )
        return whole.hexdigest()

    def _open(self) -> int:
        if self._handle is None:
            self._handle = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
        return self._handle

    def _release(self) -> None:
        self.seal()
        if self._handle is not None:
            os.close(self._handle)
            self._handle = None

    def _write(self, data: memoryview, place: int) -> None:
        while data:
            count = os.pwrite(self._open(), data, place)
            data, place = data[count:], place + count

    def _read(self, place: int, buffer: npt.NDArray[np.uint8]) -> npt.NDArray[np.uint8]:
        """Fill the buffer from the file; returns what of it is filled, less where the file ends."""
        done = 0
        while done < buffer.size:
            count = os.preadv(self._open(), [buffer[done:].data], place + done)
            if not count:
                break
            done += count
        return buffer[:done]


def _gaps(slots: Sequence[Slot], size: int) -> Iterator[tuple[int, int]]:
    """The stretches of the file that are not in any slot."""
    place = 0
    for slot in sorted(slots, key=lambda slot: slot.start):
        if place < slot.start:
            yield place, slot.start
        place = slot.stop
    if place < size:
        yield place, size


def _finished(part: Part | Slot) -> Part:
    """The part of a slot, its piece with the hash of its elements."""
    if isinstance(part, Part):
        return part
    return replace(part.part, piece=msgspec.structs.replace(part.piece, sha256=part.sha256))
