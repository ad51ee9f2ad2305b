"""The commit protocol: what rank 0 does with the folders before and after every rank writes.

`prepare` makes `.tmp-<step>`, in which every rank writes and fsyncs its file; `commit` writes the
manifest and fsyncs it and the folder, renames the folder to `step-<step>` and fsyncs its parent;
`retire` removes what is no longer wanted. A crash at any point leaves the complete checkpoints as
they were and at most `.tmp-*` folders, which the next `prepare` removes: a folder named `step-*` is
complete by construction.

A save of a step that exists replaces it: the complete folder there is renamed to
`step-<step>.old`, which still counts as a checkpoint, and is removed once the new one stands.
"""

from __future__ import annotations

import os
import shutil
from pathlib import Path

from mpillm.checkpoint.files import OLD, list_checkpoints, step_name, step_of, sync
from mpillm.checkpoint.manifest import MANIFEST, Manifest, decode, encode
from mpillm.errors import UserError

__all__ = ["commit", "discard", "prepare", "retire", "temporary_folder"]

_OVERHEAD = 2**20  # bytes of manifest and HDF5 metadata that the free-space check allows for


def temporary_folder(folder: Path, step: int) -> Path:
    """Where the ranks write the checkpoint of a step until it is committed."""
    return folder / f".tmp-{step:08d}"


def prepare(folder: Path, step: int, needed: int) -> None:
    """Remove what dead writes left, look for room and make the folder to write in.

    needed: bytes of all ranks' elements. Raises UserError when they do not fit.
    """
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    folder.mkdir(parents=True, exist_ok=True)
    for path in made:
        sync(path.parent)
    for path in folder.glob(".tmp-*"):
        discard(path)
    _drop_replaced(folder)
    free = shutil.disk_usage(folder).free
    if free < needed + _OVERHEAD:
        raise UserError(
            f"it needs {(needed + _OVERHEAD) / 2**20:.1f} MiB and {free / 2**20:.1f} MiB are free "
            "(make room or lower checkpoint.keep)"
        )
    temporary_folder(folder, step).mkdir()


def commit(folder: Path, manifest: Manifest) -> Path:
    """Make the files that the ranks have written and fsynced the checkpoint of its step."""
    temporary = temporary_folder(folder, manifest.step)
    for file in manifest.files:
        path = temporary / file.name
        if not path.exists() or path.stat().st_size != file.bytes:
            raise UserError(f"rank 0 does not see {path}; the run folder must be on a shared disk")
    path = temporary / MANIFEST
    raw = encode(manifest)
    decode(raw, path)  # what no reader would accept is never committed
    with path.open("xb") as target:
        target.write(raw)
        target.flush()
        os.fsync(target.fileno())
    sync(temporary)
    final = folder / step_name(manifest.step)
    if final.exists():
        final.rename(final.with_suffix(OLD))
        sync(folder)  # no crash may keep the next rename and lose this one
    temporary.rename(final)
    sync(folder)
    return final


def retire(folder: Path, step: int, keep: int) -> None:
    """Remove the checkpoint that was replaced, and all but the newest `keep` up to `step`.

    Those of later steps, which a run that went back may have, are left alone.
    """
    _drop_replaced(folder)
    past = [path for path in list_checkpoints(folder) if (step_of(path.name) or 0) <= step]
    for path in past[:-keep]:
        _remove(path)


def discard(path: Path) -> None:
    """Remove a leftover as far as it can be; the next save removes the rest (open files on NFS)."""
    shutil.rmtree(path, ignore_errors=True)


def _drop_replaced(folder: Path) -> None:
    """Remove each `.old` checkpoint whose replacement stands."""
    for path in list_checkpoints(folder):
        if path.suffix == OLD and path.with_suffix("").is_dir():
            _remove(path)


def _remove(path: Path) -> None:
    """Remove a checkpoint; the rename comes first, so that half of one never counts as one."""
    away = path.with_name(f".tmp-removed-{path.name}")
    path.rename(away)
    discard(away)
