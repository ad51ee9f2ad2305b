"""The one executor of lowered schedules: it does what a rank's program says, and nothing else."""

from __future__ import annotations

import time
from collections import Counter, defaultdict
from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mpillm.array.backend import Backend
from mpillm.array.pool import Pool
from mpillm.parallel.group import Group
from mpillm.parallel.instructions import (
    Compute,
    Direction,
    Message,
    Program,
    Receive,
    Send,
    Wait,
)
from mpillm.parallel.progress import Progress
from mpillm.parallel.request import Request
from mpillm.parallel.schedules import Action, Kind
from mpillm.parallel.walk import Span

__all__ = ["Executor", "PipelineStage"]

Arrays = tuple[Any, ...]
Spec = tuple[tuple[int, ...], Any]
Work = Callable[[], None]


class PipelineStage(Protocol):
    """What the executor asks of a stage."""

    def forward(self, inputs: Arrays, micro: Any) -> tuple[Arrays, Any]:
        """Returns (outputs, saved)."""
        ...

    def backward(
        self, d_outputs: Arrays, saved: Any, micro: Any, later: list[Work] | None = None
    ) -> Arrays:
        """Returns the derivatives by the inputs.

        With `later`, appends the work for weight gradients to it in place of doing it.
        """
        ...


class Executor:
    """Runs programs on this rank's stages.

    pipe: the ranks of the pipeline. stages: this rank's, by chunk. boundary: the shapes and dtypes
    of the arrays that cross a cut for a micro-batch; gradients that come back have the same.
    progress: the calls under way, driven on between actions and while a message is waited for.
    """

    def __init__(
        self,
        pipe: Group,
        stages: Sequence[PipelineStage],
        boundary: Callable[[Any], tuple[Spec, ...]],
        backend: Backend,
        progress: Progress | None = None,
    ) -> None:
        self._pipe = pipe
        self._stages = stages
        self._boundary = boundary
        self._backend = backend
        self._progress = progress or Progress()
        self.buffers = Pool(backend)  # that messages are received into

    def run(
        self,
        program: Program,
        micros: Sequence[Any],
        d_outputs: Arrays = (),
        timeline: list[Span] | None = None,
    ) -> dict[int, Arrays]:
        """Run one program over `micros` and return the last stage's outputs by micro-batch number.

        The result is empty on the other ranks. `d_outputs` is what every backward pass of the last
        stage begins with, so a layer must not overwrite it. All actions are appended to
        `timeline` with their times by `time.perf_counter`; on a device each is then waited for.
        """
        return _Run(self, program, micros, d_outputs, timeline).obey(program)


class _Run:
    """The arrays and requests that one run of a program holds.

    A place, here, is a micro-batch in a chunk. The buffers that its messages were received into go
    back to the pool when nothing can refer to them any more: what is saved for the backward pass
    may, so may a weight gradient that is put off, and a layer may hand on its input, or overwrite
    the derivatives that it got and hand on those. Hence all of them are kept until the last action
    of the place is done and all that it sends is away.
    """

    def __init__(
        self,
        executor: Executor,
        program: Program,
        micros: Sequence[Any],
        d_outputs: Arrays,
        timeline: list[Span] | None,
    ) -> None:
        self._pipe = executor._pipe
        self._stages = executor._stages
        self._boundary = executor._boundary
        self._backend = executor._backend
        self._progress = executor._progress
        self._buffers = executor.buffers
        self._micros = micros
        self._d_outputs = d_outputs
        self._timeline = timeline
        self._saved: dict[tuple[int, int], Any] = {}
        self._later: dict[tuple[int, int], list[Work]] = {}
        # Inputs of actions that are to come, and outputs that are still to be sent.
        self._inbox: dict[Action, Arrays] = {}
        self._outbox: dict[Action, Arrays] = {}
        self._requests: dict[tuple[Message, Direction], list[Request]] = {}
        self._results: dict[int, Arrays] = {}
        # By place: the buffers received, and the actions and sends that are to be completed.
        self._received: defaultdict[tuple[int, int], list[Any]] = defaultdict(list)
        self._uses: Counter[tuple[int, int]] = Counter()
        self._split: set[int] = set()  # chunks whose weight gradients are actions of their own
        for step in program:
            if isinstance(step, Compute):
                self._uses[step.action.micro, step.action.chunk] += 1
                if step.action.kind is Kind.WEIGHT_GRADIENT:
                    self._split.add(step.action.chunk)
            elif isinstance(step, Send):
                self._uses[step.message.micro, step.message.source_chunk] += 1

    def obey(self, program: Program) -> dict[int, Arrays]:
        for step in program:
            if isinstance(step, Compute):
                self._compute(step.action)
                self._progress.poll()
            elif isinstance(step, Receive):
                self._receive(step.message)
            elif isinstance(step, Send):
                self._send(step.message)
            elif isinstance(step, Wait):
                self._wait(step.message, step.direction)
        return self._results

    # -- actions ---------------------------------------------------------------------------------

    def _compute(self, action: Action) -> None:
        run = {
            Kind.FORWARD: self._forward,
            Kind.BACKWARD: self._backward,
            Kind.WEIGHT_GRADIENT: self._weight_gradient,
        }[action.kind]
        start = time.perf_counter()
        run(action)
        if self._timeline is not None:
            self._backend.synchronize()
            self._timeline.append(Span(action, start, time.perf_counter()))
        self._used(action.micro, action.chunk)

    def _forward(self, action: Action) -> None:
        place = action.micro, action.chunk
        stage, micro = self._stages[action.chunk], self._micros[action.micro]
        outputs, self._saved[place] = stage.forward(self._inbox.pop(action, ()), micro)
        if self._is_last(action.chunk):
            self._results[action.micro] = tuple(self._own(array, place) for array in outputs)
        else:
            self._hand_on(action, outputs, 1)

    def _backward(self, action: Action) -> None:
        place = action.micro, action.chunk
        stage, micro = self._stages[action.chunk], self._micros[action.micro]
        d_outputs, saved = self._inbox.pop(action, self._d_outputs), self._saved.pop(place)
        if action.chunk in self._split:
            d_inputs = stage.backward(d_outputs, saved, micro, self._later.setdefault(place, []))
        else:
            d_inputs = stage.backward(d_outputs, saved, micro)
        if not self._is_first(action.chunk):
            self._hand_on(action, d_inputs, -1)

    def _weight_gradient(self, action: Action) -> None:
        works = self._later.pop((action.micro, action.chunk))
        works.reverse()
        while works:  # what a piece of work holds is freed before the next one
            works.pop()()
            self._progress.poll()

    def _is_first(self, chunk: int) -> bool:
        return chunk == 0 and self._pipe.rank == 0

    def _is_last(self, chunk: int) -> bool:
        return chunk == len(self._stages) - 1 and self._pipe.rank == self._pipe.size - 1

    def _own(self, array: Any, place: tuple[int, int]) -> Any:
        """A result, which the caller keeps: a copy where it lies in a buffer of a message."""
        shared = self._backend.xp.may_share_memory
        if any(shared(array, buffer) for buffer in self._received[place]):
            return array.copy()
        return array

    def _hand_on(self, action: Action, arrays: Arrays, step: int) -> None:
        """Keep a result for the next stage: for sending, or on one rank for its next chunk."""
        if self._pipe.size == 1:
            self._inbox[Action(action.kind, action.micro, action.chunk + step)] = arrays
        else:
            self._outbox[action] = arrays

    # -- messages --------------------------------------------------------------------------------

    def _send(self, message: Message) -> None:
        arrays = self._outbox.pop(message.maker)
        self._post(message, "send", [(self._pipe.isend, array) for array in arrays])

    def _receive(self, message: Message) -> None:
        specs = self._boundary(self._micros[message.micro])
        arrays = tuple(self._buffers.take(shape, dtype) for shape, dtype in specs)
        self._inbox[message.taker] = arrays
        self._received[message.micro, message.chunk] += arrays
        self._post(message, "receive", [(self._pipe.irecv, array) for array in arrays])

    def _post(
        self,
        message: Message,
        direction: Direction,
        calls: list[tuple[Callable[..., Request], Any]],
    ) -> None:
        peer = message.target if direction == "send" else message.source
        self._requests[message, direction] = [
            self._progress.watch(call(array, peer, message.tag)) for call, array in calls
        ]

    def _wait(self, message: Message, direction: Direction) -> None:
        for request in self._requests.pop((message, direction)):
            self._progress.wait(request)
        if direction == "send":
            self._used(message.micro, message.source_chunk)

    def _used(self, micro: int, chunk: int) -> None:
        """One use less of what a place holds; after the last one its buffers are free."""
        place = micro, chunk
        self._uses[place] -= 1
        if not self._uses[place]:
            for buffer in self._received.pop(place, ()):
                self._buffers.give(buffer)
