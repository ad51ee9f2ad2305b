"""Directional check of a hand-written backward pass against central differences, in float64."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np

__all__ = ["check_directional"]


def check_directional(
    loss: Callable[[], float],
    arrays: Sequence[np.ndarray],
    gradients: Sequence[np.ndarray],
    *,
    seed: int = 0,
    step: float = 1e-5,
    tolerance: float = 1e-6,
) -> None:
    """Compare the slope of `loss` along random directions with that which `gradients` predict.

    loss: reads `arrays`, which are changed in place and restored. One direction for each array, and
    a last one that moves all of them. Directions have elements of size 1, so a slope is about as
    large as the gradient's length, and the difference is relative to the larger of the two.
    """
    rng = np.random.default_rng(seed)
    directions = [rng.standard_normal(array.shape) for array in arrays]
    for subset in [*([i] for i in range(len(arrays))), list(range(len(arrays)))]:
        saved = [arrays[i].copy() for i in subset]
        values = []
        for side in (step, -step):
            for i, old in zip(subset, saved, strict=True):
                arrays[i][...] = old + side * directions[i]
            values.append(loss())
        for i, old in zip(subset, saved, strict=True):
            arrays[i][...] = old
        numeric = (values[0] - values[1]) / (2 * step)
        predicted = sum(float((gradients[i] * directions[i]).sum()) for i in subset)
        length = np.sqrt(sum(float((gradients[i] ** 2).sum()) for i in subset))
        scale = max(abs(predicted), abs(numeric), length)
        assert abs(numeric - predicted) <= tolerance * scale + 1e-10, (
            f"arrays {subset}: numeric {numeric!r}, backward {predicted!r}, length {length!r}"
        )
