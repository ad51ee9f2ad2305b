"""Saving over MPI: fewer writers than ranks, at once and beside training, on every backend."""

from __future__ import annotations

import errno
import shutil
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.array.backend import Backend
from mpillm.checkpoint import node as node_module
from mpillm.checkpoint import saver as saver_module
from mpillm.checkpoint.manifest import read_manifest
from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.saver import Saver
from mpillm.checkpoint.settings import CheckpointSettings
from mpillm.checkpoint.store import Item
from mpillm.checkpoint.verify import verify
from mpillm.errors import UserError
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.shard import Shard

FACTS: dict[str, Any] = {"samples": 0, "layout": {}, "settings": {}}
SHAPE = (37, 50)


@pytest.fixture
def folder(world: MPI.Intracomm) -> Iterator[Path]:
    """A folder that all ranks see."""
    path = Path(world.bcast(tempfile.mkdtemp() if world.rank == 0 else None))
    yield path
    world.Barrier()
    if world.rank == 0:
        shutil.rmtree(path)


def values(step: int) -> np.ndarray[Any, Any]:
    """The array that all ranks hold between them."""
    return np.random.default_rng(step).random(SHAPE, dtype=np.float32)


def item(backend: Backend, step: int, rank: int, ranks: int) -> Item:
    """A rank's rows; from a device they come when they are asked for."""
    shard = Shard.split(SHAPE, 0, ranks, rank)
    array = backend.from_host(np.ascontiguousarray(values(step)[shard.slices]))
    if backend.on_host:
        return Item("parameter", "w", shard, array)
    return Item("parameter", "w", shard, lambda: [backend.to_host(array)], dtype="float32")


@pytest.mark.parametrize("backend", ["numpy", "strict"])
@pytest.mark.parametrize("writers", [0, 1, 2])
def test_what_ranks_hand_over_is_written(
    world: MPI.Intracomm,
    folder: Path,
    monkeypatch: pytest.MonkeyPatch,
    writers: int,
    backend: str,
) -> None:
    monkeypatch.setattr(node_module, "BLOCK", 96)  # many messages
    device = Backend.create(backend)
    mesh = Mesh(world, fit(ParallelSettings(), world.size), device, Recorder())
    saver = Saver(folder, mesh.world, mesh.node, CheckpointSettings(writers_per_node=writers))
    saver.save(1, [item(device, 1, world.rank, world.size)], **FACTS)
    saver.begin(2, [item(device, 2, world.rank, world.size)], **FACTS)
    saver.copied()
    path = saver.finish()
    assert path == folder / "step-00000002"
    for step in (1, 2):
        path = folder / f"step-0000000{step}"
        assert verify(path) == []
        # All ranks of this test share a node.
        expected = min(writers or world.size, world.size, SHAPE[0])
        assert len(read_manifest(path).files) == expected
        with Checkpoint.open(path) as checkpoint:
            got = checkpoint.read("parameter", "w", Shard.whole(SHAPE))
        assert np.array_equal(got, values(step))
    mesh.free()


@pytest.mark.parametrize("beside", [False, True])
def test_a_disk_that_fails_on_the_last_writer(
    world: MPI.Intracomm, folder: Path, monkeypatch: pytest.MonkeyPatch, beside: bool
) -> None:
    """The same line everywhere; nobody waits for ever; the next save works."""
    device = Backend.create("numpy")
    mesh = Mesh(world, fit(ParallelSettings(), world.size), device, Recorder())
    saver = Saver(folder, mesh.world, mesh.node, CheckpointSettings(writers_per_node=1))

    def full(*arguments: object, **options: object) -> object:
        raise OSError(errno.EDQUOT, "over quota")

    with monkeypatch.context() as patch:
        if mesh.node.rank == 0:
            patch.setattr(saver_module, "_fill", full)
            patch.setattr(saver_module, "write_shard", full)
        with pytest.raises(UserError) as caught:
            if beside:
                saver.begin(1, [item(device, 1, world.rank, world.size)], **FACTS)
                saver.copied()
                saver.finish()
            else:
                saver.save(1, [item(device, 1, world.rank, world.size)], **FACTS)
    assert len(set(world.allgather(str(caught.value)))) == 1
    path = saver.save(1, [item(device, 1, world.rank, world.size)], **FACTS)
    assert verify(path) == []
    mesh.free()
