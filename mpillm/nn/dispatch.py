"""How rows travel between the ranks that hold the tokens and those that hold their experts.

Lepikhin et al. 2020, "GShard": two exchanges in the forward pass, rows to the experts and results
back, and the same two with the derivatives in the backward pass. Nothing is padded: every rank
sends as many rows as were assigned, and for that the numbers must be known on the host.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

from mpillm.parallel.shard import split_range

if TYPE_CHECKING:
    from mpillm.array.backend import Array, Backend
    from mpillm.nn.router import Routing
    from mpillm.parallel.group import Group

__all__ = ["Dispatch"]


class Dispatch:
    """Where the rows of one routing go.

    This rank sends m assignments, and a assignments arrive for its experts, its own among both. It
    hands to the exchanges first a 64-bit count for each expert; then, in rows of d features, m * d
    elements to the experts and a * d back, and as many again in the backward pass.

    order_m: this rank's assignments (token * k + choice) as they are sent, by expert. slots_nk:
    place of each assignment in that order. runs: the rows of each of this rank's experts among
    those that `to_experts` gives.
    """

    def __init__(self, routing: Routing, experts: int, group: Group, backend: Backend) -> None:
        """Collective over the group: the ranks tell each other how many rows they send."""
        xp = backend.xp
        self._group = group
        self._backend = backend
        order, self.slots_nk, counts_x = backend.ops.sort_by_expert(
            routing.chosen_nk, routing.keep_nk, experts
        )
        held = [split_range(experts, group.size, rank) for rank in range(group.size)]
        start, stop = held[group.rank]
        local = stop - start
        # Of every source, how many rows it sends to each of this rank's experts.
        arriving = backend.empty((group.size * local,), counts_x.dtype)
        group.alltoall(counts_x, [b - a for a, b in held], arriving, [local] * group.size)
        numbers: list[int] = backend.to_host(xp.concatenate((counts_x, arriving))).tolist()
        self._sent = [sum(numbers[a:b]) for a, b in held]
        cells = numbers[experts:]
        self._arrived = [sum(cells[r * local : (r + 1) * local]) for r in range(group.size)]
        self.order_m = order[: sum(self._sent)]
        # Rows arrive by source, then by expert; they are computed by expert, then by source.
        cell = xp.searchsorted(xp.cumsum(arriving), xp.arange(sum(self._arrived)), side="right")
        self._by_expert = xp.argsort(cell % max(local, 1), kind="stable")
        self.runs: list[slice] = []
        begin = 0
        for expert in range(local):
            end = begin + sum(cells[expert::local])
            self.runs.append(slice(begin, end))
            begin = end

    def to_experts(self, rows_md: Array) -> Array:
        """Send a row for each assignment of `order_m`; returns those of this rank's experts."""
        return self._exchange(rows_md, self._sent, self._arrived)[self._by_expert]

    def to_tokens(self, rows_ad: Array) -> Array:
        """Send the experts' rows back; returns them in the order of `order_m`."""
        by_source = self._backend.empty(rows_ad.shape, rows_ad.dtype)
        by_source[self._by_expert] = rows_ad
        return self._exchange(by_source, self._arrived, self._sent)

    def _exchange(self, rows: Array, counts: list[int], out_counts: list[int]) -> Array:
        d = rows.shape[1]
        out = self._backend.empty((sum(out_counts), d), rows.dtype)
        self._group.alltoall(
            rows.reshape(-1),
            [d * count for count in counts],
            out.reshape(-1),
            [d * count for count in out_counts],
        )
        return out
