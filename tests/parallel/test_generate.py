"""One text: generation under every layout against one rank."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import product
from math import prod
from typing import TYPE_CHECKING

import numpy as np
import pytest
from mpi4py import MPI
from random_model import write_checkpoint

from mpillm.array.backend import Backend
from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.verify import resolve
from mpillm.config import to_table
from mpillm.errors import UserError
from mpillm.inference.engine import Engine, Sampling
from mpillm.inference.loading import load
from mpillm.models.gpt2 import Settings
from mpillm.models.settings import ModelSettings, build_model
from mpillm.parallel.mesh import AXES, Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings

if TYPE_CHECKING:
    from pathlib import Path

    from mpillm.parallel.launch import Comm

CONTEXT = 6

# Eight layers on up to eight stages, three heads and 29 types on up to eight tensor ranks, three
# experts on up to eight expert ranks: nothing divides. Weights so large that texts do not repeat
# one token.
_MODEL = {"layers": 6, "heads": 3, "width": 12, "vocabulary": 29, "context": CONTEXT}
MODELS: dict[str, ModelSettings] = {
    "dense": Settings(**_MODEL, init_std=0.4, tied=False),
    "experts": Settings(**_MODEL, init_std=0.4, experts=3, expert_every=3),
}

TOKENS = np.random.default_rng(1).integers(0, 29, (3, CONTEXT))
SAMPLED = Sampling(temperature=1.2, top_k=20, top_p=0.95, seed=5)


@dataclass
class Texts:
    """What a layout gives: logits of `TOKENS`, and texts, all of more tokens than the context."""

    logits: np.ndarray
    greedy: np.ndarray  # one row, from a prompt
    few: np.ndarray  # three rows, from one token
    many: np.ndarray  # more rows than ranks, and no multiple of them


def texts(engine: Engine, many: int) -> Texts:
    """All that is compared; gives the engine's communicators back."""
    result = Texts(
        logits=engine.logits(TOKENS),
        greedy=engine.generate([3, 1, 4, 1], 6, 1, Sampling(greedy=True)),
        few=engine.generate([2], 8, 3, SAMPLED),
        many=engine.generate(list(range(9)), 2, many, SAMPLED),
    )
    engine.free()
    return result


@pytest.fixture(scope="session")
def checkpoints(world: Comm, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Checkpoints of random models, by name, written by rank 0."""
    folder: Path = world.bcast(tmp_path_factory.mktemp("checkpoints"))
    if world.rank == 0:
        for name, settings in MODELS.items():
            write_checkpoint(folder / name, settings)
    world.Barrier()
    return {name: resolve(folder / name) for name in MODELS}


@pytest.fixture(scope="session")
def expected(world: Comm, checkpoints: dict[str, Path]) -> dict[str, Texts]:
    """What one rank gives, by the model's name."""
    return {
        name: texts(_engine(path, MPI.COMM_SELF, ParallelSettings()), 2 * world.size + 1)
        for name, path in checkpoints.items()
    }


def _engine(
    path: Path, comm: Comm, layout: ParallelSettings | None, backend: str = "numpy"
) -> Engine:
    with Checkpoint.open(path) as checkpoint:
        return Engine(checkpoint, comm, Backend.create(backend), layout)


def shapes(model: str) -> list[dict[str, int]]:
    """Sizes of the axes, of every layout of this world that the model can be cut by.

    Of the model with experts those that the other one has not, and the layout with data alone.
    """
    ranks, axes = MPI.COMM_WORLD.size, build_model(MODELS[model]).axes
    every = [
        dict(zip(AXES, sizes, strict=True))
        for sizes in product(range(1, ranks + 1), repeat=len(AXES))
        if prod(sizes) == ranks
    ]
    return [
        shape
        for shape in every
        if all(size == 1 or axis in axes for axis, size in shape.items())
        and (model == "dense" or shape["expert"] > 1 or shape["data"] == ranks)
    ]


def extras(shape: dict[str, int]) -> list[dict[str, int | bool | str]]:
    """What else a layout may have: nothing, and all that goes together with its axes."""
    everything: dict[str, int | bool | str] = {}
    if shape["tensor"] > 1:
        everything["sequence"] = True
    if 1 < shape["pipe"] <= 4:
        everything |= {"chunks": 2, "schedule": "interleaved"}
    if shape["data"] * shape["expert"] * shape["context"] > 1:
        everything["zero"] = 3
    return [{}, everything] if everything else [{}]


def cases() -> list[tuple[str, ParallelSettings]]:
    return [
        (model, ParallelSettings(**shape, **extra))
        for model in MODELS
        for shape in shapes(model)
        for extra in extras(shape)
    ]


def name_of(value: str | ParallelSettings) -> str:
    if isinstance(value, str):
        return value
    usual = to_table(ParallelSettings())
    return "-".join(f"{k}{v}" for k, v in to_table(value).items() if v != usual[k]) or "alone"


@pytest.mark.parametrize(("model", "layout"), cases(), ids=name_of)
def test_texts_equal_one_rank(
    world: Comm,
    checkpoints: dict[str, Path],
    expected: dict[str, Texts],
    model: str,
    layout: ParallelSettings,
) -> None:
    """Every rank gets the same tokens as one rank alone, and logits to 1e-12."""
    _compare(expected[model], _engine(checkpoints[model], world, layout), world)


def _compare(alone: Texts, engine: Engine, world: Comm) -> None:
    together = texts(engine, 2 * world.size + 1)
    scale = np.abs(alone.logits).max()
    assert together.logits.shape == alone.logits.shape
    assert np.abs(together.logits - alone.logits).max() <= 1e-12 * scale
    for part in ("greedy", "few", "many"):
        assert (getattr(together, part) == getattr(alone, part)).all(), part


@pytest.mark.parametrize("model", MODELS)
def test_without_a_layout_all_ranks_share_the_products(
    world: Comm, checkpoints: dict[str, Path], expected: dict[str, Texts], model: str
) -> None:
    _compare(expected[model], _engine(checkpoints[model], world, None), world)


@pytest.mark.parametrize("model", MODELS)
def test_texts_on_a_device(
    world: Comm, checkpoints: dict[str, Path], expected: dict[str, Texts], model: str
) -> None:
    """On arrays that are as strict as a GPU's; the layout in the middle of the list, with all."""
    shape = shapes(model)[len(shapes(model)) // 2]
    layout = ParallelSettings(**shape, **extras(shape)[-1])
    _compare(expected[model], _engine(checkpoints[model], world, layout, "strict"), world)


@pytest.mark.parametrize("model", MODELS)
def test_the_comparison_sees_a_difference(
    checkpoints: dict[str, Path], expected: dict[str, Texts], model: str
) -> None:
    """Texts vary, and depend on the seed, on the row and on what was read."""
    engine = _engine(checkpoints[model], MPI.COMM_SELF, ParallelSettings())
    alone = expected[model]
    assert len(set(alone.greedy[0].tolist())) > 1
    assert len({tuple(row) for row in alone.few.tolist()}) == 3
    assert not (engine.generate([2], 8, 3, Sampling(1.2, 20, 0.95, seed=6)) == alone.few).all()
    assert not (engine.generate([4], 8, 3, SAMPLED) == alone.few).all()
    engine.free()


@pytest.mark.parametrize("model", MODELS)
def test_a_rank_remembers_for_its_own_layers_alone(
    world: Comm, checkpoints: dict[str, Path], model: str
) -> None:
    """The pipeline's ranks keep keys and values of every layer once."""
    chunks, schedule = (2, "interleaved") if 1 < world.size <= 4 else (1, "1f1b")
    pipe = min(8, world.size)
    layout = fit(ParallelSettings(pipe=pipe, chunks=chunks, schedule=schedule), world.size)
    backend = Backend.create("numpy")
    mesh = Mesh(world, layout, backend, Recorder())
    with Checkpoint.open(checkpoints[model]) as checkpoint:
        settings = build_model(MODELS[model])
        pipeline = load(settings, checkpoint, mesh, backend, np.dtype("float64"))
    mine = [name for stage in pipeline.stages for name in stage.new_state(2, CONTEXT)]
    every = [name for names in mesh.pipe.allgather_objects(mine) for name in names]
    mesh.free()
    assert len(every) == len(set(every)) == 6


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        ({"tensor": MPI.COMM_WORLD.size + 1}, "does not divide"),
        ({"data": MPI.COMM_WORLD.size + 1}, "does not fit"),
        ({"pipe": 1, "boundaries": (2,)}, "parallel.boundaries"),
        ({"sequence": True}, "parallel.tensor >= 2"),
    ],
)
def test_a_layout_that_does_not_fit(
    world: Comm, checkpoints: dict[str, Path], layout: dict[str, int], message: str
) -> None:
    with pytest.raises(UserError, match=message):
        _engine(checkpoints["dense"], world, ParallelSettings(**layout))


def test_a_layout_that_the_model_cannot_use(world: Comm, checkpoints: dict[str, Path]) -> None:
    """Experts are asked for where there are none, and the ranks are free for another try."""
    if world.size == 1:
        return
    with pytest.raises(UserError, match=f"parallel.expert = {world.size}"):
        _engine(checkpoints["dense"], world, ParallelSettings(expert=world.size))
    _engine(checkpoints["dense"], world, ParallelSettings(tensor=world.size)).free()
