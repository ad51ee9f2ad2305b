"""`mpillm verify-layouts`: rows, exit codes, what is run again, and the tables it writes."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest

from mpillm.__main__ import main
from mpillm.config import load
from mpillm.errors import UserError
from mpillm.report.verification import HEADER, Row, RowsFile, line, markdown, summary
from mpillm.training.cases import cases_of, variants_of
from mpillm.training.settings import RunConfig

Run = Callable[..., "subprocess.CompletedProcess[str]"]

CONFIG = """
[model]
family = "gpt2"
layers = 2
heads = 2
width = 8
init_std = 0.1
[train]
batch_size = 4
micro_batch_size = 1
sequence_length = 8
dtype = "float64"
[optimizer]
warmup = 1
eps = 1e-3
[data]
text = ["text.txt"]
[run]
dir = "run"
"""

PASSED = Row(
    layout="data=2",
    ranks=2,
    dtype="float64",
    loss=1e-16,
    norm=2e-15,
    weights=3e-14,
    tolerance=1e-10,
    seconds=0.0123,
    sent={"replicas": 12345, "tied": 999},
)
FAILED = replace(PASSED, layout="pipe=2,schedule=gpipe", weights=2e-10)
REFUSED = replace(PASSED, layout="expert=2", refused="parallel.expert = 2: no experts")


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    (tmp_path / "config.toml").write_text(CONFIG)
    (tmp_path / "text.txt").write_text("The quick brown fox jumps over the lazy dog. " * 20)
    return tmp_path


def verify(mpirun: Run, folder: Path, ranks: int, *options: str) -> list[str]:
    """Lines that the command printed, the last one its exit code."""
    command = ("-m", "mpillm", "verify-layouts", "config.toml", *options)
    result = mpirun(ranks, *command, cwd=folder, timeout=120)
    assert "Traceback" not in result.stderr, result.stderr
    return [*result.stdout.splitlines(), str(result.returncode)]


def test_rows_are_kept_and_told_again(mpirun: Run, folder: Path) -> None:
    names = ["data=2", "pipe=2,schedule=gpipe", "data=1,zero=1"]
    command = ["--layouts", *names, "--steps", "2"]
    kept = folder / "run" / "verify-layouts.jsonl"

    def entries() -> list[str]:
        return [text for text in kept.read_text().splitlines() if text]

    first = verify(mpirun, folder, 2, *command)
    header, *rows, _, total, code = first
    assert header == HEADER and code == "0"
    assert all("  pass  " in row and name in row for row, name in zip(rows, names, strict=True))
    assert total.startswith("3 layouts: in 2 steps 3 gave one rank's run (to 1e-10 in float64)")
    sent = [json.loads(entry)["row"]["sent"].keys() for entry in entries()]
    assert "replicas" in sent[0] and "pipe" in sent[1] and not sent[2]

    # A row that was cut short runs again; the others, with their times, are told as they were.
    kept.write_text(kept.read_text()[:-20])
    again = verify(mpirun, folder, 2, *command)
    assert again[:3] == first[:3] and again[-1] == "0" and len(entries()) == 4

    # For another tolerance nothing runs, for another seed or anew everything does.
    strict = verify(mpirun, folder, 2, *command, "--tolerance", "1e-30")
    assert "  fail  " in strict[1] and "failed: data=2" in strict and strict[-1] == "1"
    assert len(entries()) == 4
    assert verify(mpirun, folder, 2, *command, "--train.seed=7")[-1] == "0"
    assert len(entries()) == 7
    assert verify(mpirun, folder, 2, *command, "--fresh")[-1] == "0"
    assert len(entries()) == 3


def test_all_layouts_of_some_ranks(mpirun: Run, folder: Path) -> None:
    told = verify(
        mpirun, folder, 3, "--ranks", "1,2", "--steps=1", "--pairs", "--markdown", "table.md",
        "--vary", "model.tied=true,false", "--results", "rows.jsonl",
    )  # fmt: skip
    assert told[-1] == "0"
    headings = [text for text in told if text.startswith("model.tied=")]
    assert headings == ["model.tied=true", "model.tied=false"]
    table = (folder / "table.md").read_text()
    assert table.startswith("    mpirun -n 3 mpillm verify-layouts config.toml --ranks 1,2 ")
    for text in ("tensor=2,sequence=true", "schedule=zero-bubble", "context=2", "zero=3"):
        assert any(text in row for row in told) and text in table
    assert not any("expert" in row for row in told)  # refused: the model has none
    assert (folder / "rows.jsonl").exists() and not (folder / "run" / "checkpoints").exists()


def test_what_is_refused(mpirun: Run, folder: Path) -> None:
    """Listed where it was one of many; a failure where it was asked for."""
    told = verify(mpirun, folder, 2, "--layouts", "expert=2", "data=2", "--steps", "1")
    assert told[-1] == "1"
    assert "parallel.expert = 2: the model has no experts" in "\n".join(told)
    assert "failed: expert=2" in told


def test_listed_layouts_of_so_many_ranks() -> None:
    """Data parallelism takes the ranks that a listed layout leaves."""
    config = load(RunConfig, {"model": {"vocabulary": 9, "context": 8}}, [])

    def found(*named: str) -> list[str]:
        return [case.text for case in cases_of({(): config}, 8, ranks=(4, 8), named=named)]

    assert found("tensor=2") == ["data=2,tensor=2", "data=4,tensor=2"]
    using = cases_of({(): config}, 8, ranks=(4,), using=("data", "pipe"))
    assert {(case.layout.data, case.layout.pipe) for case in using} == {(2, 2)}
    assert found("context=4,zero=1") == ["context=4,zero=1", "data=2,context=4,zero=1"]
    with pytest.raises(UserError, match="data 2 x tensor 2 x pipe 1 = 4 does not fit 8 ranks"):
        found("data=2,tensor=2")


@pytest.mark.parametrize(
    ("options", "told"),
    [
        (["--ranks", "4"], "4 ranks, and 1 were started; expected 1 to 1, or start mpirun -n 4"),
        (["--ranks", "0"], "0 ranks, and 1 were started"),
        (["--ranks", "x"], "argument --ranks: expected an integer, got 'x'"),
        (["--layouts", "data=2,pipe=2"], "takes 4 ranks, and 1 were started; start mpirun -n 4"),
        (["--layouts", "tensr=2"], "--parallel.tensr: no such setting; did you mean 'tensor'?"),
        (["--layouts", "data=1", "--pairs"], "leave it out, or --layouts"),
        (["--layouts", "tensor=2", "--ranks", "1"], "tensor 2 x pipe 1 = 2 does not divide 1 rank"),
        (["--using", "exprt"], "--using exprt: did you mean 'expert'?"),
        (["--steps", "0"], "0 steps; expected at least 1"),
        (["--vary", "model.layer=1,2"], "--model.layer: no such setting; did you mean 'layers'?"),
        (["--vary", "data.validation=0.1,0.2"], "data and run.dir cannot be varied"),
        (["--train.sequence_length=2000"], "needs a training text of at least 2001 tokens"),
        (["--results", "no/where.jsonl"], "no/where.jsonl: cannot hold results: No such file"),
        (["--step", "3"], "no option --step; did you mean '--steps'?"),
        (["--seed=3"], "--seed: no such section"),
    ],
)
def test_mistakes(python: Run, folder: Path, options: list[str], told: str) -> None:
    command = ("-m", "mpillm", "verify-layouts", "config.toml", *options)
    result = python(*command, cwd=folder)
    assert result.returncode == 2
    assert told in result.stderr and result.stderr.count("\n") == 1


def test_help_tells_of_noise(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["verify-layouts", "--help"]) == 0
    assert "rounding\nnoise" in capsys.readouterr().out


def test_a_file_of_rows(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    file = RowsFile(path, fresh=False)
    for key, row in (("a", PASSED), ("b", FAILED), ("c", REFUSED)):
        file.write(key, row)
    file.close()
    again = RowsFile(path, fresh=False)
    assert again.rows == {"a": PASSED, "b": FAILED, "c": REFUSED}
    again.close()
    assert RowsFile(path, fresh=True).rows == {} and path.read_text() == ""
    with pytest.raises(UserError, match="cannot hold results: Is a directory"):
        RowsFile(tmp_path, fresh=False)


def test_results_of_rows() -> None:
    assert (PASSED.result, FAILED.result, REFUSED.result) == ("pass", "fail", "refused")
    assert [row.failed for row in (PASSED, FAILED, REFUSED)] == [False, True, False]
    assert replace(REFUSED, required=True).failed
    assert replace(PASSED, problems=("replicas of a differ",)).failed
    assert FAILED.only_weights and not replace(FAILED, norm=1e-9).only_weights
    for name in ("loss", "norm", "weights"):
        assert replace(PASSED, **{name: 2e-10}).result == "fail"
        assert replace(PASSED, **{name: float("nan")}).result == "fail"


def test_lines_and_summary() -> None:
    assert line(PASSED).split() == [
        "1.0e-16", "2.0e-15", "3.0e-14", "pass", "12.3", "data=2", "replicas", "12.3", "kB,",
        "tied", "999", "B",
    ]  # fmt: skip
    assert line(replace(PASSED, bitwise=True)).split()[3:5] == ["same", "pass"]
    assert line(REFUSED).split("\n")[1].strip() == REFUSED.refused
    assert line(replace(PASSED, problems=("one", "two"))).split("\n")[1:] == [
        " " * 45 + "one",
        " " * 45 + "two",
    ]
    told = summary([PASSED, FAILED, REFUSED], 3)
    assert told.startswith("3 layouts: in 3 steps 1 gave one rank's run (to 1e-10 in float64), 0 ")
    assert "1 refused; 1 failed\nfailed: pipe=2,schedule=gpipe" in told
    assert "optimizer.eps" not in told  # in float64 rounding explains no such difference
    single = replace(FAILED, dtype="float32", weights=1e-4, tolerance=5e-5)
    assert "--optimizer.eps=1e-3" in summary([single], 3)
    assert "--optimizer.eps=1e-3" not in summary([replace(single, loss=1e-4)], 3)


def test_tables_show_the_worst_of_the_variants() -> None:
    other = replace(PASSED, variant=("model.tied=false",), loss=5e-15, bitwise=True)
    failed = replace(other, weights=1.0)
    text = markdown([PASSED, other, FAILED, replace(FAILED, dtype="float32"), REFUSED, REFUSED])
    assert "| 2 | `data=2` | 5.0e-15 | 2.0e-15 | 3.0e-14 | 1 of 2 | yes | 12.3 | replicas" in text
    assert text.count("## float64, to 1e-10") == text.count("## float32, to 1e-10") == 1
    assert text.endswith("- parallel.expert = 2: no experts: `expert=2`\n")
    assert "| 1.0e+00 | 1 of 2 | 1 of 2 |" in markdown([PASSED, failed])


def test_variants_and_cases(folder: Path) -> None:
    fixed = ["--model.context=8", "--model.vocabulary=9"]
    vary = ["model.tied=true,false", "optimizer.betas=[0.9,0.95],[0.8,0.9]"]
    variants = variants_of(folder / "config.toml", fixed, vary)
    assert len(variants) == 4
    last = variants[("model.tied=false", "optimizer.betas=[0.8,0.9]")]
    assert last.optimizer.betas == (0.8, 0.9)
    assert variants_of(folder / "config.toml", fixed, []) == {
        (): load(RunConfig, folder / "config.toml", fixed)
    }
    cases = cases_of(variants, 4, ranks=(2, 4))
    assert len(cases) == 4 * (36 + 152)
    assert not any(case.required for case in cases)
    reasons = {case.refused.partition(" = ")[0] for case in cases if case.refused}
    assert reasons == {"parallel.expert", "parallel.pipe"}
    few = cases_of(variants, 4, ranks=(2, 4), pairs=True)
    assert len(few) < 100 and all(case.required and not case.refused for case in few)
    possible = {
        name_value for case in cases if not case.refused for name_value in case.factors.items()
    }
    assert {name_value for case in few for name_value in case.factors.items()} == possible
    named = cases_of(variants, 4, named=["data=0,pipe=2"])
    assert named[0].text == "data=2,pipe=2,schedule=1f1b" and named[0].required
