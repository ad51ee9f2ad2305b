"""Keyed, counter-based random numbers: every number is a function of a key and a counter.

No generator carries a state, so nothing depends on who draws first. A weight's initial element is a
function of (seed, parameter name, flat global index); a dropout decision of (seed, step, layer,
sample, index, feature). A rank evaluates exactly the part that it owns, in any layout.

Three mixers, all integer arithmetic with the same bits on every array library:

- 64 bits: SplitMix64's finalizer (Steele, Lea, Flood 2014, "Fast splittable pseudorandom number
  generators"), used to derive keys and, over a counter, for initial weights;
- 32 bits: a two-multiply xor-shift mixer (the "lowbias32" constants of C. Wellons' hash
  prospector) with 64 bits of key, one half added before each multiply, for dropout;
- a balanced Feistel network with cycle walking (Black and Rogaway 2002, "Ciphers with arbitrary
  finite domains"), a permutation of any range without a table.
"""

from __future__ import annotations

import hashlib
from types import ModuleType
from typing import Any

__all__ = ["KeyedRandom", "fold", "permute"]

_MASK = (1 << 64) - 1
_GOLDEN = 0x9E3779B97F4A7C15


def _mix64(z: int) -> int:
    """SplitMix64's finalizer: a bijection of 64-bit integers."""
    z = (z ^ (z >> 30)) * 0xBF58476D1CE4E5B9 & _MASK
    z = (z ^ (z >> 27)) * 0x94D049BB133111EB & _MASK
    return z ^ (z >> 31)


def _word(part: int | str) -> int:
    """A 64-bit word of a key part; a string counts by its hash, never by Python's salted one."""
    if isinstance(part, str):
        return int.from_bytes(hashlib.sha256(part.encode()).digest()[:8], "little")
    return part & _MASK


def fold(key: int, *parts: int | str) -> int:
    """Derive a 64-bit key from `key` and an ordered sequence of integers and strings."""
    for part in parts:
        key = _mix64((key ^ _mix64((_word(part) + _GOLDEN) & _MASK)) + _GOLDEN & _MASK)
    return key & _MASK


def permute(index: int, size: int, key: int) -> int:
    """Image of `index` under the keyed permutation of `range(size)`; no table is built.

    Expected cost: fewer than four walks of an eight-round Feistel network.
    """
    if not 0 <= index < size:
        raise ValueError(f"index {index} does not lie in range({size})")
    half = max(1, ((size - 1).bit_length() + 1) // 2)
    mask = (1 << half) - 1
    while True:
        left, right = index >> half, index & mask
        for turn in range(8):
            left, right = right, left ^ (fold(key, turn, right) & mask)
        index = left << half | right
        if index < size:
            return index


class KeyedRandom:
    """The vectorized forms, on the arrays of one library (`numpy`, `cupy`)."""

    def __init__(self, xp: ModuleType) -> None:
        self._xp = xp

    def _mix64(self, z: Any) -> Any:
        u = self._xp.uint64
        z = (z ^ (z >> u(30))) * u(0xBF58476D1CE4E5B9)
        z = (z ^ (z >> u(27))) * u(0x94D049BB133111EB)
        return z ^ (z >> u(31))

    def fold(self, key: int, *counters: Any) -> Any:
        """`fold` over integer arrays, broadcast against each other; uint64, never 0-dimensional."""
        xp, golden = self._xp, self._xp.uint64(_GOLDEN)
        keys = xp.full((1,), key, dtype=xp.uint64)
        for counter in counters:
            word = self._mix64(counter.astype(xp.uint64) + golden)
            keys = self._mix64((keys ^ word) + golden)
        return keys

    def bits(self, row_keys: Any, counters: Any) -> Any:
        """Random uint32 numbers for every row and counter.

        row_keys: uint64 (...,). counters: integers (k,), or (..., k) to differ by row; each below
        2^32. Returns uint32 (..., k).
        """
        xp = self._xp
        u = xp.uint32
        low = (row_keys & xp.uint64(0xFFFFFFFF)).astype(u)[..., None]
        high = (row_keys >> xp.uint64(32)).astype(u)[..., None]
        x = counters.astype(u) * u(0x9E3779B9) + low
        x ^= x >> u(16)
        x *= u(0x7FEB352D)
        x += high
        x ^= x >> u(15)
        x *= u(0x846CA68B)
        x ^= x >> u(16)
        return x

    def keep(self, row_keys: Any, counters: Any, drop: float) -> Any:
        """Dropout decisions: True with probability `1 - drop`. Shapes as in `bits`; bool."""
        threshold = min(round(drop * 2.0**32), 2**32 - 1)
        return self.bits(row_keys, counters) >= self._xp.uint32(threshold)

    def normal(self, key: int, index: Any) -> Any:
        """Standard normal numbers, float64, one for each uint64 counter in `index`.

        Box and Muller (1958) on the two halves of SplitMix64 in counter mode.
        """
        xp = self._xp
        u = xp.uint64
        word = self._mix64(index * u(_GOLDEN) + u(key))
        first = ((word >> u(32)).astype(xp.float64) + 0.5) * 2.0**-32
        second = (word & u(0xFFFFFFFF)).astype(xp.float64) * 2.0**-32
        return xp.sqrt(-2.0 * xp.log(first)) * xp.cos(2.0 * xp.pi * second)

    def normal_slab(
        self, key: int, shape: tuple[int, ...], start: tuple[int, ...], stop: tuple[int, ...]
    ) -> Any:
        """Standard normal numbers for the hyperslab [start, stop) of an array of `shape`, float64.

        Each is the number whose counter is the element's flat C-order index in the whole array.
        """
        xp = self._xp
        index, stride = xp.zeros((1,) * len(shape), dtype=xp.uint64), 1
        for axis in reversed(range(len(shape))):
            place = xp.arange(start[axis], stop[axis], dtype=xp.uint64) * xp.uint64(stride)
            index = index + place.reshape((-1,) + (1,) * (len(shape) - 1 - axis))
            stride *= shape[axis]
        return self.normal(key, index)
