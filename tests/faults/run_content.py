"""What run folders hold, to be compared bit for bit."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import numpy as np

from mpillm.checkpoint.reader import Checkpoint
from mpillm.parallel.shard import Shard

__all__ = ["Content", "content", "difference", "losses", "told"]

Content = dict[tuple[str, str], Any]

_TIMES = ("tokens_per_second", "step_seconds", "gflops", "mfu")


def told(run: Path) -> list[int]:
    """The steps of the checkpoints that the run's log has told of, in all its lives."""
    log = run / "log.txt"
    text = log.read_text(encoding="utf-8") if log.exists() else ""
    return [int(step) for step in re.findall(r" checkpoint \S*step-(\d{8,})\b", text)]


def losses(run: Path) -> list[dict[str, Any]]:
    """What the run has measured in every step, without the times."""
    lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text().splitlines()]
    return [{key: line[key] for key in line if key not in _TIMES} for line in lines]


def content(path: Path) -> Content:
    """A checkpoint: every array, whole, the samples consumed and the trainer's state."""
    with Checkpoint.open(path) as checkpoint:
        found: Content = {
            (kind, name): checkpoint.read(kind, name, Shard.whole(checkpoint.shape(name, kind)))
            for kind in checkpoint.kinds()
            for name in checkpoint.names(kind)
        }
        found["samples", ""] = checkpoint.manifest.samples
        found["state", ""] = checkpoint.manifest.state
    return found


def difference(expected: Content, found: Content) -> str | None:
    """The first thing that is not bitwise the same in two checkpoints."""
    if expected.keys() != found.keys():
        return f"{sorted(expected.keys() ^ found.keys())[0]} in one of them only"
    for key, a in expected.items():
        b = found[key]
        if isinstance(a, np.ndarray):
            same = (a.dtype, a.shape) == (b.dtype, b.shape) and a.tobytes() == b.tobytes()
        else:
            same = a == b
        if not same:
            return " ".join(key).strip()
    return None
