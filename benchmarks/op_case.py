"""An operation in two versions, this package's and PyTorch's, at one shape."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any

__all__ = ["Case", "Side"]


@dataclass
class Side:
    """One of the two.

    forward: from what `prepare` gives to the result and what is saved. backward: from that to the
    gradients.
    """

    forward: Callable[[Any], tuple[Any, Any]]
    backward: Callable[[Any], Sequence[Any]] | None = None
    prepare: Callable[[], Any] = field(default=lambda: None)

    def once(self) -> tuple[float, float]:
        """Seconds of a forward and of a backward pass."""
        prepared = self.prepare()
        begin = time.perf_counter()
        _, saved = self.forward(prepared)
        middle = time.perf_counter()
        if self.backward is not None:
            self.backward(saved)
        return middle - begin, time.perf_counter() - middle

    def results(self) -> list[Any]:
        """What both passes compute, as float64 arrays."""
        y, saved = self.forward(self.prepare())
        found = [_float64(y)]  # before the backward pass may overwrite it
        if self.backward is not None:
            found += map(_float64, self.backward(saved))
        return found


@dataclass
class Case:
    """An operation at one shape.

    flops: those of its products, both passes together. tolerance: of differences in relation to the
    largest number; infinite where both draw random numbers.
    """

    name: str
    shape: tuple[int, ...]
    ours: Side
    theirs: Side
    flops: float = 0.0
    tolerance: float = 1e-4

    def check(self) -> None:
        """AssertionError if the two do not compute the same."""
        import numpy as np

        for a, b in zip(self.ours.results(), self.theirs.results(), strict=True):
            difference = np.abs(a.reshape(b.shape) - b).max() / np.abs(b).max()
            if not difference <= self.tolerance:
                raise AssertionError(f"{self.name}: {difference:.1e} apart")


def _float64(x: Any) -> Any:
    """A NumPy copy of an array, of a tensor or of a list of tensors, flat then."""
    import numpy as np

    if isinstance(x, list):
        return np.concatenate([_float64(one).ravel() for one in x])
    return np.array(x.detach().float() if hasattr(x, "detach") else x, "f8")
