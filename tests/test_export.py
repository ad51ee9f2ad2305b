"""Whole arrays in one plain file: what other programs find in it, and what does not become one."""

from __future__ import annotations

import errno
import json
import os
import tracemalloc
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from checkpoint_fakes import save_ranks
from planned_runs import config_of, expected_of, make_checkpoint, make_run, same

from mpillm.__main__ import main
from mpillm.checkpoint.export import export, inspect_export, open_export
from mpillm.checkpoint.item import Item
from mpillm.checkpoint.manifest import read_manifest
from mpillm.checkpoint.reader import Checkpoint
from mpillm.errors import UserError
from mpillm.parallel.shard import Shard
from mpillm.training.reshard import reshard

Arrays = dict[tuple[str, str], np.ndarray]
NAMES = ["weights.h5", "weights.hdf5", "weights.safetensors"]


@pytest.fixture
def made(tmp_path: Path) -> Path:
    """A checkpoint in many pieces."""
    return make_run(tmp_path / "run", "data=2,tensor=2,zero=3")


def write(made: Path, target: Path, **options: bool) -> Path:
    """Export a checkpoint."""
    with Checkpoint.open(made) as checkpoint:
        export(checkpoint, target, **options)
    return target


def key(name: str) -> tuple[str, str]:
    """Kind and name of an array by its name in a file."""
    kind, _, last = name.rpartition("/")
    return kind or "parameter", last


def plain_hdf5(path: Path) -> tuple[Arrays, dict[str, Any]]:
    """All arrays and attributes, as h5py reads them."""
    found: Arrays = {}

    def visit(name: str, item: Any) -> None:
        if isinstance(item, h5py.Dataset):
            found[key(name)] = item[...]

    with h5py.File(path) as file:
        file.visititems(visit)
        return found, dict(file.attrs.items())


def plain_safetensors(path: Path) -> tuple[Arrays, dict[str, str]]:
    """All arrays and metadata, by the format's own description."""
    raw = path.read_bytes()
    length = int.from_bytes(raw[:8], "little")
    header, begin = json.loads(raw[8 : 8 + length]), 8 + length
    assert begin % 8 == 0
    facts = header.pop("__metadata__")
    types = {"F32": "<f4", "F64": "<f8", "I32": "<i4", "U8": "<u1"}
    found = {}
    for name, about in header.items():
        low, high = about["data_offsets"]
        values = np.frombuffer(raw[begin + low : begin + high], types[about["dtype"]])
        assert (begin + low) % values.itemsize == 0
        found[key(name)] = values.reshape(about["shape"])
    assert len(raw) == begin + max(about["data_offsets"][1] for about in header.values())
    return found, facts


def plain(path: Path) -> tuple[Arrays, dict[str, Any]]:
    return (plain_safetensors if path.suffix == ".safetensors" else plain_hdf5)(path)


@pytest.mark.parametrize("optimizer", [False, True])
@pytest.mark.parametrize("name", NAMES)
def test_every_bit_is_there(made: Path, tmp_path: Path, name: str, optimizer: bool) -> None:
    target = write(made, tmp_path / name, optimizer=optimizer)
    found, facts = plain(target)
    expected = expected_of(made)
    wanted = {k: v for k, v in expected.items() if optimizer or k[0] == "parameter"}
    assert len({kind for kind, _ in wanted}) == (3 if optimizer else 1)
    assert same(found, wanted)
    assert (int(facts["step"]), int(facts["samples"]), int(facts["version"])) == (5, 20, 1)
    settings = facts["settings"]
    manifest = read_manifest(made)
    assert json.loads(settings) == manifest.settings
    assert not list(tmp_path.glob(".tmp*"))


@pytest.mark.parametrize("name", NAMES[1:])
def test_the_elements_lie_alike_whatever_layout_saved_them(
    made: Path, tmp_path: Path, name: str
) -> None:
    other = reshard(made, tmp_path / "other", ["--parallel.pipe=3", "--parallel.zero=0"])
    one = write(made, tmp_path / f"one-{name}", optimizer=True)
    two = write(other, tmp_path / f"two-{name}", optimizer=True)
    with open_export(one) as first, open_export(two) as second:
        assert first.names() == second.names()
    assert list(plain(one)[0]) == list(plain(two)[0]) and same(plain(one)[0], plain(two)[0])


def test_all_types_scalars_and_nothing(tmp_path: Path) -> None:
    arrays = {
        "bytes": np.arange(3, dtype=np.uint8),
        "empty": np.zeros((0, 4), np.float32),
        "number": np.array(-7, np.int32),
        "wide": np.linspace(0, 1, 5),
    }
    items = [Item("parameter", n, Shard.whole(a.shape), a) for n, a in arrays.items()]
    made = save_ranks(tmp_path / "checkpoints", 3, [items])
    for name in NAMES[1:]:
        found, _ = plain(write(made, tmp_path / name))
        assert same(found, {("parameter", n): a for n, a in arrays.items()})
        text = inspect_export(tmp_path / name)
        assert "one number" in text and "0 x 4" in text


@pytest.mark.parametrize("name", NAMES[1:])
def test_memory_does_not_grow_with_the_arrays(tmp_path: Path, name: str) -> None:
    """The table has 63 MB."""

    def zeros(kind: str, name: str, shard: Shard, part: tuple[int, int]) -> Iterator[np.ndarray]:
        for low in range(*part, 2**20):
            yield np.zeros(min(2**20, part[1] - low), np.float32)

    config = config_of("tensor=2", vocabulary=2**17, width=120, layers=1)
    made = make_checkpoint(tmp_path / "checkpoints", config, fill=zeros)
    tracemalloc.start()
    target = write(made, tmp_path / name)
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert target.stat().st_size > 63e6 and peak < 55e6


# -- what is refused, and what fails ---------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_a_file_is_not_overwritten_unasked(made: Path, tmp_path: Path, name: str) -> None:
    target = tmp_path / name
    target.write_text("mine")
    with pytest.raises(UserError, match="is there already; choose another name, or add --overw"):
        write(made, target)
    assert target.read_text() == "mine"
    write(made, target, overwrite=True)
    assert len(plain(target)[0]) == 16 + 12 * 2


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("weights.npz", r"tells no format by its end; valid: .h5, .hdf5, .safetensors"),
        ("weights.safetensor", r"did you mean '.safetensors'\?"),
        ("weights", "tells no format"),
        ("no/weights.h5", "there is no folder"),
    ],
)
def test_names_that_cannot_be(made: Path, tmp_path: Path, name: str, message: str) -> None:
    with pytest.raises(UserError, match=message):
        write(made, tmp_path / name)
    assert not list(tmp_path.glob("*weights*"))


@pytest.mark.parametrize("name", NAMES[1:])
def test_nothing_is_left_of_what_fails(
    made: Path, tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A disk that is full, one that gives back other bytes, and a source that is damaged."""
    target, original = tmp_path / name, os.pwrite
    target.write_text("mine")
    count = [0]

    def full(handle: int, data: Any, place: int) -> int:
        count[0] += 1
        if count[0] > 9:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return original(handle, data, place)

    def flipped(handle: int, data: Any, place: int) -> int:
        count[0] += 1
        content = bytearray(data)
        content[-1] ^= count[0] == 19
        return original(handle, content, place)

    def fails(message: str) -> None:
        with pytest.raises(UserError, match=message):
            write(made, target, optimizer=True, overwrite=True)
        assert target.read_text() == "mine" and not list(tmp_path.glob(".tmp*"))

    for change, message in (
        (full, "cannot be written: No space left on device"),
        (flipped, r"what is read back is not|the checksum of .* is wrong"),
    ):
        count[0] = 0
        with monkeypatch.context() as patched:
            patched.setattr(os, "pwrite", change)
            fails(message)
    shard = made / "shard-00002.h5"
    content = bytearray(shard.read_bytes())
    content[len(content) // 2] ^= 16
    shard.write_bytes(content)
    fails(r"shard-00002.h5.*damaged")


def test_inspecting_other_files(made: Path, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="is no file that mpillm checkpoint export has written"):
        inspect_export(made / "shard-00000.h5")
    target = write(made, tmp_path / "a.safetensors")
    (tmp_path / "a.h5").write_bytes(target.read_bytes())
    with pytest.raises(UserError, match="not readable HDF5"):
        inspect_export(tmp_path / "a.h5")
    target.write_bytes(target.read_bytes()[:-1])
    with pytest.raises(UserError, match="is damaged"):
        inspect_export(target)


# -- the command -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", NAMES)
def test_the_command(
    made: Path, tmp_path: Path, name: str, capsys: pytest.CaptureFixture[str]
) -> None:
    target = str(tmp_path / name)
    assert main(["checkpoint", "export", str(tmp_path / "run"), target, "--optimizer"]) == 0
    assert capsys.readouterr().out == f"{target} is written and read back\n"
    assert main(["checkpoint", "inspect", target]) == 0
    text = capsys.readouterr().out
    assert "optimizer/v/block.002.mlp.up.weight" in text and "step        5" in text
    assert main(["checkpoint", "export", str(tmp_path / "run"), target]) == 2
    assert main(["checkpoint", "export", str(tmp_path / "run"), target, "--overwrit"]) == 2
    errors = capsys.readouterr().err.splitlines()
    assert errors == [
        f"mpillm: error: {target} is there already; choose another name, or add --overwrite",
        "mpillm: error: checkpoint export: no option --overwrit; did you mean '--overwrite'?",
    ]
