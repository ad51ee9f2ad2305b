"""Sums and gatherings of a group whose ranks share memory: by reading each other's arrays.

Arrays that lie in a window (`SharedCalls.zeros`) are not copied: the ranks meet, each one adds up
its share of the elements where they lie and writes the sum to where it belongs, and they meet
again. Two meetings, whatever the size, so that such a call can be under way like any other.

Other arrays are moved through a stage: a small window, one half of which is read while the other
one is filled. That takes a meeting every MiB or two, for which all ranks must be there: only
blocking calls do it.
"""

from __future__ import annotations

from collections.abc import Generator, Sequence

import numpy as np
from mpi4py import MPI

from mpillm.parallel.buffers import offsets
from mpillm.parallel.request import Steps
from mpillm.parallel.shard import split_range
from mpillm.parallel.shared_memory import Heap, Window
from mpillm.parallel.sums import add_up

__all__ = ["SharedCalls"]

# Bytes of a call from which on two meetings take no longer than MPI's way to move an array.
SHARED = 1 << 15

# Bytes of a blocking call from which on the stage is quicker.
STAGED = 1 << 17

# Bytes of either half of a rank's stage.
HALF = 1 << 20

_OPS = {"allreduce": 1, "reduce_scatter": 2, "allgather": 3}

# The ranks' arrays, once they have met.
_Meeting = Generator["MPI.Request | None", None, list[np.ndarray]]


class SharedCalls:
    """What a group can do in shared memory. All arrays are flat and of the host."""

    def __init__(self, comm: MPI.Comm, axis: str, node: MPI.Comm | None) -> None:
        """axis: the group's name. node: see `Heap`."""
        self._comm = comm
        self._axis = axis
        self._rank: int = comm.rank
        self._size: int = comm.size
        self._heap = Heap(comm, node)
        self._stage: Window | None = None
        self._staging: bool | None = None  # whether there is a stage; None: nobody asked yet
        self._half = 0  # the half to fill next

    def free(self) -> None:
        """Give back all windows. Collective."""
        self._heap.free()
        if self._stage is not None:
            self._stage.free()
            self._stage, self._staging = None, None

    @property
    def bytes(self) -> int:
        """Bytes of shared memory that this rank has added."""
        return self._heap.bytes + (2 * HALF if self._stage is not None else 0)

    def zeros(self, size: int, dtype: np.dtype) -> np.ndarray | None:
        """A flat array of zeros in a window; None, on all ranks, where that cannot be. Collective.

        To a call either all ranks pass such arrays, or none.
        """
        return self._heap.zeros(size, dtype)

    def window(self, x: np.ndarray, nbytes: int) -> Window | None:
        """The window of an array, where a call of so many bytes is to be made in it."""
        return self._heap.find(x) if nbytes >= SHARED else None

    # -- arrays in a window ------------------------------------------------------------------------

    def allreduce(self, window: Window, x: np.ndarray, wait: bool) -> Steps:
        """The sum over the ranks, in place."""
        every = yield from self._meet("allreduce", window, x, [x.size] * self._size, wait)
        start, stop = split_range(x.size, self._size, self._rank)
        mine = [one[start:stop] for one in every]
        add_up(mine, mine)
        yield from self._part(window, wait)

    def reduce_scatter(
        self, window: Window, x: np.ndarray, out: np.ndarray, shares: Sequence[int], wait: bool
    ) -> Steps:
        """This rank's slice of the sum; `out` may be that slice of `x`, but no other part of it."""
        every = yield from self._meet("reduce_scatter", window, x, [x.size] * self._size, wait)
        start = sum(shares[: self._rank])
        add_up([one[start : start + shares[self._rank]] for one in every], [out])
        yield from self._part(window, wait)

    def allgather(
        self, window: Window, part: np.ndarray, out: np.ndarray, shares: Sequence[int], wait: bool
    ) -> Steps:
        """The ranks' parts; this rank's may be that slice of `out`, but no other part of it."""
        every = yield from self._meet("allgather", window, part, shares, wait)
        self._put(every, out, offsets(shares))
        yield from self._part(window, wait)

    def _meet(
        self, op: str, window: Window, x: np.ndarray, sizes: Sequence[int], wait: bool
    ) -> _Meeting:
        """The arrays that the ranks have come with, of these sizes, once all are there."""
        board, number = self._heap.windows[0], self._heap.windows.index(window)
        board.note(_OPS[op], number, x.nbytes, window.place(x))
        board.sync()
        yield from self._part(window, wait)
        board.sync()
        notes = board.notes(4)
        if [note[:3] for note in notes] != [[_OPS[op], number, n * x.itemsize] for n in sizes]:
            # Some rank is in another call. As when MPI is given calls that do not belong together,
            # nobody gets on, and it is for the watchdog to tell who has gone astray.
            never: MPI.Request = MPI.Grequest.Start(None, None, None)
            if wait:
                never.Wait()
            yield never
        return [
            window.array(rank, start, size, x.dtype)
            for rank, ((*_, start), size) in enumerate(zip(notes, sizes, strict=True))
        ]

    def _part(self, window: Window, wait: bool) -> Steps:
        """What the ranks wrote before is seen by all after it."""
        window.sync()
        if wait:
            self._comm.Barrier()
        else:
            yield self._comm.Ibarrier()
        window.sync()

    def _put(self, every: Sequence[np.ndarray], out: np.ndarray, starts: Sequence[int]) -> None:
        """Put the ranks' pieces into `out`, unless they are there."""
        for one, start in zip(every, starts, strict=True):
            place = out[start : start + one.size]
            if place.ctypes.data != one.ctypes.data:
                np.copyto(place, one)

    # -- other arrays, blocking --------------------------------------------------------------------

    def stages(self, nbytes: int) -> bool:
        """Whether a blocking call of so many bytes goes by the stage; made at the first such call.

        Collective where `nbytes` is large enough, as it then is on every rank.
        """
        if nbytes < STAGED:
            return False
        if self._staging is None:
            self._stage = self._heap.window(2 * HALF)
            self._staging = self._stage is not None
        return self._staging

    def staged_allreduce(self, x: np.ndarray) -> None:
        """The sum over the ranks, in place."""
        step = HALF // x.itemsize
        for low in range(0, x.size, step):
            piece = x[low : low + step]
            halves = self._halves(piece.size, x.dtype)
            np.copyto(halves[self._rank], piece)
            self._together()
            bounds = [split_range(piece.size, self._size, rank) for rank in range(self._size)]
            start, stop = bounds[self._rank]
            mine = halves[self._rank][start:stop]
            add_up([half[start:stop] for half in halves], [mine, piece[start:stop]])
            self._together()
            sums = [half[a:b] for half, (a, b) in zip(halves, bounds, strict=True)]
            sums[self._rank] = piece[start:stop]
            self._put(sums, piece, [a for a, _ in bounds])
        self._together()

    def staged_reduce_scatter(self, x: np.ndarray, out: np.ndarray, shares: Sequence[int]) -> None:
        """This rank's slice of the sum; `out` may be that slice of `x`, but no other part of it."""
        step = max(1, HALF // (x.itemsize * self._size))
        starts = offsets(shares)
        for low in range(0, max(shares), step):
            sizes = [max(0, min(share - low, step)) for share in shares]
            halves = self._halves(step * self._size, x.dtype)
            pieces = [
                x[start + low : start + low + size]
                for start, size in zip(starts, sizes, strict=True)
            ]
            for rank, piece in enumerate(pieces):
                if rank != self._rank:
                    np.copyto(halves[self._rank][rank * step : rank * step + piece.size], piece)
            self._together()
            place = slice(self._rank * step, self._rank * step + sizes[self._rank])
            parts = [half[place] for half in halves]
            parts[self._rank] = pieces[self._rank]
            add_up(parts, [out[low : low + sizes[self._rank]]])
        self._together()

    def staged_allgather(self, part: np.ndarray, out: np.ndarray, shares: Sequence[int]) -> None:
        """The ranks' parts; this rank's may be that slice of `out`, but no other part of it."""
        step = HALF // part.itemsize
        for low in range(0, max(shares), step):
            sizes = [max(0, min(share - low, step)) for share in shares]
            halves = self._halves(step, part.dtype)
            mine = part[low : low + step]
            np.copyto(halves[self._rank][: mine.size], mine)
            self._together()
            pieces = [half[:size] for half, size in zip(halves, sizes, strict=True)]
            pieces[self._rank] = mine
            self._put(pieces, out, [start + low for start in offsets(shares)])
        self._together()

    def _halves(self, size: int, dtype: np.dtype) -> list[np.ndarray]:
        """The half of every rank's stage that is to be filled, in turn.

        A half is free again when the ranks have met over the other one: before that meeting
        everybody has read it.
        """
        assert self._stage is not None
        start = self._half * HALF
        self._half = 1 - self._half
        return [self._stage.array(rank, start, size, dtype) for rank in range(self._size)]

    def _together(self) -> None:
        """A meeting on the stage."""
        assert self._stage is not None
        self._stage.sync()
        self._comm.Barrier()
        self._stage.sync()
