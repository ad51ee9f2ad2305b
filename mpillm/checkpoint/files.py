"""Names, sizes and hashes of a checkpoint's files and folders."""

from __future__ import annotations

import hashlib
import os
import re
import stat
from pathlib import Path

from mpillm.errors import UserError

__all__ = [
    "OLD",
    "Damaged",
    "file_size",
    "hash_file",
    "latest",
    "list_checkpoints",
    "step_name",
    "step_of",
    "sync",
]

OLD = ".old"
"""Suffix of a complete checkpoint that a second save of its step is about to replace."""


class Damaged(UserError):
    """The bytes of a checkpoint are not those that were committed; an older one may be whole."""


def step_name(step: int) -> str:
    """Name of the folder of a committed checkpoint."""
    return f"step-{step:08d}"


def step_of(name: str) -> int | None:
    """The step of a committed checkpoint by its folder's name; None for any other name.

    >>> step_of("step-00000100"), step_of("step-00000100.old"), step_of(".tmp-00000100")
    (100, 100, None)
    """
    found = re.fullmatch(rf"step-([0-9]{{8,18}})({re.escape(OLD)})?", name)
    return int(found[1]) if found else None


def list_checkpoints(folder: Path) -> list[Path]:
    """The complete checkpoints in a folder, the oldest step first; empty if there is no folder."""
    if not folder.is_dir():
        return []
    found = [
        (step, path.suffix != OLD, path)
        for path in folder.iterdir()
        if (step := step_of(path.name)) is not None and path.is_dir() and not path.is_symlink()
    ]
    return [path for _, _, path in sorted(found)]


def latest(folder: Path) -> Path | None:
    """The complete checkpoint of the highest step, if there is one."""
    found = list_checkpoints(folder)
    return found[-1] if found else None


def file_size(path: Path) -> int:
    """Size in bytes of a regular file. Raises UserError for anything else, links included."""
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"{path} is not a regular file; links and devices are not followed")
    return status.st_size


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes."""
    digest, buffer = hashlib.sha256(), bytearray(2**20)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(view):
            digest.update(view[:count])
    return digest.hexdigest()


def sync(path: Path) -> None:
    """fsync a file or a folder."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
