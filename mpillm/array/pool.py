"""Arrays that are used again and again: messages, gathered weights, gradients in the making."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpillm.array.backend import Array, Backend

__all__ = ["Pool"]


class Pool:
    """Free arrays by shape and dtype. A page that was touched once need not be faulted in again."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._free: dict[tuple[tuple[int, ...], str], list[Array]] = {}
        # Arrays that were made, in use or free, and their bytes.
        self.made = 0
        self.bytes = 0

    def take(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array with undefined contents, the caller's until it is given back."""
        free = self._free.get(_key(shape, dtype))
        if free:
            return free.pop()
        array = self._backend.empty(shape, dtype)
        self.made += 1
        self.bytes += int(array.nbytes)
        return array

    def give(self, array: Array) -> None:
        """Give back what `take` gave; the caller must not use it any more."""
        self._free.setdefault(_key(array.shape, array.dtype), []).append(array)


def _key(shape: tuple[int, ...], dtype: Any) -> tuple[tuple[int, ...], str]:
    return tuple(shape), str(dtype)
