"""The array library of a process: NumPy (also with oneDNN), CuPy, or NumPy behind CuPy's rules.

One `Backend` is made by the entry point and handed to everything that computes. It holds the
library (`xp`), the operations (`ops`: the tuned version of each where there is one, else the
reference), the keyed random numbers (`random`) and the ways between host and device.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from mpillm.array.fast_numpy import FastNumpyOps
from mpillm.array.ops import Ops
from mpillm.array.random import KeyedRandom
from mpillm.array.strict import strict_numpy
from mpillm.errors import UserError, did_you_mean

__all__ = ["BACKENDS", "Array", "Backend"]

# An array of whichever library the backend holds; no common static type exists for them.
Array = Any

BACKENDS = ("numpy", "onednn", "cupy", "strict")


class Backend:
    """An array library with its operations, on one device."""

    def __init__(self, name: str, xp: ModuleType, ops: Ops) -> None:
        self.name = name
        self.xp = xp
        self.ops = ops
        self.random = KeyedRandom(xp)
        self.host_random = KeyedRandom(np)
        # Strict arrays and CuPy arrays live where MPI and HDF5 cannot read them.
        self.on_host = xp is np

    @classmethod
    def create(cls, name: str, device: int | None = None, dtype: str = "float32") -> Backend:
        """Make the backend `name`; `device` is the GPU's number, None for the current one.

        "onednn" is NumPy with oneDNN for its products. dtype: "bfloat16" for products of bfloat16
        operands; others are what the arrays say. UserError where the backend, or bfloat16 with it,
        cannot be had.
        """
        if (dtype == "bfloat16" and name in BACKENDS) or name == "onednn":
            return cls(name, np, _onednn_ops(name, dtype))
        if name == "numpy":
            return cls(name, np, FastNumpyOps(np))
        if name == "strict":
            xp = strict_numpy()
            return cls(name, xp, Ops(xp))
        if name == "cupy":
            try:
                import cupy
            except ImportError as error:
                raise UserError(
                    f"run.backend = 'cupy': CuPy cannot be imported ({error}); "
                    "install it with: pip install 'mpillm[cuda13]' or 'mpillm[cuda12]'"
                ) from None
            try:
                cupy.cuda.Device(device).use()
                cupy.cuda.runtime.getDeviceProperties(cupy.cuda.Device().id)
            except cupy.cuda.runtime.CUDARuntimeError as error:
                raise UserError(f"run.backend = 'cupy': no usable GPU {device}: {error}") from None
            return cls(name, cupy, Ops(cupy))
        raise UserError(f"run.backend: no backend {name!r}; {did_you_mean(name, BACKENDS)}")

    def dtype(self, name: str) -> np.dtype[Any]:
        """The type of arrays where the settings say `name`; bfloat16 is that of operands only."""
        return np.dtype("float32" if name == "bfloat16" else name)

    def empty(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array with undefined contents."""
        return self.xp.empty(shape, dtype=dtype)

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array of zeros."""
        return self.xp.zeros(shape, dtype=dtype)

    def from_host(self, array: np.ndarray) -> Array:
        """A device array with the contents of a NumPy array; the array itself where it is one."""
        return self.xp.asarray(array)

    def to_host(self, array: Array) -> np.ndarray:
        """A NumPy array with the contents of a device array; the array itself where it is one."""
        if self.on_host:
            return np.asarray(array)
        host: np.ndarray = self.xp.asnumpy(array)
        return host

    def synchronize(self) -> None:
        """Wait until the device has done all that was asked of it."""
        if self.name == "cupy":
            self.xp.cuda.get_current_stream().synchronize()


def _onednn_ops(name: str, dtype: str) -> Ops:
    """Operations with products by oneDNN, or a UserError that says why there are none.

    oneDNN is loaded here, so that only those who want it need it.
    """
    half = dtype == "bfloat16"
    setting = "train.dtype = 'bfloat16'" if half else f"run.backend = {name!r}"
    if name not in ("numpy", "onednn"):
        raise UserError(f"{setting}: run.backend = {name!r} has no bfloat16; expected 'numpy'")
    from mpillm.array.fast_onednn import Bfloat16NumpyOps, OneDnnNumpyOps
    from mpillm.array.onednn import OneDnn, OneDnnError

    try:
        onednn = OneDnn()
    except OneDnnError as error:
        raise UserError(f"{setting}: {error}") from None
    if not half:
        return OneDnnNumpyOps(np, onednn)
    if not onednn.multiplies_bfloat16:
        raise UserError(
            f"{setting}: this CPU multiplies no bfloat16 (neither avx512_bf16 nor amx_bf16); "
            "expected train.dtype = 'float32'"
        )
    return Bfloat16NumpyOps(np, onednn)
