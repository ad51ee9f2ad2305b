"""Fewer writers than ranks: on each node some ranks write for the others.

A rank hands its items to the writer block by block, and the writer takes them in turn, so that it
holds no more than a block of what is not its own. 10,000 ranks then make a few hundred files.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Protocol

import numpy as np
import numpy.typing as npt

from mpillm.checkpoint.item import BLOCK, Item, flat_blocks
from mpillm.checkpoint.manifest import DTYPES

__all__ = ["Handing", "Node", "writer_of"]


class Node(Protocol):
    """What handing over needs of the communicator of a node's ranks, whose arrays are NumPy's."""

    @property
    def rank(self) -> int:
        """This rank on its node."""

    @property
    def size(self) -> int:
        """Number of ranks on the node."""

    def allgather_objects(self, item: Any, /) -> list[Any]:
        """The values of all ranks by rank, everywhere."""

    def send(self, x: Any, peer: int, /) -> None:
        """Send an array to a rank."""

    def recv(self, x: Any, peer: int, /) -> Any:
        """Receive into an array from a rank."""


def writer_of(rank: int, ranks: int, writers: int) -> int:
    """The rank that writes what `rank` has, with so many writers among so many ranks; 0: all.

    >>> [writer_of(rank, 5, 2) for rank in range(5)]
    [0, 0, 0, 3, 3]
    """
    if not 0 < writers < ranks:
        return rank
    return -(-(rank * writers // ranks) * ranks // writers)


class Handing:
    """The way of one save's items to their writers; all ranks of the node make one together.

    items: what this rank is to write: its own, then those of each rank it writes for, whose blocks
    arrive as they are asked for, in this order. None on a rank that hands its own over.
    """

    def __init__(self, items: Sequence[Item], node: Node, writers: int) -> None:
        self._node = node
        self._writer = writer_of(node.rank, node.size, writers)
        self._given = list(items) if self._writer != node.rank else []
        self.items = list(items) if self._writer == node.rank else []
        self._to_come: list[_Arrival] = []
        if not 0 < writers < node.size:
            return
        facts = [replace(item, array=tuple) for item in items]  # all but the elements
        for rank, others in enumerate(node.allgather_objects(facts)):
            if rank == node.rank or writer_of(rank, node.size, writers) != node.rank:
                continue
            for item in others:
                self._to_come.append(_Arrival(rank, item.nbytes, DTYPES[item.dtype]))
                self.items.append(replace(item, array=partial(self._take, self._to_come[-1])))

    def send(self) -> None:
        """Give this rank's items to its writer; returns when all have been taken."""
        buffer = np.empty(BLOCK if self._given else 0, np.uint8)
        for item in self._given:
            sent, used = 0, 0
            given = item.blocks()
            for array in (given,) if isinstance(given, np.ndarray) else given:
                for block in flat_blocks(array, DTYPES[item.dtype]):
                    raw = block.view(np.uint8)
                    while raw.size:
                        part = raw[: BLOCK - used]
                        buffer[used : used + part.size] = part
                        used, raw = used + part.size, raw[part.size :]
                        if used == BLOCK or sent + used == item.nbytes:
                            self._node.send(buffer[:used], self._writer)
                            sent, used = sent + used, 0
            if sent != item.nbytes or used:
                raise ValueError(f"{item.kind} '{item.name}': blocks of {sent + used} bytes")

    def drain(self) -> None:
        """Take what has not been taken, and drop it: a writer that failed keeps nobody waiting."""
        for arrival in self._to_come:
            for _ in self._take(arrival):
                pass

    def _take(self, arrival: _Arrival) -> Iterator[npt.NDArray[Any]]:
        """The blocks of another rank's item that are still to come."""
        buffer = np.empty(min(BLOCK, arrival.nbytes), np.uint8)
        while arrival.nbytes:
            block = buffer[: arrival.nbytes]
            self._node.recv(block, arrival.rank)
            arrival.nbytes -= block.size
            yield block.view(arrival.dtype)


@dataclass
class _Arrival:
    """What is still to come of an item."""

    rank: int
    nbytes: int
    dtype: np.dtype[Any]
