"""Tuned NumPy versions of some operations: tiled and in place, so that work stays in cache."""

from __future__ import annotations

from typing import Any

import numpy as np

from mpillm.array.ops import _GELU_A, _GELU_B, Ops

__all__ = ["FastNumpyOps"]

# Elements in a tile: three float32 tiles fit in a core's second-level cache.
_TILE = 1 << 16


class FastNumpyOps(Ops):
    """The reference, with the elementwise work done tile by tile."""

    def gelu_forward(self, x: Any) -> tuple[Any, Any]:
        """As the reference."""
        x = np.ascontiguousarray(x)
        y, tanh = np.empty_like(x), np.empty_like(x)
        flat_x, flat_y, flat_t = x.reshape(-1), y.reshape(-1), tanh.reshape(-1)
        for start in range(0, x.size, _TILE):
            part = slice(start, start + _TILE)
            xs, ys, ts = flat_x[part], flat_y[part], flat_t[part]
            np.multiply(xs, xs, out=ts)
            ts *= _GELU_A * _GELU_B
            ts += _GELU_A
            ts *= xs
            np.tanh(ts, out=ts)
            np.add(ts, 1.0, out=ys)
            ys *= xs
            ys *= 0.5
        return y, (x, tanh)

    def gelu_backward(self, dy: Any, saved: Any) -> Any:
        """As the reference."""
        x, tanh = saved
        dy = np.ascontiguousarray(dy)
        dx = np.empty_like(x)
        flat_x, flat_t = x.reshape(-1), tanh.reshape(-1)
        flat_dy, flat_dx = dy.reshape(-1), dx.reshape(-1)
        work = np.empty(min(_TILE, x.size), dtype=x.dtype)
        for start in range(0, x.size, _TILE):
            part = slice(start, start + _TILE)
            xs, ts, out = flat_x[part], flat_t[part], flat_dx[part]
            scratch = work[: xs.size]
            np.multiply(xs, xs, out=out)
            out *= 1.5 * _GELU_A * _GELU_B
            out += 0.5 * _GELU_A
            out *= xs
            np.multiply(ts, ts, out=scratch)
            np.subtract(1.0, scratch, out=scratch)
            out *= scratch
            np.multiply(ts, 0.5, out=scratch)
            scratch += 0.5
            out += scratch
            out *= flat_dy[part]
        return dx

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
        """As the reference."""
        beta1, beta2 = betas
        root_scale = 1.0 / np.sqrt(1.0 - beta2**step)
        rate = lr / (1.0 - beta1**step)
        size = min(_TILE, master.size)
        g_work, work = np.empty(size, master.dtype), np.empty(size, master.dtype)
        for start in range(0, master.size, _TILE):
            part = slice(start, start + _TILE)
            p, m, v = master[part], first[part], second[part]
            g, scratch = g_work[: p.size], work[: p.size]
            np.multiply(grad[part], grad_scale, out=g)
            m *= beta1
            np.multiply(g, 1.0 - beta1, out=scratch)
            m += scratch
            g *= g
            g *= 1.0 - beta2
            v *= beta2
            v += g
            if decay != 0.0:
                p *= 1.0 - lr * decay
            np.sqrt(v, out=scratch)
            scratch *= root_scale
            scratch += eps
            np.divide(m, scratch, out=scratch)
            scratch *= rate
            p -= scratch
