"""Tokens to micro-batches.

Which text is sample number s is a pure function of (seed, s), so a run that is resumed, laid out
anew or batched anew takes the same samples. Nobody draws anything and nothing is stored but s.

Sample s belongs to epoch e = s // W. In an epoch the text is cut into W windows of T + 1 tokens,
the last token of one being the first of the next, from a place that hashes of (seed, e) choose; a
keyed permutation orders them. W is one less than would fit, so that this place ranges over more
than a window: within an epoch no target is used twice; over the epochs a target stands at every
place of a window equally often, and what the ends of the text, less than two windows together, lose
in one epoch they get in another.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from mpillm.array.random import fold, permute
from mpillm.errors import UserError

__all__ = ["EvaluationSet", "Loader", "MicroBatch"]

Tokens = NDArray[np.integer[Any]]


@dataclass(frozen=True)
class MicroBatch:
    """`b` rows of `T` tokens on the host. Where the mask is False, tokens and labels are 0."""

    tokens: NDArray[np.int32]  # (b, T)
    labels: NDArray[np.int32]  # (b, T): the token that follows
    mask: NDArray[np.bool_]  # (b, T): whether the label counts
    samples: NDArray[np.int64]  # (b,): number of the row in the step, or in the evaluation


def _micro_batch(texts: Sequence[Tokens], first: int, rows: int, length: int) -> MicroBatch:
    """Rows `first`, `first + 1`, ... of `length` tokens: the texts, then padding.

    texts: at most `rows`, of at most `length + 1` tokens, each the next one's label.
    """
    tokens = np.zeros((rows, length), dtype=np.int32)
    labels = np.zeros((rows, length), dtype=np.int32)
    mask = np.zeros((rows, length), dtype=np.bool_)
    for row, text in enumerate(texts):
        count = len(text) - 1
        tokens[row, :count] = text[:-1]
        labels[row, :count] = text[1:]
        mask[row, :count] = True
    return MicroBatch(tokens, labels, mask, np.arange(first, first + rows, dtype=np.int64))


class Loader:
    """The training samples of a text and their micro-batches."""

    def __init__(
        self,
        tokens: Tokens,
        sequence_length: int,
        batch_size: int,
        micro_batch_size: int,
        seed: int,
    ) -> None:
        """tokens: ids (N,). batch_size: sequences a step over all ranks.

        Raises UserError for a text shorter than one window.
        """
        targets = len(tokens) - 1
        if targets < sequence_length:
            raise UserError(
                f"train.sequence_length = {sequence_length} needs a training text of at least"
                f" {sequence_length + 1} tokens, and it has {len(tokens)}; use more text"
                + (f" or train.sequence_length <= {targets}" if targets > 0 else "")
            )
        self._tokens = tokens
        self._length = sequence_length
        self._batch_size = batch_size
        self._micro_batch_size = micro_batch_size
        self._seed = seed
        self._windows = max(1, targets // sequence_length - 1)
        self._slack = targets - self._windows * sequence_length

    @property
    def samples_per_epoch(self) -> int:
        """W, the number of windows in an epoch."""
        return self._windows

    def start(self, sample: int) -> int:
        """Place in the text of the first token of sample number `sample` of the run."""
        epoch, place = divmod(sample, self._windows)
        window = permute(place, self._windows, fold(self._seed, "order", epoch))
        # First the place within a window, all alike; then, where the slack has room, how many whole
        # windows more. One draw from the slack would favour the places that occur in it twice.
        phase = fold(self._seed, "phase", epoch) % min(self._length, self._slack + 1)
        room = (self._slack - phase) // self._length + 1
        phase += fold(self._seed, "room", epoch) % room * self._length
        return phase + window * self._length

    def sample(self, sample: int) -> tuple[Tokens, Tokens]:
        """Inputs and labels, (T,) each, of sample number `sample` of the run."""
        text = self._window(sample)
        return text[:-1], text[1:]

    def micro_batch(self, first_sample: int, j: int) -> MicroBatch:
        """Micro-batch j of the step before which `first_sample` samples were consumed.

        It holds the step's sequences [j * b, (j + 1) * b), b the micro-batch size; from the batch
        size on they are padding, so a `j` beyond the last gives padding only.
        """
        first = j * self._micro_batch_size
        stop = min(first + self._micro_batch_size, self._batch_size)
        texts = [self._window(first_sample + i) for i in range(first, stop)]
        return _micro_batch(texts, first, self._micro_batch_size, self._length)

    def counted_tokens(self, first_sample: int) -> int:
        """Number of labels that count in the step after `first_sample` samples, over all ranks.

        Windows of a running text are all full, so that it is the same for every step.
        """
        return self._batch_size * self._length

    def _window(self, sample: int) -> Tokens:
        start = self.start(sample)
        return self._tokens[start : start + self._length + 1]


class EvaluationSet:
    """A whole text in windows of T tokens that do not overlap: every target exactly once.

    Window i has the inputs [i * T, (i + 1) * T) and the labels one further; the last is padded.
    """

    def __init__(self, tokens: Tokens, sequence_length: int, micro_batch_size: int) -> None:
        """tokens: ids (N,). Raises UserError for a text without a target."""
        if len(tokens) < 2:
            raise UserError(
                f"data.validation leaves {len(tokens)} tokens to validate on; expected at least 2"
            )
        self._tokens = tokens
        self._length = sequence_length
        self._micro_batch_size = micro_batch_size
        self._windows = -(-self.counted_tokens // sequence_length)

    @property
    def counted_tokens(self) -> int:
        """Number of targets, N - 1."""
        return len(self._tokens) - 1

    def __len__(self) -> int:
        """Number of micro-batches that hold the text."""
        return -(-self._windows // self._micro_batch_size)

    def micro_batch(self, j: int) -> MicroBatch:
        """Micro-batch j; beyond the last, padding only, so that all ranks can run as many."""
        first = j * self._micro_batch_size
        stop = min(first + self._micro_batch_size, self._windows)
        starts = range(first * self._length, stop * self._length, self._length)
        texts = [self._tokens[start : start + self._length + 1] for start in starts]
        return _micro_batch(texts, first, self._micro_batch_size, self._length)
