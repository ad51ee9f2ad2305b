"""Tokenizers: text to token ids and back.

A tokenizer is saved with the run as `tokenizer.json`, an object with `format`, `version`, `kind`
and what the kind needs; `load_tokenizer` makes the right one. A new kind is a class here or beside,
and an entry in `_KINDS`.
"""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, Protocol

import numpy as np
from numpy.typing import ArrayLike, NDArray

from mpillm.data.files import missing_file
from mpillm.errors import UserError, did_you_mean
from mpillm.storage.disk import write_atomically
from mpillm.storage.strict_json import read_json

__all__ = ["CharacterTokenizer", "Tokenizer", "load_tokenizer", "token_dtype"]

_FORMAT = "mpillm-tokenizer"
_VERSION = 1
_MAX_BYTES = 64 << 20  # a tokenizer file is never larger; a larger one is something else

Tokens = NDArray[np.unsignedinteger[Any]]


def token_dtype(vocabulary_size: int) -> np.dtype[np.unsignedinteger[Any]]:
    """The type that token ids are kept in: uint16 where it holds them all, else uint32."""
    return np.dtype("<u2") if vocabulary_size <= 1 << 16 else np.dtype("<u4")


class Tokenizer(Protocol):
    """What every tokenizer can do."""

    @property
    def vocabulary_size(self) -> int:
        """Number of token types; ids lie in range(vocabulary_size)."""

    def encode(self, text: str) -> Tokens:
        """Token ids of `text`, (n,)."""

    def decode(self, ids: ArrayLike) -> str:
        """The text of token ids, (n,)."""

    def save(self, path: Path) -> None:
        """Write the tokenizer to `path`, whole or not at all."""


class CharacterTokenizer:
    """Each character (Unicode code point) is a token; ids follow the order of `characters`."""

    def __init__(self, characters: str) -> None:
        """characters: every character once. Raises ValueError for an empty or repeating string."""
        if not characters or len(set(characters)) != len(characters):
            raise ValueError("a character tokenizer needs at least one character, and each once")
        self.characters = characters
        self._points = _code_points(characters)
        # Id of each code point, -1 for none; the last entry stands for all points beyond the table.
        self._ids = np.full(int(self._points.max()) + 2, -1, dtype=np.int32)
        self._ids[self._points] = np.arange(len(characters), dtype=np.int32)

    @classmethod
    def train(cls, text: str) -> CharacterTokenizer:
        """The tokenizer of the characters of `text`, which is not empty, in code point order."""
        return cls("".join(sorted(set(text))))

    @property
    def vocabulary_size(self) -> int:
        """Number of characters."""
        return len(self.characters)

    def encode(self, text: str) -> Tokens:
        """Ids of the characters, (len(text),), of type `token_dtype(vocabulary_size)`.

        Raises UserError naming the first unknown character and its position.
        """
        ids = self._ids.take(_code_points(text), mode="clip")
        if ids.size and ids.min() < 0:
            position = int((ids < 0).argmax())
            character = text[position]
            raise UserError(
                f"the character {character!r} (U+{ord(character):04X}) at position {position} is"
                f" not among the tokenizer's {len(self.characters)}: {_shorten(self.characters)}"
            )
        return ids.astype(token_dtype(len(self.characters)))

    def decode(self, ids: ArrayLike) -> str:
        """The text of ids (n,), integers. Raises IndexError for an id outside the vocabulary."""
        index = np.asarray(ids, dtype=np.int64)
        if index.size and not 0 <= int(index.min()) <= int(index.max()) < len(self.characters):
            raise IndexError(f"token ids do not lie in range({len(self.characters)})")
        return self._points[index].tobytes().decode("utf-32-le", "surrogatepass")

    def save(self, path: Path) -> None:
        """Write `path`, whole or not at all."""
        document = {
            "format": _FORMAT,
            "version": _VERSION,
            "kind": "character",
            "characters": self.characters,
        }
        content = json.dumps(document, indent=1) + "\n"
        write_atomically(path, lambda temporary: temporary.write_text(content, encoding="ascii"))

    @classmethod
    def load(cls, path: Path) -> CharacterTokenizer:
        """The character tokenizer saved at `path`. Raises UserError as `load_tokenizer` does."""
        return cls._from_document(_read_document(path, ["character"]), path)

    @classmethod
    def _from_document(cls, document: dict[str, Any], path: Path) -> CharacterTokenizer:
        characters = document.get("characters")
        if not isinstance(characters, str) or not characters:
            raise UserError(f"{path}: 'characters' is missing or not a string of characters")
        if len(set(characters)) != len(characters):
            twice = next(c for c, after in pairwise(sorted(characters)) if c == after)
            raise UserError(f"{path}: 'characters' holds {twice!r} more than once")
        return cls(characters)


_KINDS = {"character": CharacterTokenizer}


def load_tokenizer(path: Path) -> Tokenizer:
    """The tokenizer saved at `path`, of whichever kind.

    Raises UserError where there is no such file, and for a file that is no tokenizer, of another
    version, of an unknown kind, or damaged.
    """
    document = _read_document(path, list(_KINDS))
    return _KINDS[document["kind"]]._from_document(document, path)


def _read_document(path: Path, kinds: list[str]) -> dict[str, Any]:
    """The checked outer part of a tokenizer file."""
    if not path.exists():
        raise missing_file("tokenizer", path)
    document = read_json(path, _MAX_BYTES)
    if not isinstance(document, dict) or document.get("format") != _FORMAT:
        raise UserError(f"{path}: is not a tokenizer (its 'format' is not '{_FORMAT}')")
    if document.get("version") != _VERSION:
        raise UserError(
            f"{path}: tokenizer version {repr(document.get('version'))[:20]}; this mpillm reads"
            f" {_VERSION}"
        )
    if document.get("kind") not in kinds:
        kind = str(document.get("kind"))[:50]
        raise UserError(f"{path}: no tokenizer kind {kind!r}; {did_you_mean(kind, kinds)}")
    return document


def _code_points(text: str) -> NDArray[np.uint32]:
    """Code points of `text`, uint32 (len(text),), lone surrogates included."""
    return np.frombuffer(text.encode("utf-32-le", "surrogatepass"), dtype="<u4")


def _shorten(characters: str) -> str:
    """At most 100 of the characters, quoted."""
    return repr(characters[:100]) + ("..." if len(characters) > 100 else "")
