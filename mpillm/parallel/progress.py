"""Who drives the calls that are under way."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from mpillm.parallel.recorder import Recorder
    from mpillm.parallel.request import Request

__all__ = ["Progress"]


class Progress:
    """The calls under way of a process, driven on by `poll` from between computations.

    Most MPI libraries move a message only while some call of theirs runs, and a call of several
    steps goes on only when it is asked. So whoever computes polls, and whoever waits lets all the
    others go on meanwhile.
    """

    def __init__(self, recorder: Recorder | None = None) -> None:
        """recorder: told of every poll, which only a process that gets on makes."""
        self._recorder = recorder
        self._requests: list[Request] = []

    def watch(self, request: Request) -> Request:
        """Drive on a call from now on, until it is complete; returns it."""
        if not request.done:
            self._requests.append(request)
        return request

    def poll(self) -> None:
        """Let every call make what progress it can."""
        if self._recorder is not None:
            self._recorder.poll()
        self._drive()

    def wait(self, request: Request) -> None:
        """Complete a call, and drive on the others meanwhile."""
        self._drive()
        while not request.done and any(other is not request for other in self._requests):
            request.block()
            request.test()
            self._drive()
            # Where there are more ranks than cores, the one that is waited for may need this one.
            os.sched_yield()
        request.wait()

    def _drive(self) -> None:
        if self._requests:
            self._requests = [request for request in self._requests if not request.test()]
