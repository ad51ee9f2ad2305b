"""GPT-2 as a whole, what settings are refused, and how a model is cut into stages."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterator
from itertools import combinations, pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from gradcheck import check_layer, scramble
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI
from msgspec.structs import replace

from mpillm.array.backend import Backend
from mpillm.data.loader import Loader
from mpillm.errors import UserError
from mpillm.models.gpt2 import Settings
from mpillm.models.model import build_stages, partition
from mpillm.models.settings import ModelSettings, build_model, families
from mpillm.nn.layer import Build, Micro
from mpillm.nn.stage import Stage
from mpillm.nn.store import ParamStore
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.settings import OptimizerSettings, TrainSettings
from mpillm.training.trainer import StepResult, Trainer

SMALL = Settings(layers=2, heads=2, width=8, vocabulary=11, context=6, init_std=0.3)


def mesh_on(backend: Backend) -> Mesh:
    return Mesh(MPI.COMM_SELF, fit(ParallelSettings(), 1), backend, Recorder())


@pytest.fixture(scope="module")
def numpy_backend() -> Backend:
    return Backend.create("numpy")


@pytest.fixture(scope="module")
def mesh(numpy_backend: Backend) -> Iterator[Mesh]:
    mesh = mesh_on(numpy_backend)
    yield mesh
    mesh.free()


def small_stage(mesh: Mesh, backend: Backend, **changes: Any) -> Stage:
    (stage,) = build_stages(
        build_model(replace(SMALL, **changes)), backend, mesh, "float64", seed=1
    )
    scramble(stage.store, 0.2)
    return stage


def micro_batch(vocabulary: int = 11) -> Micro:
    """Four sequences, the last one padding and another one cut short."""
    rng = np.random.default_rng(0)
    mask = np.ones((4, 6))
    mask[3], mask[1, 4:] = 0, 0
    return Micro(
        tokens=rng.integers(0, vocabulary, (4, 6), dtype=np.int32),
        labels=rng.integers(0, vocabulary, (4, 6), dtype=np.int32),
        mask=mask,
        index=np.arange(6),
        samples=np.arange(4),
        training=True,
        key=5,
    )


# -- slopes
# ------------------------------------------------------------------------------------------

VARIANTS: dict[str, dict[str, Any]] = {
    "tied": {},
    "untied": {"tied": False},
    "without biases": {"bias": False},
    "untied, without biases, with dropout": {"tied": False, "bias": False, "dropout": 0.2},
    "with dropout": {"dropout": 0.2},
    "one head, one block": {"heads": 1, "layers": 1},
    "heads of one feature": {"heads": 8, "dropout": 0.1},
}


@pytest.mark.parametrize("name", VARIANTS)
def test_slopes_of_the_whole_model(name: str, mesh: Mesh, numpy_backend: Backend) -> None:
    stage = small_stage(mesh, numpy_backend, **VARIANTS[name])
    micro = micro_batch()
    gradients = check_layer(stage, stage.store, (), micro, (1.0 / micro.mask.sum(),))
    assert all(gradient.any() for gradient in gradients.values())
    assert len(gradients) == len(stage.store.params)


@pytest.mark.parametrize(
    "operation",
    ["gelu_backward", "layernorm_backward", "attention_backward", "dropout_backward",
     "embedding_backward", "cross_entropy_backward", "sum_rows"],
)  # fmt: skip
def test_a_slightly_wrong_backward_pass_is_found(
    operation: str, mesh: Mesh, numpy_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    """By a ten-thousandth; the check of the slopes must be able to fail."""
    stage = small_stage(mesh, numpy_backend, dropout=0.2)
    ops = numpy_backend.ops
    original = getattr(ops, operation)

    def wrong(*args: Any, **kwargs: Any) -> Any:
        if operation in ("embedding_backward", "sum_rows"):
            args = (args[0] * 1.0001, *args[1:])
        result = original(*args, **kwargs)
        if isinstance(result, tuple):
            return (result[0] * 1.0001, *result[1:])
        return result if result is None else result * 1.0001

    if operation == "dropout_backward":  # which the forward pass calls, too
        stage_forward = stage.forward

        def forward(*args: Any) -> Any:
            with monkeypatch.context() as patch:
                patch.setattr(ops, operation, original)
                return stage_forward(*args)

        monkeypatch.setattr(stage, "forward", forward)
    monkeypatch.setattr(ops, operation, wrong)
    with pytest.raises(AssertionError, match="numeric"):
        check_layer(stage, stage.store, (), micro_batch(), (0.05,))


def test_a_lost_residual_path_is_found(
    mesh: Mesh, numpy_backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    stage = small_stage(mesh, numpy_backend)
    block: Any = stage.layers[1]
    norm2 = block.norm2.backward
    # d_outputs of the second branch's norm are added to the residual path: take that path away.
    monkeypatch.setattr(
        block.norm2, "backward", lambda d, saved, micro: (norm2(d, saved, micro)[0] * 0.0,)
    )
    with pytest.raises(AssertionError, match="numeric"):
        check_layer(stage, stage.store, (), micro_batch(), (0.05,))


# -- settings
# ----------------------------------------------------------------------------------------


def parameters(settings: Settings, mesh: Mesh, backend: Backend) -> dict[str, int]:
    """Sizes by name, from the shapes that the layers ask for; no array is made."""
    store = ParamStore(backend, "float32", seed=None)
    for unit in build_model(settings).units:
        unit.build(Build(backend, mesh, store))
    return {param.name: math.prod(param.shard.shape) for param in store.params}


GPT2: dict[str, Any] = {"vocabulary": 50257, "context": 1024}


@pytest.mark.parametrize(
    "settings, count",
    [
        (Settings(layers=12, heads=12, width=768, **GPT2), 124_439_808),
        (Settings(layers=24, heads=16, width=1024, **GPT2), 354_823_168),
        (Settings(layers=36, heads=20, width=1280, **GPT2), 774_030_080),
        (Settings(layers=48, heads=25, width=1600, **GPT2), 1_557_611_200),
        (Settings(layers=12, heads=12, width=768, tied=False, **GPT2), 124_439_808 + 50257 * 768),
    ],
    ids=["124M", "350M", "774M", "1558M", "untied"],
)
def test_published_parameter_counts(
    settings: Settings, count: int, mesh: Mesh, numpy_backend: Backend
) -> None:
    assert sum(parameters(settings, mesh, numpy_backend).values()) == count


def test_names_and_kinds_of_parameters(mesh: Mesh, numpy_backend: Backend) -> None:
    def names(**changes: Any) -> set[str]:
        return {param.name for param in small_stage(mesh, numpy_backend, **changes).store.params}

    everything = names(tied=False)
    assert "head.weight" in everything
    assert names() == everything - {"head.weight"}
    assert names(tied=False, bias=False) == {n for n in everything if not n.endswith(".bias")}
    params = small_stage(mesh, numpy_backend).store.params
    # Matrices and tables decay; biases and gains do not.
    assert {p.name for p in params if p.decay} == {
        p.name for p in params if p.name.endswith((".weight", ".tokens", ".positions"))
    }


def test_initial_scales(mesh: Mesh, numpy_backend: Backend) -> None:
    settings = Settings(layers=8, heads=4, width=64, vocabulary=65, context=32)
    (stage,) = build_stages(build_model(settings), numpy_backend, mesh, "float64", seed=3)
    for param in stage.store.params:
        kind = param.name.rsplit(".", 1)[1]
        expected = (
            0.02 / math.sqrt(16) if param.name.endswith(("out.weight", "down.weight")) else 0.02
        )
        if kind == "bias":
            assert not param.value.any()
        elif kind == "gain":
            assert (param.value == 1).all()
        else:
            assert abs(param.value.std() / expected - 1) < 5 / math.sqrt(2 * param.value.size)


@pytest.mark.parametrize(
    "width, heads, nearest", [(128, 5, 4), (128, 7, 8), (12, 5, 4), (8, 100, 8), (384, 7, 6)]
)
def test_heads_that_do_not_divide_the_width(width: int, heads: int, nearest: int) -> None:
    with pytest.raises(UserError) as error:
        build_model(Settings(width=width, heads=heads, vocabulary=9, context=4))
    text = str(error.value)
    assert f"model.heads = {heads}" in text and f"model.width = {width}" in text
    assert text.endswith(f" {nearest}") and "\n" not in text
    build_model(Settings(width=width, heads=nearest, vocabulary=9, context=4))


def test_families() -> None:
    assert "gpt2" in families()
    for family in families():
        kind = ModelSettings.variant({"family": family}, "model")
        assert issubclass(kind, ModelSettings) and kind(family=family).family == family
    assert ModelSettings.variant({}, "model") is Settings
    with pytest.raises(UserError, match=r"model\.family.*gtp2.*gpt2"):
        ModelSettings.variant({"family": "gtp2"}, "model")


def test_axes_that_the_model_cannot_use_are_refused() -> None:
    mesh: Any = SimpleNamespace(layout=ParallelSettings(expert=2))
    model = build_model(SMALL)
    with pytest.raises(
        UserError, match=r"parallel\.expert = 2: the model has no experts.*expert = 1"
    ):
        model.check_layout(mesh.layout)
    bare = dataclasses.replace(model, axes=frozenset({"data", "tensor"}), why_not={})
    mesh.layout = ParallelSettings(pipe=2)
    with pytest.raises(UserError, match=r"pipe = 2: family 'gpt2' runs over data, tensor only"):
        bare.check_layout(mesh.layout)


def test_stages_begin_where_the_settings_say() -> None:
    model = build_model(SMALL)  # embedding, two blocks, head
    layout = ParallelSettings(pipe=3, boundaries=(2, 3))
    assert model.cuts(layout) == [(0, 2), (2, 3), (3, 4)]
    assert len(model.cuts(ParallelSettings(pipe=2, chunks=2))) == 4
    for wrong in ((1, 1), (2, 1), (0, 2), (3, 4)):
        with pytest.raises(UserError, match=r"boundaries = .*from 1 to 3 \(block.000 ... head\)"):
            model.cuts(ParallelSettings(pipe=3, boundaries=wrong))
    mesh: Any = SimpleNamespace(layout=ParallelSettings(pipe=3, chunks=2))
    with pytest.raises(UserError, match=r"pipe = 3 x parallel.chunks = 2: .*chunks <= 4"):
        model.check_layout(mesh.layout)


def test_more_stages_than_units_are_refused() -> None:
    model = build_model(SMALL)
    fitting: Any = SimpleNamespace(layout=ParallelSettings(pipe=4, data=3, tensor=5))
    model.check_layout(fitting.layout)
    too_many: Any = SimpleNamespace(layout=ParallelSettings(pipe=5))
    with pytest.raises(UserError, match=r"parallel\.pipe = 5.*4 stages.*parallel\.pipe <= 4"):
        model.check_layout(too_many.layout)


# -- partition
# ---------------------------------------------------------------------------------------


@given(st.lists(st.integers(0, 20), min_size=1, max_size=9), st.data())
def test_partition_is_the_best_there_is(costs: list[int], data: st.DataObject) -> None:
    stages = data.draw(st.integers(1, len(costs)))
    cuts = partition(tuple(map(float, costs)), stages)
    assert len(cuts) == stages
    assert cuts[0][0] == 0 and cuts[-1][1] == len(costs)
    assert all(start < stop for start, stop in cuts)
    assert all(a[1] == b[0] for a, b in pairwise(cuts))

    def largest(ends: tuple[int, ...]) -> int:
        return max(sum(costs[a:b]) for a, b in pairwise((0, *ends, len(costs))))

    def squares(ends: tuple[int, ...]) -> int:
        return sum(sum(costs[a:b]) ** 2 for a, b in pairwise((0, *ends, len(costs))))

    every = list(combinations(range(1, len(costs)), stages - 1))
    best = min(map(largest, every))
    ours = tuple(stop for _, stop in cuts[:-1])
    assert largest(ours) == best
    # Of the best cuts, none is more even.
    assert squares(ours) == min(squares(ends) for ends in every if largest(ends) == best)


@pytest.mark.parametrize("stages", [0, 4])
def test_partition_refuses_what_cannot_be(stages: int) -> None:
    with pytest.raises(ValueError, match="3 layers"):
        partition((1.0, 1.0, 1.0), stages)


def test_partition_of_a_deep_model() -> None:
    costs = (0.1, *[1.0] * 96, 3.0)
    cuts = partition(costs, 32)
    assert max(sum(costs[start:stop]) for start, stop in cuts) == 4.0


# -- the strict backend
# --------------------------------------------------------------------------------


def train(
    backend: Backend, steps: int, rows: int
) -> tuple[list[StepResult], list[tuple[int, int]]]:
    """Results of the steps, and the copies (to host, to device) that each made."""
    settings = Settings(layers=2, heads=2, width=8, vocabulary=11, context=6, dropout=0.2)
    train = TrainSettings(
        steps=steps, batch_size=5, micro_batch_size=rows, sequence_length=6, dtype="float64"
    )
    mesh = mesh_on(backend)
    text = np.random.default_rng(1).integers(0, 11, 300).astype(np.uint16)
    loader = Loader(text, 6, 5, rows, train.seed)
    optimizer = OptimizerSettings(lr=1e-2, min_lr=1e-3, warmup=1)
    trainer = Trainer(build_model(settings), train, optimizer, mesh, backend, loader)
    results, copies = [], []
    for _ in range(steps):
        before = transfers(backend)
        results.append(trainer.step())
        after = transfers(backend)
        copies.append((after[0] - before[0], after[1] - before[1]))
    mesh.free()
    return results, copies


def transfers(backend: Backend) -> tuple[int, int]:
    """Copies so far from and to the device; none where the device is the host."""
    counts = getattr(backend.xp, "transfers", None)
    return (counts.to_host, counts.to_device) if counts else (0, 0)


@pytest.mark.parametrize("rows, micros", [(5, 1), (2, 3)])
def test_the_strict_backend_trains_as_numpy_does(
    rows: int, micros: int, numpy_backend: Backend
) -> None:
    expected, _ = train(numpy_backend, 3, rows)
    results, copies = train(Backend.create("strict"), 3, rows)
    assert results[0].loss == pytest.approx(math.log(11), abs=0.1)
    assert len({result.loss for result in results}) == 3
    for ours, exact in zip(results, expected, strict=True):
        assert ours.loss == pytest.approx(exact.loss, rel=1e-12)
        assert ours.grad_norm == pytest.approx(exact.grad_norm, rel=1e-12)
    for to_host, to_device in copies:
        # Up: tokens, labels, mask and sample numbers of each micro-batch, and a verdict.
        assert to_device == 4 * micros + 1
        # Down: losses, gradient norm, whether what was seen is finite, the verdict of all ranks.
        assert to_host <= 4
