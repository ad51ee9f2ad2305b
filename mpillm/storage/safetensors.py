"""Safetensors files: read within bounds, array by array; and the header that begins one.

A file is the length of the header (8 bytes, little-endian), the header, and the arrays' bytes. The
header is a JSON object: for each array `{"dtype", "shape", "data_offsets": [start, stop]}`, the
offsets counted from the end of the header, and perhaps `__metadata__`, an object of strings. The
arrays lie one after another without holes. Source: the README of huggingface/safetensors.
"""

from __future__ import annotations

import importlib
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, final

import numpy as np

from mpillm.errors import UserError, did_you_mean
from mpillm.storage.disk import open_file
from mpillm.storage.source import Source, StoredArray, bytes_of, told
from mpillm.storage.strict_json import parse_json

__all__ = ["SafetensorsFile", "encode_header"]

_METADATA = "__metadata__"
_LARGEST_HEADER = 100_000_000  # as the library has it
_MOST_AXES = 32
_TYPES = {
    **{f"F{8 * size}": f"float{8 * size}" for size in (2, 4, 8)},
    **{f"I{8 * size}": f"int{8 * size}" for size in (1, 2, 4, 8)},
    **{f"U{8 * size}": f"uint{8 * size}" for size in (1, 2, 4, 8)},
    "BOOL": "bool",
    "BF16": "bfloat16",
    "F8_E4M3": "float8_e4m3fn",
    "F8_E5M2": "float8_e5m2",
}
_OF_ML_DTYPES = {"BF16", "F8_E4M3", "F8_E5M2"}


@final
class SafetensorsFile:
    """A safetensors file, open for reading; close it, or use it in a `with` statement.

    Raises Damaged for a file that is not one in every respect, UserError where it cannot be read.
    """

    metadata: dict[str, str]

    def __init__(self, path: Path) -> None:
        self.path = path
        self._handle = open_file(path)
        try:
            self._source = Source(self._handle)
            with told(f"{path} is not safetensors"):
                length = int.from_bytes(self._source.read(0, 8), "little")
                if length > min(_LARGEST_HEADER, self._source.size - 8):
                    raise ValueError(f"a header of {length} bytes")
                raw = self._source.read(8, length)
            header = parse_json(raw, f"{path}, header")
            self._start = 8 + length
            with told(f"{path} is damaged"):
                self._arrays, self.metadata = _check_header(header, self._source.size - self._start)
        except BaseException:
            self.close()
            raise

    def __enter__(self) -> SafetensorsFile:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close the file; its arrays cannot be read afterwards."""
        if self._handle >= 0:
            os.close(self._handle)
            self._handle = -1

    def names(self) -> list[str]:
        """Names of the arrays, in the order of the file's bytes."""
        return list(self._arrays)

    def find(self, name: str) -> StoredArray:
        """An array. Raises UserError for a name that is not there or a type that needs ml_dtypes.

        bfloat16 and the types of 8 bits need the package ml_dtypes, which gives them to NumPy.
        """
        if name not in self._arrays:
            raise UserError(f"{self.path} holds no {name!r}; {did_you_mean(name, self._arrays)}")
        code, shape, start = self._arrays[name]
        where = f"{self.path}, {name!r}"
        return StoredArray(where, self._source, self._start + start, shape, _dtype(code, where))


def encode_header(
    arrays: Mapping[str, tuple[np.dtype[Any], tuple[int, ...]]],
    metadata: Mapping[str, str] | None = None,
) -> tuple[bytes, dict[str, int]]:
    """The beginning of a file of arrays, and where in the file the bytes of each are to begin.

    arrays: name to dtype and shape, in the order in which their bytes (C order, little-endian) are
    to follow, one after another. Give those with the largest elements first: what follows the
    header is aligned to 8 bytes. Raises ValueError for a dtype or a name that cannot be stored.
    """
    codes = {name: code for code, name in _TYPES.items()}
    header: dict[str, Any] = {_METADATA: dict(metadata)} if metadata else {}
    starts: dict[str, int] = {}
    at = 0
    for name, (dtype, shape) in arrays.items():
        if name == _METADATA or dtype.name not in codes:
            raise ValueError(f"{name!r} of type {dtype} cannot be stored")
        starts[name], at = at, at + math.prod(shape) * dtype.itemsize
        offsets = [starts[name], at]
        header[name] = {"dtype": codes[dtype.name], "shape": shape, "data_offsets": offsets}
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    if len(text) > _LARGEST_HEADER:
        raise ValueError(f"a header of {len(text)} bytes; the format allows {_LARGEST_HEADER}")
    begin = 8 + len(text)
    return len(text).to_bytes(8, "little") + text, {n: begin + start for n, start in starts.items()}


def _check_header(
    header: Any, size: int
) -> tuple[dict[str, tuple[str, tuple[int, ...], int]], dict[str, str]]:
    """Type, shape and first byte of each array, and the metadata. Raises ValueError."""
    if not isinstance(header, dict):
        raise ValueError("its header is not an object")
    metadata = header.pop(_METADATA, {})
    if not isinstance(metadata, dict) or not all(isinstance(v, str) for v in metadata.values()):
        raise ValueError(f"its {_METADATA} is not an object of strings")
    found: list[tuple[int, int, str, str, tuple[int, ...]]] = []
    for name, about in header.items():
        what = repr(name[:100])
        if not name.isprintable():  # error lines show it
            raise ValueError(f"the name {what} is not printable")
        if not isinstance(about, dict) or about.keys() != {"dtype", "shape", "data_offsets"}:
            raise ValueError(f"{what} has not exactly dtype, shape and data_offsets")
        code, shape, offsets = about["dtype"], about["shape"], about["data_offsets"]
        if not isinstance(code, str) or code not in _TYPES:
            raise ValueError(f"{what} has dtype {str(code)[:20]!r}; {did_you_mean('', _TYPES)}")
        if not _are_counts(shape) or len(shape) > _MOST_AXES:
            raise ValueError(f"{what} has no shape of at most {_MOST_AXES} axes")
        if not _are_counts(offsets) or len(offsets) != 2 or offsets[0] > offsets[1]:
            raise ValueError(f"{what} has no data_offsets")
        needed = bytes_of(shape, _itemsize(code))
        if offsets[1] - offsets[0] != needed:
            held = offsets[1] - offsets[0]
            raise ValueError(f"{what} of shape {shape} has {held} bytes, expected {needed}")
        found.append((offsets[0], offsets[1], name, code, tuple(shape)))
    found.sort()
    at = 0
    for start, stop, name, _, _ in found:
        if start != at:
            what = "overlaps the array before it" if start < at else "does not follow it at once"
            raise ValueError(f"{name[:100]!r} {what}: it begins at {start}, expected {at}")
        at = stop
    if at != size:
        raise ValueError(f"its arrays have {at} bytes, and {size} follow the header")
    return {name: (code, shape, start) for start, _, name, code, shape in found}, metadata


def _are_counts(value: Any) -> bool:
    return isinstance(value, list) and all(type(n) is int and 0 <= n <= 2**62 for n in value)


def _itemsize(code: str) -> int:
    """Bytes of an element, without ml_dtypes."""
    return {"BF16": 2, "F8_E4M3": 1, "F8_E5M2": 1}.get(code) or np.dtype(_TYPES[code]).itemsize


def _dtype(code: str, where: str) -> np.dtype[Any]:
    if code not in _OF_ML_DTYPES:
        return np.dtype(_TYPES[code]).newbyteorder("<")
    try:
        types = importlib.import_module("ml_dtypes")
    except ImportError:
        raise UserError(f"{where} has type {code}, which needs: pip install ml_dtypes") from None
    dtype: np.dtype[Any] = np.dtype(getattr(types, _TYPES[code]))
    return dtype
