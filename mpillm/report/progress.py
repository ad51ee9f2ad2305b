"""How far a run is: a bar on a terminal, lines of text elsewhere, and `log.txt` either way.

Everything goes to one stream, standard error unless told otherwise: standard output belongs to
what a command was asked for. Lines come every few seconds, and for the first step, the last one and
every evaluation; `log.txt` has the same lines with the time in UTC, whatever the stream is.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any, TextIO

from mpillm.report.metrics import StepMetrics

__all__ = ["Progress", "duration"]


def duration(seconds: float) -> str:
    """Hours, minutes and seconds.

    >>> duration(3725.4)
    '1:02:05'
    """
    minutes, second = divmod(round(seconds), 60)
    return f"{minutes // 60}:{minutes % 60:02d}:{second:02d}"


class Progress:
    """Tells of the steps from `start_step` to `total_steps`."""

    def __init__(
        self,
        log: Path,
        total_steps: int,
        start_step: int = 0,
        *,
        stream: TextIO | None = None,
        clock: Callable[[], float] = time.monotonic,
        interval: float = 5.0,
    ) -> None:
        """`interval`: seconds between lines; `clock`: seconds since any fixed time."""
        self._log = log.open("a", encoding="utf-8")
        self._total, self._start = total_steps, start_step
        self._stream = sys.stderr if stream is None else stream
        self._clock, self._interval = clock, interval
        self._began = clock()
        self._last_line: float | None = None
        self._bar = _bar(self._stream, total_steps, start_step)

    def line(self, text: str) -> None:
        """Print a line (above the bar) and write it to the log."""
        self._to_log(text)
        if self._bar is None:
            print(text, file=self._stream, flush=True)
        else:
            self._bar.write(text, file=self._stream)

    def step(self, metrics: StepMetrics, remark: str = "") -> None:
        """Tell of a step that is done; `remark` ends the line, where there is one."""
        now = self._clock()
        if self._bar is not None:
            self._bar.set_postfix_str(_facts(metrics), refresh=False)
            self._bar.update(metrics.step - self._bar.n)
        evaluated = metrics.val_loss is not None
        due = self._last_line is None or now - self._last_line >= self._interval
        if not (due or evaluated or metrics.step == self._total):
            return
        self._last_line = now
        text = f"step {metrics.step:>{len(str(self._total))}}/{self._total}  {_facts(metrics)}"
        text += (
            f"  elapsed {duration(now - self._began)}  left {duration(self._left(metrics, now))}"
        )
        text += f"  {remark}" if remark else ""
        if self._bar is None or evaluated:
            self.line(text)
        else:
            self._to_log(text)

    def close(self) -> None:
        """Leave the bar as it stands and close the log."""
        if self._bar is not None:
            self._bar.close()
        self._log.close()

    def _left(self, metrics: StepMetrics, now: float) -> float:
        """Seconds to the last step at the pace so far, evaluations included."""
        done = metrics.step - self._start
        return (self._total - metrics.step) * (now - self._began) / max(done, 1)

    def _to_log(self, text: str) -> None:
        stamp = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        self._log.write("".join(f"{stamp} {part}\n" for part in text.split("\n")))
        self._log.flush()


def _facts(metrics: StepMetrics) -> str:
    """Loss, learning rate, pace and efficiency of a step."""
    val = "" if metrics.val_loss is None else f"  val {metrics.val_loss:.4f}"
    pace = f"{metrics.tokens_per_second:,.0f} tokens/s"
    mfu = "" if metrics.mfu is None else f"  MFU {100 * metrics.mfu:.0f} %"
    return f"loss {metrics.loss:.4f}{val}  lr {metrics.lr:.2e}  {pace}{mfu}"


def _bar(stream: TextIO, total: int, start: int) -> Any:
    """A progress bar; None where the stream is no terminal or tqdm is not installed."""
    if not stream.isatty():
        return None
    try:
        from tqdm import tqdm
    except ImportError:
        return None
    form = "{percentage:3.0f}% |{bar}| {n}/{total} [{elapsed}<{remaining}{postfix}]"
    return tqdm(
        total=total, initial=start, file=stream, dynamic_ncols=True, leave=True, bar_format=form
    )
