"""Token files: the ids of a text's splits in HDF5.

Format version 2. The root has the attributes `format`, `version`, `vocabulary_size` and the
caller's own; each split is a one-dimensional dataset of little-endian uint16 or uint32 in one
contiguous run, with the attribute `sha256` of its bytes. Attributes are numbers and strings of
fixed length. The metadata carry HDF5's checksums, the elements none, hence the hash. Files are read
by `storage.hdf5`; those of version 1, which had no checksums and another structure, are made anew.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mpillm.data.files import missing_file
from mpillm.data.tokenizer import Tokens, token_dtype
from mpillm.errors import UserError, did_you_mean
from mpillm.storage.disk import Damaged, open_file, write_atomically
from mpillm.storage.hdf5 import FORMAT, Hdf5File

__all__ = ["TokenFile", "write_tokens"]

_FORMAT = "mpillm-tokens"
_VERSION = 2
_RESERVED = {"format", "version", "vocabulary_size"}
_MOST_ATTRIBUTES = 8  # of one object, as HDF5 keeps them together with it
_TYPES = (np.dtype("<u2"), np.dtype("<u4"))


def write_tokens(
    path: Path,
    splits: Mapping[str, NDArray[np.integer[Any]]],
    vocabulary_size: int,
    attributes: Mapping[str, str | int | float],
) -> None:
    """Write a token file, whole or not at all.

    splits: name to ids (n,) in range(vocabulary_size). attributes: further facts for the root.
    Raises ValueError for ids out of range, another rank, a reserved attribute, or more than five.
    """
    dtype = token_dtype(vocabulary_size)
    for name, ids in splits.items():
        if ids.ndim != 1 or (ids.size and not 0 <= ids.min() <= ids.max() < vocabulary_size):
            raise ValueError(f"split '{name}' is not a list of ids in range({vocabulary_size})")
    if _RESERVED & attributes.keys():
        raise ValueError(f"reserved attributes: {sorted(_RESERVED & attributes.keys())}")
    if len(_RESERVED) + len(attributes) > _MOST_ATTRIBUTES:
        raise ValueError(f"{len(attributes)} attributes beside {len(_RESERVED)} reserved ones")

    def write(temporary: Path) -> None:
        with h5py.File(temporary, "w", libver=FORMAT, locking="best-effort") as file:
            _write_attributes(
                file,
                {
                    "format": _FORMAT,
                    "version": _VERSION,
                    "vocabulary_size": vocabulary_size,
                    **attributes,
                },
            )
            for name, ids in splits.items():
                data = np.ascontiguousarray(ids, dtype=dtype)
                dataset = file.create_dataset(name, data=data)
                _write_attributes(dataset, {"sha256": _sha256(data)})

    write_atomically(path, write)


class TokenFile:
    """A token file, read whole (two or four bytes a token) through the guard, then closed.

    Raises UserError for a file that is missing, no token file, of another version, that points
    outside itself, or that holds what `write_tokens` never writes.
    """

    vocabulary_size: int
    attributes: dict[str, str | int | float]  # all of the root's

    def __init__(self, path: Path) -> None:
        self.path = path
        self._splits: dict[str, Tokens] = {}
        self._hashes: dict[str, object] = {}
        if not path.exists():
            raise missing_file("tokens", path)
        try:
            with Hdf5File(path) as file:
                self._read(file)
        except Damaged:
            if _is_version_1(path):
                raise self._error(
                    f"has version 1; this mpillm reads {_VERSION}, and makes it anew when it trains"
                ) from None
            raise

    def length(self, split: str) -> int:
        """Number of tokens in `split`."""
        return int(self._split(split).size)

    def read(self, split: str, start: int = 0, stop: int | None = None) -> Tokens:
        """Tokens [start, stop) of `split`, all to the end by default; a read-only view."""
        tokens = self._split(split)
        stop = tokens.size if stop is None else stop
        if not 0 <= start <= stop <= tokens.size:
            raise ValueError(f"[{start}, {stop}) does not lie in the {tokens.size} of '{split}'")
        return tokens[start:stop]

    def verify(self) -> None:
        """Compare every split with its hash. Raises UserError for the first that differs."""
        for name, tokens in self._splits.items():
            if _sha256(tokens) != self._hashes[name]:
                raise self._error(f"split '{name}' does not match its sha256")

    def _split(self, name: str) -> Tokens:
        if name not in self._splits:
            raise self._error(f"no split '{name}'; {did_you_mean(name, self._splits)}")
        return self._splits[name]

    def _read(self, file: Hdf5File) -> None:
        """Check everything and read it."""
        self.attributes = file.attributes()
        if self.attributes.get("format") != _FORMAT:
            raise self._error(f"is not a token file (its 'format' is not '{_FORMAT}')")
        version = self.attributes.get("version")
        if version != _VERSION:
            raise self._error(f"has version {version!r}; this mpillm reads {_VERSION}")
        size = self.attributes.get("vocabulary_size")
        if not isinstance(size, int) or size < 1:
            raise self._error("'vocabulary_size' is missing or not a positive integer")
        self.vocabulary_size = size
        for name in file.names():
            stored = file.find(name)
            if stored.dtype not in _TYPES or len(stored.shape) != 1:
                raise self._error(
                    f"'{name}' has type {stored.dtype} and shape {stored.shape}; expected uint16 or"
                    " uint32 and one axis"
                )
            tokens = stored.read()
            if tokens.size and int(tokens.max()) >= self.vocabulary_size:
                raise self._error(
                    f"split '{name}' holds the id {tokens.max()}, but its vocabulary has"
                    f" {self.vocabulary_size}"
                )
            tokens.flags.writeable = False
            self._splits[name] = tokens
            self._hashes[name] = file.attributes(name).get("sha256")

    def _error(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}")


def _is_version_1(path: Path) -> bool:
    """Whether a file has the structure of HDF5 1.8, as token files of version 1 had."""
    with open(open_file(path), "rb") as file:
        return file.read(9) == b"\x89HDF\r\n\x1a\n\0"


def _write_attributes(item: h5py.HLObject, values: Mapping[str, str | int | float]) -> None:
    """Set attributes, strings in UTF-8 and at fixed length."""
    for name, value in values.items():
        item.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else value


def _sha256(tokens: Tokens) -> str:
    """Hash of the tokens' bytes."""
    return hashlib.sha256(tokens.tobytes()).hexdigest()
