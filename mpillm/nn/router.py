"""The router of a mixture of experts: which experts a token goes to, and how much each one counts.

Every tensor rank routes all rows, and, where sums over ranks are ordered, from the same bits and so
to the same experts. What is said of a sequence as a whole, how many of its tokens an expert takes
and how evenly they are spread, is said of all of it: context ranks tell each other what they must
know.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpillm.nn.layer import Build, Micro
from mpillm.nn.param import Init
from mpillm.parallel.shard import Shard

if TYPE_CHECKING:
    from mpillm.array.backend import Array

__all__ = ["Mixture", "Router", "Routing"]


@dataclass(frozen=True)
class Mixture:
    """The settings of a mixture of experts.

    experts: how many. per_token: how many of them a token goes to. capacity: in training an expert
    takes ceil(capacity * per_token * tokens / experts) assignments of a sequence at most, 0 for no
    limit; those beyond it add nothing to the token. balance: weight of the balance loss.
    """

    experts: int
    per_token: int
    capacity: float = 0.0
    balance: float = 0.0


@dataclass(frozen=True)
class Routing:
    """Where the n = b * t tokens of a micro-batch go.

    chosen_nk: experts of each token, likeliest first. keep_nk: bool, False for what is beyond an
    expert's capacity; None where all are kept. weights_nk: how much each of them counts, 0 where it
    is not kept. loss: the balance loss, see `Router.forward`. saved: for the backward pass.
    """

    chosen_nk: Array
    keep_nk: Array
    weights_nk: Array
    loss: Array
    saved: Any


class Router:
    """softmax(x W^T), the `per_token` largest, and their shares; see `Ops.route_forward`."""

    def __init__(self, build: Build, name: str, width: int, mixture: Mixture, std: float) -> None:
        self._backend = build.backend
        self._context = build.mesh.context
        self._mixture = mixture
        self.weight = build.store.add(
            f"{name}.weight",
            Shard.whole((mixture.experts, width)),
            Init("normal", std),
            reduce_over=(build.mesh.replicas,),
            decay=True,
            owner=build.mesh.tensor.rank == 0,
        )

    def forward(self, x_nd: Array, micro: Micro) -> Routing:
        """Route the tokens of a micro-batch.

        The balance loss, float64 (1,), is `balance` * sum over sequences of (its counted tokens) *
        experts * sum over experts of f * P: f the part of the sequence's assignments that goes to
        the expert, capacity aside, and P the expert's mean probability, both over counted tokens
        (Fedus et al. 2021, equation 4, by sequence). It is this context rank's share: the shares
        add up to the whole. Outside of training it is 0.
        """
        mixture, ops = self._mixture, self._backend.ops
        b, t = micro.shape
        k = mixture.per_token
        logits_nx = ops.matmul(x_nd, self.weight.value.T)
        p_nx, chosen_nk, weights_nk, saved_route = ops.route_forward(logits_nx, k)
        loss, keep_nk = self._backend.zeros((1,), "float64"), None
        if not micro.training:
            return Routing(chosen_nk, keep_nk, weights_nk, loss, None)
        chosen_btk = chosen_nk.reshape(b, t, k)
        if mixture.capacity > 0.0:
            keep_nk = self._within_capacity(chosen_btk, micro)
            weights_nk = weights_nk * keep_nk
        saved_balance = None
        if mixture.balance > 0.0:
            factor_bx = self._balance_factors(chosen_btk, micro)
            p_btx = p_nx.reshape(b, t, mixture.experts)
            loss, saved_balance = ops.balance_forward(p_btx, factor_bx, micro.mask)
        saved = (x_nd, saved_route, saved_balance)
        return Routing(chosen_nk, keep_nk, weights_nk, loss, saved)

    def backward(self, d_weights_nk: Array, d_loss: Array, routing: Routing, micro: Micro) -> Array:
        """dx_nd, given the derivatives by the weights, on all tensor ranks alike, and the loss."""
        x_nd, saved_route, saved_balance = routing.saved
        ops, weight = self._backend.ops, self.weight
        dp_nx = None
        if saved_balance is not None:
            dp_btx = ops.balance_backward(d_loss, saved_balance)
            dp_nx = dp_btx.reshape(len(x_nd), self._mixture.experts)
        if routing.keep_nk is not None:
            d_weights_nk = d_weights_nk * routing.keep_nk
        d_logits_nx = ops.route_backward(d_weights_nk, dp_nx, saved_route)

        def add_gradients() -> None:
            ops.matmul(d_logits_nx.T, x_nd, out=weight.grad, accumulate=True)

        micro.gradients.add((weight,), add_gradients)
        return ops.matmul(d_logits_nx, weight.value)

    def _within_capacity(self, chosen_btk: Array, micro: Micro) -> Array:
        """Bool (n, k): which of this rank's assignments are within the experts' capacity."""
        mixture, xp = self._mixture, self._backend.xp
        b, t, k = chosen_btk.shape
        index, first = micro.index, 0
        if self._context.size > 1:
            lengths = [keys.index.shape[-1] for keys in micro.keys]
            chosen_btk = self._all_choices(chosen_btk, lengths)
            index = xp.concatenate([keys.index for keys in micro.keys], axis=-1)
            first = sum(lengths[: self._context.rank])
        share = mixture.capacity * k * (micro.length or t) / mixture.experts
        keep = self._backend.ops.within_capacity(
            chosen_btk, index, mixture.experts, math.ceil(share)
        )
        return keep[:, first : first + t].reshape(b * t, k)

    def _all_choices(self, chosen_btk: Array, lengths: list[int]) -> Array:
        """The choices of all context ranks' tokens, one rank's after another's, (b, T, k)."""
        xp = self._backend.xp
        b, _, k = chosen_btk.shape
        mine = xp.ascontiguousarray(chosen_btk.astype(xp.int32)).reshape(-1)
        flat = self._backend.empty((b * sum(lengths) * k,), xp.int32)
        self._context.allgather(mine, flat, [b * length * k for length in lengths])
        parts, start = [], 0
        for length in lengths:
            stop = start + b * length * k
            parts.append(flat[start:stop].reshape(b, length, k))
            start = stop
        return xp.concatenate(parts, axis=1)

    def _balance_factors(self, chosen_btk: Array, micro: Micro) -> Array:
        """balance * experts * f of each sequence and expert, float64 (b, experts)."""
        mixture, ops, xp = self._mixture, self._backend.ops, self._backend.xp
        counts_bx = ops.count_choices(chosen_btk, micro.mask, mixture.experts)
        self._context.allreduce(counts_bx)
        tokens_b = micro.mask.sum(axis=1) if micro.counted is None else micro.counted
        # A sequence without counted tokens has no assignments, whatever they are divided by.
        total_b = xp.maximum(tokens_b.astype(xp.float64), 1.0) * mixture.per_token
        counts_bx *= mixture.balance * mixture.experts
        counts_bx /= total_b[:, None]
        return counts_bx
