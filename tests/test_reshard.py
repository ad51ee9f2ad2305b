"""Checkpoints written anew in another layout: every bit is kept, and nothing else is touched."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from planned_runs import (
    arrays_of,
    config_of,
    elements,
    expected_of,
    make_checkpoint,
    make_run,
    same,
)

from mpillm.__main__ import main
from mpillm.checkpoint import commit as commit_module
from mpillm.checkpoint.manifest import encode, read_manifest
from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.shard_file import write_shard
from mpillm.checkpoint.verify import verify
from mpillm.config import load, to_table
from mpillm.errors import UserError
from mpillm.models.settings import build_model
from mpillm.parallel.layouts import parse_layout
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.shard import Shard
from mpillm.storage.source import StoredArray
from mpillm.training.reshard import reshard, shard_items
from mpillm.training.run_lock import RunLock
from mpillm.training.saving import share_out
from mpillm.training.settings import RunConfig

Run = Callable[..., "subprocess.CompletedProcess[str]"]

SAMPLE = Path(__file__).parent / "samples" / "run-v1"


def options(layout: str) -> list[str]:
    return [f"--parallel.{part}" for part in layout.split(",")]


@pytest.fixture
def run(tmp_path: Path) -> Path:
    """A run folder whose checkpoint two ranks have written."""
    make_run(tmp_path / "run", "data=2,zero=1")
    return tmp_path / "run"


# -- the bytes -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("first", "second", "model"),
    [
        ("data=1", "tensor=2,pipe=2,sequence=true", {}),
        ("data=3,zero=3", "tensor=4", {"tied": False}),
        ("pipe=2,chunks=2,schedule=interleaved", "data=2,context=2,zero=2", {}),
        ("expert=2,tensor=2", "data=2,expert=3,zero=3", {"experts": 5}),
        ("expert=4", "pipe=5", {"experts": 3, "tied": False, "expert_every": 2}),
    ],
)
def test_there_and_back(tmp_path: Path, first: str, second: str, model: dict[str, Any]) -> None:
    source = make_run(tmp_path / "a", first, **model)
    there = reshard(tmp_path / "a", tmp_path / "b", options(second))
    assert there == tmp_path / "b" / "checkpoints" / source.name
    assert verify(there) == [] and same(arrays_of(there), expected_of(source))
    # The other settings are those of the layout before, and so the stage of ZeRO is told.
    told = [] if "zero" in first else ["--parallel.zero=0"]
    back = reshard(there, tmp_path / "c", [*options(first), *told])
    ours, theirs = read_manifest(source), read_manifest(back)
    assert ours.files == theirs.files and ours.arrays == theirs.arrays
    for file in ours.files:
        assert (source / file.name).read_bytes() == (back / file.name).read_bytes()
    for name in ("step", "samples", "state", "extra"):
        assert getattr(ours, name) == getattr(theirs, name) == getattr(read_manifest(there), name)


def test_an_older_format_is_read(tmp_path: Path) -> None:
    made = reshard(SAMPLE, tmp_path / "new", ["--parallel.tensor=2"])
    (old,) = (SAMPLE / "checkpoints").iterdir()
    assert read_manifest(old).version == 1 and read_manifest(made).version == 2
    assert same(arrays_of(made), arrays_of(old))


def test_only_what_overlaps_is_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A pipeline's last stage wants its own layers, and a tensor rank's shard is its own file's."""
    read: list[int] = []
    original = StoredArray.read

    def counted(self: StoredArray, start: int = 0, stop: int | None = None) -> Any:
        result = original(self, start, stop)
        read.append(result.size)
        return result

    source = make_run(tmp_path / "run", "tensor=2")
    monkeypatch.setattr(StoredArray, "read", counted)
    model, layout = build_model(config_of().model), parse_layout("tensor=2", ParallelSettings())
    for rank in range(2):
        with Checkpoint.open(source) as checkpoint:
            read.clear()
            items = shard_items(checkpoint, model, layout, rank)
            assert not read
            write_shard(tmp_path / f"shard-{rank:05d}.h5", items, verify=False)
        assert sum(read) == sum(item.size for item in items) < elements(source)


def test_memory_does_not_grow_with_the_model(tmp_path: Path) -> None:
    """State of 190 MB, the largest array 63 MB."""

    def zeros(kind: str, name: str, shard: Shard, part: tuple[int, int]) -> Iterator[np.ndarray]:
        for low in range(*part, 2**20):
            yield np.zeros(min(2**20, part[1] - low), np.float32)

    config = config_of("tensor=2,zero=0", vocabulary=2**17, width=120, layers=1)
    source = make_checkpoint(tmp_path / "a", config, fill=zeros)
    assert elements(source) * 4 > 185e6
    tracemalloc.start()
    reshard(source, tmp_path / "b", ["--parallel.pipe=3"])
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 80e6


@given(st.lists(st.integers(0, 1000), max_size=40), st.integers(1, 9))
def test_shares_are_even(sizes: list[int], writers: int) -> None:
    chosen = share_out(sizes, writers)
    loads = [0] * writers
    for size, writer in zip(sizes, chosen, strict=True):
        loads[writer] += size
    assert max(loads) <= sum(sizes) / writers + max(sizes, default=0)
    assert max(loads) <= 4 / 3 * max(sum(sizes) / writers, max(sizes, default=0)) or max(
        loads
    ) <= sum(sorted(sizes)[-2:])


# -- the run folder --------------------------------------------------------------------------------


def test_the_target_is_a_run_to_go_on_with(run: Path, tmp_path: Path) -> None:
    target = tmp_path / "deep" / "new"
    made = reshard(run, target, ["--parallel.pipe=2"], ranks=4)
    for name in ("tokenizer.json", "tokens.h5"):
        assert (target / name).read_bytes() == (run / name).read_bytes()
    config = load(RunConfig, target / "config.toml")
    assert (config.parallel.pipe, config.parallel.data, config.parallel.zero) == (2, 2, 1)
    assert config.run.dir == str(target)
    assert read_manifest(made).settings["parallel"]["pipe"] == 2
    names = {path.name for path in target.iterdir()}
    assert names == {"checkpoints", "config.toml", "lock", "tokenizer.json", "tokens.h5"}
    with RunLock(target):  # which the resharding has let go
        pass


def test_training_and_generation_go_on(python: Run, mpirun: Run, tmp_path: Path) -> None:
    """From the stored sample of an older version, on twice as many ranks."""
    target = tmp_path / "new"
    arguments = ["-m", "mpillm", "checkpoint", "reshard", str(SAMPLE), str(target), "--ranks=2"]
    result = python(*arguments, "--parallel.tensor=2", "--parallel.sequence")
    assert result.returncode == 0, result.stderr
    train = ["-m", "mpillm", "train", str(target / "config.toml"), "--train.steps=4"]
    result = mpirun(2, *train, cwd=SAMPLE)
    assert result.returncode == 0, result.stderr
    told = result.stdout + result.stderr
    assert "resumed after step 3" in told and "tensor 2" in told
    result = python("-m", "mpillm", "generate", str(target), "--prompt=a", "--max-new-tokens=3")
    assert result.returncode == 0 and result.stdout.startswith("a"), result.stderr


def test_other_steps_stay(run: Path, tmp_path: Path) -> None:
    first = reshard(run, tmp_path / "new", ["--parallel.tensor=3"])
    later = make_checkpoint(run / "checkpoints", config_of("data=2,zero=1"), step=7)
    second = reshard(run, tmp_path / "new")
    assert second.name == later.name and verify(first) == verify(second) == []
    assert load(RunConfig, tmp_path / "new" / "config.toml").parallel.tensor == 1


@pytest.mark.parametrize(
    ("given_options", "ranks", "message"),
    [
        (["--parallel.pipe=6"], None, r"parallel.pipe = 6: .* at most 5 stages"),
        (["--parallel.expert=2"], None, r"parallel.expert = 2: the model has no experts"),
        (["--parallel.sequence"], None, r"parallel.sequence = true .* parallel.tensor is 1"),
        (["--parallel.tensor=3"], 4, r"= 3 does not divide 4 ranks"),
        (["--parallel.data=3"], 4, r"= 3 does not fit 4 ranks"),
        (["--parallel.chunks=2"], None, r"parallel.chunks = 2: .* parallel.pipe is 1"),
        (["--parallel.tensr=2"], None, r"--parallel.tensr: no such setting; .* 'tensor'"),
        (["--train.steps=2"], None, r"--train.steps: no such section; valid: parallel"),
        (["--parallel.tensor=two"], None, r"--parallel.tensor: expected integer >= 1"),
    ],
)
def test_layouts_that_cannot_be(
    run: Path, tmp_path: Path, given_options: list[str], ranks: int | None, message: str
) -> None:
    with pytest.raises(UserError, match=message):
        reshard(run, tmp_path / "new", given_options, ranks=ranks)
    assert not (tmp_path / "new").exists()


def test_the_layout_fits_the_rest_of_the_settings(tmp_path: Path) -> None:
    """What a schedule needs goes with the pipeline; deterministic mode wants its powers of two."""
    make_run(tmp_path / "run", "pipe=2,chunks=2,schedule=interleaved,zero=2")
    made = reshard(tmp_path / "run", tmp_path / "a", ["--parallel.data=2"])
    layout = read_manifest(made).layout
    assert (layout["schedule"], layout["chunks"], layout["zero"]) == ("1f1b", 1, 2)
    deterministic = load(RunConfig, tmp_path / "run" / "config.toml", ["--train.deterministic"])
    make_checkpoint(tmp_path / "b", deterministic)
    with pytest.raises(UserError, match="train.deterministic: .* power of two, and it is 3"):
        reshard(tmp_path / "b", tmp_path / "c", ["--parallel.data=3"])


# -- what is refused, and what fails ---------------------------------------------------------------


def test_targets_that_hold_something_else(run: Path, tmp_path: Path) -> None:
    step = next((run / "checkpoints").iterdir())
    for place in (run, run / "checkpoints", step, run / ".." / "run" / "checkpoints" / ".."):
        with pytest.raises(UserError, match="is where .* lies; choose another folder"):
            reshard(run, place)
    target = tmp_path / "new"
    reshard(run, target)
    with pytest.raises(UserError, match=r"step-00000005 is there already; remove it"):
        reshard(run, target, ["--parallel.tensor=2"])
    shutil.rmtree(target / "checkpoints")
    (target / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match="holds another run: its tokenizer.json is not that of"):
        reshard(run, target)
    make_run(tmp_path / "other", layers=2)
    shutil.rmtree(tmp_path / "other" / "checkpoints")
    with pytest.raises(UserError, match="holds a run of another model"):
        reshard(run, tmp_path / "other")
    (tmp_path / "file").touch()
    with pytest.raises(UserError, match="cannot be made"):
        reshard(run, tmp_path / "file" / "new")


def test_sources_that_are_not_whole(run: Path, tmp_path: Path) -> None:
    step = next((run / "checkpoints").iterdir())
    shutil.copytree(step, tmp_path / "good")
    (run / "tokenizer.json").write_text("[]")
    with pytest.raises(UserError, match=r"tokenizer.json is not the one that .* was trained with"):
        reshard(run, tmp_path / "new")
    (run / "tokenizer.json").write_text("{}")
    assert not (tmp_path / "new").exists()

    path = step / "shard-00001.h5"
    content = bytearray(path.read_bytes())
    content[len(content) // 2] ^= 4
    path.write_bytes(content)
    with pytest.raises(UserError, match="shard-00001.h5"):
        reshard(run, tmp_path / "new", ["--parallel.tensor=2"])
    assert list((tmp_path / "new" / "checkpoints").iterdir()) == []
    assert not (tmp_path / "new" / "config.toml").exists()

    made = reshard(tmp_path / "good", tmp_path / "new", ["--parallel.tensor=2"])
    assert same(arrays_of(made), expected_of(made))


def test_a_model_that_the_checkpoint_does_not_hold(tmp_path: Path) -> None:
    config = config_of()
    for name, model, message in (
        ("a", {"layers": 4}, "holds no parameter 'block.003.attention.qkv.weight'"),
        ("b", {"layers": 2}, "holds parameter 'block.002.*which its model has not"),
        ("c", {"vocabulary": 24}, r"'embedding.tokens' has shape \(23, 12\)"),
    ):
        folder = tmp_path / name
        made = make_checkpoint(folder, config)
        settings = to_table(config_of(**model))
        manifest = msgspec.structs.replace(read_manifest(made), settings=settings)
        (made / "manifest.json").write_bytes(encode(manifest))
        with pytest.raises(UserError, match=message):
            reshard(folder, tmp_path / "new")
    assert not (tmp_path / "new").exists()


def test_a_disk_that_is_full(run: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, original = tmp_path / "new", os.pwrite
    written = [0]

    def pwrite(handle: int, data: Any, place: int) -> int:
        written[0] += 1
        if written[0] > 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(handle, data, place)

    with monkeypatch.context() as patched:
        patched.setattr(os, "pwrite", pwrite)
        with pytest.raises(UserError, match=r"new cannot be written to: No space left on device"):
            reshard(run, target)
    with monkeypatch.context() as patched:
        usage = type(shutil.disk_usage(tmp_path))(1, 1, 1000)
        patched.setattr(commit_module.shutil, "disk_usage", lambda path: usage)
        with pytest.raises(UserError, match=r"cannot be written to: it needs .* MiB are free"):
            reshard(run, target)
    assert list((target / "checkpoints").iterdir()) == []
    assert not (target / "config.toml").exists()
    assert verify(reshard(run, target)) == []


def test_two_at_once(run: Path, tmp_path: Path) -> None:
    (tmp_path / "new").mkdir()
    with RunLock(tmp_path / "new"), pytest.raises(UserError, match="is in use by process"):
        reshard(run, tmp_path / "new")


# -- the command -----------------------------------------------------------------------------------


def test_the_command(run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["checkpoint", "reshard", str(run), str(tmp_path / "new")]
    assert main([*arguments, "--parallel.tensor=2", "--ranks=4"]) == 0
    assert "mpirun -n 4 mpillm train" in capsys.readouterr().out
    assert main(["checkpoint", "verify", str(tmp_path / "new")]) == 0
    assert main([*arguments, "--ranks", "x"]) == 2
    assert main([*arguments, "--rnks=2"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        "mpillm: error: checkpoint reshard: argument --ranks: expected an integer, got 'x'",
        "mpillm: error: checkpoint reshard: no option --rnks; did you mean '--ranks'?",
    ]


def test_one_rank_of_a_job_does_it(mpirun: Run, run: Path, tmp_path: Path) -> None:
    result = mpirun(2, "-m", "mpillm", "checkpoint", "reshard", str(run), str(tmp_path / "new"))
    assert result.returncode == 0, result.stderr
    assert result.stdout.count("is written") == 1
