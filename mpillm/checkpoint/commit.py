"""The commit protocol: what rank 0 does with the folders before and after the ranks write.

`prepare` makes `.tmp-<step>`, in which the writers write and fsync their files; `commit` writes the
manifest, fsyncs it, reads it back and fsyncs the folder, renames the folder to `step-<step>` and
fsyncs its parent; `retire` removes what is no longer wanted. A crash at any point leaves the
complete checkpoints as they were and at most `.tmp-*` folders, which `clean` and the next `prepare`
remove: a folder named `step-*` is complete by construction.

A save of a step that exists replaces it: the complete folder there is renamed to
`step-<step>.old`, which still counts as a checkpoint, and is removed once the new one stands.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mpillm.checkpoint.files import OLD, list_checkpoints, step_name, step_of
from mpillm.checkpoint.manifest import MANIFEST, Manifest, decode, encode, read_manifest
from mpillm.errors import UserError
from mpillm.storage.disk import file_size, make_folder, sync

__all__ = ["clean", "commit", "discard", "prepare", "retire", "temporary_folder"]

_OVERHEAD = 2**20  # bytes of manifest and HDF5 metadata that the free-space check allows for


def temporary_folder(folder: Path, step: int) -> Path:
    """Where the ranks write the checkpoint of a step until it is committed."""
    return folder / f".tmp-{step:08d}"


def clean(folder: Path) -> list[str]:
    """Remove what dead writes left in the folder of a run's checkpoints; returns the names.

    These are `.tmp-*` folders and each `.old` checkpoint whose replacement stands. Whoever calls
    must know that nobody writes there, by holding the run's lock.
    """
    left = sorted(folder.glob(".tmp-*"))
    for path in left:
        discard(path)
    return [path.name for path in left] + _drop_replaced(folder)


def prepare(folder: Path, step: int, needed: int) -> None:
    """Remove what dead writes left, look for room and make the folder to write in.

    needed: bytes of all ranks' elements. Raises UserError when they do not fit.
    """
    make_folder(folder)
    clean(folder)
    free = shutil.disk_usage(folder).free
    if free < needed + _OVERHEAD:
        raise UserError(
            f"it needs {(needed + _OVERHEAD) / 2**20:,.1f} MiB and {free / 2**20:,.1f} MiB are "
            "free (make room or lower checkpoint.keep)"
        )
    os.mkdir(temporary_folder(folder, step))


def commit(folder: Path, manifest: Manifest) -> Path:
    """Make the files that the ranks have written and fsynced the checkpoint of its step."""
    temporary = temporary_folder(folder, manifest.step)
    for file in manifest.files:
        path = temporary / file.name
        if not path.exists() or path.stat().st_size != file.bytes:
            raise UserError(f"rank 0 does not see {path}; the run folder must be on a shared disk")
    raw = encode(manifest)
    decode(raw, temporary / MANIFEST)  # what no reader would accept is never committed
    _write(temporary / MANIFEST, raw)
    sync(temporary)
    final = folder / step_name(manifest.step)
    old = final.with_suffix(OLD)
    if old.exists() and final.exists():
        _remove(final)  # `clean` has found it damaged, or it would have removed the other
    elif final.exists():
        os.rename(final, old)
        sync(folder)  # no crash may keep the next rename and lose this one
    os.rename(temporary, final)
    sync(folder)
    return final


def retire(folder: Path, step: int, keep: int, keep_every: int = 0) -> None:
    """Remove the checkpoint that was replaced, and those before the newest `keep` up to `step`.

    What does not look whole, with its manifest and all files in their sizes, does not count among
    the `keep`. Steps that are a multiple of `keep_every` stay for good, and so do all later than
    `step`, which a run that went back may have.
    """
    _drop_replaced(folder)
    past = [path for path in list_checkpoints(folder) if _step(path) <= step]
    while past and keep:
        keep -= _looks_whole(past.pop())
    for path in past:
        if not keep_every or _step(path) % keep_every:
            _remove(path)


def discard(path: Path) -> None:
    """Remove a leftover as far as it can be; the next save removes the rest (open files on NFS)."""
    shutil.rmtree(path, ignore_errors=True)


def _write(path: Path, raw: bytes) -> None:
    """Write and fsync a new file, and see that the disk has it."""
    handle = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL, 0o666)
    try:
        rest = memoryview(raw)
        while rest:
            rest = rest[os.write(handle, rest) :]
        os.fsync(handle)
        if hasattr(os, "posix_fadvise"):
            os.posix_fadvise(handle, 0, 0, os.POSIX_FADV_DONTNEED)
        if os.pread(handle, len(raw) + 1, 0) != raw:
            raise UserError(f"{path.name}: what is read back is not what was written")
    finally:
        os.close(handle)


def _drop_replaced(folder: Path) -> list[str]:
    """Remove each `.old` checkpoint whose replacement stands; returns the names."""
    replaced = [
        path
        for path in list_checkpoints(folder)
        if path.suffix == OLD and _looks_whole(path.with_suffix(""))
    ]
    for path in replaced:
        _remove(path)
    return [path.name for path in replaced]


def _remove(path: Path) -> None:
    """Remove a checkpoint; the rename comes first, so that half of one never counts as one."""
    away = path.with_name(f".tmp-removed-{path.name}")
    discard(away)
    os.rename(path, away)
    sync(path.parent)  # no crash may keep the removal of a file and lose the rename
    discard(away)


def _step(path: Path) -> int:
    return step_of(path.name) or 0


def _looks_whole(path: Path) -> bool:
    """Whether a checkpoint has its manifest and every file in its size; elements are not read."""
    try:
        manifest = read_manifest(path)
        return all(file_size(path / file.name) == file.bytes for file in manifest.files)
    except UserError:
        return False
