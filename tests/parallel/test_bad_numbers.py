"""Bad numbers in a step, and bits that flip: nothing bad is applied, and the place is named."""

from __future__ import annotations

import json
from typing import Any

import bad_numbers
import numpy as np
import pytest
from bad_numbers import FAULTS, MODELS, TRAIN, TRAINS, Fault, Run, put_in, running
from mpi4py import MPI
from msgspec.structs import replace

from mpillm.errors import UserError
from mpillm.parallel.layouts import layout_text
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.replicas import check_replicas

WORLD = MPI.COMM_WORLD


def layouts() -> list[tuple[str, str, dict[str, Any]]]:
    """(model, way to train, layout) that have little in common; the data axis takes the rest."""
    ranks = WORLD.size
    found: list[tuple[str, str, dict[str, Any]]] = [
        ("tied", "plain", {"zero": 1}),
        ("experts", "plain", {"expert": ranks, "zero": 2}),
        ("untied", "recompute", {"context": ranks, "zero": 3}),
        ("tied", "deterministic", {"pipe": min(ranks, 2), "zero": 3}),
    ]
    if ranks > 1:
        found.append(("tied", "plain", {"tensor": 2, "sequence": True}))
        found.append(("untied", "plain", {"pipe": 2, "chunks": 2, "schedule": "interleaved"}))
    return found


def named(value: Any) -> str:
    return ",".join(f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else str(value)


@pytest.mark.parametrize(("model", "train", "layout"), layouts(), ids=named)
def test_every_fault_is_skipped_and_located(
    world: MPI.Intracomm, model: str, train: str, layout: dict[str, Any]
) -> None:
    settings = ParallelSettings(**layout)
    with running(world, settings, MODELS[model], TRAINS[train], clip=0.0) as run:
        for kind, make in FAULTS.items():
            assert put_in(run, make) == [], kind
        assert bad_numbers.rows_end_the_run(run) == []


@pytest.mark.parametrize("kind", list(FAULTS)[:4])
def test_on_a_device(world: MPI.Intracomm, kind: str) -> None:
    with running(world, ParallelSettings(zero=1), backend="strict") as run:
        assert put_in(run, FAULTS[kind]) == []


@pytest.mark.parametrize("zero", [0, 2])
def test_spikes_are_skipped(world: MPI.Intracomm, zero: int) -> None:
    train = replace(TRAIN, spike_zscore=8.0, spike_window=4)
    with running(world, ParallelSettings(zero=zero), train=train) as run:
        assert bad_numbers.spike(run) == []


@pytest.mark.parametrize("zero", range(4))
def test_a_sum_over_ranks_that_overflows(world: MPI.Intracomm, zero: int) -> None:
    """Every rank's own gradient is finite."""
    if world.size == 1:
        pytest.skip("nothing is summed")

    def make(run: Run) -> Fault:
        gradients = run.trainer.gradients
        done, (stage,) = gradients.layer_done, run.trainer.stages
        last = len(run.trainer._numbers) - 1

        def spoil(layer: Any, at: int) -> None:
            if at == last and layer is stage.layers[2]:
                up = next(p for p in stage.store.params if p.name == "block.001.mlp.up.weight")
                up.grad[5, 7] = 3e38
            done(layer, at)

        def heal() -> None:
            gradients.layer_done = done  # type: ignore[method-assign]

        gradients.layer_done = spoil  # type: ignore[method-assign]
        return Fault(
            ["norm inf; first in the gradient of block.001.mlp.up.weight in its sum"], heal
        )

    with running(world, ParallelSettings(zero=zero)) as run:
        assert put_in(run, make) == []


def test_where_a_bad_derivative_began(world: MPI.Intracomm) -> None:
    """Everything below is bad then; the layer that the backward pass came to first is named."""

    def make(run: Run) -> Fault:
        (stage,), rank = run.trainer.stages, world.size - 1
        layer = stage.layers[2]
        backward = layer.backward

        def spoil(*arguments: Any) -> Any:
            (dx,) = backward(*arguments)
            return (dx * np.nan,)

        def heal() -> None:
            layer.backward = backward  # type: ignore[method-assign]

        if run.on(rank):
            layer.backward = spoil  # type: ignore[method-assign]
        return Fault(["first in the gradient of block.000.mlp.down.", f"on rank {rank} ("], heal)

    for settings in (ParallelSettings(), ParallelSettings(zero=2)):
        with running(world, settings) as run:
            assert put_in(run, make) == []


def test_a_gradient_that_the_norm_does_not_count(world: MPI.Intracomm) -> None:
    """Tensor ranks each compute a norm's gradient; the first one's is counted."""
    if world.size == 1:
        pytest.skip("there is one tensor rank")

    def make(run: Run) -> Fault:
        gradients, (stage,) = run.trainer.gradients, run.trainer.stages
        done = gradients.layer_done
        gain = next(p for p in stage.store.params if p.name == "block.001.norm2.gain")

        def spoil(layer: Any, at: int) -> None:
            if layer is stage.layers[2] and run.mesh.tensor.rank == 1:
                gain.grad[3] = np.nan
            done(layer, at)

        def heal() -> None:
            gradients.layer_done = done  # type: ignore[method-assign]

        gradients.layer_done = spoil  # type: ignore[method-assign]
        told = "an output or gradient that neither loss "
        return Fault([told, f"first in the gradient of {gain.name} from ", "on rank 1 ("], heal)

    with running(world, ParallelSettings(tensor=2)) as run:
        assert put_in(run, make) == []


@pytest.mark.parametrize("zero", [0, 3])
def test_a_run_goes_on_bitwise_after_a_skipped_step(world: MPI.Intracomm, zero: int) -> None:
    """Nothing of a bad step is left, and a restored run counts updates as the first one did."""
    layout = ParallelSettings(zero=zero)
    train = replace(TRAIN, spike_zscore=50.0, spike_window=3)
    updates: list[int] = []
    with running(world, layout, train=train) as run:
        trainer = run.trainer
        assert put_in(run, FAULTS["NaN or infinity in a gradient"]) == []
        assert put_in(run, FAULTS["NaN or infinity in an activation, once"]) == []
        values = [np.array(array) for *_, array in trainer.state()]
        extra = json.loads(json.dumps(trainer.extra_state(), allow_nan=False))
        at = trainer.step_number, trainer.samples_consumed
        step = trainer.optimizer.step
        trainer.optimizer.step = lambda *a: (updates.append(a[0]), step(*a))  # type: ignore[method-assign,assign,func-returns-value]
        results = [trainer.step() for _ in range(3)]
        expected, state = run.state(), trainer.extra_state()
    assert at[0] == 5 and updates == [4, 5, 6]
    with running(world, layout, train=train) as run:
        run.trainer.restore(*at, values, extra)
        for result in results:
            again = run.trainer.step()
            assert (again.step, again.loss, again.grad_norm) == (
                result.step,
                result.loss,
                result.grad_norm,
            )
        assert run.state() == expected and run.trainer.extra_state() == state


def test_a_checkpoint_without_extra_state(world: MPI.Intracomm) -> None:
    """As format version 1 has it."""
    with running(world, ParallelSettings()) as run:
        values = [np.array(array) for *_, array in run.trainer.state()]
        assert put_in(run, FAULTS["NaN or infinity in a gradient"]) == []
        run.trainer.restore(1, TRAIN.batch_size, values)
        assert run.trainer.health.skipped == 0 and run.trainer.step().step == 2


# --- replicas -------------------------------------------------------------------------------------


@pytest.mark.parametrize(("model", "train", "layout"), layouts(), ids=named)
def test_a_flipped_bit_is_found_and_located(
    world: MPI.Intracomm, model: str, train: str, layout: dict[str, Any]
) -> None:
    with running(world, ParallelSettings(**layout), MODELS[model], TRAINS[train]) as run:
        check_replicas(run.trainer, run.mesh, run.backend)
        for _ in range(4):
            assert bad_numbers.one_bit(run) in ([], None)


def test_replicas_of_experts_are_compared(world: MPI.Intracomm) -> None:
    if world.size == 1:
        pytest.skip("there is one replica")
    with running(world, ParallelSettings(), MODELS["experts"]) as run:
        params = run.trainer.stages[0].store.params
        down = next(p for p in params if p.name == "block.001.experts.down.weight")
        if run.on(1):
            down.value[2, 1, 0] = np.nextafter(down.value[2, 1, 0], np.float32(9))
        with pytest.raises(
            UserError, match=rf"the weight {down.name} on .*rank 1 \(data 1.*: 1 of"
        ):
            check_replicas(run.trainer, run.mesh, run.backend)


def test_there_is_no_false_alarm(world: MPI.Intracomm) -> None:
    """After some steps, in layouts, models and ways to train in which every two of them meet."""
    cases = bad_numbers.cases(world.size, False)
    for model, train, layout in cases[::3]:
        with running(world, layout, MODELS[model], TRAINS[train]) as run:
            run.trainer.step()
            run.trainer.step()
            try:
                check_replicas(run.trainer, run.mesh, run.backend)
            except UserError as error:
                pytest.fail(f"{model} {train} {layout_text(layout, ParallelSettings())}: {error}")


def test_a_difference_that_grows_is_still_located(world: MPI.Intracomm) -> None:
    """Some steps later: the weights of that rank differ from others, and it computes with them."""
    if world.size < 3:
        pytest.skip("two cannot tell")
    with running(world, ParallelSettings()) as run:
        param = next(p for p in run.trainer.stages[0].store.params if p.name.endswith("up.weight"))
        if run.on(1):
            param.value.reshape(-1).view(np.uint32)[3] ^= np.uint32(1 << 20)
        for _ in range(3):
            assert run.trainer.step().skipped is None
        with pytest.raises(UserError, match=rf"the weight {param.name} on rank 1 \(data 1, node"):
            check_replicas(run.trainer, run.mesh, run.backend)
        # Sums of gradients are the same everywhere, so that nothing else came to differ.
        with pytest.raises(UserError, match=": 1 of 576 elements differs from 3 other ranks'"):
            check_replicas(run.trainer, run.mesh, run.backend)


def test_several_differences_are_counted(world: MPI.Intracomm) -> None:
    if world.size == 1:
        pytest.skip("there is one replica")
    with running(world, ParallelSettings()) as run:
        if run.on(world.size - 1):
            for _, _, _, view in run.trainer.optimizer.state():
                view[...] = view + 1
        with pytest.raises(UserError, match=r"the weight .* \(and \d+ other arrays\) on rank "):
            check_replicas(run.trainer, run.mesh, run.backend)


def test_a_device_s_replicas(world: MPI.Intracomm) -> None:
    if world.size == 1:
        pytest.skip("there is one replica")
    with running(world, ParallelSettings(), backend="strict") as run:
        check_replicas(run.trainer, run.mesh, run.backend)
        *_, last = run.trainer.optimizer.state()
        if run.on(0):
            last[3][...] = -last[3]
        with pytest.raises(UserError, match="replicas differ: optimizer/v of "):
            check_replicas(run.trainer, run.mesh, run.backend)


def test_what_a_comparison_sends(world: MPI.Intracomm) -> None:
    """16 bytes of each rank to each of its groups, and one number to all."""
    if world.size == 1:
        pytest.skip("there is one replica")
    with running(world, ParallelSettings()) as run:
        traffic = run.mesh.recorder.traffic
        traffic.clear()
        check_replicas(run.trainer, run.mesh, run.backend)
        assert {key: total.bytes for key, total in traffic.items()} == {
            ("replicas", "allgather"): 16 * world.size,
            ("world", "allreduce"): 8,
        }


def test_looking_takes_no_call_and_keeps_nothing(world: MPI.Intracomm) -> None:
    """Flags are kept of what is not finite, and of what a device was not asked about."""
    with running(world, ParallelSettings()) as run:
        assert run.trainer._watch.clean() and run.trainer._watch._seen == []
    with running(world, ParallelSettings(), backend="strict") as run:
        assert run.trainer._watch.clean() and run.trainer._watch._seen != []
