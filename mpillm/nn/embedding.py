"""Token and position embeddings; the token table is cut over the tensor group by vocabulary."""

from __future__ import annotations

from typing import Any

from mpillm.nn.dropout import Dropout
from mpillm.nn.layer import Arrays, Build, Layer, Micro
from mpillm.nn.param import Init, Param
from mpillm.parallel.shard import Shard

__all__ = ["Embedding", "token_table"]


def token_table(
    build: Build, vocabulary: int, width: int, std: float, tied_use: int | None
) -> Param:
    """The (vocabulary, width) table, as the embedding uses it (0) or a tied head (1)."""
    tensor, pipe = build.mesh.tensor, build.mesh.pipe
    return build.store.add(
        "embedding.tokens",
        Shard.split((vocabulary, width), 0, tensor.size, tensor.rank),
        Init("normal", std),
        reduce_over=(build.mesh.replicas,),
        decay=True,
        # The first and the last stage hold a tied table; the first one counts it.
        owner=pipe.rank == 0,
        tied_use=tied_use,
    )


class Embedding(Layer):
    """x = tokens[token] + positions[index], with dropout.

    Takes nothing; gives this rank's rows of x, (b, t, d) or (rows, d), see `mpillm.nn.rows`.

    auxiliary: whether it also gives an auxiliary loss of 0, float64 (1,), for blocks to add to.
    """

    def __init__(
        self,
        build: Build,
        vocabulary: int,
        context: int,
        width: int,
        *,
        std: float,
        drop: float,
        tied: bool,
        auxiliary: bool = False,
    ) -> None:
        self._backend = build.backend
        self._rows = build.rows
        self.tokens = token_table(build, vocabulary, width, std, 0 if tied else None)
        self.positions = build.store.add(
            "embedding.positions",
            Shard.whole((context, width)),
            Init("normal", std),
            reduce_over=(build.mesh.replicas,),
            decay=True,
            owner=build.mesh.tensor.rank == 0,
        )
        self._dropout = Dropout(build, "embedding", drop)
        self._auxiliary = auxiliary

    def forward(self, inputs: Arrays, micro: Micro) -> tuple[Arrays, Any]:
        """() -> this rank's rows of x, and the auxiliary loss, if any."""
        ops, rows, index = self._backend.ops, self._rows, micro.index
        first = self.tokens.shard.start[0]
        x = rows.sum(ops.embedding_forward(self.tokens.value, micro.tokens, first))
        if rows.shared:
            index = rows.take(self._backend.xp.broadcast_to(index, micro.shape))
        x += ops.embedding_forward(self.positions.value, index)
        outputs, saved = self._dropout.forward((x,), micro)
        if self._auxiliary:
            outputs = (*outputs, self._backend.zeros((1,), "float64"))
        return outputs, saved

    def backward(self, d_outputs: Arrays, saved: Any, micro: Micro) -> Arrays:
        """This rank's rows of dx -> ()."""
        (d_rows,) = self._dropout.backward(d_outputs[:1], saved, micro)
        tokens, positions, ops = self.tokens, self.positions, self._backend.ops

        def add_gradients() -> None:
            # Gathered here, so that work that is put off holds this rank's rows only. Every rank
            # has the positions' whole gradient then, and no sum over the ranks is needed.
            dx = self._rows.gather(d_rows, *micro.shape)
            ops.embedding_backward(dx, micro.tokens, tokens.grad, tokens.shard.start[0])
            # One index for all sequences: their gradients are added before the rows are looked up.
            by_index = dx.sum(axis=0) if micro.index.ndim == 1 else dx
            ops.embedding_backward(by_index, micro.index, positions.grad)

        micro.gradients.add((tokens, positions), add_gradients)
        return ()
