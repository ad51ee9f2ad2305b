"""Rows of text on their way through the model, and what it remembers of them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from mpillm.nn.layer import Micro
from mpillm.parallel.programs import lower
from mpillm.parallel.schedules import forward_only
from mpillm.parallel.shard import split_range

if TYPE_CHECKING:
    from mpillm.inference.loading import Pipeline

__all__ = ["Decoding"]


class Decoding:
    """Rows that are read token by token, with the keys and values of what was read so far.

    The rows are cut into micro-batches, one a pipeline rank where there are as many rows, so that
    no stage waits once the pipeline is filled. Each has its own state, and a rank keeps that of its
    own stages' layers. Every rank of the pipeline makes the same calls.
    """

    def __init__(self, pipeline: Pipeline, rows: int, capacity: int) -> None:
        """rows: at least 1. capacity: the most tokens of a row that are remembered."""
        pipe, chunks = pipeline.pipe, len(pipeline.stages)
        micros = min(pipe.size, rows)
        self._pipeline = pipeline
        self._capacity = capacity
        self._cuts = [split_range(rows, micros, j) for j in range(micros)]
        self._program = lower(forward_only(pipe.size, micros, chunks), chunks)[pipe.rank]
        self._states: list[dict[str, Any]] = []
        self.forget()

    def forget(self) -> None:
        """Begin anew, with nothing read."""
        self._states.clear()  # before there are new ones
        self._states += [self._new_state(stop - start) for start, stop in self._cuts]
        self.length = 0

    def read(self, tokens: np.ndarray, want: Literal["logits", "last_logits"]) -> np.ndarray | None:
        """Read the next t tokens of every row, int64 (rows, t).

        Gives logits, on the host of the last stage's ranks and None on the others: after each of
        the tokens (rows, t, v), or after the last one (rows, 1, v).
        """
        micros = [
            self._micro(tokens[start:stop], state, want)
            for (start, stop), state in zip(self._cuts, self._states, strict=True)
        ]
        outputs = self._pipeline.executor.run(self._program, micros)
        self.length += tokens.shape[1]
        if not outputs:
            return None
        to_host = self._pipeline.backend.to_host
        return np.concatenate([to_host(outputs[j][0]) for j in range(len(micros))])

    def _new_state(self, b: int) -> dict[str, Any]:
        """The empty state of b rows, of all of this rank's layers."""
        state: dict[str, Any] = {}
        for stage in self._pipeline.stages:
            state |= stage.new_state(b, self._capacity)
        return state

    def _micro(
        self, tokens: np.ndarray, state: dict[str, Any], want: Literal["logits", "last_logits"]
    ) -> Micro:
        """The micro-batch of these tokens (b, t), the next ones of its rows."""
        b, t = tokens.shape
        backend = self._pipeline.backend
        return Micro(
            tokens=backend.from_host(tokens),
            index=backend.xp.arange(self.length, self.length + t),
            samples=backend.xp.arange(b),
            want=want,
            state=state,
            progress=self._pipeline.progress,
        )
