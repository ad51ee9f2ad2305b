"""`mpillm schedule`: the drawing as text and picture, and mistakes in one line."""

from __future__ import annotations

import re
import struct
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from program_text import TRAINING, parse

from mpillm.__main__ import main
from mpillm.errors import UserError
from mpillm.parallel.schedules import SCHEDULES, Action, Kind
from mpillm.parallel.simulate import Costs, Span, Timeline, simulate
from mpillm.report.timeline import draw_png, draw_text, summarize

Run = Callable[..., "subprocess.CompletedProcess[str]"]

ZERO_BUBBLE = """\
zero-bubble: 3 ranks, 4 micro-batches
F forward, B input gradient, W weight gradient, . idle; F2: micro-batch 2; a column is 1

        0  1  2  3  4  5  6  7  8  9  10 11 12 13
rank 0  F0 F1 F2 .  .  B0 W0 F3 B1 W1 B2 W2 B3 W3
rank 1  .  F0 F1 .  B0 F2 B1 W0 F3 B2 W1 B3 W2 W3
rank 2  .  .  F0 B0 F1 B1 F2 B2 W0 F3 B3 W1 W2 W3

makespan          14
bubble            14.3 % of the ranks' time (formula: 14.3 %)
peak activations  3 on every rank
"""

INTERLEAVED = """\
interleaved: 2 ranks, 2 chunks a rank, 2 micro-batches
F forward, B backward, . idle; F2.1: micro-batch 2, chunk 1; a column is 0.5

        0    0.5  1    1.5  2    2.5  3    3.5
rank 0  F0.0 F1.0 F0.1 F1.1 .    .    B0.1-----
rank 1  .    F0.0 F1.0 F0.1 B0.1----- F1.1 B1.1-

        4    4.5  5    5.5  6    6.5  7
rank 0  .    B1.1----- B0.0----- B1.0-----
rank 1  ---- B0.0----- B1.0----- .    .

makespan          7.5
bubble            20.0 % of the ranks' time (formula: 20.0 %)
peak activations  4 3, by rank
"""


def options(text: str) -> list[str]:
    return ["schedule", *text.split()]


@pytest.fixture(autouse=True)
def _wide(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("COLUMNS", "100")


def test_zero_bubble_by_hand(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options("--stages 3 --micros 4 --name zero-bubble")) == 0
    assert capsys.readouterr().out == ZERO_BUBBLE


def test_chunks_durations_and_lines_that_do_not_fit(
    capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("COLUMNS", "50")
    times = "--forward 0.5 --backward 0.75 --weight-gradient 0.25"
    assert main(options(f"--stages 2 --micros 2 --name interleaved --chunks 2 {times}")) == 0
    assert capsys.readouterr().out == INTERLEAVED


def test_no_formula(capsys: pytest.CaptureFixture[str]) -> None:
    text = "--stages 4 --micros 2 --name zero-bubble --weight-gradient 2"
    assert main(options(text)) == 0
    assert re.search(r"^bubble +\d+\.\d % of the ranks' time$", capsys.readouterr().out, re.M)


# --- drawings ------------------------------------------------------------------------------------


def rows_of(lines: list[str]) -> list[str]:
    """The blocks of a drawing, joined again, by rank."""
    rows: dict[str, str] = {}
    widths = [len(line) for line in lines[1:]]
    for line in lines[1:]:
        if found := re.match(r"(rank +\d+  )(.*)", line):
            rows[found[1]] = rows.get(found[1], "") + found[2].ljust(max(widths))
    return list(rows.values())


@given(
    case=st.sampled_from(TRAINING),
    ranks=st.integers(1, 5),
    micros=st.integers(1, 6),
    backward=st.sampled_from([0.5, 1.0, 2.0]),
    width=st.integers(60, 200),
)
def test_every_action_is_drawn_once_in_its_place(
    case: tuple[str, int], ranks: int, micros: int, backward: float, width: int
) -> None:
    name, chunks = case
    actions = SCHEDULES[name](ranks, micros, chunks)
    timeline = simulate(actions, Costs.even(ranks * chunks, 1.0, backward, 1.0))
    lines = draw_text(timeline, width)
    assert all(len(line) <= width for line in lines[1:])
    if not any("left out" in line for line in lines):
        for row, drawn in zip(actions, rows_of(lines), strict=True):
            labels = [
                a.kind.name[0] + str(a.micro) + (f".{a.chunk}" if chunks > 1 else "") for a in row
            ]
            assert re.findall(r"[FBW][\d.]+", drawn) == labels


def test_the_middle_of_a_long_timeline_is_left_out() -> None:
    timeline = simulate(SCHEDULES["1f1b"](2, 200, 1), Costs.even(2, 1.0, 1.0, 1.0))
    lines = draw_text(timeline, 80)
    assert len(lines) == 1 + 4 * (1 + 1 + 2) + 2
    (left_out,) = [line for line in lines if line.startswith("...")]
    found = re.fullmatch(r"\.\.\. time (\d+) to (\d+) is left out \.\.\.", left_out)
    assert found and 20 < int(found[1]) < 80 and 520 < int(found[2]) < 600
    rows = rows_of(lines)
    assert rows[0].startswith("F0-- F1-- .  ") and "B199" in rows[0] and "F199" in rows[1]


def test_a_measured_timeline_is_drawn() -> None:
    """Actions that last no whole number of the shortest, and that start late."""
    forward, backward = parse("F0 B0")[0]
    rows = [
        [Span(forward, 10.0, 11.0), Span(backward, 13.4, 15.0)],
        [Span(forward, 11.1, 12.3), Span(backward, 12.3, 13.4)],
    ]
    assert draw_text(Timeline(rows), 80)[2:] == [
        "        0  1  2  3  4",
        "rank 0  F0 .  .  B0---",
        "rank 1  .  F0 B0 .  .",
    ]


def test_zero_times_are_not_drawn() -> None:
    timeline = simulate(SCHEDULES["zero-bubble"](1, 2, 1), Costs.even(1, 1.0, 1.0, 0.0))
    assert draw_text(timeline, 80)[-1] == "rank 0  F0 B0 F1 B1"


def test_colours_only_add_to_the_text() -> None:
    timeline = simulate(SCHEDULES["zero-bubble"](2, 3, 1), Costs.even(2, 1.0, 2.0, 1.0))
    plain, coloured = draw_text(timeline, 80), draw_text(timeline, 80, colour=True)
    assert [re.sub("\x1b\\[[0-9;]*m", "", line) for line in coloured] == plain
    kinds = {(code, letter) for code, letter in re.findall("\x1b\\[97;(..)m(.)", "".join(coloured))}
    # A backward goes on for two columns.
    assert kinds == {("44", "F"), ("41", "B"), ("41", "-"), ("42", "W")}


def test_many_ranks_in_one_line() -> None:
    timeline = simulate(SCHEDULES["1f1b"](20, 30, 1), Costs.even(20, 1.0, 1.0, 1.0))
    assert summarize(timeline)[-1] == "peak activations  1 to 20"


def size_of(png: Path) -> tuple[int, int]:
    """Width and height in the file's header."""
    head = png.read_bytes()[:24]
    assert head.startswith(b"\x89PNG")
    width, height = struct.unpack(">II", head[16:])
    return width, height


def test_the_picture(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    pytest.importorskip("matplotlib")
    sizes = {}
    for ranks, micros in ((2, 3), (8, 30)):
        path = tmp_path / f"{ranks}.png"
        text = f"--stages {ranks} --micros {micros} --name interleaved --chunks 2 --png {path}"
        assert main(options(text)) == 0
        assert capsys.readouterr().out.endswith(f"drawn to {path}\n")
        sizes[ranks] = size_of(path)
    assert sizes[8][0] > sizes[2][0] and sizes[8][1] > sizes[2][1]


def test_the_picture_shows_every_action(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    axes = pytest.importorskip("matplotlib.axes").Axes
    drawn: list[tuple[float, float, int, str]] = []
    numbers: list[str] = []
    draw = axes.broken_barh

    def note(self: object, places: list[tuple[float, float]], *rest: object, **how: object) -> None:
        (bottom, height) = rest[0]  # type: ignore[misc]
        colour = str(how["facecolor"])
        drawn.extend((x, x + width, round(bottom + height / 2), colour) for x, width in places)
        draw(self, places, *rest, **how)

    monkeypatch.setattr(axes, "broken_barh", note)
    monkeypatch.setattr(axes, "text", lambda self, x, y, text, **how: numbers.append(text))
    timeline = simulate(SCHEDULES["zero-bubble"](3, 4, 1), Costs.even(3, 1.0, 2.0, 1.0))
    draw_png(timeline, tmp_path / "a.png", "title")
    spans = [(s.start, s.stop, rank) for rank, row in enumerate(timeline.rows) for s in row]
    assert sorted(one[:3] for one in drawn) == sorted(spans)
    assert len({one[3] for one in drawn}) == 3  # a colour a kind
    assert sorted(numbers) == sorted(3 * 3 * ["0", "1", "2", "3"])


# --- mistakes ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "line"),
    [
        ("--micros 4", "schedule: the following arguments are required: --stages"),
        ("--stages 0 --micros 4", "--stages 0: expected at least 1"),
        ("--stages 2 --micros -1", "--micros -1: expected at least 1"),
        ("--stages 2 --micros 4 --chunks 0", "--chunks 0: expected at least 1"),
        ("--stages 2 --micros 4 --name 1f2b", "--name 1f2b: did you mean '1f1b'?"),
        (
            "--stages 2 --micros 4 --name xyz",
            "--name xyz: valid: 1f1b, gpipe, interleaved, zero-bubble",
        ),
        ("--stages 2 --micros 4 --forward 0", "--forward 0: expected a finite time above 0"),
        ("--stages 2 --micros 4 --backward nan", "--backward nan: expected a finite time above 0"),
        (
            "--stages 2 --micros 4 --weight-gradient -1",
            "--weight-gradient -1: expected a finite time at least 0",
        ),
        (
            "--stages 64 --micros 10000",
            "--stages x --micros x --chunks = 640,000: expected at most 200,000, for example "
            "--micros 3125",
        ),
        (
            "--stages 2 --micros 4 --chunks 2",
            "parallel.schedule = '1f1b' runs one chunk a rank, and parallel.chunks = 2; set "
            "parallel.chunks = 1, or parallel.schedule = 'interleaved'",
        ),
        (
            "--stages 2 --micros 4 --name interleaved",
            "parallel.schedule = 'interleaved' with parallel.chunks = 1 is '1f1b'; "
            "set parallel.chunks >= 2",
        ),
        ("--stages 2 --micros 4 --png no/such/a.png", "--png no/such/a.png: cannot be written: "),
        ("--stages 2 --micros 4 --nam x", "schedule: no option --nam; did you mean '--name'?"),
    ],
)
def test_mistakes_take_one_line(text: str, line: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(options(text)) == 2
    error = capsys.readouterr().err
    assert error.startswith(f"mpillm: error: {line}") and error.count("\n") == 1


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    timeline = Timeline([[Span(Action(Kind.FORWARD, 0), 0.0, 1.0)]])
    with pytest.raises(UserError, match=r"install the extra 'report': pip install 'mpillm\[report"):
        draw_png(timeline, tmp_path / "a.png", "title")


def test_it_is_printed_once_under_mpirun(mpirun: Run, tmp_path: Path) -> None:
    path = tmp_path / "a.png"
    text = options(f"--stages 3 --micros 4 --name zero-bubble --png {path}")
    result = mpirun(3, "-m", "mpillm", *text)
    assert result.returncode == 0, result.stderr
    assert result.stdout == ZERO_BUBBLE + f"drawn to {path}\n"
    assert result.stderr == ""
    result = mpirun(3, "-m", "mpillm", *options("--stages 3 --micros 0"))
    assert result.returncode == 2
    assert result.stderr.count("mpillm: error: --micros 0: expected at least 1") == 1


def test_no_array_library_and_no_mpi_is_loaded(python: Run) -> None:
    program = (
        "import sys; from mpillm.__main__ import main\n"
        "main(['schedule', '--stages', '2', '--micros', '2'])\n"
        "print([name for name in ('numpy', 'mpi4py') if name in sys.modules])"
    )
    assert python("-c", program).stdout.splitlines()[-1] == "[]"
