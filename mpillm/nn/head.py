"""The end of a language model: final norm, projection to the vocabulary, cross-entropy.

They are one layer, so that the logits of a whole micro-batch need never exist: rows are taken in
chunks. Where the backward pass of a micro-batch follows its forward pass at once, a chunk's logits
are used for both and let go; otherwise the backward pass computes them anew. The vocabulary is cut
over the tensor group; three small sums over it give each row's loss (Shoeybi et al. 2019, section
3).
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpillm.nn.embedding import token_table
from mpillm.nn.layer import Arrays, Build, Layer, Micro
from mpillm.nn.param import Init
from mpillm.parallel.shard import Shard, split_range

if TYPE_CHECKING:
    from mpillm.array.backend import Array

__all__ = ["LanguageModelHead"]

# Logits that exist at once on a rank, at most (but never less than one row): 64 MiB of float32, so
# that products have hundreds of rows for each time that they read the weight.
_CHUNK = 1 << 24


class LanguageModelHead(Layer):
    """Final norm, projection and loss.

    Takes this rank's rows of x, (b, t, d) or (rows, d), see `mpillm.nn.rows`. Gives, by
    `micro.want`, the summed loss of the counted tokens as a 0-dimensional float64, or all logits
    (b, t, v), or those of the last token (b, 1, v). An auxiliary loss, float64 (1,), is passed on
    beside the loss; the step's loss is the sum of both.

    norm: the final norm. tied: the projection is the embedding's table, else a weight of its own.
    """

    def __init__(
        self, build: Build, norm: Layer, vocabulary: int, width: int, *, std: float, tied: bool
    ) -> None:
        tensor = build.mesh.tensor
        self._backend = build.backend
        self._tensor = tensor
        self._rows = build.rows
        self._norm = norm
        self._vocabulary = vocabulary
        if tied:
            self.weight = token_table(build, vocabulary, width, std, 1)
        else:
            self.weight = build.store.add(
                "head.weight",
                Shard.split((vocabulary, width), 0, tensor.size, tensor.rank),
                Init("normal", std),
                reduce_over=(build.mesh.replicas,),
                decay=True,
                owner=True,
            )
        self._first = self.weight.shard.start[0]

    def forward(self, inputs: Arrays, micro: Micro) -> tuple[Arrays, Any]:
        """This rank's rows of x -> (loss,) or (logits,); (x, auxiliary) -> (loss, auxiliary)."""
        x, *auxiliary = inputs
        if micro.want != "loss":
            return (self._all_logits(x, micro),), None
        (y,), saved_norm = self._norm.forward((x,), micro)
        y_nd = self._all_rows(y, micro)
        ops, weight_vd = self._backend.ops, self._weight_vd()
        labels_n, mask_n = micro.labels.reshape(-1), micro.mask.reshape(-1)
        total, sums = self._backend.zeros((), "float64"), []
        fused = micro.training and micro.scale is not None
        dy_nd: Array = self._backend.empty(y_nd.shape, mask_n.dtype) if fused else None
        chunks = self._chunks(len(y_nd))
        room_nv = self._room(chunks, mask_n.dtype)
        for rows in chunks:
            logits = ops.matmul(y_nd[rows], weight_vd.T, out=room_nv[: rows.stop - rows.start])
            row_max, exp_sum, target = self._sums(logits, labels_n[rows])
            loss_n = (self._backend.xp.log(exp_sum) - target) * mask_n[rows]
            total += loss_n.sum(dtype="float64")
            if fused:
                weight_n = mask_n[rows] * micro.scale
                d_logits = ops.cross_entropy_backward(
                    logits, exp_sum, labels_n[rows], weight_n, self._first
                )
                self._derivatives(d_logits, y_nd[rows], weight_vd, dy_nd[rows], micro)
            else:
                sums.append((row_max, exp_sum))
        if not micro.training:
            return (total, *auxiliary), None
        kept = dy_nd if fused else (y, sums)
        return (total, *auxiliary), (saved_norm, kept, len(auxiliary))

    def backward(self, d_outputs: Arrays, saved: Any, micro: Micro) -> Arrays:
        """(the derivative of the step's loss by a token's loss, a float) -> this rank's dx.

        Followed by the derivative by the auxiliary loss, the same number, if there is one.
        """
        (scale,) = d_outputs
        saved_norm, kept, losses = saved
        if micro.scale is None:
            y, sums = kept
            dy_nd = self._derivatives_anew(scale, y, sums, micro)
        elif scale == micro.scale:
            dy_nd = kept
        else:
            raise ValueError(f"the forward pass reckoned with {micro.scale}, not with {scale}")
        dy = self._rows.sum(dy_nd.reshape(*micro.shape, dy_nd.shape[-1]))
        d_inputs = self._norm.backward((dy,), saved_norm, micro)
        d_auxiliary = [self._backend.xp.full((1,), scale, dtype="float64")] * losses
        return (*d_inputs, *d_auxiliary)

    def _derivatives_anew(
        self, scale: float, y: Array, sums: list[tuple[Array, Array]], micro: Micro
    ) -> Array:
        """dy (n, d) from logits that are computed once more, chunk by chunk."""
        ops, weight_vd = self._backend.ops, self._weight_vd()
        y_nd = self._all_rows(y, micro)
        labels_n, weight_n = micro.labels.reshape(-1), micro.mask.reshape(-1) * scale
        dy_nd = self._backend.empty(y_nd.shape, weight_n.dtype)
        for rows, (row_max, exp_sum) in zip(self._chunks(len(y_nd)), sums, strict=True):
            logits = ops.matmul(y_nd[rows], weight_vd.T)
            ops.cross_entropy_forward(logits, row_max, labels_n[rows], self._first)
            d_logits = ops.cross_entropy_backward(
                logits, exp_sum, labels_n[rows], weight_n[rows], self._first
            )
            self._derivatives(d_logits, y_nd[rows], weight_vd, dy_nd[rows], micro)
        return dy_nd

    def _derivatives(
        self, d_logits_nv: Array, y_nd: Array, weight_vd: Array, dy_nd: Array, micro: Micro
    ) -> None:
        """Write a chunk's dy, and hand in the work for the weight's gradient."""
        ops, weight = self._backend.ops, self.weight
        d_logits_nv = ops.operand(d_logits_nv)
        ops.matmul(d_logits_nv, weight_vd, out=dy_nd)

        def add_gradients() -> None:
            ops.matmul(d_logits_nv.T, y_nd, out=weight.grad, accumulate=True)

        micro.gradients.add((weight,), add_gradients)

    def _all_rows(self, y: Array, micro: Micro) -> Array:
        """(b * t, d), an operand of products."""
        y = self._backend.ops.operand(y)
        return self._rows.gather(y, *micro.shape).reshape(-1, y.shape[-1])

    def _weight_vd(self) -> Array:
        """This rank's rows of the weight, an operand of products."""
        return self._backend.ops.operand(self.weight.value)

    def _chunks(self, n: int) -> list[slice]:
        """Even runs of the rows."""
        most = max(1, _CHUNK // max(1, self.weight.shard.local_shape[0]))
        count = -(-n // most)
        return [slice(*split_range(n, count, number)) for number in range(count)]

    def _room(self, chunks: list[slice], dtype: Any) -> Array:
        """An array for the logits of one chunk after the other."""
        rows = max((chunk.stop - chunk.start for chunk in chunks), default=0)
        return self._backend.empty((rows, self.weight.shard.local_shape[0]), dtype)

    def _sums(self, logits_nv: Array, labels_n: Array) -> tuple[Array, Array, Array]:
        """The maximum, the sum of exp(logit - maximum) and the target over all ranks, (n,) each.

        logits_nv: this rank's, overwritten with exp(logit - maximum).
        """
        ops = self._backend.ops
        row_max = self._tensor.allreduce(ops.row_max(logits_nv), "max")
        sums = ops.cross_entropy_forward(logits_nv, row_max, labels_n, self._first)
        self._tensor.allreduce(sums)
        return row_max, sums[0], sums[1]

    def _all_logits(self, x: Array, micro: Micro) -> Array:
        """Logits (b, t, v) of the whole vocabulary, on every rank of the tensor group."""
        x = self._rows.gather(x, *micro.shape)
        if micro.want == "last_logits":  # the rows of last tokens may be another rank's
            x = x[:, -1:]
        (y,), _ = self._norm.forward((x,), micro)
        b, t, d = y.shape
        xp, size = self._backend.xp, self._tensor.size
        mine_vn = self._backend.ops.matmul(
            self._weight_vd(), self._backend.ops.operand(y.reshape(-1, d)).T
        )
        if size == 1:
            return mine_vn.T.reshape(b, t, self._vocabulary)
        counts = [
            (stop - start) * b * t
            for start, stop in (split_range(self._vocabulary, size, r) for r in range(size))
        ]
        logits_vn = self._backend.empty((self._vocabulary, b * t), y.dtype)
        flat = self._tensor.allgather(
            xp.ascontiguousarray(mine_vn).reshape(-1), logits_vn.reshape(-1), counts
        )
        return flat.reshape(self._vocabulary, b * t).T.reshape(b, t, self._vocabulary)
