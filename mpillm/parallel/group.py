"""Group: one communicator, its collectives and its point-to-point calls.

Every byte that crosses a rank passes through this module. Calls take arrays of the backend and move
raw buffers, never pickled objects; the three `*_objects` calls are for setting up only. A group of
size 1 does nothing, so no caller branches on it. Arrays that MPI cannot read (on a GPU) are staged
through host memory after the device was synchronized.

A sum with `reduction = "ordered"` exchanges slices (alltoall), adds each slice's contributions in
rank order as a pairwise tree, and gathers the sums (allgather). Its bits do not depend on the MPI
library nor on an element's place in the array. Sums of 16-bit floats accumulate in float32.

Where all ranks of the group are on one node, large ordered sums and gatherings go through memory
that the ranks share (`shared_calls.py`): those of arrays made by `Group.zeros`, and the blocking
ones of all others. The additions are the same, and hence the bits.
"""

from __future__ import annotations

import math
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from typing import Any, Literal

import numpy as np
from mpi4py import MPI

from mpillm.array.backend import Array, Backend
from mpillm.parallel.buffers import Room, cut, is_half, offsets, pack, runs, unpack
from mpillm.parallel.clocked import ClockedRequest, apart
from mpillm.parallel.recorder import Entry, Recorder
from mpillm.parallel.request import Request, Steps
from mpillm.parallel.shard import split_range
from mpillm.parallel.shared_calls import SharedCalls
from mpillm.parallel.sums import add_up, pairwise_sum

__all__ = ["Group", "pairwise_sum"]

Op = Literal["sum", "max", "min"]

# Bytes in one MPI message at most: counts are 32-bit integers in many libraries.
MESSAGE_LIMIT = 1 << 30

# Below this many bytes in all, and always between two ranks, who move no more by it, an ordered sum
# gathers every contribution everywhere and adds them there: one call in place of two, the same
# additions, hence the same bits.
_GATHER_LIMIT = 1 << 15

_MPI_OPS: dict[str, MPI.Op] = {"sum": MPI.SUM, "max": MPI.MAX, "min": MPI.MIN}


class Group:
    """The ranks along one axis of the mesh."""

    def __init__(
        self,
        comm: MPI.Comm,
        axis: str,
        backend: Backend,
        recorder: Recorder,
        reduction: Literal["ordered", "library"] = "ordered",
        message_limit: int = MESSAGE_LIMIT,
        node: MPI.Comm | None = None,
    ) -> None:
        """node: the ranks on this rank's node, who share its memory; None: to be found out."""
        self._comm = comm
        self.axis = axis
        self.rank: int = comm.Get_rank()
        self.size: int = comm.Get_size()
        self._backend = backend
        self._recorder = recorder
        self._reduction = reduction
        self._limit = message_limit
        self._under_way: deque[Request] = deque()
        self._shared = SharedCalls(comm, axis, node)
        self._parts = Room()  # what others add to this rank's sum

    def free(self) -> None:
        """Give the communicator and shared memory back to MPI.

        Collective. Arrays made by `zeros` must not be touched any more.
        """
        self._shared.free()
        if self._comm not in (MPI.COMM_WORLD, MPI.COMM_SELF):
            self._comm.Free()

    def zeros(self, shape: tuple[int, ...], dtype: Any) -> Array:
        """An array of zeros which sums and gatherings of this group need not copy. Collective.

        Where the ranks share a node it lies in memory that they share; elsewhere it is an array
        like any other. Every rank calls, each with a shape of its own. To one call of the group
        either all ranks pass such arrays, or parts of them, or none does.
        """
        if self.size == 1 or not self._backend.on_host:
            return self._backend.zeros(shape, dtype)
        flat = self._recorded("share", self._shared.zeros, math.prod(shape), np.dtype(dtype))
        return self._backend.zeros(shape, dtype) if flat is None else flat.reshape(shape)

    @property
    def shared_bytes(self) -> int:
        """Bytes of shared memory that this rank has made for the group."""
        return self._shared.bytes

    # -- collectives -----------------------------------------------------------------------------

    def allreduce(self, x: Array, op: Op = "sum") -> Array:
        """Sum (or maximum, minimum) over the ranks, in place of `x`, any shape. Returns `x`."""
        self._run("allreduce", x.nbytes, self._allreduce(x, op, wait=True))
        return x

    def iallreduce(self, x: Array, op: Op = "sum") -> Request:
        """`allreduce` under way; `x` must be left alone until it is complete."""
        return self._start("allreduce", x.nbytes, self._allreduce(x, op, wait=False))

    def reduce_scatter(self, x: Array, out: Array, counts: Sequence[int] | None = None) -> Array:
        """This rank's slice of the sum over the ranks of the flat array `x`, written to `out`.

        Rank r gets the next `counts[r]` elements; by default its share by `split_range(x.size,
        ...)`. `x` is left as it was, unless `out` is a part of it.
        """
        self._run("reduce_scatter", x.nbytes, self._reduce_scatter(x, out, counts, wait=True))
        return out

    def ireduce_scatter(self, x: Array, out: Array, counts: Sequence[int] | None = None) -> Request:
        """`reduce_scatter` under way."""
        steps = self._reduce_scatter(x, out, counts, wait=False)
        return self._start("reduce_scatter", x.nbytes, steps)

    def allgather(self, part: Array, out: Array, counts: Sequence[int] | None = None) -> Array:
        """The ranks' flat parts one after another in the flat array `out`.

        Rank r gives `counts[r]` elements; by default its share by `split_range(out.size, ...)`.
        """
        self._run("allgather", out.nbytes, self._allgather(part, out, counts, wait=True))
        return out

    def iallgather(self, part: Array, out: Array, counts: Sequence[int] | None = None) -> Request:
        """`allgather` under way."""
        steps = self._allgather(part, out, counts, wait=False)
        return self._start("allgather", out.nbytes, steps)

    def alltoall(
        self, x: Array, counts: Sequence[int], out: Array, out_counts: Sequence[int]
    ) -> Array:
        """Send `counts[r]` elements of the flat array `x` to rank r, receive `out_counts[r]`."""
        self._run("alltoall", x.nbytes, self._alltoall(x, counts, out, out_counts, wait=True))
        return out

    def ialltoall(
        self, x: Array, counts: Sequence[int], out: Array, out_counts: Sequence[int]
    ) -> Request:
        """`alltoall` under way."""
        steps = self._alltoall(x, counts, out, out_counts, wait=False)
        return self._start("alltoall", x.nbytes, steps)

    def broadcast(self, x: Array, root: int = 0) -> Array:
        """The root's `x` on all ranks, in place."""
        self._run("broadcast", x.nbytes, self._broadcast(x, root, wait=True), root)
        return x

    def ibroadcast(self, x: Array, root: int = 0) -> Request:
        """`broadcast` under way."""
        return self._start("broadcast", x.nbytes, self._broadcast(x, root, wait=False), root)

    def barrier(self) -> None:
        """Wait until every rank of the group has come here."""
        if self.size > 1:
            self._recorded("barrier", self._comm.Barrier)

    # -- messages --------------------------------------------------------------------------------

    def send(self, x: Array, peer: int, tag: int = 0) -> None:
        """Send `x` to rank `peer`."""
        self.isend(x, peer, tag).wait()

    def recv(self, x: Array, peer: int, tag: int = 0) -> Array:
        """Receive into `x` from rank `peer`."""
        self.irecv(x, peer, tag).wait()
        return x

    def isend(self, x: Array, peer: int, tag: int = 0) -> Request:
        """`send` under way; `x` must be left alone until it is complete."""
        return self._post("send", x, peer, tag)

    def irecv(self, x: Array, peer: int, tag: int = 0) -> Request:
        """`recv` under way."""
        return self._post("recv", x, peer, tag)

    # -- objects, for setting up -------------------------------------------------------------------

    def gather_objects(self, item: Any) -> list[Any] | None:
        """Every rank's object on rank 0, None elsewhere. Pickled: not for a hot path."""
        gathered: list[Any] | None = self._recorded("gather", self._comm.gather, item)
        return gathered

    def allgather_objects(self, item: Any) -> list[Any]:
        """Every rank's object everywhere. Pickled: not for a hot path."""
        gathered: list[Any] = self._recorded("allgather", self._comm.allgather, item)
        return gathered

    def broadcast_object(self, item: Any) -> Any:
        """Rank 0's object everywhere. Pickled: not for a hot path."""
        return self._recorded("broadcast", self._comm.bcast, item)

    # -- how it is done ----------------------------------------------------------------------------

    def _finish(self) -> None:
        """Complete the collectives under way, which come before the next one on every rank."""
        if self._under_way:
            self._under_way[-1].wait()

    def _run(self, op: str, nbytes: int, steps: Steps, root: int = 0) -> None:
        """Run a collective whose steps all block."""
        self._finish()
        entry = self._note(op, nbytes, root, wait=True)
        if (clock := self._recorder.clock) is not None and self.size > 1:
            steps = apart(steps, clock, self.axis, self._comm.Barrier)
        for _ in steps:
            pass
        if entry is not None:
            self._recorder.end(entry)

    def _start(self, op: str, nbytes: int, steps: Steps, root: int = 0) -> Request:
        """A collective under way. It counts as made from now on, though others may come first."""
        entry = self._note(op, nbytes, root, wait=False)
        return self._request(steps, self._under_way, entry, self._comm.Ibarrier)

    def _note(self, op: str, nbytes: int, root: int, wait: bool) -> Entry | None:
        """Record a collective; None where nobody else takes part."""
        if self.size == 1:
            return None
        return self._recorder.begin(self.axis, op, nbytes, tag=root, wait=wait)

    def _post(self, what: Literal["send", "recv"], x: Array, peer: int, tag: int) -> Request:
        """A message under way."""
        entry = self._recorder.begin(self.axis, what, x.nbytes, peer, tag)
        return self._request(self._message(what, x, peer, tag), deque(), entry)

    def _request(
        self,
        steps: Steps,
        queue: deque[Request],
        entry: Entry | None,
        announce: Callable[[], MPI.Request] | None = None,
    ) -> Request:
        """A call under way, on the recorder's clock where it has one."""
        clock = self._recorder.clock
        if clock is None or entry is None:
            return Request(steps, queue, self._recorder, entry)
        return ClockedRequest(steps, queue, self._recorder, entry, clock, announce)

    def _recorded(self, op: str, call: Callable[..., Any], *arguments: Any) -> Any:
        """A blocking call that carries no array."""
        self._finish()
        entry = self._recorder.begin(self.axis, op, 0, wait=True)
        result = call(*arguments)
        self._recorder.end(entry)
        return result

    def _to_host(self, x: Array) -> np.ndarray:
        """A flat host array with the contents of `x`: a view of it where that is possible."""
        self._backend.synchronize()
        return np.ascontiguousarray(self._backend.to_host(x)).reshape(-1)

    def _room(self, x: Array) -> np.ndarray:
        """A flat host array for what is to be put into all of `x`, which itself is not copied."""
        return self._to_host(x) if self._backend.on_host else np.empty(x.size, dtype=x.dtype)

    def _place(self, out: Array, whole: np.ndarray, start: int) -> np.ndarray:
        """A flat host array to write to while others read `whole`: `out` itself where it can be.

        That is where the two share no memory, or `out` is just what begins at `whole[start]`.
        """
        place = self._room(out)
        same = place.ctypes.data == whole.ctypes.data + start * whole.itemsize
        return place if same or not np.may_share_memory(place, whole) else np.empty_like(place)

    def _put_back(self, host: np.ndarray, x: Array) -> None:
        """Put the contents of `host` into `x`, unless they are there already."""
        if self._backend.on_host and np.may_share_memory(host, x):
            return
        x[...] = self._backend.from_host(host.reshape(x.shape))

    def _call(self, name: str, wait: bool, *arguments: Any) -> MPI.Request | None:
        """A collective of the communicator: at once when `wait`, else its non-blocking form."""
        if wait:
            getattr(self._comm, name)(*arguments)
            return None
        request: MPI.Request = getattr(self._comm, "I" + name.lower())(*arguments)
        return request

    def _pieces(self, size: int, bytes_each: int) -> list[tuple[int, int]]:
        """Ranges of at most `message_limit` bytes that cover `size` items of `bytes_each`."""
        count = max(1, self._limit // max(1, bytes_each))
        return [(a, min(a + count, size)) for a in range(0, max(size, 1), count)]

    def _shares(self, size: int) -> list[int]:
        ranges = (split_range(size, self.size, rank) for rank in range(self.size))
        return [stop - start for start, stop in ranges]

    def _exchange(
        self,
        x: np.ndarray,
        counts: Sequence[int],
        out: np.ndarray,
        out_counts: Sequence[int],
        longest: int,
        wait: bool,
    ) -> Steps:
        """Alltoallv of raw bytes, cut so that no call passes the limit.

        longest: the largest count of any rank, so that all go round equally often.
        """
        stride = max(1, self._limit // (x.itemsize * self.size))
        if longest <= stride:
            yield self._call("Alltoallv", wait, runs(x, counts), runs(out, out_counts))
            return
        starts, out_starts = offsets(counts), offsets(out_counts)

        def piece(low: int) -> tuple[MPI.Request | None, Callable[[], None]]:
            # Packed, as displacements are 32-bit integers too.
            sizes, out_sizes = cut(counts, low, stride), cut(out_counts, low, stride)
            packed = pack(x, starts, sizes, low)
            arrived = np.empty(sum(out_sizes), dtype=out.dtype)
            request = self._call("Alltoallv", wait, runs(packed, sizes), runs(arrived, out_sizes))
            return request, lambda: unpack(arrived, out, out_starts, out_sizes, low)

        yield from self._in_pieces(piece, range(0, longest, stride), wait)

    def _collect(
        self, part: np.ndarray, out: np.ndarray, counts: Sequence[int], wait: bool
    ) -> Steps:
        """Allgatherv of raw bytes; the counts are known everywhere."""
        stride = max(1, self._limit // (out.itemsize * self.size))
        longest = max(counts)
        if longest <= stride:
            yield self._call("Allgatherv", wait, [part.view(np.uint8), MPI.BYTE], runs(out, counts))
            return
        starts = offsets(counts)

        def piece(low: int) -> tuple[MPI.Request | None, Callable[[], None]]:
            sizes = cut(counts, low, stride)
            mine = part[low : low + stride].view(np.uint8)
            arrived = np.empty(sum(sizes), dtype=out.dtype)
            request = self._call("Allgatherv", wait, [mine, MPI.BYTE], runs(arrived, sizes))
            return request, lambda: unpack(arrived, out, starts, sizes, low)

        yield from self._in_pieces(piece, range(0, longest, stride), wait)

    @staticmethod
    def _in_pieces(
        piece: Callable[[int], tuple[MPI.Request | None, Callable[[], None]]],
        lows: Iterable[int],
        wait: bool,
    ) -> Steps:
        """A call in pieces: `piece(low)` makes one, and gives its request and how to finish it.

        Of a call under way all pieces are made at once: then MPI alone can complete it, and no rank
        that is blocked elsewhere must be waited for to make the next one.
        """
        for made in map(piece, lows) if wait else [piece(low) for low in lows]:
            yield made[0]
            made[1]()

    def _allreduce(self, x: Array, op: Op, wait: bool) -> Steps:
        if self.size == 1 or x.size == 0:
            return
        host = self._to_host(x)
        if op == "sum" and self._reduction == "ordered":
            yield from self._ordered_sum(host, wait)
        elif is_half(host.dtype):
            wide = host.astype(np.float32)
            yield from self._library(wide, op, wait)
            host = wide.astype(host.dtype)
        else:
            yield from self._library(host, op, wait)
        self._put_back(host, x)

    def _library(self, host: np.ndarray, op: Op, wait: bool) -> Steps:
        calls = (
            self._call("Allreduce", wait, MPI.IN_PLACE, host[a:b], _MPI_OPS[op])
            for a, b in self._pieces(host.size, host.itemsize)
        )
        yield from calls if wait else list(calls)

    def _ordered_sum(self, host: np.ndarray, wait: bool) -> Steps:
        window = self._shared.window(host, host.nbytes)
        if window is not None:
            yield from self._shared.allreduce(window, host, wait)
            return
        if wait and self._shared.stages(host.nbytes):
            self._shared.staged_allreduce(host)
            return
        if self.size == 2 or host.nbytes * self.size <= _GATHER_LIMIT:
            everything = self._parts.take(self.size * host.size, host.dtype)
            yield from self._collect(host, everything, [host.size] * self.size, wait)
            add_up(list(everything.reshape(self.size, -1)), [host])
            return
        shares = self._shares(host.size)
        mine = np.empty(shares[self.rank], dtype=host.dtype)
        yield from self._ordered_slice(host, mine, shares, wait)
        yield from self._collect(mine, host, shares, wait)

    def _ordered_slice(
        self, host: np.ndarray, mine: np.ndarray, shares: Sequence[int], wait: bool
    ) -> Steps:
        parts = self._parts.take(self.size * mine.size, host.dtype)
        yield from self._exchange(host, shares, parts, [mine.size] * self.size, max(shares), wait)
        add_up(list(parts.reshape(self.size, -1)), [mine])

    def _reduce_scatter(
        self, x: Array, out: Array, counts: Sequence[int] | None, wait: bool
    ) -> Steps:
        shares = self._shares(x.size) if counts is None else counts
        _check(out, shares[self.rank], "out", x.dtype)
        _check(x, sum(shares), "x")
        if self.size == 1:
            if not (self._backend.on_host and np.may_share_memory(x, out)):
                out[...] = x
            return
        host = self._to_host(x)
        if self._reduction == "ordered":
            mine = self._place(out, host, sum(shares[: self.rank]))
            window = self._shared.window(host, host.nbytes)
            if window is not None:
                yield from self._shared.reduce_scatter(window, host, mine, shares, wait)
            elif wait and self._shared.stages(host.nbytes):
                self._shared.staged_reduce_scatter(host, mine, shares)
            else:
                yield from self._ordered_slice(host, mine, shares, wait)
        else:
            total = host.astype(np.float32 if is_half(host.dtype) else host.dtype)
            yield from self._library(total, "sum", wait)
            start = sum(shares[: self.rank])
            mine = total[start : start + shares[self.rank]].astype(host.dtype)
        self._put_back(mine, out)

    def _allgather(
        self, part: Array, out: Array, counts: Sequence[int] | None, wait: bool
    ) -> Steps:
        shares = self._shares(out.size) if counts is None else counts
        _check(part, shares[self.rank], "part")
        _check(out, sum(shares), "out", part.dtype)
        if self.size == 1:
            out[...] = part
            return
        mine = self._to_host(part)
        window = self._shared.window(mine, out.nbytes)
        if window is not None or (wait and self._shared.stages(out.nbytes)):
            host = self._place(out, mine, -sum(shares[: self.rank]))
            if window is not None:
                yield from self._shared.allgather(window, mine, host, shares, wait)
            else:
                self._shared.staged_allgather(mine, host, shares)
        else:
            host = self._room(out)
            if np.may_share_memory(mine, host):  # a slice of `out`: MPI's buffers must not overlap
                mine = mine.copy()
            yield from self._collect(mine, host, shares, wait)
        self._put_back(host, out)

    def _alltoall(
        self,
        x: Array,
        counts: Sequence[int],
        out: Array,
        out_counts: Sequence[int],
        wait: bool,
    ) -> Steps:
        _check(x, sum(counts), "x")
        _check(out, sum(out_counts), "out", x.dtype)
        if self.size == 1:
            out[...] = x
            return
        host = self._room(out)
        longest = np.array([max(*counts, *out_counts)], dtype=np.int64)
        yield self._call("Allreduce", wait, MPI.IN_PLACE, longest, MPI.MAX)
        yield from self._exchange(self._to_host(x), counts, host, out_counts, int(longest[0]), wait)
        self._put_back(host, out)

    def _broadcast(self, x: Array, root: int, wait: bool) -> Steps:
        if self.size == 1 or x.size == 0:
            return
        host = self._to_host(x) if self.rank == root else self._room(x)
        raw = host.view(np.uint8)
        for a, b in self._pieces(raw.size, 1):
            yield self._call("Bcast", wait, [raw[a:b], MPI.BYTE], root)
        if self.rank != root:
            self._put_back(host, x)

    def _message(self, what: Literal["send", "recv"], x: Array, peer: int, tag: int) -> Steps:
        host = self._to_host(x) if what == "send" else self._room(x)
        raw = host.view(np.uint8)
        call = self._comm.Isend if what == "send" else self._comm.Irecv
        # All at once: MPI keeps the order of what is posted under one tag, and the pieces of
        # another message must not come between them.
        pieces = self._pieces(raw.size, 1)
        yield from [call([raw[a:b], MPI.BYTE], peer, tag) for a, b in pieces]
        if what == "recv":
            self._put_back(host, x)


def _check(x: Array, size: int, name: str, dtype: Any = None) -> None:
    """ValueError for a buffer of another size or dtype: MPI moves bytes and would not notice."""
    if x.size != size or (dtype is not None and x.dtype != dtype):
        expected = f"{size} elements" + ("" if dtype is None else f" of {dtype}")
        raise ValueError(f"{name} has {x.size} elements of {x.dtype}, expected {expected}")
