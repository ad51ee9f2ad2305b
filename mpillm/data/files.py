"""Files that are missing, named well."""

from __future__ import annotations

import difflib
import os
from collections.abc import Sequence
from pathlib import Path

from mpillm.errors import UserError

__all__ = ["missing_file"]


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
