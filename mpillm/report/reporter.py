"""What a run tells its user, in one object: metrics, progress, log and the loss curve."""

from __future__ import annotations

from pathlib import Path
from typing import TextIO

from mpillm.report.metrics import MetricsFile, StepMetrics
from mpillm.report.plot import plot_losses
from mpillm.report.progress import Progress

__all__ = ["Reporter"]


class Reporter:
    """Reports on a run in its folder; made on rank 0, the other ranks take `Reporter.silent()`."""

    def __init__(
        self, folder: Path, total_steps: int, start_step: int = 0, *, stream: TextIO | None = None
    ) -> None:
        """`start_step`: steps done before; what `metrics.jsonl` tells of later ones is dropped."""
        folder.mkdir(parents=True, exist_ok=True)
        self._folder = folder
        self._metrics = MetricsFile(folder / "metrics.jsonl")
        self._metrics.rewind(start_step)
        self._progress = Progress(folder / "log.txt", total_steps, start_step, stream=stream)

    @staticmethod
    def silent() -> Reporter:
        """A reporter that says nothing and writes nothing."""
        return _Silent()

    def line(self, text: str) -> None:
        """Tell the user something, and the log."""
        self._progress.line(text)

    def step(self, metrics: StepMetrics) -> None:
        """Report a step that is done."""
        self._metrics.write(metrics)
        self._progress.step(metrics)

    def plot(self, title: str) -> None:
        """Draw `loss.png` in the run folder, or say what is missing."""
        if not plot_losses(self._folder / "metrics.jsonl", self._folder / "loss.png", title):
            self.line("no loss.png without matplotlib: pip install 'mpillm[report]'")

    def close(self) -> None:
        """End the bar and close the files."""
        self._progress.close()
        self._metrics.close()


class _Silent(Reporter):
    """The same calls without an effect."""

    def __init__(self) -> None:
        """Open nothing."""

    def line(self, text: str) -> None:
        """Say nothing."""

    def step(self, metrics: StepMetrics) -> None:
        """Write nothing."""

    def plot(self, title: str) -> None:
        """Draw nothing."""

    def close(self) -> None:
        """There is nothing to close."""
