"""Faults in numbers, put into real trainers, and what must come of each.

`mpirun -n N python tests/parallel/bad_numbers.py SEED ROUNDS pairs` runs a campaign: every fault so
many times in layouts, models and ways to train in which every two of them meet; with `all` in
place of `pairs` in all of them, with a number in so many. Rank 0 prints what came of it as JSON:
by kind of fault, how many there were and what was wrong.
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from typing import Any

import numpy as np
from mpi4py import MPI
from msgspec.structs import replace

from mpillm.array.backend import Backend
from mpillm.data.loader import Loader
from mpillm.errors import UserError
from mpillm.models.gpt2 import Settings
from mpillm.models.settings import build_model
from mpillm.nn.param import Param
from mpillm.parallel.covering import covering
from mpillm.parallel.layouts import factors, layout_text, layouts
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.batch import resolve_batch
from mpillm.training.replicas import check_replicas
from mpillm.training.settings import OptimizerSettings, TrainSettings
from mpillm.training.trainer import StepResult, Trainer

TEXT = np.random.default_rng(0).integers(0, 17, 600).astype(np.uint16)
MODEL = Settings(layers=3, heads=3, width=12, vocabulary=17, context=6, dropout=0.1)
MODELS = {
    "tied": MODEL,
    "untied": replace(MODEL, tied=False, bias=False),
    "experts": replace(MODEL, experts=3, expert_every=2, balance=0.1),
}
TRAIN = TrainSettings(batch_size=4, micro_batch_size=1, sequence_length=6, max_skipped=3)
TRAINS = {
    "plain": TRAIN,
    "deterministic": replace(TRAIN, deterministic=True, dtype="float64"),
    "recompute": replace(TRAIN, recompute="block"),
}
BAD = (np.nan, np.inf, -np.inf)

State = list[bytes]


@dataclass
class Run:
    """A trainer on all ranks of `world`, and a generator of the same choices on each."""

    world: MPI.Intracomm
    trainer: Trainer
    mesh: Mesh
    backend: Backend
    random: np.random.Generator

    def state(self) -> State:
        """The bytes of all weights and moments on this rank."""
        views = self.trainer.optimizer.state()
        return [self.backend.to_host(view).tobytes() for *_, view in views]

    def draw(self, count: int) -> int:
        """A number below `count`; alike on all ranks, whatever `count` is there."""
        return int(self.random.integers(1 << 30)) % count

    def choose(self, items: Sequence[Any]) -> Any:
        """The same item of equal lists on every rank."""
        return items[self.draw(len(items))]

    def on(self, rank: int) -> bool:
        return self.world.rank == rank

    def gathered(self, wrong: list[str]) -> list[str]:
        """What is wrong on any rank."""
        return [text for of_rank in self.world.allgather(wrong) for text in of_rank]

    def told(self, item: Any, rank: int) -> Any:
        """An object of one rank, on all."""
        return self.world.bcast(item, rank)


@contextmanager
def running(
    world: MPI.Intracomm,
    layout: ParallelSettings,
    model: Settings = MODEL,
    train: TrainSettings = TRAIN,
    *,
    seed: int = 0,
    backend: str = "numpy",
    clip: float = 1.0,
) -> Iterator[Run]:
    """A trainer under a layout that has done one step."""
    layout = fit(layout, world.size)
    train = resolve_batch(train, layout)
    device = Backend.create(backend)
    mesh = Mesh(world, layout, device, Recorder())
    sizes = train.sequence_length, train.batch_size, train.micro_batch_size
    loader = Loader(TEXT, *sizes, train.seed)
    optimizer = OptimizerSettings(lr=1e-3, warmup=1, clip=clip)
    trainer = Trainer(build_model(model), train, optimizer, mesh, device, loader)
    run = Run(world, trainer, mesh, device, np.random.default_rng(seed))
    assert trainer.step().skipped is None
    yield run
    mesh.free()


# -- faults: each is put in, undoes itself, and says what must be told ----------------------------


@dataclass
class Fault:
    """What must be told of a fault: parts of the text; whether weights are as they were."""

    parts: list[str]
    heal: Callable[[], None] = field(default=lambda: None)


def _rank_text(run: Run, rank: int) -> str:
    return f"rank {rank} ("


def _uses(run: Run) -> list[Param]:
    stores = [stage.store for stage in run.trainer.stages]
    uses = [use for store in stores for arena in store.arenas for us in arena.uses for use in us]
    return [use for use in uses if use.shard.size]


def gradient(run: Run, value: float | None = None) -> Fault:
    """A bad element in one gradient of one micro-batch, on one rank."""
    rank = run.draw(run.world.size)
    place = run.draw(len(run.trainer._numbers))
    # Of the copies that tensor ranks hold of a gradient the norm counts the owner's.
    uses = [use for use in _uses(run) if value is None or use.owner]
    value = value or run.choose(BAD)
    use = run.choose(uses)
    name, element = run.told((use.name, run.draw(use.shard.size)), rank)
    gradients = run.trainer.gradients
    done = gradients.layer_done
    stage = next(s for s in run.trainer.stages if use.arena in s.store.arenas)
    own = stage.layers[use.layer]

    def spoil(layer: Any, at: int) -> None:
        if at == place and layer is own:
            use.grad.reshape(-1)[element] = value
        done(layer, at)

    def heal() -> None:
        gradients.layer_done = done  # type: ignore[method-assign]

    if run.on(rank):
        gradients.layer_done = spoil  # type: ignore[method-assign]
    alone = run.mesh.layout.zero >= 2 and use.arena.zero >= 2
    alone = run.told(alone or run.trainer._train.deterministic, rank)
    numbers = run.told(list(run.trainer._numbers), rank)
    micros = f"micro-batch {numbers[place]} "
    if not alone and len(numbers) > 1:
        micros = f"micro-batches {numbers[0]} to {numbers[-1]} "
    what = f"first in the gradient of {name} from {micros}on {_rank_text(run, rank)}"
    return Fault([what], heal)


def weight(run: Run) -> Fault:
    """A bad element in a weight on one rank."""
    rank = run.draw(run.world.size)
    value = run.choose(BAD)
    held = [
        (param.name, view)
        for kind, param, _, view in run.trainer.optimizer.state()
        if kind == "parameter" and view.size and _is_used(param.name)
    ]
    name, view = run.choose(held)
    flat = view.reshape(-1)
    element = run.draw(flat.size)
    kept = flat[element].copy()
    if run.on(rank):
        flat[element] = value
    size = run.told(f"{flat.size:,}", rank)
    name = run.told(name, rank)

    def heal() -> None:
        if run.on(rank):
            flat[element] = kept

    what = f"first in the weight {name} (1 of {size} elements) on {_rank_text(run, rank)}"
    return Fault([what], heal)


def _is_used(name: str) -> bool:
    """Whether every element that a rank holds of a weight does something there.

    Not so of tables, of experts that get no token, of biases that one tensor rank adds for all, and
    of a norm before heads of which the rank has none.
    """
    if name.startswith("embedding.") or ".experts." in name:
        return False
    return name.startswith("head.norm.") or ".norm2." in name or name.endswith(".weight")


def output(run: Run, head: bool = False) -> Fault:
    """A bad element in what a layer gives for one micro-batch, once; with `head`, in the loss."""
    trainer = run.trainer
    ends = [r for r in range(run.world.size) if run.mesh.grid.place(r)["pipe"] == _last(run)]
    rank = run.choose(ends) if head else run.draw(run.world.size)
    place = run.draw(len(trainer._numbers))
    layers = [(stage, number) for stage in trainer.stages for number in range(len(stage.layers))]
    stage, number = layers[-1] if head else run.choose(layers)
    layer = stage.layers[number]
    forward, calls, value, drawn = layer.forward, [0], run.choose(BAD), run.draw(1 << 30)

    def spoil(inputs: Any, micro: Any) -> Any:
        outputs, saved = forward(inputs, micro)
        calls[0] += 1
        if calls[0] == place + 1:
            first = outputs[0].copy()
            first.reshape(-1)[drawn % first.size] = value
            outputs = (first, *outputs[1:])
        return outputs, saved

    def heal() -> None:
        layer.forward = forward  # type: ignore[method-assign]

    if run.on(rank):
        layer.forward = spoil  # type: ignore[method-assign]
    name = run.told(trainer._watch._names[trainer._watch._layers[layer]], rank)
    micro = run.told(trainer._numbers[place], rank)
    what = f"the output of {name} in the forward pass of micro-batch {micro} on "
    return Fault(
        [f"first in {what}{_rank_text(run, rank)}", "not when the forward passes were repeated"],
        heal,
    )


def loss(run: Run) -> Fault:
    """A loss that is not finite, where the head gives it."""
    return output(run, head=True)


def again(run: Run) -> Fault:
    """An output that is not finite whenever it is computed: no fault of the machine."""
    rank = run.draw(run.world.size)
    stage = run.trainer.stages[-1]
    layer = stage.layers[-1]
    forward = layer.forward

    def spoil(inputs: Any, micro: Any) -> Any:
        (first, *others), saved = forward(inputs, micro)
        return (first * np.inf, *others), saved

    def heal() -> None:
        layer.forward = forward  # type: ignore[method-assign]

    if run.on(rank):
        layer.forward = spoil  # type: ignore[method-assign]
    name = run.told(run.trainer._watch._names[run.trainer._watch._layers[layer]], rank)
    what = f"first in the output of {name} in the forward pass of micro-batch "
    return Fault([what, _rank_text(run, rank), "and again when the forward passes"], heal)


def one_rank_alone(run: Run) -> Fault:
    """One rank reads another norm: the others, who see nothing, skip too."""
    rank = run.draw(run.world.size)
    gradients = run.trainer.gradients
    norm = gradients.norm

    def spoil() -> float:
        norm()
        return float("nan")

    def heal() -> None:
        gradients.norm = norm  # type: ignore[method-assign]

    if run.on(rank):
        gradients.norm = spoil  # type: ignore[method-assign]
    return Fault(["gradient norm nan; every weight, every layer's output and every gradient"], heal)


def overflow(run: Run) -> Fault:
    """A finite gradient whose square the second moment cannot hold."""
    fault = gradient(run, 1e30 if run.trainer._dtype == np.float32 else 1e200)
    return Fault(["not finite: "], fault.heal)


FAULTS: dict[str, Callable[[Run], Fault]] = {
    "NaN or infinity in a gradient": gradient,
    "NaN or infinity in a weight": weight,
    "NaN or infinity in an activation, once": output,
    "NaN or infinity in the loss, once": loss,
    "infinity in an activation, each time": again,
    "one rank alone sees a bad norm": one_rank_alone,
    "overflow in the optimizer": overflow,
}


def _last(run: Run) -> int:
    return int(run.mesh.layout.pipe) - 1


def put_in(run: Run, make: Callable[[Run], Fault]) -> list[str]:
    """Do a step with a fault and one without; returns what is wrong on any rank."""
    trainer, wrong = run.trainer, []
    skipped, number, called = trainer.health.skipped, trainer.step_number, []
    fault = make(run)
    before = run.state()
    result = trainer.step((run.world.rank, -run.world.rank), lambda: called.append(1))
    after = run.state()
    fault.heal()
    texts = run.world.allgather(result.skipped)
    text = str(texts[0])
    if len(set(texts)) > 1:
        wrong.append(f"ranks tell differently: {texts}")
    if after != before or called:
        wrong.append("a bad update was applied")
    if not text.startswith("not finite: ") or "\n" in text:
        wrong.append(f"not skipped: {text}")
    wrong += [f"{part!r} is not in {text!r}" for part in fault.parts if part not in text]
    if result.notes != (run.world.size - 1, 0):
        wrong.append(f"notes are {result.notes}")
    if (trainer.health.skipped, trainer.step_number) != (skipped + 1, number + 1):
        wrong.append("it was not counted")
    result = trainer.step((), lambda: called.append(1))
    if result.skipped is not None or called != [1] or run.state() == before:
        wrong.append(f"the next step was not done: {result.skipped}")
    return run.gathered(wrong)


def rows_end_the_run(run: Run) -> list[str]:
    """A weight that stays bad ends the run after `max_skipped`, with one line on all ranks."""
    fault = weight(run)
    before, done, wrong = run.state(), 0, []
    number = run.trainer.step_number
    message = None
    try:
        while done < 10:
            run.trainer.step()
            done += 1
    except UserError as error:
        message = str(error)
    if run.state() != before:
        wrong.append("a bad update was applied")
    fault.heal()
    most = run.trainer._train.max_skipped
    if done != most - 1 or message is None or "\n" in message:
        wrong.append(f"{done} steps, then {message}")
    elif len(set(run.world.allgather(message))) > 1:
        wrong.append("ranks tell differently")
    else:
        parts = [f"{most} updates in a row", f"it began at step {number + 1}: ", *fault.parts]
        wrong += [f"{part!r} is not in {message!r}" for part in parts if part not in message]
    return run.gathered(wrong)


# -- spikes ----------------------------------------------------------------------------------------


def spike(run: Run) -> list[str]:
    """A batch whose loss is three times as large, after some that were like each other."""
    trainer, wrong = run.trainer, []
    for _ in range(4):
        trainer.step()
    layer = trainer.stages[-1].layers[-1]
    forward = layer.forward

    def spoil(inputs: Any, micro: Any) -> Any:
        (first, *others), saved = forward(inputs, micro)
        return (first * 3.0, *others), saved

    if run.mesh.pipe.rank == _last(run):
        layer.forward = spoil  # type: ignore[method-assign]
    before = run.state()
    results: list[StepResult] = [trainer.step(), trainer.step()]
    layer.forward = forward  # type: ignore[method-assign]
    if run.state() != before:
        wrong.append("a bad update was applied")
    told = [str(result.skipped) for result in results]
    wrong += [f"not skipped: {text}" for text in told if not text.startswith("spike: loss ")]
    if trainer.health.in_a_row != 2:
        wrong.append("it was not counted")
    if trainer.step().skipped is not None or run.state() == before:
        wrong.append("the next step was not done")
    return run.gathered(wrong)


# -- one bit ---------------------------------------------------------------------------------------


def one_bit(run: Run) -> list[str] | None:
    """A bit that flips in something that several ranks hold; None where nothing is.

    It must be found, with the rank where there are three or more, else with both.
    """
    mine = {
        (kind, param.name, param.shard.start, param.shard.stop, part): view
        for kind, param, part, view in run.trainer.optimizer.state()
        if view.size
    }
    everyone = run.world.allgather(list(mine))
    holders: dict[Any, list[int]] = defaultdict(list)
    for rank, keys in enumerate(everyone):
        for key in keys:
            holders[key].append(rank)
    # What is cut at other places on other tensor ranks is compared with nobody.
    groups = [run.mesh.grid.members(name, run.world.rank) for name in ("tensor", "tied")]
    alone = {key for key in mine if key[-1] is not None and not _compared(key, holders, groups)}
    alone = set().union(*run.world.allgather(alone))
    shared = sorted(key for key, ranks in holders.items() if len(ranks) > 1 and key not in alone)
    if not shared:
        return None
    key = run.choose(shared)
    rank, wrong = run.choose(holders[key]), []
    flip = run.draw(1 << 30)
    size = run.told(mine[key].size if key in mine else 0, rank)
    bits = mine[key].reshape(-1).view(np.uint8) if run.on(rank) else np.zeros(1, np.uint8)
    place = flip // 8 % bits.size
    bits[place] ^= np.uint8(1 << flip % 8)
    message = None
    try:
        check_replicas(run.trainer, run.mesh, run.backend)
    except UserError as error:
        message = str(error)
    bits[place] ^= np.uint8(1 << flip % 8)
    name = f"the weight {key[1]}" if key[0] == "parameter" else f"{key[0]} of {key[1]}"
    many = len(holders[key]) > 2
    parts = [f"replicas differ: {name} on ", f"rank {rank} (", f": 1 of {size:,} elements differs"]
    parts.append("other ranks'" if many else "which is right cannot be told")
    if many:
        parts[0] += parts[1]
    if message is None or "\n" in message or len(set(run.world.allgather(message))) > 1:
        wrong.append(f"{key} on rank {rank}: told {message}")
    else:
        wrong += [f"{part!r} is not in {message!r}" for part in parts if part not in message]
    check_replicas(run.trainer, run.mesh, run.backend)
    return run.gathered(wrong)


def one_bit_later(run: Run) -> list[str] | None:
    """A bit that flips one or two steps before the comparison; None where nothing is held twice.

    It may have been rounded away since; then nobody can find it. Training goes on from before.
    """
    trainer, wrong = run.trainer, []
    if run.mesh.layout.zero or run.mesh.replicas.size == 1:
        return None
    views = [view.reshape(-1) for *_, view in trainer.optimizer.state() if view.size]
    kept = [np.array(array) for *_, array in trainer.state()]
    extra = trainer.extra_state()
    at = trainer.step_number, trainer.samples_consumed
    rank, item, flip, steps = run.draw(run.world.size), run.draw(1 << 30), run.draw(1 << 30), 1
    steps += run.draw(2)
    if run.on(rank):
        bits = views[item % len(views)].view(np.uint8)
        bits[flip // 8 % bits.size] ^= np.uint8(1 << flip % 8)
    for _ in range(steps):
        trainer.step()
    differs, texts = False, None
    for name in ("replicas", "expert_replicas"):
        group = getattr(run.mesh, name)
        held = [
            (kind, param.name, view.tobytes())
            for kind, param, _, view in trainer.optimizer.state()
            if param.reduce_over[0] is group
        ]
        differs |= any(other != held for other in group.allgather_objects(held))
    differs = any(run.world.allgather(differs))
    try:
        check_replicas(trainer, run.mesh, run.backend)
    except UserError as error:
        texts = str(error)
    if differs and (texts is None or _rank_text(run, rank) not in texts):
        wrong.append(f"rank {rank} after {steps} steps: told {texts}")
    trainer.restore(*at, kept, extra)
    check_replicas(trainer, run.mesh, run.backend)
    return run.gathered(wrong)


def _compared(key: Any, holders: dict[Any, list[int]], groups: list[tuple[int, ...]]) -> bool:
    return any(len(group) > 1 and set(group) <= set(holders[key]) for group in groups)


# -- campaigns -------------------------------------------------------------------------------------

Case = tuple[str, str, ParallelSettings]


def cases(ranks: int, every: bool) -> list[Case]:
    """Models, ways to train and layouts: all, or so many that every two choices meet."""
    found: list[Case] = []
    for layout in layouts(ranks, ParallelSettings()):
        for model, train in product(MODELS, TRAINS):
            try:
                build_model(MODELS[model]).check_layout(layout)
                resolve_batch(TRAINS[train], layout)
            except UserError:
                continue
            found.append((model, train, layout))
    if every:
        return found
    chosen = covering([{"model": m, "train": t, **factors(layout)} for m, t, layout in found])
    return [found[number] for number in chosen]


def campaign(
    world: MPI.Intracomm, chosen: Sequence[Case], seed: int, rounds: int
) -> dict[str, tuple[int, list[str]]]:
    """Every fault in these cases, `rounds` times: by kind, how many and what was wrong."""
    counts: dict[str, int] = defaultdict(int)
    wrong: dict[str, list[str]] = defaultdict(list)

    def note(kind: str, case: Case, found: list[str] | None) -> None:
        if found is not None:
            counts[kind] += 1
            name = f"{case[0]} {case[1]} {layout_text(case[2], ParallelSettings())}"
            wrong[kind] += [f"{name}: {text}" for text in found]

    for number, case in enumerate(chosen):
        model, train, layout = MODELS[case[0]], TRAINS[case[1]], case[2]
        with running(world, layout, model, train, seed=seed + number) as run:
            check_replicas(run.trainer, run.mesh, run.backend)
            note("none: replicas are the same", case, [])
            for _ in range(rounds):
                for kind, make in FAULTS.items():
                    if make is not overflow:
                        note(kind, case, put_in(run, make))
                for _ in range(3):
                    note("one bit of a weight or moment", case, one_bit(run))
                    note("one bit, some steps before it is looked for", case, one_bit_later(run))
            note("weight that stays bad, to the end", case, rows_end_the_run(run))
        with running(world, layout, model, train, seed=seed + number, clip=0.0) as run:
            note("overflow in the optimizer", case, put_in(run, overflow))
        spiky = replace(train, spike_zscore=8.0, spike_window=4)
        with running(world, layout, model, spiky, seed=seed + number) as run:
            note("spike of the loss", case, spike(run))
    return {kind: (count, wrong[kind]) for kind, count in counts.items()}


def main() -> None:
    """Run a campaign and print what came of it."""
    seed, rounds, which = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3]
    chosen = cases(MPI.COMM_WORLD.size, which == "all")
    if which.isdigit():  # so many of them, from all over the list
        chosen = chosen[seed % len(chosen) :: max(1, len(chosen) // int(which))]
    found = campaign(MPI.COMM_WORLD, chosen, seed, rounds)
    if MPI.COMM_WORLD.rank == 0:
        print(json.dumps(found))


if __name__ == "__main__":
    main()
