"""A backend whose operations are counted and timed, from outside: kernels know nothing of it."""

from __future__ import annotations

import copy
import functools
from collections.abc import Callable
from typing import Any

from mpillm.array.backend import Backend
from mpillm.array.tally import Clock, Tally

__all__ = ["KINDS", "metered", "operations"]

_PRODUCTS, _ATTENTION = "products", "attention"

# Kind of work of every public operation.
KINDS = {
    "matmul": _PRODUCTS,
    "attention_forward": _ATTENTION,
    "attention_saved": _ATTENTION,
    "attention_merge": _ATTENTION,
    "attention_backward": _ATTENTION,
    "layernorm_forward": "norms",
    "layernorm_backward": "norms",
    "gelu_forward": "activations",
    "gelu_backward": "activations",
    "sum_rows": "sums",
    "add_bias": "sums",
    "add_residual": "sums",
    "operand": "conversions",
    "dropout_forward": "dropout",
    "dropout_backward": "dropout",
    "embedding_forward": "embedding",
    "embedding_backward": "embedding",
    "row_max": "loss",
    "cross_entropy_forward": "loss",
    "cross_entropy_backward": "loss",
    "route_forward": "routing",
    "route_backward": "routing",
    "within_capacity": "routing",
    "sort_by_expert": "routing",
    "combine_forward": "routing",
    "combine_backward": "routing",
    "count_choices": "routing",
    "balance_forward": "routing",
    "balance_backward": "routing",
    "adamw": "optimizer",
    "sum_of_squares": "optimizer",
}


def operations(ops: type) -> set[str]:
    """Names of the public operations of a class of them."""
    return {name for name in dir(ops) if not name.startswith("_") and callable(getattr(ops, name))}


def metered(backend: Backend, tally: Tally, clock: Clock | None = None) -> Backend:
    """The same backend, whose products are counted in `tally`; with `clock`, operations are timed.

    The operations are those of `backend`, which itself stays as it is, and so are their results.
    """
    ops: Any = copy.copy(backend.ops)
    # The object's attributes come before its class's methods, also where operations call others.
    if clock is not None:
        for name in sorted(operations(type(ops))):
            setattr(ops, name, _timed(getattr(ops, name), KINDS[name], clock))
    ops.matmul = _counted(ops.matmul, tally)
    twin = copy.copy(backend)
    twin.ops = ops
    return twin


def _counted(matmul: Callable[..., Any], tally: Tally) -> Callable[..., Any]:
    @functools.wraps(matmul)
    def counted(a: Any, b: Any, out: Any = None, accumulate: bool = False) -> Any:
        result = matmul(a, b, out, accumulate)
        tally.flops += 2 * result.size * a.shape[-1]
        if tally.products is not None:
            tally.note(a, b, out, accumulate)
        return result

    return counted


def _timed(operation: Callable[..., Any], kind: str, clock: Clock) -> Callable[..., Any]:
    @functools.wraps(operation)
    def timed(*args: Any, **kwargs: Any) -> Any:
        outer = clock.kind
        if outer == _ATTENTION:  # what it is made of, products and dropout, is attention
            return operation(*args, **kwargs)
        clock.switch(kind)
        try:
            return operation(*args, **kwargs)
        finally:
            clock.switch(outer)

    return timed
