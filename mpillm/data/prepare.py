"""From the settings to the files that a run reads: `tokenizer.json` and `tokens.h5`."""

from __future__ import annotations

import hashlib
import mmap
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mpillm.data.corpus import Corpus, corpora, read_corpus, read_text
from mpillm.data.settings import DataSettings
from mpillm.data.tokenizer import CharacterTokenizer, load_tokenizer
from mpillm.data.tokens import TokenFile, write_tokens
from mpillm.errors import UserError
from mpillm.storage.disk import file_size, hash_file

__all__ = ["PreparedData", "prepare"]


@dataclass(frozen=True)
class PreparedData:
    """Where the prepared files of a run lie."""

    tokenizer: Path
    tokens: Path


def prepare(
    settings: DataSettings, folder: Path, write: bool, replace: bool = True
) -> PreparedData:
    """Tokenize the text of `settings` into `folder`, which exists.

    The tokenizer is trained on the whole text; the splits are `train`, the first
    int(n * (1 - validation)) of the n characters, and `validation`, the rest. Files that are there
    and whole, and were made from the same text and settings, are kept; the attribute `fingerprint`
    of the token file tells. The same input gives the same bytes.

    write: one rank of a job writes; the others pass False, which touches nothing and tells where
    the files will be. replace: whether files made from another text or other settings may be
    overwritten; a run that has learned from them must not lose them. Raises UserError for settings
    without a readable text, and for such files when `replace` is False.
    """
    prepared = PreparedData(folder / "tokenizer.json", folder / "tokens.h5")
    if not write:
        return prepared
    corpus = _read(settings)
    fingerprint = _fingerprint(settings, corpus.text)
    if _is_current(prepared, fingerprint):
        return prepared
    if not replace and prepared.tokens.exists() and not _holds(prepared.tokens, fingerprint):
        raise UserError(_why_not(prepared.tokens))
    tokenizer = CharacterTokenizer.train(corpus.text)
    ids = tokenizer.encode(corpus.text)
    cut = int(len(ids) * (1 - settings.validation))
    # Before the tokens, whose fingerprint vouches for both files.
    tokenizer.save(prepared.tokenizer)
    write_tokens(
        prepared.tokens,
        {"train": ids[:cut], "validation": ids[cut:]},
        tokenizer.vocabulary_size,
        {
            "source": corpus.name,
            "fingerprint": fingerprint,
            "tokenizer_sha256": hash_file(prepared.tokenizer),
        },
    )
    return prepared


def _read(settings: DataSettings) -> Corpus:
    """The text that the settings name."""
    if settings.corpus and settings.text:
        raise UserError("data: both corpus and text are set; expected exactly one of them")
    if settings.corpus:
        return read_corpus(settings.corpus)
    if settings.text:
        return read_text(settings.text)
    raise UserError(
        "data: neither corpus nor text is set; expected data.corpus (valid:"
        f" {', '.join(corpora())}) or data.text (files of UTF-8 text)"
    )


def _fingerprint(settings: DataSettings, text: str) -> str:
    """Hash of the text and of the settings that shape its tokens; not of where the text lay."""
    shape = msgspec.json.encode([settings.tokenizer, settings.validation])
    return hashlib.sha256(shape + b"\n" + text.encode("utf-8")).hexdigest()


def _is_current(prepared: PreparedData, fingerprint: str) -> bool:
    """Whether both files are there, whole, and made from what the fingerprint stands for."""
    if not (prepared.tokenizer.is_file() and prepared.tokens.is_file()):
        return False
    try:
        load_tokenizer(prepared.tokenizer)
        tokens = TokenFile(prepared.tokens)
        tokens.verify()
    except UserError:  # damaged or older: made anew
        return False
    return tokens.attributes.get("fingerprint") == fingerprint and tokens.attributes.get(
        "tokenizer_sha256"
    ) == hash_file(prepared.tokenizer)


def _holds(path: Path, fingerprint: str) -> bool:
    """Whether a file that cannot be read, or no longer, was made from what the fingerprint says.

    It stands in every token file as it is, also in those of format version 1.
    """
    if not file_size(path):
        return False
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as content:
        return content.find(fingerprint.encode()) >= 0


def _why_not(path: Path) -> str:
    """Why a token file that a run has learned from is not made anew."""
    try:
        TokenFile(path).verify()
    except UserError as error:
        return (
            f"{error}; it no longer says what it was made from; if the text and the settings are"
            " still the same, move it away, and it is made anew"
        )
    return (
        f"data: not the text or the settings that {path} was made from and the run has learned"
        " from; set them back, or start anew with --fresh or another run.dir"
    )
