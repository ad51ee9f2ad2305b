"""How the tensor ranks share out the rows of an activation between the products.

A row is a token of the micro-batch; an activation (b, t, d) is n = b * t rows. Without sequence
parallelism every tensor rank holds them all, and what each has added to them is summed over the
ranks. With it (Korthikanti et al. 2022, "Reducing Activation Recomputation in Large Transformer
Models", section 4.2.2) a rank holds its share of the rows, an even run of them, wherever work is
done row by row: norms, dropout, residual sums. Rows are gathered before a product whose outputs are
cut, and what such a product adds is summed and shared out again: the same volume as one sum.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpillm.parallel.shard import split_range

if TYPE_CHECKING:
    from mpillm.array.backend import Array, Backend
    from mpillm.parallel.group import Group

__all__ = ["SharedRows"]


class SharedRows:
    """The rows of activations on one rank of the tensor group."""

    def __init__(self, tensor: Group, backend: Backend, sequence: bool) -> None:
        self._tensor = tensor
        self._backend = backend
        # Whether ranks hold their shares only; false where one rank holds all anyway.
        self.shared = sequence and tensor.size > 1

    def shape(self, b: int, t: int, d: int) -> tuple[int, ...]:
        """Shape of this rank's part of an activation of b * t rows: (b, t, d), or (rows, d)."""
        if not self.shared:
            return b, t, d
        start, stop = self._share(b * t)
        return stop - start, d

    def take(self, x: Array) -> Array:
        """This rank's rows of what every rank holds whole: x (b, t, ...) -> (rows, ...), a view."""
        if not self.shared:
            return x
        start, stop = self._share(x.shape[0] * x.shape[1])
        return x.reshape(-1, *x.shape[2:])[start:stop]

    def gather(self, x: Array, b: int, t: int) -> Array:
        """All rows, (b, t, d), from the ranks' shares (rows, d)."""
        if not self.shared:
            return x
        d = x.shape[-1]
        whole = self._backend.empty((b, t, d), x.dtype)
        counts = [d * (stop - start) for start, stop in self._shares(b * t)]
        xp = self._backend.xp
        self._tensor.allgather(xp.ascontiguousarray(x).reshape(-1), whole.reshape(-1), counts)
        return whole

    def sum(self, x: Array) -> Array:
        """The sum over the ranks of x (b, t, d), which is overwritten: whole, or (rows, d)."""
        if not self.shared:
            return self._tensor.allreduce(x)
        b, t, d = x.shape
        shares = self._shares(b * t)
        start, stop = shares[self._tensor.rank]
        mine = self._backend.empty((stop - start, d), x.dtype)
        counts = [d * (stop - start) for start, stop in shares]
        self._tensor.reduce_scatter(x.reshape(-1), mine.reshape(-1), counts)
        return mine

    def _share(self, n: int) -> tuple[int, int]:
        return split_range(n, self._tensor.size, self._tensor.rank)

    def _shares(self, n: int) -> list[tuple[int, int]]:
        return [split_range(n, self._tensor.size, rank) for rank in range(self._tensor.size)]
