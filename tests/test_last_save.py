"""A save beside the training is finished, whatever ends the run."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable
from pathlib import Path

from mpillm.checkpoint.files import list_checkpoints
from mpillm.checkpoint.verify import verify

Command = Callable[..., "subprocess.CompletedProcess[str]"]

TEXT = Path(__file__).parent.parent / "LICENSE"
# Adam's first steps at this rate make weights so large that the third loss is not finite.
CONFIG = f"""
[model]
layers = 1
heads = 2
width = 16
[train]
steps = 50
batch_size = 4
sequence_length = 16
max_skipped = 1
[optimizer]
lr = 1e30
warmup = 0
[checkpoint]
every = 1
keep = 9
async = true
[data]
text = [{json.dumps(str(TEXT))}]
"""


def test_a_run_that_bad_numbers_end_keeps_what_it_has_begun_to_save(
    python: Command, tmp_path: Path
) -> None:
    (tmp_path / "run.toml").write_text(CONFIG)
    result = python("-m", "mpillm", "train", tmp_path / "run.toml", f"--run.dir={tmp_path / 'run'}")
    assert result.returncode == 2 and "1 update was skipped" in result.stderr, result.stderr
    steps = (tmp_path / "run" / "metrics.jsonl").read_text().count("\n")
    found = list_checkpoints(tmp_path / "run" / "checkpoints")
    assert len(found) == steps > 0
    assert not verify(found[-1])
    assert not list((tmp_path / "run" / "checkpoints").glob(".tmp-*"))
