"""The learning rate as a function of the step."""

from __future__ import annotations

import math

from mpillm.training.settings import OptimizerSettings

__all__ = ["learning_rate"]


def learning_rate(step: int, steps: int, settings: OptimizerSettings) -> float:
    """Learning rate of step number `step`, from 0, in a run of `steps`.

    Rises linearly over `warmup` steps, so that step w has lr * (w + 1) / (warmup + 1); then stays
    ("constant"), or falls along half a cosine to `min_lr` at step number `steps` (Loshchilov and
    Hutter 2017, "SGDR", equation 5, without restarts).
    """
    s = settings
    if step < s.warmup:
        return s.lr * (step + 1) / (s.warmup + 1)
    if s.schedule == "constant":
        return s.lr
    progress = min(1.0, (step - s.warmup) / max(1, steps - s.warmup))
    return s.min_lr + 0.5 * (1.0 + math.cos(math.pi * progress)) * (s.lr - s.min_lr)
