"""Operations of a mixture of experts: who computes what, and how the results come together.

Axes beside those of `mpillm.array.ops`: x experts, k choices of a token. A token's choices are its
assignments; assignment number token * k + choice becomes one of the m rows that experts compute.
"""

from __future__ import annotations

from types import ModuleType
from typing import Any

__all__ = ["RoutingOps"]


class RoutingOps:
    """The operations on the arrays of one library."""

    xp: ModuleType

    def route_forward(self, logits_nx: Any, k: int) -> tuple[Any, Any, Any, Any]:
        """The k likeliest experts of each token, and how much each of them counts.

        Shazeer et al. 2017, "Outrageously Large Neural Networks", section 2.1: p = softmax(logits);
        the gates are the chosen probabilities, divided by their sum when k > 1 (Lepikhin et al.
        2020, "GShard", algorithm 1); with k = 1 they are left as they are, else the router would
        learn nothing (Fedus et al. 2021, "Switch Transformers", equation 2). Of equal
        probabilities the expert with the lowest number comes first.

        Returns (p_nx, chosen_nk: int64, likeliest first, gates_nk, saved).
        """
        xp = self.xp
        p_nx = logits_nx - logits_nx.max(axis=1, keepdims=True)
        xp.exp(p_nx, out=p_nx)
        p_nx /= p_nx.sum(axis=1, keepdims=True)
        chosen_nk = xp.argsort(-p_nx, axis=1, kind="stable")[:, :k]
        gates_nk = xp.take_along_axis(p_nx, chosen_nk, axis=1)
        total_n1 = gates_nk.sum(axis=1, keepdims=True) if k > 1 else None
        if total_n1 is not None:
            gates_nk /= total_n1
        return p_nx, chosen_nk, gates_nk, (p_nx, chosen_nk, gates_nk, total_n1)

    def route_backward(self, d_gates_nk: Any, dp_nx: Any, saved: Any) -> Any:
        """d_logits_nx, given the derivatives by the gates and, unless None, by p.

        With s the sum of the chosen probabilities, dp[chosen] += (d_gates - sum(d_gates * gates)) /
        s; d_logits = p * (dp - sum(dp * p)). The choice itself has no derivative.
        """
        xp = self.xp
        p_nx, chosen_nk, gates_nk, total_n1 = saved
        if total_n1 is not None:
            d_gates_nk = d_gates_nk - (d_gates_nk * gates_nk).sum(axis=1, keepdims=True)
            d_gates_nk /= total_n1
        d_logits_nx = xp.zeros_like(p_nx) if dp_nx is None else dp_nx.copy()
        rows_n1 = xp.arange(len(p_nx))[:, None]
        d_logits_nx[rows_n1, chosen_nk] += d_gates_nk
        d_logits_nx -= (d_logits_nx * p_nx).sum(axis=1, keepdims=True)
        d_logits_nx *= p_nx
        return d_logits_nx

    def within_capacity(self, chosen_btk: Any, index: Any, experts: int, capacity: int) -> Any:
        """Which assignments an expert that takes `capacity` of a sequence's keeps; bool (b, t, k).

        They are taken in order of the tokens' places `index`, (t,) or (b, t). GShard's algorithm 1
        takes all first choices before any second one: there, tokens that come later in the text
        decide whether an earlier one's second choice is kept, which would let a causal model see
        the future.
        """
        xp = self.xp
        b, t, k = chosen_btk.shape
        order_bt = xp.argsort(xp.broadcast_to(index, (b, t)), axis=1, kind="stable")
        in_order = xp.take_along_axis(chosen_btk, order_bt[:, :, None], axis=1)
        taken = xp.zeros((b * t, experts), dtype=xp.int32)
        taken[xp.arange(b * t)[:, None], in_order.reshape(b * t, k)] = 1
        number = xp.cumsum(taken.reshape(b, t, experts), axis=1, dtype=xp.int32)
        keep_btk = xp.take_along_axis(number, in_order, axis=2) <= capacity
        return xp.take_along_axis(keep_btk, xp.argsort(order_bt, axis=1)[:, :, None], axis=1)

    def sort_by_expert(self, chosen_nk: Any, keep_nk: Any, experts: int) -> tuple[Any, Any, Any]:
        """The order in which assignments are handed to the experts: by expert, then by number.

        keep_nk: bool; None keeps all. Returns (order (n * k,): numbers of the assignments, the
        dropped ones last; slots_nk: place of each in that order, 0 for a dropped one; counts_x:
        kept assignments of each expert), all int64.
        """
        xp = self.xp
        keys = chosen_nk if keep_nk is None else xp.where(keep_nk, chosen_nk, experts)
        keys = keys.reshape(-1)
        order = xp.argsort(keys, kind="stable")
        ends = xp.searchsorted(keys[order], xp.arange(experts + 1))
        slots = xp.empty(keys.shape, dtype=xp.int64)
        slots[order] = xp.arange(keys.size)
        slots_nk = slots.reshape(chosen_nk.shape)
        if keep_nk is not None:
            slots_nk *= keep_nk
        return order, slots_nk, ends[1:] - ends[:-1]

    def combine_forward(self, rows_md: Any, slots_nk: Any, weights_nk: Any = None) -> Any:
        """y = sum over choices of weight * rows[slot], added in order of the choices; y_nd.

        weights_nk: None for ones.
        """
        n, k = slots_nk.shape
        y_nd = self.xp.zeros((n, rows_md.shape[1]), dtype=rows_md.dtype)
        if rows_md.shape[0] == 0:  # all were dropped, and slot 0 is not there
            return y_nd
        for choice in range(k):
            part_nd = rows_md[slots_nk[:, choice]]
            if weights_nk is not None:
                part_nd *= weights_nk[:, choice, None]
            y_nd += part_nd
        return y_nd

    def combine_backward(
        self, dy_nd: Any, rows_md: Any, order_m: Any, slots_nk: Any, weights_nk: Any
    ) -> tuple[Any, Any]:
        """Returns (d_rows_md, d_weights_nk); order_m: number of the assignment of each row."""
        xp = self.xp
        n, k = slots_nk.shape
        d_rows_md = dy_nd[order_m // k]
        d_rows_md *= weights_nk.reshape(-1)[order_m][:, None]
        d_weights_nk = xp.zeros((n, k), dtype=dy_nd.dtype)
        for choice in range(k if rows_md.shape[0] else 0):
            d_weights_nk[:, choice] = (dy_nd * rows_md[slots_nk[:, choice]]).sum(axis=1)
        return d_rows_md, d_weights_nk

    def count_choices(self, chosen_btk: Any, mask_bt: Any, experts: int) -> Any:
        """Assignments of each sequence's counted tokens to each expert, float64 (b, x)."""
        xp = self.xp
        b, t, k = chosen_btk.shape
        counts = xp.zeros((b * experts,), dtype=xp.float64)
        places = xp.arange(b)[:, None, None] * experts + chosen_btk
        once = xp.broadcast_to(mask_bt[:, :, None], (b, t, k)).astype(xp.float64)
        xp.add.at(counts, places.reshape(-1), once.reshape(-1))
        return counts.reshape(b, experts)

    def balance_forward(self, p_btx: Any, share_bx: Any, mask_bt: Any) -> tuple[Any, Any]:
        """Sum over sequences and experts of share * (sum of p over the counted tokens).

        Fedus et al. 2021, equation 4, of each sequence by itself as in DeepSeek-V3 (2024, equations
        17 to 20), but for factors: share_bx, float64, is the part of a sequence's assignments that
        goes to each expert, a constant; the mean probability P times the number of counted tokens
        is the sum. Returns (float64 (1,), saved).
        """
        weighted_btx = p_btx * mask_bt[:, :, None]
        total = (weighted_btx.sum(axis=1, dtype="float64") * share_bx).sum().reshape(1)
        return total, (share_bx, mask_bt)

    def balance_backward(self, d_total: Any, saved: Any) -> Any:
        """dp_btx = d_total * share * mask, in the dtype of the mask. d_total: (1,)."""
        share_bx, mask_bt = saved
        share_bx = (share_bx * d_total).astype(mask_bt.dtype)
        return share_bx[:, None, :] * mask_bt[:, :, None]
