"""Looking at checkpoints: find the one that is meant, list what is in it, find what is wrong."""

from __future__ import annotations

from pathlib import Path

from mpillm.checkpoint.files import latest, list_checkpoints, step_of
from mpillm.checkpoint.manifest import (
    DTYPES,
    MANIFEST,
    Array,
    File,
    Manifest,
    read_manifest,
)
from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.tables import human, table
from mpillm.errors import UserError, did_you_mean
from mpillm.storage.disk import file_size, hash_file

__all__ = ["inspect", "resolve", "verify"]


def resolve(path: str | Path) -> Path:
    """The checkpoint meant by a run's folder, its `checkpoints` folder or one checkpoint's folder.

    Of several, the newest complete one. Raises UserError when there is none.
    """
    path = Path(path)
    if path.is_dir():
        if step_of(path.name) is not None or (path / MANIFEST).exists():
            return path
        folder = path / "checkpoints" if (path / "checkpoints").is_dir() else path
        newest = latest(folder)
        if newest is None:
            unfinished = len(list(folder.glob(".tmp-*")))
            also = f"; {unfinished} unfinished, which is not readable" if unfinished else ""
            raise UserError(f"{folder} holds no complete checkpoint (step-*){also}")
        return newest
    if path.exists():
        raise UserError(f"{path} is not a folder; expected a run or one of its checkpoints")
    near = [
        other.name
        for other in (path.parent.iterdir() if path.parent.is_dir() else ())
        if other.is_dir() and (step_of(other.name) is not None or (other / "checkpoints").is_dir())
    ]
    raise UserError(f"{path} does not exist; {did_you_mean(path.name, near)}")


def verify(path: Path) -> list[str]:
    """Everything that is wrong with one checkpoint, a line each; empty when it is whole.

    Reads every byte twice: for the hash of each file, and for that of each piece.
    """
    try:
        manifest = read_manifest(path)
    except UserError as error:
        return [str(error)]
    listed = {MANIFEST, *(file.name for file in manifest.files)}
    problems = [
        f"{entry} does not belong to the checkpoint"
        for entry in sorted(path.iterdir())
        if entry.name not in listed
    ]
    unreadable: set[int] = set()
    for number, file in enumerate(manifest.files):
        problem, readable = _check_file(path, file)
        if problem:
            problems.append(problem)
        if not readable:
            unreadable.add(number)
    problems += [
        f"{path}: {array.missing} of {array.size} elements of {array.kind} '{array.name}' are in "
        "no piece"
        for array in manifest.arrays
        if array.missing
    ]
    pieces = [(array, piece) for array in manifest.arrays for piece in array.pieces]
    with Checkpoint(path, manifest) as checkpoint:
        for array, piece in sorted(pieces, key=lambda pair: pair[1].file):
            if piece.file not in unreadable:
                try:
                    checkpoint.check(array, piece)
                except UserError as error:
                    problems.append(str(error))
    return problems


def _check_file(folder: Path, file: File) -> tuple[str | None, bool]:
    """What is wrong with a file, if anything, and whether it is worth looking at its pieces."""
    path = folder / file.name
    try:
        size = file_size(path)
        if size != file.bytes:
            what = "truncated" if size < file.bytes else "too long"
            return f"{path} is {what}: {size} bytes, expected {file.bytes}", False
        digest = hash_file(path)
    except UserError as error:
        return str(error), False
    except OSError as error:
        return f"{path} cannot be read: {error.strerror}", False
    if digest == file.sha256:
        return None, True
    for other in list_checkpoints(folder.parent):
        if other.name != folder.name and digest in _hashes(other):
            return f"{path} is a file of {other.name}, not the one that was saved here", False
    return f"{path} is damaged: its sha256 is {digest}, expected {file.sha256}", True


def _hashes(folder: Path) -> set[str]:
    """Hashes of the files of a checkpoint; none when it cannot be read."""
    try:
        return {file.sha256 for file in read_manifest(folder).files}
    except UserError:
        return set()


def inspect(path: Path) -> str:
    """What is in one checkpoint, as a table."""
    manifest = read_manifest(path)
    lines = _facts(path, manifest)
    kinds = list(dict.fromkeys(array.kind for array in manifest.arrays))
    rows: list[tuple[str, ...]] = [("kind", "arrays", "elements", "size", "pieces")]
    for kind in [*kinds, "all"]:
        arrays = [array for array in manifest.arrays if kind in (array.kind, "all")]
        elements, size = sum(a.size for a in arrays), sum(_bytes(a) for a in arrays)
        pieces = sum(len(a.pieces) for a in arrays)
        rows.append((kind, f"{len(arrays):,}", f"{elements:,}", human(size), f"{pieces:,}"))
    lines += ["", *table(rows)]
    rows = [("parameter", "shape", "type", "elements", "pieces")]
    for array in manifest.arrays:
        if array.kind == "parameter":
            shape = " x ".join(map(str, array.shape)) or "one number"
            rows.append(
                (array.name, shape, array.dtype, f"{array.size:,}", f"{len(array.pieces):,}")
            )
    return "\n".join([*lines, "", *table(rows)])


def _facts(path: Path, manifest: Manifest) -> list[str]:
    total = sum(file.bytes for file in manifest.files)
    facts = {
        "checkpoint": str(path),
        "format": f"{manifest.format}, version {manifest.version}",
        "written": manifest.created,
        "step": f"{manifest.step:,}",
        "samples": f"{manifest.samples:,}",
        "layout": ", ".join(f"{axis} {size}" for axis, size in manifest.layout.items()),
        "versions": ", ".join(f"{name} {text}" for name, text in manifest.versions.items()),
        "depends on": ", ".join(f"{name} ({text[:12]})" for name, text in manifest.extra.items()),
        "files": f"{len(manifest.files):,}, {human(total)}",
    }
    # What a file says must not move a terminal's cursor.
    shown = {name: text if text.isprintable() else ascii(text) for name, text in facts.items()}
    return [f"{name:<12}{text}" for name, text in shown.items() if text]


def _bytes(array: Array) -> int:
    return int(array.size * DTYPES[array.dtype].itemsize)
