"""Token files: the ids of a text's splits in HDF5.

Format version 1. The root has the attributes `format`, `version`, `vocabulary_size` and the
caller's own; each split is a one-dimensional dataset of little-endian uint16 or uint32 in chunks,
without filters, with the attribute `sha256` of its bytes. Attributes are numbers and strings of
fixed length. HDF5 notices little of its own damage, hence the hash; a file may point elsewhere
(links, virtual datasets, external storage) and libhdf5 may loop for ever over a damaged heap of
variable-length strings, hence the guard.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import h5py
import numpy as np
from numpy.typing import NDArray

from mpillm.data.files import missing_file, write_atomically
from mpillm.data.tokenizer import Tokens, token_dtype
from mpillm.errors import UserError, did_you_mean

__all__ = ["TokenFile", "write_tokens"]

_FORMAT = "mpillm-tokens"
_VERSION = 1
_RESERVED = {"format", "version", "vocabulary_size"}
_CHUNK = 1 << 16  # tokens
_TYPES = (np.dtype("<u2"), np.dtype("<u4"))


def write_tokens(
    path: Path,
    splits: Mapping[str, NDArray[np.integer[Any]]],
    vocabulary_size: int,
    attributes: Mapping[str, str | int | float],
) -> None:
    """Write a token file, whole or not at all.

    splits: name to ids (n,) in range(vocabulary_size). attributes: further facts for the root.
    Raises ValueError for ids out of range, another rank, or a reserved attribute.
    """
    dtype = token_dtype(vocabulary_size)
    for name, ids in splits.items():
        if ids.ndim != 1 or (ids.size and not 0 <= ids.min() <= ids.max() < vocabulary_size):
            raise ValueError(f"split '{name}' is not a list of ids in range({vocabulary_size})")
    if _RESERVED & attributes.keys():
        raise ValueError(f"reserved attributes: {sorted(_RESERVED & attributes.keys())}")

    def write(temporary: Path) -> None:
        with h5py.File(temporary, "w", locking="best-effort") as file:
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
                chunks = (min(data.size, _CHUNK),) if data.size else None
                dataset = file.create_dataset(name, data=data, chunks=chunks)
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
        if not path.is_file():
            raise missing_file("tokens", path)
        try:
            with h5py.File(path, "r", locking="best-effort") as file:
                self._read(file)
        # What h5py has been seen to raise on damaged files, and their kin.
        except (OSError, RuntimeError, LookupError, TypeError, ValueError) as error:
            raise self._error(f"is damaged or not HDF5 ({_one_line(error)})") from error

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

    def _read(self, file: h5py.File) -> None:
        """Check everything and read it."""
        self.attributes = self._attributes(file)
        if self.attributes.get("format") != _FORMAT:
            raise self._error(f"is not a token file (its 'format' is not '{_FORMAT}')")
        version = self.attributes.get("version")
        if version != _VERSION:
            raise self._error(f"has version {version}; this mpillm reads {_VERSION}")
        size = self.attributes.get("vocabulary_size")
        if not isinstance(size, int) or size < 1:
            raise self._error("'vocabulary_size' is missing or not a positive integer")
        self.vocabulary_size = size
        for name in file:
            dataset = self._guard(file, name)
            tokens = dataset[()]
            if tokens.size and int(tokens.max()) >= self.vocabulary_size:
                raise self._error(
                    f"split '{name}' holds the id {tokens.max()}, but its vocabulary has"
                    f" {self.vocabulary_size}"
                )
            tokens.flags.writeable = False
            self._splits[name] = tokens
            self._hashes[name] = self._attributes(dataset).get("sha256")

    def _attributes(self, item: h5py.HLObject) -> dict[str, str | int | float]:
        """The attributes of a group or dataset, each one number or string of fixed length."""
        found: dict[str, str | int | float] = {}
        for name in item.attrs:
            stored = item.attrs.get_id(name)
            if stored.shape != () or stored.dtype.kind not in "iufS":
                raise self._error(f"the attribute '{name}' is no number or string of fixed length")
            value = item.attrs[name]
            found[name] = value.decode() if isinstance(value, bytes) else value.item()
        return found

    def _guard(self, file: h5py.File, name: str) -> h5py.Dataset:
        """The dataset `name` if it lies in this file, as `write_tokens` would have put it there."""
        link = file.get(name, getlink=True)
        if not isinstance(link, h5py.HardLink):
            raise self._error(f"'{name}' is a link, not data")
        dataset = file[name]
        if not isinstance(dataset, h5py.Dataset):
            raise self._error(f"'{name}' is not a dataset")
        if dataset.is_virtual or dataset.external:
            raise self._error(f"'{name}' keeps its data in another file")
        if dataset.dtype not in _TYPES or dataset.ndim != 1:
            raise self._error(
                f"'{name}' has type {dataset.dtype} and shape {dataset.shape}; expected uint16 or"
                " uint32 and one axis"
            )
        if dataset.id.get_create_plist().get_nfilters():
            raise self._error(f"'{name}' is filtered; expected plain chunks")
        if dataset.id.get_storage_size() < dataset.nbytes:  # the rest would read as zeros
            raise self._error(f"'{name}' holds fewer bytes than its {dataset.size} tokens")
        return dataset

    def _error(self, what: str) -> UserError:
        return UserError(f"{self.path}: {what}")


def _write_attributes(item: h5py.HLObject, values: Mapping[str, str | int | float]) -> None:
    """Set attributes, strings in UTF-8 and at fixed length."""
    for name, value in values.items():
        item.attrs[name] = np.bytes_(value.encode()) if isinstance(value, str) else value


def _sha256(tokens: Tokens) -> str:
    """Hash of the tokens' bytes."""
    return hashlib.sha256(tokens.tobytes()).hexdigest()


def _one_line(error: Exception) -> str:
    return " ".join(str(error).split())
