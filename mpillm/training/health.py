"""Whether a step's update may be applied: bad numbers, spikes of the loss, what was skipped.

Everything here is a function of numbers that all ranks share; nothing is sent.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Mapping, Sequence
from enum import IntEnum
from typing import Annotated, Any

import msgspec
from msgspec import Meta, Struct

from mpillm.errors import UserError
from mpillm.training.settings import TrainSettings

__all__ = ["Health", "Verdict", "z_score"]

# Losses that must have been seen before one is judged by them, unless the window is shorter.
_ENOUGH = 20

# The least standard deviation that losses are taken to have, as a share of their mean: of steps
# that are all alike, by chance or because hardly anything is learned, every other one would be a
# spike.
_LEAST_DEVIATION = 1e-3


class Verdict(IntEnum):
    """What a rank thinks of a step; of several ranks the worst one counts."""

    GOOD = 0
    SPIKE = 1
    BAD = 2


class _State(Struct, kw_only=True):
    """What a checkpoint keeps of `Health`."""

    skipped: Annotated[int, Meta(ge=0)] = 0
    in_a_row: Annotated[int, Meta(ge=0)] = 0
    row: str = ""
    losses: list[float] = []


def z_score(loss: float, losses: Sequence[float]) -> float:
    """How many standard deviations `loss` is above the mean of `losses`, of which there are some.

    Of the losses themselves, not of their logarithms: they are logarithms already, and the
    deviation of small ones would be exaggerated. Sums are exact, so that all ranks get the same.
    """
    mean = math.fsum(losses) / len(losses)
    deviation = math.sqrt(math.fsum((x - mean) ** 2 for x in losses) / len(losses))
    least = max(_LEAST_DEVIATION * abs(mean), 1e-300)
    return (loss - mean) / max(deviation, least)


class Health:
    """The verdicts of a run.

    skipped: updates that were skipped since its first step; in_a_row: of these, the last ones
    without an update in between.
    """

    def __init__(self, settings: TrainSettings) -> None:
        self._max_skipped = settings.max_skipped
        self._zscore = settings.spike_zscore
        self._losses: deque[float] = deque(maxlen=settings.spike_window)
        self._enough = min(settings.spike_window, _ENOUGH)
        self.skipped = 0
        self.in_a_row = 0
        self.located = False  # whether it was told where the row's first bad number appeared
        self._row = ""  # how the row began

    def judge(
        self, losses: Sequence[float], norm: float, *, clean: bool = True, overflows: bool = False
    ) -> tuple[Verdict, str]:
        """The verdict on a step, and why.

        losses: the loss and, if there is one, its auxiliary part. norm: of the gradient. clean:
        whether the rank's own gradients and layers' outputs are finite: the norm counts only one of
        the copies that tensor ranks hold. overflows: whether the optimizer would compute something
        infinite from the gradient.
        """
        loss = losses[0]
        if not all(map(math.isfinite, (*losses, norm))):
            part = "".join(f" (its auxiliary part {x:g})" for x in losses[1:])
            return Verdict.BAD, f"not finite: loss {loss:g}{part}, gradient norm {norm:g}"
        if not clean:
            return Verdict.BAD, (
                f"not finite: an output or gradient that neither loss {loss:g} nor gradient norm "
                f"{norm:g} shows"
            )
        if overflows:
            return Verdict.BAD, (
                f"not finite: the square of the gradient overflows (norm {norm:g}, loss {loss:g})"
            )
        if self._zscore > 0 and len(self._losses) >= self._enough:
            z = z_score(loss, self._losses)
            if z > self._zscore:
                count, mean = len(self._losses), math.fsum(self._losses) / len(self._losses)
                return Verdict.SPIKE, (
                    f"spike: loss {loss:g} is {z:.1f} standard deviations above {mean:g}, the mean "
                    f"of the last {count} (train.spike_zscore = {self._zscore:g})"
                )
        return Verdict.GOOD, ""

    def accept(self, loss: float) -> None:
        """Note a step whose update was applied."""
        self.in_a_row, self._row, self.located = 0, "", False
        if self._zscore > 0:
            self._losses.append(loss)

    def skip(self, step: int, why: str) -> None:
        """Note that the update of step number `step` was skipped.

        UserError after `train.max_skipped` in a row.
        """
        if not self.in_a_row:
            self._row = f"step {step}: {why}"
        self.skipped += 1
        self.in_a_row += 1
        if self.in_a_row >= self._max_skipped:
            times = "update was" if self.in_a_row == 1 else "updates in a row were"
            last = "" if self.in_a_row == 1 else f", the last one at step {step}: {why}"
            raise UserError(
                f"{self.in_a_row} {times} skipped (train.max_skipped = {self._max_skipped})"
                f"{last}; it began at {self._row}; lower optimizer.lr, or go on from a checkpoint "
                "from before that step"
            )

    # -- checkpoints -------------------------------------------------------------------------------

    def state(self) -> dict[str, Any]:
        """What a checkpoint must keep, JSON-able; `restore` gives back the same bits."""
        return {
            "skipped": self.skipped,
            "in_a_row": self.in_a_row,
            "row": self._row,
            "losses": list(self._losses),
        }

    def restore(self, state: Mapping[str, Any], step: int) -> None:
        """Put back what `state` gave after step number `step`; what is not there begins anew."""
        try:
            found = msgspec.convert(state, _State)
        except msgspec.ValidationError as error:
            raise UserError(f"the checkpoint's state of skipped updates: {error}") from None
        if not found.in_a_row <= found.skipped <= step or not all(map(math.isfinite, found.losses)):
            raise UserError(
                f"the checkpoint's state of skipped updates: {found.skipped} skipped, "
                f"{found.in_a_row} in a row, of {step} steps, and finite losses were expected"
            )
        self.skipped, self.in_a_row, self._row = found.skipped, found.in_a_row, found.row
        self.located = False
        self._losses.clear()
        self._losses.extend(found.losses)
