"""The whole arrays of a checkpoint in one plain file, HDF5 or safetensors, for other programs.

HDF5: datasets `parameter/<name>`, and `optimizer/m/<name>` and `optimizer/v/<name>` where they are
wanted; the file's attributes say what it is (`format`, `version`), `step`, `samples`, which `kinds`
of arrays it holds, and the run's `settings` as JSON text. Safetensors: parameters by their names,
moments as in HDF5; the same facts are strings in `__metadata__`.

The file is written block by block under another name, read back through the guarded reader of its
format, compared by hash, and only then takes its name.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpillm import __version__
from mpillm.checkpoint.item import BLOCK, flat_blocks
from mpillm.checkpoint.manifest import DTYPES, Array, Manifest
from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.skeleton import Skeleton
from mpillm.checkpoint.stream import stream
from mpillm.checkpoint.tables import human, table
from mpillm.errors import UserError, did_you_mean
from mpillm.parallel.shard import Shard
from mpillm.storage.disk import Damaged, file_size, write_atomically
from mpillm.storage.hdf5 import Hdf5File
from mpillm.storage.safetensors import SafetensorsFile, encode_header

__all__ = ["EXPORT", "SUFFIXES", "export", "inspect_export", "open_export"]

EXPORT = "mpillm arrays"
_VERSION = 1

Exported = Hdf5File | SafetensorsFile
Facts = Mapping[str, str | int]


@dataclass(frozen=True)
class _Form:
    """A file without its elements: where each array's begin, and the bytes around them."""

    starts: Mapping[str, int]
    rest: Mapping[int, bytes]


@dataclass(frozen=True)
class _Format:
    """How arrays are named in a file, what stands around them, and who reads it."""

    name: Callable[[Array], str]
    form: Callable[[Mapping[str, Array], Facts], _Form]
    open: Callable[[Path], Exported]


def export(
    source: Checkpoint, target: Path, *, optimizer: bool = False, overwrite: bool = False
) -> None:
    """Write all parameters, and with `optimizer` all arrays, to one file.

    target: a name that ends in one of `SUFFIXES`. Memory holds a few blocks. Raises UserError for
    another name, for a file that is there already, without `overwrite`, for a checkpoint that is
    damaged, and for a disk that fails.
    """
    form_of = _format(target)
    if target.exists() and not overwrite:
        raise UserError(f"{target} is there already; choose another name, or add --overwrite")
    if not target.parent.is_dir():
        raise UserError(f"{target}: there is no folder {target.parent}")
    wanted = [a for a in source.manifest.arrays if optimizer or a.kind == "parameter"]
    wanted.sort(key=_order)
    arrays = {form_of.name(array): array for array in wanted}
    form = form_of.form(arrays, _facts(source.manifest, wanted))

    def write(path: Path) -> None:
        hashes = _write(path, source, arrays, form)
        with form_of.open(path) as file:
            _check(file, hashes)

    try:
        write_atomically(target, write)
    except OSError as error:
        raise UserError(f"{target} cannot be written: {error.strerror}") from None


def _order(array: Array) -> tuple[int, bool, str, str]:
    """Where an array stands in a file: the same place, whatever layout has saved it."""
    # The largest elements first, so that all are aligned.
    return -DTYPES[array.dtype].itemsize, array.kind != "parameter", array.kind, array.name


def open_export(path: Path) -> Exported:
    """An exported file, open behind the guards of its format. Raises UserError."""
    return _format(path).open(path)


def inspect_export(path: Path) -> str:
    """What is in an exported file, as a table. Raises UserError for any other file."""
    with open_export(path) as file:
        facts = file.attributes() if isinstance(file, Hdf5File) else file.metadata
        if facts.get("format") != EXPORT:
            raise UserError(f"{path} is no file that mpillm checkpoint export has written")
        lines = [f"{'file':<12}{path}, {human(file_size(path))}"]
        for name, value in facts.items():
            if name != "settings" and name.isprintable() and str(value).isprintable():
                lines.append(f"{name:<12}{value}")
        rows: list[tuple[str, ...]] = [("array", "shape", "type", "elements")]
        for name in _names(file, str(facts.get("kinds"))):
            array = file.find(name)
            shape = " x ".join(map(str, array.shape)) or "one number"
            rows.append((name, shape, array.dtype.name, f"{array.size:,}"))
    return "\n".join([*lines, "", *table(rows)])


def _names(file: Exported, kinds: str) -> list[str]:
    """Names of all arrays in a file."""
    if isinstance(file, SafetensorsFile):
        return file.names()
    return [f"{kind}/{name}" for kind in kinds.split() for name in file.names(kind)]


def _facts(manifest: Manifest, wanted: Sequence[Array]) -> Facts:
    """What an exported file says of itself."""
    return {
        "format": EXPORT,
        "version": _VERSION,
        "mpillm": __version__,
        "step": manifest.step,
        "samples": manifest.samples,
        "kinds": " ".join(dict.fromkeys(array.kind for array in wanted)),
        "settings": json.dumps(manifest.settings),
    }


def _write(
    path: Path, source: Checkpoint, arrays: Mapping[str, Array], form: _Form
) -> dict[str, str]:
    """Write a new file; returns the hash of each array's elements. Raises OSError."""
    hashes = {}
    with path.open("wb", buffering=0) as file:
        for place, content in form.rest.items():
            _put(file.fileno(), memoryview(content), place)
        for name, array in arrays.items():
            digest, place, dtype = hashlib.sha256(), form.starts[name], DTYPES[array.dtype]
            for values in stream(source, array.kind, array.name, Shard.whole(array.shape)):
                for block in flat_blocks(values, dtype):
                    digest.update(block.data)
                    _put(file.fileno(), block.data.cast("B"), place)
                    place += block.nbytes
            hashes[name] = digest.hexdigest()
        os.fsync(file.fileno())
        if hasattr(os, "posix_fadvise"):  # so that what is read back comes from the disk
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
    return hashes


def _put(handle: int, content: memoryview, place: int) -> None:
    """Write all of it at a place in a file."""
    while content:
        count = os.pwrite(handle, content, place)
        content, place = content[count:], place + count


def _check(file: Exported, hashes: Mapping[str, str]) -> None:
    """Read a file back. Raises UserError where it is not what was written."""
    for name, expected in hashes.items():
        array, digest = file.find(name), hashlib.sha256()
        step = BLOCK // array.dtype.itemsize
        for low in range(0, array.size, step):
            digest.update(array.read(low, min(low + step, array.size)).data)
        if digest.hexdigest() != expected:
            raise Damaged(f"{array.where}: what is read back is not what was written")


# -- the formats -----------------------------------------------------------------------------------


def _hdf5(arrays: Mapping[str, Array], facts: Facts) -> _Form:
    skeleton = Skeleton()
    for fact, value in facts.items():
        skeleton.note(fact, value)
    starts, ends = {}, {}
    for name, array in arrays.items():
        dtype = DTYPES[array.dtype]
        starts[name] = skeleton.reserve(name, array.shape, dtype)
        if array.size:
            ends[starts[name]] = starts[name] + array.size * dtype.itemsize
    size = skeleton.close()
    begins = [0, *(ends[start] for start in sorted(ends))]
    rest = zip(begins, [*sorted(ends), size], strict=True)
    return _Form(starts, {low: skeleton.between(low, high) for low, high in rest if low < high})


def _safetensors(arrays: Mapping[str, Array], facts: Facts) -> _Form:
    wanted = {name: (DTYPES[array.dtype], array.shape) for name, array in arrays.items()}
    head, starts = encode_header(wanted, {fact: str(value) for fact, value in facts.items()})
    return _Form(starts, {0: head})


_HDF5 = _Format(lambda array: f"{array.kind}/{array.name}", _hdf5, Hdf5File)
_SAFETENSORS = _Format(
    lambda array: array.name if array.kind == "parameter" else f"{array.kind}/{array.name}",
    _safetensors,
    SafetensorsFile,
)
SUFFIXES = {".h5": _HDF5, ".hdf5": _HDF5, ".safetensors": _SAFETENSORS}
"""How files of these names are written and read."""


def _format(path: Path) -> _Format:
    """The format that a file's name tells."""
    if path.suffix not in SUFFIXES:
        near = did_you_mean(path.suffix, SUFFIXES)
        raise UserError(f"{path}: the name tells no format by its end; {near}")
    return SUFFIXES[path.suffix]
