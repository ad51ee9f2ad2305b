"""Sums of micro-batches' gradients, their norm, the batch's division and the learning rate."""

from __future__ import annotations

import json
import math
import re
from functools import partial
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI

from mpillm.array import ops as ops_module
from mpillm.array.backend import Backend
from mpillm.errors import UserError
from mpillm.nn.dropout import Dropout
from mpillm.nn.layer import Build
from mpillm.nn.param import Init, Param
from mpillm.nn.stage import Stage
from mpillm.nn.store import ParamStore
from mpillm.parallel.group import pairwise_sum
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.progress import Progress
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.shard import Shard
from mpillm.training.gradients import Gradients, TreeSum
from mpillm.training.learning_rate import learning_rate
from mpillm.training.settings import OptimizerSettings, TrainSettings
from mpillm.training.trainer import resolve_batch


def terms(count: int, seed: int = 0, size: int = 50) -> list[np.ndarray]:
    """Arrays of many magnitudes, so that the order of additions shows in the bits."""
    draw = np.random.default_rng([seed, count])
    values = draw.normal(size=(count, size)) * 10.0 ** draw.integers(-3, 4, size=(count, size))
    return list(values.astype(np.float32))


def tree(arrays: list[np.ndarray]) -> Any:
    total = TreeSum()
    for array in arrays:
        total.add(array)
    return total.result()


# --- the tree ------------------------------------------------------------------------------------


class Term:
    """Adds up to a picture of the additions."""

    def __init__(self, text: str) -> None:
        self.text = text

    def __add__(self, other: Term) -> Term:
        return Term(f"({self.text}{other.text})")


@pytest.mark.parametrize(
    "picture",
    [
        "a",
        "(ab)",
        "((ab)c)",
        "((ab)(cd))",
        "(((ab)(cd))e)",
        "(((ab)(cd))(ef))",
        "(((ab)(cd))((ef)g))",
        "(((ab)(cd))((ef)(gh)))",
        "((((ab)(cd))((ef)(gh)))i)",
    ],
)
def test_the_shape_of_the_tree(picture: str) -> None:
    letters = [letter for letter in picture if letter.isalpha()]
    assert pairwise_sum([Term(letter) for letter in letters]).text == picture


@pytest.mark.parametrize("count", range(1, 21))
def test_one_after_another_has_the_bits_of_all_at_once(count: int) -> None:
    arrays = terms(count)
    before = [array.copy() for array in arrays]
    assert tree(arrays).tobytes() == pairwise_sum(arrays).tobytes()
    assert all((a == b).all() for a, b in zip(arrays, before, strict=True))


def test_the_order_of_additions_shows_in_the_bits() -> None:
    """Else the tests of this module would pass with any order."""
    arrays = terms(6)
    assert sum(arrays[1:], arrays[0]).tobytes() != pairwise_sum(arrays).tobytes()


def test_a_term_may_be_overwritten_once_it_is_added() -> None:
    arrays, total, buffer = terms(7), TreeSum(), np.empty(50, np.float32)
    for array in arrays:
        buffer[...] = array
        total.add(buffer)
        buffer.fill(np.nan)
    result = total.result()
    assert result.tobytes() == pairwise_sum(arrays).tobytes()
    assert not np.shares_memory(result, buffer)


@given(st.integers(1, 7), st.integers(0, 3), st.integers(0, 5))
def test_blocks_of_a_power_of_two_are_subtrees(blocks: int, level: int, seed: int) -> None:
    """Data ranks add their own block; what they add up over the ranks is the whole tree."""
    size = 1 << level
    arrays = terms(blocks * size, seed)
    parts = [tree(arrays[b * size : (b + 1) * size]) for b in range(blocks)]
    assert pairwise_sum(parts).tobytes() == tree(arrays).tobytes()


def test_blocks_of_three_are_not() -> None:
    arrays = terms(9)
    parts = [tree(arrays[b * 3 : b * 3 + 3]) for b in range(3)]
    assert pairwise_sum(parts).tobytes() != tree(arrays).tobytes()


@given(st.integers(1, 20), st.integers(0, 20))
def test_micro_batches_of_padding_change_nothing(count: int, padding: int) -> None:
    arrays = terms(count)
    zeros = [np.zeros_like(arrays[0])] * padding
    assert tree(arrays + zeros).tobytes() == tree(arrays).tobytes()


# --- the gradients of a step, on one rank --------------------------------------------------------


class OneRank:
    """Two plain parameters and a tied one with two uses, on one rank."""

    def __init__(self, backend: str = "numpy", *, deterministic: bool = True) -> None:
        self.backend = Backend.create(backend)
        layout = fit(ParallelSettings(), 1)
        self.mesh = Mesh(MPI.COMM_SELF, layout, self.backend, Recorder())
        store = ParamStore(self.backend, np.dtype("float32"), None)
        self.params = [
            self._add(store, "table", (5, 3), use=0),
            self._add(store, "weight", (4, 6)),
            self._add(store, "bias", (7,)),
            self._add(store, "table", (5, 3), use=1),
        ]
        store.allocate()
        self.layer = Dropout(Build(self.backend, self.mesh, store), "any", 0.0)
        self.stage = Stage([self.layer], store)
        self._deterministic = deterministic

    def _add(
        self, store: ParamStore, name: str, shape: tuple[int, ...], use: int | None = None
    ) -> Param:
        return store.add(
            name,
            Shard.whole(shape),
            Init("zeros"),
            reduce_over=(self.mesh.replicas,),
            decay=False,
            owner=True,
            tied_use=use,
        )

    def step(self, per_use: list[list[np.ndarray]]) -> None:
        """A step of micro-batches; `per_use[p][j]` is what micro-batch j adds to use p."""
        self.gradients = Gradients(
            [self.stage],
            self.mesh,
            self.backend,
            Progress(),
            micros=len(per_use[0]),
            deterministic=self._deterministic,
        )
        self.gradients.begin_step()
        for j in range(len(per_use[0])):
            sink = self.gradients.sink(j)
            for param, of_micros in zip(self.params, per_use, strict=True):
                sink.add((param,), partial(self._add_to, param, of_micros[j]))
            sink.done(self.layer)
        self.gradients.reduce()

    def _add_to(self, param: Param, values: np.ndarray) -> None:
        grad = param.grad
        grad += self.backend.from_host(values.reshape(grad.shape))

    def grad(self, param: Param) -> np.ndarray:
        return self.backend.to_host(param.grad).reshape(-1)

    def __enter__(self) -> OneRank:
        return self

    def __exit__(self, *_: object) -> None:
        self.mesh.free()


@pytest.mark.parametrize("backend", ["numpy", "strict"])
@pytest.mark.parametrize("micros", [1, 2, 3, 6, 8])
def test_a_deterministic_step_is_the_tree_over_its_micro_batches(micros: int, backend: str) -> None:
    with OneRank(backend) as one:
        for seed in range(2):  # nothing is left over from the step before
            per_use = [terms(micros, 10 * seed + p, q.shard.size) for p, q in enumerate(one.params)]
            one.step(per_use)
            table, weight, bias, _ = one.params
            first, second, third, fourth = (pairwise_sum(of_micros) for of_micros in per_use)
            assert one.grad(weight).tobytes() == second.tobytes()
            assert one.grad(bias).tobytes() == third.tobytes()
            assert one.grad(table).tobytes() == (first + fourth).tobytes()


def test_otherwise_gradients_are_added_in_place() -> None:
    with OneRank(deterministic=False) as one:
        per_use = [terms(5, p, q.shard.size) for p, q in enumerate(one.params)]
        one.step(per_use)
        expected = [sum(of_micros[1:], of_micros[0]) for of_micros in per_use]
        table, weight, bias, _ = one.params
        assert one.grad(weight).tobytes() == expected[1].tobytes()
        assert one.grad(bias).tobytes() == expected[2].tobytes()
        assert one.grad(table).tobytes() == (expected[0] + expected[3]).tobytes()


@pytest.mark.parametrize("backend", ["numpy", "strict"])
@pytest.mark.parametrize("block", [1, 4, 16, 1 << 20])
def test_the_norm_counts_a_tied_parameter_once(
    monkeypatch: pytest.MonkeyPatch, block: int, backend: str
) -> None:
    monkeypatch.setattr(ops_module, "_NORM_BLOCK", block)
    with OneRank(backend) as one:
        one.step([terms(1, p, param.shard.size) for p, param in enumerate(one.params)])
        whole = np.concatenate([one.grad(param) for param in one.params[:3]]).astype(np.float64)
        assert one.gradients.norm() == pytest.approx(np.linalg.norm(whole), rel=1e-14)


def test_the_norm_of_large_and_of_small_gradients() -> None:
    """Squares of float32 would overflow, or vanish."""
    with OneRank() as one:
        for scale in (1e30, 1e-30):
            one.step([[np.full(q.shard.size, scale, np.float32)] for q in one.params])
            # 15 elements of the table hold the sum of two uses.
            expected = float(np.float32(scale)) * math.sqrt(15 * 4 + 24 + 7)
            assert one.gradients.norm() == pytest.approx(expected, rel=1e-6)


# --- the norm, on several ranks ------------------------------------------------------------------

NORMS = """
import json
import numpy as np
from mpi4py import MPI
from mpillm.array.backend import Backend
from mpillm.array.random import fold
from mpillm.models import gpt2
from mpillm.models.model import build_stages
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.progress import Progress
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings
from mpillm.training import gradients

backend = Backend.create("numpy")
world = MPI.COMM_WORLD

def dense(param):
    values = np.random.default_rng(fold(1, param.name)).normal(size=param.shard.shape)
    return values.astype(np.float32)

def norm(comm, tied, **layout):
    '''The norm of gradients that are slices of dense ones, and the parameters of this rank.'''
    settings = gpt2.Settings(layers=3, heads=3, width=12, vocabulary=11, context=8, tied=tied)
    mesh = Mesh(comm, fit(ParallelSettings(**layout), comm.size), backend, Recorder())
    (stage,) = build_stages(gpt2.build(settings), backend, mesh, np.dtype("float32"), None)
    for arena in stage.store.arenas:
        for param, (start, stop), part in arena.pieces(arena.grad):
            part[...] = dense(param)[param.shard.slices].reshape(-1)[start:stop]
    result = gradients.Gradients(
        [stage], mesh, backend, Progress(), micros=1, deterministic=True
    ).norm()
    mesh.free()
    return result, stage.store.params

for tied in (True, False):
    alone, params = norm(MPI.COMM_SELF, tied)
    whole = np.concatenate([dense(param).reshape(-1).astype(np.float64) for param in params])
    found = []
    for data in (1, 2, 4):
        for tensor in (1, 2, 4):
            for zero in range(4):
                if 4 % (data * tensor) == 0:
                    pipe = 4 // data // tensor
                    layout = dict(data=data, tensor=tensor, pipe=pipe, zero=zero)
                    found.append((layout, world.allgather(norm(world, tied, **layout)[0])))
    if world.rank == 0:
        print(json.dumps([tied, len(params), float(np.linalg.norm(whole)), alone, found]))
"""


def test_the_norm_counts_each_parameter_once_in_every_layout(mpirun: Any) -> None:
    """Tied and replicated parameters, shards that are empty, and the same bits where promised."""
    result = mpirun(4, "-m", "mpi4py", "-c", NORMS)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines()]
    assert [tied for tied, *_ in lines] == [True, False]
    assert lines[1][1] == lines[0][1] + 1  # the head's own weight
    for _, _, expected, alone, found in lines:
        assert alone == pytest.approx(expected, rel=1e-14)
        assert len(found) == 6 * 4
        for layout, norms in found:
            assert len(set(norms)) == 1
            if layout["tensor"] == 1:
                assert norms[0] == alone, layout
            assert norms[0] == pytest.approx(alone, rel=1e-14), layout
        for tensor in (1, 2, 4):
            of_tensor = [norms[0] for layout, norms in found if layout["tensor"] == tensor]
            assert len(of_tensor) >= 4 and len(set(of_tensor)) == 1, tensor


# --- the learning rate ---------------------------------------------------------------------------


def test_warm_up_rises_in_even_steps_to_the_peak() -> None:
    settings = OptimizerSettings(lr=1.0, min_lr=0.1, warmup=4)
    rates = [learning_rate(step, 100, settings) for step in range(5)]
    assert rates == pytest.approx([0.2, 0.4, 0.6, 0.8, 1.0], rel=1e-15)


def test_the_cosine_falls_from_the_peak_to_the_end() -> None:
    settings = OptimizerSettings(lr=3e-3, min_lr=1e-4, warmup=10, schedule="cosine")
    assert learning_rate(10, 110, settings) == pytest.approx(3e-3, rel=1e-15)
    assert learning_rate(60, 110, settings) == pytest.approx((3e-3 + 1e-4) / 2, rel=1e-12)
    assert learning_rate(110, 110, settings) == pytest.approx(1e-4, rel=1e-12)
    assert learning_rate(500, 110, settings) == learning_rate(110, 110, settings)
    quarter = 1e-4 + 0.5 * (1 + math.sqrt(0.5)) * (3e-3 - 1e-4)
    assert learning_rate(35, 110, settings) == pytest.approx(quarter, rel=1e-12)


def test_a_constant_rate_stays() -> None:
    settings = OptimizerSettings(lr=0.5, min_lr=0.1, warmup=2, schedule="constant")
    rates = [learning_rate(step, 10, settings) for step in (2, 5, 9, 100)]
    assert rates == [0.5] * 4
    assert learning_rate(0, 10, settings) == pytest.approx(0.5 / 3)


@given(
    st.integers(0, 300),
    st.integers(1, 200),
    st.integers(0, 250),
    st.sampled_from(["cosine", "constant"]),
)
def test_the_rate_stays_within_its_bounds(step: int, steps: int, warmup: int, name: Any) -> None:
    """Also with a warm-up longer than the run."""
    settings = OptimizerSettings(lr=1e-2, min_lr=1e-3, warmup=warmup, schedule=name)
    rate = learning_rate(step, steps, settings)
    assert 0.0 < rate <= 1e-2 * (1 + 1e-15)
    later = learning_rate(step + 1, steps, settings)
    assert later >= rate if step < warmup else later <= rate
    if step >= warmup:
        assert rate >= 1e-3 * (1 - 1e-15)


# --- how a step's sequences are divided ----------------------------------------------------------


def batch(size: int, micro: int, *, deterministic: bool = False) -> TrainSettings:
    return TrainSettings(batch_size=size, micro_batch_size=micro, deterministic=deterministic)


def over(ranks: int, zero: int = 0) -> ParallelSettings:
    return ParallelSettings(data=ranks, zero=zero)


@pytest.mark.parametrize(
    ("size", "micro", "ranks", "resolved"),
    [
        (16, 0, 1, 16),  # 0 is a rank's whole share
        (16, 0, 4, 4),
        (10, 0, 4, 3),
        (2, 0, 4, 1),  # more ranks than sequences
        (16, 3, 2, 3),  # what is given is kept
        (8, 100, 1, 8),  # as far as there are sequences
        (8, 100, 4, 8),
    ],
)
def test_the_micro_batch_size(size: int, micro: int, ranks: int, resolved: int) -> None:
    settings = resolve_batch(batch(size, micro), over(ranks))
    assert settings.micro_batch_size == resolved
    assert settings.batch_size == size
    assert resolve_batch(settings, over(ranks)) == settings


@given(st.integers(1, 64), st.integers(0, 70), st.integers(1, 9), st.booleans())
def test_deterministic_mode_takes_blocks_of_a_power_of_two_only(
    size: int, micro: int, ranks: int, deterministic: bool
) -> None:
    given_size = min(micro or math.ceil(size / ranks), size)
    rounds = math.ceil(math.ceil(size / given_size) / ranks)
    settings = batch(size, micro, deterministic=deterministic)
    if deterministic and ranks > 1 and rounds not in (1, 2, 4, 8, 16, 32, 64):
        with pytest.raises(UserError) as caught:
            resolve_batch(settings, over(ranks))
        message = str(caught.value)
        for what in ("train.deterministic", f"{size} sequences", f"micro-batches of {given_size}"):
            assert what in message
        assert f"{ranks} data ranks make {rounds} micro-batches a rank" in message
    else:
        assert resolve_batch(settings, over(ranks)).micro_batch_size == given_size


@pytest.mark.parametrize(("size", "micro", "ranks"), [(12, 2, 2), (40, 1, 3), (64, 11, 2)])
def test_the_error_names_a_micro_batch_size_that_works(size: int, micro: int, ranks: int) -> None:
    with pytest.raises(UserError) as caught:
        resolve_batch(batch(size, micro, deterministic=True), over(ranks))
    named = re.search(r"train\.micro_batch_size = (\d+)", str(caught.value))
    assert named, str(caught.value)
    resolve_batch(batch(size, int(named[1]), deterministic=True), over(ranks))


def test_deterministic_mode_needs_ordered_sums() -> None:
    library = ParallelSettings(data=1, reduction="library")
    with pytest.raises(UserError, match=r"reduction = 'library' promises no bits; .*'ordered'"):
        resolve_batch(batch(8, 2, deterministic=True), library)
    assert resolve_batch(batch(8, 2), library).micro_batch_size == 2


@pytest.mark.parametrize("zero", [2, 3])
def test_sharded_gradients_need_a_power_of_two_of_data_ranks(zero: int) -> None:
    """Then every round of micro-batches is a subtree, whatever their number."""
    with pytest.raises(UserError, match=r"zero = .*power of two, and it is 6; use 4 of them"):
        resolve_batch(batch(36, 2, deterministic=True), over(6, zero))
    assert resolve_batch(batch(36, 2, deterministic=True), over(4, zero)).micro_batch_size == 2
    assert resolve_batch(batch(36, 2), over(6, zero)).micro_batch_size == 2
