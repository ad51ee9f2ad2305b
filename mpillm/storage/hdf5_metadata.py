"""The metadata of HDF5 files as mpillm writes them: object headers, links, types, shapes.

After the "HDF5 File Format Specification", version 3.0, for what libhdf5 writes with the bounds
("v110", "v110"): superblock 2 or 3, object headers of version 2, links in headers or in a fractal
heap. Every block lies within the file, begins with its signature and ends with its checksum, and
none is read twice, so that no file can make this loop, crash or take more memory than the file has
bytes. Everything that is wrong raises ValueError.
"""

from __future__ import annotations

import struct
from typing import final

import numpy as np

from mpillm.storage.source import Source

__all__ = [
    "ATTRIBUTE",
    "ATTRIBUTE_INFO",
    "DATASPACE",
    "DATATYPE",
    "EXTERNAL_FILES",
    "FILTERS",
    "LAYOUT",
    "LINK",
    "LINK_INFO",
    "NOWHERE",
    "Cursor",
    "Messages",
    "decode_attribute",
    "decode_dataspace",
    "decode_datatype",
    "lookup3",
    "one",
    "read_block",
    "read_header",
    "read_superblock",
]

NOWHERE = 2**64 - 1
"""The address that stands for none."""

_SUPERBLOCK = 48  # bytes of a superblock of version 2 or 3
_LARGEST_HEADER = 2**20

# Kinds of messages.
DATASPACE = 0x01
LINK_INFO = 0x02
DATATYPE = 0x03
LINK = 0x06
EXTERNAL_FILES = 0x07
LAYOUT = 0x08
FILTERS = 0x0B
ATTRIBUTE = 0x0C
ATTRIBUTE_INFO = 0x15
_NIL = 0x00
_CONTINUATION = 0x10
# Those of which nothing needs to be known: fill value, group info, time of change, reference count.
_READ_OVER = {0x05, 0x0A, 0x12, 0x16}
_KNOWN = _READ_OVER | {
    *(DATASPACE, LINK_INFO, DATATYPE, LINK, EXTERNAL_FILES, LAYOUT),
    *(FILTERS, ATTRIBUTE, ATTRIBUTE_INFO),
}

Messages = list[tuple[int, bytes]]
"""An object header's messages: kind and content."""


@final
class Cursor:
    """Reads little-endian numbers and bytes one after another, never beyond the end."""

    def __init__(self, data: bytes) -> None:
        self._data = data
        self._at = 0

    @property
    def left(self) -> int:
        """Number of bytes that are left."""
        return len(self._data) - self._at

    def take(self, count: int) -> bytes:
        """The next bytes."""
        if count > self.left:
            raise ValueError(f"{count} bytes are expected where {self.left} are left")
        self._at += count
        return self._data[self._at - count : self._at]

    def uint(self, count: int) -> int:
        """The next bytes as a number."""
        return int.from_bytes(self.take(count), "little")


def read_block(source: Source, address: int, count: int, signature: bytes) -> bytes:
    """A block without the signature it begins with and the checksum it ends with."""
    data = source.read(address, count)
    if not data.startswith(signature) or count < len(signature) + 4:
        raise ValueError(f"there is no {signature.decode()} block of HDF5 1.10 at {address}")
    if lookup3(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise ValueError(f"the checksum of the {signature.decode()} block at {address} is wrong")
    return data[len(signature) : -4]


def lookup3(data: bytes) -> int:
    """Bob Jenkins's hash `lookup3` (hashlittle) of bytes, the checksum of HDF5's metadata.

    >>> hex(lookup3(b"Four score and seven years ago"))
    '0x17770551'
    """
    mask = 0xFFFFFFFF
    a = b = c = (0xDEADBEEF + len(data)) & mask
    if not data:
        return c
    last = (len(data) - 1) // 12 * 12
    words: tuple[int, ...] = struct.unpack(
        f"<{last // 4 + 3}I", data + bytes(last + 12 - len(data))
    )
    for at in range(0, last // 4, 3):
        a, b, c = (a + words[at]) & mask, (b + words[at + 1]) & mask, (c + words[at + 2]) & mask
        a = ((a - c) ^ (c << 4 | c >> 28)) & mask
        c = (c + b) & mask
        b = ((b - a) ^ (a << 6 | a >> 26)) & mask
        a = (a + c) & mask
        c = ((c - b) ^ (b << 8 | b >> 24)) & mask
        b = (b + a) & mask
        a = ((a - c) ^ (c << 16 | c >> 16)) & mask
        c = (c + b) & mask
        b = ((b - a) ^ (a << 19 | a >> 13)) & mask
        a = (a + c) & mask
        c = ((c - b) ^ (b << 4 | b >> 28)) & mask
        b = (b + a) & mask
    a, b, c = (a + words[-3]) & mask, (b + words[-2]) & mask, (c + words[-1]) & mask
    c = ((c ^ b) - (b << 14 | b >> 18)) & mask
    a = ((a ^ c) - (c << 11 | c >> 21)) & mask
    b = ((b ^ a) - (a << 25 | a >> 7)) & mask
    c = ((c ^ b) - (b << 16 | b >> 16)) & mask
    a = ((a ^ c) - (c << 4 | c >> 28)) & mask
    b = ((b ^ a) - (a << 14 | a >> 18)) & mask
    return ((c ^ b) - (b << 24 | b >> 8)) & mask


def read_superblock(source: Source) -> int:
    """Check the superblock; the address of the root group."""
    signature = b"\x89HDF\r\n\x1a\n"
    head = source.read(0, min(9, source.size))
    if not head.startswith(signature):
        raise ValueError("it does not begin with HDF5's signature")
    if len(head) < 9 or head[8] not in (2, 3):
        raise ValueError(
            f"its superblock has version {head[8:].hex()}, expected 2 or 3 (HDF5 1.10)"
        )
    data = source.read(0, _SUPERBLOCK)
    if lookup3(data[:-4]) != int.from_bytes(data[-4:], "little"):
        raise ValueError("the checksum of its superblock is wrong")
    root: int
    offsets, lengths, flags, base, extension, end, root = struct.unpack("<9xBBBQQQQ4x", data)
    if (offsets, lengths, flags, base, extension) != (8, 8, 0, 0, NOWHERE):
        raise ValueError("its superblock has a user block, driver information or a writer")
    if end != source.size:
        raise ValueError(f"its superblock says {end} bytes, the file has {source.size}")
    return root


def read_header(source: Source, address: int) -> Messages:
    """The messages of the object header at an address, without those that only fill it up."""
    signature, version, flags = struct.unpack("<4sBB", source.read(address, 6))
    if signature != b"OHDR" or version != 2 or flags & 0xC0:
        raise ValueError(f"there is no object header of HDF5 1.10 at {address}")
    before = 6 + (16 if flags & 0x20 else 0) + (4 if flags & 0x10 else 0)
    width = 1 << (flags & 3)
    length = int.from_bytes(source.read(address + before, width), "little")
    if length > _LARGEST_HEADER:
        raise ValueError(f"the object header at {address} has {length} bytes")
    whole = read_block(source, address, before + width + length + 4, b"OHDR")
    blocks, seen, total = [whole[before + width - 4 :]], {address}, length
    fixed = 6 if flags & 4 else 4  # bytes before a message's content
    found: Messages = []
    for block in blocks:  # which grows
        at = 0
        while at + fixed <= len(block):
            kind, size, about = struct.unpack_from("<BHB", block, at)
            content = block[at + fixed : at + fixed + size]
            at += fixed + size
            if at > len(block):
                raise ValueError(f"a message of the object header at {address} is cut short")
            if kind == _CONTINUATION:
                there, length = struct.unpack("<QQ", Cursor(content).take(16))
                total += length
                if there in seen or total > _LARGEST_HEADER:
                    raise ValueError(f"the object header at {address} goes on for ever")
                seen.add(there)
                blocks.append(read_block(source, there, length, b"OCHK"))
            elif kind != _NIL:
                if kind not in _KNOWN or about & 2:
                    raise ValueError(f"the object header at {address} has a message {kind:#x}")
                found.append((kind, content))
    return found


def one(messages: Messages, kind: int) -> Cursor:
    """The content of the only message of a kind."""
    found = [content for its_kind, content in messages if its_kind == kind]
    if len(found) != 1:
        raise ValueError(f"{len(found)} messages of kind {kind:#x}, expected one")
    return Cursor(found[0])


def decode_dataspace(cursor: Cursor) -> tuple[int, ...]:
    """A shape; () for one number."""
    version, rank, flags, kind = (cursor.uint(1) for _ in range(4))
    if version != 2 or rank > 32 or flags > 1 or kind != (1 if rank else 0):
        raise ValueError("the shape is not a plain one")
    return tuple(cursor.uint(8) for _ in range(rank))


def _datatypes() -> dict[bytes, np.dtype[np.generic]]:
    """NumPy's types by their encoding in a file: version 1 of the message, both byte orders."""
    found: dict[bytes, np.dtype[np.generic]] = {}
    for big, order in ((0, "<"), (1, ">")):
        for size in (1, 2, 4, 8):
            for signed, code in ((0, "u"), (8, "i")):
                plain = struct.pack("<BBHIHH", 0x10, signed | big, 0, size, 0, 8 * size)
                found[plain] = np.dtype(f"{order}{code}{size}")
        for size, exponent, mantissa in ((2, 5, 10), (4, 8, 23), (8, 11, 52)):
            bias = 2 ** (exponent - 1) - 1
            about = 0x11, 0x20 | big, 8 * size - 1, 0, size, 0, 8 * size
            parts = mantissa, exponent, 0, mantissa, bias
            found[struct.pack("<BBBBIHHBBBBI", *about, *parts)] = np.dtype(f"{order}f{size}")
    return found


_DATATYPES = _datatypes()


def decode_datatype(content: bytes) -> np.dtype[np.generic]:
    """A NumPy type: integers, floating-point numbers and, as `S`, strings of fixed length."""
    if len(content) >= 8:
        kind, padding, _, _, size = struct.unpack("<BBBBI", content[:8])
        if kind == 0x13 and padding & 0x0F in (0, 1) and 0 < size < 2**16:
            return np.dtype(f"S{size}")
        if kind in (0x30, 0x31):  # version 3 of the message says the same for these
            content = bytes([kind & 0x0F | 0x10]) + content[1:]
    for encoding, dtype in _DATATYPES.items():
        # In a header the content may be filled up with zeros.
        if content[: len(encoding)] == encoding and not any(content[len(encoding) :]):
            return dtype
    raise ValueError("the type is no plain integer, floating-point number or string")


def decode_attribute(content: bytes) -> tuple[str, str | int | float]:
    """Name and value of an attribute: one number or string of fixed length."""
    cursor = Cursor(content)
    version, flags, length, type_length, shape_length, _ = struct.unpack("<BBHHHB", cursor.take(9))
    if version != 3 or flags:
        raise ValueError("an attribute is not one of HDF5 1.10")
    name = cursor.take(length).rstrip(b"\0").decode()
    if not name.isprintable():  # error lines show it
        raise ValueError(f"the name {name[:50]!r} is not printable")
    try:
        dtype = decode_datatype(cursor.take(type_length))
        if decode_dataspace(Cursor(cursor.take(shape_length))):
            raise ValueError("it is an array")
        value = np.frombuffer(cursor.take(dtype.itemsize), dtype)[0]
        return name, value.decode() if isinstance(value, bytes) else value.item()
    except ValueError as error:
        message = f"the attribute '{name[:50]}' is no number or string of fixed length: {error}"
        raise ValueError(message) from None
