"""The executor on toy stages: what comes out, in which order, and what is held meanwhile."""

from __future__ import annotations

import time
import weakref
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
from program_text import TRAINING

from mpillm.array.backend import Backend
from mpillm.array.pool import Pool
from mpillm.parallel.group import Group
from mpillm.parallel.pipeline import Executor
from mpillm.parallel.programs import lower
from mpillm.parallel.progress import Progress
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.request import Request
from mpillm.parallel.schedules import (
    SCHEDULES,
    Action,
    Actions,
    Kind,
    forward_only,
    peak_activations,
)

Arrays = tuple[Any, ...]
Work = Callable[[], None]

EVERY = pytest.mark.parametrize(("name", "chunks"), TRAINING)

# How a stage treats arrays. "fresh": makes new ones. "through": hands on what it got, either way.
# "overwrite": writes the derivatives that it returns over those that it got. "saved": writes them
# over what it saved. All but the first leave results in the buffers of messages.
STYLES = {
    "fresh": ("fresh",),
    "through": ("fresh", "through", "through"),
    "all through": ("through",),
    "overwrite": ("overwrite",),
    "saved": ("saved",),
    "mixed": ("fresh", "through", "overwrite", "saved", "through"),
}


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


def forward(style: str, number: int, inputs: Arrays) -> Arrays:
    """y = a x (1 - x) with the stage's own a <= 4, which keeps x between 0 and 1."""
    if style == "through":
        return inputs
    return tuple(slope(number) * x * (1.0 - x) for x in inputs)


def backward(style: str, number: int, gradients: Arrays, inputs: Arrays) -> Arrays:
    """dx = dy a (1 - 2 x): it takes the inputs of its own micro-batch to come out right."""
    pairs = zip(gradients, inputs, strict=True)
    if style == "through":  # the first gradients are numbers
        return tuple(0.0 * x + dy if isinstance(dy, float) else dy for dy, x in pairs)
    return tuple(dy * slope(number) * (1.0 - 2.0 * x) for dy, x in pairs)


def slope(number: int) -> float:
    return 4.0 - 1.0 / (2.0 + number)


def style_of(styles: tuple[str, ...], number: int) -> str:
    return styles[number % len(styles)]


def reference(micro: Micro, stages: int, styles: tuple[str, ...]) -> tuple[Arrays, list[Any]]:
    """Outputs of the last stage, and (inputs, d_outputs, d_inputs) of every stage, in one place."""
    kept, x = [], micro.inputs()
    for number in range(stages):
        kept.append(x)
        x = forward(style_of(styles, number), number, x)
    gradients, facts = d_outputs(micro.arrays), []
    for number in reversed(range(stages)):
        before = gradients
        gradients = backward(style_of(styles, number), number, gradients, kept[number])
        facts.append((kept[number], before, gradients))
    return x, facts[::-1]


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

    def __init__(self, number: int, last: bool, style: str, backend: Backend, log: Log) -> None:
        self.number = number
        self.last = last
        self.style = style
        self.backend = backend
        self.log = log
        self.gradients: dict[int, Arrays] = {}
        self.weights: dict[int, Arrays] = {}

    def forward(self, inputs: Arrays, micro: Micro) -> tuple[Arrays, Saved]:
        assert len(inputs) == (0 if self.number == 0 else micro.arrays)
        if self.number == 0:
            inputs = tuple(self.backend.from_host(x) for x in micro.inputs())
        saved = Saved(inputs, micro)
        self.log.ledger.add(saved)
        return forward(self.style, self.number, inputs), saved

    def backward(
        self, d_outputs: Arrays, saved: Saved, micro: Micro, later: list[Work] | None = None
    ) -> Arrays:
        assert saved.micro is micro
        # The product of both stands for the gradient of a weight. A stage that overwrites either
        # must compute it before.
        held = saved.inputs, d_outputs
        if self.style in ("overwrite", "saved"):
            held = copies(saved.inputs), copies(d_outputs)

        def add_gradient() -> None:
            self.weights[micro.number] = tuple(x * dy for x, dy in zip(*held, strict=True))
            assert saved.micro is micro  # held until now

        def tell() -> None:
            assert micro.number in self.weights
            self.log.weights.append((micro.number, self.number))

        d_inputs = backward(self.style, self.number, d_outputs, saved.inputs)
        if self.style == "overwrite" and not self.last:
            d_inputs = written(d_outputs, d_inputs)
        elif self.style == "saved":
            d_inputs = written(saved.inputs, d_inputs)
        if later is None:
            add_gradient()
            tell()
        else:
            later += [add_gradient, tell]
        self.gradients[micro.number] = copies(d_inputs)
        return d_inputs


def copies(arrays: Arrays) -> Arrays:
    return tuple(x if isinstance(x, float) else x.copy() for x in arrays)


def written(places: Arrays, values: Arrays) -> Arrays:
    """The places, with the values written into them."""
    for place, value in zip(places, values, strict=True):
        place[...] = value
    return places


class Poison(Pool):
    """A pool that spoils what it is given, so that whoever still reads it is found out."""

    given = 0

    def give(self, array: Any) -> None:
        array[...] = float("nan")
        self.given += 1
        super().give(array)


class LateSend:
    """A send that reads its array only when it is polled for the third time, or waited for."""

    def __init__(self, post: Callable[[], Request]) -> None:
        self._post = post
        self._request: Request | None = None
        self._polls = 0

    @property
    def done(self) -> bool:
        return self._request is not None and self._request.done

    def test(self) -> bool:
        self._polls += 1
        if self._request is None and self._polls > 2:
            self._request = self._post()
        return self._request is not None and self._request.test()

    def block(self) -> None:
        if self._request is not None:
            self._request.block()

    def wait(self) -> None:
        self._request = self._request or self._post()
        self._request.wait()


class LateGroup(Group):
    """A group whose sends are late."""

    def isend(self, x: Any, peer: int, tag: int = 0) -> Any:
        return LateSend(lambda: super(LateGroup, self).isend(x, peer, tag))


@dataclass
class Log:
    """What the stages of a rank did."""

    ledger: Ledger = field(default_factory=Ledger)
    # (micro-batch, stage) of every weight gradient, in order.
    weights: list[tuple[int, int]] = field(default_factory=list)


class Run:
    """A schedule run with all ranks as a pipeline, some times over."""

    def __init__(
        self,
        world: Any,
        actions: Actions,
        chunks: int = 1,
        arrays: int = 1,
        *,
        backend: str = "numpy",
        limit: int = 1 << 30,
        style: str = "fresh",
        late: bool = False,
        progress: Progress | None = None,
        rounds: int = 1,
    ) -> None:
        self.world = world
        self.actions = actions[world.rank]
        self.styles = STYLES[style]
        self.total = chunks * world.size
        self.backend = Backend.create(backend)
        self.recorder = Recorder()
        self.log = Log()
        self.micros = [Micro(j, arrays) for j in range(1 + max(a.micro for a in actions[0]))]
        self.stages = [self._stage(chunk * world.size + world.rank) for chunk in range(chunks)]
        kind = LateGroup if late else Group
        self.executor = Executor(
            kind(world, "pipe", self.backend, self.recorder, message_limit=limit),
            self.stages,
            lambda micro: tuple((shape, "float64") for shape in micro.shapes),
            self.backend,
            progress,
        )
        self.pool = Poison(self.backend)
        self.executor.buffers = self.pool
        self.timeline: list[tuple[Action, float, float]] = []
        self.made: list[int] = []
        self.program = lower(actions, chunks)[world.rank]
        for _ in range(rounds):
            self.again()

    def _stage(self, number: int) -> Stage:
        last = number == self.total - 1
        return Stage(number, last, style_of(self.styles, number), self.backend, self.log)

    def again(self) -> None:
        self.outputs = self.executor.run(
            self.program, self.micros, d_outputs(self.micros[0].arrays), timeline=self.timeline
        )
        self.made.append(self.pool.made)

    def check_outputs(self) -> None:
        """The last rank, and no other, has the last stage's outputs of every micro-batch."""
        if self.world.rank < self.world.size - 1:
            assert self.outputs == {}
            return
        assert sorted(self.outputs) == [micro.number for micro in self.micros]
        for micro in self.micros:
            expected, _ = reference(micro, self.total, self.styles)
            self._check(self.outputs[micro.number], expected)

    def check_gradients(self) -> None:
        """Every stage has found every micro-batch's gradients."""
        for stage in self.stages:
            for found in (stage.gradients, stage.weights):
                assert sorted(found) == [micro.number for micro in self.micros]
            for micro in self.micros:
                _, facts = reference(micro, self.total, self.styles)
                inputs, above, below = facts[stage.number]
                self._check(stage.gradients[micro.number], below)
                weights = tuple(x * dy for x, dy in zip(inputs, above, strict=True))
                self._check(stage.weights[micro.number], weights)

    def check_buffers(self) -> None:
        """Every message's buffer went back to the pool, and later rounds took no new ones."""
        assert self.pool.given == (self.recorder.last()["op"] == b"recv").sum()
        assert set(self.made) == {self.pool.made}

    def _check(self, found: Arrays, expected: Arrays) -> None:
        for x, y in zip(found, expected, strict=True):
            assert x.shape == y.shape
            assert (self.backend.to_host(x) == y).all()


def micro_counts(ranks: int) -> list[int]:
    return sorted({1, 2, ranks, 2 * ranks + 1})


@pytest.mark.parametrize("backend", ["numpy", "strict"])
@pytest.mark.parametrize("arrays", [1, 2, 4])
@EVERY
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
        assert run.log.weights == []


# --- weight gradients ----------------------------------------------------------------------------


@EVERY
def test_weight_gradients_come_in_the_order_of_the_schedule(
    world: Any, name: str, chunks: int
) -> None:
    kind = Kind.WEIGHT_GRADIENT if name == "zero-bubble" else Kind.BACKWARD
    for micros in micro_counts(world.size):
        actions = SCHEDULES[name](world.size, micros, chunks)
        run = Run(world, actions, chunks)
        expected = [
            (a.micro, a.chunk * world.size + world.rank) for a in run.actions if a.kind is kind
        ]
        assert run.log.weights == expected
        for stage in run.stages:
            assert [j for j, of in expected if of == stage.number] == list(range(micros))


@EVERY
def test_no_more_is_held_than_the_schedule_says(world: Any, name: str, chunks: int) -> None:
    for micros in micro_counts(world.size):
        actions = SCHEDULES[name](world.size, micros, chunks)
        run = Run(world, actions, chunks)
        assert run.log.ledger.peak == peak_activations(actions)[world.rank]
        assert not run.log.ledger.held
        if name in ("1f1b", "zero-bubble"):
            rank = world.rank if name == "1f1b" else 0
            assert run.log.ledger.peak == min(micros, world.size - rank)


# --- message buffers -----------------------------------------------------------------------------


@pytest.mark.parametrize("late", [False, True], ids=["", "late sends"])
@pytest.mark.parametrize("style", STYLES)
@EVERY
def test_buffers_are_left_alone_while_anyone_reads_them(
    world: Any, name: str, chunks: int, style: str, late: bool
) -> None:
    actions = SCHEDULES[name](world.size, 2 * world.size + 1, chunks)
    run = Run(world, actions, chunks, arrays=3, style=style, late=late)
    run.check_outputs()
    run.check_gradients()


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("style", STYLES)
def test_results_are_the_callers_own(world: Any, chunks: int, style: str) -> None:
    actions = forward_only(world.size, 2 * world.size + 1, chunks)
    run = Run(world, actions, chunks, arrays=3, style=style, rounds=3, late=True)
    run.check_outputs()
    run.check_buffers()


@EVERY
def test_after_the_first_step_no_buffer_is_made(world: Any, name: str, chunks: int) -> None:
    actions = SCHEDULES[name](world.size, 2 * world.size + 1, chunks)
    run = Run(world, actions, chunks, arrays=2, style="mixed", late=True, rounds=3)
    run.check_gradients()
    run.check_buffers()
    assert (run.pool.made > 0) == (world.size > 1)


@pytest.mark.parametrize("name", ["1f1b", "zero-bubble"])
def test_more_micro_batches_take_no_more_buffers(world: Any, name: str) -> None:
    # Three shapes come in turn, so that pools are compared after whole turns.
    few, many = (
        Run(world, SCHEDULES[name](world.size, count * 3 * world.size, 1)) for count in (1, 4)
    )
    assert many.pool.made <= few.pool.made + 3
    held = peak_activations(SCHEDULES[name](world.size, 3 * world.size, 1))[world.rank]
    assert many.pool.made <= 3 * 2 * (held + 2)


# --- messages ------------------------------------------------------------------------------------


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


class Endless:
    """A call under way that never ends; counts how often it is asked."""

    done = False
    asked = 0

    def test(self) -> bool:
        self.asked += 1
        return False


def test_other_calls_under_way_go_on(world: Any) -> None:
    """They are polled after every action, and while a message is waited for."""
    alone = world.Split(world.rank)
    progress, other = Progress(), Endless()
    progress.watch(other)  # type: ignore[arg-type]
    run = Run(alone, SCHEDULES["zero-bubble"](1, 3, 1), progress=progress)
    assert other.asked >= len(run.actions)
    alone.Free()

    run = Run(world, forward_only(world.size, 1, 1), progress=progress)
    before = other.asked
    if world.rank == 0:
        time.sleep(0.05)
    run.again()
    if world.rank > 0:  # it has waited for the one that slept
        assert other.asked > before + 10


# --- the clock -----------------------------------------------------------------------------------


@EVERY
def test_the_timeline_has_every_action(world: Any, name: str, chunks: int) -> None:
    actions = SCHEDULES[name](world.size, 3, chunks)
    begin = time.perf_counter()
    run = Run(world, actions, chunks)
    end = time.perf_counter()
    assert [action for action, _, _ in run.timeline] == list(run.actions)
    times = [at for _, start, stop in run.timeline for at in (start, stop)]
    assert times == sorted(times)
    assert begin <= times[0] and times[-1] <= end
