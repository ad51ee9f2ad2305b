"""Self-attention, cut over the tensor group by heads, with a cache for decoding."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mpillm.array.random import fold
from mpillm.nn.dropout import Dropout
from mpillm.nn.layer import Arrays, Build, Layer, Micro, row_keys
from mpillm.nn.linear import ColumnLinear, RowLinear

if TYPE_CHECKING:
    from mpillm.array.backend import Array, Backend

__all__ = ["KeyValueCache", "SelfAttention"]


class KeyValueCache:
    """Keys and values of the tokens that a sequence has so far, for one layer."""

    def __init__(self, backend: Backend, b: int, g: int, capacity: int, e: int, dtype: Any) -> None:
        self._keys = backend.empty((b, g, capacity, e), dtype)
        self._values = backend.empty((b, g, capacity, e), dtype)
        self._index = backend.xp.arange(capacity)
        self.length = 0

    def extend(self, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Append k and v (b, g, t, e); returns all keys, all values and their indices so far."""
        start, stop = self.length, self.length + k.shape[2]
        if stop > self._index.size:
            raise ValueError(f"{stop} tokens in a cache of {self._index.size}")
        self.length = stop
        self._keys[:, :, start : self.length] = k
        self._values[:, :, start : self.length] = v
        filled = slice(0, self.length)
        return self._keys[:, :, filled], self._values[:, :, filled], self._index[filled]


class SelfAttention(Layer):
    """Multi-head self-attention with a fused product for queries, keys and values.

    Vaswani et al. 2017, section 3.2. The heads are cut over the tensor group; a rank may have none.
    Takes x and gives y, both (b, t, d) and whole on every rank.
    """

    def __init__(
        self,
        build: Build,
        name: str,
        width: int,
        heads: int,
        *,
        bias: bool,
        std: float,
        out_std: float,
        drop: float,
        causal: bool = True,
    ) -> None:
        self.name = name
        self._backend = build.backend
        self._head_width = e = width // heads
        self._scale = 1.0 / math.sqrt(e)
        self._drop = drop
        self._causal = causal
        # A key's bias adds the same to all of a query's scores, and softmax does not see it.
        self.qkv = ColumnLinear(
            build,
            f"{name}.qkv",
            width,
            (3, heads, e),
            1,
            bias=bias,
            std=std,
            bias_at_rest=1,
        )
        self.out = RowLinear(build, f"{name}.out", (heads, e), width, 0, bias=bias, std=out_std)
        self._heads = self.qkv.local_outputs[1]
        self._first_head = self.qkv.weight.shard.start[1]
        self._dropout = Dropout(build, f"{name}.out", drop)

    def new_state(self, b: int, capacity: int) -> dict[str, Any]:
        """An empty cache for b sequences of at most `capacity` tokens."""
        dtype = self.qkv.weight.value.dtype
        sizes = (b, self._heads, capacity, self._head_width)
        return {self.name: KeyValueCache(self._backend, *sizes, dtype)}

    def forward(self, inputs: Arrays, micro: Micro) -> tuple[Arrays, Any]:
        """x (b, t, d) -> y (b, t, d)."""
        b, t = micro.shape
        (qkv,), saved_qkv = self.qkv.forward(inputs, micro)
        # (b, t, 3, h, e) -> (3, b, h, t, e), a view
        q, k, v = qkv.reshape(b, t, 3, self._heads, self._head_width).transpose(2, 0, 3, 1, 4)
        k_index, k_documents = micro.index, micro.documents
        if micro.state is not None:
            k, v, k_index = micro.state[self.name].extend(k, v)
        drop = self._drop if micro.training else 0.0
        out, lse, saved_attention = self._backend.ops.attention_forward(
            q,
            k,
            v,
            micro.index,
            k_index,
            micro.documents,
            k_documents,
            causal=self._causal,
            scale=self._scale,
            drop=drop,
            row_keys=self._row_keys(micro) if drop > 0.0 else None,
        )
        merged = out.transpose(0, 2, 1, 3).reshape(b, t, self._heads * self._head_width)
        (y,), saved_out = self.out.forward((merged,), micro)
        (y,), saved_dropout = self._dropout.forward((y,), micro)
        if not micro.training:
            return (y,), None
        return (y,), (saved_qkv, saved_attention, out, lse, saved_out, saved_dropout)

    def backward(self, d_outputs: Arrays, saved: Any, micro: Micro) -> Arrays:
        """dy -> dx."""
        saved_qkv, saved_attention, out, lse, saved_out, saved_dropout = saved
        b, t = micro.shape
        d_outputs = self._dropout.backward(d_outputs, saved_dropout, micro)
        (d_merged,) = self.out.backward(d_outputs, saved_out, micro)
        d_out = d_merged.reshape(b, t, self._heads, self._head_width).transpose(0, 2, 1, 3)
        d_qkv = self._backend.empty((b, t, 3, self._heads, self._head_width), d_out.dtype)
        # dq, dk, dv are (b, h, t, e)
        parts = self._backend.ops.attention_backward(d_out, out, lse, saved_attention)
        for part, d_part in enumerate(parts):
            d_qkv[:, :, part] = d_part.transpose(0, 2, 1, 3)
        flat = d_qkv.reshape(b, t, 3 * self._heads * self._head_width)
        return self.qkv.backward((flat,), saved_qkv, micro)

    def _row_keys(self, micro: Micro) -> Array:
        """Random keys of the probabilities' rows, uint64 (b, h, t), by the head's global number."""
        rows = row_keys(self._backend, micro, self.name)
        heads = self._backend.xp.arange(self._first_head, self._first_head + self._heads)
        return self._backend.random.fold(
            fold(micro.key, self.name, "heads"), rows[:, None, :], heads[None, :, None]
        )
