"""A strict stand-in for CuPy, so that the GPU code path runs on machines without a GPU.

`strict_numpy()` gives an object to use as `xp`. Its arrays keep their elements in NumPy arrays that
nobody else sees, and behave as CuPy's do where code written for NumPy goes wrong:

- they refuse to mix with NumPy arrays, and to become one without being asked (`get`, `asnumpy`);
- every result is an array, if need be of no dimensions, never a NumPy scalar;
- only the names and keywords of `strict_api` are there;
- every copy between host and device is counted, also the hidden ones: `float(a)`, `if a:`,
  printing, and the functions that must know how many elements are nonzero.

Where CuPy leaves a result undefined, this stand-in refuses or spoils it: indices out of range,
repeated indices in an assignment of several values, a matrix product written over its operands, the
contents of `empty`. Types are promoted as NumPy 2 does; as on a GPU, arithmetic never warns.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial
from types import ModuleType, SimpleNamespace
from typing import Any, NoReturn

import numpy as np

from mpillm.array import strict_api as api

__all__ = ["StrictArray", "StrictNumpy", "Transfers", "strict_numpy"]

_EMPTY = frozenset(["empty", "empty_like"])
_PRODUCTS = frozenset(["dot", "matmul"])
_COUNTS_FIRST = frozenset(["argwhere", "flatnonzero", "nonzero", "unique"])
_ANSWERS_THE_HOST = frozenset(["may_share_memory", "shares_memory"])


@dataclass
class Transfers:
    """Copies between host and device so far."""

    to_host: int = 0
    to_device: int = 0
    bytes_to_host: int = 0
    bytes_to_device: int = 0

    def count_to_host(self, nbytes: int) -> None:
        """Note a copy from the device."""
        self.to_host += 1
        self.bytes_to_host += nbytes

    def count_to_device(self, nbytes: int) -> None:
        """Note a copy to the device."""
        self.to_device += 1
        self.bytes_to_device += nbytes


def _array(value: Any) -> Any:
    """The elements of a `StrictArray`; nothing else will do."""
    if isinstance(value, StrictArray):
        return value._data
    raise TypeError(f"Unsupported type {type(value)}")


def _operand(value: Any) -> Any:
    """The elements of a `StrictArray`, or a scalar of Python or NumPy."""
    scalar = isinstance(value, (bool, int, float, complex, np.number, np.bool_))
    return value if scalar else _array(value)


def _argument(label: str, value: Any) -> Any:
    """What NumPy is given for the argument of that name."""
    if label in api.ARRAY:
        return _array(value)
    if label in api.OPERAND:
        return None if value is None else _operand(value)
    if label in api.ARRAYS and not isinstance(value, str):  # the subscripts of einsum
        return [_array(v) for v in value] if isinstance(value, (list, tuple)) else _array(value)
    if isinstance(value, (StrictArray, np.ndarray)):
        raise TypeError(f"Unsupported type {type(value)} as {label}")
    return value


def _overlap(out: Any, operand: Any) -> bool:
    return out is not None and np.may_share_memory(_array(out), operand)


def _index(key: Any) -> tuple[Any, ...]:
    """`key` of `a[key]` in NumPy's terms."""
    parts = []
    for part in key if isinstance(key, tuple) else (key,):
        basic = part is None or part is Ellipsis or isinstance(part, (slice, int, np.integer))
        parts.append(part if basic and not isinstance(part, bool) else _array(part))
    if sum(isinstance(part, np.ndarray) and part.dtype == bool for part in parts) > 1:
        raise IndexError("CuPy takes one boolean array in an index, not more")
    return tuple(parts)


class StrictArray:
    """An array on the pretended device, made by the functions of `StrictNumpy`."""

    __slots__ = ("_data", "_xp")
    __array_ufunc__ = None  # NumPy's operators hand over to ours, its functions raise TypeError
    __hash__ = None  # type: ignore[assignment]  # since == is elementwise

    def __init__(self, data: Any, xp: StrictNumpy) -> None:
        if data.dtype.char not in api.ELEMENT_TYPES:
            raise ValueError(f"Unsupported dtype {data.dtype}")
        self._data = data
        self._xp = xp

    def __array__(self, dtype: Any = None, copy: Any = None) -> NoReturn:
        raise TypeError(
            "Implicit conversion to a NumPy array is not allowed. "
            "Please use `.get()` to construct a NumPy array explicitly."
        )

    def __array_function__(self, func: Any, types: Any, args: Any, kwargs: Any) -> NoReturn:
        raise TypeError(f"numpy.{func.__name__} called with a device array")

    # What the host knows without asking the device.
    shape = property(lambda self: self._data.shape)
    dtype = property(lambda self: self._data.dtype)
    size = property(lambda self: self._data.size)
    ndim = property(lambda self: self._data.ndim)
    nbytes = property(lambda self: self._data.nbytes)
    itemsize = property(lambda self: self._data.itemsize)
    strides = property(lambda self: self._data.strides)
    T = property(lambda self: StrictArray(self._data.T, self._xp))

    @property
    def flags(self) -> SimpleNamespace:
        """Memory layout: `c_contiguous`, `f_contiguous`, `owndata`."""
        names = ("c_contiguous", "f_contiguous", "owndata")
        return SimpleNamespace(**{name: getattr(self._data.flags, name) for name in names})

    def __len__(self) -> int:
        return len(self._data)

    # Copies to and from the host.
    def get(self, stream: None = None, order: Any = "C", out: Any = None) -> Any:
        """A NumPy array with the same elements: a new one, or `out` of the same shape and dtype."""
        if out is None:
            out = np.empty(self.shape, self.dtype, "F" if order == "F" else "C")
        self._match(out)
        if not (out.flags.c_contiguous or out.flags.f_contiguous):
            raise RuntimeError("`out` cannot be specified when copying to non-contiguous ndarray")
        out[...] = self._data
        self._xp.transfers.count_to_host(self.nbytes)
        return out

    def set(self, arr: Any, stream: None = None) -> None:
        """Copy a NumPy array of the same shape and dtype into this contiguous array."""
        self._match(arr)
        if not (self._data.flags.c_contiguous or self._data.flags.f_contiguous):
            raise RuntimeError("Cannot set to non-contiguous array")
        self._data[...] = arr
        self._xp.transfers.count_to_device(self.nbytes)

    def _match(self, host: Any) -> None:
        if not isinstance(host, np.ndarray) or host.dtype != self.dtype:
            raise TypeError(f"{self.dtype} does not match {getattr(host, 'dtype', type(host))}")
        if host.shape != self.shape:
            raise ValueError(f"Shape mismatch: {self.shape} on the device, {host.shape} here")

    def item(self) -> Any:
        """The only element as a Python number."""
        return self.get().item()

    def tolist(self) -> Any:
        """Nested lists of Python numbers."""
        return self.get().tolist()

    def __bool__(self) -> bool:
        return bool(self.get())

    def __int__(self) -> int:
        return int(self.get())

    def __float__(self) -> float:
        return float(self.get())

    def __repr__(self) -> str:
        return repr(self.get())

    def __str__(self) -> str:
        return str(self.get())

    def __format__(self, spec: str) -> str:
        return format(self.get(), spec)

    # Elements, methods and operators.
    def __getitem__(self, key: Any) -> StrictArray:
        index = _index(key)
        arrays = [part for part in index if isinstance(part, np.ndarray)]
        if any(part.dtype == bool for part in arrays):
            self._xp.transfers.count_to_host(8)  # how many are True
        if not arrays and not any(part is Ellipsis for part in index):
            index += (Ellipsis,)  # makes NumPy give a view of a single element, too
        return StrictArray(np.asarray(self._data[index]), self._xp)

    def __setitem__(self, key: Any, value: Any) -> None:
        index, value = _index(key), _operand(value)
        if np.ndim(value) and any(isinstance(part, np.ndarray) for part in index):
            places = np.arange(self.size).reshape(self.shape)[index]
            if np.unique(places).size != places.size:
                raise ValueError("repeated indices: which of the values stays is undefined")
        self._data[index] = value

    def __iter__(self) -> Iterator[StrictArray]:
        return (self[i] for i in range(len(self)))

    def __getattr__(self, name: str) -> Any:
        if name in api.SHORTHANDS:
            return partial(getattr(self._xp, name), self)
        if name in api.METHODS:
            method = getattr(self._data, name)
            return partial(self._xp._call, method, f"ndarray.{name}", api.METHODS[name])
        raise AttributeError(f"{name!r} is not listed as a method of CuPy's arrays")

    def __matmul__(self, other: Any) -> Any:
        return self._xp.matmul(self, other)

    def __rmatmul__(self, other: Any) -> Any:
        return self._xp.matmul(other, self)


def _add_operators() -> None:
    """Give `StrictArray` its operators, each of them an elementwise function."""

    def forward(name: str) -> Callable[..., Any]:
        return lambda self, *other: getattr(self._xp, name)(self, *other)

    def reverse(name: str) -> Callable[..., Any]:
        return lambda self, other: getattr(self._xp, name)(other, self)

    def in_place(name: str) -> Callable[..., Any]:
        return lambda self, other: getattr(self._xp, name)(self, other, out=self)

    for operator, name in {**api.OPERATORS, **api.BINARY_OPERATORS}.items():
        setattr(StrictArray, f"__{operator}__", forward(name))
    for operator, name in api.BINARY_OPERATORS.items():
        setattr(StrictArray, f"__r{operator}__", reverse(name))
        setattr(StrictArray, f"__i{operator}__", in_place(name))


_add_operators()


class _Ufunc:
    """An elementwise function."""

    def __init__(self, name: str, xp: StrictNumpy) -> None:
        self._name, self._xp, self._ufunc = name, xp, getattr(np, name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        if not kwargs.keys() <= {"out", "dtype", "casting"}:
            raise TypeError(f"{self._name}: CuPy does not take {list(kwargs)}")
        inputs, outputs = args[: self._ufunc.nin], args[self._ufunc.nin :]
        out = outputs[0] if outputs else kwargs.pop("out", None)
        target = None if out is None else _array(out)
        with np.errstate(all="ignore"):
            result = self._ufunc(*map(_operand, inputs), out=target, **kwargs)
        return out if out is not None else StrictArray(np.asarray(result), self._xp)

    def at(self, a: Any, indices: Any, b: Any) -> None:
        """Apply to the elements `a[indices]` in place, to a repeated one as often as it occurs."""
        if self._name not in api.SCATTERING or _array(a).dtype.char not in api.ATOMIC:
            raise TypeError(f"cupy.{self._name}.at does not support {a.dtype}")
        self._ufunc.at(_array(a), _index(indices), _operand(b))


class StrictNumpy(ModuleType):
    """What stands for the module `cupy`; `transfers` counts the copies of its arrays."""

    ndarray = StrictArray

    def __init__(self) -> None:
        super().__init__("strict_numpy", __doc__)
        self.transfers = Transfers()
        for name in api.BORROWED:
            setattr(self, name, getattr(np, name))
        for name in api.UFUNCS:
            setattr(self, name, _Ufunc(name, self))
        for name, form in api.FUNCTIONS.items():
            setattr(self, name, partial(self._call, getattr(np, name), name, form))

    def __getattr__(self, name: str) -> Any:
        raise AttributeError(f"{name!r} is not in CuPy's API as listed in {api.__name__}")

    def array(self, obj: Any, dtype: Any = None, copy: bool = True, order: Any = "K") -> Any:
        """A new array with the elements of `obj`: a copy to the device, or on it."""
        if isinstance(obj, StrictArray):
            make = np.array if copy else np.asarray
            data = make(obj._data, dtype=dtype, order=order)
            return obj if data is obj._data else StrictArray(data, self)
        result = StrictArray(np.array(obj, dtype=dtype, order=order), self)
        if result.ndim:  # a scalar travels with the kernel that writes it
            self.transfers.count_to_device(result.nbytes)
        return result

    def asarray(self, a: Any, dtype: Any = None, order: Any = None) -> Any:
        """`a` itself where it is a device array of that type, else `array(a, dtype)`."""
        return self.array(a, dtype, copy=False, order=order or "K")

    def asnumpy(self, a: Any, stream: None = None, order: Any = "C", out: Any = None) -> Any:
        """`a.get()` of a device array; anything else as a NumPy array."""
        return a.get(stream, order, out) if isinstance(a, StrictArray) else np.asarray(a)

    def _call(
        self, function: Callable[..., Any], name: str, form: api.Form, *args: Any, **kwargs: Any
    ) -> Any:
        """Call NumPy's function after a check that CuPy's would take the arguments."""
        labels = form.label(name, args, kwargs)
        if name in ("argsort", "sort") and kwargs.setdefault("kind", "stable") != "stable":
            raise ValueError("kind can only be 'stable'")
        out = {**dict(zip(labels, args, strict=True)), **kwargs}.get("out")
        values = [_argument(label, value) for label, value in zip(labels, args, strict=True)]
        named = {label: _argument(label, value) for label, value in kwargs.items()}
        if name in _PRODUCTS and any(_overlap(out, value) for value in values[:2]):
            raise ValueError(f"{name}: an `out` that overlaps an operand is undefined")
        with np.errstate(all="ignore"):
            result = function(*values, **named)
        if name in _EMPTY:
            result.fill(np.nan if result.dtype.kind in "fc" else 77)
        if name in _COUNTS_FIRST or (name == "where" and len(args) == 1):
            self.transfers.count_to_host(8)
        if out is not None:
            return out
        return result if name in _ANSWERS_THE_HOST else self._wrap(result)

    def _wrap(self, result: Any) -> Any:
        if isinstance(result, (list, tuple)):
            return type(result)(self._wrap(part) for part in result)
        return None if result is None else StrictArray(np.asarray(result), self)


def strict_numpy() -> StrictNumpy:
    """A new stand-in for the module `cupy`, with transfer counts of its own."""
    return StrictNumpy()
