"""Token files: what is written comes back, what was tampered with is refused."""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest

from mpillm.data.corpus import read_text
from mpillm.data.prepare import prepare
from mpillm.data.settings import DataSettings
from mpillm.data.tokenizer import CharacterTokenizer, load_tokenizer
from mpillm.data.tokens import TokenFile, write_tokens
from mpillm.errors import UserError
from mpillm.storage.hdf5 import FORMAT

TRAIN = np.random.default_rng(0).integers(0, 60, 200_000)
VALIDATION = np.arange(60)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    """A good token file."""
    path = tmp_path / "tokens.h5"
    write_tokens(path, {"train": TRAIN, "validation": VALIDATION}, 60, {"source": "caf\u00e9"})
    return path


def test_what_is_written_comes_back(path: Path) -> None:
    tokens = TokenFile(path)
    tokens.verify()
    assert tokens.vocabulary_size == 60
    assert tokens.attributes["source"] == "caf\u00e9"
    assert tokens.length("train") == 200_000 and tokens.length("validation") == 60
    assert tokens.read("train").dtype == np.uint16
    assert np.array_equal(tokens.read("train"), TRAIN)
    assert np.array_equal(tokens.read("train", 65_530, 65_550), TRAIN[65_530:65_550])
    assert tokens.read("validation", 60).size == 0
    with pytest.raises(ValueError, match="read-only"):
        tokens.read("train")[0] = 1
    assert [entry.name for entry in path.parent.iterdir()] == ["tokens.h5"]


def test_large_vocabularies_and_empty_splits(tmp_path: Path) -> None:
    path = tmp_path / "tokens.h5"
    splits = {"train": np.array([70_000, 0]), "validation": np.array([], dtype=np.int64)}
    write_tokens(path, splits, 70_001, {})
    tokens = TokenFile(path)
    tokens.verify()
    assert tokens.read("train").dtype == np.uint32 and tokens.read("train").tolist() == [70_000, 0]
    assert tokens.length("validation") == 0


def test_the_same_tokens_give_the_same_bytes(path: Path, tmp_path: Path) -> None:
    again = tmp_path / "again.h5"
    write_tokens(again, {"train": TRAIN, "validation": VALIDATION}, 60, {"source": "caf\u00e9"})
    assert again.read_bytes() == path.read_bytes()


def test_a_failed_write_leaves_the_old_file(path: Path) -> None:
    before = path.read_bytes()
    with pytest.raises(TypeError):
        write_tokens(path, {"train": TRAIN}, 60, {"source": object()})  # type: ignore[dict-item]
    assert path.read_bytes() == before
    assert [entry.name for entry in path.parent.iterdir()] == ["tokens.h5"]


def test_defects_of_the_caller_are_value_errors(path: Path) -> None:
    for ids in (np.array([60]), np.array([-1]), np.zeros((2, 2), dtype=np.int64)):
        with pytest.raises(ValueError, match="range"):
            write_tokens(path, {"train": ids}, 60, {})
    with pytest.raises(ValueError, match="reserved"):
        write_tokens(path, {}, 60, {"version": 2})
    with pytest.raises(ValueError, match="does not lie"):
        TokenFile(path).read("train", 0, 200_001)


def test_an_unknown_split_names_the_nearest(path: Path) -> None:
    with pytest.raises(UserError, match=r"no split 'trian'; did you mean 'train'\?"):
        TokenFile(path).length("trian")


def replace(file: h5py.File, **options: object) -> None:
    """Put another dataset in the place of `train`."""
    del file["train"]
    file.create_dataset("train", **options)


def external_storage(file: h5py.File) -> None:
    other = Path(file.filename).with_name("raw")
    other.write_bytes(bytes(20))
    replace(file, shape=(10,), dtype="<u2", external=[(str(other), 0, 20)])


def virtual(file: h5py.File) -> None:
    layout = h5py.VirtualLayout(shape=(10,), dtype="<u2")
    layout[:] = h5py.VirtualSource("other.h5", "train", shape=(10,))
    del file["train"]
    file.create_virtual_dataset("train", layout)


@pytest.mark.parametrize(
    ("tamper", "message"),
    [
        (lambda f: f.attrs.update(format=np.bytes_("x")), "is not a token file"),
        (lambda f: f.attrs.pop("format"), "is not a token file"),
        (lambda f: f.attrs.update(version=3), "has version 3; this mpillm reads 2"),
        (lambda f: f.attrs.update(version=[1, 1]), "attribute 'version' is no number"),
        (lambda f: f.attrs.update(source="variable length"), "attribute 'source' is no number"),
        (lambda f: f.attrs.update(vocabulary_size=0), "'vocabulary_size' is missing"),
        (lambda f: f.attrs.update(vocabulary_size=59), "id 59, but its vocabulary has 59"),
        (lambda f: f.update(x=h5py.SoftLink("/train")), "'x' is a link"),
        (lambda f: f.update({"x\ny": 1}), r"the name 'x\\ny' is not printable"),
        (lambda f: f.update(x=h5py.ExternalLink("other.h5", "/train")), "'x' is a link"),
        (lambda f: f.create_group("x"), "'x': it is not a dataset"),
        (virtual, "'train': it is a virtual dataset"),
        (external_storage, "'train': it keeps its elements in another file"),
        (lambda f: replace(f, data=np.zeros(3, dtype="<i2")), "has type int16"),
        (lambda f: replace(f, data=np.zeros(3, dtype=">u2")), "has type >u2"),
        (lambda f: replace(f, data=np.zeros((3, 3), dtype="<u2")), r"shape \(3, 3\)"),
        (
            lambda f: replace(f, data=np.zeros(9, dtype="<u2"), compression=1),
            "'train': it is chunked, compact or filtered",
        ),
        (
            lambda f: replace(f, shape=(1 << 45,), dtype="<u2"),
            "'train': it holds 0 bytes, expected 70368744177664",
        ),
    ],
)
def test_a_tampered_file_is_refused(
    tamper: Callable[[h5py.File], None], message: str, path: Path
) -> None:
    with h5py.File(path, "r+", libver=FORMAT) as file:
        tamper(file)
    with pytest.raises(UserError, match=message) as caught:
        TokenFile(path)
    assert "\n" not in str(caught.value) and str(path) in str(caught.value)


def test_changed_tokens_do_not_verify(path: Path) -> None:
    with h5py.File(path, "r+") as file:
        file["train"][100_000] = (TRAIN[100_000] + 1) % 60
    tokens = TokenFile(path)
    with pytest.raises(UserError, match="split 'train' does not match its sha256"):
        tokens.verify()


def test_damage_is_told_in_one_line_or_did_no_harm(path: Path) -> None:
    whole, rng, told = path.read_bytes(), random.Random(0), 0
    for case in range(150):
        data = bytearray(whole)
        if case % 3 == 0:
            del data[rng.randrange(len(data)) :]
        else:  # HDF5's own structures lie at the two ends
            for _ in range(8):
                data[rng.randrange(4096) * rng.choice([1, -1])] = rng.randrange(256)
        path.write_bytes(data)
        try:
            tokens = TokenFile(path)
            tokens.verify()
        except UserError as error:
            assert "\n" not in str(error)
            told += 1
        else:
            assert np.array_equal(tokens.read("train"), TRAIN)
    assert told > 50


def test_files_that_are_not_there_or_not_hdf5(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no file"):
        TokenFile(tmp_path / "tokens.h5")
    (tmp_path / "tokens.h5").write_text("plain text")
    with pytest.raises(UserError, match="is not readable HDF5"):
        TokenFile(tmp_path / "tokens.h5")


@pytest.fixture
def settings(tmp_path: Path) -> DataSettings:
    """Settings for a text of 1,000 characters."""
    (tmp_path / "input.txt").write_text("to be, or not to be\n" * 50)
    return DataSettings(text=(str(tmp_path / "input.txt"),))


def test_prepare_splits_the_text(settings: DataSettings, tmp_path: Path) -> None:
    prepared = prepare(settings, tmp_path, write=True)
    tokens, tokenizer = TokenFile(prepared.tokens), load_tokenizer(prepared.tokenizer)
    text = read_text(settings.text).text
    assert tokens.vocabulary_size == tokenizer.vocabulary_size == len(set(text))
    assert tokenizer.decode(tokens.read("train")) == text[:900]
    assert tokenizer.decode(tokens.read("validation")) == text[900:]


def test_prepare_keeps_good_files_and_replaces_others(
    settings: DataSettings, tmp_path: Path
) -> None:
    prepared = prepare(settings, tmp_path, write=True)

    def states() -> list[tuple[int, bytes]]:
        both = (prepared.tokenizer, prepared.tokens)
        return [(path.stat().st_ino, path.read_bytes()) for path in both]

    first = states()
    assert prepare(settings, tmp_path, write=True) == prepared
    assert states() == first

    CharacterTokenizer("abc").save(prepared.tokenizer)
    prepare(settings, tmp_path, write=True)
    assert [content for _, content in states()] == [content for _, content in first]

    prepared.tokens.write_bytes(prepared.tokens.read_bytes()[:-1000])
    prepare(settings, tmp_path, write=True)
    assert [content for _, content in states()] == [content for _, content in first]

    prepare(DataSettings(text=settings.text, validation=0.5), tmp_path, write=True)
    assert TokenFile(prepared.tokens).length("validation") == 500
    (tmp_path / "input.txt").write_text("other")
    prepare(settings, tmp_path, write=True)
    assert load_tokenizer(prepared.tokenizer).vocabulary_size == len(set("other"))


def test_version_1_is_made_anew(tmp_path: Path) -> None:
    """Also under a run that has learned from it, if the text and the settings are the same."""
    sample = Path(__file__).parent / "samples" / "run-v1"
    for name in ("text.txt", "tokens.h5", "tokenizer.json"):
        shutil.copy(sample / name, tmp_path)
    path = tmp_path / "tokens.h5"
    with pytest.raises(UserError, match="has version 1; this mpillm reads 2, and makes it anew"):
        TokenFile(path)
    with h5py.File(path) as file:
        fingerprint = file.attrs["fingerprint"].decode()
        expected = {name: file[name][()] for name in file}
    text = (str(tmp_path / "text.txt"),)
    settings = DataSettings(text=text, validation=0.1)
    with pytest.raises(UserError, match="has version 1; .*; it no longer says what it was made fr"):
        prepare(DataSettings(text=text, validation=0.3), tmp_path, write=True, replace=False)
    prepare(settings, tmp_path, write=True, replace=False)
    tokens = TokenFile(path)
    assert tokens.attributes["fingerprint"] == fingerprint
    for name, ids in expected.items():
        assert np.array_equal(tokens.read(name), ids)
    assert (tmp_path / "tokenizer.json").read_bytes() == (sample / "tokenizer.json").read_bytes()


def test_what_a_run_has_learned_from_is_made_anew_only_from_the_same(
    settings: DataSettings, tmp_path: Path
) -> None:
    path = prepare(settings, tmp_path, write=True).tokens
    good = path.read_bytes()

    def again(settings: DataSettings = settings) -> None:
        prepare(settings, tmp_path, write=True, replace=False)

    with pytest.raises(UserError, match="not the text or the settings that .*tokens.h5 was made"):
        again(DataSettings(text=settings.text, validation=0.5))
    assert path.read_bytes() == good
    path.write_bytes(good[:-1000])  # the fingerprint is still there
    again()
    assert path.read_bytes() == good
    for damaged in (
        b"",
        good.replace(TokenFile(path).attributes["fingerprint"].encode(), b"0" * 64),
    ):  # type: ignore[union-attr]
        path.write_bytes(damaged)
        with pytest.raises(UserError, match="tokens.h5.*move it away, and it is made anew"):
            again()
        assert path.read_bytes() == damaged
        path.unlink()
        again()
        assert path.read_bytes() == good
    path.unlink()
    path.symlink_to("tokenizer.json")
    with pytest.raises(UserError, match="tokens.h5 is not a regular file"):
        again()


def test_ranks_that_do_not_write_touch_nothing(tmp_path: Path) -> None:
    prepared = prepare(DataSettings(text=("missing",)), tmp_path, write=False)
    assert prepared.tokens == tmp_path / "tokens.h5" and not list(tmp_path.iterdir())


def test_exactly_one_source_is_asked_for(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="both corpus and text are set"):
        prepare(DataSettings(corpus="kjv", text=("a.txt",)), tmp_path, write=True)
    with pytest.raises(UserError, match=r"neither corpus nor text is set; .*valid: kjv"):
        prepare(DataSettings(), tmp_path, write=True)


def test_nanogpts_split_of_tiny_shakespeare(tmp_path: Path) -> None:
    source = Path(__file__).parents[1] / "../shared/data/tinyshakespeare/input.txt"
    if not source.is_file():
        pytest.skip("no tiny Shakespeare")
    prepared = prepare(DataSettings(text=(str(source),)), tmp_path, write=True)
    tokens = TokenFile(prepared.tokens)
    assert tokens.vocabulary_size == 65
    assert (tokens.length("train"), tokens.length("validation")) == (1_003_854, 111_540)
