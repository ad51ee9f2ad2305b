"""How fast this process multiplies matrices of given shapes."""

from __future__ import annotations

import math
import time
from collections import Counter
from typing import Any

import numpy as np

from mpillm.array.backend import Backend
from mpillm.array.tally import Product

__all__ = ["SQUARE", "Probe"]

# Rows and columns of the large square matrices that rates are compared with.
SQUARE = 1024

_SQUARE = Product((SQUARE, SQUARE), (SQUARE, SQUARE), False, False, None, None, False)

# Seconds below which there is no time for these.
_TIME_FOR_SQUARES = 0.1

# Of a model's products the largest, by their share of all FLOPs: the best rate is one of theirs.
_SHAPES = 8

# Bytes of operands and result, at most: larger products are cut down, which no longer changes
# their rate.
_LARGEST = 1 << 26

# Numbers that operands are filled with, over and over. Not zeros, which take less power.
_NUMBERS = 65_521


class Probe:
    """The best rates seen, in FLOP/s: `rates` by product, `square` of large square matrices."""

    def __init__(self, backend: Backend) -> None:
        self._backend = backend
        self._numbers = np.random.default_rng(0).standard_normal(_NUMBERS, dtype=np.float32)
        self._turn = 0
        self.rates: dict[Product, float] = {}
        self.square = 0.0

    def best(self) -> tuple[float, Product | None]:
        """The highest rate of a model's product, and that product; (0.0, None) when there is none.

        A product that was too large is given as it was cut.
        """
        if not self.rates:
            return 0.0, None
        product = max(self.rates, key=self.rates.__getitem__)
        return self.rates[product], product

    def measure(self, products: Counter[Product], seconds: float) -> None:
        """Time the largest of these products in turn, for about as long; one at the least."""
        flops = {product: count * product.flops for product, count in products.items()}
        largest = sorted((p for p in flops if flops[p]), key=flops.__getitem__, reverse=True)
        if not largest:
            return
        contestants = [_cut(product) for product in largest[:_SHAPES]]
        square = _SQUARE._replace(dtype=contestants[0].dtype)
        if seconds >= _TIME_FOR_SQUARES:
            contestants.insert(1, square)
        deadline = time.perf_counter() + seconds
        while True:
            product = contestants[self._turn % len(contestants)]
            self._turn += 1
            rate = self._rate(product, seconds / len(contestants))
            if product is square:
                self.square = max(rate, self.square)
            else:
                self.rates[product] = max(rate, self.rates.get(product, 0.0))
            if time.perf_counter() >= deadline:
                return

    def _rate(self, product: Product, seconds: float) -> float:
        """FLOP/s of the fastest of a few runs, after one that is not timed."""
        backend, matmul = self._backend, self._backend.ops.matmul
        deadline = time.perf_counter() + seconds
        a = self._operand(product.a, product.a_turned, product.dtype)
        b = self._operand(product.b, product.b_turned, product.dtype)
        out = None if product.out is None else backend.zeros(product.result, product.out)
        matmul(a, b, out, product.accumulate)
        backend.synchronize()
        fastest = math.inf
        while True:
            begin = time.perf_counter()
            matmul(a, b, out, product.accumulate)
            backend.synchronize()
            end = time.perf_counter()
            fastest = min(fastest, end - begin)
            if end >= deadline:
                return product.flops / fastest

    def _operand(self, shape: tuple[int, ...], turned: bool, dtype: Any) -> Any:
        stored = (*shape[:-2], shape[-1], shape[-2]) if turned else shape
        x = self._backend.from_host(np.resize(self._numbers, stored)).astype(dtype)
        return x.swapaxes(-1, -2) if turned else x


def _cut(product: Product) -> Product:
    """A product of at most `_LARGEST` bytes: of fewer matrices, then of smaller ones."""
    while _bytes(product) > _LARGEST:
        if len(product.a) > 2 or len(product.b) > 2:
            product = product._replace(a=product.a[-2:], b=product.b[-2:])
            continue
        (m, k), n = product.a, product.b[1]
        largest = max(m, k, n)
        m, k, n = (size // 2 if size == largest else size for size in (m, k, n))
        product = product._replace(a=(m, k), b=(k, n))
    return product


def _bytes(product: Product) -> int:
    elements = sum(math.prod(shape) for shape in (product.a, product.b, product.result))
    return elements * int(product.dtype.itemsize)
