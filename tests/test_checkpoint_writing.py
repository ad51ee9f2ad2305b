"""Writing a shard file: blocks, checks of what was written, fewer writers than ranks."""

from __future__ import annotations

import errno
import hashlib
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import numpy.typing as npt
import pytest
from checkpoint_fakes import ThreadWorld, items_of, on_ranks, same, save_ranks, state
from hypothesis import given
from hypothesis import strategies as st

from mpillm.checkpoint import item as item_module
from mpillm.checkpoint import node as node_module
from mpillm.checkpoint import shard_file
from mpillm.checkpoint.item import Item, flat_blocks
from mpillm.checkpoint.manifest import DTYPES, read_manifest
from mpillm.checkpoint.node import Handing, writer_of
from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.shard_file import ShardWriter, write_shard
from mpillm.checkpoint.verify import verify
from mpillm.errors import UserError
from mpillm.parallel.shard import Shard

ARRAYS = {
    "a": np.arange(3000, dtype=np.float32).reshape(30, 100),
    "b": np.array(2.5),
    "c": np.zeros((0, 4), np.int8),
    "d": np.arange(7, dtype=np.uint16),
}


def items(blocks: int = 0) -> list[Item]:
    """`ARRAYS` as arrays, or in blocks of so many elements."""

    def cut(array: npt.NDArray[Any]) -> Iterator[npt.NDArray[Any]]:
        for low in range(0, array.size, blocks):
            yield array.reshape(-1)[low : low + blocks].copy()

    return [
        Item("parameter", name, Shard.whole(a.shape), a)
        if not blocks
        else Item("parameter", name, Shard.whole(a.shape), lambda a=a: cut(a), None, a.dtype.name)
        for name, a in ARRAYS.items()
    ]


@pytest.mark.parametrize("blocks", [1, 99, 100, 10_000])
def test_blocks_make_the_same_file_as_arrays(tmp_path: Path, blocks: int) -> None:
    whole = write_shard(tmp_path / "whole.h5", items())
    cut = write_shard(tmp_path / "cut.h5", items(blocks))
    assert (tmp_path / "whole.h5").read_bytes() == (tmp_path / "cut.h5").read_bytes()
    assert whole[1] == cut[1]
    file, parts = cut
    assert file is not None
    raw = (tmp_path / "cut.h5").read_bytes()
    assert (file.bytes, file.sha256) == (len(raw), hashlib.sha256(raw).hexdigest())
    assert [part.piece is None for part in parts] == [False, False, True, False]
    with h5py.File(tmp_path / "cut.h5") as h5:
        for part in parts:
            if part.piece:
                got = h5[part.piece.dataset]
                assert np.array_equal(got[...], ARRAYS[part.name])
                assert hashlib.sha256(ARRAYS[part.name].tobytes()).hexdigest() == part.piece.sha256
                assert got.dtype == ARRAYS[part.name].dtype and got.chunks is None


def test_a_file_of_nothing_is_not_made(tmp_path: Path) -> None:
    empty = Item("parameter", "c", Shard.whole((0, 4)), ARRAYS["c"])
    assert write_shard(tmp_path / "x.h5", [empty])[0] is None
    assert write_shard(tmp_path / "x.h5", []) == (None, ())
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    "blocks",
    [
        [np.zeros(5, np.float32)],
        [np.zeros(7, np.float32)],
        [np.zeros(4, np.float32), np.zeros(3, np.float32)],
        [np.zeros(6, np.float64)],
        np.zeros(7, np.float32),
    ],
)
def test_blocks_that_do_not_fit(tmp_path: Path, blocks: Any) -> None:
    writer = ShardWriter(tmp_path / "x.h5")
    with pytest.raises(ValueError, match="does not fit|bytes are missing"), writer:
        writer.add("parameter", "w", Shard.whole((2, 3)), None, "float32", blocks)


def test_a_slot_that_was_not_filled(tmp_path: Path) -> None:
    writer = ShardWriter(tmp_path / "x.h5")
    slots = [writer.reserve("parameter", name, Shard.whole((2,)), None, "float32") for name in "ab"]
    writer.fill(slots[0], np.zeros(2, np.float32))
    with pytest.raises(ValueError, match="a slot was not filled"):
        writer.close()


@given(
    st.lists(st.integers(0, 4), max_size=3).map(tuple),
    st.sampled_from(["C", "F", "reversed", ">f4"]),
    st.integers(1, 60),
)
def test_flat_blocks_are_the_array_in_order(shape: tuple[int, ...], form: str, size: int) -> None:
    array = np.arange(np.prod(shape), dtype=np.float32).reshape(shape)
    made = {
        "C": array,
        "F": np.asfortranarray(array),
        "reversed": np.flip(array.copy()),
        ">f4": array.astype(">f4"),
    }[form]
    blocks = list(flat_blocks(made, DTYPES["float32"], size))
    assert all(block.dtype == DTYPES["float32"] and block.ndim == 1 for block in blocks)
    got = np.concatenate([np.empty(0, np.float32), *blocks])
    assert np.array_equal(got, made.reshape(-1))
    row = array[0].nbytes if array.ndim and len(array) else 4
    assert all(block.nbytes <= max(size, row, 4) for block in blocks)


def test_short_writes_and_reads_are_continued(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The system may write less than it is asked to; it counts bytes."""
    expected = write_shard(tmp_path / "a.h5", items())
    pwrite, preadv = os.pwrite, os.preadv
    monkeypatch.setattr(os, "pwrite", lambda f, data, at: pwrite(f, data[: 7 + at % 5], at))
    monkeypatch.setattr(os, "preadv", lambda f, to, at: preadv(f, [to[0][: 5 + at % 9]], at))
    file, parts = write_shard(tmp_path / "b.h5", items())
    assert (tmp_path / "a.h5").read_bytes() == (tmp_path / "b.h5").read_bytes()
    assert file is not None and expected[0] is not None
    assert (file.sha256, parts) == (expected[0].sha256, expected[1])


# -- what is read back -----------------------------------------------------------------------------


@pytest.mark.parametrize("blocks", [0, 50])
def test_bytes_that_change_on_the_way_to_the_disk(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, blocks: int
) -> None:
    """A flip at every 149th byte as it is written is found, in the elements and between them."""
    write_shard(tmp_path / "good.h5", items())
    size = (tmp_path / "good.h5").stat().st_size
    plain, found = os.pwrite, set()
    for place in range(0, size, 149):

        def flip(handle: int, data: Any, at: int, place: int = place) -> int:
            raw = bytearray(data)
            if at <= place < at + len(raw):
                raw[place - at] ^= 1
            return plain(handle, raw, at)

        monkeypatch.setattr(os, "pwrite", flip)
        path = tmp_path / f"{place}.h5"
        with pytest.raises(UserError, match="what is read back is not what was written") as caught:
            write_shard(path, items(blocks))
        assert str(path) in str(caught.value)
        found.add(str(caught.value).split(" in ")[0])
        write_shard(tmp_path / f"unverified {place}.h5", items(blocks), verify=False)
    assert "the metadata of HDF5" in found
    assert "dataset 'parameter/a'" in found


def test_a_file_that_grows_or_ends_early(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.fsync
    for number, change in enumerate((-1, 1)):

        def fsync(handle: int, change: int = change) -> None:
            os.ftruncate(handle, os.fstat(handle).st_size + change)
            plain(handle)

        monkeypatch.setattr(os, "fsync", fsync)
        with pytest.raises(UserError, match="what is read back"):
            write_shard(tmp_path / f"{number}.h5", items())


def test_nothing_is_committed_that_reads_back_wrong(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_ranks(tmp_path, 1, items_of(1))
    plain = os.preadv

    def preadv(handle: int, buffers: Any, at: int) -> int:
        count = plain(handle, buffers, at)
        if os.readlink(f"/proc/self/fd/{handle}").endswith(".tmp-00000002/shard-00001.h5"):
            buffers[0][0] ^= 1
        return count

    if not Path("/proc/self/fd").exists():
        pytest.skip("the paths of open files are read from /proc")
    with monkeypatch.context() as patch:
        patch.setattr(os, "preadv", preadv)
        with pytest.raises(UserError) as caught:
            save_ranks(tmp_path, 2, items_of(2))
    assert "shard-00001.h5 on rank 1: " in str(caught.value)
    assert "step-00000001 is the last complete one" in str(caught.value)
    assert "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == ["step-00000001"]


def test_a_manifest_that_reads_back_wrong(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    plain = os.pread
    monkeypatch.setattr(
        os, "pread", lambda handle, count, at: plain(handle, count, at)[:-2] + b" \n"
    )
    with pytest.raises(UserError, match="manifest.json: what is read back"):
        save_ranks(tmp_path, 2, items_of(2))
    assert os.listdir(tmp_path) == []


# -- fewer writers ---------------------------------------------------------------------------------


@given(st.integers(1, 40), st.integers(0, 45))
def test_ranks_share_the_writers_evenly(ranks: int, writers: int) -> None:
    chosen = [writer_of(rank, ranks, writers) for rank in range(ranks)]
    used = sorted(set(chosen))
    assert len(used) == (writers if 0 < writers < ranks else ranks)
    assert chosen == sorted(chosen)
    assert all(writer_of(writer, ranks, writers) == writer for writer in used)
    loads = [chosen.count(writer) for writer in used]
    assert max(loads) - min(loads) <= 1


@pytest.mark.parametrize("beside", [False, True])
@pytest.mark.parametrize(("ranks", "node", "writers"), [(4, 4, 1), (5, 5, 2), (6, 3, 1), (5, 2, 1)])
def test_a_node_of_few_writers(
    tmp_path: Path, ranks: int, node: int, writers: int, beside: bool
) -> None:
    options = {"node": node, "writers_per_node": writers, "beside": beside}
    path = save_ranks(tmp_path, 1, items_of(1, ranks), **options)
    manifest = read_manifest(path)
    expected = {
        first + writer_of(rank, min(node, ranks - first), writers)
        for first in range(0, ranks, node)
        for rank in range(min(node, ranks - first))
    }
    assert [file.name for file in manifest.files] == [f"shard-{r:05d}.h5" for r in sorted(expected)]
    assert verify(path) == []
    with Checkpoint.open(path) as checkpoint:
        for name, array in state(1).items():
            whole = Shard.whole(array.shape)
            assert np.array_equal(checkpoint.read("parameter", name, whole), array)
            assert np.array_equal(checkpoint.read("optimizer/m", name, whole), 2 * array)


def test_a_writer_holds_no_more_than_a_block_of_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Items of many blocks, in any memory order and as blocks of their own."""
    for module in (item_module, node_module, shard_file):
        monkeypatch.setattr(module, "BLOCK", 64)
    array = np.random.default_rng(0).random((4, 60))

    def given(rank: int) -> list[Item]:
        shard = Shard.split(array.shape, 0, 4, rank)
        part = np.asfortranarray(array[shard.slices])
        if rank == 3:
            return [
                Item(
                    "parameter",
                    "w",
                    shard,
                    lambda: iter([part[:, :7], part[:, 7:]]),
                    dtype="float64",
                )
            ]
        return [Item("parameter", "w", shard, part)]

    def work(world: ThreadWorld) -> int:
        handing = Handing(given(world.rank), world.node, 1)
        handing.send()
        if world.rank:
            assert handing.items == []
            return world.node.largest
        write_shard(tmp_path / "x.h5", handing.items)
        return 64

    assert on_ranks(4, work) == [64] * 4
    with h5py.File(tmp_path / "x.h5") as h5:
        got = [h5["parameter/w" + ("" if rank == 0 else f"#{rank}")][...] for rank in range(4)]
    assert np.array_equal(np.concatenate(got), array)


def test_a_writer_whose_disk_is_full_keeps_nobody_waiting(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """At each of its writes; with messages that wait for their receiver nobody must hang."""
    monkeypatch.setattr(node_module, "BLOCK", 16)
    save_ranks(tmp_path, 1, items_of(1, 3))
    plain = os.pwrite
    for last in range(0, 40, 3):
        left = [last]

        def pwrite(handle: int, data: Any, at: int, left: list[int] = left) -> int:
            left[0] -= 1
            if left[0] < 0:
                raise OSError(errno.ENOSPC, "No space left on device")
            return plain(handle, data, at)

        with monkeypatch.context() as patch:
            patch.setattr(os, "pwrite", pwrite)
            try:
                save_ranks(tmp_path, 2, items_of(2, 3), writers_per_node=1)
            except UserError as error:
                assert "shard-00000.h5 on rank 0: No space left on device" in str(error)
            else:
                assert last > 10
                break
        assert os.listdir(tmp_path) == ["step-00000001"]
    assert verify(tmp_path / "step-00000002") == []


def test_blocks_that_are_not_the_whole_item_are_a_defect() -> None:
    short = Item("parameter", "w", Shard.whole((4,)), lambda: [np.zeros(3)], dtype="float64")

    def work(world: ThreadWorld) -> None:
        handing = Handing([short] if world.rank else [], world.node, 1)
        if world.rank:
            handing.send()

    results = on_ranks(2, work)
    assert results[0] is None
    with pytest.raises(ValueError, match="parameter 'w': blocks of 24 bytes"):
        same(results[1:])
