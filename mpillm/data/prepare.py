"""From the settings to the files that a run reads: `tokenizer.json` and `tokens.h5`."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass
from pathlib import Path

import msgspec

from mpillm.data.corpus import Corpus, corpora, read_corpus, read_text
from mpillm.data.settings import DataSettings
from mpillm.data.tokenizer import CharacterTokenizer, load_tokenizer
from mpillm.data.tokens import TokenFile, write_tokens
from mpillm.errors import UserError

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
    if not replace and prepared.tokens.exists():
        raise UserError(
            f"data: not the text or the settings that {prepared.tokens} was made from and the run"
            " has learned from; set them back, or start anew with --fresh or another run.dir"
        )
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
            "tokenizer_sha256": _file_sha256(prepared.tokenizer),
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
    ) == _file_sha256(prepared.tokenizer)


def _file_sha256(path: Path) -> str:
    return hashlib.sha256(path.read_bytes()).hexdigest()
