"""A run that is killed and resumed, in the same layout and in another; through the command line."""

from __future__ import annotations

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest

from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.verify import resolve
from mpillm.parallel.shard import Shard

Command = Callable[..., "subprocess.CompletedProcess[str]"]

TEXT = Path(__file__).parent.parent / "LICENSE"
STEPS = 60
CONFIG = f"""
[model]
layers = 2
heads = 2
width = 16
dropout = 0.1
[train]
steps = {STEPS}
batch_size = 4
micro_batch_size = 2
sequence_length = 16
eval_every = 4
[optimizer]
warmup = 2
[checkpoint]
every = 3
keep = 2
"""


@pytest.fixture(scope="module")
def config(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The settings of a small run on the licence's text."""
    path = tmp_path_factory.mktemp("config") / "run.toml"
    path.write_text(f"{CONFIG}[data]\ntext = [{json.dumps(str(TEXT))}]\n")
    return path


@pytest.fixture(scope="module")
def whole(python: Command, config: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of all steps on one rank; not to be changed."""
    folder = tmp_path_factory.mktemp("whole") / "run"
    succeed(python(*arguments(config, folder)))
    return folder


@pytest.fixture
def folder(whole: Path, tmp_path: Path) -> Path:
    """A copy of that run."""
    return Path(shutil.copytree(whole, tmp_path / "run"))


def arguments(config: Path, folder: Path, *more: str) -> list[str]:
    """Of `python`, to train in `folder`."""
    return ["-m", "mpillm", "train", str(config), f"--run.dir={folder}", *more]


def metrics(folder: Path) -> list[dict[str, Any]]:
    """The run's metrics without the times."""
    lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
    timed = ("tokens_per_second", "step_seconds", "gflops", "mfu")
    return [{key: value for key, value in line.items() if key not in timed} for line in lines]


def state(folder: Path) -> dict[tuple[str, str], np.ndarray]:
    """Every array of the newest checkpoint, whole."""
    with Checkpoint.open(resolve(folder)) as checkpoint:
        return {
            (kind, name): checkpoint.read(kind, name, Shard.whole(checkpoint.shape(name, kind)))
            for kind in checkpoint.kinds()
            for name in checkpoint.names(kind)
        }


def succeed(result: subprocess.CompletedProcess[str]) -> str:
    """What a command printed, once it is known to have ended well."""
    assert result.returncode == 0, result.stderr
    return result.stdout + result.stderr


def train_and_kill(command: list[str], folder: Path, environment: dict[str, str]) -> int:
    """Start training, SIGKILL everything once it is past a checkpoint; returns the steps seen."""
    process = subprocess.Popen(
        command,
        env=environment,
        start_new_session=True,
        stdout=subprocess.DEVNULL,
        stderr=subprocess.DEVNULL,
    )
    deadline = time.monotonic() + 60
    path = folder / "metrics.jsonl"
    while process.poll() is None and time.monotonic() < deadline:
        done = path.read_text().count("\n") if path.exists() else 0
        if done >= 4:
            break
        time.sleep(0.001)
    os.killpg(process.pid, signal.SIGKILL)
    process.wait()
    return path.read_text().count("\n")


def test_killed_and_resumed_is_bitwise_the_same(
    python: Command, environment: dict[str, str], config: Path, whole: Path, tmp_path: Path
) -> None:
    broken = tmp_path / "broken"
    command = [sys.executable, *arguments(config, broken)]
    seen = train_and_kill(command, broken, environment)
    assert 4 <= seen < STEPS, "the run was not killed on the way"
    assert "resumed after step" in succeed(python(*arguments(config, broken)))
    assert metrics(broken) == metrics(whole)
    expected, found = state(whole), state(broken)
    assert expected.keys() == found.keys()
    assert {kind for kind, _ in expected} == {"parameter", "optimizer/m", "optimizer/v"}
    for key, values in expected.items():
        assert (values == found[key]).all(), key


@pytest.mark.parametrize(
    "layout",
    [
        {"data": 2},
        {"tensor": 2},
        {"tensor": 2, "sequence": "true"},
        {"pipe": 2},
        {"pipe": 2, "chunks": 2, "schedule": "interleaved"},
        {"context": 2},
        {"data": 2, "zero": 1},
        {"data": 2, "zero": 3},
    ],
    ids=lambda layout: "-".join(f"{key}-{value}" for key, value in layout.items()),
)
def test_resumed_in_another_layout(
    mpirun: Command, config: Path, whole: Path, folder: Path, layout: dict[str, Any]
) -> None:
    """The last steps on two ranks, against one rank all the way."""
    mixed = folder
    shutil.rmtree(mixed / "checkpoints" / f"step-{STEPS:08d}")
    settings = [f"--parallel.{key}={value}" for key, value in layout.items()]
    said = succeed(mpirun(2, *arguments(config, mixed, *settings)))
    assert f"resumed after step {STEPS - 3}" in said and f"{next(iter(layout))} 2" in said
    for ours, theirs in zip(metrics(whole), metrics(mixed), strict=True):
        assert ours["loss"] == pytest.approx(theirs["loss"], rel=2e-5)
        assert ours.keys() == theirs.keys()
        if "val_loss" in ours:
            assert ours["val_loss"] == pytest.approx(theirs["val_loss"], rel=2e-5)
    expected, found = state(whole), state(mixed)
    for key, values in expected.items():
        if key[0] == "parameter":
            scale = np.abs(values).max() + STEPS * 1e-3
            assert np.abs(values - found[key]).max() <= 2e-5 * scale, key


def test_keeps_the_last_checkpoints_and_a_complete_run_says_so(
    python: Command, config: Path, folder: Path
) -> None:
    names = sorted(path.name for path in (folder / "checkpoints").iterdir())
    assert names == [f"step-{STEPS - 3:08d}", f"step-{STEPS:08d}"]
    assert f"is complete: {STEPS} of {STEPS} steps" in succeed(python(*arguments(config, folder)))
    longer = python(*arguments(config, folder, f"--train.steps={STEPS + 1}"))
    assert f"resumed after step {STEPS}" in succeed(longer)


def test_fresh_keeps_the_old_run(
    python: Command, config: Path, whole: Path, folder: Path, tmp_path: Path
) -> None:
    succeed(python(*arguments(config, folder, "--fresh", "--train.seed=7", "--train.steps=2")))
    key = ("parameter", "embedding.tokens")
    assert (state(tmp_path / "run.1")[key] == state(whole)[key]).all()
    assert not (state(folder)[key] == state(whole)[key]).all()
    assert [line["step"] for line in metrics(folder)] == [1, 2]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ("--model.layers=3", "model.layers = 3, but"),
        ("--model.width=32", "model.width = 32, but"),
        (f"--data.text={Path(__file__)}", "tokens.h5 was made from"),
        ("--data.validation=0.3", "tokens.h5 was made from"),
    ],
)
def test_another_model_or_text_is_refused(
    python: Command, config: Path, folder: Path, change: str, message: str
) -> None:
    result = python(*arguments(config, folder, "--train.steps=70", change))
    assert result.returncode == 2
    lines = result.stderr.strip().splitlines()
    assert len(lines) == 1 and message in lines[0] and "--fresh" in lines[0]


def damage(shard: Path) -> None:
    """Change one bit of an element."""
    with Checkpoint.open(shard.parent) as checkpoint:
        piece = checkpoint.array("parameter", "embedding.tokens").pieces[0]
    with h5py.File(shard, "r") as file:
        offset = file[piece.dataset].id.get_offset()
    data = bytearray(shard.read_bytes())
    data[offset + 7] ^= 1
    shard.write_bytes(data)


def test_of_a_damaged_checkpoint_nothing_is_generated(
    python: Command, config: Path, folder: Path
) -> None:
    damage(folder / "checkpoints" / f"step-{STEPS:08d}" / "shard-00000.h5")
    result = python("-m", "mpillm", "generate", str(folder), "--prompt", "a")
    assert result.returncode == 2
    assert "Traceback" not in result.stderr
    assert "shard-00000.h5" in result.stderr and f"step-{STEPS:08d}" in result.stderr


def test_a_damaged_checkpoint_is_named_and_the_one_before_is_used(
    python: Command, config: Path, whole: Path, folder: Path
) -> None:
    last = folder / "checkpoints" / f"step-{STEPS:08d}"
    damage(last / "shard-00000.h5")
    output = succeed(python(*arguments(config, folder)))
    assert f"{last.name} cannot be used, and the one before is tried: " in output
    assert f"{last / 'shard-00000.h5'}, dataset 'parameter/embedding.tokens' is damaged" in output
    assert f"resumed after step {STEPS - 3}" in output
    assert metrics(folder) == metrics(whole)
    expected, found = state(whole), state(folder)
    assert all((values == found[key]).all() for key, values in expected.items())


def test_nothing_is_overwritten_where_all_checkpoints_are_damaged(
    python: Command, config: Path, folder: Path
) -> None:
    before = metrics(folder)
    for manifest in folder.glob("checkpoints/step-*/manifest.json"):
        manifest.write_bytes(manifest.read_bytes()[:-2])
    result = python(*arguments(config, folder))
    assert result.returncode == 2
    assert "none of the 2 checkpoints in" in result.stderr and "--fresh" in result.stderr
    assert result.stderr.count("\n") == 1
    assert metrics(folder) == before and len(list(folder.glob("checkpoints/step-*"))) == 2


def test_generate_refuses_another_tokenizer(python: Command, folder: Path) -> None:
    path = folder / "tokenizer.json"
    path.write_text(path.read_text().replace("abc", "acb"))
    result = python("-m", "mpillm", "generate", str(folder), "--prompt", "a")
    assert result.returncode == 2
    assert "tokenizer.json is not the one" in result.stderr
