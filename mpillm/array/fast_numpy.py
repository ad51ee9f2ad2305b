"""Tuned NumPy versions of some operations: tiled and in place, so that work stays in cache."""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

import numpy as np

from mpillm.array.blas import Gemm
from mpillm.array.fast_attention import FastAttention
from mpillm.array.ops import _GELU_A, _GELU_B

__all__ = ["FastNumpyOps"]

# Elements in a tile: a few float32 tiles fit in a core's second-level cache.
_TILE = 1 << 16


class FastNumpyOps(FastAttention):
    """The reference, with the elementwise work done tile by tile.

    Sums are products with a vector of ones: BLAS is several times faster than NumPy's reductions. A
    sum within a row is a dot product, whose bits do not depend on how many rows there are.
    """

    def __init__(self, xp: ModuleType) -> None:
        super().__init__(xp)
        self._gemm = Gemm()

    def matmul(self, a: Any, b: Any, out: Any = None, accumulate: bool = False) -> Any:
        """As the reference, without a temporary where BLAS can add to `out`."""
        if not accumulate or not self._gemm.add(a, b, out):
            return super().matmul(a, b, out, accumulate)
        return out

    def sum_rows(self, x_no: Any, out_o: Any) -> None:
        """As the reference."""
        out_o += np.ones(x_no.shape[0], dtype=x_no.dtype) @ x_no

    def layernorm_forward(
        self, x_nd: Any, gain_d: Any, bias_d: Any, eps: float = 1e-5
    ) -> tuple[Any, Any]:
        """As the reference."""
        d = x_nd.shape[-1]
        hat, y = np.empty_like(x_nd, order="C"), np.empty_like(x_nd, order="C")
        x_rows, hat_rows, y_rows = (array.reshape(-1, d) for array in (x_nd, hat, y))
        inverse = np.empty((len(x_rows), 1), dtype=x_nd.dtype)
        average = np.full(d, 1.0 / max(d, 1), dtype=x_nd.dtype)
        for part in _row_tiles(x_rows):
            centred = hat_rows[part]
            mean = np.vecdot(x_rows[part], average)
            np.subtract(x_rows[part], mean[:, None], out=centred)
            scale = inverse[part]
            np.vecdot(centred, centred, out=scale[:, 0])
            scale *= 1.0 / max(d, 1)
            scale += eps
            np.sqrt(scale, out=scale)
            np.reciprocal(scale, out=scale)
            centred *= scale
            np.multiply(centred, gain_d, out=y_rows[part])
            if bias_d is not None:
                y_rows[part] += bias_d
        return y, (hat, inverse, gain_d, bias_d is not None)

    def layernorm_backward(self, dy_nd: Any, saved: Any) -> tuple[Any, Any, Any]:
        """As the reference."""
        hat, inverse, gain_d, has_bias = saved
        d = hat.shape[-1]
        dx = np.empty_like(hat)
        dy_rows, hat_rows, dx_rows = (array.reshape(-1, d) for array in (dy_nd, hat, dx))
        dgain_d = np.zeros(d, dtype=hat.dtype)
        dbias_d = np.zeros(d, dtype=hat.dtype) if has_bias else None
        average = np.full(d, 1.0 / max(d, 1), dtype=hat.dtype)
        tiles = _row_tiles(dy_rows)
        work = np.empty((tiles[0].stop if tiles else 0, d), dtype=hat.dtype)
        ones = np.ones(len(work), dtype=hat.dtype)
        for part in tiles:
            dy, centred, out = dy_rows[part], hat_rows[part], dx_rows[part]
            product, ones_n = work[: len(dy)], ones[: len(dy)]
            np.multiply(dy, centred, out=product)
            dgain_d += ones_n @ product
            if dbias_d is not None:
                dbias_d += ones_n @ dy
            np.multiply(dy, gain_d, out=out)
            mean = np.vecdot(out, average)
            projection = np.vecdot(product, gain_d * average)
            out -= mean[:, None]
            np.multiply(centred, projection[:, None], out=product)
            out -= product
            out *= inverse[part]
        return dx, dgain_d, dbias_d

    def gelu_forward(self, x: Any) -> tuple[Any, Any]:
        """As the reference; what is saved is the slope at x."""
        x = np.ascontiguousarray(x)
        y, slope = np.empty_like(x), np.empty_like(x)
        flat_x, flat_y, flat_slope = x.reshape(-1), y.reshape(-1), slope.reshape(-1)
        work = np.empty(min(_TILE, x.size), dtype=x.dtype)
        for part in _tiles(x.size):
            xs, ys, half = flat_x[part], flat_y[part], flat_slope[part]
            square = work[: xs.size]
            # half = (1 + tanh(u)) / 2, y = x * half; as 1 - tanh^2 = 4 half (1 - half),
            # slope = half + y (1 - half) 2 u', u' = a (1 + 3 b x^2).
            np.multiply(xs, xs, out=square)
            np.multiply(square, _GELU_A * _GELU_B, out=half)
            half += _GELU_A
            half *= xs
            np.tanh(half, out=half)
            half *= 0.5
            half += 0.5
            np.multiply(xs, half, out=ys)
            square *= 6.0 * _GELU_A * _GELU_B
            square += 2.0 * _GELU_A
            square *= ys
            np.subtract(1.0, half, out=ys)
            square *= ys
            np.multiply(xs, half, out=ys)
            half += square
        return y, slope

    def gelu_backward(self, dy: Any, saved: Any) -> Any:
        """As the reference, in place of what was saved."""
        saved *= dy
        return saved

    def dropout_backward(self, dy_nd: Any, saved: Any) -> Any:
        """As the reference; a product with a bool array would first convert all of it."""
        keep_nd, drop = saved
        scale = np.asarray(1.0 / (1.0 - drop), dtype=dy_nd.dtype)
        dx_nd = np.multiply(keep_nd, scale, dtype=dy_nd.dtype)
        dx_nd *= dy_nd
        return dx_nd

    def embedding_backward(self, dy: Any, ids: Any, grad_vd: Any, first: int = 0) -> None:
        """As the reference; rows are sorted by id and each run of equal ids is summed at once."""
        v, d = grad_vd.shape
        local = ids.reshape(-1) - first
        rows = np.flatnonzero((local >= 0) & (local < v))
        if rows.size == 0:
            return
        rows = rows[np.argsort(local[rows], kind="stable")]
        local = local[rows]
        starts = np.flatnonzero(np.diff(local, prepend=local[0] - 1))
        grad_vd[local[starts]] += np.add.reduceat(dy.reshape(-1, d)[rows], starts, axis=0)

    def cross_entropy_forward(
        self, logits_nv: Any, row_max_n: Any, labels_n: Any, first: int = 0
    ) -> Any:
        """As the reference."""
        n, v = logits_nv.shape
        sums = np.zeros((2, n), dtype=logits_nv.dtype)
        if v == 0:
            return sums
        inside, column = _columns(labels_n, first, v)
        sums[1] = (logits_nv[np.arange(n), column] - row_max_n) * inside
        ones = np.ones(v, dtype=logits_nv.dtype)
        for part in _row_tiles(logits_nv):
            rows = logits_nv[part]
            rows -= row_max_n[part, None]
            np.exp(rows, out=rows)
            np.matmul(rows, ones, out=sums[0, part])
        return sums

    def embedding_forward(self, table_vd: Any, ids: Any, first: int = 0) -> Any:
        """As the reference; nothing is multiplied where all ids are inside."""
        v, d = table_vd.shape
        if v == 0:
            return np.zeros((*ids.shape, d), dtype=table_vd.dtype)
        inside, local = _columns(ids, first, v)
        rows = np.take(table_vd, local, axis=0)
        if not inside.all():
            rows *= inside[..., None]
        return rows

    def sum_of_squares(self, x: Any, block: int) -> Any:
        """As the reference, tile by tile."""
        whole, rest = divmod(x.size, block)
        sums = np.empty(whole + (rest > 0), dtype=np.float64)
        together = max(1, _TILE // block)
        work = np.empty((min(together, max(whole, 1)), block), dtype=np.float64)
        for low in range(0, whole, together):
            high = min(low + together, whole)
            rows = work[: high - low]
            np.copyto(rows, x[low * block : high * block].reshape(-1, block))
            np.vecdot(rows, rows, out=sums[low:high])
        if rest:
            last = x[whole * block :].astype(np.float64)
            sums[whole] = np.dot(last, last)
        return sums

    def adamw(
        self,
        master: Any,
        grad: Any,
        first: Any,
        second: Any,
        *,
        lr: float,
        betas: tuple[float, float],
        eps: float,
        decay: float,
        step: int,
        grad_scale: float,
    ) -> None:
        """As the reference.

        With r = sqrt(1 - beta2^step), m / (sqrt(v) / r + eps) = r m / (sqrt(v) + r eps).
        """
        beta1, beta2 = betas
        root = math.sqrt(1.0 - beta2**step)
        rate = root * lr / (1.0 - beta1**step)
        work = np.empty(min(_TILE, master.size), master.dtype)
        for part in _tiles(master.size):
            p, g, m, v = master[part], grad[part], first[part], second[part]
            scratch = work[: p.size]
            np.multiply(g, (1.0 - beta1) * grad_scale, out=scratch)
            m *= beta1
            m += scratch
            np.multiply(g, math.sqrt(1.0 - beta2) * grad_scale, out=scratch)
            scratch *= scratch
            v *= beta2
            v += scratch
            np.sqrt(v, out=scratch)
            scratch += root * eps
            np.divide(m, scratch, out=scratch)
            scratch *= rate
            if decay != 0.0:
                p *= 1.0 - lr * decay
            p -= scratch


def _tiles(size: int) -> list[slice]:
    """The tiles of a flat array."""
    return [slice(low, min(low + _TILE, size)) for low in range(0, size, _TILE)]


def _row_tiles(x: Any) -> list[slice]:
    """The tiles of a matrix: runs of whole rows."""
    rows, columns = x.shape
    step = max(1, _TILE // max(1, columns))
    return [slice(low, min(low + step, rows)) for low in range(0, rows, step)]


def _columns(ids: Any, first: int, v: int) -> tuple[Any, Any]:
    """Which ids lie in [first, first + v), and their places there; 0 for the others."""
    local = ids - first
    inside = (local >= 0) & (local < v)
    return inside, np.where(inside, local, 0)
