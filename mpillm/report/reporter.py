"""What a run tells its user, in one object: metrics, progress, log and the loss curve."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TextIO

from mpillm.report.metrics import MetricsFile, StepFile, StepMetrics
from mpillm.report.plot import plot_losses
from mpillm.report.profile import Breakdown
from mpillm.report.progress import Progress

__all__ = ["Reporter"]


class Reporter:
    """Reports on a run in its folder; made on rank 0, the other ranks take `Reporter.silent()`."""

    def __init__(
        self, folder: Path, total_steps: int, start_step: int = 0, *, stream: TextIO | None = None
    ) -> None:
        """`start_step`: steps done before; what the run's files tell of later ones is dropped."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._metrics = MetricsFile(folder / "metrics.jsonl")
        self._metrics.rewind(start_step)
        self._profile: StepFile | None = None
        if (folder / "profile.jsonl").exists():
            self._open_profile().rewind(start_step)
        self._breakdown = Breakdown()
        self._progress = Progress(folder / "log.txt", total_steps, start_step, stream=stream)

    @staticmethod
    def silent() -> Reporter:
        """A reporter that says nothing and writes nothing."""
        return _Silent()

    def line(self, text: str) -> None:
        """Tell the user something, and the log."""
        self._progress.line(text)

    def step(
        self, metrics: StepMetrics, profile: Sequence[Mapping[str, float]] | None = None
    ) -> None:
        """Report a step that is done; `profile`: the seconds of each rank by kind of work."""
        self._metrics.write(metrics)
        if profile is not None:
            row = self._breakdown.add(metrics, profile)
            self._open_profile().write_row(row)
        self._progress.step(metrics, "" if profile is None else self._breakdown.in_short())

    def breakdown(self) -> None:
        """Say where the time of the steps went, if that was measured."""
        if self._breakdown.steps:
            self.line(self._breakdown.table())

    def plot(self, title: str) -> None:
        """Draw `loss.png` in the run folder, or say what is missing."""
        if not plot_losses(self._folder / "metrics.jsonl", self._folder / "loss.png", title):
            self.line("no loss.png without matplotlib: pip install 'mpillm[report]'")

    def close(self) -> None:
        """End the bar and close the files."""
        self._progress.close()
        self._metrics.close()
        if self._profile is not None:
            self._profile.close()

    def _open_profile(self) -> StepFile:
        if self._profile is None:
            self._profile = StepFile(self._folder / "profile.jsonl")
        return self._profile


class _Silent(Reporter):
    """The same calls without an effect."""

    def __init__(self) -> None:
        """Open nothing."""

    def line(self, text: str) -> None:
        """Say nothing."""

    def step(
        self, metrics: StepMetrics, profile: Sequence[Mapping[str, float]] | None = None
    ) -> None:
        """Write nothing."""

    def breakdown(self) -> None:
        """Say nothing."""

    def plot(self, title: str) -> None:
        """Draw nothing."""

    def close(self) -> None:
        """There is nothing to close."""
