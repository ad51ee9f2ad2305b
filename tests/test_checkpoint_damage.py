"""Damaged and hostile checkpoints: refused when read, found and named by verify, in one line."""

from __future__ import annotations

import hashlib
import json
import os
import shutil
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from checkpoint_fakes import items_of, save_ranks, state
from hypothesis import given
from hypothesis import strategies as st

from mpillm.checkpoint.manifest import Array, File, Manifest, Piece, decode, encode
from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.verify import verify
from mpillm.errors import UserError
from mpillm.parallel.shard import Shard
from mpillm.storage.disk import Damaged, hash_file
from mpillm.storage.hdf5 import FORMAT


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with the checkpoints of two steps."""
    folder = tmp_path_factory.mktemp("saved")
    for step in (1, 2):
        save_ranks(folder, step, items_of(step))
    return folder


@pytest.fixture
def good(saved: Path, tmp_path: Path) -> Path:
    """The newer one of two checkpoints, free to be broken."""
    shutil.copytree(saved, tmp_path / "checkpoints")
    return tmp_path / "checkpoints" / "step-00000002"


def read_all(path: Path) -> None:
    """Read every array and see that it is right."""
    with Checkpoint.open(path) as checkpoint:
        for name, array in state(2).items():
            whole = Shard.whole(array.shape)
            assert np.array_equal(checkpoint.read("parameter", name, whole), array)
            assert np.array_equal(checkpoint.read("optimizer/m", name, whole), 2 * array)


def refused(path: Path, *words: str) -> None:
    """See that reading is refused and verify finds something, in single lines with these words."""
    with pytest.raises(UserError) as caught:
        read_all(path)
    problems = verify(path)
    for line in (str(caught.value), problems[0]):
        assert "\n" not in line
    for word in words:
        assert word in str(caught.value)
        assert any(word in problem for problem in problems)


def flip(path: Path, place: int) -> None:
    raw = bytearray(path.read_bytes())
    raw[place] ^= 16
    path.write_bytes(raw)


def rewrite(path: Path, change: Callable[[dict[str, Any]], Any]) -> None:
    """Change the manifest of a checkpoint and give it a right hash of itself."""
    file = path / "manifest.json"
    value = json.loads(file.read_bytes())
    del value["sha256"]
    change(value)
    zeros = json.dumps({**value, "sha256": "0" * 64}, separators=(",", ":")) + "\n"
    digest = hashlib.sha256(zeros.encode()).hexdigest()
    file.write_text(json.dumps({**value, "sha256": digest}, separators=(",", ":")) + "\n")


def trust(path: Path) -> None:
    """Put the present sizes and hashes of the files into the manifest."""

    def change(value: dict[str, Any]) -> None:
        for entry in value["files"]:
            file = path / entry["name"]
            entry.update(bytes=file.stat().st_size, sha256=hash_file(file))

    rewrite(path, change)


def test_a_good_one_is_good(good: Path) -> None:
    read_all(good)
    assert verify(good) == []


def test_flipped_bits_in_shards(good: Path) -> None:
    """Every 61st byte: each flip is found; what is read is right or refused."""
    file = good / "shard-00001.h5"
    raw = file.read_bytes()
    found = 0
    for place in range(0, len(raw), 61):
        flip(file, place)
        problems = verify(good)
        assert f"{file} is damaged: its sha256 is" in problems[0], place
        try:
            read_all(good)
            assert len(problems) == 1  # not a byte that matters, and no piece is accused
        except Damaged as error:
            found += 1
            assert "shard-00001.h5" in str(error)
            assert str(error) in problems
            assert "\n" not in str(error)
        file.write_bytes(raw)
    assert found > len(raw) // 61 // 2


def test_flipped_bits_in_the_manifest(good: Path) -> None:
    raw = (good / "manifest.json").read_bytes()
    for place in range(len(raw)):
        broken = raw[:place] + bytes([raw[place] ^ 1]) + raw[place + 1 :]
        with pytest.raises(UserError, match="manifest"):
            decode(broken, good / "manifest.json")


@pytest.mark.parametrize("name", ["manifest.json", "shard-00000.h5", "shard-00001.h5"])
def test_lost_cut_and_swapped_files(good: Path, name: str) -> None:
    file, other = good / name, good.with_name("step-00000001") / name
    raw = file.read_bytes()
    file.unlink()
    refused(good, name, "is missing")
    file.write_bytes(raw[:-1])
    refused(good, name)
    file.write_bytes(raw + b"\0")
    refused(good, name)
    file.write_bytes(b"")
    refused(good, name)
    file.unlink()
    file.mkdir()
    refused(good, name, "is not a regular file")
    file.rmdir()
    os.mkfifo(file)  # to open it would wait for a writer for ever
    refused(good, name, "is not a regular file")
    file.unlink()
    file.symlink_to(other)
    refused(good, name, "is not a regular file")
    file.unlink()
    shutil.copy(other, file)
    refused(good, name)
    expected = "that of step 1" if name == "manifest.json" else "is a file of step-00000001"
    assert expected in verify(good)[0]


def test_a_whole_checkpoint_under_another_steps_name(good: Path) -> None:
    shutil.rmtree(good)
    good.with_name("step-00000001").rename(good)
    refused(good, "that of step 1")
    good.rename(good.with_name("renamed freely"))
    assert verify(good.with_name("renamed freely")) == []


def test_files_that_do_not_belong(good: Path) -> None:
    (good / "shard-00002.h5").write_bytes(b"")
    assert verify(good) == [f"{good / 'shard-00002.h5'} does not belong to the checkpoint"]


# Each makes `dataset`, 20 float32 numbers of a good file, into something else, and gives the words
# of the refusal. The same numbers lie in the file `elsewhere` as "x", and in another as raw bytes.
def soft_link(file: h5py.File, dataset: str, elsewhere: Path) -> str:
    file["other"] = file.pop(dataset)
    file[dataset] = h5py.SoftLink("/other")
    return "is a link to another place"


def external_link(file: h5py.File, dataset: str, elsewhere: Path) -> str:
    del file[dataset]
    file[dataset] = h5py.ExternalLink(str(elsewhere), "/x")
    return "is a link to another place"


def linked_group(file: h5py.File, dataset: str, elsewhere: Path) -> str:
    group = dataset.split("/")[0]
    file.move(group, "other")
    file[group] = h5py.SoftLink("/other")
    return "is a link to another place"


def virtual_dataset(file: h5py.File, dataset: str, elsewhere: Path) -> str:
    del file[dataset]
    layout = h5py.VirtualLayout((5, 4), np.dtype("<f4"))
    layout[...] = h5py.VirtualSource(str(elsewhere), "x", (5, 4))
    file.create_virtual_dataset(dataset, layout)
    return "it is a virtual dataset"


def external_storage(file: h5py.File, dataset: str, elsewhere: Path) -> str:
    del file[dataset]
    file.create_dataset(dataset, (5, 4), "<f4", external=[(str(elsewhere) + ".raw", 0, 80)])
    return "it keeps its elements in another file"


def chunked(file: h5py.File, dataset: str, elsewhere: Path) -> str:
    data = file.pop(dataset)[...]
    file.create_dataset(dataset, data=data, chunks=(5, 4), compression="gzip")
    return "it is chunked, compact or filtered"


def wrong_shape(file: h5py.File, dataset: str, elsewhere: Path) -> str:
    data = file.pop(dataset)[...]
    file.create_dataset(dataset, data=data.reshape(4, 5))
    return "it has shape (4, 5), expected (5, 4)"


def huge_shape(file: h5py.File, dataset: str, elsewhere: Path) -> str:
    del file[dataset]
    file.create_dataset(dataset, (2**30, 2**30), "<f4")
    return "expected (5, 4)"


def wrong_type(file: h5py.File, dataset: str, elsewhere: Path) -> str:
    data = file.pop(dataset)[...]
    file.create_dataset(dataset, data=data.astype(">f4"))
    return "it has elements of type >f4, expected float32"


def wrong_elements(file: h5py.File, dataset: str, elsewhere: Path) -> str:
    file[dataset][...] += 1
    return "its bytes do not match"


def no_elements(file: h5py.File, dataset: str, elsewhere: Path) -> str:
    del file[dataset]
    file.create_dataset(dataset, (5, 4), "<f4")
    return "it holds 0 bytes, expected 80"


def no_dataset(file: h5py.File, dataset: str, elsewhere: Path) -> str:
    del file[dataset]
    return "there is no 'embed.tokens'"


def a_group(file: h5py.File, dataset: str, elsewhere: Path) -> str:
    del file[dataset]
    file.create_group(dataset)
    return "it is not a dataset"


def a_dataset_for_a_group(file: h5py.File, dataset: str, elsewhere: Path) -> str:
    group = dataset.split("/")[0]
    del file[group]
    file[group] = 1.0
    return "is not a group"


@pytest.mark.parametrize(
    "attack",
    [
        soft_link,
        external_link,
        linked_group,
        virtual_dataset,
        external_storage,
        chunked,
        wrong_shape,
        huge_shape,
        wrong_type,
        wrong_elements,
        no_elements,
        no_dataset,
        a_group,
        a_dataset_for_a_group,
    ],
)
def test_hostile_hdf5(
    good: Path, tmp_path: Path, attack: Callable[[h5py.File, str, Path], str]
) -> None:
    file = good / "shard-00000.h5"
    with h5py.File(file, "r+", libver=FORMAT) as h5:
        data = h5["parameter/embed.tokens"][...]
        with h5py.File(tmp_path / "elsewhere", "w") as elsewhere:
            elsewhere["x"] = data
        (tmp_path / "elsewhere.raw").write_bytes(data.tobytes())
        words = attack(h5, "parameter/embed.tokens", tmp_path / "elsewhere")
    trust(good)
    refused(good, words, "shard-00000.h5")


def test_a_file_that_is_not_hdf5(good: Path) -> None:
    (good / "shard-00000.h5").write_bytes(b"no HDF5 at all" * 40)
    trust(good)
    refused(good, "shard-00000.h5 is not readable HDF5")


def set_at(*path: str | int, to: Any) -> Callable[[dict[str, Any]], None]:
    """A change of a manifest: the value at a path becomes `to`, or what `to` makes of it all."""

    def change(value: dict[str, Any]) -> None:
        place: Any = value
        for key in path[:-1]:
            place = place[key]
        place[path[-1]] = to(value) if callable(to) else to

    return change


FIRST = ("arrays", 0)  # "embed.tokens" (9, 4), in two pieces: rows [0, 5) and [5, 9)
PIECE = (*FIRST, "pieces", 1)


@pytest.mark.parametrize(
    ("message", "change"),
    [
        (
            "has format version 3, which a newer mpillm has written; this one reads versions 1 to "
            "2; install a newer one",
            set_at("version", to=3),
        ),
        ("version 0, which no mpillm has ever written", set_at("version", to=0)),
        ("version True, which no mpillm has ever written", set_at("version", to=True)),
        ("version 1 has no field `state`", set_at("version", to=1)),
        ("is not the manifest of a checkpoint", set_at("format", to="other")),
        ("contains unknown field `more`", set_at("more", to=1)),
        ("Object missing required field `state`", lambda value: value.pop("state")),
        ("Expected `int`, got `str`", set_at("step", to="2")),
        ("Expected `int` >= 0", set_at("samples", to=-1)),
        ("Expected `str` matching regex", set_at("files", 0, "name", to="../shard-00000.h5")),
        ("Expected `str` matching regex", set_at("files", 0, "sha256", to="A" * 64)),
        ("a file is listed twice", set_at("files", 1, to=lambda v: v["files"][0])),
        ("Expected `str` matching regex", set_at(*FIRST, "name", to="../x")),
        ("is listed twice", set_at("arrays", 1, to=lambda v: v["arrays"][0])),
        ("unknown dtype 'object'", set_at(*FIRST, "dtype", to="object")),
        ("Expected `array` of length <= 32", set_at(*FIRST, "shape", to=[1] * 33)),
        ("another number of axes", set_at(*FIRST, "shape", to=[36])),
        ("pieces overlap", set_at(*PIECE, 0, 0, to=4)),
        ("a piece is empty or does not lie", set_at(*PIECE, 1, 0, to=10)),
        ("a piece is empty or does not lie", set_at(*PIECE, 0, 0, to=9)),
        ("a range is empty or does not lie", set_at(*PIECE, 2, to=[0, 17])),
        ("a range is empty or does not lie", set_at(*PIECE, 2, to=[3, 3])),
        ("lies in file 7 of 2", set_at(*PIECE, 3, to=7)),
        ("Expected `str` matching regex", set_at(*PIECE, 4, to="parameter/../x")),
        (
            "holds two pieces",
            set_at("arrays", 1, to=lambda v: {**v["arrays"][0], "name": "twin"}),
        ),
        (
            "cannot hold",  # an array of 16 TiB
            set_at(
                *FIRST,
                to=lambda v: {
                    **v["arrays"][0],
                    "shape": [2**40, 4],
                    "pieces": [[[0, 0], [2**40, 4], None, 0, "x", "0" * 64]],
                },
            ),
        ),
    ],
)
def test_hostile_manifests(good: Path, message: str, change: Any) -> None:
    rewrite(good, change)
    refused(good, message, "manifest.json")


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (b"", "not JSON"),
        (b"[" * 100_000, "not JSON"),
        (b"\xff\xfe", "not JSON"),
        (b'{"step":NaN}', "NaN is not a JSON number"),
        (b'{"step":1,"step":2}', "key 'step' stands twice"),
        (b"[]", "is not the manifest of a checkpoint"),
    ],
)
def test_manifests_that_are_none(good: Path, text: bytes, message: str) -> None:
    (good / "manifest.json").write_bytes(text)
    refused(good, message)


def test_a_path_through_a_file(good: Path) -> None:
    path = good / "shard-00000.h5"
    refused(path, f"{path / 'manifest.json'} cannot be read: Not a directory")


def test_a_manifest_that_is_too_large(good: Path) -> None:
    os.truncate(good / "manifest.json", 2**29)  # a sparse file
    refused(good, "bytes; at most")


def test_elements_that_no_piece_holds(good: Path) -> None:
    rewrite(good, lambda value: value["arrays"][0]["pieces"].pop())
    with pytest.raises(UserError, match="16 elements of parameter 'embed.tokens' are in no piece"):
        read_all(good)
    assert "16 of 36 elements of parameter 'embed.tokens' are in no piece" in verify(good)[0]
    with Checkpoint.open(good) as checkpoint:
        got = checkpoint.read("parameter", "embed.tokens", Shard((9, 4), (0, 0), (5, 4)))
    assert np.array_equal(got, state(2)["embed.tokens"][:5])


@given(st.data())
def test_overlaps_are_found_among_many_hyperslabs(data: st.DataObject) -> None:
    """Against the count of every element, for boxes thrown at random and for cuts into a grid."""
    shape = (6, 5)
    if data.draw(st.booleans()):
        rows, columns = ([0, *sorted(data.draw(st.sets(st.integers(1, n - 1)))), n] for n in shape)
        boxes = [(r, c) for r in pairwise(rows) for c in pairwise(columns)]
    else:
        span = [st.tuples(st.integers(0, n - 1), st.integers(1, n)) for n in shape]
        valid = st.tuples(*(s.filter(lambda p: p[0] < p[1]) for s in span))
        boxes = data.draw(st.lists(valid, max_size=6))
    count = np.zeros(shape, int)
    for (top, bottom), (left, right) in boxes:
        count[top:bottom, left:right] += 1
    pieces = tuple(
        Piece((top, left), (bottom, right), None, 0, f"p{i}", "0" * 64)
        for i, ((top, bottom), (left, right)) in enumerate(boxes)
    )
    manifest = Manifest(
        created="",
        step=0,
        samples=0,
        layout={},
        settings={},
        state={},
        versions={},
        extra={},
        files=(File("shard-00000.h5", 10**6, "0" * 64),),
        arrays=(Array("parameter", "w", "int8", shape, pieces),),
    )
    if count.max() > 1:
        with pytest.raises(Damaged, match="pieces overlap"):
            decode(encode(manifest), Path("manifest.json"))
    else:
        assert decode(encode(manifest), Path("manifest.json")).arrays == manifest.arrays
