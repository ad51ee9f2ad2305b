"""Matrix products by oneDNN, on CPUs; everything else is that of `FastNumpyOps`.

With bfloat16 operands (Kalamkar et al. 2019, "A Study of BFLOAT16 for Deep Learning Training") these
have float32's range with 8 significant bits, the terms of a product are added up in float32, and
weights, moments and whatever is no product stay float32. No loss scaling is needed.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from mpillm.array.fast_numpy import FastNumpyOps
from mpillm.array.onednn import OneDnn

__all__ = ["Bfloat16NumpyOps", "OneDnnNumpyOps"]


class OneDnnNumpyOps(FastNumpyOps):
    """The tuned NumPy operations with products by oneDNN, in the precision of their operands."""

    def __init__(self, xp: ModuleType, onednn: OneDnn) -> None:
        super().__init__(xp)
        self._onednn = onednn

    def matmul(self, a: Any, b: Any, out: Any = None, accumulate: bool = False) -> Any:
        """As the reference; of bfloat16 operands the product is float32.

        oneDNN has no float64, which stays with BLAS. TypeError for operands of different types.
        """
        if a.dtype == np.float64 == b.dtype:
            return super().matmul(a, b, out, accumulate)
        return self._onednn.matmul(a, b, out, accumulate)


class Bfloat16NumpyOps(OneDnnNumpyOps):
    """The same with bfloat16 operands.

    Products of float32 operands, such as a router's, are oneDNN's, too: a second library's threads
    would take the cores from the first's.
    """

    def operand(self, x: Any) -> Any:
        """A C-contiguous bfloat16 copy of a float32 array; any other array itself."""
        return self._onednn.to_bfloat16(x) if x.dtype == np.float32 else x
