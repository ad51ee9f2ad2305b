"""What a diagnosis comes to."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

__all__ = ["ORDER", "Diagnosis", "Finding", "Kind"]

Kind = Literal["mismatch", "ended", "silent", "deadlock", "outside", "activity", "missing", "stuck"]

# The likeliest cause first: others may follow from it.
ORDER: tuple[Kind, ...] = (
    "mismatch",
    "ended",
    "silent",
    "deadlock",
    "outside",
    "activity",
    "missing",
    "stuck",
)


@dataclass(frozen=True)
class Finding:
    """One cause.

    ranks: the culprits. axis, op, sequence: the call in which others wait for them, or that they
    made otherwise than others; None where nobody waits. due: from when on, in seconds since the
    epoch, this is a hang and not slowness.
    """

    kind: Kind
    ranks: tuple[int, ...]
    text: str
    due: float
    axis: str | None = None
    op: str | None = None
    sequence: int | None = None


@dataclass(frozen=True)
class Diagnosis:
    """What was found at the moment `now`, the likeliest cause first.

    lines: all of it in words, one a finding, then those who wait. waiting: the blocked ranks, those
    that have waited longest first.
    """

    findings: tuple[Finding, ...]
    lines: tuple[str, ...]
    now: float
    waiting: tuple[int, ...]

    @property
    def due(self) -> float:
        """When it is a hang, in seconds since the epoch, unless something changes."""
        return min((finding.due for finding in self.findings), default=float("inf"))

    @property
    def hung(self) -> bool:
        """Whether the job will not go on by itself."""
        return self.due <= self.now

    @property
    def culprits(self) -> tuple[int, ...]:
        """The ranks at fault by now; where there are none, those that may become it."""
        due = [finding for finding in self.findings if finding.due <= self.now] or self.findings
        return tuple(dict.fromkeys(rank for finding in due for rank in finding.ranks))
