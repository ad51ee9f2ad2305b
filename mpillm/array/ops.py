"""The reference operations: paired forward and backward passes, written once over `xp`.

They are stateless: what a backward pass needs is in `saved`, which belongs to the caller. Names of
arrays may end in their axes: b batch, t tokens, n = b*t, d model width, h heads, g key/value heads,
e head width, v vocabulary, i and o the input and output width of a product. Floating arrays of one
call share one dtype (float32 or float64), which the results have too; indices are integers.
"""

from __future__ import annotations

import math
from types import ModuleType
from typing import Any

from mpillm.array.random import KeyedRandom
from mpillm.array.routing import RoutingOps

__all__ = ["Ops", "norm_block"]

# Blocks of a parameter whose squares are summed in one go, at most, and elements of one, at least.
_NORM_BLOCKS = 1024
_NORM_BLOCK = 16

# Elements that are squared in float64 at once.
_SQUARES = 1 << 18

_GELU_A = math.sqrt(2.0 / math.pi)
_GELU_B = 0.044715


class Ops(RoutingOps):
    """The operations on the arrays of one library; tuned versions override single ones."""

    def __init__(self, xp: ModuleType) -> None:
        self.xp = xp
        self.random = KeyedRandom(xp)

    # -- products ------------------------------------------------------------------------------

    def operand(self, x: Any) -> Any:
        """`x` as an operand of products: itself, or a copy of the precision that they have.

        Who takes part in several products is made an operand once.
        """
        return x

    def matmul(self, a: Any, b: Any, out: Any = None, accumulate: bool = False) -> Any:
        """The matrix product `a @ b`: the only one in the package.

        a: (..., m, k), b: (..., k, n). With `out`, (..., m, n), the product is written there, or
        added to it when `accumulate` is set. Returns the product, or `out`.
        """
        if out is None:
            return self.xp.matmul(a, b)
        if not accumulate:
            return self.xp.matmul(a, b, out=out)
        out += self.xp.matmul(a, b)
        return out

    def sum_rows(self, x_no: Any, out_o: Any) -> None:
        """Add the sum over the rows of `x_no` to `out_o`: the gradient of a bias."""
        out_o += x_no.sum(axis=0)

    def add_bias(self, y_no: Any, bias_o: Any) -> None:
        """Add a bias to every row of `y_no`, in place."""
        y_no += bias_o

    def add_residual(self, x: Any, y: Any) -> Any:
        """x + y, in place of `y`, which is returned."""
        y += x
        return y

    # -- layer norm ----------------------------------------------------------------------------

    def layernorm_forward(
        self, x_nd: Any, gain_d: Any, bias_d: Any, eps: float = 1e-5
    ) -> tuple[Any, Any]:
        """y = (x - mean) / sqrt(var + eps) * gain + bias over the last axis.

        Ba, Kiros, Hinton 2016, "Layer Normalization". bias_d may be None. Returns (y_nd, saved).
        """
        xp = self.xp
        centred_nd = x_nd - x_nd.mean(axis=-1, keepdims=True)
        variance_n1 = xp.square(centred_nd).mean(axis=-1, keepdims=True)
        inverse_n1 = 1.0 / xp.sqrt(variance_n1 + eps)
        hat_nd = centred_nd
        hat_nd *= inverse_n1
        y_nd = hat_nd * gain_d
        if bias_d is not None:
            y_nd += bias_d
        return y_nd, (hat_nd, inverse_n1, gain_d, bias_d is not None)

    def layernorm_backward(self, dy_nd: Any, saved: Any) -> tuple[Any, Any, Any]:
        """Returns (dx_nd, dgain_d, dbias_d); dbias_d is None when there was no bias.

        With g = dy * gain: dx = (g - mean(g) - hat * mean(g * hat)) / sqrt(var + eps).
        """
        hat_nd, inverse_n1, gain_d, has_bias = saved
        d = hat_nd.shape[-1]
        product_nd = dy_nd * hat_nd
        dgain_d = product_nd.reshape(-1, d).sum(axis=0)
        dbias_d = dy_nd.reshape(-1, d).sum(axis=0) if has_bias else None
        product_nd *= gain_d
        projection_n1 = product_nd.mean(axis=-1, keepdims=True)
        dx_nd = dy_nd * gain_d
        dx_nd -= dx_nd.mean(axis=-1, keepdims=True)
        dx_nd -= self.xp.multiply(hat_nd, projection_n1, out=product_nd)
        dx_nd *= inverse_n1
        return dx_nd, dgain_d, dbias_d

    # -- GELU ----------------------------------------------------------------------------------

    def gelu_forward(self, x: Any) -> tuple[Any, Any]:
        """y = x/2 * (1 + tanh(sqrt(2/pi) * (x + 0.044715 x^3))). Returns (y, saved).

        Hendrycks and Gimpel 2016, "Gaussian Error Linear Units", the tanh form of GPT-2.
        """
        xp = self.xp
        tanh = xp.tanh(_GELU_A * (x + _GELU_B * (x * x * x)))
        return 0.5 * x * (1.0 + tanh), (x, tanh)

    def gelu_backward(self, dy: Any, saved: Any) -> Any:
        """dx = dy * (1/2 (1 + t) + x/2 (1 - t^2) u'), t = tanh(u), u' = a (1 + 3 b x^2)."""
        x, tanh = saved
        slope = _GELU_A * (1.0 + 3.0 * _GELU_B * (x * x))
        return dy * (0.5 * (1.0 + tanh) + 0.5 * x * (1.0 - tanh * tanh) * slope)

    # -- dropout -------------------------------------------------------------------------------

    def dropout_forward(self, x_nd: Any, row_keys_n: Any, drop: float) -> tuple[Any, Any]:
        """y = x * keep / (1 - drop), keep a function of the row's key and the column's number.

        Srivastava et al. 2014. x_nd: (..., d), row_keys_n: uint64 (...,). Returns (y_nd, saved).
        """
        counters_d = self.xp.arange(x_nd.shape[-1], dtype=self.xp.uint32)
        keep_nd = self.random.keep(row_keys_n, counters_d, drop)
        return self.dropout_backward(x_nd, (keep_nd, drop)), (keep_nd, drop)

    def dropout_backward(self, dy_nd: Any, saved: Any) -> Any:
        """dx = dy * keep / (1 - drop)."""
        keep_nd, drop = saved
        dx_nd = dy_nd * keep_nd
        dx_nd *= 1.0 / (1.0 - drop)
        return dx_nd

    # -- attention -----------------------------------------------------------------------------

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
        """Scaled dot-product attention whose mask comes from indices, not from a triangle.

        Vaswani et al. 2017, equation 1; several queries a key head as in Ainslie et al. 2023.

        q: (b, h, q, e); k, v: (b, g, k, e) with h a multiple of g. q_index, k_index: places in the
        sequence, (q,) and (k,), or (b, q) and (b, k). With `causal`, a query sees the keys of no
        later place. q_document, k_document: ids shaped like the indices; a query sees its own
        document only. drop, row_keys: dropout of the probabilities, uint64 keys (b, h, q), the
        key's place as counter.

        Returns (out (b, h, q, e), lse (b, h, q), saved). A row that sees no key gives out 0 and
        lse -inf, so that partial results over parts of the keys can be merged.
        """
        xp = self.xp
        b, h, tq, e = q.shape
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
        mask = saved[3]
        p = self._attention_scores(q, k, scale)
        if mask is not None:
            p = xp.where(mask, p, -xp.inf)
        if p.shape[-1] == 0 or p.size == 0:
            lse = xp.full((b, h, tq), -xp.inf, dtype=q.dtype)
            out = xp.zeros((b, h, tq, e), dtype=q.dtype)
        else:
            row_max = p.max(axis=-1, keepdims=True)
            row_max = xp.where(xp.isfinite(row_max), row_max, 0.0)
            p -= row_max
            xp.exp(p, out=p)
            total = p.sum(axis=-1, keepdims=True)
            seen = total > 0
            total = xp.where(seen, total, 1.0)
            lse = xp.where(seen, row_max + xp.log(total), -xp.inf)[..., 0]
            p /= total
            if drop > 0.0:
                p, _ = self._attention_dropout(p, k_index, row_keys, drop)
            out = self._per_key_head(p, k.shape[1], self.matmul, v)
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
        """What `attention_forward` of these arguments saves, without the pass itself.

        With the `out` and `lse` over all keys this is enough for the backward pass over any part of
        them: a ring need not keep the keys and values that came by.
        """
        mask = self._attention_mask(q_index, k_index, q_document, k_document, causal)
        return q, k, v, mask, k_index, scale, drop, row_keys

    def attention_merge(self, out: Any, lse: Any, part_out: Any, part_lse: Any) -> None:
        """Fold attention over a part of the keys into that over other keys, in place.

        Milakov and Gimelshein 2018, "Online normalizer calculation for softmax", section 3.1:
        lse = log(exp(lse) + exp(part_lse)), out = sum of both, each times exp(its lse - lse).

        out, lse: (b, h, q, e) and (b, h, q), overwritten; they may be wider than the part's dtype.
        A row that has seen no key has lse -inf and out 0, before and after.
        """
        xp = self.xp
        top = xp.maximum(lse, part_lse)
        top = xp.where(xp.isfinite(top), top, 0.0)
        weight, part_weight = xp.exp(lse - top), xp.exp(part_lse - top)
        total = weight + part_weight
        seen = total > 0
        total = xp.where(seen, total, 1.0)
        out *= (weight / total)[..., None]
        out += part_out * (part_weight / total)[..., None]
        lse[...] = xp.where(seen, top + xp.log(total), -xp.inf)

    def attention_backward(
        self, d_out: Any, out: Any, lse: Any, saved: Any, into: Any = None
    ) -> tuple[Any, Any, Any]:
        """Returns (dq, dk, dv). `out` and `lse` are those over all keys of the sequence.

        into: room for the three, that may be used in place of new arrays.

        Dao et al. 2022, "FlashAttention", algorithm 4: the probabilities are computed anew from
        the log-sum-exp, so the forward pass keeps none; ds = p * (dp - sum(d_out * out)).
        """
        xp = self.xp
        q, k, v, mask, k_index, scale, drop, row_keys = saved
        if q.size == 0 or k.size == 0:
            return xp.zeros_like(q), xp.zeros_like(k), xp.zeros_like(v)
        g = k.shape[1]
        p = self._attention_scores(q, k, scale)
        # A row that sees no key has lse -inf; +inf makes all its probabilities 0.
        p -= xp.where(xp.isfinite(lse), lse, xp.inf)[..., None]
        if mask is not None:  # before exp: a hidden score may be larger than any that was seen
            p = xp.where(mask, p, -xp.inf)
        xp.exp(p, out=p)
        dp = self._per_key_head(d_out, g, self.matmul, v.swapaxes(-1, -2))
        dropped = p
        if drop > 0.0:
            dropped, keep = self._attention_dropout(p, k_index, row_keys, drop)
            dp = self.dropout_backward(dp, (keep, drop))
        dv = self._over_queries(dropped, d_out, g)
        dp -= (d_out * out).sum(axis=-1, keepdims=True)
        dp *= p
        dp *= scale
        dq = self._per_key_head(dp, g, self.matmul, k)
        dk = self._over_queries(dp, q, g)
        return dq, dk, dv

    def _attention_mask(
        self, q_index: Any, k_index: Any, q_document: Any, k_document: Any, causal: bool
    ) -> Any:
        """Bool mask of visible keys, broadcastable to (b, h, q, k); None when all are visible."""
        mask = None
        if causal:
            mask = k_index[..., None, :] <= q_index[..., :, None]
        if q_document is not None:
            same = q_document[..., :, None] == k_document[..., None, :]
            mask = same if mask is None else mask & same
        if mask is not None and mask.ndim == 3:
            mask = mask[:, None]
        return mask

    def _attention_scores(self, q: Any, k: Any, scale: float) -> Any:
        scores = self._per_key_head(q, k.shape[1], self.matmul, k.swapaxes(-1, -2))
        scores *= scale
        return scores

    def _attention_dropout(self, p: Any, k_index: Any, row_keys: Any, drop: float) -> Any:
        counters = k_index if k_index.ndim == 1 else k_index[:, None, None, :]
        keep = self.random.keep(row_keys, counters, drop)
        return self.dropout_backward(p, (keep, drop)), keep

    @staticmethod
    def _per_key_head(x: Any, g: int, product: Any, y: Any) -> Any:
        """(b, h, q, m) times (b, g, m, n): the queries of a key head are stacked as rows."""
        b, h, tq, m = x.shape
        if h == g:
            return product(x, y)
        return product(x.reshape(b, g, h // g * tq, m), y).reshape(b, h, tq, y.shape[-1])

    def _over_queries(self, x: Any, y: Any, g: int) -> Any:
        """Sum over all queries of a key head: (b, h, q, m), (b, h, q, n) -> (b, g, m, n)."""
        b, h, tq, m = x.shape
        if h != g:
            x = x.reshape(b, g, h // g * tq, m)
            y = y.reshape(b, g, h // g * tq, y.shape[-1])
        return self.matmul(x.swapaxes(-1, -2), y)

    # -- embedding -----------------------------------------------------------------------------

    def embedding_forward(self, table_vd: Any, ids: Any, first: int = 0) -> Any:
        """Rows of the table; ids outside [first, first + v) give zeros (another rank's rows).

        ids: integers of any shape (...,). Returns (..., d).
        """
        xp = self.xp
        v = table_vd.shape[0]
        if v == 0:
            return xp.zeros((*ids.shape, table_vd.shape[1]), dtype=table_vd.dtype)
        local = ids - first
        inside = (local >= 0) & (local < v)
        rows = table_vd[xp.where(inside, local, 0)]
        rows *= inside[..., None]
        return rows

    def embedding_backward(self, dy: Any, ids: Any, grad_vd: Any, first: int = 0) -> None:
        """Add every row of dy (..., d) to the row of `grad_vd` that it was read from."""
        xp = self.xp
        v, d = grad_vd.shape
        if v == 0:
            return
        local = ids.reshape(-1) - first
        inside = (local >= 0) & (local < v)
        # Rows of other ranks add zeros to row 0: selecting them would make a device tell the host
        # how many there are.
        rows_nd = dy.reshape(-1, d) * inside[:, None]
        xp.add.at(grad_vd, xp.where(inside, local, 0), rows_nd)

    # -- cross-entropy over a slice of the vocabulary --------------------------------------------

    def row_max(self, logits_nv: Any) -> Any:
        """Largest logit of each row, (n,); -inf where this rank holds no column."""
        if logits_nv.shape[1] == 0:
            return self.xp.full(logits_nv.shape[:1], -self.xp.inf, dtype=logits_nv.dtype)
        return logits_nv.max(axis=1)

    def cross_entropy_forward(
        self, logits_nv: Any, row_max_n: Any, labels_n: Any, first: int = 0
    ) -> Any:
        """What each slice of the vocabulary adds to a row's loss, (2, n), to be summed over slices.

        Row 0: sum over columns of exp(logit - row_max); row 1: (label's logit - row_max) where the
        label lies in [first, first + v), else 0. Then loss = log(row 0) - row 1 (Shoeybi et al.
        2019, "Megatron-LM", section 3). `logits_nv` is overwritten with exp(logit - row_max).
        """
        xp = self.xp
        n, v = logits_nv.shape
        sums = xp.zeros((2, n), dtype=logits_nv.dtype)
        if v == 0:
            return sums
        logits_nv -= row_max_n[:, None]
        local = labels_n - first
        inside = (local >= 0) & (local < v)
        column = xp.where(inside, local, 0)
        sums[1] = logits_nv[xp.arange(n), column] * inside
        xp.exp(logits_nv, out=logits_nv)
        sums[0] = logits_nv.sum(axis=1)
        return sums

    def cross_entropy_backward(
        self, exp_nv: Any, exp_sum_n: Any, labels_n: Any, weight_n: Any, first: int = 0
    ) -> Any:
        """dlogits = weight * (softmax - onehot(label)), in place of `exp_nv`.

        exp_nv: exp(logit - row_max) of this slice; exp_sum_n: its sum over all slices; weight_n:
        the derivative of the step's loss by each row's loss. Returns dlogits_nv.
        """
        xp = self.xp
        n, v = exp_nv.shape
        if v == 0:
            return exp_nv
        exp_nv *= (weight_n / exp_sum_n)[:, None]
        local = labels_n - first
        inside = (local >= 0) & (local < v)
        column = xp.where(inside, local, 0)
        exp_nv[xp.arange(n), column] -= weight_n * inside
        return exp_nv

    # -- optimizer -----------------------------------------------------------------------------

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
        """One AdamW step in place on flat arrays (Loshchilov and Hutter 2019, algorithm 2).

        The gradient is used as grad * grad_scale; `step` counts from 1; `first` and `second` are
        the moments. The decay is decoupled and multiplied by the learning rate.
        """
        xp = self.xp
        beta1, beta2 = betas
        g = grad * grad_scale
        first *= beta1
        first += (1.0 - beta1) * g
        second *= beta2
        second += (1.0 - beta2) * (g * g)
        if decay != 0.0:
            master *= 1.0 - lr * decay
        root = xp.sqrt(second)
        root *= 1.0 / math.sqrt(1.0 - beta2**step)
        root += eps
        master -= (lr / (1.0 - beta1**step)) * first / root

    # -- sums ----------------------------------------------------------------------------------

    def sum_of_squares(self, x: Any, block: int) -> Any:
        """Sums of squares of consecutive blocks of a flat array, float64 (blocks,).

        Each sum's bits depend on the block's elements alone, not on what else the array holds, so
        that a norm can be added up in one order in every layout. The last block may be shorter.
        """
        xp = self.xp
        sums = xp.zeros((-(-x.size // block),), dtype=xp.float64)
        whole, at_once = x.size // block, max(1, _SQUARES // block)
        for low in range(0, whole, at_once):
            high = min(low + at_once, whole)
            rows = x[low * block : high * block].reshape(-1, block).astype(xp.float64)
            sums[low:high] = xp.square(rows).sum(axis=1)
        if x.size % block:
            sums[whole:] = xp.square(x[whole * block :].astype(xp.float64)).sum()
        return sums


def norm_block(shape: tuple[int, ...]) -> int:
    """Elements in a block of `Ops.sum_of_squares`, for a parameter of this global shape.

    Parts of a parameter that ZeRO deals out begin at blocks, too: they are small enough for even
    parts, and few enough to be added up over the ranks.
    """
    return max(_NORM_BLOCK, -(-math.prod(shape) // _NORM_BLOCKS))
