"""The benchmarks against PyTorch run, and both sides compute the same."""

from __future__ import annotations

from pathlib import Path

BENCHMARKS = Path(__file__).resolve().parents[2] / "benchmarks"


def test_compare_with_torch(python, mpirun_program):
    options = ("--rounds", "1", "--steps", "1", "--ours", "data=2", "--torch", "eager", "ddp")
    done = python(BENCHMARKS / "compare.py", "baby-cpu", *options, timeout=240)
    assert done.returncode == 0, done.stderr
    assert "to 0.0001 the losses are the same." in done.stdout
    assert "mpillm data=2 over PyTorch " in done.stdout


def test_ops_with_torch(python):
    """Every operation's results are compared before it is timed."""
    done = python(
        BENCHMARKS / "ops.py", "--settings", "baby-cpu", "--seconds", "0.001", timeout=240
    )
    assert done.returncode == 0, done.stderr
    rows = [line for line in done.stdout.splitlines() if line.startswith("| ")]
    assert len(rows) > 12
