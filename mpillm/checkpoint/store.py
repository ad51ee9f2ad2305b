"""Saving: every rank writes its own file, then rank 0 commits them all.

One HDF5 file a rank and no parallel HDF5: nothing is collective but two gathers and three small
broadcasts. `commit.py` holds the protocol on disk, `docs/checkpoint-format.md` the format.
"""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, Protocol

import h5py
import msgspec
import numpy as np

from mpillm import __version__
from mpillm.checkpoint.commit import commit, discard, prepare, retire, temporary_folder
from mpillm.checkpoint.files import latest, list_checkpoints, step_name
from mpillm.checkpoint.manifest import Array, File, Manifest, Piece
from mpillm.checkpoint.shard_file import Item, Part, write_shard
from mpillm.errors import UserError

__all__ = ["Item", "World", "latest", "list_checkpoints", "save"]


class World(Protocol):
    """What saving needs of a communicator; every rank makes the same calls."""

    @property
    def rank(self) -> int:
        """This rank."""

    def gather_objects(self, value: Any, /) -> list[Any] | None:
        """The values of all ranks by rank, on rank 0; None elsewhere."""

    def broadcast_object(self, value: Any, /) -> Any:
        """Rank 0's value on every rank."""


@dataclass(frozen=True)
class _Report:
    """What a rank tells rank 0 after writing. `file` is None when it had nothing to write."""

    error: str | None = None
    file: File | None = None
    parts: tuple[Part, ...] = ()


def save(
    folder: Path,
    step: int,
    items: Sequence[Item],
    world: World,
    *,
    samples: int,
    layout: Mapping[str, Any],
    settings: Mapping[str, Any],
    keep: int,
    extra: Mapping[str, str] | None = None,
) -> Path:
    """Write and commit the checkpoint of a step; collective. Returns its folder.

    folder: where a run's checkpoints lie, on a file system that every rank sees. items: what this
    rank writes, none for a rank that writes nothing. samples: consumed since the start of the run.
    extra: sha256 of other files that the run depends on, by name. Afterwards only the `keep` newest
    checkpoints up to this step remain. A checkpoint of the same step is replaced.

    A disk that is full or read-only, on any rank, raises UserError on every rank and leaves the
    checkpoints that were there. Items that do not tile their arrays raise ValueError on every rank.
    """
    sizes = world.gather_objects(sum(item.array.nbytes for item in items))
    task = f"write the checkpoint of step {step}"
    _on_root(world, folder, task, lambda: prepare(folder, step, sum(sizes or ())))
    temporary = temporary_folder(folder, step)
    reports = world.gather_objects(_write(temporary, world.rank, items))

    def finish() -> None:
        manifest = Manifest(
            created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
            step=step,
            samples=samples,
            layout=dict(layout),
            settings=dict(settings),
            versions=_versions(),
            extra=dict(extra or {}),
            files=tuple(report.file for report in reports or () if report.file),
            arrays=_assemble(reports or ()),
        )
        commit(folder, manifest)

    try:
        _on_root(world, folder, task, finish)
    except (UserError, ValueError):
        if world.rank == 0:
            discard(temporary)
        raise
    _on_root(world, folder, "remove old checkpoints", lambda: retire(folder, step, keep))
    return folder / step_name(step)


def _on_root(world: World, folder: Path, task: str, work: Callable[[], None]) -> None:
    """Do work on rank 0 and raise on every rank what it raises there."""
    error: Exception | None = None
    if world.rank == 0:
        try:
            work()
        except (OSError, UserError) as cause:
            last = latest(folder)
            remains = f"{last.name} is the last complete one" if last else "none is complete"
            error = UserError(f"cannot {task} in {folder}: {_reason(cause)}; {remains}")
        except ValueError as cause:
            error = cause
    error = world.broadcast_object(error)
    if error is not None:
        raise error


def _write(temporary: Path, rank: int, items: Sequence[Item]) -> _Report:
    """Write this rank's file; a failure of the file system becomes a report, not an exception."""
    path = temporary / f"shard-{rank:05d}.h5"
    try:
        return _Report(None, *write_shard(path, items))
    except OSError as error:
        return _Report(f"{path.name} on rank {rank}: {_reason(error)}")


def _assemble(reports: Sequence[_Report]) -> tuple[Array, ...]:
    """All ranks' parts as arrays, in the order in which they were first named."""
    for report in reports:
        if report.error:
            raise UserError(report.error)
    found: dict[tuple[str, str], tuple[str, tuple[int, ...], list[Piece]]] = {}
    number = 0
    for report in reports:
        for part in report.parts:
            new: tuple[str, tuple[int, ...], list[Piece]] = (part.dtype, part.shape, [])
            dtype, shape, pieces = found.setdefault((part.kind, part.name), new)
            if (dtype, shape) != (part.dtype, part.shape):
                raise ValueError(
                    f"{part.kind} '{part.name}' is {dtype} {shape} on one rank and "
                    f"{part.dtype} {part.shape} on another"
                )
            if part.piece is not None:
                pieces.append(msgspec.structs.replace(part.piece, file=number))
        number += report.file is not None
    arrays = tuple(
        Array(kind, name, dtype, shape, tuple(sorted(pieces, key=lambda p: (p.start, p.flat))))
        for (kind, name), (dtype, shape, pieces) in found.items()
    )
    for array in arrays:
        if array.missing > 0:
            raise ValueError(f"{array.kind} '{array.name}': no rank wrote {array.missing} elements")
    return arrays


def _reason(error: OSError | UserError) -> str:
    """What went wrong, in one line; the system's words where there are any."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return " ".join(str(error).split())


def _versions() -> dict[str, str]:
    return {
        "mpillm": __version__,
        "python": platform.python_version(),
        "numpy": np.__version__,
        "h5py": h5py.__version__,
        "hdf5": h5py.version.hdf5_version,
    }
