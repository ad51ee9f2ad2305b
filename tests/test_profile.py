"""What is counted and timed: FLOPs, seconds by kind of work, the best rate, and the tables."""

from __future__ import annotations

import importlib
import io
import json
import os
import pkgutil
import time
from collections import Counter, deque
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI
from test_report import metrics

import mpillm.array
from mpillm.array import fast_attention
from mpillm.array import probe as probe_module
from mpillm.array.backend import Backend
from mpillm.array.metered import KINDS, metered, operations
from mpillm.array.ops import Ops
from mpillm.array.probe import SQUARE, Probe
from mpillm.array.tally import OTHER, WAITING, Clock, Product, Tally, communication
from mpillm.config import load
from mpillm.data.loader import Loader
from mpillm.errors import UserError
from mpillm.models.gpt2 import Settings
from mpillm.models.settings import build_model
from mpillm.parallel.clocked import ClockedRequest
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.progress import Progress
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.request import Request
from mpillm.parallel.settings import ParallelSettings
from mpillm.report.metrics import read_steps
from mpillm.report.profile import Breakdown
from mpillm.report.reporter import Reporter
from mpillm.training import meter as meter_module
from mpillm.training.meter import Meter
from mpillm.training.settings import OptimizerSettings, RunConfig, TrainSettings
from mpillm.training.trainer import Trainer, resolve_batch


@pytest.fixture
def backend() -> Backend:
    return Backend.create("numpy")


@pytest.fixture
def now(monkeypatch: pytest.MonkeyPatch) -> list[float]:
    """The time that clocks read: a list of one number, to be changed."""
    seconds = [100.0]
    monkeypatch.setattr(time, "perf_counter", lambda: seconds[0])
    return seconds


# Kinds and clocks


def test_every_operation_has_a_kind() -> None:
    for module in pkgutil.iter_modules(mpillm.array.__path__):
        importlib.import_module(f"mpillm.array.{module.name}")
    known, left = set(), [Ops]
    while left:
        kind = left.pop()
        left += [below for below in kind.__subclasses__() if below.__module__.startswith("mpillm.")]
        assert operations(kind) <= KINDS.keys(), kind
        known |= operations(kind)
    assert known == KINDS.keys()


def test_every_kind_has_a_name_in_the_table() -> None:
    kinds = {*KINDS.values(), "input", "checkpoint", communication("data"), WAITING, OTHER}
    breakdown = Breakdown()
    breakdown.add(metrics(1), [dict.fromkeys(kinds, 1.0)])
    assert len(breakdown.table().splitlines()) == 2 + len(kinds)


def test_one_kind_runs_at_any_time(now: list[float]) -> None:
    settled: list[float] = []
    clock = Clock(lambda: settled.append(now[0]))
    now[0] += 7.0  # before the start
    clock.start()
    now[0] += 1.0
    with clock.during("outer"):
        now[0] += 2.0
        with pytest.raises(ZeroDivisionError), clock.during("inner"):
            now[0] += 4.0
            1 / 0  # noqa: B018
        now[0] += 8.0
    now[0] += 16.0
    assert clock.stop() == 31.0
    assert clock.last == {OTHER: 17.0, "outer": 10.0, "inner": 4.0}
    assert settled == [108.0, 110.0, 114.0, 122.0, 138.0]
    clock.start()
    assert clock.stop() == 0.0 and clock.last == {OTHER: 0.0}


def test_an_operation_s_time_is_without_that_of_others_but_in_attention(now: list[float]) -> None:
    class Slow(Ops):
        def matmul(self, a: Any, b: Any, out: Any = None, accumulate: bool = False) -> Any:
            now[0] += 1.0
            return super().matmul(a, b, out, accumulate)

        def gelu_forward(self, x: Any) -> Any:
            now[0] += 10.0
            return self.matmul(x, x), None

        def attention_merge(self, *x: Any) -> None:
            now[0] += 100.0
            self.matmul(*x[:2])

    plain = Backend("slow", np, Slow(np))
    clock, tally = Clock(), Tally()
    ops, x = metered(plain, tally, clock).ops, np.ones((3, 3))
    clock.start()
    ops.matmul(x, x)
    ops.gelu_forward(x)
    ops.attention_merge(x, x, x, x)
    assert clock.stop() == 113.0
    assert clock.last == {OTHER: 0.0, "products": 2.0, "activations": 10.0, "attention": 101.0}
    assert tally.flops == 3 * 2 * 3**3
    plain.ops.matmul(x, x)  # which is not metered
    assert tally.flops == 3 * 2 * 3**3 and clock.kind == OTHER


# Calls of a group


class UnderWay:
    """A request of MPI that is complete at a time that is set."""

    def __init__(self, now: list[float], end: float) -> None:
        self._now, self._end = now, end

    def Test(self) -> bool:
        return self._now[0] >= self._end

    def Wait(self) -> None:
        self._now[0] = max(self._now[0], self._end)


def call(now: list[float], recorder: Recorder, arrived: float | None, end: float) -> ClockedRequest:
    """A call that takes 1 s to begin with, is complete at `end`, and takes 2 s more."""

    def steps() -> Iterator[Any]:
        now[0] += 1.0
        yield UnderWay(now, end)
        now[0] += 2.0

    assert recorder.clock is not None
    entry = recorder.begin("data", "allreduce", 8)
    announce = None if arrived is None else lambda: UnderWay(now, arrived)
    arguments: Any = steps(), deque(), recorder, entry, recorder.clock, announce
    return ClockedRequest(*arguments)


@pytest.fixture
def clocked(now: list[float]) -> Recorder:
    recorder = Recorder()
    recorder.clock = Clock()
    return recorder


MOVING = communication("data")


@pytest.mark.parametrize(
    "arrived, end, seconds",
    [
        (None, 150.0, {MOVING: 3.0, WAITING: 39.0, OTHER: 10.0}),  # a message
        (130.0, 150.0, {MOVING: 23.0, WAITING: 19.0, OTHER: 10.0}),
        (105.0, 150.0, {MOVING: 42.0, WAITING: 0.0, OTHER: 10.0}),  # all came meanwhile
        (150.0, 130.0, {MOVING: 3.0, WAITING: 39.0, OTHER: 10.0}),  # who is done before all came
        (105.0, 105.0, {MOVING: 3.0, OTHER: 10.0}),  # complete without having been waited for
    ],
)
@pytest.mark.parametrize("driven", [False, True])
def test_waiting_is_told_from_moving(
    now: list[float],
    clocked: Recorder,
    monkeypatch: pytest.MonkeyPatch,
    arrived: float | None,
    end: float,
    seconds: dict[str, float],
    driven: bool,
) -> None:
    progress, clock = Progress(clocked), clocked.clock
    assert clock is not None
    request = progress.watch(call(now, clocked, arrived, end))
    if driven:  # by a loop, as there is another call under way
        monkeypatch.setattr(os, "sched_yield", lambda: now.__setitem__(0, now[0] + 1.0))
        other = progress.watch(Request(iter([UnderWay(now, 1e9)]), deque(), clocked, None))  # type: ignore[arg-type]
    now[0] += 10.0  # something is computed
    progress.poll()
    progress.wait(request)
    assert request.done and (not driven or not other.done)
    total = clock.stop()
    assert total == now[0] - 100.0 == sum(clock.last.values())
    # The loop looks once a second, and what is done early is done while others are waited for.
    for kind in (MOVING, WAITING, OTHER):
        assert abs(clock.last.get(kind, 0.0) - seconds.get(kind, 0.0)) <= 2.0 * driven, kind


# FLOPs

shapes = st.integers(0, 4)


@given(
    st.lists(st.tuples(st.integers(1, 3), st.sampled_from("=ab")), max_size=2),
    *(shapes, shapes, shapes, st.booleans(), st.booleans(), st.sampled_from(["", "out", "add"])),
)
def test_flops_of_any_product(
    lead: list[tuple[int, str]], m: int, k: int, n: int, ta: bool, tb: bool, into: str
) -> None:
    def operand(who: str, rows: int, columns: int, turned: bool) -> Any:
        many = [1 if only == other[who] else size for size, only in lead]
        x = np.ones([*many, *((columns, rows) if turned else (rows, columns))], dtype=np.float32)
        return x.swapaxes(-1, -2) if turned else x

    other = {"a": "b", "b": "a"}
    a, b = operand("a", m, k, ta), operand("b", k, n, tb)
    expected, tally = np.matmul(a, b), Tally()
    out = np.ones_like(expected) if into else None
    tally.products = Counter()
    result = metered(Backend.create("numpy"), tally).ops.matmul(a, b, out, into == "add")
    assert np.array_equal(result, expected + (into == "add"))
    assert tally.flops == 2 * expected.size * k
    ((product, count),) = tally.products.items()
    assert count == 1 and product.flops == tally.flops and product.result == expected.shape


MODEL = Settings(layers=2, heads=2, width=16, vocabulary=23, context=300, dropout=0.1)
TEXT = np.random.default_rng(0).integers(0, 23, 5000).astype(np.uint16)


def trainer_of(meter: Meter, train: TrainSettings, recorder: Recorder) -> tuple[Trainer, Mesh]:
    """A small model on one rank."""
    mesh = Mesh(MPI.COMM_SELF, fit(ParallelSettings(), 1), meter.backend, recorder)
    train = resolve_batch(train, mesh.layout)
    sizes = train.sequence_length, train.batch_size, train.micro_batch_size
    loader, model = Loader(TEXT, *sizes, train.seed), build_model(MODEL)
    trainer = Trainer(
        model, train, OptimizerSettings(), mesh, meter.backend, loader, clock=meter.clock
    )
    return trainer, mesh


@pytest.mark.parametrize("name", ["numpy", "strict"])
@pytest.mark.parametrize("length", [48, 300])
def test_flops_of_a_model_are_those_of_the_formula(name: str, length: int) -> None:
    b, micros, t, d, v = 2, 2, length, 16, 23
    recorder, backend = Recorder(), Backend.create(name)
    meter = Meter(backend, recorder, profile=False)
    train = TrainSettings(
        batch_size=b * micros, micro_batch_size=b, sequence_length=t, dtype="float64"
    )
    trainer, mesh = trainer_of(meter, train, recorder)
    meter.begin_step()
    trainer.step()
    products = meter._tally.products
    assert products is not None
    found: Counter[str] = Counter()
    for product, count in products.items():
        sizes = {*product.a, *product.b}
        kind = "attention" if len(product.a) > 2 else "head" if v in sizes else "linear"
        found[kind] += count * product.flops
    n = b * micros * t
    # 3 d^2 weights for q, k and v, d^2 for the output, 8 d^2 in the feed-forward part; a product
    # with each forward, two backward.
    assert found["linear"] == MODEL.layers * 3 * 2 * n * 12 * d * d
    # Of the scores those in tiles that a query of them sees, which the reference has one of: two
    # products with them forward, five backward.
    rows = fast_attention._QUERIES if name == "numpy" else t
    seen = sum(min(rows, t - low) * min(low + rows, t) for low in range(0, t, rows))
    assert name == "strict" or t <= rows or seen < t * t
    assert found["attention"] == MODEL.layers * 7 * 2 * b * micros * seen * d
    # Logits, and with them or with the same ones once more the derivatives by x and weight.
    assert found["head"] in [products * 2 * n * d * v for products in (3, 4)]
    assert meter._tally.flops == found.total()
    mesh.free()


@pytest.mark.parametrize("name", ["numpy", "strict"])
def test_the_kinds_of_a_step_add_up_and_change_nothing(name: str) -> None:
    results = []
    for profile in (False, True):
        recorder, backend = Recorder(), Backend.create(name)
        meter = Meter(backend, recorder, profile=profile)
        train = TrainSettings(batch_size=4, micro_batch_size=2, sequence_length=40)
        trainer, mesh = trainer_of(meter, train, recorder)
        for _ in range(3):
            meter.begin_step()
            result = trainer.step()
            reading = meter.end_step(result.seconds, mesh.world)
            assert reading.mfu is not None and 0 < reading.mfu <= 1
        weights = [backend.to_host(view).tobytes() for _, _, _, view in trainer.optimizer.state()]
        results.append((result.loss, result.grad_norm, weights))
        assert (reading.ranks is not None) == profile
        if reading.ranks is not None:
            (kinds,) = reading.ranks
            assert sum(kinds.values()) == pytest.approx(result.seconds, rel=1e-9)
            assert min(kinds.values()) > 0
            every = {"products", "attention", "norms", "activations", "sums", "loss", "embedding"}
            assert {*every, "dropout", "optimizer", "input", OTHER} <= kinds.keys()
        mesh.free()
    assert results[0] == results[1]


# The best rate


def noted(products: list[tuple[Any, Any, Any, bool]]) -> Counter[Product]:
    tally = Tally()
    tally.products = Counter()
    for product in products:
        tally.note(*product)
    return tally.products


def test_a_probe_multiplies_what_the_model_multiplied(backend: Backend) -> None:
    a, b = np.ones((40, 30), np.float32), np.ones((50, 30), np.float32)
    cases = [
        *[(a, b.T, None, False), (a.T, np.ones((40, 50), np.float32), b.T.copy(), True)],
        (np.ones((2, 3, 40, 30)), np.ones((2, 3, 20, 30)).swapaxes(-1, -2), None, False),
    ]
    products, seen = noted(cases), []
    matmul = backend.ops.matmul

    def spy(*arguments: Any) -> Any:
        seen.append(noted([arguments]))
        assert np.isfinite(arguments[0]).all() and np.count_nonzero(arguments[1]) > 0
        return matmul(*arguments)

    backend.ops.matmul = spy  # type: ignore[method-assign]
    probe = Probe(backend)
    assert probe.best() == (0.0, None)
    for _ in range(4):
        probe.measure(products, 1e-3)  # one or more of them, in turn
    assert sum(seen, Counter()).keys() == products.keys() == probe.rates.keys()
    rate, product = probe.best()
    assert rate == max(probe.rates.values()) == probe.rates[product] > 0  # type: ignore[index]
    assert probe.square == 0.0  # no time for it
    probe.measure(Counter(), 1e-3)
    probe.measure(noted([(a[:0], b.T, None, False)]), 1e-3)
    assert probe.rates.keys() == products.keys()


def test_large_products_are_cut_and_squares_take_their_time(
    backend: Backend, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(probe_module, "_LARGEST", 1 << 16)
    monkeypatch.setattr(probe_module, "_TIME_FOR_SQUARES", 0.0)
    x = np.ones((7, 90, 1000), np.float32)
    products = noted([(x, x[0].T, None, False), (x[0, :20], x[0, :20].T, None, False)])
    probe = Probe(backend)
    for _ in range(3):
        probe.measure(products, 0.0)
    assert {product.a for product in probe.rates} == {(45, 62), (20, 250)}
    assert all(probe_module._bytes(product) <= 1 << 16 for product in probe.rates)
    assert probe.square > 0 and (SQUARE, SQUARE) not in {product.a for product in probe.rates}


class FakeProbe:
    """Rates that are to be measured, one after another."""

    def __init__(self, rates: list[float]) -> None:
        self._rates: Iterator[float] = iter(rates)
        self._best = self.square = 0.0
        self.seconds: list[float] = []

    def measure(self, products: Counter[Product], seconds: float) -> None:
        self.seconds.append(seconds)
        self._best = max(self._best, next(self._rates))

    def best(self) -> tuple[float, None]:
        return self._best, None


def test_no_step_is_faster_than_the_best(backend: Backend, world_of_one: Any) -> None:
    meter = Meter(backend, Recorder(), profile=False)
    meter._probe = probe = FakeProbe([100.0, 50.0, 1000.0, 10.0])  # type: ignore[assignment]
    flops, found = 2 * 5**3, []
    for seconds in (5.0, 5.0, 1.0, 0.5, 2.5, 2.5, 2.5, 2.5):
        meter.begin_step()
        meter.backend.ops.matmul(np.ones((5, 5)), np.ones((5, 5)))
        reading = meter.end_step(seconds, world_of_one)
        assert reading.gflops == pytest.approx(flops / seconds / 1e9) and reading.ranks is None
        found.append(reading.mfu)
    # Disturbed probes: step 3 (250 FLOP/s) is faster than both; the third one is as it should be.
    assert found == pytest.approx([0.5, 0.5, 1.0, 0.5, 0.1, 0.1, 0.1, 0.1])
    assert probe.seconds == pytest.approx([0.025, 0.05, 0.0575, 0.1075])
    rate = 7 * flops / 16.5
    assert meter.summary().startswith(f"MFU {rate / 1000:.1%}: 0.0 GFLOP/s in matrix products, of")


@pytest.mark.parametrize(("cores", "mfu"), [(0.5, 0.2), (1.0, 0.1), (3.0, 0.1)])
def test_a_rank_counts_with_its_share_of_a_core(
    backend: Backend, world_of_one: Any, cores: float, mfu: float
) -> None:
    meter = Meter(backend, Recorder(), profile=False, cores=cores)
    meter._probe = FakeProbe([500.0])  # type: ignore[assignment]
    meter.begin_step()
    meter.backend.ops.matmul(np.ones((5, 5)), np.ones((5, 5)))
    assert meter.end_step(5.0, world_of_one).mfu == pytest.approx(mfu)  # 50 FLOP/s


def test_without_products_there_is_no_mfu(backend: Backend, world_of_one: Any) -> None:
    meter = Meter(backend, Recorder(), profile=True)
    meter.begin_step()
    meter.clock.start()  # type: ignore[union-attr]
    meter.clock.stop()  # type: ignore[union-attr]
    reading = meter.end_step(1.0, world_of_one)
    assert (reading.gflops, reading.mfu) == (0.0, None)
    assert meter.summary() == (
        "0.0 GFLOP/s in matrix products, of 0.0 that all ranks reach at this model's shapes"
    )


def test_probes_come_after_1_2_4_8_steps(
    backend: Backend, world_of_one: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(meter_module, "_LONGEST", 3.0)
    meter = Meter(backend, Recorder(), profile=False)
    meter._probe = probe = FakeProbe([1.0] * 9)  # type: ignore[assignment]
    at = []
    for step in range(1, 70):
        meter.begin_step()
        meter.end_step(step / 1000 if step < 60 else 1000.0, world_of_one)
        if len(probe.seconds) > len(at):
            at.append(step)
    assert at == [1, 2, 4, 8, 16, 32, 64]
    assert probe.seconds[0] == 0.002 and probe.seconds[-1] == 3.0  # bounds


@pytest.fixture
def world_of_one(backend: Backend) -> Any:
    """The group of this rank alone."""
    return Mesh(MPI.COMM_SELF, fit(ParallelSettings(), 1), backend, Recorder()).world


# Files and tables


RANKS: list[dict[str, float]] = [
    {"products": 0.5, "waiting": 0.3, "other": 0.2},
    {"products": 0.6, "communication.data": 0.25, "waiting": 0.05, "other": 0.1},
]


def test_the_table_adds_up(tmp_path: Path) -> None:
    breakdown = Breakdown()
    assert breakdown.steps == 0
    first = breakdown.add(metrics(1), [{"loss": 9.0}, {"loss": 9.0}])
    assert first == {
        "step": 1, "seconds": 9.0, "loss": 9.0, "slowest_rank": 0, "slowest.loss": 9.0
    }  # fmt: skip
    assert "loss" in breakdown.table()
    row = breakdown.add(metrics(2, mfu=0.5, gflops=80.0), RANKS)
    assert row["seconds"] == pytest.approx(1.0) and row["slowest_rank"] == 1
    assert (row["mfu"], row["gflops"], row["communication.data"]) == (0.5, 80.0, 0.125)
    assert row["slowest.waiting"] == 0.05 and "loss" not in row
    breakdown.add(metrics(3), [{kind: 3 * part for kind, part in rank.items()} for rank in RANKS])
    assert breakdown.in_short() == (
        "matrix products 55%  waiting for ranks 17%  Python and other 15%  communication, data 12%"
    )
    assert breakdown.table().splitlines() == [
        "where the time went, of 2 steps, rank 1 having waited least",
        "                                        mean of ranks                 rank 1",
        "matrix products                   1,100.00 ms   55.0%    1,200.00 ms   60.0%",
        "communication, data                 250.00 ms   12.5%      500.00 ms   25.0%",
        "waiting for ranks                   350.00 ms   17.5%      100.00 ms    5.0%",
        "Python and other                    300.00 ms   15.0%      200.00 ms   10.0%",
        "the step                          2,000.00 ms  100.0%    2,000.00 ms  100.0%",
    ]


def test_a_resumed_profile_goes_on_in_the_same_file(tmp_path: Path) -> None:
    path, stream = tmp_path / "profile.jsonl", io.StringIO()
    for start, profile in ((0, RANKS[:1]), (2, None), (1, RANKS)):
        reporter = Reporter(tmp_path, 3, start, stream=stream)
        for step in range(start + 1, 4):
            reporter.step(metrics(step), profile)
        reporter.breakdown()
        reporter.close()
        steps = [row["step"] for row in read_steps(path)]
        assert steps == ([1, 2] if profile is None else [1, 2, 3])
    assert [len(row) for row in read_steps(path)] == [5, 11, 11]
    assert stream.getvalue().count("where the time went") == 2
    path.write_text('{"step": 1, "products": {}}\n')
    with pytest.raises(UserError, match=r"profile\.jsonl, line 1: expected a JSON object"):
        Reporter(tmp_path, 3, 1, stream=stream)


def test_a_run_tells_where_its_time_goes(python: Any, tmp_path: Path) -> None:
    (tmp_path / "text.txt").write_text("the quick brown fox jumps over the lazy dog\n" * 40)
    (tmp_path / "config.toml").write_text(
        '[model]\nfamily = "gpt2"\nlayers = 2\nheads = 2\nwidth = 16\n'
        "[train]\nsteps = 5\nbatch_size = 4\nsequence_length = 16\n"
        f'[data]\ntext = ["{tmp_path}/text.txt"]\n[run]\ndir = "{tmp_path}/run"\n'
    )
    command = ["-m", "mpillm", "train", tmp_path / "config.toml"]
    told = {}
    for profile in ("false", "true"):
        result = python(*command, "--fresh", f"--run.profile={profile}")
        assert result.returncode == 0, result.stderr
        told[profile] = result.stderr
        rows = [json.loads(line) for line in (tmp_path / "run/metrics.jsonl").open()]
        assert all(0 < row["mfu"] <= 1 and row["gflops"] > 0 for row in rows)
        assert (tmp_path / "run/profile.jsonl").exists() == (profile == "true")
    for text in told.values():
        assert "  MFU " in text and "GFLOP/s in matrix products" in text
    assert "where the time went" not in told["false"]
    assert "where the time went, of 4 steps\n" in told["true"] and "1024 x 1024" in told["true"]
    profiled = read_steps(tmp_path / "run/profile.jsonl")
    for row, measured in zip(profiled, rows, strict=True):
        kinds = {*KINDS.values(), "input", "checkpoint", OTHER} & row.keys()
        assert row["seconds"] == pytest.approx(sum(row[kind] for kind in kinds))
        assert row["seconds"] == pytest.approx(measured["step_seconds"], rel=1e-6)
        assert row["mfu"] == measured["mfu"] and row["gflops"] == measured["gflops"]
    with pytest.raises(UserError, match=r"run\.profile"):
        load(RunConfig, tmp_path / "config.toml", ["--run.profile=2"])
