"""ZeRO: what stays on a rank, what is there when, and sums that are under way."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.array.backend import Backend
from mpillm.array.ops import norm_block
from mpillm.data.loader import Loader
from mpillm.models.gpt2 import Settings
from mpillm.models.settings import build_model
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.settings import OptimizerSettings, TrainSettings
from mpillm.training.trainer import Trainer, resolve_batch

TEXT = np.random.default_rng(0).integers(0, 65, 3000).astype(np.uint16)
MODEL = {"layers": 3, "heads": 3, "width": 24, "vocabulary": 65, "context": 12, "dropout": 0.1}
OPTIMIZER = OptimizerSettings(lr=1e-2, warmup=1)


def make(
    world: MPI.Intracomm,
    tied: bool = True,
    backend: str = "numpy",
    deterministic: bool = False,
    **layout: Any,
) -> tuple[Trainer, Mesh]:
    """A trainer of a small model on all ranks; the data axis takes what the layout leaves."""
    device = Backend.create(backend)
    mesh = Mesh(world, fit(ParallelSettings(**layout), world.size), device, Recorder())
    micro = 9 if deterministic else 2
    train = TrainSettings(
        batch_size=9, micro_batch_size=micro, sequence_length=12, deterministic=deterministic
    )
    train = resolve_batch(train, mesh.layout)
    loader = Loader(TEXT, 12, 9, train.micro_batch_size, train.seed)
    model = build_model(Settings(**MODEL, tied=tied))
    return Trainer(model, train, OPTIMIZER, mesh, device, loader), mesh


@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
@pytest.mark.parametrize("zero", [0, 1, 2, 3])
@pytest.mark.parametrize("deterministic", [False, True])
def test_bytes_on_a_rank(world: MPI.Intracomm, deterministic: bool, zero: int, tied: bool) -> None:
    """The formula of docs/parallel.md, to within a block of each layer's largest parameter."""
    if deterministic and zero >= 2 and world.size & (world.size - 1):
        pytest.skip("needs a power of two")
    trainer, mesh = make(world, tied, deterministic=deterministic, zero=zero)
    trainer.step()
    memory, size = trainer.memory(), 4
    arenas = [arena for stage in trainer.stages for arena in stage.store.arenas]
    whole = sum(arena.size for arena in arenas)
    # In deterministic mode a tied table has a gradient for each of its uses on the stage.
    apart = deterministic and (zero < 2 or world.size == 1)
    rows = sum(arena.size * (2 if arena.tied and apart else 1) for arena in arenas)
    slack = sum(max(norm_block(p.shard.shape) + 16 for p in arena.params) for arena in arenas)
    parts = {"weights": whole, "gradients": rows, "optimizer": 2 * whole}
    sharded = {"weights": zero >= 3, "gradients": zero >= 2, "optimizer": zero >= 1}
    for name, elements in parts.items():
        share = world.size if sharded[name] else 1
        if share == 1:
            assert getattr(memory, name) == size * elements, name
        else:
            copies = 2 if name == "optimizer" else 1
            off = abs(getattr(memory, name) - size * elements / share)
            assert off <= copies * size * slack, name
        # All parts together are the whole.
        total = world.allreduce(getattr(memory, name))
        assert total == size * elements * (world.size // share)
    per_layer = max(
        sum(arena.rows * arena.size for arena in arenas if layer in arena.layers)
        for layer in range(len(trainer.stages[0].layers))
    )
    if zero < 2 or world.size == 1:
        assert memory.working == 0
    else:
        # Gradients of the layer at work and of two more, in sums; two layers' weights; a tied
        # table is a layer's more.
        assert 0 < memory.working <= size * per_layer * 8
    mesh.free()


def test_sharded_weights_are_there_between_acquire_and_release_only(world: MPI.Intracomm) -> None:
    if world.size == 1:
        pytest.skip("one rank holds all")
    trainer, mesh = make(world, zero=3)
    (stage,) = trainer.stages
    store = stage.store
    assert all(param.value is None for param in store.params)
    reference, other = make(world, zero=0)
    for number in (0, 1, 0, len(stage.layers) - 1):
        store.acquire(number, number + 1)
        for param, expected in zip(store.params, reference.stages[0].store.params, strict=True):
            uses = [use for arena in store.arenas for us in arena.uses for use in us]
            here = any(use.layer == number for use in uses if use.name == param.name)
            assert (param.value is not None) == here, param.name
            if here:
                assert (param.value == expected.value).all()
        store.release(number)
        # What was fetched ahead is used by the next layer.
        if number + 1 < len(stage.layers):
            store.acquire(number + 1, -1)
            store.release(number + 1)
    assert all(param.value is None for param in store.params)
    made = store.pool.made
    trainer.step()
    trainer.step()
    assert store.pool.made <= made + 20
    steady = store.pool.made
    trainer.step()
    assert store.pool.made == steady, "buffers are used again"
    mesh.free()
    other.free()


@pytest.mark.parametrize("zero", [0, 1, 2])
def test_sums_begin_while_gradients_are_computed(world: MPI.Intracomm, zero: int) -> None:
    """With overlap, the first sum begins before the backward pass of the first layer."""
    if world.size == 1:
        pytest.skip("nothing is summed")

    def begun(overlap: bool) -> list[str]:
        trainer, mesh = make(world, zero=zero, overlap=overlap)
        (stage,) = trainer.stages
        order: list[str] = []
        embedding, replicas = stage.layers[0], mesh.replicas
        op = "iallreduce" if zero == 0 else "ireduce_scatter"
        call, backward = getattr(replicas, op), embedding.backward

        def noted_call(*arguments: Any) -> Any:
            order.append("sum")
            return call(*arguments)

        def noted_backward(*arguments: Any) -> Any:
            order.append("first layer")
            return backward(*arguments)

        setattr(replicas, op, noted_call)
        embedding.backward = noted_backward  # type: ignore[method-assign]
        trainer.step()
        mesh.free()
        return order

    with_overlap = begun(True)
    *_, last_backward, _ = " ".join(with_overlap).split("first layer")
    assert last_backward.count("sum") >= 4  # head, and three blocks
    if zero < 2:
        without = begun(False)
        assert without.count("sum") == with_overlap.count("sum")
        assert "sum" not in without[: len(without) - without.count("sum")]


@pytest.mark.parametrize("zero", [1, 2, 3])
def test_the_strict_backend(world: MPI.Intracomm, zero: int) -> None:
    """Arrays that MPI cannot read give the same losses."""
    losses = {}
    for backend in ("numpy", "strict"):
        trainer, mesh = make(world, backend=backend, zero=zero)
        losses[backend] = [trainer.step().loss for _ in range(3)]
        mesh.free()
    assert losses["numpy"] == pytest.approx(losses["strict"], rel=1e-5)
    assert losses["numpy"][0] != losses["numpy"][1]
