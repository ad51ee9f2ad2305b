"""A checkpoint written anew in another layout, of which no rank runs.

The plan of the layout tells what each of its ranks would write; every piece is copied, block by
block, from the pieces of the source that overlap it. The files hold the same bytes as those of a
run in that layout that has loaded the source and saved it.
"""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from functools import partial
from pathlib import Path

from msgspec.structs import replace

from mpillm.checkpoint.commit import commit, discard, prepare, temporary_folder
from mpillm.checkpoint.files import list_checkpoints, step_of
from mpillm.checkpoint.item import Item
from mpillm.checkpoint.manifest import DTYPES, MANIFEST
from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.shard_file import write_shard
from mpillm.checkpoint.store import Facts, Report, manifest_of, reason
from mpillm.checkpoint.stream import stream
from mpillm.checkpoint.verify import resolve
from mpillm.config import dump, load, to_table
from mpillm.errors import UserError
from mpillm.models.model import Model
from mpillm.models.settings import build_model
from mpillm.parallel.grid import fit
from mpillm.parallel.layouts import choose_layout, ranks_of
from mpillm.parallel.settings import ParallelSettings
from mpillm.storage.disk import hash_file, write_atomically
from mpillm.training.batch import resolve_batch
from mpillm.training.folder import take_folder
from mpillm.training.saving import mine, planned
from mpillm.training.settings import RunConfig

__all__ = ["reshard", "shard_items"]

_TOKENIZER = "tokenizer.json"
_RUN_FILES = (_TOKENIZER, "tokens.h5")


def reshard(
    source: str | Path,
    target: str | Path,
    parallel: ParallelSettings | Sequence[str] = (),
    *,
    ranks: int | None = None,
) -> Path:
    """Write a checkpoint anew as a layout would have saved it; returns the new checkpoint's folder.

    source: a run (its newest checkpoint) or one checkpoint. target: becomes a run's folder to go on
    with: the checkpoint, `config.toml` with the new layout, and, where the source lies in a run,
    its tokenizer and tokens. parallel: the layout, or `--parallel.key=value` options that name it:
    sizes that are not named are 1, other settings are the source's where they have a use. ranks:
    how many, of which data parallelism takes what the layout leaves.

    No rank runs, MPI does not start, and memory holds a few blocks however large the model is.
    Raises UserError for a source that is damaged or lacks something, for a layout that the run
    could not be trained in, for a target that holds this step or another run, and for a disk that
    fails; whatever was in the target then is there still.
    """
    path, target = resolve(source), Path(target)
    with Checkpoint.open(path) as checkpoint:
        config = _new_settings(checkpoint, target, parallel, ranks)
        model = build_model(config.model)
        _check_arrays(checkpoint, model)
        files = _run_files(checkpoint)
        _check_target(checkpoint, files, target, config)
        lock = take_folder(target, fresh=False)
        try:
            for file in files:
                if not (target / file.name).exists():
                    write_atomically(target / file.name, partial(shutil.copyfile, file))
            made = _write(checkpoint, target / "checkpoints", model, config)
            # Last: a run that has settings and no checkpoint would begin anew.
            text = dump(config).encode()
            write_atomically(target / "config.toml", lambda temporary: temporary.write_bytes(text))
        except OSError as error:
            raise UserError(f"{target} cannot be written to: {reason(error)}") from None
        finally:
            lock.release()
    return made


def shard_items(
    checkpoint: Checkpoint, model: Model, layout: ParallelSettings, rank: int
) -> list[Item]:
    """What a rank of a layout would write of the checkpoint's state; elements are read in writing.

    layout: has been through `fit` and `Model.check_layout`.
    """
    return [
        Item(
            kind,
            param.name,
            param.shard,
            partial(stream, checkpoint, kind, param.name, param.shard, part),
            part,
            checkpoint.array(kind, param.name).dtype,
        )
        for kind, param, part, _ in mine(planned(model, layout, rank))
    ]


# -- what is to be written, and whether it can be --------------------------------------------------


def _new_settings(
    checkpoint: Checkpoint,
    target: Path,
    parallel: ParallelSettings | Sequence[str],
    ranks: int | None,
) -> RunConfig:
    """The settings of the run under the new layout, in its new folder, checked as for training."""
    try:
        config = load(RunConfig, checkpoint.manifest.settings)
    except UserError as error:
        raise UserError(f"{checkpoint.path / MANIFEST}: {error}") from None
    if isinstance(parallel, ParallelSettings):
        layout = parallel
    else:
        layout = choose_layout(parallel, config.parallel)
        named = any(option.startswith("--parallel.data=") for option in parallel)
        if ranks is not None and not named:
            layout = replace(layout, data=0)
    if ranks is None:
        layout = replace(layout, data=layout.data or 1)
    layout = fit(layout, ranks_of(layout) if ranks is None else ranks)
    build_model(config.model).check_layout(layout)
    return replace(
        config,
        parallel=layout,
        train=resolve_batch(config.train, layout),
        run=replace(config.run, dir=str(target)),
    )


def _check_arrays(checkpoint: Checkpoint, model: Model) -> None:
    """UserError unless the checkpoint holds all that a run of the model keeps, and nothing else."""
    wanted = set()
    for kind, param, _, _ in planned(model, ParallelSettings(data=1), 0):  # one rank has it all
        wanted.add((kind, param.name))
        array = checkpoint.array(kind, param.name)
        if array.shape != param.shard.shape or array.missing:
            raise UserError(
                f"{checkpoint.path}: {kind} '{param.name}' has shape {array.shape} and lacks "
                f"{array.missing} elements; expected {param.shard.shape}, whole"
            )
    for array in checkpoint.manifest.arrays:
        if (array.kind, array.name) not in wanted:
            raise UserError(
                f"{checkpoint.path} holds {array.kind} '{array.name}', which its model has not"
            )


def _run_files(checkpoint: Checkpoint) -> list[Path]:
    """The files beside the checkpoint's run that one who goes on with it needs.

    UserError where the tokenizer is not the one that the run was trained with.
    """
    folder = checkpoint.path.parent
    if folder.name != "checkpoints":
        return []
    files = [folder.parent / name for name in _RUN_FILES]
    expected = checkpoint.manifest.extra.get(_TOKENIZER)
    if files[0].exists() and expected not in (None, hash_file(files[0])):
        raise UserError(f"{files[0]} is not the one that {checkpoint.path} was trained with")
    return [file for file in files if file.exists()]


def _check_target(
    checkpoint: Checkpoint, files: Sequence[Path], target: Path, config: RunConfig
) -> None:
    """UserError where writing would touch the source, this step, or another run."""
    source = checkpoint.path
    places = [source, source.parent]
    if source.parent.name == "checkpoints":
        places.append(source.parent.parent)
    if target.resolve() in [place.resolve() for place in places]:
        raise UserError(f"{target} is where {source} lies; choose another folder to write to")
    for other in list_checkpoints(target / "checkpoints"):
        if step_of(other.name) == checkpoint.manifest.step:
            raise UserError(f"{other} is there already; remove it, or choose another folder")
    settings = target / "config.toml"
    if settings.exists() and load(RunConfig, settings).model != config.model:
        raise UserError(f"{target} holds a run of another model; choose another folder")
    for file in files:
        theirs = target / file.name
        if theirs.exists() and hash_file(theirs) != hash_file(file):
            raise UserError(f"{target} holds another run: its {file.name} is not that of {file}")


# -- writing ---------------------------------------------------------------------------------------


def _write(checkpoint: Checkpoint, folder: Path, model: Model, config: RunConfig) -> Path:
    """Write and commit the checkpoint as a run would; returns its folder. Raises OSError."""
    manifest, layout = checkpoint.manifest, config.parallel
    temporary = temporary_folder(folder, manifest.step)
    try:
        _make_room(checkpoint, folder)
        reports = []
        for rank in range(ranks_of(layout)):
            path = temporary / f"shard-{rank:05d}.h5"
            items = shard_items(checkpoint, model, layout, rank)
            reports.append(Report(None, *write_shard(path, items)))
        facts = Facts(
            step=manifest.step,
            samples=manifest.samples,
            layout=to_table(layout),
            settings=to_table(config),
            state=manifest.state,
            extra=manifest.extra,
        )
        return commit(folder, manifest_of(facts, reports))
    except BaseException:
        discard(temporary)
        raise


def _make_room(checkpoint: Checkpoint, folder: Path) -> None:
    """Make the folder to write in. UserError where the disk has no room for it."""
    arrays = checkpoint.manifest.arrays
    needed = sum(array.size * DTYPES[array.dtype].itemsize for array in arrays)
    try:
        prepare(folder, checkpoint.manifest.step, needed)
    except UserError as error:
        raise UserError(f"{folder} cannot be written to: {error}") from None
