"""From logits to the next token."""

from __future__ import annotations

import numpy as np

from mpillm.array.random import fold

__all__ = ["sample"]


def sample(
    logits: np.ndarray,
    *,
    temperature: float,
    top_k: int,
    top_p: float,
    greedy: bool,
    key: int,
) -> int:
    """Draw one token id. logits: (v,), on the host.

    greedy: the largest logit, the lowest id among equals. Otherwise the logits are divided by
    `temperature`; of `top_k` > 0 the largest `top_k` are kept; of `top_p` < 1 the smallest set of
    the likeliest tokens whose probability reaches `top_p` (Holtzman et al. 2020, "The Curious Case
    of Neural Text Degeneration"). The draw is a function of `key` alone, in float64.
    """
    if greedy:
        return int(np.argmax(logits))
    scaled = logits.astype(np.float64) / temperature
    order = np.argsort(-scaled, kind="stable")
    if top_k > 0:
        order = order[:top_k]
    weights = np.exp(scaled[order] - scaled[order[0]])
    total = np.cumsum(weights)
    if top_p < 1.0:
        kept = int(np.searchsorted(total, top_p * total[-1])) + 1
        order, total = order[:kept], total[:kept]
    uniform = (fold(key, "uniform") >> 11) * 2.0**-53
    place = int(np.searchsorted(total, uniform * total[-1], side="right"))
    return int(order[min(place, len(order) - 1)])
