"""How fast the steps of a run are: FLOP/s, MFU and, on request, where the time goes.

MFU is the rate of the executed matrix products over the best rate that these ranks have reached at
the shapes of this model's products, all of them at the same time, summed over the ranks. The best
rate is probed after steps 1, 2, 4, 8, ... of the process, for a small share of the time that these
have taken: a probe that something else disturbed is outdone by a later one. A step that is faster
than every probe is the best rate itself.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from mpillm.array.backend import Backend
from mpillm.array.metered import metered
from mpillm.array.probe import SQUARE, Probe
from mpillm.array.tally import Clock, Product, Tally
from mpillm.parallel.group import Group
from mpillm.parallel.recorder import Recorder

__all__ = ["Meter", "Reading"]

# Of the time of the steps so far, the part that a probe may take, and bounds of it in seconds. As
# probes double their distance, all of them take no more than twice that part.
_SHARE = 0.005
_SHORTEST, _LONGEST = 0.002, 1.0

# Seconds of a probe, at least, where a profile was asked for.
_WITH_PROFILE = 0.1


@dataclass(frozen=True)
class Reading:
    """What was measured in a step.

    gflops: 10^9 FLOP/s of the matrix products of all ranks. mfu: the part of the best rate that
    this is, from 0 to 1; None where there was no product. ranks: with a profile, on rank 0, each
    rank's seconds by kind of work; else None.
    """

    gflops: float
    mfu: float | None
    ranks: Sequence[dict[str, float]] | None


class Meter:
    """Measures the steps of a run. What it gives is meant for rank 0, which reports it."""

    def __init__(
        self, backend: Backend, recorder: Recorder, *, profile: bool, cores: float = 1.0
    ) -> None:
        """profile: keep the time of all operations and calls; their results stay the same.

        cores: this rank's share. Of a core that ranks share, each may see its whole speed for a
        moment, and all of them together no more than that.
        """
        self._share = min(1.0, cores) if backend.on_host else 1.0
        self._plain = backend
        self._tally = Tally()
        self._probe = Probe(backend)
        self._steps = 0
        self._flops = 0.0  # in a step, over all ranks, when they were last added up
        self._best = self._square = 0.0  # FLOP/s over all ranks
        self._elapsed = 0.0
        # Over the steps but the first, which warms up, unless it is the only one.
        self._counted_seconds = self._counted_flops = 0.0
        settle = None if backend.on_host else backend.synchronize
        self.clock = Clock(settle) if profile else None
        recorder.clock = self.clock
        self.backend = metered(backend, self._tally, self.clock)

    def begin_step(self) -> None:
        """A step is about to begin."""
        number = self._steps + 1
        self._tally.flops = 0
        self._tally.products = Counter() if number & (number - 1) == 0 else None

    def end_step(self, seconds: float, world: Group) -> Reading:
        """A step is done, which took so long. Collective: all ranks end the same steps."""
        self._steps += 1
        products, self._tally.products = self._tally.products, None
        ranks = None
        if self.clock is not None:
            ranks = world.gather_objects(self.clock.last)
        if self.clock is not None or products is not None:
            (self._flops,) = self._over(world, [self._tally.flops], "sum")
        if self._steps <= 2:
            self._counted_seconds = self._counted_flops = 0.0
        self._elapsed += seconds
        self._counted_seconds += seconds
        self._counted_flops += self._flops
        if products is not None:
            self._measure(products, world)
        rate = self._flops / seconds
        self._best = max(self._best, rate)
        return Reading(rate / 1e9, rate / self._best if self._best else None, ranks)

    def summary(self) -> str:
        """All steps but the first in a line; on rank 0, once a step is done."""
        rate = self._counted_flops / self._counted_seconds
        share = f"MFU {rate / self._best:.1%}: " if self._best else ""
        _, product = self._probe.best()
        at = "" if product is None else f" (best: {_told(product)})"
        square = f"; {SQUARE} x {SQUARE} x {SQUARE}: {self._square / 1e9:,.1f}"
        return (
            f"{share}{rate / 1e9:,.1f} GFLOP/s in matrix products, of {self._best / 1e9:,.1f} that "
            f"all ranks reach at this model's shapes{at}" + square * bool(self._square)
        )

    def _measure(self, products: Counter[Product], world: Group) -> None:
        """Look how fast all ranks are at the same time, each at its own products."""
        (longest,) = self._over(world, [self._elapsed], "max")
        floor = _SHORTEST if self.clock is None else _WITH_PROFILE
        self._probe.measure(products, min(max(_SHARE * longest, floor), _LONGEST))
        rates = self._probe.best()[0], self._probe.square or -math.inf
        mine = [rate * self._share for rate in rates]
        best, square = self._over(world, mine, "sum")
        self._best, self._square = max(self._best, best), max(self._square, square)

    def _over(self, world: Group, numbers: list[float], op: Literal["sum", "max"]) -> list[float]:
        """Sums, or the largest, over all ranks."""
        x = self._plain.from_host(np.array(numbers, dtype=np.float64))
        values: list[float] = self._plain.to_host(world.allreduce(x, op)).tolist()
        return values


def _told(product: Product) -> str:
    """`m x k x n`, with the number of products in front where they are many."""
    *lead, m, n = product.result
    count = math.prod(lead)
    return f"{count} times " * (count > 1) + f"{m} x {product.a[-1]} x {n}"
