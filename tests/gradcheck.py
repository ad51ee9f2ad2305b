"""Directional check of a hand-written backward pass against central differences, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

from mpillm.nn.layer import Layer, Micro
from mpillm.nn.stage import Stage
from mpillm.nn.store import ParamStore

__all__ = ["check_directional", "check_layer", "scramble"]

# Loss values at these multiples of the step, with these weights, give the slope up to step^4.
_STENCIL = ((1, 8), (-1, -8), (2, -1), (-2, 1))

# What rounding alone may do to a slope, for losses of about 1 and the step below.
_NOISE = 1e-11


def check_directional(
    loss: Callable[[], float],
    arrays: Sequence[np.ndarray],
    gradients: Sequence[np.ndarray],
    *,
    seed: int = 0,
    step: float = 3e-4,
    tolerance: float = 1e-6,
) -> None:
    """Compare the slope of `loss` along random directions with that which `gradients` predict.

    loss: reads `arrays`, which are changed in place and restored. One direction for each array, and
    a last one that moves all of them. Directions have elements of size 1, so a slope is about as
    large as the gradient's length, and the difference is relative to the larger of the two.
    """
    for array, gradient in zip(arrays, gradients, strict=True):
        assert array.dtype == gradient.dtype == np.float64
        assert array.shape == gradient.shape
    rng = np.random.default_rng(seed)
    directions = [rng.standard_normal(array.shape) for array in arrays]
    for subset in [*([i] for i in range(len(arrays))), list(range(len(arrays)))]:
        saved = [arrays[i].copy() for i in subset]
        numeric = 0.0
        for multiple, weight in _STENCIL:
            for i, old in zip(subset, saved, strict=True):
                arrays[i][...] = old + multiple * step * directions[i]
            numeric += weight * loss() / (12 * step)
        for i, old in zip(subset, saved, strict=True):
            arrays[i][...] = old
        predicted = sum(float((gradients[i] * directions[i]).sum()) for i in subset)
        length = np.sqrt(sum(float((gradients[i] ** 2).sum()) for i in subset))
        scale = max(abs(predicted), abs(numeric), length)
        assert abs(numeric - predicted) <= tolerance * scale + _NOISE, (
            f"arrays {subset}: numeric {numeric!r}, backward {predicted!r}, length {length!r}"
        )


def check_layer(
    layer: Layer | Stage,
    store: ParamStore,
    inputs: tuple[np.ndarray, ...],
    micro: Micro,
    d_outputs: tuple[Any, ...] | None = None,
) -> dict[str, np.ndarray]:
    """Check the backward pass by all inputs and all parameters of the store, on one rank.

    d_outputs: derivatives by the outputs; random ones when None. Returns the parameters' gradients,
    those of a tied parameter's uses added up, by name.
    """
    rng = np.random.default_rng(1)
    for arena in store.arenas:
        arena.grads.fill(0.0)
    outputs, saved = layer.forward(inputs, micro)
    slopes = d_outputs or tuple(rng.standard_normal(y.shape) for y in outputs)
    # A backward pass may overwrite what it is given.
    given = tuple(np.copy(slope) if np.ndim(slope) else slope for slope in slopes)
    d_inputs = layer.backward(given, saved, micro)
    values, gradients = {}, {}
    for arena in store.arenas:
        whole = arena.grads.sum(axis=0)
        for param, offset in zip(arena.params, arena.offsets, strict=True):
            part = slice(offset, offset + param.shard.size)
            values[param.name], gradients[param.name] = arena.value[part], whole[part]

    def loss() -> float:
        outputs, _ = layer.forward(inputs, micro)
        return float(sum((y * slope).sum() for y, slope in zip(outputs, slopes, strict=True)))

    check_directional(loss, [*inputs, *values.values()], [*d_inputs, *gradients.values()])
    return gradients


def scramble(store: ParamStore, size: float = 0.4) -> None:
    """Move all parameters away from the special values that they begin with."""
    rng = np.random.default_rng(2)
    for param in store.params:
        param.value += size * rng.standard_normal(param.value.shape)
