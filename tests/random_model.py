"""A checkpoint of a random model, for what is to be read from one."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from mpi4py import MPI

from mpillm.array.backend import Backend
from mpillm.checkpoint.saver import Saver
from mpillm.checkpoint.settings import CheckpointSettings
from mpillm.checkpoint.store import Item
from mpillm.config import to_table
from mpillm.models.model import build_stages
from mpillm.models.settings import ModelSettings, build_model
from mpillm.parallel.mesh import Mesh
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings

__all__ = ["write_checkpoint"]


def write_checkpoint(folder: Path, settings: ModelSettings) -> Path:
    """Save a model's initial weights, in float64, below `folder`; returns the checkpoint."""
    backend = Backend.create("numpy")
    mesh = Mesh(MPI.COMM_SELF, ParallelSettings(data=1), backend, Recorder())
    (stage,) = build_stages(build_model(settings), backend, mesh, np.dtype("float64"), seed=7)
    items = [
        Item("parameter", param.name, param.shard, view) for param, _, view in stage.store.weights()
    ]
    tables = {"model": to_table(settings), "train": {"dtype": "float64"}}
    saver = Saver(folder, mesh.world, mesh.node, CheckpointSettings())
    path = saver.save(1, items, samples=0, layout={}, settings=tables)
    mesh.free()
    return path
