"""The manifest of a checkpoint: everything about it except the array elements, as strict JSON.

An array is stored in pieces. A piece is a hyperslab of the global array or, for a ZeRO slice, a
C-order range inside a hyperslab; it is one dataset of one file. The hyperslabs of one array are
equal or disjoint and the ranges inside one hyperslab are disjoint, so that every element has one
place. The manifest carries the hash of every file, of every piece and of itself.

`docs/checkpoint-format.md` tells a stranger how to read all of this.
"""

from __future__ import annotations

import hashlib
import math
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Any

import msgspec
import numpy as np
from msgspec import Meta

from mpillm.checkpoint.files import step_of
from mpillm.checkpoint.json_values import check_json
from mpillm.checkpoint.upgrade import VERSION, upgraded
from mpillm.errors import UserError
from mpillm.parallel.shard import Shard
from mpillm.storage.disk import Damaged, read_file
from mpillm.storage.strict_json import parse_json

__all__ = [
    "DTYPES",
    "FORMAT",
    "KIND",
    "MANIFEST",
    "NAME",
    "VERSION",
    "Array",
    "File",
    "Manifest",
    "Piece",
    "decode",
    "encode",
    "manifest_bytes",
    "read_manifest",
]

FORMAT = "mpillm checkpoint"
MANIFEST = "manifest.json"
KIND = r"\A[a-z0-9_]+(/[a-z0-9_]+)*\Z"
NAME = r"\A[A-Za-z0-9_][A-Za-z0-9_.\[\]-]*\Z"
DTYPES = {
    np.dtype(code).name: np.dtype(code).newbyteorder("<")
    for code in ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")
}
"""Element types by name, as they are stored: little-endian."""

_MAX_BYTES = 64 * 2**20  # a manifest of 10,000 ranks takes about 10 MiB
_TAIL = b'"}\n'
_BLANK = "0" * 64

_Count = Annotated[int, Meta(ge=0, le=2**62)]
_Axes = Annotated[tuple[_Count, ...], Meta(max_length=32)]  # 32 axes are HDF5's limit
_Hash = Annotated[str, Meta(pattern=r"\A[0-9a-f]{64}\Z")]
_Dataset = Annotated[
    str, Meta(pattern=r"\A[A-Za-z0-9_][\w.#\[\]-]*(/[A-Za-z0-9_][\w.#\[\]-]*)*\Z", max_length=500)
]


class _Record(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    """A strict record."""


class Piece(_Record, frozen=True, array_like=True):
    """A part of an array; a JSON list in the order of these fields."""

    start: _Axes
    """First index of the hyperslab on each axis of the global array."""
    stop: _Axes
    """One past the last index of the hyperslab on each axis."""
    range: tuple[_Count, _Count] | None
    """None: the whole hyperslab, stored in its shape. Else [start, stop) in the C-order flattened
    hyperslab, stored with one axis."""
    file: _Count
    """Place in `Manifest.files`."""
    dataset: _Dataset
    """Path of the dataset in the file."""
    sha256: _Hash
    """Hash of the elements' bytes: C order, little-endian."""

    @property
    def hyperslab_shape(self) -> tuple[int, ...]:
        """Shape of the hyperslab."""
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def flat(self) -> tuple[int, int]:
        """The range in the flattened hyperslab, also where it is the whole of it."""
        return self.range or (0, math.prod(self.hyperslab_shape))

    @property
    def stored_shape(self) -> tuple[int, ...]:
        """Shape of the dataset."""
        return self.hyperslab_shape if self.range is None else (self.range[1] - self.range[0],)

    @property
    def size(self) -> int:
        """Number of elements."""
        return self.flat[1] - self.flat[0]


class Array(_Record, frozen=True):
    """A global array and its pieces."""

    kind: Annotated[str, Meta(pattern=KIND, max_length=100)]
    """What it is to the run: "parameter", "optimizer/m", ..."""
    name: Annotated[str, Meta(pattern=NAME, max_length=200)]
    dtype: str
    """A key of `DTYPES`."""
    shape: _Axes
    pieces: tuple[Piece, ...]

    @property
    def size(self) -> int:
        """Number of elements of the global array."""
        return math.prod(self.shape)

    @property
    def missing(self) -> int:
        """Number of elements that no piece holds."""
        return self.size - sum(piece.size for piece in self.pieces)

    def shard(self, piece: Piece) -> Shard:
        """The hyperslab of a piece."""
        return Shard(self.shape, piece.start, piece.stop)


class File(_Record, frozen=True):
    """A file of the checkpoint."""

    name: Annotated[str, Meta(pattern=r"\Ashard-[0-9]{5,9}\.h5\Z")]
    bytes: _Count
    sha256: _Hash


class Manifest(_Record, frozen=True, kw_only=True):
    """A whole checkpoint."""

    format: str = FORMAT
    version: int = VERSION
    """That of the file it was read from; the members are always those of the newest."""
    created: str
    """Date and time, UTC, ISO 8601."""
    step: _Count
    samples: _Count
    """Samples consumed since the start of the run."""
    layout: dict[str, Any]
    """Sizes of the mesh axes that wrote it; a reader needs none of them."""
    settings: dict[str, Any]
    """The run's resolved settings."""
    state: dict[str, Any]
    """What else the run goes on from: numbers, words, lists and tables."""
    versions: dict[str, str]
    """Of the libraries that wrote it."""
    extra: dict[str, str]
    """sha256 of files that the run depends on and the checkpoint does not hold, by name."""
    files: tuple[File, ...]
    arrays: tuple[Array, ...]
    sha256: _Hash = _BLANK
    """Hash of the manifest's own bytes with zeros in place of these 64 digits; always last."""


def manifest_bytes(folder: Path) -> bytes:
    """The bytes of the manifest in a checkpoint's folder. Raises UserError, naming the file."""
    return read_file(folder / MANIFEST, _MAX_BYTES)


def read_manifest(folder: Path, raw: bytes | None = None) -> Manifest:
    """Read and check the manifest of a checkpoint's folder. Raises UserError, naming the file.

    raw: its bytes, where they are already read.
    """
    path = folder / MANIFEST
    manifest = decode(manifest_bytes(folder) if raw is None else raw, path)
    step = step_of(folder.name)
    if step is not None and step != manifest.step:
        raise Damaged(f"{path} is that of step {manifest.step}, not of the folder it lies in")
    return manifest


def encode(manifest: Manifest) -> bytes:
    """The manifest as compact JSON with its own hash put in, in the newest version.

    Raises UserError when it is larger than any reader takes, ValueError for a value that JSON would
    not give back as it is.
    """
    for name in ("layout", "settings", "state"):
        check_json(getattr(manifest, name), name)
    manifest = msgspec.structs.replace(manifest, version=VERSION, sha256=_BLANK)
    raw = msgspec.json.encode(manifest) + b"\n"
    if len(raw) > _MAX_BYTES:
        pieces = sum(len(array.pieces) for array in manifest.arrays)
        raise UserError(
            f"the manifest of {pieces:,} pieces has {len(raw) / 2**20:,.0f} MiB, and no more than "
            f"{_MAX_BYTES / 2**20:,.0f} MiB are read; cut the state into fewer pieces (a lower "
            "parallel.zero, or a smaller parallel.tensor)"
        )
    return raw[: -len(_TAIL) - 64] + _own_hash(raw) + _TAIL


def _own_hash(raw: bytes) -> bytes:
    """Hash of a manifest's bytes with zeros in place of the hash itself."""
    blank = raw[: -len(_TAIL) - 64] + _BLANK.encode() + _TAIL
    return hashlib.sha256(blank).hexdigest().encode()


def decode(raw: bytes, where: Path) -> Manifest:
    """Read a manifest strictly. Raises UserError in one line that names `where`."""
    value = parse_json(raw, where)
    if not isinstance(value, dict) or value.get("format") != FORMAT:
        raise UserError(f"{where} is not the manifest of a checkpoint (format '{FORMAT}')")
    value = upgraded(value, where)
    if raw[-len(_TAIL) - 64 :] != _own_hash(raw) + _TAIL:
        raise Damaged(f"{where} is damaged: its bytes do not match its own sha256")
    try:
        manifest = msgspec.convert(value, Manifest)
        _check(manifest)
    except (msgspec.ValidationError, ValueError) as error:
        raise Damaged(f"{where} is damaged: {error}") from None
    return manifest


def _check(manifest: Manifest) -> None:
    """What types cannot say. Raises ValueError."""
    files = manifest.files
    if len({file.name for file in files}) < len(files):
        raise ValueError("a file is listed twice")
    arrays: set[tuple[str, str]] = set()
    datasets: set[tuple[int, str]] = set()
    held = [0] * len(files)
    for array in manifest.arrays:
        what = f"{array.kind} '{array.name}'"
        if (array.kind, array.name) in arrays:
            raise ValueError(f"{what} is listed twice")
        arrays.add((array.kind, array.name))
        if array.dtype not in DTYPES:
            raise ValueError(f"{what} has unknown dtype {array.dtype[:20]!r}")
        for piece in array.pieces:
            if not len(piece.start) == len(piece.stop) == len(array.shape):
                raise ValueError(f"{what}: a piece has another number of axes")
            bounds = zip(piece.start, piece.stop, array.shape, strict=True)
            if not all(start < stop <= size for start, stop, size in bounds):
                raise ValueError(f"{what}: a piece is empty or does not lie in {array.shape}")
            start, stop = piece.flat
            if not start < stop <= math.prod(piece.hyperslab_shape):
                raise ValueError(f"{what}: a range is empty or does not lie in its hyperslab")
            if piece.file >= len(files):
                raise ValueError(f"{what}: a piece lies in file {piece.file} of {len(files)}")
            if (piece.file, piece.dataset) in datasets:
                raise ValueError(f"dataset '{piece.dataset}' holds two pieces")
            datasets.add((piece.file, piece.dataset))
            held[piece.file] += piece.size * DTYPES[array.dtype].itemsize
        if _overlaps(array):
            raise ValueError(f"{what}: pieces overlap")
    for file, bytes_held in zip(files, held, strict=True):
        if bytes_held > file.bytes:
            raise ValueError(f"{file.name} of {file.bytes} bytes cannot hold {bytes_held}")


def _overlaps(array: Array) -> bool:
    """Whether two pieces share an element, or two unequal hyperslabs do.

    Hyperslabs are sorted along the axis that cuts them most finely, and each is compared with those
    that begin before it ends: n log n for cuts along one axis.
    """
    slabs: dict[tuple[tuple[int, ...], tuple[int, ...]], list[tuple[int, int]]] = {}
    for piece in array.pieces:
        slabs.setdefault((piece.start, piece.stop), []).append(piece.flat)
    for ranges in slabs.values():
        ranges.sort()
        if any(before[1] > after[0] for before, after in pairwise(ranges)):
            return True
    if len(slabs) < 2:
        return False
    bounds = np.array(list(slabs), dtype=np.int64)  # (slabs, 2, axes)
    axis = max(range(len(array.shape)), key=lambda a: len(np.unique(bounds[:, 0, a])))
    bounds = bounds[np.argsort(bounds[:, 0, axis], kind="stable")]
    starts, stops = bounds[:, 0], bounds[:, 1]
    ends = np.searchsorted(starts[:, axis], stops[:, axis], side="left")
    for i, end in enumerate(ends):
        near = slice(i + 1, int(end))
        if ((starts[near] < stops[i]) & (stops[near] > starts[i])).all(axis=1).any():
            return True
    return False
