"""Matrix products that are added to their destination, by the BLAS that NumPy brings along.

NumPy has no call for C = A B + C: a weight gradient would be computed apart and then added, with a
temporary as large as the weight. The BLAS underneath has one, and NumPy's wheels export it.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Gemm"]

_ROW_MAJOR, _NO_TRANS, _TRANS = 101, 111, 112

# By dtype: the symbol in NumPy's wheels, whose integers have 64 bits, and the type of its scalars.
_SYMBOLS: dict[str, tuple[str, Any]] = {
    "float32": ("scipy_cblas_sgemm64_", ctypes.c_float),
    "float64": ("scipy_cblas_dgemm64_", ctypes.c_double),
}


class Gemm:
    """`cblas_?gemm` of NumPy's own OpenBLAS, where it can be found: `add` says whether it could."""

    def __init__(self) -> None:
        self._functions: dict[str, Any] = {}
        folder = Path(np.__file__).parent.parent / "numpy.libs"
        for path in sorted(folder.glob("libscipy_openblas64_*.so")):
            library = ctypes.CDLL(str(path))  # which NumPy has loaded: one more handle of it
            for dtype, (symbol, scalar) in _SYMBOLS.items():
                function = getattr(library, symbol, None)
                if function is not None:
                    integer, pointer = ctypes.c_int64, ctypes.c_void_p
                    function.restype = None
                    function.argtypes = (
                        *(ctypes.c_int, ctypes.c_int, ctypes.c_int, integer, integer, integer),
                        *(scalar, pointer, integer, pointer, integer, scalar, pointer, integer),
                    )
                    self._functions[dtype] = function

    def add(self, a: Any, b: Any, out: Any) -> bool:
        """out += a @ b for matrices (m, k), (k, n), (m, n); False, and nothing done, if it cannot.

        Operands may be transposed or have a longer stride between rows; `out` must have its rows in
        order.
        """
        function = self._functions.get(out.dtype.name)
        if function is None or a.ndim != 2 or b.ndim != 2 or not a.dtype == b.dtype == out.dtype:
            return False
        (m, k), n = a.shape, b.shape[1]
        if not m or not n or not k:
            return False
        places = _stored(a), _stored(b), _stored(out)
        if None in places or places[2][0] != _NO_TRANS:  # type: ignore[index]
            return False
        (trans_a, stride_a), (trans_b, stride_b), (_, stride) = places  # type: ignore[misc]
        function(
            *(_ROW_MAJOR, trans_a, trans_b, m, n, k, 1.0, a.ctypes.data, stride_a),
            *(b.ctypes.data, stride_b, 1.0, out.ctypes.data, stride),
        )
        return True


def _stored(x: Any) -> tuple[int, int] | None:
    """How BLAS is told where a matrix lies: transposed or not, elements between rows; else None."""
    row, column = x.strides
    size = x.itemsize
    if column == size and row >= x.shape[1] * size and row % size == 0:
        return _NO_TRANS, row // size
    if row == size and column >= x.shape[0] * size and column % size == 0:
        return _TRANS, column // size
    return None
