"""Names of a checkpoint's folders."""

from __future__ import annotations

import re
from pathlib import Path

__all__ = ["OLD", "latest", "list_checkpoints", "step_name", "step_of"]

OLD = ".old"
"""Suffix of a complete checkpoint that a second save of its step is about to replace."""


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
