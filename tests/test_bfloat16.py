"""Products of bfloat16 operands: oneDNN against NumPy, and a model against itself in float32."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from mpi4py import MPI

from mpillm.array import onednn, onednn_library
from mpillm.array.backend import Backend
from mpillm.array.onednn import OneDnn, OneDnnError
from mpillm.array.ops import Ops
from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.verify import resolve
from mpillm.config import from_table
from mpillm.errors import UserError
from mpillm.models.gpt2 import Settings
from mpillm.models.model import build_stages
from mpillm.models.settings import build_model
from mpillm.nn.layer import Micro
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.shard import Shard
from mpillm.training.settings import RunConfig
from mpillm.training.trial import Outcome, Trial

Command = Callable[..., "subprocess.CompletedProcess[str]"]

TEXT = Path(__file__).parent.parent / "LICENSE"


@pytest.fixture(scope="session")
def python(environment: dict[str, str]) -> Command:
    """Runs this Python with arguments and environment variables."""
    given = {name: text for name, text in environment.items() if name != "OMP_NUM_THREADS"}

    def run(*arguments: str | Path, **variables: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, *arguments],
            capture_output=True,
            text=True,
            env={**given, **variables},
            timeout=60,
            check=False,
        )

    return run


def missing() -> str:
    """Why bfloat16 cannot be had here; empty where it can."""
    try:
        Backend.create("numpy", dtype="bfloat16")
    except UserError as error:
        return str(error)
    return ""


WHY = missing()
needs_bfloat16 = pytest.mark.skipif(bool(WHY), reason=WHY)


@pytest.fixture(scope="module")
def dnnl() -> OneDnn:
    if WHY:
        pytest.skip(WHY)
    return OneDnn()


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape, dtype=np.float32)


# -- products --------------------------------------------------------------------------------------

# Ways for an array to lie in memory; each gives a view with the elements of a C-contiguous one.
LAYOUTS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "rows": lambda x: x,
    "columns": lambda x: np.ascontiguousarray(x.swapaxes(-1, -2)).swapaxes(-1, -2),
    "part of wider rows": lambda x: np.concatenate([x, x], axis=-1)[..., : x.shape[-1]],
    "every second row": lambda x: np.repeat(x, 2, axis=-2)[..., ::2, :],
    "every second column": lambda x: np.repeat(x, 2, axis=-1)[..., ::2],
    "backwards": lambda x: np.ascontiguousarray(x[..., ::-1, :])[..., ::-1, :],
    "first axis last": lambda x: np.moveaxis(np.ascontiguousarray(np.moveaxis(x, 0, -1)), -1, 0),
    "heads between rows": lambda x: (
        np.ascontiguousarray(x.swapaxes(-2, -3)).swapaxes(-2, -3) if x.ndim > 2 else x
    ),
}
LEADS: dict[str, tuple[tuple[int, ...], tuple[int, ...]]] = {
    "matrices": ((), ()),
    "stacks": ((3,), (3,)),
    "stacks of stacks": ((2, 3), (2, 3)),
    "the second broadcast": ((2, 3), (3,)),
    "the first broadcast": ((1,), (4,)),
    "both broadcast": ((2, 1), (1, 3)),
    "a matrix and a stack": ((), (2, 2)),
}
sizes = st.sampled_from([1, 2, 3, 7, 16, 33, 64])


def check_product(dnnl: OneDnn, a: Any, b: Any, out: Any = None, accumulate: bool = False) -> None:
    """Against float64: no element is further off than float32's rounding of its terms explains."""
    exact_a, exact_b = a.astype(np.float64), b.astype(np.float64)
    expected, size = exact_a @ exact_b, np.abs(exact_a) @ np.abs(exact_b)
    if accumulate:
        expected, size = expected + out, size + np.abs(out)
    result = dnnl.matmul(a, b, out, accumulate)
    assert result.dtype == np.float32 and result.shape == expected.shape
    assert out is None or result is out
    roundings = a.shape[-1] + 2
    assert (np.abs(result - expected) <= roundings * 2.0**-24 * size + 1e-30).all()


@needs_bfloat16
@given(
    bfloat16=st.booleans(),
    lead=st.sampled_from(sorted(LEADS)),
    m=sizes,
    k=sizes,
    n=sizes,
    layouts=st.tuples(*[st.sampled_from(sorted(LAYOUTS))] * 3),
    to=st.sampled_from(["new", "out", "add"]),
)
def test_products_of_every_layout(
    dnnl: OneDnn,
    bfloat16: bool,
    lead: str,
    m: int,
    k: int,
    n: int,
    layouts: tuple[str, str, str],
    to: str,
) -> None:
    dtype = dnnl.bfloat16 if bfloat16 else np.dtype(np.float32)
    first, second = LEADS[lead]
    a = LAYOUTS[layouts[0]](normal(1, *first, m, k).astype(dtype))
    b = LAYOUTS[layouts[1]](normal(2, *second, k, n).astype(dtype))
    out = None
    if to != "new":
        out = LAYOUTS[layouts[2]](normal(3, *np.broadcast_shapes(first, second), m, n))
    if to == "out":  # what stands there must not matter
        out[...] = np.nan
    check_product(dnnl, a, b, out, to == "add")


@needs_bfloat16
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize(
    ("a", "b"), [((0, 3), (3, 2)), ((2, 3), (3, 0)), ((2, 0), (0, 3)), ((4, 2, 0), (4, 0, 3))]
)
def test_products_of_nothing(
    dnnl: OneDnn, a: tuple[int, ...], b: tuple[int, ...], accumulate: bool
) -> None:
    out = np.full((*a[:-1], b[-1]), 5.0, np.float32)
    dnnl.matmul(np.empty(a, dnnl.bfloat16), np.empty(b, dnnl.bfloat16), out, accumulate)
    assert (out == (5.0 if accumulate else 0.0)).all()


@needs_bfloat16
def test_axes_along_which_nothing_changes(dnnl: OneDnn) -> None:
    """Views with a stride of zero, before the matrices and inside them."""
    a, b = normal(1, 5, 7).astype(dnnl.bfloat16), normal(2, 3, 7, 4).astype(dnnl.bfloat16)
    check_product(dnnl, np.broadcast_to(a, (3, 5, 7)), b)
    check_product(dnnl, np.broadcast_to(a[0], (5, 7)), b[0])
    check_product(dnnl, np.broadcast_to(a[:, :1], (3, 5, 7)), b)


@needs_bfloat16
def test_what_does_not_fit_is_refused(dnnl: OneDnn) -> None:
    a, b = normal(1, 2, 3), normal(2, 3, 4)
    half_a, half_b = a.astype(dnnl.bfloat16), b.astype(dnnl.bfloat16)
    for wrong in ((half_a, b), (a, half_b), (a.astype(np.float16), b.astype(np.float16))):
        with pytest.raises(TypeError, match="expected two of one type"):
            dnnl.matmul(*wrong)
    with pytest.raises(TypeError, match="expected float32"):
        dnnl.matmul(half_a, half_b, np.zeros((2, 4)))
    for shapes in (((2, 4), None), ((2, 3), (4, 2)), ((1, 2, 3), (4, 4))):
        with pytest.raises(ValueError, match="does not fit"):
            left, right = shapes[0], shapes[1] or (3, 4)
            dnnl.matmul(np.zeros(left, np.float32), np.zeros(right, np.float32))
    with pytest.raises(ValueError, match="does not fit"):
        dnnl.matmul(half_a, half_b, np.zeros((4, 2), np.float32))


@needs_bfloat16
def test_numbers_that_are_none_come_through(dnnl: OneDnn) -> None:
    a = normal(1, 9, 40).astype(dnnl.bfloat16)
    a[1, 3], a[4, 5], a[7, 0] = np.nan, np.inf, -np.inf
    product = dnnl.matmul(a, np.ones((40, 5), dnnl.bfloat16))
    assert np.isnan(product[1]).all()
    assert (product[4] == np.inf).all() and (product[7] == -np.inf).all()
    assert np.isfinite(np.delete(product, [1, 4, 7], axis=0)).all()


@needs_bfloat16
def test_of_many_shapes_the_latest_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn, "_KEPT", 3)
    fresh = OneDnn()
    for length in [*range(1, 9), 1, 8, 2, 8, 1]:
        a, b = normal(1, 2, 4, length), normal(2, 2, length, 3)
        check_product(fresh, fresh.to_bfloat16(a), fresh.to_bfloat16(b))
        assert len(fresh._primitives) <= 3


@needs_bfloat16
def test_a_failing_call_is_named(dnnl: OneDnn) -> None:
    with pytest.raises(OneDnnError, match="dnnl_memory_desc_create_with_strides: invalid_argument"):
        dnnl._describe(dnnl.bfloat16, (4, 4), (1, 1))  # rows that overlap
    with pytest.raises(OneDnnError, match="dnnl_engine_create: "):
        dnnl._make("dnnl_engine_create", 2, 0)  # a GPU


# -- copies ----------------------------------------------------------------------------------------


@needs_bfloat16
@pytest.mark.parametrize("low", [0x0000, 0x0001, 0x7FFF, 0x8000, 0x8001, 0xFFFF])
def test_every_bfloat16_number_and_what_lies_beside_it(dnnl: OneDnn, low: int) -> None:
    """All upper halves of a float32, with a lower half that rounds up, down or to the even one."""
    x = (np.arange(1 << 16, dtype=np.uint32) << 16 | np.uint32(low)).view(np.float32)
    with np.errstate(all="ignore"):
        expected = x.astype(dnnl.bfloat16)
    copy = dnnl.to_bfloat16(x)
    nan, tiny = np.isnan(x), np.abs(x) < np.finfo(np.float32).tiny
    same = copy.view(np.uint16) == expected.view(np.uint16)
    assert same[~nan & ~tiny].all()
    assert np.isnan(copy[nan].astype(np.float32)).all()
    assert (copy[tiny] == 0).all()
    assert (np.signbit(copy[tiny]) == np.signbit(x[tiny])).all()


@needs_bfloat16
@given(
    shape=st.lists(st.integers(0, 5), min_size=0, max_size=4).map(tuple),
    order=st.randoms(use_true_random=False),
    step=st.sampled_from([1, 2, -1]),
)
def test_copies_of_every_layout(
    dnnl: OneDnn, shape: tuple[int, ...], order: Any, step: int
) -> None:
    axes = order.sample(range(len(shape)), len(shape))
    x = normal(1, *shape).transpose(axes)
    x = x[::step] if x.ndim else x
    copy = dnnl.to_bfloat16(x)
    assert copy.flags.c_contiguous and copy.shape == x.shape and copy.dtype == dnnl.bfloat16
    assert (copy == x.astype(dnnl.bfloat16)).all()
    assert (dnnl.to_bfloat16(np.broadcast_to(x, (2, *x.shape))) == copy).all()


@needs_bfloat16
def test_operands_are_made_once() -> None:
    ops = Backend.create("numpy", dtype="bfloat16").ops
    x = normal(1, 3, 4)
    copy = ops.operand(x)
    assert copy.dtype.name == "bfloat16" and ops.operand(copy) is copy
    wide = x.astype(np.float64)
    assert ops.operand(wide) is wide
    assert ops.matmul(wide, wide.T).dtype == np.float64
    assert (ops.matmul(x, x.T) - x @ x.T < 1e-6).all()  # float32 operands stay float32
    with pytest.raises(TypeError, match="expected two of one type"):
        ops.matmul(copy, x.T)


@needs_bfloat16
@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize(("g", "drop"), [(4, 0.0), (2, 0.0), (1, 0.3)])
def test_attention_is_near_that_of_float64(causal: bool, g: int, drop: float) -> None:
    ops = Backend.create("numpy", dtype="bfloat16").ops
    q, d_out = normal(1, 3, 40, 4, 16).swapaxes(1, 2), normal(2, 3, 40, 4, 16).swapaxes(1, 2)
    k, v = normal(3, 3, 50, 2, g, 16).transpose(2, 0, 3, 1, 4)
    places = np.arange(50)
    keys = np.random.default_rng(4).integers(0, 2**64, (3, 4, 40), dtype=np.uint64)

    def passes(ops: Ops, *arrays: np.ndarray) -> tuple[np.ndarray, ...]:
        q, k, v, d_out = arrays
        how = {"causal": causal, "scale": 0.25, "drop": drop, "row_keys": keys if drop else None}
        out, lse, saved = ops.attention_forward(q, k, v, places[10:], places, **how)
        return out, lse, *ops.attention_backward(d_out, out, lse, saved)

    expected = passes(Ops(np), *(x.astype(np.float64) for x in (q, k, v, d_out)))
    found = passes(ops, q, k, v, d_out)
    for x, y in zip(expected, found, strict=True):
        assert y.dtype == np.float32
        assert np.linalg.norm(y - x) <= 1e-2 * np.linalg.norm(x)


@needs_bfloat16
@pytest.mark.parametrize("threads", [1, 2])
def test_as_many_threads_as_asked_for(python: Command, threads: int) -> None:
    """Of the two variables that of OpenMP counts; several threads give the same bits every time."""
    program = """
import sys
import numpy as np
from mpillm.array.onednn import OneDnn
dnnl = OneDnn()
rng = np.random.default_rng(0)
a, b = (rng.standard_normal(shape, dtype=np.float32) for shape in ((300, 500), (500, 200)))
a, b = dnnl.to_bfloat16(a), dnnl.to_bfloat16(b)
first = dnnl.matmul(a, b)
assert all((dnnl.matmul(a, b) == first).all() for _ in range(20))
print(dnnl._dnnl.omp_get_max_threads())
"""
    for variables in (
        {"OPENBLAS_NUM_THREADS": str(threads)},
        {"OPENBLAS_NUM_THREADS": "7", "OMP_NUM_THREADS": str(threads)},
    ):
        result = python("-c", program, **variables)
        assert (result.stdout, result.stderr) == (f"{threads}\n", "")


# -- where it cannot be had ------------------------------------------------------------------------


def create() -> Backend:
    return Backend.create("numpy", dtype="bfloat16")


def test_without_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_library, "_candidates", lambda: iter(()))
    pytest.importorskip("ml_dtypes")
    with pytest.raises(UserError, match=re.escape("pip install 'mpillm[bf16]'")) as error:
        create()
    assert "train.dtype = 'bfloat16': oneDNN is not installed; install" in str(error.value)
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(UserError, match="ml_dtypes cannot be imported"):
        create()


def test_a_library_that_cannot_be_used(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("ml_dtypes")
    broken = tmp_path / "libdnnl.so"
    broken.write_bytes(b"no library")
    paths = [str(broken), str(tmp_path / "nowhere.so")]
    monkeypatch.setattr(onednn_library, "_candidates", lambda: iter(paths))
    with pytest.raises(UserError) as error:
        create()
    assert str(error.value).count("cannot be used") == 2 and "\n" not in str(error.value)


@needs_bfloat16
def test_a_library_of_another_version(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(onednn_library, "_MAJOR", 2)
    with pytest.raises(UserError, match=r"is version 3\.\d+\.\d+, expected 2"):
        create()


@pytest.mark.parametrize("name", ["cupy", "strict"])
def test_other_backends_have_none(name: str) -> None:
    with pytest.raises(UserError, match=f"run.backend = '{name}' has no bfloat16"):
        Backend.create(name, dtype="bfloat16")


def test_the_onednn_backend_says_what_it_lacks(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "ml_dtypes", None)
    with pytest.raises(UserError, match=r"run\.backend = 'onednn': ml_dtypes cannot be imported"):
        Backend.create("onednn")


@needs_bfloat16
def test_with_bfloat16_the_onednn_backend_is_the_numpy_one() -> None:
    kinds = {type(Backend.create(name, dtype="bfloat16").ops) for name in ("numpy", "onednn")}
    assert len(kinds) == 1


def test_an_unknown_backend_is_named_first() -> None:
    with pytest.raises(UserError, match="no backend 'numpi'; did you mean 'numpy'"):
        Backend.create("numpi", dtype="bfloat16")


def test_arrays_are_float32() -> None:
    assert Backend.create("numpy").dtype("bfloat16") == np.float32


# -- a model ---------------------------------------------------------------------------------------

MODEL = Settings(layers=2, heads=4, width=64, vocabulary=61, context=32, init_std=0.05)


class Model:
    """A model on one rank, and a micro-batch; weights are the same in all precisions."""

    def __init__(self, dtype: str) -> None:
        self.backend = Backend.create("numpy", dtype=dtype)
        real = self.backend.dtype(dtype)
        mesh = Mesh(MPI.COMM_SELF, fit(ParallelSettings(), 1), self.backend, Recorder())
        (self.stage,) = build_stages(build_model(MODEL), self.backend, mesh, real, seed=3)
        for param in self.stage.store.params:  # those of float32, whatever the precision
            param.value[...] = param.value.astype(np.float32)
        rng = np.random.default_rng(0)
        tokens, labels = rng.integers(0, 61, (2, 8, 32), dtype=np.int32)
        self.micro = Micro(
            tokens=tokens,
            labels=labels,
            mask=np.ones(tokens.shape, real),
            index=np.arange(32),
            samples=np.arange(8),
            training=True,
            key=5,
        )
        self.scale = 1.0 / tokens.size
        mesh.free()

    def loss(self) -> float:
        (total,), _ = self.stage.forward((), self.micro)
        return float(total) * self.scale

    def gradients(self) -> dict[str, np.ndarray]:
        for arena in self.stage.store.arenas:
            arena.grads.fill(0.0)
        _, saved = self.stage.forward((), self.micro)
        self.stage.backward((self.scale,), saved, self.micro)
        found = {}
        for arena in self.stage.store.arenas:
            whole = arena.grads.sum(axis=0)
            for param, offset in zip(arena.params, arena.offsets, strict=True):
                assert param.grad.dtype == arena.value.dtype
                found[param.name] = whole[offset : offset + param.shard.size].astype(np.float64)
        return found

    def move(self, direction: dict[str, np.ndarray], step: float) -> None:
        for param in self.stage.store.params:
            param.value += step * direction[param.name].reshape(param.value.shape)


def length(gradients: dict[str, np.ndarray]) -> float:
    return float(np.sqrt(sum((g**2).sum() for g in gradients.values())))


@needs_bfloat16
def test_losses_and_gradients_of_a_model() -> None:
    exact, reduced = Model("float64"), Model("bfloat16")
    assert reduced.loss() == pytest.approx(exact.loss(), rel=2e-4)
    assert reduced.loss() != pytest.approx(exact.loss(), rel=1e-7)  # it is bfloat16 indeed
    expected, found = exact.gradients(), reduced.gradients()
    assert all(param.value.dtype == np.float32 for param in reduced.stage.store.params)
    errors = {name: found[name] - gradient for name, gradient in expected.items()}
    assert length(errors) <= 1e-2 * length(expected)
    for name, error in errors.items():
        assert np.linalg.norm(error) <= 2e-2 * np.linalg.norm(expected[name]), name


@needs_bfloat16
def test_the_gradient_is_the_slope_of_the_exact_loss() -> None:
    """Along itself: an error that is no rounding, a factor say, cannot hide in the tolerance."""
    model, exact = Model("bfloat16"), Model("float64")
    gradient = model.gradients()
    size, step = length(gradient), 1e-4
    along = {name: g / size for name, g in gradient.items()}
    exact.move(along, step)
    above = exact.loss()
    exact.move(along, -2 * step)
    assert (above - exact.loss()) / (2 * step) == pytest.approx(size, rel=1e-3)


# -- runs ------------------------------------------------------------------------------------------

RUN: dict[str, Any] = {
    "model": {"family": "gpt2", "layers": 2, "heads": 4, "width": 64, "context": 32},
    "train": {"steps": 400, "batch_size": 8, "sequence_length": 32},
    "optimizer": {"lr": 1e-3, "warmup": 10},
}


def curve(dtype: str, steps: int) -> Outcome:
    """Losses of a small model that learns the licence's letters."""
    letters = TEXT.read_text()
    kinds = sorted(set(letters))
    text = np.array([kinds.index(letter) for letter in letters], np.uint16)
    table = {**RUN, "model": {**RUN["model"], "vocabulary": len(kinds)}}
    table["train"] = {**RUN["train"], "dtype": dtype}
    trial = Trial(MPI.COMM_SELF, from_table(RunConfig, table), text)
    outcome = trial.run(steps)
    trial.free()
    return outcome


@needs_bfloat16
def test_training_curves_overlap() -> None:
    single, half = (np.array(curve(dtype, 80).losses) for dtype in ("float32", "bfloat16"))
    assert single[0] > 1.4 * single[-10:].mean()  # there is something to see
    assert np.abs(half / single - 1.0).max() <= 5e-3
    smooth_single, smooth_half = (losses.reshape(-1, 10).mean(axis=1) for losses in (single, half))
    assert np.abs(smooth_half / smooth_single - 1.0).max() <= 1e-3


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings of a short run in bfloat16."""
    path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_text(
        "[model]\nlayers = 1\nheads = 2\nwidth = 16\n"
        '[train]\nsteps = 12\nbatch_size = 4\nsequence_length = 16\ndtype = "bfloat16"\n'
        f"[optimizer]\nwarmup = 2\n[data]\ntext = [{json.dumps(str(TEXT))}]\n"
    )
    return path


def train(
    python: Command, config: Path, folder: Path, *more: str, **variables: str
) -> subprocess.CompletedProcess[str]:
    return python("-m", "mpillm", "train", config, f"--run.dir={folder}", *more, **variables)


def state(folder: Path) -> dict[tuple[str, str], np.ndarray]:
    """Every array of the newest checkpoint, whole."""
    with Checkpoint.open(resolve(folder)) as checkpoint:
        return {
            (kind, name): checkpoint.read(kind, name, Shard.whole(checkpoint.shape(name, kind)))
            for kind in checkpoint.kinds()
            for name in checkpoint.names(kind)
        }


@pytest.fixture(scope="module")
def finished(python: Command, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all steps in one go."""
    folder = tmp_path_factory.mktemp("finished") / "run"
    result = train(python, config, folder)
    assert result.returncode == 0, result.stderr
    assert "parameters, bfloat16;" in result.stderr
    return folder


@needs_bfloat16
def test_a_resumed_run_gives_the_same_bits(
    python: Command, config: Path, finished: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "run"
    stopped = train(python, config, folder, "--checkpoint.every=5", "--checkpoint.keep=9")
    assert stopped.returncode == 0, stopped.stderr
    for path in (folder / "checkpoints").glob("step-*"):
        if path.name > "step-00000005":
            shutil.rmtree(path)
    resumed = train(python, config, folder)
    assert "resumed after step 5" in resumed.stderr
    expected, found = state(finished), state(folder)
    assert expected.keys() == found.keys()
    for key, values in expected.items():
        assert values.dtype == np.float32
        assert (values == found[key]).all(), key


@needs_bfloat16
def test_a_run_may_go_on_in_another_precision(
    python: Command, config: Path, finished: Path, tmp_path: Path
) -> None:
    """The state is float32 in both."""
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    result = train(python, config, folder, "--train.dtype=float32", "--train.steps=14")
    assert result.returncode == 0, result.stderr
    assert "parameters, float32;" in result.stderr and "resumed after step 12" in result.stderr


@needs_bfloat16
def test_training_without_bfloat16_is_refused(
    python: Command, config: Path, tmp_path: Path
) -> None:
    result = train(python, config, tmp_path / "run", ONEDNN_MAX_CPU_ISA="AVX2")
    assert result.returncode == 2
    assert result.stderr == (
        "mpillm: error: train.dtype = 'bfloat16': this CPU multiplies no bfloat16 (neither "
        "avx512_bf16 nor amx_bf16); expected train.dtype = 'float32'\n"
    )


@needs_bfloat16
def test_generation_with_and_without_bfloat16(python: Command, finished: Path) -> None:
    arguments = ["-m", "mpillm", "generate", finished, "--prompt=The ", "--max-new-tokens=40"]
    with_it = python(*arguments)
    assert (with_it.returncode, with_it.stderr) == (0, "")
    without = python(*arguments, ONEDNN_MAX_CPU_ISA="AVX2")
    assert without.returncode == 0
    assert without.stderr.startswith("computing in float32: train.dtype = 'bfloat16': this CPU")
    assert without.stderr.count("\n") == 1
    for result in (with_it, without):
        assert result.stdout.startswith("The ") and len(result.stdout) == 4 + 40 + 1
