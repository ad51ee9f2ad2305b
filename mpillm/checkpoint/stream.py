"""Arrays of a checkpoint that are never in memory as a whole."""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import numpy.typing as npt

from mpillm.checkpoint.item import BLOCK
from mpillm.checkpoint.manifest import DTYPES
from mpillm.checkpoint.reader import Checkpoint
from mpillm.parallel.shard import Shard

__all__ = ["stream"]


def stream(
    checkpoint: Checkpoint, kind: str, name: str, shard: Shard, range: tuple[int, int] | None = None
) -> Iterator[npt.NDArray[Any]]:
    """What `Checkpoint.read` gives, flat and in successive parts of about `BLOCK` bytes at most.

    Parts end between rows where rows are short. Raises as `read` does, when a part is asked for.
    """
    low, stop = range or (0, shard.size)
    row = max(math.prod(shard.local_shape[1:]), 1)
    most = BLOCK // DTYPES[checkpoint.array(kind, name).dtype].itemsize
    step = max(most // row * row, 1) if row <= most else most
    while low < stop:
        high = min((low // step + 1) * step, stop)
        yield checkpoint.read(kind, name, shard, (low, high))
        low = high
