"""What is done to a whole file to see whether its reader can be broken. All by a seeded generator.

Each function takes a generator and returns a new file's bytes or a new value; the same generator
makes the same ones.
"""

from __future__ import annotations

import copy
import json
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from random import Random
from typing import Any
from unittest import mock

from mpillm.storage import hdf5_groups, hdf5_metadata
from mpillm.storage.hdf5 import Hdf5File

__all__ = ["Metadata", "change_bytes", "change_text", "change_value"]

_NUMBERS = (0, 1, 2, 47, 48, 255, 2**16 - 1, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**63, 2**64 - 1)


def change_bytes(rng: Random, whole: bytes, other: bytes) -> bytes:
    """A file with something done to it that needs no knowledge of its format."""
    data = bytearray(whole)
    at, to = rng.randrange(len(data)), rng.randrange(len(data))
    length = rng.choice((1, 2, 8, 64, 1000))
    match rng.randrange(9):
        case 0:  # flip some bits
            for _ in range(rng.choice((1, 1, 2, 20))):
                data[rng.randrange(len(data))] ^= 1 << rng.randrange(8)
        case 1:  # overwrite a run
            fill = rng.choice((b"\0" * length, b"\xff" * length, rng.randbytes(length)))
            data[at : at + length] = fill[: len(data) - at]
        case 2:  # cut
            del data[at:]
        case 3:  # go on
            data += rng.choice((b"\0" * length, rng.randbytes(length), other[at:], whole))
        case 4:  # the end of another file
            data[at:] = other[rng.choice((at, to)) :]
        case 5:  # a piece of another file
            data[at : at + length] = other[at : at + length]
        case 6:  # take a run out
            del data[at : at + length]
        case 7:  # put a run in twice
            data[to:to] = data[at : at + length]
        case 8:  # a number of any size
            width = rng.choice((1, 2, 4, 8))
            number = rng.choice((*_NUMBERS, len(data), at)) % 2 ** (8 * width)
            data[at : at + width] = number.to_bytes(width, "little")[: len(data) - at]
    return bytes(data)


_TOKEN = re.compile(r'"(?:[^"\\]|\\.)*"|-?[0-9][0-9.eE+-]*|[\[\]{}:,=.]|\n|[A-Za-z_]+')
_TOKENS = (
    *("null", "true", "NaN", "-Infinity", "1e999", "-0", "1e-999", '""', '"\\ud800"', '"\\u0000"'),
    *('"' + "x" * 5000 + '"', "9" * 19, "9" * 5000, "0x" + "f" * 9000, "1." + "0" * 5000, "'", '"'),
    *("[" * 20, "[" * 2000, "]", "{", "}", '{"a":' * 2000, ",", ":", "=", "\n", "[[a]]", "a.b.c"),
    *(".".join("a" * 300), "\\", '"""', "1979-05-27", "1979-13-99", "-1", "0.5", "[]", "{}", "\0"),
)


def change_text(rng: Random, text: str) -> str:
    """A JSON or TOML text with words of it replaced, doubled, taken out or exchanged."""
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        found = [match.span() for match in _TOKEN.finditer(text)]
        if not found:
            break
        (low, high), (start, stop) = rng.choice(found), rng.choice(found)
        word = rng.choice((rng.choice(_TOKENS), str(rng.choice(_NUMBERS)), "", text[start:stop]))
        match rng.randrange(3):
            case 0:
                text = text[:low] + word + text[high:]
            case 1:
                text = text[:low] + word + text[low:]
            case 2:  # a stretch twice
                low, high = min(low, start), max(low, start)
                text = text[:high] + text[low:high] + text[high:]
        if len(text) > 2**20:
            break
    return text


def change_value(rng: Random, value: Any) -> Any:
    """A JSON value with some of what is in it replaced, doubled, taken out or exchanged."""
    value = copy.deepcopy(value)
    for _ in range(rng.choice((1, 1, 1, 2, 5))):
        places = list(_places(value))
        if not places:
            break
        inside, key = rng.choice(places)
        other, its = rng.choice(places)
        new: tuple[Any, ...] = (None, True, -1, 0.5, "", "x" * 1000, "a\nb", "\0", "../x", [], {})
        numbers = *_NUMBERS, -(2**63), 10**30
        deep: Any = 0
        for _ in range(50):
            deep = [deep]
        chosen = rng.choice((*new, *numbers, deep, other[its], other[its], other[its]))
        match rng.randrange(4):
            case 0 | 1:
                if isinstance(inside[key], int) and rng.random() < 0.5:
                    chosen = inside[key] + rng.choice((-1, 1, 2**32))
                inside[key] = copy.deepcopy(chosen)
            case 2:
                del inside[key]
            case 3 if isinstance(inside, list):
                inside.insert(key, copy.deepcopy(chosen))
            case _:
                inside[rng.choice(("more", "dtype", "version"))] = copy.deepcopy(chosen)
        if len(json.dumps(value)) > 2**20:
            break
    return value


def _places(value: Any) -> Iterator[tuple[Any, Any]]:
    """Every object or list within a value, with each of its keys."""
    inner = value.items() if isinstance(value, dict) else enumerate(value)
    for key, item in list(inner) if isinstance(value, dict | list) else ():
        yield value, key
        yield from _places(item) if isinstance(item, dict | list) else ()


class Metadata:
    """The blocks of a whole HDF5 file that carry checksums."""

    def __init__(self, path: Path) -> None:
        self._blocks: list[tuple[int, int, int]] = [(0, 48, 44)]  # begin, end, place of the sum
        with _watched(self._blocks), Hdf5File(path) as file:
            groups = [""]
            for group in groups:
                for name in file.names(group):
                    inner = f"{group}/{name}".lstrip("/")
                    try:
                        file.find(inner)
                    except Exception:  # a group
                        groups.append(inner)

    def change(self, rng: Random, whole: bytes) -> bytes:
        """The file with its metadata changed and their checksums put right."""
        data = bytearray(whole)
        places = [rng.choice(self._blocks) for _ in range(rng.choice((1, 1, 1, 2, 4)))]
        for low, high, place in places:
            at = rng.randrange(low + 4, high - 4)
            width = rng.choice((1, 1, 2, 4, 8))
            number = rng.choice((*_NUMBERS, len(data), low, rng.choice(self._blocks)[0]))
            changed = rng.choice(
                (
                    (number % 2 ** (8 * width)).to_bytes(width, "little"),
                    rng.randbytes(width),
                    bytes([data[at] ^ 1 << rng.randrange(8)]),
                    bytes([(data[at] + rng.choice((-1, 1))) % 256]),
                )
            )
            data[at : min(at + width, high)] = changed[: high - at]
            _put_right(data, low, high, place)
        return bytes(data[: len(whole)])


def _put_right(data: bytearray, low: int, high: int, place: int) -> None:
    """Compute a block's checksum anew."""
    content = bytes(data[low:place])
    if place < high - 4:  # within the block, where it counts as zeros
        content += bytes(4) + bytes(data[place + 4 : high])
    struct.pack_into("<I", data, place, hdf5_metadata.lookup3(content))


@contextmanager
def _watched(blocks: list[tuple[int, int, int]]) -> Iterator[None]:
    """Note the blocks that are read."""
    plain, plain_direct = hdf5_metadata.read_block, hdf5_groups._Heap._read_direct

    def read_block(source: Any, address: int, count: int, signature: bytes) -> bytes:
        content = plain(source, address, count, signature)
        blocks.append((address, address + count, address + count - 4))
        return content

    def read_direct(heap: Any, address: int, size: int, offset: int) -> None:
        plain_direct(heap, address, size, offset)
        blocks.append((address, address + size, address + 17))

    with (
        mock.patch.object(hdf5_metadata, "read_block", read_block),
        mock.patch.object(hdf5_groups, "read_block", read_block),
        mock.patch.object(hdf5_groups._Heap, "_read_direct", read_direct),
    ):
        yield
