"""What a run tells its user: metrics, progress, log and plot."""

from __future__ import annotations

import io
import json
import math
import re
import sys
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillm.errors import UserError
from mpillm.report import plot
from mpillm.report.metrics import MetricsFile, StepMetrics, read_metrics
from mpillm.report.plot import plot_losses, smooth
from mpillm.report.progress import Progress, duration
from mpillm.report.reporter import Reporter


def metrics(step: int, **fields: Any) -> StepMetrics:
    numbers = {"loss": 4.0 / step, "lr": 1e-3, "grad_norm": 0.5, "tokens_per_second": 12345.6}
    return StepMetrics(step=step, **{**numbers, "step_seconds": 0.1, **fields})


class Terminal(io.StringIO):
    def isatty(self) -> bool:
        return True


class Clock:
    def __init__(self) -> None:
        self.now = 100.0

    def __call__(self) -> float:
        return self.now


# Metrics


def test_a_line_is_strict_json_with_all_digits_and_at_once_in_the_file(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    file.write(metrics(1, loss=1 / 3, grad_norm=math.nan, lr=np.float32(0.1)))
    file.write(metrics(2, val_loss=math.inf))

    def refuse(constant: str) -> None:
        raise AssertionError(f"{constant} is not JSON")

    first, second = path.read_text().splitlines()  # the file is still open for writing
    assert json.loads(first, parse_constant=refuse) == {
        "step": 1, "loss": 1 / 3, "lr": float(np.float32(0.1)), "grad_norm": None,
        "tokens_per_second": 12345.6, "step_seconds": 0.1,
    }  # fmt: skip
    assert json.loads(second, parse_constant=refuse)["val_loss"] is None
    rows = read_metrics(path)
    assert rows[0]["loss"] == 1 / 3 and math.isnan(rows[0]["grad_norm"])
    assert "val_loss" not in rows[0] and math.isnan(rows[1]["val_loss"])
    file.close()


def test_rewind_drops_later_steps_and_a_cut_line(tmp_path: Path) -> None:
    path = tmp_path / "metrics.jsonl"
    file = MetricsFile(path)
    for step in range(1, 8):
        file.write(metrics(step))
    file.close()
    whole = path.read_bytes()
    lines = whole.splitlines(keepends=True)
    for cut in range(len(whole) - len(lines[-1]), len(whole) + 1):  # killed while writing step 7
        path.write_bytes(whole[:cut])
        file = MetricsFile(path)
        assert [row["step"] for row in read_metrics(path)] == [*range(1, 7 + (cut == len(whole)))]
        file.rewind(6 if cut % 2 else 4)
        file.write(metrics(9))
        file.close()
        kept = lines[: 6 if cut % 2 else 4]
        assert path.read_bytes().startswith(b"".join(kept))
        assert [row["step"] for row in read_metrics(path)] == [*range(1, len(kept) + 1), 9]
    assert [entry.name for entry in tmp_path.iterdir()] == ["metrics.jsonl"]


GOOD = json.dumps(asdict(metrics(2, loss=4.0)))


@pytest.mark.parametrize(
    "line",
    [
        *("nonsense", "[1]", "7", "", '{"step": 2}', "[" * 70_000),
        *(GOOD.replace('"step": 2', f'"step": {new}') for new in ("2.5", "true", "null", '"2"')),
        *(GOOD.replace("4.0", new) for new in ("NaN", "1e999", '"4"', "{}", "true")),
        GOOD.replace("{", '{"step": 2, '),
    ],
)
def test_a_damaged_line_is_named(tmp_path: Path, line: str) -> None:
    path = tmp_path / "metrics.jsonl"
    path.write_text(f"{GOOD}\n{line}\n{GOOD}\n")
    assert line != GOOD
    with pytest.raises(UserError, match=r"metrics\.jsonl, line 2: expected a JSON object"):
        read_metrics(path)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"absent\.jsonl"):
        read_metrics(tmp_path / "absent.jsonl")


# Progress


def test_plain_lines_come_first_last_at_evaluations_and_every_few_seconds(tmp_path: Path) -> None:
    clock, stream = Clock(), io.StringIO()
    progress = Progress(tmp_path / "log.txt", 30, 10, stream=stream, clock=clock, interval=5.0)
    progress.line("resuming\nfrom step 10")
    for step in range(11, 31):
        clock.now += 1.0
        progress.step(metrics(step, **({"val_loss": 2.5} if step == 14 else {})))
    progress.close()
    lines = stream.getvalue().splitlines()
    assert lines[:2] == ["resuming", "from step 10"]
    told = [int(re.match(r"step (\d+)/30  loss", line)[1]) for line in lines[2:]]  # type: ignore[index]
    assert told == [11, 14, 19, 24, 29, 30]
    assert lines[3] == (
        "step 14/30  loss 0.2857  val 2.5000  lr 1.00e-03  12,346 tokens/s"
        "  elapsed 0:00:04  left 0:00:16"
    )
    assert lines[-1].endswith("elapsed 0:00:20  left 0:00:00")
    logged = (tmp_path / "log.txt").read_text().splitlines()
    assert all(re.match(r"\d{4}-\d\d-\d\dT\d\d:\d\d:\d\dZ ", line) for line in logged)
    assert [line.split(" ", 1)[1] for line in logged] == lines


def test_a_terminal_gets_a_bar_with_the_evaluations_above_it(tmp_path: Path) -> None:
    pytest.importorskip("tqdm")
    stream = Terminal()
    progress = Progress(tmp_path / "log.txt", 4, stream=stream)
    for step in range(1, 5):
        progress.step(metrics(step, **({"val_loss": 2.5} if step == 2 else {})))
    progress.close()
    text = stream.getvalue()
    assert "100%" in text and "4/4" in text and "loss 1.0000" in text
    assert re.findall(r"step (\d)/4", text) == ["2"]
    logged = (tmp_path / "log.txt").read_text()
    assert re.findall(r"step (\d)/4", logged) == ["1", "2", "4"]


def test_a_terminal_without_tqdm_gets_plain_lines(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "tqdm", None)
    stream = Terminal()
    progress = Progress(tmp_path / "log.txt", 1, stream=stream)
    progress.step(metrics(1))
    progress.close()
    assert stream.getvalue().startswith("step 1/1  loss 4.0000  lr")


def test_durations() -> None:
    assert [duration(s) for s in (0, 59.6, 3599, 360000)] == [
        "0:00:00", "0:01:00", "0:59:59", "100:00:00",
    ]  # fmt: skip


# Plot


@given(st.lists(st.floats(-10, 10) | st.just(math.nan), max_size=40), st.integers(1, 12))
def test_smoothing_stays_between_the_values_near_by(values: list[float], width: int) -> None:
    mean = smooth(np.array(values, dtype=np.float64), width)
    assert len(mean) == len(values)
    for at, smoothed in enumerate(mean):
        near = [
            v for v in values[max(0, at - width // 2) : at + width // 2 + 1] if not math.isnan(v)
        ]
        assert math.isnan(smoothed) or min(near) - 1e-9 <= smoothed <= max(near) + 1e-9


def test_smoothing_keeps_a_straight_beginning_and_skips_nan() -> None:
    line = np.arange(20.0)
    assert np.allclose(smooth(line, 6)[:17], line[:17])
    line[5] = math.nan
    assert np.allclose(smooth(line, 2)[[4, 6]], [3.5, 6.5]) and np.isfinite(smooth(line, 2)).all()


def test_the_plot_shows_the_metrics(tmp_path: Path) -> None:
    image = pytest.importorskip("matplotlib.image")
    colors = pytest.importorskip("matplotlib.colors")
    path, picture = tmp_path / "metrics.jsonl", tmp_path / "loss.png"
    file = MetricsFile(path)

    def pixels(color: str) -> int:
        assert plot_losses(path, picture, "a run")
        rgb = image.imread(picture)[..., :3]
        return int(np.isclose(rgb, colors.to_rgb(color), atol=0.01).all(axis=-1).sum())

    legend = pixels(plot.TRAINING)
    assert pixels(plot.VALIDATION) == 0
    file.write(metrics(1, lr=0.0))
    assert pixels(plot.TRAINING) > legend and pixels(plot.VALIDATION) == 0
    file.write(metrics(2, loss=math.nan, val_loss=2.0))
    assert pixels(plot.TRAINING) > legend and pixels(plot.VALIDATION) > 0
    file.close()


# Reporter


def test_a_resumed_run_goes_on_in_the_same_folder(tmp_path: Path) -> None:
    stream = io.StringIO()
    first = Reporter(tmp_path / "run", 6, stream=stream)
    for step in range(1, 5):
        first.step(metrics(step))
    first.close()
    second = Reporter(tmp_path / "run", 6, start_step=3, stream=stream)
    second.line("resumed")
    for step in range(4, 7):
        second.step(metrics(step, loss=9.0))
    second.close()
    rows = read_metrics(tmp_path / "run" / "metrics.jsonl")
    assert [row["step"] for row in rows] == [1, 2, 3, 4, 5, 6]
    assert [row["loss"] for row in rows[2:4]] == [4.0 / 3, 9.0]
    logged = (tmp_path / "run" / "log.txt").read_text().splitlines()
    assert [line.split(" ", 1)[1] for line in logged] == stream.getvalue().splitlines()


def test_without_matplotlib_one_line_says_how_to_get_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    stream = io.StringIO()
    reporter = Reporter(tmp_path, 1, stream=stream)
    reporter.plot("a run")
    reporter.close()
    assert re.fullmatch(r".*pip install 'mpillm\[report\]'\n", stream.getvalue())
    assert not (tmp_path / "loss.png").exists()


def test_the_silent_reporter_leaves_no_trace(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    reporter = Reporter.silent()
    assert isinstance(reporter, Reporter)
    reporter.line("text")
    reporter.step(metrics(1))
    reporter.plot("a run")
    reporter.close()
    assert capfd.readouterr() == ("", "") and not list(tmp_path.iterdir())
    public = {name for name in vars(Reporter) if not name.startswith("_")} - {"silent"}
    assert public <= vars(type(reporter)).keys()
