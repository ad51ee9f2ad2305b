"""Calls under way: steps of MPI requests, taken one after another."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator

from mpi4py import MPI

from mpillm.parallel.recorder import Entry, Recorder

__all__ = ["Request", "Steps"]

# The MPI requests of a call, in the order in which they are waited for. The blocking form of a call
# has none to give and yields None; a call that is under way must not.
Steps = Generator["MPI.Request | None", None, None]


class Request:
    """A call under way. `test` makes progress and tells whether it is complete; `wait` waits.

    The calls of one queue take their steps one after another, in the order in which they were
    made: MPI pairs a communicator's collectives by their order on each rank, which must not depend
    on how often a rank has polled. All ranks should complete them in that order, too: unlike MPI's
    own, a call of several steps goes on only while every rank waits for it or polls.
    """

    def __init__(
        self, steps: Steps, queue: deque[Request], recorder: Recorder, entry: Entry | None
    ) -> None:
        """entry: the call's in the recorder, which is told of its end; None: it has none."""
        self._steps = steps
        self._queue = queue
        self._recorder = recorder
        self._entry = entry
        self._pending: MPI.Request | None = MPI.REQUEST_NULL  # complete, so that steps can begin
        self.done = False
        queue.append(self)
        self.test()

    def test(self) -> bool:
        """Whether the call is complete; also lets MPI progress."""
        while self._queue and self._queue[0]._advance(wait=False):
            self._queue.popleft()
        return self.done

    def wait(self) -> None:
        """Block until the call, and those before it in its queue, are complete."""
        while not self.done:
            self.block()
            self._queue[0]._advance(wait=True)
            self._queue.popleft()

    def block(self) -> None:
        """Note that this rank goes on only when the call, or the one before it, is complete."""
        if self._queue and (entry := self._queue[0]._entry) is not None:
            self._recorder.wait(entry)

    def _advance(self, wait: bool) -> bool:
        """Take the steps that can be taken, or all; whether the call is complete."""
        while self._pending is not None:
            if wait:
                self._pending.Wait()
            elif not self._pending.Test():
                return False
            self._pending = next(self._steps, None)
        self.done = True
        if self._entry is not None:
            self._recorder.end(self._entry)
        return True
