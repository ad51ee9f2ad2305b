"""The layout of a flight file: a header of one page, and a ring of calls.

The file is read while it is written. Every field is one aligned word, or is written before the word
that makes it count: a record of the ring is whole when its first and its last field agree. Numbers
are in native byte order: read on another kind of machine, the version is no version.
"""

from __future__ import annotations

import struct
from typing import Any

import numpy as np

from mpillm.parallel.grid import AXES

__all__ = [
    "CALL",
    "COUNTED",
    "DEPTH",
    "HEADER",
    "IN_ACTIVITY",
    "MAGIC",
    "PAGE",
    "RECORD",
    "VERSION",
    "word",
]

MAGIC = b"mpillm-f"
VERSION = 1
DEPTH = 4  # nested activities that are kept
COUNTED = 16  # groups whose calls are counted in the header: those of a mesh, and a few more

IN_ACTIVITY = 1  # a flag of calls: made inside an activity, hence not in every step

# One call. `number` counts this rank's calls from 1, 0 marks an unused record, and `check` repeats
# it; `sequence` counts, from 0, the collectives of an axis, or the messages of an axis one way with
# one peer under one tag, so that it means the same on every rank; `tag` of a broadcast is its root;
# `step` is the last one done; `end` is 0 while the call is under way; times are seconds since the
# epoch. Native byte order: read elsewhere, the version is no version.
CALL = struct.Struct("=QQ16s16siiqIIddQ")
RECORD = np.dtype(
    [
        ("number", "=u8"),
        ("sequence", "=u8"),
        ("axis", "S16"),
        ("op", "S16"),
        ("peer", "=i4"),
        ("tag", "=i4"),
        ("bytes", "=i8"),
        ("step", "=u4"),
        ("flags", "=u4"),
        ("begin", "=f8"),
        ("end", "=f8"),
        ("check", "=u8"),
    ]
)

_FIELDS: list[Any] = [
    ("magic", "S8"),
    ("version", "=u8"),
    ("capacity", "=u8"),  # records of the ring
    ("rank", "=u8"),
    ("size", "=u8"),
    ("layout", [(axis, "=u8") for axis in AXES]),
    ("host", "S64"),
    ("pid", "=u8"),
    ("ticks", "=u8"),  # when the process started, see `start_ticks`
    ("start", "=f8"),
    ("heartbeat", "=f8"),  # of the watchdog's thread; 0 without one
    ("beats", "=u8"),
    ("first_step", "=u8"),  # the step that the process went on from
    ("step", "=u8"),
    ("samples", "=u8"),
    ("depth", "=u8"),  # of nested activities; the last one counts
    ("activities", [("name", "S24"), ("since", "=f8")], (DEPTH,)),
    ("progress", "=f8"),  # of the main thread: a call's begin or end, a step, an activity, a poll
    ("calls", "=u8"),
    ("waited", "=f8"),  # seconds that the main thread was blocked in calls
    ("waiting", "=u8"),  # number of the call that the main thread is blocked in, or 0
    ("waiting_since", "=f8"),
    ("waiting_call", RECORD),  # a copy: the ring may have come round
    ("groups", [("name", "S16"), ("begun", "=u8"), ("completed", "=u8")], (COUNTED,)),
    ("ended", "=f8"),  # when `cause` was noted, or 0
    ("cause", "S256"),
]
PAGE = 4096
_BARE: np.dtype[np.void] = np.dtype(_FIELDS)
HEADER: np.dtype[np.void] = np.dtype([*_FIELDS, ("reserved", f"V{PAGE - _BARE.itemsize}")])


def word(name: str) -> int:
    """Place of a header's field in the file, in words of eight bytes."""
    return int(HEADER.fields[name][1]) // 8  # type: ignore[index]
