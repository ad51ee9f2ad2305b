"""Flight recorder and traffic ledger: every call of every Group passes here.

A rank writes down where it stands, in memory or in a memory-mapped file that outlives the process:
a header, and a ring of its last calls. `flight.py` reads such files, `watchdog.py` and `mpillm
doctor` look for what hangs. Besides, there are sums of calls, bytes and seconds by axis and
operation.

Each begin and end of a call costs about a microsecond.
"""

from __future__ import annotations

import contextlib
import mmap
import os
import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from mpillm.errors import UserError
from mpillm.parallel.flight_format import (
    CALL,
    COUNTED,
    DEPTH,
    HEADER,
    IN_ACTIVITY,
    MAGIC,
    PAGE,
    RECORD,
    VERSION,
    word,
)
from mpillm.parallel.grid import AXES, GROUPS

if TYPE_CHECKING:
    from mpillm.array.tally import Clock

__all__ = ["Entry", "Recorder", "Traffic", "start_ticks"]

_HEARTBEAT, _BEATS = word("heartbeat"), word("beats")
_FIRST, _STEP, _SAMPLES = word("first_step"), word("step"), word("samples")
_DEPTH, _ACTIVITIES = word("depth"), word("activities")
_PROGRESS, _CALLS, _WAITED = word("progress"), word("calls"), word("waited")
_WAITING, _SINCE, _COPY = word("waiting"), word("waiting_since"), word("waiting_call")
_COUNTS, _ENDED, _CAUSE = word("groups"), word("ended"), word("cause")
_END = int(RECORD.fields["end"][1]) // 8  # type: ignore[index]


def start_ticks(pid: int | str = "self") -> int:
    """When a process of this machine started, in ticks since boot: tells it from later ones.

    0 where the system does not say, or there is no such process.
    """
    try:
        text = Path(f"/proc/{pid}/stat").read_text(errors="replace")
        return int(text.rpartition(")")[2].split()[19])
    except (OSError, ValueError, IndexError):
        return 0


@dataclass
class Traffic:
    """Sums over the calls of one operation on one axis: bytes are payload handed to the calls."""

    calls: int = 0
    bytes: int = 0
    seconds: float = 0.0


class _Lane:
    """The calls that are counted together; `word` is the place of a group's counts in the file."""

    __slots__ = ("axis", "begun", "completed", "word")

    def __init__(self, axis: str, word: int) -> None:
        self.axis = axis.encode()
        self.word = word
        self.begun = 0
        self.completed = 0


class Entry:
    """A call that has begun."""

    __slots__ = ("axis", "begin", "lane", "number", "op")

    def __init__(self, number: int, axis: str, op: str, begin: float, lane: _Lane) -> None:
        self.number = number
        self.axis = axis
        self.op = op
        self.begin = begin
        self.lane = lane


class Recorder:
    """Where this rank stands: its last `capacity` calls, the sums of all, and what it is doing.

    All methods but `beat` and `goodbye` are for the thread that makes the calls.
    """

    def __init__(
        self,
        path: Path | None = None,
        capacity: int = 1024,
        *,
        rank: int = 0,
        size: int = 1,
        layout: Mapping[str, int] | None = None,
    ) -> None:
        """With `path`, all is in that file, readable after the process was killed.

        layout: sizes of the mesh's axes, whose product is `size`; by default all ranks are data
        ranks. UserError where the file cannot be made.
        """
        self.path = path
        self.rank = rank
        self.size = size
        self._capacity = capacity
        length = PAGE + capacity * RECORD.itemsize
        self._map = None if path is None else _make(path, length)
        self._bytes = memoryview(bytearray(length) if self._map is None else self._map)
        # Words are written through these: quicker than NumPy, and never half.
        self._ints, self._floats = self._bytes.cast("Q"), self._bytes.cast("d")
        self._count = 0
        self._waiting = 0
        self._waited = 0.0
        self._depth = 0
        self._flags = 0
        self._step = 0
        self._resumed = False  # whether the first step is noted
        self._lanes: dict[tuple[str, str, int, int], _Lane] = {}
        self._collectives: dict[str, _Lane] = {}
        self._ops: dict[str, bytes] = {}
        self.traffic: dict[tuple[str, str], Traffic] = {}
        self.clock: Clock | None = None  # set where the time of every call is to be accounted for
        self._write_header({"data": size} if layout is None else layout)
        for name in (*GROUPS, "node"):
            self._collective(name)

    def _write_header(self, layout: Mapping[str, int]) -> None:
        header = np.zeros((), dtype=HEADER)
        header["version"], header["capacity"] = VERSION, self._capacity
        header["rank"], header["size"] = self.rank, self.size
        for axis in AXES:
            header["layout"][axis] = layout.get(axis, 1)
        header["host"] = os.uname().nodename.encode()[:64]
        header["pid"], header["ticks"] = os.getpid(), start_ticks()
        header["start"] = header["progress"] = time.time()
        self._bytes[:PAGE] = header.tobytes()
        self._bytes[: len(MAGIC)] = MAGIC  # last: from here on it is a flight file

    # -- calls -----------------------------------------------------------------------------------

    def begin(
        self, axis: str, op: str, nbytes: int, peer: int = -1, tag: int = 0, *, wait: bool = False
    ) -> Entry:
        """Note that a call is made; `peer` is a rank of the group, -1 for a collective.

        tag: of a message, or a broadcast's root. wait: the rank is blocked in it until its `end`.
        """
        if peer < 0:
            lane = self._collectives.get(axis) or self._collective(axis)
        else:
            key = (axis, op, peer, tag)
            lane = self._lanes.get(key) or self._lanes.setdefault(key, _Lane(axis, 0))
        sequence = lane.begun
        lane.begun = sequence + 1
        number = self._count + 1
        now = time.time()
        CALL.pack_into(
            self._bytes,
            PAGE + self._count % self._capacity * CALL.size,
            number,
            sequence,
            lane.axis,
            self._ops.get(op) or self._ops.setdefault(op, op.encode()),
            peer,
            tag,
            nbytes,
            self._step,
            self._flags,
            now,
            0.0,
            number,
        )
        self._count = number
        ints = self._ints
        ints[_CALLS] = number
        if lane.word:
            ints[lane.word] = sequence + 1
        self._floats[_PROGRESS] = now
        total = self.traffic.get((axis, op)) or self._total(axis, op)
        total.calls += 1
        total.bytes += nbytes
        entry = Entry(number, axis, op, now, lane)
        if wait:
            self._block(entry, now)
        return entry

    def end(self, entry: Entry) -> None:
        """Note that the call is complete."""
        now = time.time()
        number, lane, floats = entry.number, entry.lane, self._floats
        if self._count - number < self._capacity:  # else the ring has come round
            place = (number - 1) % self._capacity
            floats[(PAGE + place * CALL.size) // 8 + _END] = now
        lane.completed += 1
        if lane.word:
            self._ints[lane.word + 1] = lane.completed
        floats[_PROGRESS] = now
        total = self.traffic.get((entry.axis, entry.op)) or self._total(entry.axis, entry.op)
        total.seconds += now - entry.begin
        if self._waiting == number:
            self._unblock(now)

    def wait(self, entry: Entry) -> None:
        """Note that the rank is blocked in a call under way, from now to its `end`."""
        if self._waiting != entry.number:
            now = time.time()
            if self._waiting:
                self._unblock(now)
            self._block(entry, now)

    def poll(self) -> None:
        """Note that the rank is alive and at work."""
        self._floats[_PROGRESS] = time.time()

    def last(self, count: int | None = None) -> np.ndarray:
        """The last calls, oldest first, as an array of RECORD."""
        kept = min(self._count, self._capacity)
        count = kept if count is None else min(count, kept)
        slots = np.arange(self._count - count, self._count) % self._capacity
        ring: np.ndarray = np.frombuffer(self._bytes, dtype=RECORD, offset=PAGE)
        return ring[slots]

    def _collective(self, axis: str) -> _Lane:
        """The count of an axis's collectives; in the header while there is room."""
        place = len(self._collectives)
        word = _COUNTS + 4 * place + 2 if place < COUNTED else 0
        lane = self._collectives[axis] = _Lane(axis, word)
        if word:
            self._bytes[8 * word - 16 : 8 * word] = lane.axis[:16].ljust(16, b"\0")
        return lane

    def _total(self, axis: str, op: str) -> Traffic:
        return self.traffic.setdefault((axis, op), Traffic())

    def _block(self, entry: Entry, now: float) -> None:
        if self._count - entry.number < self._capacity:
            start = PAGE + (entry.number - 1) % self._capacity * CALL.size
            copy = 8 * _COPY
            self._bytes[copy : copy + CALL.size] = self._bytes[start : start + CALL.size]
        self._floats[_SINCE] = now
        self._ints[_WAITING] = self._waiting = entry.number

    def _unblock(self, now: float) -> None:
        self._waited += now - self._floats[_SINCE]
        self._floats[_WAITED] = self._waited
        self._ints[_WAITING] = self._waiting = 0

    # -- what the rank is doing ------------------------------------------------------------------

    @property
    def step(self) -> int:
        """The last step done. The first one that is set is what this process went on from."""
        return self._step

    @step.setter
    def step(self, number: int) -> None:
        if not self._resumed:
            self._resumed, self._ints[_FIRST] = True, number
        self._step = self._ints[_STEP] = number
        self.poll()

    @property
    def samples(self) -> int:
        """Samples consumed since the start of the run."""
        return self._ints[_SAMPLES]

    @samples.setter
    def samples(self, number: int) -> None:
        self._ints[_SAMPLES] = number

    @contextlib.contextmanager
    def activity(self, name: str) -> Iterator[None]:
        """Something that may take long without a call, such as "load" or "save"; may be nested."""
        depth = self._depth
        if depth < DEPTH:
            word = _ACTIVITIES + 4 * depth
            self._bytes[8 * word : 8 * word + 24] = name.encode()[:24].ljust(24, b"\0")
            self._floats[word + 3] = time.time()
        self._set_depth(depth + 1)
        try:
            yield
        finally:
            self._set_depth(depth)

    def _set_depth(self, depth: int) -> None:
        self._depth = depth
        self._flags = IN_ACTIVITY if depth else 0
        self._ints[_DEPTH] = min(depth, DEPTH)
        self.poll()

    def goodbye(self, cause: str) -> None:
        """Note how this rank ends, in one line; the first cause stays."""
        if not self._floats[_ENDED]:
            text = " ".join(cause.split()).encode()[:256]
            self._bytes[8 * _CAUSE : 8 * _CAUSE + len(text)] = text
            self._floats[_ENDED] = time.time()

    # -- for the watchdog ------------------------------------------------------------------------

    def beat(self) -> None:
        """Note that the process is alive."""
        self._ints[_BEATS] += 1
        self._floats[_HEARTBEAT] = time.time()

    def contents(self) -> bytes:
        """The file's contents as they are now."""
        return bytes(self._bytes)

    def flush(self) -> None:
        """Have the system write the file out, so that other machines see it."""
        if self._map is not None:
            self._map.flush()


def _make(path: Path, length: int) -> mmap.mmap:
    """A file of zeros, mapped; its room is taken now: a full disk must not end the job later."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with path.open("w+b") as file:
            file.write(bytes(length))
            file.flush()
            return mmap.mmap(file.fileno(), length)
    except OSError as error:
        raise UserError(
            f"flight file {path} cannot be made: {error.strerror}; set run.flight_dir to a folder "
            "that can be written to"
        ) from None
