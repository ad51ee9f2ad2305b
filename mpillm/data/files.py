"""Files: written whole or not at all, and named well when missing."""

from __future__ import annotations

import difflib
import os
from collections.abc import Callable, Sequence
from pathlib import Path

from mpillm.errors import UserError

__all__ = ["missing_file", "write_atomically"]


def missing_file(setting: str, path: Path) -> UserError:
    """The error for a path that does not exist, with the nearest name that does."""
    missing = path
    while not os.path.isdir(missing.parent) and missing != missing.parent:
        missing = missing.parent
    try:
        names = sorted(os.listdir(missing.parent))
    except OSError as error:
        return UserError(f"{setting}: no file '{path}': {missing.parent}: {error.strerror}")
    near = difflib.get_close_matches(missing.name, names, n=1)
    hint = f"did you mean '{missing.with_name(near[0])}'?" if near else _contents(names)
    return UserError(f"{setting}: no file '{path}'; {hint}")


def _contents(names: Sequence[str]) -> str:
    """What a folder holds, in a few words."""
    if not names:
        return "its folder is empty"
    return "its folder holds " + ", ".join(names[:5]) + (", ..." if len(names) > 5 else "")


def write_atomically(path: Path, write: Callable[[Path], object]) -> None:
    """Have `write` make a file under a temporary name, then rename it to `path`; both are fsynced.

    After a crash or a kill at any moment, `path` is the old file or the new one, never a part. What
    `write` raises propagates, with `path` untouched and nothing left behind.
    """
    temporary = path.with_name(f".tmp-{path.name}")
    try:
        write(temporary)
        _fsync(temporary)
        os.replace(temporary, path)
    except BaseException:
        temporary.unlink(missing_ok=True)
        raise
    _fsync(path.parent)


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
