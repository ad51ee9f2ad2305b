"""What a process computes and how long it takes: FLOPs of its products, seconds by kind of work.

Both are plain objects that are handed to whoever is to be measured; see `mpillm.array.metered`.
"""

from __future__ import annotations

import contextlib
import math
import time
from collections import Counter, defaultdict
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

__all__ = ["OTHER", "WAITING", "Clock", "Product", "Tally", "communication"]

# Kinds of time that are no operation's: waiting for other ranks, and what no other kind claims.
WAITING, OTHER = "waiting", "other"


def communication(axis: str) -> str:
    """The kind of time in which data move between the ranks of an axis."""
    return f"communication.{axis}"


class Product(NamedTuple):
    """A matrix product as BLAS sees it: (..., m, k) times (..., k, n).

    a_turned, b_turned: whether an operand is stored by columns. dtype: the operands'. out: the type
    of the array that the result is written to, None where one is made. accumulate: whether it is
    added.
    """

    a: tuple[int, ...]
    b: tuple[int, ...]
    a_turned: bool
    b_turned: bool
    dtype: Any
    out: Any
    accumulate: bool

    @property
    def flops(self) -> int:
        """Multiplications and additions: 2 m n k, times the number of products."""
        return 2 * math.prod(self.result) * self.a[-1]

    @property
    def result(self) -> tuple[int, ...]:
        """The result's shape; leading axes are broadcast."""
        longer, shorter = sorted((self.a[:-2], self.b[:-2]), key=len, reverse=True)
        padded = (1,) * (len(longer) - len(shorter)) + shorter
        lead = (y if x == 1 else x for x, y in zip(longer, padded, strict=True))
        return (*lead, self.a[-2], self.b[-1])


class Tally:
    """Floating-point operations of matrix products so far and, on request, which products."""

    __slots__ = ("flops", "products")

    def __init__(self) -> None:
        self.flops = 0
        self.products: Counter[Product] | None = None  # None: they are not noted

    def note(self, a: Any, b: Any, out: Any, accumulate: bool) -> None:
        """Note a product among the others of its kind."""
        if self.products is not None:
            written = None if out is None else out.dtype
            product = Product(
                a.shape, b.shape, _turned(a), _turned(b), a.dtype, written, bool(accumulate)
            )
            self.products[product] += 1


def _turned(x: Any) -> bool:
    """Whether the elements of a column lie closer together than those of a row."""
    return bool(x.strides[-2] < x.strides[-1])


class Clock:
    """Seconds by kind of work, of the thread that does it.

    At any time exactly one kind is running. So the sum over the kinds is the whole time, and the
    time of an operation is without that of others within it.
    """

    def __init__(self, settle: Callable[[], None] | None = None) -> None:
        """settle: waits until a device has done what it was asked to; before each switch."""
        self._settle = settle
        self.last: dict[str, float] = {}
        self.start()

    def start(self) -> None:
        """Begin anew, with no time in any kind."""
        self.seconds: defaultdict[str, float] = defaultdict(float)
        self.kind = OTHER
        self._begin = self._since = time.perf_counter()

    def switch(self, kind: str) -> None:
        """From now on time goes to `kind`."""
        if self._settle is not None:
            self._settle()
        now = time.perf_counter()
        self.seconds[self.kind] += now - self._since
        self._since = now
        self.kind = kind

    @contextlib.contextmanager
    def during(self, kind: str) -> Iterator[None]:
        """Time goes to `kind` within the block, and then to what it went to before."""
        outer = self.kind
        self.switch(kind)
        try:
            yield
        finally:
            self.switch(outer)

    def stop(self) -> float:
        """Seconds since `start`; those of the kinds, which add up to them, are kept as `last`."""
        self.switch(OTHER)
        self.last = dict(self.seconds)
        return self._since - self._begin
