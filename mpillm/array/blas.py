"""Matrix products that are added to their destination, by the BLAS that NumPy brings along.

NumPy has no call for C = A B + C: a weight gradient would be computed apart and then added, with a
temporary as large as the weight. The BLAS underneath has one, and NumPy's wheels export it.
"""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any

import numpy as np

__all__ = ["Gemm", "stored"]

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
        of_a, of_b, of_out = stored(a), stored(b), stored(out)
        if of_a is None or of_b is None or of_out is None or of_out[0]:
            return False
        trans_a, trans_b = (_TRANS if turned else _NO_TRANS for turned, _ in (of_a, of_b))
        function(
            *(_ROW_MAJOR, trans_a, trans_b, m, n, k, 1.0, a.ctypes.data, of_a[1]),
            *(b.ctypes.data, of_b[1], 1.0, out.ctypes.data, of_out[1]),
        )
        return True


def stored(x: Any) -> tuple[bool, int] | None:
    """How BLAS is told where a matrix lies: (transposed, elements between its rows as they lie).

    None where neither its rows nor its columns lie in one piece, one after the other.
    """
    (rows, columns), (row, column), size = x.shape, x.strides, x.itemsize
    if column == size or columns == 1:
        if rows == 1:
            return False, columns
        if row >= columns * size and row % size == 0:
            return False, row // size
    if row == size or rows == 1:
        if columns == 1:
            return True, rows
        if column >= rows * size and column % size == 0:
            return True, column // size
    return None
