"""The links of an HDF5 group: a few lie in its object header, many in a fractal heap.

The heap's blocks are found by its doubling table, and what lies where in it by a B-tree. See
`hdf5_metadata` for what is trusted: nothing.
"""

from __future__ import annotations

import struct
from collections.abc import Iterator
from dataclasses import dataclass
from typing import final

from mpillm.storage.hdf5_metadata import (
    LINK,
    LINK_INFO,
    NOWHERE,
    Cursor,
    Messages,
    lookup3,
    one,
    read_block,
)
from mpillm.storage.source import Source

__all__ = ["read_links"]

_LARGEST_NODE = 2**16
_LARGEST_BLOCK = 2**20
_LONGEST_NAME = 2**10


def read_links(source: Source, messages: Messages) -> dict[str, int | None]:
    """The address of each object of a group by its name; None for a link that is not a hard one."""
    contents = [content for kind, content in messages if kind == LINK]
    cursor = one(messages, LINK_INFO)
    version, flags = cursor.uint(1), cursor.uint(1)
    if version or flags > 3:
        raise ValueError("a group is not one of HDF5 1.10")
    cursor.take(8 if flags & 1 else 0)
    heap, tree = cursor.uint(8), cursor.uint(8)
    if heap != NOWHERE:
        objects = _Heap(source, heap)
        contents += [objects.get(place) for place in _records(source, tree)]
    links: dict[str, int | None] = {}
    for content in contents:
        name, address = _decode_link(content)
        if name in links:
            raise ValueError(f"'{name[:50]}' stands twice in a group")
        links[name] = address
    return links


def _decode_link(content: bytes) -> tuple[str, int | None]:
    cursor = Cursor(content)
    version, flags = cursor.uint(1), cursor.uint(1)
    if version != 1 or flags & 0xE0:
        raise ValueError("a link is not one of HDF5 1.10")
    kind = cursor.uint(1) if flags & 8 else 0
    cursor.take((8 if flags & 4 else 0) + (1 if flags & 16 else 0))  # order, character set
    name = cursor.take(min(cursor.uint(1 << (flags & 3)), _LONGEST_NAME + 1)).decode()
    if len(name) > _LONGEST_NAME:
        raise ValueError(f"a name has more than {_LONGEST_NAME} characters")
    if not name.isprintable():  # error lines show it
        raise ValueError(f"the name {name!r} is not printable")
    return name, None if kind else cursor.uint(8)


def _records(source: Source, address: int) -> Iterator[bytes]:
    """What the B-tree (version 2) of a group's names holds: places in its heap."""
    header = read_block(source, address, 38, b"BTHD")
    version, kind, node_size, record_size, depth, _, _, root, count, total = struct.unpack(
        "<BBIHHBBQHQ", header
    )
    if (version, kind, record_size) != (0, 5, 11) or not 64 <= node_size <= _LARGEST_NODE:
        raise ValueError("a B-tree is not that of a group's names")
    if depth > 8 or total * record_size > source.size:
        raise ValueError("a B-tree is larger than the file")
    # Of each level from the leaves on: how many bytes the two numbers beside an address take.
    most = (node_size - 10) // record_size
    width = _width(most)
    below, held = [0], most
    for _level in range(depth):
        pointer = 8 + width + below[-1]
        held += (node_size - 10 - pointer) // (record_size + pointer) * (held + 1)
        below.append(_width(held))
    seen: set[int] = set()

    def walk(address: int, count: int, level: int) -> Iterator[bytes]:
        if address in seen:
            raise ValueError("a B-tree goes in circles")
        seen.add(address)
        pointer = 8 + width + below[level - 1] if level else 0
        length = 10 + count * record_size + (count + 1) * pointer
        if length > node_size:
            raise ValueError("a B-tree's node has too many records")
        node = Cursor(read_block(source, address, length, b"BTIN" if level else b"BTLF"))
        if node.take(2) != b"\0\x05":
            raise ValueError("a B-tree's node is not of its kind")
        yield from (node.take(record_size)[4:] for _ in range(count))  # after the name's hash
        while level and node.left:
            child, held = node.uint(8), node.uint(width)
            node.take(below[level - 1])
            yield from walk(child, held, level - 1)

    if root != NOWHERE:
        found = 0
        for record in walk(root, count, depth):
            found += 1
            if found > total:
                break
            yield record
        if found != total:
            raise ValueError(f"a B-tree of {total} records has another number of them")


def _width(limit: int) -> int:
    """Bytes that numbers up to a limit take."""
    return (limit.bit_length() - 1) // 8 + 1


@dataclass(frozen=True)
class _Block:
    """A direct block of a heap: where it begins in the heap and its bytes."""

    start: int
    data: bytes


@final
class _Heap:
    """A fractal heap of links."""

    def __init__(self, source: Source, address: int) -> None:
        self._source = source
        self._address = address
        header = read_block(source, address, 146, b"FRHP")
        version, place_size, filters, flags, largest = struct.unpack("<BHHBI", header[:10])
        width, start, last, bits, _, root, rows = struct.unpack("<HQQHHQH", header[106:])
        if version or filters or flags & 0xFC or place_size != 7 or bits != 32:
            raise ValueError("a heap is not that of a group's links")
        powers = all(size and not size & (size - 1) for size in (width, start, last))
        if not powers or not start <= last <= _LARGEST_BLOCK or not 0 < width <= 64:
            raise ValueError("a heap's blocks have strange sizes")
        self._summed = bool(flags & 2)
        self._largest = min(largest, _LARGEST_BLOCK)
        self._width, self._start, self._last = width, start, last
        self._held = self._read = 0  # bytes of blocks, and bytes handed out
        self._seen: set[int] = set()
        self._blocks: list[_Block] = []
        if root != NOWHERE:
            if rows:
                self._read_indirect(root, rows, 0)
            else:
                self._read_direct(root, start, 0)

    def get(self, place: bytes) -> bytes:
        """The bytes at a place: where in the heap and how many."""
        kind, offset, length = struct.unpack("<BIH", place)
        self._read += length
        if kind or length > self._largest or self._read > self._source.size:
            raise ValueError("a heap's object is not one of its kind, or has too many bytes")
        low, high = 0, len(self._blocks)
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if self._blocks[middle].start <= offset else (low, middle)
        if self._blocks and self._blocks[low].start <= offset:
            block = self._blocks[low]
            begin = offset - block.start
            if begin + length <= len(block.data):
                return block.data[begin : begin + length]
        raise ValueError("a heap's object lies outside its blocks")

    def _row(self, row: int) -> int:
        """Size of the blocks of a row of the doubling table."""
        size: int = self._start << max(row - 1, 0)
        return size

    def _once(self, address: int) -> None:
        if address in self._seen:
            raise ValueError("a heap goes in circles")
        self._seen.add(address)

    def _read_indirect(self, address: int, rows: int, offset: int) -> None:
        """Read the blocks of an indirect block, which begins at an offset of the heap."""
        self._once(address)
        if rows > 32:
            raise ValueError("a heap is larger than any")
        length = 4 + 1 + 8 + 4 + 8 * rows * self._width + 4
        block = Cursor(read_block(self._source, address, length, b"FHIB"))
        self._check_owner(block.take(13), offset)
        for row in range(rows):
            size = self._row(row)
            for _ in range(self._width):
                child = block.uint(8)
                if child != NOWHERE and size <= self._last:
                    self._read_direct(child, size, offset)
                elif child != NOWHERE:
                    below = (size // (self._start * self._width)).bit_length()
                    self._read_indirect(child, below, offset)
                offset += size

    def _read_direct(self, address: int, size: int, offset: int) -> None:
        self._once(address)
        self._held += size
        if self._held > self._source.size:
            raise ValueError("a heap's blocks overlap")
        data = self._source.read(address, size)
        if data[:4] != b"FHDB":
            raise ValueError(f"there is no block of a heap at {address}")
        self._check_owner(data[4:17], offset)
        if self._summed:
            plain = data[:17] + bytes(4) + data[21:]
            if lookup3(plain) != int.from_bytes(data[17:21], "little"):
                raise ValueError(f"the checksum of a heap's block at {address} is wrong")
        self._blocks.append(_Block(offset, data))

    def _check_owner(self, head: bytes, offset: int) -> None:
        """Version, the heap's address and the offset in it, with which each block begins."""
        if struct.unpack("<BQI", head) != (0, self._address, offset):
            raise ValueError("a heap's block belongs to another one")
