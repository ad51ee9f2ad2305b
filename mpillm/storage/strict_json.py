"""The one reader of JSON from disk: nothing is guessed, and nothing in a file can hurt.

Beyond what JSON says: UTF-8 only, keys that can be printed and none twice in an object, no NaN and
no infinity (nor a number that becomes one), integers of at most 20 digits, at most `_DEEPEST`
values inside each other.
"""

from __future__ import annotations

import json
import math
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn

from mpillm.storage.disk import Damaged, read_file

__all__ = ["parse_json", "read_json"]

_DEEPEST = 64
_LONGEST_KEY = 1000  # characters; error lines show keys
_LONGEST_NUMBER = 50  # characters of a number with a point or an exponent


def read_json(path: Path, limit: int) -> Any:
    """The value in a JSON file of at most `limit` bytes.

    Reading takes up to about thirty times as much memory, for a file that is all brackets. Raises
    Damaged in one line that names the file, UserError where it cannot be read.
    """
    return parse_json(read_file(path, limit), path)


def parse_json(raw: bytes, where: object) -> Any:
    """The value that bytes spell in JSON. Raises Damaged in one line that names `where`."""
    try:
        value = json.loads(
            raw.decode(),
            object_pairs_hook=_check_keys,
            parse_constant=_refuse_constant,
            parse_int=_integer,
            parse_float=_number,
        )
        _check_depth(value)
        if b"\\u" in raw:  # half of a surrogate pair is no text: it cannot even be printed
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise Damaged(f"{where} is damaged: not JSON (nested too deeply)") from None
    except UnicodeDecodeError as error:
        raise Damaged(f"{where} is damaged: not JSON (not UTF-8 at byte {error.start})") from None
    except UnicodeEncodeError:
        raise Damaged(f"{where} is damaged: not JSON (half of a surrogate pair)") from None
    except ValueError as error:
        raise Damaged(f"{where} is damaged: not JSON ({error})") from None
    return value


def _check_depth(value: Any) -> None:
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(_DEEPEST):
        inner = [item.values() if isinstance(item, dict) else item for item in level]
        level = [item for items in inner for item in items if isinstance(item, dict | list)]
        if not level:
            return
    raise ValueError("nested too deeply")


def _check_keys(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    result = dict(pairs)
    for key in result:
        if len(key) > _LONGEST_KEY or not key.isprintable():
            raise ValueError(f"key {key[:50]!r} is too long or not printable")
    if len(result) < len(pairs):
        keys = sorted(key for key, _ in pairs)
        twice = next(key for key, after in pairwise(keys) if key == after)
        raise ValueError(f"key {twice[:50]!r} stands twice")
    return result


def _refuse_constant(name: str) -> NoReturn:
    raise ValueError(f"{name} is not a JSON number")


def _integer(text: str) -> int:
    if len(text.lstrip("-")) > 20:
        raise ValueError(f"an integer of {len(text)} digits")
    return int(text)


def _number(text: str) -> float:
    number = float(text) if len(text) <= _LONGEST_NUMBER else math.inf
    if not math.isfinite(number):
        raise ValueError(f"the number {text[:_LONGEST_NUMBER]} is too large or too long")
    return number
