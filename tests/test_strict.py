"""The strict stand-in for CuPy: it computes what NumPy does and refuses what CuPy refuses."""

from __future__ import annotations

import inspect
import operator
from typing import Any

import numpy as np
import pytest

from mpillm.array import strict_api as api
from mpillm.array.random import KeyedRandom
from mpillm.array.strict import StrictArray, StrictNumpy, strict_numpy

HOST = np.arange(6, dtype=np.float32).reshape(2, 3)


@pytest.fixture
def xp() -> StrictNumpy:
    return strict_numpy()


@pytest.fixture
def a(xp: Any) -> Any:
    return xp.asarray(HOST)


def same(device: Any, host: Any) -> bool:
    """Whether a device array has the type, the shape and the bits of a host array."""
    host = np.asarray(host)
    assert isinstance(device, StrictArray)
    return device.dtype == host.dtype and np.array_equal(device.get(), host, equal_nan=True)


BINARY = [
    operator.add, operator.sub, operator.mul, operator.truediv, operator.floordiv, operator.mod,
    operator.pow, operator.lt, operator.le, operator.eq, operator.ne, operator.gt, operator.ge,
]  # fmt: skip
BITS = [operator.and_, operator.or_, operator.xor, operator.lshift, operator.rshift]


@pytest.mark.parametrize("apply", BINARY)
@pytest.mark.parametrize("scalar", [2, 0.5, True, np.float32(3), np.float64(3), np.int64(3)])
def test_operators_promote_as_numpy_does(xp: Any, a: Any, apply: Any, scalar: Any) -> None:
    on_host = np.power if apply is operator.pow else apply  # NumPy's ** 0.5 may round as sqrt does
    with np.errstate(all="ignore"):
        assert same(apply(a, scalar), on_host(HOST, scalar))
        assert same(apply(scalar, a), on_host(scalar, HOST))
        assert same(apply(a, a[0]), on_host(HOST, HOST[0]))


@pytest.mark.parametrize("apply", BITS)
def test_bit_operators(xp: Any, apply: Any) -> None:
    host = np.array([0xDEADBEEF, 3, 7], dtype=np.uint32)
    assert same(apply(xp.asarray(host), xp.uint32(5)), apply(host, np.uint32(5)))
    assert same(~xp.asarray(host), ~host)


@pytest.mark.parametrize(
    "mix",
    [
        lambda a, xp: a + HOST,
        lambda a, xp: HOST + a,
        lambda a, xp: a == HOST,
        lambda a, xp: operator.lt(HOST, a),
        lambda a, xp: a @ HOST.T,
        lambda a, xp: HOST.T @ a,
        lambda a, xp: a.__iadd__(HOST),
        lambda a, xp: HOST.copy().__iadd__(a),
        lambda a, xp: a + np.array(1.0),
        lambda a, xp: operator.add(a, [1.0, 2.0, 3.0]),
        lambda a, xp: operator.eq(a, None),
        lambda a, xp: xp.maximum(a, HOST),
        lambda a, xp: xp.where(a > 1, a, HOST),
        lambda a, xp: xp.concatenate([a, HOST]),
        lambda a, xp: xp.einsum("ij,ij->i", a, HOST),
        lambda a, xp: xp.sum(HOST),
        lambda a, xp: xp.sum([1.0, 2.0]),
        lambda a, xp: xp.add(a, 1, out=HOST.copy()),
        lambda a, xp: xp.copyto(a, HOST),
        lambda a, xp: xp.full(3, np.array(1.0)),
        lambda a, xp: xp.zeros(a[0, 2].astype(int)),
        lambda a, xp: xp.zeros((a[0, 2].astype(int), 3)),
        lambda a, xp: xp.sum(a, axis=a[0, 1].astype(int)),
        lambda a, xp: a[np.array([0])],
        lambda a, xp: a[[0]],
        lambda a, xp: a[True],
        lambda a, xp: a[: a[0, 1].astype(int)],
        lambda a, xp: a.__setitem__(0, HOST[0]),
        lambda a, xp: HOST.copy().__setitem__(0, a[0]),
        lambda a, xp: range(a[0, 1].astype(int)),
        lambda a, xp: np.asarray(a),
        lambda a, xp: np.exp(a),
        lambda a, xp: np.sum(a),
        lambda a, xp: np.matmul(HOST.T, a),
        lambda a, xp: np.copyto(HOST.copy(), a),
        lambda a, xp: np.add(HOST, 1, out=a),
        lambda a, xp: xp.array([a, a]),
        lambda a, xp: memoryview(a),
        lambda a, xp: hash(a),
    ],
)
def test_nothing_mixes_host_and_device(xp: Any, a: Any, mix: Any) -> None:
    before = repr(xp.transfers)
    with pytest.raises(TypeError):
        mix(a, xp)
    assert repr(xp.transfers) == before
    assert same(a, HOST)


def test_messages_are_cupys(a: Any) -> None:
    with pytest.raises(TypeError, match=r"Unsupported type <class 'numpy.ndarray'>"):
        a + HOST
    with pytest.raises(TypeError, match=r"not allowed. Please use `.get\(\)`"):
        np.asarray(a)


def test_what_cupy_does_not_have_is_refused(xp: Any, a: Any) -> None:
    with pytest.raises(AttributeError, match="'put_along_axis' is not in CuPy's API"):
        _ = xp.put_along_axis
    with pytest.raises(AttributeError, match="ptp"):
        a.ptp()
    refused: list[Any] = [
        lambda: xp.add(a, 1, where=a > 1),
        lambda: xp.sum(a, where=a > 1),
        lambda: a.max(initial=0),
        lambda: a.astype(xp.int32, casting="safe"),
        lambda: xp.argmax(a, 0, None),  # the third is dtype in CuPy and out in NumPy
        lambda: xp.add.at(xp.zeros(3, xp.int64), xp.arange(3), 1),
        lambda: xp.multiply.at(xp.zeros(3), xp.arange(3), 1.0),
    ]
    for call in refused:
        with pytest.raises(TypeError):
            call()
    with pytest.raises(ValueError, match="kind"):
        xp.argsort(a, kind="quicksort")
    with pytest.raises(ValueError, match="dtype"):
        xp.array(["text"])
    with pytest.raises(IndexError, match="boolean"):
        a[xp.ones(2, bool), xp.ones(3, bool)]


def test_every_result_is_an_array(xp: Any, a: Any) -> None:
    for name in ("sum", "max", "min", "mean", "std", "argmax", "any", "all", "prod"):
        for result in (getattr(a, name)(), getattr(xp, name)(a)):
            assert same(result, getattr(HOST, name)()) and result.shape == ()
    for result in (xp.dot(a[0], a[0]), xp.vdot(a, a), xp.count_nonzero(a), xp.array_equal(a, a)):
        assert isinstance(result, xp.ndarray) and result.shape == ()
    assert a[1, 2].shape == a[1][2].shape == a[xp.asarray(1), 2].shape == ()
    assert same(a.mean(axis=0, keepdims=True), HOST.mean(axis=0, keepdims=True))
    assert same(xp.sqrt(4.0), 2.0)


def test_views_share_memory_and_copies_do_not(xp: Any, a: Any) -> None:
    a[1, 2] += 1.0
    a[0][...] = 9.0
    a.T[1] *= 2.0
    a.reshape(-1)[3:4] = 5.0
    row = a[1]
    row -= a[1] * 0.5
    expected = np.array([[9, 18, 9], [2.5, 4, 3]], dtype=np.float32)
    assert same(a, expected) and row.shape == (3,)
    assert xp.shares_memory(a, a.swapaxes(0, 1)) and not xp.shares_memory(a, a.copy())
    assert a.T.strides == a.strides[::-1] and a.T.flags.f_contiguous and not a.T.flags.c_contiguous
    host = HOST.copy()
    device = xp.asarray(host)
    host[:] = 0
    assert same(device, HOST) and xp.asarray(device) is device


def test_index_arrays(xp: Any, a: Any) -> None:
    rows, columns = xp.asarray([1, 0, 1]), xp.asarray([2, 2, 0])
    assert same(a[rows], HOST[[1, 0, 1]])
    assert same(a[rows, columns], HOST[[1, 0, 1], [2, 2, 0]])
    assert same(a[a > 2], HOST[HOST > 2])
    a[a > 2] = 0
    a[rows[:2], columns[:2]] = xp.asarray([7.0, 8.0])
    assert same(a, np.array([[0, 1, 8], [0, 0, 7]], dtype=np.float32))
    with pytest.raises(ValueError, match="repeated"):
        a[rows] = xp.ones((3, 3))
    with pytest.raises(IndexError):
        a[xp.asarray([2])]
    xp.add.at(a, rows, xp.ones((3, 3), xp.float32))
    assert same(a, np.array([[1, 2, 9], [2, 2, 9]], dtype=np.float32))


def test_out_arguments(xp: Any, a: Any) -> None:
    out = xp.empty((2, 3), xp.float32)
    assert bool(xp.isnan(out).all())  # what `empty` holds must not matter
    assert xp.multiply(a, 2, out) is out and same(out, HOST * 2)
    assert xp.exp(a, out=out) is out and same(out, np.exp(HOST))
    square = xp.empty((2, 2), xp.float32)
    assert xp.matmul(a, a.T, out=square) is square and same(square, HOST @ HOST.T)
    total = xp.empty(3, xp.float32)
    assert a.sum(axis=0, out=total) is total and same(total, HOST.sum(axis=0))
    with pytest.raises(ValueError, match="overlaps"):
        xp.matmul(square, a[:, :2], out=square)
    with pytest.raises(TypeError):
        xp.arange(3).__iadd__(0.5)


def test_functions_agree_with_numpy(xp: Any, a: Any) -> None:
    assert same(xp.einsum("ij,kj->ik", a, a), HOST @ HOST.T)
    assert same(a @ a.T, HOST @ HOST.T)
    assert same(xp.where(a > 2, a, 0.0), np.where(HOST > 2, HOST, np.float32(0)))
    assert same(xp.concatenate((a, a), axis=1), np.concatenate((HOST, HOST), axis=1))
    assert same(xp.stack([a, a]).transpose(2, 0, 1), np.stack([HOST, HOST]).transpose(2, 0, 1))
    assert same(xp.take(a, xp.asarray([2, 0]), axis=1), np.take(HOST, [2, 0], axis=1))
    assert same(xp.cumsum(a, axis=1), np.cumsum(HOST, axis=1))
    assert same(xp.argsort(-a, axis=1), np.argsort(-HOST, axis=1))
    assert same(xp.searchsorted(a[1], a[0], side="right"), np.searchsorted(HOST[1], HOST[0]))
    assert same(xp.full_like(a, 7, shape=(2,)), np.full(2, 7, np.float32))
    assert same(a.clip(1, 3).astype(xp.int32).ravel(), HOST.clip(1, 3).astype(np.int32).ravel())
    assert same(xp.split(a, [1], axis=1)[1], HOST[:, 1:])
    assert all(same(i, j) for i, j in zip(xp.nonzero(a), np.nonzero(HOST), strict=True))
    a.fill(3)
    assert same(a / 0, np.full((2, 3), np.inf, np.float32))  # and no warning


def test_transfers_are_counted(xp: Any) -> None:
    a = xp.asarray(HOST)
    b = xp.asarray(a) * 2 + xp.full((2, 3), 5, xp.float32)
    xp.asarray(1.5)
    assert (xp.transfers.to_device, xp.transfers.bytes_to_device) == (1, 24)
    assert (xp.transfers.to_host, xp.transfers.bytes_to_host) == (0, 0)
    host = np.empty((2, 3), np.float32)
    assert b.get(out=host) is host and np.array_equal(host, HOST * 2 + 5)
    a.set(host)
    assert (xp.transfers.to_device, xp.transfers.bytes_to_device) == (2, 48)
    assert (xp.transfers.to_host, xp.transfers.bytes_to_host) == (1, 24)
    reads: list[Any] = [
        lambda: float(a[0, 0]), lambda: int(a[0, 0]), lambda: bool(a[0, 0] > 0),
        lambda: a[0, 0].item(), lambda: a.tolist(), lambda: xp.asnumpy(a), lambda: f"{a[0, 0]:.2f}",
        lambda: str(a), lambda: repr(a), lambda: a[a > 0], lambda: xp.nonzero(a),
        lambda: xp.where(a), lambda: xp.unique(a), lambda: max(a[0, 0], a[0, 1]),
    ]  # fmt: skip
    for number, read in enumerate(reads, start=2):
        read()
        assert xp.transfers.to_host == number
    for wrong in (np.empty((2, 3)), np.empty((3, 2), np.float32), [0.0]):
        with pytest.raises((TypeError, ValueError)):
            a.get(out=wrong)
        with pytest.raises((TypeError, ValueError)):
            a.set(wrong)


def test_random_numbers_have_the_same_bits(xp: Any) -> None:
    index = np.arange(50, dtype=np.uint64)
    counters = np.arange(3, 9, dtype=np.uint32)
    for name, args in (("normal", (7, index)), ("fold", (7, index)), ("bits", (index, counters))):
        host = getattr(KeyedRandom(np), name)(*args)
        given = [xp.asarray(arg) if isinstance(arg, np.ndarray) else arg for arg in args]
        assert same(getattr(KeyedRandom(xp), name)(*given), host)


def test_the_listed_api_is_cupys() -> None:
    cupy = pytest.importorskip("cupy", exc_type=ImportError)
    assert all(getattr(cupy, name) is getattr(np, name) for name in api.BORROWED)
    for name in api.UFUNCS:
        assert isinstance(getattr(cupy, name), cupy.ufunc), name
        assert getattr(cupy, name).nin == getattr(np, name).nin, name
    for name in [*api.SHORTHANDS, *api.METHODS, "get", "set", "item", "tolist"]:
        assert hasattr(cupy.ndarray, name), name
    for name, form in api.FUNCTIONS.items():
        if name in ("matmul", "einsum"):  # callable objects without a signature
            assert hasattr(cupy, name)
            continue
        names = list(inspect.signature(getattr(cupy, name)).parameters)
        assert names[: len(form.positional)] == list(form.positional), name
        assert form.repeated or form.keywords <= set(names), name
