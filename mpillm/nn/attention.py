"""Self-attention, cut over the tensor group by heads and over the context group by tokens."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING, Any

from mpillm.array.random import fold
from mpillm.nn.dropout import Dropout
from mpillm.nn.layer import Arrays, Build, Layer, Micro, row_keys
from mpillm.nn.linear import ColumnLinear, RowLinear
from mpillm.nn.ring import RingAttention, merge_shares

if TYPE_CHECKING:
    from mpillm.array.backend import Array, Backend

__all__ = ["KeyValueCache", "SelfAttention"]


class KeyValueCache:
    """Keys and values of the tokens that a sequence has so far, for one layer.

    Context ranks share them out: a rank keeps those of the places p with p % ranks == rank, so that
    all have as many at any time.
    """

    def __init__(
        self,
        backend: Backend,
        b: int,
        g: int,
        capacity: int,
        e: int,
        dtype: Any,
        *,
        ranks: int = 1,
        rank: int = 0,
    ) -> None:
        """capacity: tokens of a sequence, over all ranks."""
        self._capacity, self._ranks, self._rank = capacity, ranks, rank
        share = self._held(capacity)
        self._keys = backend.empty((b, g, share, e), dtype)
        self._values = backend.empty((b, g, share, e), dtype)
        self._index = backend.xp.arange(rank, capacity, ranks)
        self.length = 0

    def extend(self, k: Array, v: Array) -> tuple[Array, Array, Array]:
        """Append k and v (b, g, t, e), which every rank has whole.

        Returns this rank's share so far: keys and values (b, g, held, e), and their places.
        """
        start, stop = self.length, self.length + k.shape[2]
        if stop > self._capacity:
            raise ValueError(f"{stop} tokens in a cache of {self._capacity}")
        self.length = stop
        mine = slice((self._rank - start) % self._ranks, None, self._ranks)
        new, filled = slice(self._held(start), self._held(stop)), slice(0, self._held(stop))
        self._keys[:, :, new] = k[:, :, mine]
        self._values[:, :, new] = v[:, :, mine]
        return self._keys[:, :, filled], self._values[:, :, filled], self._index[filled]

    def _held(self, length: int) -> int:
        """How many of the first `length` places are this rank's."""
        return len(range(self._rank, length, self._ranks))


class SelfAttention(Layer):
    """Multi-head self-attention with a fused product for queries, keys and values.

    Vaswani et al. 2017, section 3.2. The heads are cut over the tensor group; a rank may have none.
    Where `micro.keys` says which tokens each context rank holds, keys and values go round the ring
    of ranks (`mpillm.nn.ring`). Takes x and gives y, both (b, t, d), or this rank's rows of them
    where the tensor ranks share out the tokens.
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
        self._context = build.mesh.context
        self._ring = RingAttention(build, causal=causal, scale=1.0)
        self._dtype = build.store.dtype

    def new_state(self, b: int, capacity: int) -> dict[str, Any]:
        """An empty cache for this rank's share of b sequences of at most `capacity` tokens."""
        sizes = (b, self._heads, capacity, self._head_width)
        ranks, rank = self._context.size, self._context.rank
        cache = KeyValueCache(self._backend, *sizes, self._dtype, ranks=ranks, rank=rank)
        return {self.name: cache}

    def forward(self, inputs: Arrays, micro: Micro) -> tuple[Arrays, Any]:
        """x (b, t, d) -> y (b, t, d)."""
        b, t = micro.shape
        (qkv,), saved_qkv = self.qkv.forward(inputs, micro)
        # (b, t, 3, h, e) -> (3, b, h, t, e), a view
        q, k, v = qkv.reshape(b, t, 3, self._heads, self._head_width).transpose(2, 0, 3, 1, 4)
        q *= self._scale  # in place of all scores
        out, lse, saved_attention = self._attend(q, k, v, micro)
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
        into = tuple(d_qkv.transpose(2, 0, 3, 1, 4))  # dq, dk, dv (b, h, t, e), views
        if micro.keys:
            parts = self._ring.backward(d_out, out, lse, saved_attention, micro)
        else:
            parts = self._backend.ops.attention_backward(d_out, out, lse, saved_attention, into)
        for room, part in zip(into, parts, strict=True):
            if part is not room:
                room[...] = part
        dq = into[0]
        dq *= self._scale
        flat = d_qkv.reshape(b, t, 3 * self._heads * self._head_width)
        return self.qkv.backward((flat,), saved_qkv, micro)

    def _attend(self, q: Array, k: Array, v: Array, micro: Micro) -> tuple[Array, Array, Any]:
        """Attention (b, h, t, e) to all keys that there are, the log-sum-exp, and what is saved."""
        drop = self._drop if micro.training else 0.0
        row_keys = self._row_keys(micro) if drop > 0.0 else None
        if micro.keys:
            return self._ring.forward(q, k, v, micro, drop, row_keys)
        k_index = micro.index
        if micro.state is not None:
            k, v, k_index = micro.state[self.name].extend(k, v)
        out, lse, saved = self._backend.ops.attention_forward(
            q,
            k,
            v,
            micro.index,
            k_index,
            micro.documents,
            micro.documents,
            causal=self._causal,
            scale=1.0,
            drop=drop,
            row_keys=row_keys,
        )
        if micro.state is not None:
            out = merge_shares(out, lse, self._context, self._backend)
        return out, lse, saved

    def _row_keys(self, micro: Micro) -> Array:
        """Random keys of the probabilities' rows, uint64 (b, h, t), by the head's global number."""
        rows = row_keys(self._backend, micro, self.name)
        heads = self._backend.xp.arange(self._first_head, self._first_head + self._heads)
        return self._backend.random.fold(
            fold(micro.key, self.name, "heads"), rows[:, None, :], heads[None, :, None]
        )
