"""Making ready: the run's flight recorder, its text, and settings with everything filled in."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING

from msgspec.structs import replace

from mpillm.array.backend import Backend
from mpillm.checkpoint.files import latest
from mpillm.data.prepare import PreparedData, prepare
from mpillm.data.tokens import TokenFile
from mpillm.errors import UserError
from mpillm.parallel.grid import AXES
from mpillm.parallel.launch import agree
from mpillm.parallel.mesh import Mesh
from mpillm.parallel.recorder import Recorder
from mpillm.training.folder import next_attempt, private_folder
from mpillm.training.replicas import check_comparable
from mpillm.training.settings import RunConfig
from mpillm.training.trainer import resolve_batch

if TYPE_CHECKING:
    from mpillm.parallel.launch import Comm

__all__ = ["mesh_of", "open_data", "open_recorder", "resolve"]


def open_recorder(config: RunConfig, comm: Comm) -> tuple[Recorder, Path]:
    """This rank's flight recorder, and the folder of this attempt's reports; collective."""
    folder = Path(config.run.dir)
    attempt: int = comm.bcast(next_attempt(folder) if comm.rank == 0 else 0)
    reports = files = folder / "flight" / f"{attempt:05d}"
    if config.run.flight_dir:
        files = private_folder(Path(config.run.flight_dir), folder) / reports.name
    layout = {axis: int(getattr(config.parallel, axis)) for axis in AXES}
    with agree(comm):
        try:
            recorder = Recorder(
                files / f"rank-{comm.rank:05d}.bin", rank=comm.rank, size=comm.size, layout=layout
            )
        except OSError as error:
            raise UserError(f"{files}: flight files cannot be written: {error.strerror}") from None
    return recorder, reports


@contextlib.contextmanager
def mesh_of(comm: Comm, config: RunConfig, backend: Backend, recorder: Recorder) -> Iterator[Mesh]:
    """The mesh of a run, freed at its end; not where a rank fails alone: others are not there."""
    mesh = Mesh(comm, config.parallel, backend, recorder)
    try:
        yield mesh
    except UserError:  # raised by all ranks alike
        mesh.free()
        raise
    mesh.free()


def open_data(config: RunConfig, comm: Comm) -> tuple[PreparedData, TokenFile]:
    """The text of a run as tokens in the run's folder, which is there; collective."""
    folder = Path(config.run.dir)
    with agree(comm):
        trained = latest(folder / "checkpoints") is not None
        prepared = prepare(config.data, folder, write=comm.rank == 0, replace=not trained)
    with agree(comm):
        return prepared, TokenFile(prepared.tokens)


def resolve(config: RunConfig, tokens: TokenFile) -> RunConfig:
    """The settings with everything that was left open filled in, and checked against each other."""
    check_comparable(config.run, config.parallel)
    model, length = config.model, config.train.sequence_length
    if model.vocabulary and model.vocabulary < tokens.vocabulary_size:
        raise UserError(
            f"model.vocabulary = {model.vocabulary}: the text has {tokens.vocabulary_size} token "
            f"types; set model.vocabulary >= {tokens.vocabulary_size}, or 0"
        )
    if model.context and model.context < length:
        raise UserError(
            f"train.sequence_length = {length} is longer than model.context = {model.context}; "
            f"set train.sequence_length <= {model.context}"
        )
    return replace(
        config,
        model=replace(
            model,
            vocabulary=model.vocabulary or tokens.vocabulary_size,
            context=model.context or length,
        ),
        train=resolve_batch(config.train, config.parallel),
    )
