"""The one executor of lowered schedules: it does what a rank's program says, and nothing else."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any, Protocol

from mpillm.array.backend import Backend
from mpillm.parallel.group import Group
from mpillm.parallel.programs import (
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

__all__ = ["Executor", "PipelineStage"]

Arrays = tuple[Any, ...]
Spec = tuple[tuple[int, ...], Any]


class PipelineStage(Protocol):
    """What the executor asks of a stage."""

    def forward(self, inputs: Arrays, micro: Any) -> tuple[Arrays, Any]:
        """Returns (outputs, saved)."""
        ...

    def backward(self, d_outputs: Arrays, saved: Any, micro: Any) -> Arrays:
        """Returns the derivatives by the inputs."""
        ...


class Executor:
    """Runs programs on this rank's stages.

    pipe: the ranks of the pipeline. stages: this rank's, by chunk. boundary: the shapes and dtypes
    of the arrays that cross a cut for a micro-batch; gradients that come back have the same.
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
        self._progress = progress or Progress()
        self._stages = stages
        self._boundary = boundary
        self._backend = backend

    def run(
        self,
        program: Program,
        micros: Sequence[Any],
        d_outputs: Arrays = (),
        after_backward: Callable[[int, int], None] | None = None,
    ) -> dict[int, Arrays]:
        """Run one program over `micros` and return the last stage's outputs by micro-batch number.

        The result is empty on the other ranks. `d_outputs` is what every backward pass of the last
        stage begins with, so a layer must not overwrite it; `after_backward(micro, chunk)` is
        called after each backward pass.
        """
        return _Run(self, micros, d_outputs, after_backward).obey(program)


class _Run:
    """The arrays and requests that one run of a program holds."""

    def __init__(
        self,
        executor: Executor,
        micros: Sequence[Any],
        d_outputs: Arrays,
        after_backward: Callable[[int, int], None] | None,
    ) -> None:
        self._pipe = executor._pipe
        self._stages = executor._stages
        self._boundary = executor._boundary
        self._backend = executor._backend
        self._micros = micros
        self._d_outputs = d_outputs
        self._after_backward = after_backward
        self._saved: dict[tuple[int, int], Any] = {}
        # Inputs of actions that are to come, and outputs that are still to be sent.
        self._inbox: dict[Action, Arrays] = {}
        self._outbox: dict[Action, Arrays] = {}
        self._requests: dict[tuple[Message, Direction], list[Request]] = {}
        self._results: dict[int, Arrays] = {}

    def obey(self, program: Program) -> dict[int, Arrays]:
        for step in program:
            if isinstance(step, Compute):
                self._compute(step.action)
                # Nothing moves on its own: MPI progresses when it is called.
                for requests in self._requests.values():
                    for request in requests:
                        request.test()
            elif isinstance(step, Receive):
                self._receive(step.message)
            elif isinstance(step, Send):
                self._send(step.message)
            elif isinstance(step, Wait):
                for request in self._requests.pop((step.message, step.direction)):
                    request.wait()
        return self._results

    def _compute(self, action: Action) -> None:
        stage, micro = self._stages[action.chunk], self._micros[action.micro]
        place = (action.micro, action.chunk)
        if action.kind is Kind.FORWARD:
            outputs, self._saved[place] = stage.forward(self._inbox.pop(action, ()), micro)
            if self._is_last(action.chunk):
                self._results[action.micro] = outputs
            else:
                self._hand_on(action, outputs, 1)
        elif action.kind is Kind.BACKWARD:
            d_outputs = self._inbox.pop(action, self._d_outputs)
            d_inputs = stage.backward(d_outputs, self._saved.pop(place), micro)
            if not self._is_first(action.chunk):
                self._hand_on(action, d_inputs, -1)
            if self._after_backward is not None:
                self._after_backward(action.micro, action.chunk)
        else:
            raise ValueError(f"no stage can run the {action}")

    def _is_first(self, chunk: int) -> bool:
        return chunk == 0 and self._pipe.rank == 0

    def _is_last(self, chunk: int) -> bool:
        return chunk == len(self._stages) - 1 and self._pipe.rank == self._pipe.size - 1

    def _hand_on(self, action: Action, arrays: Arrays, step: int) -> None:
        """Keep a result for the next stage: for sending, or on one rank for its next chunk."""
        if self._pipe.size == 1:
            self._inbox[Action(action.kind, action.micro, action.chunk + step)] = arrays
        else:
            self._outbox[action] = arrays

    def _send(self, message: Message) -> None:
        arrays = self._outbox.pop(_action(message, message.source_chunk))
        self._requests[message, "send"] = [
            self._pipe.isend(array, message.target, message.tag) for array in arrays
        ]

    def _receive(self, message: Message) -> None:
        arrays = tuple(
            self._backend.empty(shape, dtype)
            for shape, dtype in self._boundary(self._micros[message.micro])
        )
        self._inbox[_action(message, message.chunk)] = arrays
        self._requests[message, "receive"] = [
            self._pipe.irecv(array, message.source, message.tag) for array in arrays
        ]


def _action(message: Message, chunk: int) -> Action:
    """The action that made a message, or takes it."""
    kind = Kind.FORWARD if message.what == "activation" else Kind.BACKWARD
    return Action(kind, message.micro, chunk)
