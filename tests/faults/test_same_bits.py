"""A resumed run is bitwise the run that was never cut, in every mode, in the same layout.

A run saves half-way and at its end. In a copy of its folder, as it was half-way, it is resumed.
Every array of the last checkpoint is the same, bit for bit (weights and moments), and so are the
samples consumed, the trainer's state, and the losses and gradient norms of all steps. Dropout is
on, whose random numbers belong to steps and samples.

Short form: 2 layouts of 2 ranks. Long form: 28 of up to 8 ranks.
"""

from __future__ import annotations

import json
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path

from fault_table import Table
from run_content import content, difference, losses, told

Run = Callable[..., "subprocess.CompletedProcess[str]"]

TEXT = Path(__file__).parents[2] / "LICENSE"
STEPS, HALF = 8, 4
CONFIG = f"""
[model]
layers = 4
heads = 4
width = 16
dropout = 0.1
[train]
steps = {STEPS}
batch_size = 8
micro_batch_size = 1
sequence_length = 16
eval_every = 4
spike_zscore = 9
spike_window = 4
[optimizer]
warmup = 2
[checkpoint]
every = {HALF}
[data]
text = [{json.dumps(str(TEXT))}]
validation = 0.02
"""

EXPERTS = "model.experts=4"

# Ranks and what is set; sections are left out where they are `parallel`.
SHORT = [(2, "data=2 zero=1 checkpoint.async=true"), (2, "pipe=2 chunks=2 schedule=interleaved")]
LONG = [
    (1, ""),
    (1, f"{EXPERTS} model.expert_capacity=1.0"),
    (2, "data=2"),
    (2, "data=2 reduction=ordered overlap=false train.deterministic=true"),
    (2, "data=2 zero=1 checkpoint.async=true"),
    (2, "data=2 zero=2"),
    (2, "data=2 zero=3 train.recompute=block"),
    (2, "data=2 zero=3 checkpoint.writers_per_node=1"),
    (2, "tensor=2"),
    (2, "tensor=2 sequence=true checkpoint.async=true"),
    (2, "pipe=2"),
    (2, "pipe=2 schedule=gpipe model.tied=false"),
    (2, "pipe=2 schedule=zero-bubble"),
    (2, "pipe=2 chunks=2 schedule=interleaved"),
    (2, "context=2"),
    (2, f"expert=2 {EXPERTS}"),
    (2, "data=2 train.dtype=float64"),
    (4, "data=2 tensor=2 zero=1"),
    (4, "data=2 tensor=2 zero=3 sequence=true"),
    (4, "tensor=2 pipe=2 train.deterministic=true"),
    (4, "data=2 pipe=2 zero=2 checkpoint.async=true"),
    (4, "data=2 context=2 zero=1"),
    (4, "context=2 pipe=2 chunks=2 schedule=interleaved"),
    (4, f"data=2 expert=2 zero=1 {EXPERTS} checkpoint.async=true"),
    (4, f"expert=2 tensor=2 {EXPERTS}"),
    (8, "data=2 tensor=2 pipe=2 zero=1"),
    (8, "data=2 tensor=2 context=2 zero=3 checkpoint.async=true"),
    (8, f"data=2 expert=2 pipe=2 zero=2 {EXPERTS}"),
]


def options(settings: str) -> list[str]:
    """The settings as options of the command."""
    pairs = settings.split()
    return [f"--{pair}" if "." in pair.split("=")[0] else f"--parallel.{pair}" for pair in pairs]


def differs(mpirun: Run, config: Path, folder: Path, ranks: int, settings: str) -> str | None:
    """What is not the same in a run of this layout that was cut."""
    whole, cut = folder / "whole", folder / "cut"
    command = ["-m", "mpillm", "train", config, *options(settings)]
    result = mpirun(ranks, *command, f"--run.dir={whole}", timeout=120)
    assert result.returncode == 0, result.stderr
    shutil.copytree(whole, cut)
    shutil.rmtree(cut / "checkpoints" / f"step-{STEPS:08d}")
    result = mpirun(ranks, *command, f"--run.dir={cut}", timeout=120)
    assert result.returncode == 0, result.stderr
    if f"resumed after step {HALF}" not in result.stderr or told(cut)[-1] != STEPS:
        return "not resumed"
    name = Path("checkpoints") / f"step-{STEPS:08d}"
    found = difference(content(whole / name), content(cut / name))
    return found or (None if losses(whole) == losses(cut) else "the losses")


def test_resumed_is_bitwise_the_same(mpirun: Run, tmp_path: Path, table: Table, long: bool) -> None:
    config = tmp_path / "run.toml"
    config.write_text(CONFIG)
    layouts = LONG if long else SHORT
    wrong = []
    for number, (ranks, settings) in enumerate(layouts):
        found = differs(mpirun, config, tmp_path / str(number), ranks, settings)
        if found:
            wrong.append(f"{settings}: {found}")
    result = wrong[0] if wrong else "weights, moments, losses, dropout, samples bitwise equal"
    table.row("resumed in the same layout", len(layouts), result, not wrong)
