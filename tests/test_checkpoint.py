"""Saving and reading: any cut in, any other cut out, the same bits."""

from __future__ import annotations

import os
import re
import runpy
from itertools import pairwise
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

import numpy as np
import numpy.typing as npt
import pytest
from checkpoint_fakes import items_of, on_ranks, save_ranks, state
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm.checkpoint import reader
from mpillm.checkpoint.manifest import DTYPES, manifest_bytes, read_manifest
from mpillm.checkpoint.reader import Checkpoint, flat_boxes
from mpillm.checkpoint.settings import CheckpointSettings
from mpillm.checkpoint.store import Item
from mpillm.checkpoint.verify import inspect, resolve, verify
from mpillm.errors import UserError
from mpillm.parallel.shard import Shard
from mpillm.storage.source import StoredArray

Cut = list[tuple[Shard, tuple[int, int] | None]]


@st.composite
def cuts(draw: st.DrawFn, shape: tuple[int, ...]) -> Cut:
    """Parts that tile an array: cut along random axes, some of them dealt out as ranges."""
    parts: Cut = []
    todo = [Shard.whole(shape)]
    while todo:
        shard = todo.pop()
        cuttable = [axis for axis, size in enumerate(shard.local_shape) if size > 0]
        if cuttable and len(todo) + len(parts) < 8 and draw(st.booleans()):
            axis = draw(st.sampled_from(cuttable))
            at = draw(st.integers(shard.start[axis], shard.stop[axis]))  # at an end: an empty shard
            low, high = list(shard.stop), list(shard.start)
            low[axis] = high[axis] = at
            todo += [
                Shard(shape, shard.start, tuple(low)),
                Shard(shape, tuple(high), shard.stop),
            ]
        elif draw(st.booleans()):
            inner = draw(st.lists(st.integers(0, shard.size), max_size=3))
            edges = [0, *sorted(inner), shard.size]
            parts += [(shard, edge) for edge in pairwise(edges)]
        else:
            parts.append((shard, None))
    return parts


@st.composite
def two_cuts(draw: st.DrawFn) -> tuple[tuple[int, ...], Cut, Cut]:
    shape = tuple(draw(st.lists(st.integers(0, 5), max_size=4)))
    return shape, draw(cuts(shape)), draw(cuts(shape))


def part_of(
    array: npt.NDArray[Any], shard: Shard, range: tuple[int, int] | None
) -> npt.NDArray[Any]:
    part = array[shard.slices]
    return part if range is None else part.reshape(-1)[slice(*range)]


@settings(max_examples=50)
@given(
    two_cuts(),
    st.sampled_from(sorted(DTYPES)),
    st.sampled_from([1, 3, 2**22]),
    st.integers(1, 4),
    st.randoms(use_true_random=False),
)
def test_any_cut_is_read_back_by_any_other(
    tmp_path_factory: pytest.TempPathFactory,
    case: tuple[tuple[int, ...], Cut, Cut],
    dtype: str,
    block: int,
    ranks: int,
    random: Random,
) -> None:
    shape, written, wanted = case
    raw = np.random.default_rng(0).integers(0, 256, np.dtype(dtype).itemsize * int(np.prod(shape)))
    array = raw.astype(np.uint8).view(dtype).reshape(shape)
    items: list[list[Item]] = [[] for _ in range(ranks)]
    for shard, cut in written:
        item = Item("parameter", "w", shard, part_of(array, shard, cut), cut)
        items[random.randrange(ranks)].append(item)
    with mock.patch("os.fsync"):  # what is tested here is not what a crash leaves
        path = save_ranks(tmp_path_factory.mktemp("cut"), 1, items)
    with mock.patch.object(reader, "_BLOCK", block), Checkpoint.open(path) as checkpoint:
        for shard, cut in wanted:
            got = checkpoint.read("parameter", "w", shard, cut)
            expected = part_of(array, shard, cut)
            assert (got.dtype, got.shape) == (expected.dtype, expected.shape)
            assert got.tobytes() == expected.tobytes()
    assert verify(path) == []


@given(st.lists(st.integers(1, 4), max_size=4).map(tuple), st.data())
def test_flat_boxes_are_the_range_in_order(shape: tuple[int, ...], data: st.DataObject) -> None:
    size = int(np.prod(shape))
    start, stop = sorted([data.draw(st.integers(0, size)), data.draw(st.integers(0, size))])
    index = np.arange(size).reshape(shape)
    boxes = list(flat_boxes(shape, start, stop))
    found = [
        index[tuple(slice(a, b) for a, b in zip(*box, strict=True))].reshape(-1) for box in boxes
    ]
    assert np.array_equal(np.concatenate([np.arange(0), *found]), np.arange(start, stop))
    assert len(boxes) <= max(2 * len(shape) - 1, 1)


def test_more_files_than_are_held_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reader, "_OPEN_FILES", 2)
    path = save_ranks(tmp_path, 1, items_of(1, ranks=4))
    with Checkpoint.open(path) as checkpoint:
        for name, array in state(1).items():
            whole = Shard.whole(array.shape)
            assert np.array_equal(checkpoint.read("parameter", name, whole), array)
            assert np.array_equal(checkpoint.read("optimizer/m", name, whole), 2 * array)
        assert len(checkpoint._files) == 2
        assert checkpoint.kinds() == ["parameter", "optimizer/m"]
        assert checkpoint.names() == list(state(1))
        assert checkpoint.shape("head.gain") == (4,)


def test_one_rank_reads_the_manifest_for_all(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = save_ranks(tmp_path, 1, items_of(1, ranks=2))
    reads: list[Path] = []

    def count(folder: Path) -> bytes:
        reads.append(folder)
        return manifest_bytes(folder)

    monkeypatch.setattr(reader, "manifest_bytes", count)
    opened = on_ranks(3, lambda world: Checkpoint.open(path, world))
    assert reads == [path]
    with Checkpoint.open(path) as alone:
        assert all(found.manifest == alone.manifest for found in opened)  # type: ignore[union-attr]
    raw = (path / "manifest.json").read_bytes()
    for content, message in (
        (raw[:-9], "is damaged: not JSON"),
        (None, "manifest.json is missing"),
    ):
        (path / "manifest.json").unlink(missing_ok=True)
        if content is not None:
            (path / "manifest.json").write_bytes(content)
        errors = on_ranks(3, lambda world: Checkpoint.open(path, world))
        assert len({str(error) for error in errors}) == 1 and message in str(errors[0])
        assert all(isinstance(error, UserError) for error in errors)


def test_only_overlapping_files_are_opened(tmp_path: Path) -> None:
    path = save_ranks(tmp_path, 1, items_of(1, ranks=2))
    (path / "shard-00000.h5").unlink()
    with Checkpoint.open(path) as checkpoint:
        shard = Shard.split((9, 4), 0, 2, 1)
        got = checkpoint.read("parameter", "embed.tokens", shard)
        assert np.array_equal(got, state(1)["embed.tokens"][shard.slices])
        empty = Shard((9, 4), (3, 0), (3, 4))
        assert checkpoint.read("parameter", "embed.tokens", empty).shape == (0, 4)
        assert checkpoint.read("parameter", "embed.tokens", shard, (5, 5)).shape == (0,)


def test_a_piece_is_read_whole_once_and_then_in_part(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(reader, "_BLOCK", 4)
    array = np.arange(400, dtype=np.float32).reshape(100, 4)
    item = Item("parameter", "w", Shard.whole(array.shape), array)
    path = save_ranks(tmp_path, 1, [[item]])
    reads: list[Any] = []
    plain = StoredArray.read

    def count(stored: StoredArray, start: int, stop: int) -> Any:
        reads.append((start, stop))
        return plain(stored, start, stop)

    monkeypatch.setattr(StoredArray, "read", count)

    def row(checkpoint: Checkpoint, number: int) -> int:
        """Read a row; in how many blocks."""
        before = len(reads)
        got = checkpoint.read("parameter", "w", Shard.split(array.shape, 0, 100, number))
        assert np.array_equal(got, array[number : number + 1])
        return len(reads) - before

    with Checkpoint.open(path) as checkpoint:
        assert [row(checkpoint, number) for number in (7, 8)] == [100, 1]
        checkpoint.close()
        assert row(checkpoint, 9) == 1  # what was right once needs no second look ...
        checkpoint.close()
        os.utime(path / "shard-00000.h5", ns=(1, 1))
        assert row(checkpoint, 9) == 100  # ... unless the file is another


def test_ranks_without_elements_write_no_file(tmp_path: Path) -> None:
    array = np.ones((3, 2))
    items = [
        [Item("parameter", "w", Shard.split((3, 2), 0, 4, rank), array[rank : rank + 1])]
        for rank in range(4)
    ]
    path = save_ranks(tmp_path, 1, [*items, []])
    assert sorted(p.name for p in path.iterdir()) == ["manifest.json"] + [
        f"shard-{rank:05d}.h5" for rank in range(3)
    ]
    assert verify(path) == []


def test_arrays_in_any_memory_order_are_stored_alike(tmp_path: Path) -> None:
    array = np.arange(12, dtype=np.float32).reshape(3, 4)
    whole = Shard.whole((3, 4))
    files = []
    for step, form in enumerate([array, np.asfortranarray(array), array.astype(">f4")]):
        path = save_ranks(tmp_path, step, [[Item("parameter", "w", whole, form)]], keep=3)
        files.append(read_manifest(path).files)
    assert files[0] == files[1] == files[2]  # the same bytes, HDF5's metadata included


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ([(0, 2)], "no rank wrote 2 elements"),
        ([(0, 3), (2, 4)], "pieces overlap"),
        ([(0, 4), (0, 4)], "pieces overlap"),
    ],
)
def test_parts_that_do_not_tile_are_not_committed(
    tmp_path: Path, parts: list[tuple[int, int]], message: str
) -> None:
    items = [[Item("parameter", "w", Shard((4,), (a,), (b,)), np.zeros(b - a))] for a, b in parts]
    with pytest.raises((ValueError, UserError), match=message):
        save_ranks(tmp_path, 1, items)
    assert list(tmp_path.iterdir()) == []


def test_ranks_that_disagree_about_an_array_are_not_committed(tmp_path: Path) -> None:
    items = [
        [Item("parameter", "w", Shard((4,), (0,), (2,)), np.zeros(2, np.float32))],
        [Item("parameter", "w", Shard((4,), (2,), (4,)), np.zeros(2, np.float64))],
    ]
    with pytest.raises(ValueError, match="float32 .* on one rank and float64"):
        save_ranks(tmp_path, 1, items)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"kind": "Parameter"}, "cannot be stored"),
        ({"name": "a/b"}, "cannot be stored"),
        ({"name": ".."}, "cannot be stored"),
        ({"array": np.zeros((2, 3), complex)}, "dtype complex128 cannot be stored"),
        ({"array": np.zeros(6)}, r"shape \(6,\), expected \(2, 3\)"),
        ({"range": (0, 7), "array": np.zeros(7)}, r"\[0, 7\) does not lie"),
    ],
)
def test_items_that_cannot_be_stored(change: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        Item(
            **{
                "kind": "parameter",
                "name": "w",
                "shard": Shard.whole((2, 3)),
                "array": np.zeros((2, 3)),
                **change,
            }
        )


def test_reading_what_is_not_there_names_the_nearest(tmp_path: Path) -> None:
    path = save_ranks(tmp_path, 1, items_of(1))
    with Checkpoint.open(path) as checkpoint:
        with pytest.raises(UserError, match="no parameter 'embed.token'; did you mean 'embed.tok"):
            checkpoint.read("parameter", "embed.token", Shard.whole((9, 4)))
        with pytest.raises(UserError, match=r"shape \(9, 4\), expected \(10, 4\)"):
            checkpoint.read("parameter", "embed.tokens", Shard.whole((10, 4)))


def test_a_stranger_reads_it_with_plain_h5py(tmp_path: Path) -> None:
    folder = save_ranks(tmp_path, 1, items_of(1))
    document = Path(__file__).parents[1] / "docs" / "checkpoint-format.md"
    example = document.read_text().split("```python\n")[1].split("```")[0]
    script = tmp_path / "example.py"
    script.write_text(example.replace("runs/demo/checkpoints/step-00000100", str(folder)))
    arrays = runpy.run_path(str(script))["arrays"]
    assert len(arrays) == 4
    for name, array in state(1).items():
        assert np.array_equal(arrays["parameter", name], array)
        assert np.array_equal(arrays["optimizer/m", name], 2 * array)


def test_the_manifest_of_many_ranks_stays_small(tmp_path: Path) -> None:
    few, many = (
        (save_ranks(tmp_path, step, items_of(1, ranks)) / "manifest.json").stat().st_size
        for step, ranks in ((1, 2), (2, 32))
    )
    assert (many - few) / 30 < 800  # bytes for a rank's file and its up to four pieces


def test_inspect(tmp_path: Path) -> None:
    text = inspect(save_ranks(tmp_path, 100, items_of(100)))
    for line in (
        r"step +100\n",
        r"samples +1,600\n",
        r"layout +data 2, tensor 1\n",
        r"format +mpillm checkpoint, version 2\n",
        r"depends on +tokenizer.json \(000000000000\)\n",
        r"\nparameter +2 +40 +160 B +4\n",
        r"\noptimizer/m +2 +40 +160 B +4\n",
        r"\nall +4 +80 +320 B +8\n",
        r"\nembed.tokens +9 x 4 +float32 +36 +2\n",
    ):
        assert re.search(line, text), (line, text)


def test_resolve(tmp_path: Path) -> None:
    run = tmp_path / "runs" / "demo"
    (run / "checkpoints" / ".tmp-00000001").mkdir(parents=True)
    with pytest.raises(UserError, match=r"no complete checkpoint \(step-\*\); 1 unfinished"):
        resolve(run)
    first, second = (save_ranks(run / "checkpoints", step, items_of(step)) for step in (9, 10))
    assert resolve(str(run)) == resolve(run / "checkpoints") == resolve(second) == second
    assert resolve(first) == first
    copy = first.rename(tmp_path / "kept")
    assert resolve(copy) == copy
    with pytest.raises(UserError, match=r"step-00000011 does not exist; did you mean 'step-000000"):
        resolve(run / "checkpoints" / "step-00000011")
    with pytest.raises(UserError, match="dem does not exist; did you mean 'demo'"):
        resolve(tmp_path / "runs" / "dem")
    with pytest.raises(UserError, match="is not a folder"):
        resolve(second / "manifest.json")


def test_settings() -> None:
    assert CheckpointSettings() == CheckpointSettings(every=0, keep=2)
