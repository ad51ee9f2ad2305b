"""What the writers of a checkpoint report, and the manifest that is made of it."""

from __future__ import annotations

import os
import platform
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime, timezone
from typing import Any, Protocol

import h5py
import msgspec
import numpy as np

from mpillm import __version__
from mpillm.checkpoint.files import latest, list_checkpoints
from mpillm.checkpoint.manifest import Array, File, Manifest, Piece
from mpillm.checkpoint.shard_file import Item, Part
from mpillm.errors import UserError

__all__ = [
    "Facts",
    "Item",
    "Report",
    "World",
    "latest",
    "list_checkpoints",
    "manifest_of",
    "reason",
]


class World(Protocol):
    """What saving needs of a communicator; every rank makes the same calls."""

    @property
    def rank(self) -> int:
        """This rank."""

    def gather_objects(self, item: Any, /) -> list[Any] | None:
        """The values of all ranks by rank, on rank 0; None elsewhere."""

    def broadcast_object(self, item: Any, /) -> Any:
        """Rank 0's value on every rank."""


@dataclass(frozen=True)
class Facts:
    """What a checkpoint says beside its arrays; the members of `Manifest` of these names."""

    step: int
    samples: int
    layout: Mapping[str, Any]
    settings: Mapping[str, Any]
    state: Mapping[str, Any]
    extra: Mapping[str, str]


@dataclass(frozen=True)
class Report:
    """What a rank tells rank 0 after writing. `file` is None when it had nothing to write."""

    error: str | None = None
    file: File | None = None
    parts: tuple[Part, ...] = ()


def manifest_of(facts: Facts, reports: Sequence[Report]) -> Manifest:
    """The manifest of what all writers have written.

    Raises UserError when one of them has failed, ValueError when the parts do not tile the arrays.
    """
    for report in reports:
        if report.error:
            raise UserError(report.error)
    return Manifest(
        created=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        step=facts.step,
        samples=facts.samples,
        layout=dict(facts.layout),
        settings=dict(facts.settings),
        state=dict(facts.state),
        versions={
            "mpillm": __version__,
            "python": platform.python_version(),
            "numpy": np.__version__,
            "h5py": h5py.__version__,
            "hdf5": h5py.version.hdf5_version,
        },
        extra=dict(facts.extra),
        files=tuple(report.file for report in reports if report.file),
        arrays=_assemble(reports),
    )


def _assemble(reports: Sequence[Report]) -> tuple[Array, ...]:
    """All parts as arrays, in the order in which they were first named."""
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


def reason(error: OSError | UserError) -> str:
    """What went wrong, in one line; the system's words where there are any."""
    if isinstance(error, OSError) and error.errno:
        return os.strerror(error.errno)
    return " ".join(str(error).split())
