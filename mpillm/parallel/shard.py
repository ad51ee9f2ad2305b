"""Who owns which part of a global array.

A `Shard` is a hyperslab: a start and a stop for every axis of a global shape. The split rule stands
here and nowhere else. Shards may be empty: three heads on four ranks leave one rank without a head.
Nothing in this module sees an array or a communicator.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

__all__ = ["Shard", "split_range", "zigzag"]


def split_range(total: int, parts: int, index: int) -> tuple[int, int]:
    """Start and stop of part `index` when `total` items are dealt to `parts` in contiguous runs.

    The first `total % parts` parts hold one item more, so that sizes differ by at most one.

    >>> [split_range(5, 3, i) for i in range(3)]
    [(0, 2), (2, 4), (4, 5)]
    """
    if not 0 <= index < parts:
        raise ValueError(f"part {index} of {parts} does not exist")
    base, extra = divmod(total, parts)
    start = index * base + min(index, extra)
    return start, start + base + (1 if index < extra else 0)


def zigzag(length: int, ranks: int, rank: int) -> tuple[tuple[int, int], tuple[int, int]]:
    """Start and stop of the two runs of a sequence's tokens that a context rank holds.

    The sequence is cut into 2 * ranks chunks, and rank r has chunk r, the low one, and chunk
    2 * ranks - 1 - r, the high one: a rank whose first queries see few keys has last queries that
    see many, so that under a causal mask all ranks have as much to do (Llama Team 2024, "The Llama
    3 Herd of Models", section 3.3.2). Chunks may be empty.

    >>> [zigzag(8, 2, rank) for rank in range(2)]
    [((0, 2), (6, 8)), ((2, 4), (4, 6))]
    """
    if not 0 <= rank < ranks:
        raise ValueError(f"rank {rank} of {ranks} does not exist")
    chunks = 2 * ranks
    return split_range(length, chunks, rank), split_range(length, chunks, chunks - 1 - rank)


@dataclass(frozen=True)
class Shard:
    """A hyperslab `[start, stop)` of a global array of shape `shape`."""

    shape: tuple[int, ...]
    start: tuple[int, ...]
    stop: tuple[int, ...]

    def __post_init__(self) -> None:
        if not len(self.shape) == len(self.start) == len(self.stop):
            raise ValueError(f"axes disagree: {self.shape}, {self.start}, {self.stop}")
        for size, start, stop in zip(self.shape, self.start, self.stop, strict=True):
            if not 0 <= start <= stop <= size:
                raise ValueError(f"[{start}, {stop}) does not lie in an axis of {size}")

    @classmethod
    def whole(cls, shape: tuple[int, ...]) -> Shard:
        """The whole array."""
        return cls(tuple(shape), (0,) * len(shape), tuple(shape))

    @classmethod
    def split(cls, shape: tuple[int, ...], axis: int, parts: int, index: int) -> Shard:
        """Part `index` of `parts` along `axis`, whole along the other axes."""
        start, stop = split_range(shape[axis], parts, index)
        begins, ends = [0] * len(shape), list(shape)
        begins[axis], ends[axis] = start, stop
        return cls(tuple(shape), tuple(begins), tuple(ends))

    @property
    def local_shape(self) -> tuple[int, ...]:
        """Shape of the part."""
        return tuple(stop - start for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def size(self) -> int:
        """Number of elements in the part."""
        return math.prod(self.local_shape)

    @property
    def slices(self) -> tuple[slice, ...]:
        """Index of the part in the global array."""
        return tuple(slice(start, stop) for start, stop in zip(self.start, self.stop, strict=True))

    @property
    def is_whole(self) -> bool:
        """Whether the part is the whole array."""
        return self.local_shape == self.shape

    def overlap(self, other: Shard) -> Shard | None:
        """The common part of two shards of one global array; None when they share no element."""
        if self.shape != other.shape:
            raise ValueError(f"shards of different arrays: {self.shape} and {other.shape}")
        start = tuple(max(a, b) for a, b in zip(self.start, other.start, strict=True))
        stop = tuple(min(a, b) for a, b in zip(self.stop, other.stop, strict=True))
        if any(a >= b for a, b in zip(start, stop, strict=True)):
            return None
        return Shard(self.shape, start, stop)

    def locate(self, inner: Shard) -> tuple[slice, ...]:
        """Index of `inner`, which lies within this shard, in this shard's local array."""
        return tuple(
            slice(a - base, b - base)
            for a, b, base in zip(inner.start, inner.stop, self.start, strict=True)
        )
