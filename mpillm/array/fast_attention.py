"""Attention on NumPy arrays, tile by tile.

A tile is some queries of some sequences by all keys that any of them sees. Keys that none sees are
left out, of a causal mask almost half, and no more than one tile of scores exists at a time: what
the elementwise work reads is in cache, and long sequences need no quadratic memory.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from functools import partial
from typing import Any

import numpy as np

from mpillm.array.ops import Ops

__all__ = ["FastAttention"]

# Scores in a tile, about: a megabyte of float32, as large as a core's second-level cache.
_TILE = 1 << 18

# Queries in a tile, at most: the fewer, the more of what a causal mask hides is left out.
_QUERIES = 64

# A row whose largest score is within +-_SAFE needs no shift by that score: exp(64) times any number
# of keys is far from float32's largest number, exp(-64) from its smallest normal one.
_SAFE = 64.0


class FastAttention(Ops):
    """`Ops.attention_*` by tiles. What is saved are the indices, not a mask made of them."""

    def attention_forward(
        self,
        q: Any,
        k: Any,
        v: Any,
        q_index: Any,
        k_index: Any,
        q_document: Any = None,
        k_document: Any = None,
        *,
        causal: bool = True,
        scale: float,
        drop: float = 0.0,
        row_keys: Any = None,
    ) -> tuple[Any, Any, Any]:
        """As the reference; `out` is a view of (b, q, h, e), so that its heads merge for free."""
        b, h, tq, e = q.shape
        dtype = q.dtype
        saved = self.attention_saved(
            q,
            k,
            v,
            q_index,
            k_index,
            q_document,
            k_document,
            causal=causal,
            scale=scale,
            drop=drop,
            row_keys=row_keys,
        )
        q, k, v, mask = saved[:4]
        out = np.empty((b, tq, h, e), dtype=dtype).transpose(0, 2, 1, 3)
        lse = np.empty((b, h, tq), dtype=dtype)
        if q.size == 0 or k.size == 0:
            out[...], lse[...] = 0.0, -np.inf
            return out, lse, saved
        g, tiny = k.shape[1], np.finfo(dtype).tiny
        ones = np.ones(k.shape[2], dtype=dtype)
        tiles = _Tiles(q.shape, k.shape[2], mask)
        work = np.empty(tiles.largest, dtype=dtype)
        shift = False
        for sequences in tiles.sequences():
            for queries, seen, bias in tiles.queries(sequences):
                keys = k[sequences, :, :seen].swapaxes(-1, -2)
                scores = partial(self._scores, q[sequences, :, queries], keys, g, work)
                if not shift:
                    p, total, log = _exponentials(scores(), bias, ones[:seen], shift)
                    shift = not _in_range(log, seen)
                if shift:
                    p, total, log = _exponentials(scores(), bias, ones[:seen], shift)
                lse[sequences, :, queries] = log
                if drop > 0.0:
                    part = _dropout_part(row_keys, k_index, sequences, queries, seen)
                    p, _ = self._attention_dropout(p, *part, drop)
                values = v[sequences, :, :seen]
                part = self._per_key_head(self.operand(p), g, self.matmul, values)
                np.maximum(total, tiny, out=total)  # where no key is seen, 0 / tiny
                np.divide(part, total[..., None], out=out[sequences, :, queries])
        return out, lse, saved

    def attention_saved(
        self,
        q: Any,
        k: Any,
        v: Any,
        q_index: Any,
        k_index: Any,
        q_document: Any = None,
        k_document: Any = None,
        *,
        causal: bool = True,
        scale: float,
        drop: float = 0.0,
        row_keys: Any = None,
    ) -> Any:
        """As the reference: queries, scaled, keys and values are operands of products."""
        mask = (q_index, k_index, q_document, k_document, causal)
        scaled = q if scale == 1.0 else q * np.asarray(scale, q.dtype)
        operands = map(self.operand, (scaled, k, v))
        return *operands, mask, k_index, scale, drop, row_keys

    def attention_backward(
        self, d_out: Any, out: Any, lse: Any, saved: Any, into: Any = None
    ) -> tuple[Any, Any, Any]:
        """As the reference."""
        q, k, v, mask, k_index, scale, drop, row_keys = saved
        dtype = d_out.dtype
        dq, dk, dv = into if into is not None else (np.empty(x.shape, dtype) for x in (q, k, v))
        if q.size == 0 or k.size == 0:
            dq[...], dk[...], dv[...] = 0.0, 0.0, 0.0
            return dq, dk, dv
        g = k.shape[1]
        # A row that sees no key has lse -inf; +inf makes all its probabilities 0.
        lse = np.where(np.isfinite(lse), lse, np.inf).astype(dtype, copy=False)
        tiles = _Tiles(q.shape, k.shape[2], mask)
        work, d_work = np.empty((2, tiles.largest), dtype=dtype)
        for sequences in tiles.sequences():
            filled = 0  # keys whose derivatives hold a sum already
            for queries, seen, bias in tiles.queries(sequences):
                rows, keys, values = (
                    q[sequences, :, queries],
                    k[sequences, :, :seen],
                    v[sequences, :, :seen],
                )
                p = self._scores(rows, keys.swapaxes(-1, -2), g, work)
                _hide(p, bias)
                p -= lse[sequences, :, queries, None]
                np.exp(p, out=p)
                d_rows = d_out[sequences, :, queries]
                d_operand = self.operand(d_rows)
                dp = self._scores(d_operand, values.swapaxes(-1, -2), g, d_work)
                dropped = p
                if drop > 0.0:
                    part = _dropout_part(row_keys, k_index, sequences, queries, seen)
                    dropped, keep = self._attention_dropout(p, *part, drop)
                    dp = self.dropout_backward(dp, (keep, drop))
                dropped = self.operand(dropped)
                self._add_over_queries(dropped, d_operand, g, dv[sequences], filled, seen)
                dp -= np.vecdot(d_rows, out[sequences, :, queries])[..., None]
                dp *= p
                ds = self.operand(dp)
                if q.shape[1] == g:
                    self.matmul(ds, keys, out=dq[sequences, :, queries])
                else:
                    dq[sequences, :, queries] = self._per_key_head(ds, g, self.matmul, keys)
                self._add_over_queries(ds, rows, g, dk[sequences], filled, seen)
                filled = max(filled, seen)
            dk[sequences, :, filled:], dv[sequences, :, filled:] = 0.0, 0.0
        if scale != 1.0:
            dq *= np.asarray(scale, dtype)
        return dq, dk, dv

    def _scores(self, x: Any, y: Any, g: int, work: Any) -> Any:
        """(b, h, q, e) times (b, g, e, k) in the array `work`."""
        b, h, tq, e = x.shape
        seen = y.shape[-1]
        scores = work[: b * h * tq * seen].reshape(b, g, h // g * tq, seen)
        self.matmul(x if h == g else x.reshape(b, g, h // g * tq, e), y, out=scores)
        return scores.reshape(b, h, tq, seen)

    def _add_over_queries(self, x: Any, y: Any, g: int, total: Any, first: int, seen: int) -> None:
        """Add x^T y over all queries to the keys [0, seen) of `total`, of which [0, first) are in.

        x: (b, h, q, seen), y: (b, h, q, e), total: (b, g, k, e).
        """
        if first == 0:
            if x.shape[1] == g:
                self.matmul(x.swapaxes(-1, -2), y, out=total[:, :, :seen])
            else:
                total[:, :, :seen] = self._over_queries(x, y, g)
            return
        part = self._over_queries(x, y, g)
        total[:, :, :first] += part[:, :, :first]
        total[:, :, first:seen] = part[:, :, first:]


class _Tiles:
    """How the scores (b, h, q, k) are cut into tiles; `largest`: the elements of one of them."""

    def __init__(self, q_shape: tuple[int, ...], tk: int, mask: Any) -> None:
        """mask: indices of queries and keys, documents of both or None, whether it is causal."""
        b, h, tq, _ = q_shape
        self._b, self._tk, self._mask = b, tk, mask
        rows = min(tq, _QUERIES)
        self._together = max(1, min(b, _TILE // (h * rows * tk)))
        self.largest = self._together * h * rows * tk
        self._rows = [slice(low, min(low + rows, tq)) for low in range(0, tq, rows)]
        q_index, k_index, q_document, _, causal = mask
        self._alike = None
        if q_index.ndim == 1 and q_document is None:  # the same for all sequences
            self._alike = [_bias_by_index(q_index[part], k_index, causal) for part in self._rows]

    def sequences(self) -> Iterator[slice]:
        """The sequences that are taken together."""
        for low in range(0, self._b, self._together):
            yield slice(low, min(low + self._together, self._b))

    def queries(self, sequences: slice) -> Iterator[tuple[slice, int, Any]]:
        """(queries, how many keys some of them see, bias) of the tiles of some sequences.

        The bias is 0 where a key is seen and -inf where not. It has the axes of the scores, but may
        be of the last of these keys only, all others being seen; None if all are.
        """
        for number, part in enumerate(self._rows):
            if self._alike is not None:
                yield part, *self._alike[number]
            else:
                yield part, self._tk, _bias_by_row(self._mask, sequences, part)


def _bias_by_index(q_index: Any, k_index: Any, causal: bool) -> tuple[int, Any]:
    """Keys that some of the queries see, and what hides the last ones of them from the others."""
    tk = k_index.size
    if not causal:
        return tk, None
    stop, all_see = tk, 0
    if tk and np.all(k_index[1:] >= k_index[:-1]):
        stop = int(np.searchsorted(k_index, q_index.max(), side="right"))
        all_see = int(np.searchsorted(k_index, q_index.min(), side="right"))
    if all_see == stop:
        return stop, None
    visible = k_index[all_see:stop] <= q_index[:, None]
    return stop, np.where(visible, np.float32(0.0), np.float32(-np.inf))


def _bias_by_row(mask: Any, sequences: slice, queries: slice) -> Any:
    """The same of all keys for single sequences, (b, 1, q, k); None if all are seen."""
    q_index, k_index, q_document, k_document, causal = mask
    visible = None
    if causal:
        if q_index.ndim == 2:
            q_index, k_index = q_index[sequences], k_index[sequences]
        visible = k_index[..., None, :] <= q_index[..., queries][..., :, None]
    if q_document is not None:
        if q_document.ndim == 2:
            q_document, k_document = q_document[sequences], k_document[sequences]
        same = q_document[..., queries][..., :, None] == k_document[..., None, :]
        visible = same if visible is None else visible & same
    if visible is None:
        return None
    bias = np.where(visible, np.float32(0.0), np.float32(-np.inf))
    return bias[:, None] if bias.ndim == 3 else bias


def _hide(p: Any, bias: Any) -> None:
    """Add the bias to the scores of the last keys, which it is for."""
    if bias is not None:
        last = p[..., p.shape[-1] - bias.shape[-1] :]
        last += bias


def _dropout_part(
    row_keys: Any, k_index: Any, sequences: slice, queries: slice, seen: int
) -> tuple[Any, Any]:
    """The places of a tile's keys, and the random keys of its rows."""
    places = k_index[:seen] if k_index.ndim == 1 else k_index[sequences, :seen]
    return places, row_keys[sequences, :, queries]


def _exponentials(p: Any, bias: Any, ones: Any, shift: bool) -> tuple[Any, Any, Any]:
    """exp(score), in place of the scores, its sum over the keys, and the log of that sum.

    shift: from rows whose largest score is beyond +-`_SAFE` that score is taken off before. What
    happens to a row depends on the scores that it sees alone, never on those of other rows.
    """
    _hide(p, bias)
    top = None
    if shift:
        # Of a row that sees no key any finite number keeps its scores -inf.
        top = p.max(axis=-1, keepdims=True, initial=np.finfo(p.dtype).min)
        top[np.abs(top) <= _SAFE] = 0.0
        p -= top
    with np.errstate(over="ignore", divide="ignore"):
        np.exp(p, out=p)
        total = np.matmul(p, ones)
        log = np.log(total)
    if top is not None:
        log += top[..., 0]
    return p, total, log


def _in_range(log: Any, seen: int) -> bool:
    """Whether no row needs a shift, its log-sum-exp being from its maximum to log(seen) above."""
    lowest = math.log(max(seen, 1)) - _SAFE
    return log.size == 0 or bool(log.min() >= lowest and log.max() <= _SAFE)
