"""Ranks without MPI for the checkpoint tests: threads that meet at a barrier, and small states."""

from __future__ import annotations

import threading
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, TypeVar

import numpy as np
import numpy.typing as npt

from mpillm.checkpoint.store import Item, save
from mpillm.parallel.shard import Shard

T = TypeVar("T")


class ThreadWorld:
    """One rank of a world of threads."""

    def __init__(self, rank: int, slots: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size = rank, len(slots)
        self._slots, self._barrier = slots, barrier

    def _exchange(self, value: Any) -> list[Any]:
        self._slots[self.rank] = value
        self._barrier.wait()
        values = list(self._slots)
        self._barrier.wait()
        return values

    def gather_objects(self, value: Any) -> list[Any] | None:
        values = self._exchange(value)
        return values if self.rank == 0 else None

    def broadcast_object(self, value: Any) -> Any:
        return self._exchange(value)[0]


def on_ranks(size: int, work: Callable[[ThreadWorld], T]) -> list[T | BaseException]:
    """What `work` returns or raises on each of `size` ranks."""
    slots: list[Any] = [None] * size
    barrier = threading.Barrier(size, timeout=30)
    with ThreadPoolExecutor(size) as pool:
        futures = [pool.submit(work, ThreadWorld(rank, slots, barrier)) for rank in range(size)]
    return [future.exception() or future.result() for future in futures]


def save_ranks(folder: Path, step: int, items: list[list[Item]], keep: int = 2) -> Path:
    """Save with one rank for each list of items; what every rank raises is raised."""

    def work(world: ThreadWorld) -> Path:
        return save(
            folder,
            step,
            items[world.rank],
            world,
            samples=16 * step,
            layout={"data": len(items), "tensor": 1},
            settings={"optimizer": {"lr": 1e-3}, "model": {"family": "gpt2"}},
            keep=keep,
            extra={"tokenizer.json": "0" * 64},
        )

    results = on_ranks(len(items), work)
    kinds = {type(result) for result in results}
    assert len(kinds) == 1, results
    if isinstance(results[0], BaseException):
        raise results[0]
    assert set(results) == {results[0]}
    return results[0]


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
