"""Matrix products by oneDNN, on CPUs; everything else is that of `FastNumpyOps`.

Operands may be bfloat16 (Kalamkar et al. 2019, "A Study of BFLOAT16 for Deep Learning Training"):
they have float32's range with 8 significant bits, the terms of a product are added up in float32,
and weights, moments and whatever is no product stay float32. No loss scaling is needed.
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

    def gelu_forward(self, x: Any) -> tuple[Any, Any]:
        """As the reference; the slope is kept for the backward pass in bfloat16."""
        y, slope = super().gelu_forward(x)
        return y, self.operand(slope)

    def gelu_backward(self, dy: Any, saved: Any) -> Any:
        """As the reference."""
        if saved.dtype == dy.dtype:
            return super().gelu_backward(dy, saved)
        dx = np.empty(dy.shape, np.float32)
        # A bfloat16 number is the first half of the float32 number.
        np.left_shift(saved.view(np.uint16), 16, out=dx.view(np.uint32), dtype=np.uint32)
        dx *= dy
        return dx
