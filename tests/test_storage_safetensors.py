"""Safetensors: what the library writes is read, what is written here the library reads."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from mpillm.errors import UserError
from mpillm.storage.disk import Damaged
from mpillm.storage.safetensors import SafetensorsFile, encode_header

KINDS = ("f2", "f4", "f8", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "?")


def arrays() -> dict[str, np.ndarray]:
    """One of every type, of several shapes."""
    rng = np.random.default_rng(0)
    shapes = [(3, 4), (), (0, 7), (2, 1, 5)]
    return {
        f"a.{kind}": rng.integers(0, 2, shapes[i % 4]).astype(kind) for i, kind in enumerate(KINDS)
    }


def write(path: Path, header: Any, data: bytes = b"", length: int | None = None) -> Path:
    """A file of any header."""
    raw = header if isinstance(header, bytes) else json.dumps(header).encode()
    path.write_bytes((len(raw) if length is None else length).to_bytes(8, "little") + raw + data)
    return path


def save(path: Path, values: dict[str, np.ndarray], metadata: dict[str, str] | None = None) -> None:
    """A file of arrays, by `encode_header`."""
    head, starts = encode_header({n: (a.dtype, a.shape) for n, a in values.items()}, metadata)
    assert len(head) % 8 == 0
    with path.open("wb") as file:
        file.write(head)
        for name, array in values.items():
            assert file.tell() == starts[name]
            file.write(array.tobytes())


def test_what_is_written_comes_back(tmp_path: Path) -> None:
    path, values = tmp_path / "x.safetensors", arrays()
    save(path, values, {"step": "3", "caf\u00e9": "\u4e00"})
    with SafetensorsFile(path) as file:
        assert file.metadata == {"step": "3", "caf\u00e9": "\u4e00"}
        assert sorted(file.names()) == sorted(values)
        for name, array in values.items():
            found = file.find(name)
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert found.read().tobytes() == array.tobytes()
        assert np.array_equal(file.find("a.f2").rows(1, 3), values["a.f2"][1:3])
        with pytest.raises(UserError, match=r"holds no 'b\.\?'; did you mean 'a\.\?'"):
            file.find("b.?")


def test_against_the_library(tmp_path: Path) -> None:
    library = pytest.importorskip("safetensors.numpy")
    path, values = tmp_path / "x.safetensors", arrays()
    save(path, values, {"a": "b"})
    theirs = library.load_file(path)
    assert theirs.keys() == values.keys()
    for name, array in values.items():
        assert theirs[name].dtype == array.dtype and np.array_equal(theirs[name], array)
    library.save_file(values, path, {"c": "d"})
    with SafetensorsFile(path) as file:
        assert file.metadata == {"c": "d"}
        for name, array in values.items():
            found = file.find(name)
            assert (found.dtype, found.shape) == (array.dtype, array.shape)
            assert found.read().tobytes() == array.tobytes()


@pytest.mark.parametrize(("code", "name"), [("BF16", "bfloat16"), ("F8_E5M2", "float8_e5m2")])
def test_types_of_ml_dtypes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, code: str, name: str
) -> None:
    size = 2 if code == "BF16" else 1
    entry = {"dtype": code, "shape": [3], "data_offsets": [0, 3 * size]}
    path = write(tmp_path / "x", {"w": entry}, b"\x40" * 3 * size)
    with SafetensorsFile(path) as file:
        with monkeypatch.context() as patch:
            patch.setitem(__import__("sys").modules, "ml_dtypes", None)
            assert file.names() == ["w"]
            with pytest.raises(UserError, match=f"'w' has type {code}, which needs: pip install"):
                file.find("w")
        pytest.importorskip("ml_dtypes")
        found = file.find("w")
        assert found.dtype.name == name
        assert len(set(found.read().astype(float))) == 1


def test_values_that_cannot_be_stored() -> None:
    for name, dtype in {"__metadata__": "f4", "x": "c8", "y": "S3"}.items():
        with pytest.raises(ValueError, match="cannot be stored"):
            encode_header({name: (np.dtype(dtype), (1,))})


def entry(**changes: Any) -> dict[str, Any]:
    """The header's entry of two numbers."""
    return {"dtype": "F32", "shape": [2], "data_offsets": [0, 8], **changes}


TWO = {"a": entry(), "b": entry(data_offsets=[8, 16])}


@pytest.mark.parametrize(
    ("header", "data", "message"),
    [
        (b"", b"", "not JSON"),
        (b"[]", b"", "its header is not an object"),
        (b"{" * 70_000, b"", "not JSON"),
        (b'{"a":1,"a":1}', b"", "key 'a' stands twice"),
        ({"a": 1}, b"", "'a' has not exactly dtype, shape and data_offsets"),
        ({"a": {**entry(), "more": 1}}, bytes(8), "'a' has not exactly"),
        ({"a": entry(dtype="X32")}, bytes(8), "'a' has dtype 'X32'; valid: BF16, BOOL"),
        ({"a": entry(dtype=7)}, bytes(8), "'a' has dtype '7'"),
        ({"a": entry(shape=[-1])}, bytes(8), "'a' has no shape"),
        ({"a": entry(shape=[2.0])}, bytes(8), "'a' has no shape"),
        ({"a": entry(shape=[True, 2])}, bytes(8), "'a' has no shape"),
        ({"a": entry(shape=[1] * 33)}, bytes(8), "'a' has no shape"),
        ({"a": entry(shape="2")}, bytes(8), "'a' has no shape"),
        ({"a": entry(shape=[2**62, 2**62])}, bytes(8), "is larger than any"),
        ({"a": entry(shape=[0, 2**62], data_offsets=[0, 0])}, b"", "is larger than any"),
        ({"a": entry(shape=[3])}, bytes(8), r"'a' of shape \[3\] has 8 bytes, expected 12"),
        ({"a": entry(data_offsets=[8, 0])}, bytes(8), "'a' has no data_offsets"),
        ({"a": entry(data_offsets=[0, 8, 8])}, bytes(8), "'a' has no data_offsets"),
        ({"a": entry(data_offsets=[0, 2**63])}, bytes(8), "'a' has no data_offsets"),
        ({"a": entry(), "b": entry()}, bytes(8), "'b' overlaps the array before it"),
        ({**TWO, "b": entry(data_offsets=[12, 20])}, bytes(20), "'b' does not follow it at once"),
        ({"a": entry(data_offsets=[4, 12])}, bytes(12), "'a' does not follow"),
        (TWO, bytes(15), "its arrays have 16 bytes, and 15 follow"),
        (TWO, bytes(17), "its arrays have 16 bytes, and 17 follow"),
        ({"__metadata__": {"a": 1}}, b"", "its __metadata__ is not an object of strings"),
        ({"__metadata__": []}, b"", "its __metadata__ is not an object of strings"),
    ],
)
def test_hostile_headers(tmp_path: Path, header: Any, data: bytes, message: str) -> None:
    path = write(tmp_path / "x.safetensors", header, data)
    with pytest.raises(Damaged, match=message) as caught:
        SafetensorsFile(path)
    assert str(path) in str(caught.value) and str(caught.value).isprintable()


@pytest.mark.parametrize("length", [3, 2**40, 2**64 - 1, 100_000_001])
def test_lengths_of_headers(tmp_path: Path, length: int) -> None:
    path = write(tmp_path / "x.safetensors", b"{}", length=length)
    with pytest.raises(Damaged, match=f"is not safetensors: a header of {length} bytes"):
        SafetensorsFile(path)


@pytest.mark.parametrize("raw", [b"", b"\2\0\0"])
def test_files_without_a_header(tmp_path: Path, raw: bytes) -> None:
    path = tmp_path / "x.safetensors"
    path.write_bytes(raw)
    with pytest.raises(Damaged, match="is not safetensors: 8 bytes at 0 do not lie in"):
        SafetensorsFile(path)


def test_an_empty_file_of_arrays(tmp_path: Path) -> None:
    path = tmp_path / "x.safetensors"
    save(path, {})
    with SafetensorsFile(path) as file:
        assert file.names() == [] and file.metadata == {}
