"""The reader of HDF5 against h5py: the same of what mpillm writes, and a refusal of all else."""

from __future__ import annotations

import io
import os
import struct
from pathlib import Path
from random import Random

import h5py
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm.storage import hdf5_metadata as metadata
from mpillm.storage.disk import Damaged
from mpillm.storage.hdf5 import FORMAT, Hdf5File
from mpillm.storage.source import Source, StoredArray

KINDS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8")


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """Where a test makes its file."""
    return tmp_path / "x.h5"


def test_every_type_and_many_shapes(path: Path) -> None:
    rng = np.random.default_rng(0)
    arrays = {
        f"{group}/{kind}": rng.integers(0, 256, (*shape, np.dtype(kind).itemsize), np.uint8)
        .view(order + kind)
        .reshape(shape)
        for order, group, shape in (
            ("<", "little", (3, 4)),
            (">", "a/b/c", (2, 1, 3)),
            ("<", "s", ()),
        )
        for kind in KINDS
    }
    arrays["empty"] = np.zeros((0, 5), "<f4")
    with h5py.File(path, "w", libver=FORMAT) as file:
        for name, array in arrays.items():
            file[name] = array
    with Hdf5File(path, path.stat().st_size) as file:
        assert sorted(file.names()) == ["a", "empty", "little", "s"]
        assert sorted(file.names("a/b/c")) == sorted(KINDS)
        for name, array in arrays.items():
            found = file.find(name, array.dtype, array.shape)
            assert (found.dtype, found.shape, found.size) == (array.dtype, array.shape, array.size)
            assert found.read().tobytes() == array.tobytes()
            assert (
                found.read(found.size // 2).tobytes()
                == array.reshape(-1)[array.size // 2 :].tobytes()
            )
            if array.shape:
                assert found.rows().tobytes() == array.tobytes()
                assert np.array_equal(found.rows(0, 0), array[:0])
        assert np.array_equal(file.find("little/i4").rows(1, 3), arrays["little/i4"][1:3])


@pytest.mark.parametrize("count", [0, 1, 7, 8, 9, 12, 40, 50, 300, 3000])
def test_groups_of_any_size(path: Path, count: int) -> None:
    """In the object header, a heap of one block, of many, of nested ones; B-trees of any depth."""
    rng = Random(count)
    names = [f"block.{number}" + "x" * rng.randrange(count // 5 + 9) for number in range(count)]
    rng.shuffle(names)
    with h5py.File(path, "w", libver=FORMAT) as file:
        for name in names:
            file.create_group(name)
        for name in names[::5]:  # and holes are left
            del file[name]
    with h5py.File(path, "r") as file, Hdf5File(path) as ours:
        assert sorted(ours.names()) == sorted(file)
        links = ours._links(ours._root, "it")
        for name in list(file)[:: max(1, count // 50)]:
            assert links[name] == h5py.h5o.get_info(file[name].id).addr


@settings(max_examples=50)
@given(st.integers(0, 2**32 - 1), st.sampled_from(["sec2", "fileobj"]))
def test_random_trees(tmp_path_factory: pytest.TempPathFactory, seed: int, driver: str) -> None:
    rng, path = Random(seed), tmp_path_factory.mktemp("tree") / "x.h5"
    target = path if driver == "sec2" else io.BytesIO()
    expected: dict[str, np.ndarray] = {}
    attributes: dict[str, dict[str, object]] = {"": {}}
    with h5py.File(target, "w", libver=FORMAT) as file:
        for number in range(rng.randrange(40)):
            name = "/".join(rng.choice("abc") * rng.randint(1, 9) for _ in range(rng.randint(0, 3)))
            name = f"{name}/{number}".lstrip("/")
            shape = tuple(rng.randrange(4) for _ in range(rng.randrange(4)))
            array = np.arange(int(np.prod(shape))).astype(rng.choice(KINDS)).reshape(shape)
            if rng.random() < 0.9 or not expected:
                file.create_dataset(name, data=array, track_times=rng.random() < 0.5)
            else:  # a hard link
                other = rng.choice(list(expected))
                file[name], array = file[other], expected[other]
            expected[name] = array
        for name in (*rng.sample(list(expected), min(3, len(expected))), ""):
            values = {
                "n": rng.randrange(2**40),
                "x": rng.random(),
                "s": "caf\u00e9" * rng.randint(1, 99),
            }
            for key, value in list(values.items())[: rng.randrange(4)]:
                item = file[name] if name else file
                item.attrs[key] = np.bytes_(value.encode()) if isinstance(value, str) else value
                attributes.setdefault(name, {})[key] = value
    if isinstance(target, io.BytesIO):
        path.write_bytes(target.getvalue())
    with Hdf5File(path) as ours:
        for name, array in expected.items():
            found = ours.find(name)
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert found.read().tobytes() == array.tobytes()
        for name, values in attributes.items():
            if name == "" or not any(
                expected[name] is other for n, other in expected.items() if n != name
            ):
                assert ours.attributes(name) == values


def test_files_of_another_format(path: Path) -> None:
    with h5py.File(path, "w", libver="earliest") as file:
        file["x"] = 1
    with pytest.raises(Damaged, match=r"x\.h5 is not readable HDF5: its superblock has version 00"):
        Hdf5File(path)
    path.write_bytes(b"")
    with pytest.raises(Damaged, match="does not begin with HDF5's signature"):
        Hdf5File(path)
    with h5py.File(path, "w", libver=FORMAT, userblock_size=512) as file:
        file["x"] = 1
    with pytest.raises(Damaged, match="does not begin with HDF5's signature"):
        Hdf5File(path)


def test_the_superblock_is_looked_at(path: Path) -> None:
    with h5py.File(path, "w", libver=FORMAT) as file:
        file["x"] = 1
    raw = bytearray(path.read_bytes())

    def refused(at: int, value: bytes, message: str, summed: bool = True) -> None:
        changed = bytearray(raw)
        changed[at : at + len(value)] = value
        if summed:
            struct.pack_into("<I", changed, 44, metadata.lookup3(bytes(changed[:44])))
        path.write_bytes(changed)
        with pytest.raises(Damaged, match=message):
            Hdf5File(path)

    refused(20, b"\x01", "the checksum of its superblock is wrong", summed=False)
    refused(8, b"\x04", "version 04, expected 2 or 3")
    refused(9, b"\x04", "has a user block, driver information or a writer")
    refused(11, b"\x01", "has a user block, driver information or a writer")  # open for writing
    refused(12, b"\x01", "has a user block, driver information or a writer")
    refused(20, bytes(8), "has a user block, driver information or a writer")
    refused(28, struct.pack("<Q", len(raw) - 1), f"says {len(raw) - 1} bytes, the file has")
    path.write_bytes(raw + b"\0")
    with pytest.raises(Damaged, match=rf"says {len(raw)} bytes, the file has {len(raw) + 1}"):
        Hdf5File(path)
    with pytest.raises(Damaged, match=rf"{len(raw) + 1} bytes, expected {len(raw)}"):
        Hdf5File(path, len(raw))


@pytest.mark.parametrize("count", [1, 20])
def test_every_flipped_bit_of_the_metadata_is_noticed(path: Path, count: int) -> None:
    """One by one, but for elements, gaps, and the lists of free space, which nobody needs."""
    with h5py.File(path, "w", libver=FORMAT) as file:
        for number in range(count):
            file.create_dataset(f"array.{number}", data=np.full(8, 0x5A5A5A5A, "<u4"))
    raw = path.read_bytes()
    free = {
        place
        for signature, size in ((b"FSHD", 82), (b"FSSE", 52))
        for begin in [raw.find(signature)]
        for place in range(begin, begin + size if begin >= 0 else begin)
    }
    noticed = 0
    for place in range(0, len(raw), 1 if count == 1 else 7):
        path.write_bytes(raw[:place] + bytes([raw[place] ^ 4]) + raw[place + 1 :])
        try:
            with Hdf5File(path) as ours:
                found = [ours.find(name, np.dtype("<u4"), (8,)) for name in ours.names()]
            assert len(found) == count
            assert raw[place] in (0, 0x5A) or place in free, place
        except Damaged as error:
            assert str(error).isprintable()
            noticed += 1
    assert noticed > 400  # zeros within blocks are summed too


def test_user_defined_links(path: Path) -> None:
    """h5py makes none: the type of a link is changed, and the header's checksum put right."""
    with h5py.File(path, "w", libver=FORMAT) as file:
        file["old"] = h5py.SoftLink("/somewhere")
    raw = bytearray(path.read_bytes())
    name = raw.index(b"old")
    assert raw[name - 2 : name] == b"\x01\x03"  # a soft link, three characters
    raw[name - 2] = 65
    end = next(
        end
        for end in range(name, len(raw) - 3)
        if metadata.lookup3(bytes(path.read_bytes()[48:end]))
        == struct.unpack_from("<I", raw, end)[0]
    )
    struct.pack_into("<I", raw, end, metadata.lookup3(bytes(raw[48:end])))
    path.write_bytes(raw)
    with Hdf5File(path) as file, pytest.raises(Damaged, match="'old' is a link to another place"):
        file.find("old")


def test_what_is_asked_for_is_compared(path: Path) -> None:
    with h5py.File(path, "w", libver=FORMAT) as file:
        file["a/x"] = np.zeros((2, 3), "<f4")
    with Hdf5File(path) as ours:
        for arguments, message in {
            ("a/x", np.dtype("<f8")): "dataset 'a/x': it has elements of type float32, expected f",
            ("a/x", None, (3, 2)): r"it has shape \(2, 3\), expected \(3, 2\)",
            ("a/y",): "there is no 'y'",
            ("a/x/y",): "'x' is not a group",
            ("a",): "it is not a dataset",
            ("",): "it is not a dataset",
        }.items():
            with pytest.raises(Damaged, match=message):
                ours.find(*arguments)  # type: ignore[arg-type]
        found = ours.find("a/x")
        for low, high in ((0, 7), (-1, 2), (3, 2)):
            with pytest.raises(ValueError, match="does not lie in the 6"):
                found.read(low, high)
        with pytest.raises(ValueError, match="do not lie in the 2"):
            found.rows(1, 3)


def test_a_file_cut_short_while_it_is_open(path: Path) -> None:
    with h5py.File(path, "w", libver=FORMAT) as file:
        file["x"] = np.arange(10_000)
    with Hdf5File(path) as ours:
        found = ours.find("x")
        os.truncate(path, 4096)
        with pytest.raises(Damaged, match="'x': it was cut short to 4096 bytes while it was read"):
            found.read()


def test_reads_of_many_gigabytes_are_cut(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("mpillm.storage.source._LONGEST_READ", 7)
    path = tmp_path / "x"
    path.write_bytes(bytes(range(100)))
    with path.open("rb") as file:
        stored = StoredArray("x", Source(file.fileno()), 2, (24,), np.dtype("<u4"))
        assert stored.read(1, 24).tobytes() == bytes(range(6, 98))


def test_the_sample_of_format_version_1(tmp_path: Path) -> None:
    """A checkpoint that an earlier mpillm, with another libhdf5 behind it, has written."""
    samples = Path(__file__).parent / "samples" / "run-v1" / "checkpoints" / "step-00000003"
    for path in samples.glob("*.h5"):
        names: list[str] = []
        with h5py.File(path, "r") as file, Hdf5File(path) as ours:
            file.visit(names.append)
            arrays = {
                name: file[name][()] for name in names if isinstance(file[name], h5py.Dataset)
            }
            assert arrays
            for name, array in arrays.items():
                assert np.array_equal(ours.find(name, array.dtype, array.shape).rows(), array)


def test_lookup3() -> None:
    """The test vectors that Bob Jenkins gives with his hash."""
    assert metadata.lookup3(b"Four score and seven years ago") == 0x17770551
    assert metadata.lookup3(b"") == 0xDEADBEEF
