"""Memory that the ranks of a node share: windows of MPI-3.

What lies in it, the ranks of a group read from each other without a message. Windows are files of
the system's shared memory, of which a container may have little; a page that finds no room ends the
process. So room is asked for first, twice over, and every page is touched at once.
"""

from __future__ import annotations

import os
from typing import Any, cast

import numpy as np
from mpi4py import MPI

__all__ = ["Heap", "Window", "node_of", "room_of_system"]

# Where MPI libraries keep windows on Linux. Elsewhere they are not made.
_FOLDER = "/dev/shm"

# Bytes before the array: what a rank says about a call.
_NOTE = 64

# Arrays begin at multiples of this many bytes.
_ALIGN = 64

# A window has at least this many bytes: small arrays share one. Pages not touched take no memory.
_LEAST = 1 << 24


def room_of_system() -> int:
    """Bytes that are free for windows on this node."""
    try:
        found = os.statvfs(_FOLDER)
    except OSError:
        return 0
    return found.f_bavail * found.f_frsize


def node_of(comm: MPI.Comm) -> MPI.Comm:
    """A communicator of the ranks of `comm` on this rank's node. Collective."""
    return comm.Split_type(MPI.COMM_TYPE_SHARED, comm.rank)


class Window:
    """A part for every rank of a communicator, which all of them read and write."""

    def __init__(self, comm: MPI.Comm, nbytes: int) -> None:
        """nbytes: of the part of each rank, the same on all. Collective; see `make`."""
        self._rank = comm.rank
        info = MPI.Info.Create({"alloc_shared_noncontig": "true"})
        try:
            self._win = MPI.Win.Allocate_shared(
                _NOTE + nbytes, 1, info, cast("MPI.Intracomm", comm)
            )
        finally:
            info.Free()
        self._win.Lock_all(MPI.MODE_NOCHECK)
        buffers: list[Any] = [self._win.Shared_query(rank)[0] for rank in range(comm.size)]
        whole = [np.frombuffer(buffer, np.uint8) for buffer in buffers]
        self._notes = [part[:_NOTE].view(np.int64) for part in whole]
        self.parts = [part[_NOTE : _NOTE + nbytes] for part in whole]
        self._begin = self.parts[self._rank].ctypes.data

    @classmethod
    def make(cls, comm: MPI.Comm, nbytes: int) -> Window | None:
        """A window, or None, on all ranks alike, where the library has none. Collective."""
        try:
            window = cls(comm, nbytes)
        except MPI.Exception:
            window = None
        made: list[bool] = comm.allgather(window is not None)
        # One that some ranks only have cannot be freed: that takes all of them.
        return window if all(made) else None

    def free(self) -> None:
        """Give the memory back. Collective. Arrays in it must not be touched any more."""
        self._notes, self.parts = [], []
        self._win.Unlock_all()
        self._win.Free()

    def sync(self) -> None:
        """Order this rank's reads and writes before those after the next barrier, and vice versa.

        To be called before a barrier and after it.
        """
        self._win.Sync()

    def place(self, x: np.ndarray) -> int:
        """Where in this rank's part an array begins, in bytes; -1 when it does not lie there."""
        start = int(x.ctypes.data) - self._begin
        return start if 0 <= start <= self.parts[self._rank].size - x.nbytes else -1

    def note(self, *numbers: int) -> None:
        """Say something about a call, to be read by the others after a barrier."""
        self._notes[self._rank][: len(numbers)] = numbers

    def notes(self, count: int) -> list[list[int]]:
        """The first numbers that each rank has said."""
        return [note[:count].tolist() for note in self._notes]

    def array(self, rank: int, start: int, size: int, dtype: Any) -> np.ndarray:
        """`size` elements in the part of a rank."""
        stop = start + size * dtype.itemsize
        part: np.ndarray = self.parts[rank][start:stop].view(dtype)
        return part


class Heap:
    """The windows of a communicator, and the arrays that were put into them one by one."""

    def __init__(self, comm: MPI.Comm, node: MPI.Comm | None = None) -> None:
        """node: ranks of this node, who may all ask for as much at a time; None: only `comm`'s."""
        self._comm = comm
        self._node = node
        self._together: bool | None = None  # whether the ranks are on one node; None: not looked
        self._ranks = 0  # of the node
        self.windows: list[Window] = []
        self._left = 0  # bytes left in the last window
        self._taken = 0

    @property
    def bytes(self) -> int:
        """Bytes of this rank's arrays."""
        return self._taken

    def free(self) -> None:
        """Give all windows back. Collective."""
        for window in self.windows:
            window.free()
        self.windows, self._left, self._taken = [], 0, 0

    def find(self, x: np.ndarray) -> Window | None:
        """The window that an array lies in."""
        return next((window for window in self.windows if window.place(x) >= 0), None)

    def window(self, nbytes: int) -> Window | None:
        """A new window with `nbytes` for each rank; None, on all of them, without. Collective."""
        return Window.make(self._comm, nbytes) if self._agree(nbytes)[1] else None

    def zeros(self, size: int, dtype: np.dtype[Any]) -> np.ndarray | None:
        """A flat array of zeros that the others reach; None, on all ranks, without. Collective."""
        nbytes, fits = self._agree(-(-size * dtype.itemsize // _ALIGN) * _ALIGN)
        if not fits:
            return None
        if nbytes > self._left:
            whole = max(nbytes, _LEAST)
            window = Window.make(self._comm, whole)
            if window is None:
                return None
            self.windows.append(window)
            self._left = whole
        window = self.windows[-1]
        start = window.parts[self._comm.rank].size - self._left
        self._left -= nbytes
        self._taken += nbytes
        array = window.array(self._comm.rank, start, size, dtype)
        array.fill(0)  # touches every page
        return array

    def _agree(self, nbytes: int) -> tuple[int, bool]:
        """The most that any rank asks for, and whether there can be so much for each. Collective.

        Twice as much must be free as all ranks of the node may ask for: another group may be about
        to touch pages that it was granted before, and other programs need room, too.
        """
        if self._together is None:
            node = self._node or node_of(self._comm)
            mine, there = self._comm.Get_group(), node.Get_group()
            self._together = MPI.UNDEFINED not in mine.Translate_ranks(None, there)
            self._ranks = max(node.size, self._comm.size)
            mine.Free()
            there.Free()
            if node is not self._node:
                node.Free()
        if not self._together:
            return nbytes, False
        asked: list[tuple[int, int]] = self._comm.allgather((nbytes, room_of_system()))
        most = max(nbytes for nbytes, _ in asked)
        return most, 2 * self._ranks * most <= min(room for _, room in asked)
