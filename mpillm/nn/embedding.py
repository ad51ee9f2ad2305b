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
    """x = tokens[token] + positions[index], with dropout. Takes nothing; gives x (b, t, d)."""

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
    ) -> None:
        self._ops = build.backend.ops
        self._tensor = build.mesh.tensor
        self.tokens = token_table(build, vocabulary, width, std, 0 if tied else None)
        self.positions = build.store.add(
            "embedding.positions",
            Shard.whole((context, width)),
            Init("normal", std),
            reduce_over=(build.mesh.replicas,),
            decay=True,
            owner=self._tensor.rank == 0,
        )
        self._dropout = Dropout(build, "embedding", drop)

    def forward(self, inputs: Arrays, micro: Micro) -> tuple[Arrays, Any]:
        """() -> x (b, t, d)."""
        first = self.tokens.shard.start[0]
        x = self._ops.embedding_forward(self.tokens.value, micro.tokens, first)
        self._tensor.allreduce(x)
        x += self._ops.embedding_forward(self.positions.value, micro.index)
        return self._dropout.forward((x,), micro)

    def backward(self, d_outputs: Arrays, saved: Any, micro: Micro) -> Arrays:
        """dx -> ()."""
        (dx,) = self._dropout.backward(d_outputs, saved, micro)
        tokens, positions, ops = self.tokens, self.positions, self._ops

        def add_gradients() -> None:
            ops.embedding_backward(dx, micro.tokens, tokens.grad, tokens.shard.start[0])
            # One index for all sequences: their gradients are added before the rows are looked up.
            by_index = dx.sum(axis=0) if micro.index.ndim == 1 else dx
            ops.embedding_backward(by_index, micro.index, positions.grad)

        micro.gradients.add((tokens, positions), add_gradients)
        return ()
