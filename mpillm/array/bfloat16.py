"""Matrix products of bfloat16 operands on CPUs; everything else is that of `FastNumpyOps`.

Kalamkar et al. 2019, "A Study of BFLOAT16 for Deep Learning Training": operands have float32's
range with 8 significant bits, the terms of a product are added up in float32, and weights, moments
and whatever is no product stay float32. No loss scaling is needed.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

import numpy as np

from mpillm.array.fast_numpy import FastNumpyOps
from mpillm.array.onednn import OneDnn

__all__ = ["Bfloat16NumpyOps"]


class Bfloat16NumpyOps(FastNumpyOps):
    """The tuned NumPy operations with products by oneDNN, in the precision of their operands."""

    def __init__(self, xp: ModuleType, onednn: OneDnn) -> None:
        super().__init__(xp)
        self._onednn = onednn

    def operand(self, x: Any) -> Any:
        """A C-contiguous bfloat16 copy of a float32 array; any other array itself."""
        return self._onednn.to_bfloat16(x) if x.dtype == np.float32 else x

    def matmul(self, a: Any, b: Any, out: Any = None, accumulate: bool = False) -> Any:
        """As the reference; of bfloat16 operands the product is float32.

        Of float32 operands it is oneDNN's, too: a second library's threads would take the cores
        from the first's. TypeError for operands of different types.
        """
        if a.dtype == np.float64 == b.dtype:
            return super().matmul(a, b, out, accumulate)
        return self._onednn.matmul(a, b, out, accumulate)
