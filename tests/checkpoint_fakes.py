"""Ranks without MPI for the checkpoint tests: threads that meet at a barrier, and small states."""

from __future__ import annotations

import threading
from collections import defaultdict
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from queue import SimpleQueue
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mpillm.checkpoint.saver import Saver
from mpillm.checkpoint.settings import CheckpointSettings
from mpillm.checkpoint.store import Item
from mpillm.parallel.shard import Shard

T = TypeVar("T")

_PATIENCE = 30  # seconds until a rank that waits for ever gives up


@dataclass
class _Meeting:
    """What the ranks of a communicator share."""

    size: int
    slots: list[Any] = field(default_factory=list)
    queues: dict[tuple[int, int], SimpleQueue[Any]] = field(
        default_factory=lambda: defaultdict(SimpleQueue)
    )

    def __post_init__(self) -> None:
        self.slots = [None] * self.size
        self.barrier = threading.Barrier(self.size, timeout=_PATIENCE)
        for pair in np.ndindex(self.size, self.size):
            self.queues[pair]  # made here, not by two threads at once


class ThreadWorld:
    """One rank of a world of threads, and the communicator of its node."""

    def __init__(self, rank: int, meeting: _Meeting, node: ThreadWorld | None = None) -> None:
        self.rank, self.size = rank, meeting.size
        self.node = node or self
        self.largest = 0  # bytes in one message
        self._meeting = meeting

    def allgather_objects(self, value: Any) -> list[Any]:
        self._meeting.slots[self.rank] = value
        self._meeting.barrier.wait()
        values = list(self._meeting.slots)
        self._meeting.barrier.wait()
        return values

    def gather_objects(self, value: Any) -> list[Any] | None:
        values = self.allgather_objects(value)
        return values if self.rank == 0 else None

    def broadcast_object(self, value: Any) -> Any:
        return self.allgather_objects(value)[0]

    def send(self, x: npt.NDArray[Any], peer: int) -> None:
        self.largest = max(self.largest, x.nbytes)
        self._meeting.queues[self.rank, peer].put(x.copy())

    def recv(self, x: npt.NDArray[Any], peer: int) -> None:
        arrived = self._meeting.queues[peer, self.rank].get(timeout=_PATIENCE)
        assert (x.dtype, x.shape) == (arrived.dtype, arrived.shape)
        x[...] = arrived


def on_ranks(
    size: int, work: Callable[[ThreadWorld], T], node: int | None = None
) -> list[T | BaseException]:
    """What `work` returns or raises on each of `size` ranks, of which `node` make a node."""
    node = node or size
    world = _Meeting(size)
    nodes = [_Meeting(min(node, size - first)) for first in range(0, size, node)]
    ranks = [
        ThreadWorld(rank, world, ThreadWorld(rank % node, nodes[rank // node]))
        for rank in range(size)
    ]
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(work, rank) for rank in ranks]
    return [future.exception() or future.result() for future in futures]


FACTS: dict[str, Any] = {
    "layout": {"data": 2, "tensor": 1},
    "settings": {"optimizer": {"lr": 1e-3}, "model": {"family": "gpt2"}},
    "extra": {"tokenizer.json": "0" * 64},
}


def save_ranks(
    folder: Path,
    step: int,
    items: list[list[Item]],
    keep: int = 2,
    *,
    node: int | None = None,
    state: dict[str, Any] | None = None,
    beside: bool = False,
    **settings: Any,
) -> Path:
    """Save with one rank for each list of items; what every rank raises is raised.

    node: ranks of a node. beside: by a thread. Other settings are those of the section.
    """

    def work(world: ThreadWorld) -> Path:
        chosen = CheckpointSettings(keep=keep, **settings)
        saver = Saver(folder, world, world.node, chosen)
        facts = {**FACTS, "samples": 16 * step, "state": state}
        if not beside:
            return saver.save(step, items[world.rank], **facts)
        saver.begin(step, items[world.rank], **facts)
        saver.copied()
        path = saver.finish()
        assert path is not None
        return path

    return same(on_ranks(len(items), work, node))


def same(results: list[T | BaseException]) -> T:
    """What all ranks have returned; what they have raised is raised, of one kind and message."""
    first = results[0]
    assert len({type(result) for result in results}) == 1, results
    if isinstance(first, BaseException):
        assert len({str(result) for result in results}) == 1, results
        raise first
    assert all(result == first for result in results)
    return first


def state(step: int) -> dict[str, npt.NDArray[np.float32]]:
    """Arrays that differ in every step."""
    rng = np.random.default_rng(step)
    return {
        "embed.tokens": rng.standard_normal((9, 4), dtype=np.float32),
        "head.gain": rng.standard_normal(4, dtype=np.float32),
    }


def items_of(step: int, ranks: int = 2) -> list[list[Item]]:
    """Each rank's items of `state(step)`: parameters cut by rows, the first moment by ranges."""
    items: list[list[Item]] = [[] for _ in range(ranks)]
    for name, array in state(step).items():
        whole = Shard.whole(array.shape)
        for rank in range(ranks):
            shard = Shard.split(array.shape, 0, ranks, rank)
            items[rank].append(Item("parameter", name, shard, array[shard.slices]))
            low, high = rank * array.size // ranks, (rank + 1) * array.size // ranks
            part = 2 * array.reshape(-1)[low:high]
            items[rank].append(Item("optimizer/m", name, whole, part, (low, high)))
    return items
