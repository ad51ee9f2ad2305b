"""Recomputed activations: the same bits, and less memory."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from gradcheck import scramble
from held import held_bytes
from mpi4py import MPI

from mpillm.array.backend import Backend
from mpillm.models.gpt2 import Settings
from mpillm.models.model import build_stages
from mpillm.models.settings import build_model
from mpillm.nn.layer import Micro, Recomputed
from mpillm.nn.recompute import Recompute
from mpillm.nn.stage import Stage
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings

BACKEND = Backend.create("numpy")
B, T, WIDTH, HEADS = 3, 8, 12, 3
MODEL = Settings(
    layers=2, heads=HEADS, width=WIDTH, vocabulary=11, context=T, init_std=0.3, dropout=0.2
)


@pytest.fixture(scope="module")
def mesh() -> Iterator[Mesh]:
    mesh = Mesh(MPI.COMM_SELF, fit(ParallelSettings(), 1), BACKEND, Recorder())
    yield mesh
    mesh.free()


def whole_model(mesh: Mesh, recompute: Recomputed, model: Settings = MODEL) -> Stage:
    (stage,) = build_stages(
        build_model(model), BACKEND, mesh, "float32", seed=1, recompute=recompute
    )
    scramble(stage.store)
    return stage


def micro_batch(**changes: Any) -> Micro:
    rng = np.random.default_rng(0)
    micro = Micro(
        tokens=rng.integers(0, 11, (B, T), dtype=np.int32),
        labels=rng.integers(0, 11, (B, T), dtype=np.int32),
        mask=np.ones((B, T), np.float32),
        index=np.arange(T),
        samples=np.arange(B),
        training=True,
        key=5,
    )
    return replace(micro, **changes)


@pytest.mark.parametrize("put_off", [False, True], ids=["at once", "put off"])
@pytest.mark.parametrize("tied", [False, True], ids=["untied", "tied"])
@pytest.mark.parametrize("recompute", ["attention", "block"])
def test_no_bit_of_a_gradient_changes(
    recompute: Recomputed, tied: bool, put_off: bool, mesh: Mesh
) -> None:
    """Two micro-batches in flight, with dropout."""
    model = Settings(**{**MODEL.__class__.__struct_fields__ and _fields(MODEL), "tied": tied})
