"""Attention over sequences that the context ranks share out.

Training: a rank holds the queries, keys and values of its tokens. Its queries stay, and keys and
values go round the ring of ranks, the next ones on their way while those in hand are attended to
(Liu, Zaharia, Abbeel 2023, "Ring Attention with Blockwise Transformers for Near-Infinite Context").
What a part of the keys gives is merged into what the others gave by the log-sum-exp of the scores.

Sequences are cut in zigzag (`mpillm.parallel.shard.zigzag`), so that under a causal mask two
of the four pairs of chunks that meet in a round are hidden, whichever two ranks they are of: no
query sees the high chunk of an earlier rank, and the queries of the low chunk see nothing of a
later rank. These are left out, and all ranks have as much to do in every round.

Decoding: every rank has all queries, and its share of the keys and values of earlier tokens.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any, NamedTuple

from mpillm.nn.layer import Build, Keys, Micro
from mpillm.parallel.shard import zigzag

if TYPE_CHECKING:
    from mpillm.array.backend import Array, Backend
    from mpillm.parallel.group import Group
    from mpillm.parallel.request import Request

__all__ = ["RingAttention", "context_share", "merge_shares"]

# Tags of messages.
_KEYS_VALUES, _DERIVATIVES = 0, 1


class _Block(NamedTuple):
    """Keys and values (b, g, t, e) of the tokens that context rank `source` holds."""

    source: int
    keys: Array
    values: Array


class _Part(NamedTuple):
    """A chunk of this rank's queries by one of a block's keys, under a causal mask or without."""

    queries: slice
    keys: slice
    causal: bool


def context_share(micro: Micro, backend: Backend, ranks: int, rank: int) -> Micro:
    """What one context rank holds of a micro-batch of whole sequences, and which keys all hold.

    micro: of T tokens a sequence, index (T,); `counted` and `samples` stay as they are. Tokens,
    labels, mask, index and documents are those of the low chunk and of the high one, one after the
    other. With one rank it is the micro-batch itself.
    """
    if ranks == 1:
        return micro
    length = micro.index.shape[-1]

    def part(x: Array, of: int) -> Array:
        if x is None:
            return None
        runs = [x[..., start:stop] for start, stop in zigzag(length, ranks, of)]
        return backend.xp.concatenate(runs, axis=-1)

    keys = tuple(Keys(part(micro.index, r), part(micro.documents, r)) for r in range(ranks))
    return replace(
        micro,
        tokens=part(micro.tokens, rank),
        labels=part(micro.labels, rank),
        mask=part(micro.mask, rank),
        index=keys[rank].index,
        documents=keys[rank].documents,
        length=length,
        keys=keys,
    )


def merge_shares(out: Array, lse: Array, context: Group, backend: Backend) -> Array:
    """Attention over all keys, the same on every rank, from that over each rank's share of them.

    out: (b, h, t, e), lse: (b, h, t), of all queries. Returns (b, h, t, e). An allgather of
    b * h * t * (e + 1) elements a rank, in float32 at least.
    """
    if context.size == 1:
        return out
    e, wide = out.shape[-1], _accumulator(backend, out.dtype)
    mine = backend.empty((*lse.shape, e + 1), wide)
    mine[..., :e] = out
    mine[..., e] = lse
    shares = backend.empty((context.size, *mine.shape), wide)
    context.allgather(mine.reshape(-1), shares.reshape(-1))
    whole = shares[0]
    for rank in range(1, context.size):
        share = shares[rank]
        backend.ops.attention_merge(whole[..., :e], whole[..., e], share[..., :e], share[..., e])
    return whole[..., :e].astype(out.dtype)


class RingAttention:
    """Attention of this rank's queries to the keys of all context ranks.

    With T tokens a sequence, of which its successor in the ring holds t', and n = 2 * b * g * e
    elements of keys and values a token, every rank sends

    - forward: n * (T - t') elements in the compute dtype, in `context.size - 1` messages;
    - backward: these again, and the n * T derivatives by all of them, in float32 at least, in
      `context.size` messages.
    """

    def __init__(self, build: Build, *, causal: bool, scale: float) -> None:
        self._backend = build.backend
        self._ring = build.mesh.context
        self._causal = causal
        self._scale = scale

    def forward(
        self, q: Array, k: Array, v: Array, micro: Micro, drop: float = 0.0, row_keys: Array = None
    ) -> tuple[Array, Array, Any]:
        """Returns (out, lse, saved) as `Ops.attention_forward` does; lse is float32 at least.

        q: (b, h, t, e), k, v: (b, g, t, e), of this rank's tokens; drop, row_keys: dropout, as
        there. These are saved, and nothing of the other ranks' keys and values.
        """
        ops, xp = self._backend.ops, self._backend.xp
        wide = _accumulator(self._backend, q.dtype)
        out = self._backend.zeros(q.shape, wide)
        lse = xp.full(q.shape[:-1], -xp.inf, dtype=wide)
        saved = (q, k, v, drop, row_keys)
        for block in self._blocks(k, v, micro):
            for part in self._visible(micro.length, block.source):
                rows = part.queries
                part_out, part_lse, _ = self._apply(
                    ops.attention_forward, part, block, micro, saved
                )
                ops.attention_merge(out[:, :, rows], lse[:, :, rows], part_out, part_lse)
                micro.progress.poll()
        return out.astype(q.dtype, copy=False), lse, saved

    def backward(
        self, d_out: Array, out: Array, lse: Array, saved: Any, micro: Micro
    ) -> tuple[Array, Array, Array]:
        """Returns (dq, dk, dv) for this rank's tokens, float32 at least.

        The derivatives by a block's keys and values follow it round the ring, one round behind: a
        rank adds its own and sends them on, and after the last round they come home.
        """
        ops, ring = self._backend.ops, self._ring
        q, k, v, _, _ = saved
        wide = _accumulator(self._backend, q.dtype)
        dq = self._backend.zeros(q.shape, wide)
        buffer = self._buffers(k.shape, wide, micro)
        under_way: list[Request] = []
        for step, block in enumerate(self._blocks(k, v, micro)):
            total = buffer(step, block.source)
            if step > 0:
                under_way.append(self._receive(total, _DERIVATIVES, micro))
            parts = []
            for part in self._visible(micro.length, block.source):
                rows = part.queries
                again = self._apply(ops.attention_saved, part, block, micro, saved)
                d_rows, dk, dv = ops.attention_backward(
                    d_out[:, :, rows], out[:, :, rows], lse[:, :, rows], again
                )
                dq[:, :, rows] += d_rows
                parts.append((part.keys, dk, dv))
                micro.progress.poll()
            _complete(under_way, micro)
            if step == 0:
                total.fill(0.0)
            for keys, dk, dv in parts:
                total[0][:, :, keys] += dk
                total[1][:, :, keys] += dv
            under_way = [self._send(total, _DERIVATIVES, micro)]
        home = buffer(ring.size, ring.rank)
        under_way.append(self._receive(home, _DERIVATIVES, micro))
        _complete(under_way, micro)
        return dq, home[0], home[1]

    def _blocks(self, k: Array, v: Array, micro: Micro) -> Iterator[_Block]:
        """The keys and values of every rank in turn, this rank's first, each until the next."""
        ring = self._ring
        buffer = self._buffers(k.shape, k.dtype, micro)
        held = buffer(0, ring.rank)
        held[0], held[1] = k, v
        for step in range(ring.size):
            source = (ring.rank - step) % ring.size
            coming = buffer(step + 1, source - 1)
            under_way: list[Request] = []
            if step + 1 < ring.size:
                under_way.append(self._receive(coming, _KEYS_VALUES, micro))
                under_way.append(self._send(held, _KEYS_VALUES, micro))
            yield _Block(source, held[0], held[1])
            _complete(under_way, micro)
            held = coming

    def _buffers(
        self, shape: tuple[int, ...], dtype: Any, micro: Micro
    ) -> Callable[[int, int], Array]:
        """Two buffers that take turns by round; gives that of a round, for the tokens of a rank."""
        b, g, _, e = shape
        tokens = [keys.index.shape[-1] for keys in micro.keys]
        flat = [self._backend.empty((2 * b * g * max(tokens) * e,), dtype) for _ in range(2)]

        def buffer(step: int, source: int) -> Array:
            here = (2, b, g, tokens[source], e)
            return flat[step % 2][: math.prod(here)].reshape(here)

        return buffer

    def _visible(self, length: int, source: int) -> Iterator[_Part]:
        """The chunks of this rank's queries by those of a rank's keys, without the hidden ones."""
        for query_chunk, queries in _chunks(length, self._ring.size, self._ring.rank):
            for key_chunk, keys in _chunks(length, self._ring.size, source):
                if not self._causal or key_chunk <= query_chunk:
                    yield _Part(queries, keys, self._causal and key_chunk == query_chunk)

    def _apply(
        self, operation: Callable[..., Any], part: _Part, block: _Block, micro: Micro, saved: Any
    ) -> Any:
        """`attention_forward` or `attention_saved` of a part."""
        q, _, _, drop, row_keys = saved
        rows, keys, causal = part
        theirs, documents = micro.keys[block.source], micro.documents
        return operation(
            q[:, :, rows],
            block.keys[:, :, keys],
            block.values[:, :, keys],
            micro.index[..., rows],
            theirs.index[..., keys],
            None if documents is None else documents[:, rows],
            None if documents is None else theirs.documents[:, keys],
            causal=causal,
            scale=self._scale,
            drop=drop,
            row_keys=None if row_keys is None else row_keys[:, :, rows],
        )

    def _send(self, x: Array, tag: int, micro: Micro) -> Request:
        peer = (self._ring.rank + 1) % self._ring.size
        return micro.progress.watch(self._ring.isend(x, peer, tag))

    def _receive(self, x: Array, tag: int, micro: Micro) -> Request:
        peer = (self._ring.rank - 1) % self._ring.size
        return micro.progress.watch(self._ring.irecv(x, peer, tag))


def _complete(requests: list[Request], micro: Micro) -> None:
    for request in requests:
        micro.progress.wait(request)


def _chunks(length: int, ranks: int, rank: int) -> list[tuple[int, slice]]:
    """The number of each chunk that a rank holds, and where it is among the rank's tokens."""
    (start, middle), (begin, stop) = zigzag(length, ranks, rank)
    low, both = middle - start, middle - start + stop - begin
    return [(rank, slice(0, low)), (2 * ranks - 1 - rank, slice(low, both))]


def _accumulator(backend: Backend, dtype: Any) -> Any:
    """The dtype that sums over the ranks' parts are kept in: float32 at least."""
    return backend.xp.promote_types(dtype, "float32")
