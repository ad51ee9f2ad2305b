"""Files are written whole or not at all, and read within bounds; nothing in them runs."""

from __future__ import annotations

import ast
import hashlib
import json
import math
import os
from collections.abc import Callable
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

import mpillm
from mpillm.errors import UserError
from mpillm.storage.disk import (
    Damaged,
    file_size,
    hash_file,
    open_file,
    read_file,
    write_atomically,
    write_file,
)
from mpillm.storage.strict_json import parse_json, read_json

# Files


def test_sizes_hashes_and_bytes(tmp_path: Path) -> None:
    path, content = tmp_path / "x", os.urandom(3 * 2**20 + 7)
    write_file(path, content)
    assert file_size(path) == len(content)
    assert hash_file(path) == hashlib.sha256(content).hexdigest()
    assert read_file(path, len(content)) == content
    with pytest.raises(Damaged, match=rf"x has {len(content)} bytes; at most 10 are read"):
        read_file(path, 10)
    with pytest.raises(FileExistsError):
        write_file(path, b"")
    assert path.stat().st_size == len(content)


def link(path: Path) -> None:
    path.with_name("other").write_bytes(b"x")
    path.symlink_to("other")


@pytest.mark.parametrize("make", [link, Path.mkdir, os.mkfifo])
def test_only_regular_files_are_read(tmp_path: Path, make: Callable[[Path], object]) -> None:
    make(tmp_path / "x")
    for read in (file_size, open_file, lambda path: read_file(path, 10)):
        with pytest.raises(Damaged, match="x is not a regular file"):
            read(tmp_path / "x")


def test_files_that_are_missing_or_out_of_reach(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(b"")
    for read in (file_size, open_file, lambda path: read_file(path, 10)):
        with pytest.raises(Damaged, match="y is missing"):
            read(tmp_path / "y")
        with pytest.raises(UserError, match=r"y cannot be read: Not a directory"):
            read(tmp_path / "file" / "y")


def test_a_file_that_is_replaced_while_it_is_opened(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between the look at it and its opening."""
    path = tmp_path / "x"

    def looked_at(path: Path) -> int:
        return 1

    monkeypatch.setattr("mpillm.storage.disk.file_size", looked_at)
    os.mkfifo(path)  # opening one for reading waits for a writer, but not here
    with pytest.raises(Damaged, match="x was replaced while it was opened"):
        open_file(path)
    path.unlink()
    link(path)
    with pytest.raises(UserError, match="x cannot be read"):
        open_file(path)


def test_a_write_that_fails_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "x"
    path.write_text("old")

    def write(temporary: Path) -> None:
        temporary.write_text("half")
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        write_atomically(path, write)
    assert path.read_text() == "old" and list(tmp_path.iterdir()) == [path]
    write_atomically(path, lambda temporary: temporary.write_text("new"))
    assert path.read_text() == "new" and list(tmp_path.iterdir()) == [path]


# JSON

VALUES = st.recursive(
    st.none()
    | st.booleans()
    | st.integers(-(10**19), 10**19)
    | st.floats(allow_nan=False, allow_infinity=False)
    | st.text(st.characters(exclude_categories=["Cs"])),
    lambda inner: (
        st.lists(inner) | st.dictionaries(st.text(st.characters(categories=["L", "N", "P"])), inner)
    ),
)


@settings(max_examples=50)
@given(VALUES, st.booleans())
def test_what_json_writes_comes_back(value: object, ascii: bool) -> None:
    assert parse_json(json.dumps(value, ensure_ascii=ascii).encode(), "x") == value


@pytest.mark.parametrize(
    ("raw", "message"),
    [
        (b"", "Expecting value: line 1 column 1"),
        (b"{} {}", "Extra data"),
        (b"{'a': 1}", "Expecting property name"),
        (b"\xff", "not UTF-8 at byte 0"),
        ('"x"'.encode("utf-16"), "not UTF-8 at byte 0"),
        (b"\xef\xbb\xbf1", "BOM"),
        (b'{"a": 1, "b": 2, "a": 1}', "key 'a' stands twice"),
        (b'[{"x": {"\\n": 1}}]', r"key '\\n' is too long or not printable"),
        (b'{"' + b"x" * 1001 + b'": 1}', "is too long or not printable"),
        (b"[NaN]", "NaN is not a JSON number"),
        (b"-Infinity", "-Infinity is not a JSON number"),
        (b"1e999", "the number 1e999 is too large or too long"),
        (b"1." + b"0" * 100, "too large or too long"),
        (b"9" * 21, "an integer of 21 digits"),
        (b"-" + b"9" * 1_000_000, "an integer of 1000001 digits"),
        (b'["\\ud800"]', "half of a surrogate pair"),
        (b'{"\\udc00": 1}', "is too long or not printable"),
        (b"[" * 65 + b"]" * 65, "nested too deeply"),
        (b"[" * 100_000, "nested too deeply"),
        (b'{"a":' * 100_000, "nested too deeply"),
    ],
)
def test_what_is_not_strict_json_is_refused_in_one_line(raw: bytes, message: str) -> None:
    with pytest.raises(Damaged, match=message) as caught:
        parse_json(raw, "x.json")
    assert str(caught.value).startswith("x.json is damaged: not JSON (")
    assert str(caught.value).isprintable() and len(str(caught.value)) < 200


def test_the_limits_of_json_are_as_told() -> None:
    assert parse_json(b"[" * 64 + b"]" * 64, "x")
    assert parse_json(b"-" + b"9" * 20, "x") == -(10**20 - 1)
    assert parse_json(b'"\\ud83d\\ude00"', "x") == "\U0001f600"
    assert parse_json(b"1e-999", "x") == 0 and math.isfinite(parse_json(b"1.7e308", "x"))


def test_json_files(tmp_path: Path) -> None:
    path = tmp_path / "x.json"
    path.write_text('{"a": [1, 2]}')
    assert read_json(path, 13) == {"a": [1, 2]}
    with pytest.raises(Damaged, match=r"x\.json has 13 bytes; at most 12 are read"):
        read_json(path, 12)


# What runs code

DANGEROUS_MODULES = {"pickle", "marshal", "shelve", "dill", "cloudpickle", "joblib", "yaml", "code"}
DANGEROUS_CALLS = {"eval", "exec", "compile", "__import__"}


def dangers(tree: ast.AST) -> list[str]:
    """What in a module could run what stands in a file."""
    found = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            found += [a.name for a in node.names if a.name.split(".")[0] in DANGEROUS_MODULES]
        elif isinstance(node, ast.ImportFrom):
            found += [node.module] if (node.module or "").split(".")[0] in DANGEROUS_MODULES else []
        elif isinstance(node, ast.Call):
            name = ast.unparse(node.func)
            loads = name in ("np.load", "numpy.load", "np.fromfile", "torch.load")
            pickles = any(word.arg == "allow_pickle" for word in node.keywords)
            if name in DANGEROUS_CALLS or loads or pickles:
                found.append(name)
    return found


def test_nothing_read_from_a_file_is_run() -> None:
    """Objects that ranks of one job send each other are pickled by mpi4py; they are no files."""
    modules = list(Path(mpillm.__file__).parent.rglob("*.py"))
    assert len(modules) > 50
    assert {
        str(path): found for path in modules if (found := dangers(ast.parse(path.read_text())))
    } == {}


@pytest.mark.parametrize(
    "line",
    [
        "import pickle",
        "import os, marshal",
        "from shelve import open",
        "import yaml.loader",
        "np.load(path)",
        "x.load(path, allow_pickle=True)",
        "torch.load(path)",
        "eval(text)",
        "exec(text)",
        "__import__(name)",
    ],
)
def test_the_search_for_dangers_finds_them(line: str) -> None:
    assert dangers(ast.parse(f"def f():\n    {line}"))
