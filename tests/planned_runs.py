"""Run folders with checkpoints that no run has made: the plan of a layout, filled with numbers."""

from __future__ import annotations

import hashlib
import math
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
from msgspec.structs import replace

from mpillm.checkpoint.commit import commit, prepare, temporary_folder
from mpillm.checkpoint.item import Item
from mpillm.checkpoint.manifest import read_manifest
from mpillm.checkpoint.shard_file import write_shard
from mpillm.checkpoint.store import Facts, Report, manifest_of
from mpillm.config import dump, from_table, to_table
from mpillm.models.settings import build_model
from mpillm.parallel.layouts import parse_layout, ranks_of
from mpillm.parallel.shard import Shard
from mpillm.training.saving import mine, planned
from mpillm.training.settings import RunConfig

Fill = Callable[[str, str, Shard, "tuple[int, int]"], Iterator[npt.NDArray[Any]]]

MODEL = {"vocabulary": 23, "context": 8, "layers": 3, "heads": 3, "width": 12, "experts": 0}


def config_of(layout: str = "data=1", **model: Any) -> RunConfig:
    """The settings of a small run under a layout."""
    table = {
        "model": {"family": "gpt2", **MODEL, **model},
        "train": {"batch_size": 4, "micro_batch_size": 2, "sequence_length": 8, "steps": 9},
        "data": {"text": ["text.txt"]},
    }
    config = from_table(RunConfig, table)
    return replace(config, parallel=parse_layout(layout, config.parallel))


def values(kind: str, name: str, shape: tuple[int, ...]) -> npt.NDArray[np.float32]:
    """A whole array, not like any other."""
    seed = int.from_bytes(hashlib.sha256(f"{kind} {name}".encode()).digest()[:8], "little")
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


def _slices(
    kind: str, name: str, shard: Shard, part: tuple[int, int]
) -> Iterator[npt.NDArray[np.float32]]:
    yield values(kind, name, shard.shape)[shard.slices].reshape(-1)[slice(*part)]


def make_checkpoint(folder: Path, config: RunConfig, step: int = 5, fill: Fill = _slices) -> Path:
    """The checkpoint of a step that ranks under `config.parallel` would have left in a folder."""
    model, reports = build_model(config.model), []
    prepare(folder, step, 0)
    for rank in range(ranks_of(config.parallel)):
        items = [
            Item(
                kind,
                param.name,
                param.shard,
                partial(fill, kind, param.name, param.shard, part or (0, param.shard.size)),
                part,
                "float32",
            )
            for kind, param, part, _ in mine(planned(model, config.parallel, rank))
        ]
        path = temporary_folder(folder, step) / f"shard-{rank:05d}.h5"
        reports.append(Report(None, *write_shard(path, items)))
    layout, settings = to_table(config.parallel), to_table(config)
    extra = {"tokenizer.json": hashlib.sha256(b"{}").hexdigest()}
    facts = Facts(step, 4 * step, layout, settings, {"health": {"skipped": 3}}, extra)
    return commit(folder, manifest_of(facts, reports))


def make_run(folder: Path, layout: str = "data=1", **model: Any) -> Path:
    """A run folder with a tokenizer, tokens, settings and a checkpoint; returns the checkpoint."""
    config = config_of(layout, **model)
    made = make_checkpoint(folder / "checkpoints", config)
    (folder / "tokenizer.json").write_text("{}")
    (folder / "tokens.h5").write_bytes(b"tokens")
    (folder / "config.toml").write_text(dump(config))
    return made


def arrays_of(path: Path) -> dict[tuple[str, str], npt.NDArray[Any]]:
    """Every array of a checkpoint, whole, as `docs/checkpoint-format.md` tells a stranger to."""
    manifest, arrays = read_manifest(path), {}
    for array in manifest.arrays:
        full = arrays[array.kind, array.name] = np.empty(array.shape, array.dtype)
        for piece in array.pieces:
            where = array.shard(piece).slices
            part = full[where].reshape(-1).copy()
            low, high = piece.range or (0, part.size)
            with h5py.File(path / manifest.files[piece.file].name) as file:
                part[low:high] = np.ravel(file[piece.dataset][...])
            full[where] = part.reshape(full[where].shape)
    return arrays


def expected_of(path: Path) -> dict[tuple[str, str], npt.NDArray[Any]]:
    """What `arrays_of` must give for a checkpoint that holds what `make_run` has made."""
    return {(a.kind, a.name): values(a.kind, a.name, a.shape) for a in read_manifest(path).arrays}


def same(a: dict[Any, npt.NDArray[Any]], b: dict[Any, npt.NDArray[Any]]) -> bool:
    """Whether two sets of arrays are the same, bit for bit."""
    return a.keys() == b.keys() and all(
        a[key].dtype == b[key].dtype
        and a[key].shape == b[key].shape
        and a[key].tobytes() == b[key].tobytes()
        for key in a
    )


def elements(path: Path) -> int:
    """Elements of all arrays of a checkpoint."""
    return sum(math.prod(array.shape) for array in read_manifest(path).arrays)
