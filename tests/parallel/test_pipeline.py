"""The executor on toy stages: what comes out, in which order, and how much is held meanwhile."""

from __future__ import annotations

import weakref
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest

from mpillm.array.backend import Backend
from mpillm.parallel.group import Group
from mpillm.parallel.pipeline import Executor
from mpillm.parallel.programs import Compute, lower
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.schedules import (
    SCHEDULES,
    Action,
    Actions,
    Kind,
    forward_only,
    peak_activations,
)

Arrays = tuple[Any, ...]

# 1f1b runs one chunk a rank.
TRAINING = pytest.mark.parametrize(
    ("name", "chunks"), [("gpipe", 1), ("1f1b", 1), ("gpipe", 2), ("gpipe", 3)]
)


@dataclass(frozen=True)
class Micro:
    """A micro-batch of some rows; of each, `arrays` arrays cross every cut."""

    number: int
    arrays: int

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        rows = 1 + self.number % 3
        return ((rows, 3), (0, rows), (2, rows, 2), ())[: self.arrays]

    def inputs(self) -> Arrays:
        """What the first stage makes of it."""
        draw = np.random.default_rng([7, self.number])
        return tuple(np.asarray(draw.uniform(0.1, 0.9, size=shape)) for shape in self.shapes)


def d_outputs(arrays: int) -> Arrays:
    """What the backward passes of the last stage begin with."""
    return tuple(0.25 * (1 + place) for place in range(arrays))


def forward(number: int, inputs: Arrays) -> Arrays:
    """y = a x (1 - x) with the stage's own a <= 4, which keeps x between 0 and 1."""
    return tuple(slope(number) * x * (1.0 - x) for x in inputs)


def backward(number: int, gradients: Arrays, inputs: Arrays) -> Arrays:
    """dx = dy a (1 - 2 x): it takes the inputs of its own micro-batch to come out right."""
    pairs = zip(gradients, inputs, strict=True)
    return tuple(dy * slope(number) * (1.0 - 2.0 * x) for dy, x in pairs)


def slope(number: int) -> float:
    return 4.0 - 1.0 / (2.0 + number)


def reference(micro: Micro, stages: int) -> tuple[Arrays, Arrays]:
    """Outputs of the last stage and gradients that the first one finds, computed in one place."""
    kept, x = [], micro.inputs()
    for number in range(stages):
        kept.append(x)
        x = forward(number, x)
    gradients = d_outputs(micro.arrays)
    for number in reversed(range(stages)):
        gradients = backward(number, gradients, kept[number])
    return x, gradients


@dataclass(eq=False)
class Saved:
    """What a stage keeps for the backward pass."""

    inputs: Arrays
    micro: Micro


@dataclass
class Ledger:
    """Everything saved on this rank that anyone still holds."""

    held: weakref.WeakSet[Saved] = field(default_factory=weakref.WeakSet)
    peak: int = 0

    def add(self, saved: Saved) -> None:
        self.held.add(saved)
        self.peak = max(self.peak, len(self.held))


class Stage:
    """A stage of the toy model."""

    def __init__(self, number: int, backend: Backend, ledger: Ledger) -> None:
        self.number = number
        self.backend = backend
        self.ledger = ledger
        self.gradients: dict[int, Arrays] = {}

    def forward(self, inputs: Arrays, micro: Micro) -> tuple[Arrays, Saved]:
        assert len(inputs) == (0 if self.number == 0 else micro.arrays)
        if self.number == 0:
            inputs = tuple(self.backend.from_host(x) for x in micro.inputs())
        saved = Saved(inputs, micro)
        self.ledger.add(saved)
        return forward(self.number, inputs), saved

    def backward(self, d_outputs: Arrays, saved: Saved, micro: Micro) -> Arrays:
        assert saved.micro is micro
        self.gradients[micro.number] = backward(self.number, d_outputs, saved.inputs)
        return self.gradients[micro.number]


class Run:
    """A schedule run with all ranks as a pipeline."""

    def __init__(
        self,
        world: Any,
        actions: Actions,
        chunks: int = 1,
        arrays: int = 1,
        *,
        backend: str = "numpy",
        limit: int = 1 << 30,
    ) -> None:
        self.world = world
        self.backend = Backend.create(backend)
        self.recorder = Recorder()
        self.ledger = Ledger()
        self.after: list[tuple[int, int]] = []
        self.micros = [Micro(j, arrays) for j in range(1 + max(a.micro for a in actions[0]))]
        self.stages = [
            Stage(chunk * world.size + world.rank, self.backend, self.ledger)
            for chunk in range(chunks)
        ]
        pipe = Group(world, "pipe", self.backend, self.recorder, message_limit=limit)
        executor = Executor(
            pipe,
            self.stages,
            lambda micro: tuple((shape, "float64") for shape in micro.shapes),
            self.backend,
        )
        self.outputs = executor.run(
            lower(actions, chunks)[world.rank],
            self.micros,
            d_outputs(arrays),
            lambda micro, chunk: self.after.append((micro, chunk)),
        )

    def check_outputs(self) -> None:
        """The last rank, and no other, has the last stage's outputs of every micro-batch."""
        if self.world.rank < self.world.size - 1:
            assert self.outputs == {}
            return
        assert sorted(self.outputs) == [micro.number for micro in self.micros]
        for micro in self.micros:
            expected, _ = reference(micro, len(self.stages) * self.world.size)
            self._check(self.outputs[micro.number], expected)

    def check_gradients(self) -> None:
        """The first stage has found every micro-batch's gradient."""
        if self.world.rank == 0:
            assert sorted(self.stages[0].gradients) == [micro.number for micro in self.micros]
            for micro in self.micros:
                _, expected = reference(micro, len(self.stages) * self.world.size)
                self._check(self.stages[0].gradients[micro.number], expected)

    def _check(self, found: Arrays, expected: Arrays) -> None:
        for x, y in zip(found, expected, strict=True):
            assert x.shape == y.shape
            assert (self.backend.to_host(x) == y).all()


def micro_counts(ranks: int) -> list[int]:
    return sorted({1, 2, ranks, 2 * ranks + 1})


@pytest.mark.parametrize("backend", ["numpy", "strict"])
@pytest.mark.parametrize("arrays", [1, 2, 4])
@TRAINING
def test_training(world: Any, name: str, chunks: int, arrays: int, backend: str) -> None:
    for micros in micro_counts(world.size):
        actions = SCHEDULES[name](world.size, micros, chunks)
        run = Run(world, actions, chunks, arrays, backend=backend)
        run.check_outputs()
        run.check_gradients()


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("arrays", [1, 4])
def test_forward_only(world: Any, chunks: int, arrays: int) -> None:
    for micros in micro_counts(world.size):
        run = Run(world, forward_only(world.size, micros, chunks), chunks, arrays)
        run.check_outputs()
        assert run.after == []


@TRAINING
def test_after_backward_is_called_in_the_order_of_the_schedule(
    world: Any, name: str, chunks: int
) -> None:
    for micros in micro_counts(world.size):
        actions = SCHEDULES[name](world.size, micros, chunks)
        run = Run(world, actions, chunks)
        backwards = [a for a in actions[world.rank] if a.kind is Kind.BACKWARD]
        assert run.after == [(a.micro, a.chunk) for a in backwards]
        for chunk in range(chunks):
            assert [micro for micro, of in run.after if of == chunk] == list(range(micros))


@TRAINING
def test_no_more_is_held_than_the_schedule_says(world: Any, name: str, chunks: int) -> None:
    for micros in micro_counts(world.size):
        actions = SCHEDULES[name](world.size, micros, chunks)
        run = Run(world, actions, chunks)
        assert run.ledger.peak == peak_activations(actions)[world.rank]
        assert not run.ledger.held
        if name == "1f1b":
            assert run.ledger.peak == min(micros, world.size - world.rank)


@pytest.mark.parametrize("limit", [8, 40, 1_000])
@pytest.mark.parametrize("arrays", [1, 4])
def test_messages_are_cut(world: Any, arrays: int, limit: int) -> None:
    """The arrays of a cut travel under one tag; their pieces must not mix."""
    run = Run(world, SCHEDULES["1f1b"](world.size, 3, 1), arrays=arrays, limit=limit)
    run.check_outputs()
    run.check_gradients()


def test_every_message_is_completed(world: Any) -> None:
    run = Run(world, SCHEDULES["1f1b"](world.size, 5, 1), arrays=2)
    neighbours = (world.rank > 0) + (world.rank < world.size - 1)
    calls = run.recorder.last()
    for op in (b"send", b"recv"):
        assert (calls["op"] == op).sum() == 2 * 5 * neighbours
    assert (calls["end"] > 0).all()


def test_a_weight_gradient_put_off_is_refused(world: Any) -> None:
    backend = Backend.create("numpy")
    pipe = Group(world, "pipe", backend, Recorder())
    executor = Executor(pipe, [Stage(0, backend, Ledger())], lambda _: (), backend)
    with pytest.raises(ValueError, match="no stage can run the weight_gradient of micro-batch 0"):
        executor.run((Compute(Action(Kind.WEIGHT_GRADIENT, 0)),), [Micro(0, 1)])
