"""Calls of a Group on a clock that tells waiting for other ranks from moving data.

Before a blocking collective there is a barrier, and while a rank is in it, it waits; what comes
then is communication. A collective under way is announced by a barrier of its own that is under
way, too: whoever must have the result waits until all have come, and from then on data move. A
message has no such announcement: whoever is blocked in it waits.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from mpi4py import MPI

from mpillm.array.tally import WAITING, Clock, communication
from mpillm.parallel.recorder import Entry, Recorder
from mpillm.parallel.request import Request, Steps

__all__ = ["ClockedRequest", "apart"]


def apart(steps: Steps, clock: Clock, axis: str, barrier: Callable[[], None]) -> Steps:
    """The steps of a blocking collective, after waiting until all ranks have come to it."""
    with clock.during(WAITING):
        barrier()
    with clock.during(communication(axis)):
        yield from steps


class ClockedRequest(Request):
    """A call under way whose time is kept."""

    def __init__(
        self,
        steps: Steps,
        queue: deque[Request],
        recorder: Recorder,
        entry: Entry,
        clock: Clock,
        announce: Callable[[], MPI.Request] | None,
    ) -> None:
        """announce: begins a barrier of the group; None for a message."""
        self._clock = clock
        self._kind = communication(entry.axis)
        self._arrived: MPI.Request | None = None
        self._outer: str | None = None
        super().__init__(self._timed(steps, announce), queue, recorder, entry)

    def _timed(self, steps: Steps, announce: Callable[[], MPI.Request] | None) -> Steps:
        if announce is not None:
            self._arrived = announce()
        while True:
            with self._clock.during(self._kind):
                pending = next(steps, None)
            if pending is None:
                break
            yield pending
        if self._arrived is not None:
            yield self._arrived

    def test(self) -> bool:
        """As without a clock; time goes to moving, unless it is the time of somebody who waits."""
        if self._clock.kind == WAITING:
            return super().test()
        with self._clock.during(self._kind):
            return super().test()

    def block(self) -> None:
        """As without a clock; until `wait` returns, time goes to what is waited for."""
        super().block()
        if self._outer is None:
            self._outer = self._clock.kind
        head = self._queue[0] if self._queue else self
        moves = isinstance(head, ClockedRequest) and head._moves()
        self._clock.switch(self._kind if moves else WAITING)

    def wait(self) -> None:
        """As without a clock."""
        super().wait()
        if self._outer is not None:
            self._clock.switch(self._outer)
            self._outer = None

    def _moves(self) -> bool:
        """Whether all ranks have come, so that nothing is left to do but to move data."""
        return self._arrived is not None and self._arrived.Test()

    def _advance(self, wait: bool) -> bool:
        if super()._advance(wait=False):
            return True
        if not wait:
            return False
        if self._arrived is not None:
            self._arrived.Wait()
            self._clock.switch(self._kind)
        return super()._advance(wait=True)
