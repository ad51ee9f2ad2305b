"""Files: sizes and hashes, reading within bounds, and writing that survives a crash."""

from __future__ import annotations

import contextlib
import errno
import hashlib
import os
import stat
from collections.abc import Callable
from pathlib import Path

from mpillm.errors import UserError

__all__ = [
    "Damaged",
    "file_size",
    "hash_file",
    "make_folder",
    "open_file",
    "read_file",
    "sync",
    "write_atomically",
    "write_file",
]


class Damaged(UserError):
    """The bytes of a file are not those that were written; an older file may be whole."""


def file_size(path: Path) -> int:
    """Size in bytes of a regular file.

    Raises Damaged for one that is missing and for anything else, links included; UserError where it
    cannot be looked at.
    """
    try:
        status = path.lstat()
    except FileNotFoundError:
        raise Damaged(f"{path} is missing") from None
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(status.st_mode):
        raise Damaged(f"{path} is not a regular file; links and devices are not followed")
    return status.st_size


def open_file(path: Path) -> int:
    """Open a regular file for reading; the handle is the caller's to close.

    Raises as `file_size` does, and UserError where it cannot be opened.
    """
    file_size(path)
    try:
        # Should it be replaced meanwhile: a link is refused, a FIFO is not waited for.
        handle = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_NONBLOCK | os.O_CLOEXEC)
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if not stat.S_ISREG(os.fstat(handle).st_mode):
        os.close(handle)
        raise Damaged(f"{path} was replaced while it was opened")
    return handle


def read_file(path: Path, limit: int) -> bytes:
    """The bytes of a regular file of at most `limit` bytes.

    Raises Damaged for a larger one and as `file_size` does; UserError where it cannot be read.
    """
    with open(open_file(path), "rb") as file:
        try:
            content = file.read(min(limit, os.fstat(file.fileno()).st_size) + 1)
        except OSError as error:
            raise UserError(f"{path} cannot be read: {error.strerror}") from None
    if len(content) > limit:
        raise Damaged(f"{path} has {file_size(path)} bytes; at most {limit} are read")
    return content


def hash_file(path: Path) -> str:
    """sha256 of a file's bytes. Raises OSError when it cannot be read."""
    digest, buffer = hashlib.sha256(), bytearray(2**20)
    view = memoryview(buffer)
    with path.open("rb", buffering=0) as file:
        while count := file.readinto(view):
            digest.update(view[:count])
    return digest.hexdigest()


def sync(path: Path) -> None:
    """fsync a file or a folder. Raises OSError."""
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def make_folder(folder: Path) -> None:
    """Make a folder and those above it, where they are not there, to stay. Raises OSError."""
    made = [path for path in (folder, *folder.parents) if not path.exists()]
    for path in reversed(made):
        with contextlib.suppress(FileExistsError):  # another process may be as far
            os.mkdir(path)
        sync(path.parent)
    if not folder.is_dir():
        raise NotADirectoryError(errno.ENOTDIR, os.strerror(errno.ENOTDIR), str(folder))


def write_file(path: Path, content: bytes) -> None:
    """Write and fsync a new file. Raises OSError, FileExistsError where there is one."""
    with path.open("xb") as file:
        file.write(content)
        file.flush()
        os.fsync(file.fileno())


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file under a temporary name, then rename it to `path`; both are fsynced.

    After a crash or a kill at any moment, `path` is the old file or the new one, never a part. What
    `write` raises propagates, with `path` untouched and nothing left behind.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        write(temporary)
        sync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    sync(path.parent)
