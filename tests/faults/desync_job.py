"""A training job of which one rank goes astray: `desync_job.py FOLDER TIMEOUT FAULT LAYOUT`.

FAULT, LAYOUT and the settings of the fault are JSON. What goes wrong is done to `Group`, `Trainer`
or the process of one rank, at one step; everything else is training as it is.
"""

from __future__ import annotations

import json
import os
import re
import signal
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from msgspec.structs import asdict

import mpillm.__main__ as program
from mpillm.array.backend import Backend
from mpillm.config import from_table
from mpillm.data.loader import Loader
from mpillm.models.settings import build_model
from mpillm.parallel import shared_calls
from mpillm.parallel.flight import flight_name
from mpillm.parallel.grid import AXES, fit
from mpillm.parallel.group import Group
from mpillm.parallel.launch import abort, start
from mpillm.parallel.mesh import Mesh
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.watchdog import Watchdog
from mpillm.training.settings import RunConfig
from mpillm.training.trainer import Trainer, resolve_batch

STEPS = 6
MODEL = {"family": "gpt2", "layers": 2, "heads": 2, "width": 16, "vocabulary": 40, "context": 8}
TRAIN = {"batch_size": 8, "micro_batch_size": 2, "sequence_length": 8, "steps": STEPS}


class Done:
    """A request of a call that was never made."""

    done = True

    def test(self) -> bool:
        return True

    def block(self) -> None: ...

    def wait(self) -> None: ...


class Astray:
    """Does what went wrong, on this rank, when its moment comes."""

    def __init__(self, fault: dict[str, Any], mesh: Mesh, trainer: Trainer) -> None:
        self.fault = fault
        self.mesh = mesh
        self.trainer = trainer
        self.calls = 0
        self.over = False

    def install(self) -> None:
        """Wait for the call that the fault names."""
        method: str = self.fault["call"]
        real: Callable[..., Any] = getattr(Group, method)

        def call(group: Group, *arguments: Any, **named: Any) -> Any:
            here = self.mesh.recorder.step == self.fault["step"]
            if here and not self.over and group.axis == self.fault["axis"]:
                self.calls += 1
                if self.calls == self.fault.get("nth", 1):
                    self.over = True
                    action = getattr(self, self.fault["does"])
                    return action(lambda: real(group, *arguments, **named), group, *arguments)
            return real(group, *arguments, **named)

        setattr(Group, method, call)

    # -- calls that are not those of the other ranks ----------------------------------------------

    def skip(self, real: Callable[[], Any], group: Group, *arguments: Any) -> Any:
        return Done() if self.fault["call"].startswith("i") else arguments[0]

    def calls_another(self, real: Callable[[], Any], group: Group, x: Any, *rest: Any) -> Any:
        return group.broadcast(x)

    def calls_a_barrier(self, real: Callable[[], Any], group: Group, *arguments: Any) -> Any:
        group.barrier()
        return real()

    def another_size(self, real: Callable[[], Any], group: Group, x: Any, *rest: Any) -> Any:
        group.allreduce(np.zeros(x.size + 3, dtype=x.dtype))
        return x

    def another_group_first(self, real: Callable[[], Any], group: Group, *arguments: Any) -> Any:
        getattr(self.mesh, self.fault["first"]).allreduce(np.zeros(5))
        return real()

    def waits_for_nothing(self, real: Callable[[], Any], group: Group, *arguments: Any) -> Any:
        group.recv(np.zeros(4), (group.rank + 1) % group.size, tag=9)
        return real()

    def leaves(self, real: Callable[[], Any], group: Group, *arguments: Any) -> Any:
        raise SystemExit(0)

    # -- ranks that stand still -------------------------------------------------------------------

    def loops(self, real: Callable[[], Any], group: Group, *arguments: Any) -> Any:
        while True:
            pass

    def loops_in_c(self, real: Callable[[], Any], group: Group, *arguments: Any) -> Any:
        re.match(r"(a+)+$", "a" * 60 + "b")  # takes longer than the universe, with Python's lock
        return real()

    def sleeps(self, real: Callable[[], Any], group: Group, *arguments: Any) -> Any:
        time.sleep(1000)
        return real()

    def stops(self, real: Callable[[], Any], group: Group, *arguments: Any) -> Any:
        os.kill(os.getpid(), signal.SIGSTOP)
        return real()

    def stops_in_a_call(self, real: Callable[[], Any], group: Group, *arguments: Any) -> Any:
        threading.Timer(0.3, os.kill, (os.getpid(), signal.SIGSTOP)).start()
        return real()

    # -- slow, and that is all --------------------------------------------------------------------

    def saves(self, real: Callable[[], Any], group: Group, *arguments: Any) -> Any:
        with self.mesh.recorder.activity("save"):
            time.sleep(self.fault["seconds"])
        return real()

    def is_late(self, real: Callable[[], Any], group: Group, *arguments: Any) -> Any:
        time.sleep(self.fault["seconds"])
        return real()


def run(arguments: list[str]) -> int:
    """One job."""
    folder, timeout = Path(arguments[0]), float(arguments[1])
    faults, layout = json.loads(arguments[2]), json.loads(arguments[3])
    world = start()
    (folder / f"pid-{world.rank}").write_text(str(os.getpid()))
    config = from_table(RunConfig, {"model": MODEL, "train": TRAIN, "parallel": layout})
    parallel = fit(config.parallel, world.size)
    train = resolve_batch(config.train, parallel)
    backend = Backend.create("numpy")
    attempt = folder / "flight" / "00001"
    own = folder / "own" if "elsewhere" in arguments else attempt
    recorder = Recorder(
        own / flight_name(world.rank),
        rank=world.rank,
        size=world.size,
        layout={axis: asdict(parallel)[axis] for axis in AXES},
    )
    text = np.random.default_rng(1).integers(0, 40, 400, dtype=np.uint16)
    with Watchdog(recorder, attempt, abort, timeout, slow_timeout=100.0):
        with recorder.activity("set up"):
            mesh = Mesh(world, parallel, backend, recorder)
            loader = Loader(text, 8, train.batch_size, train.micro_batch_size, 1)
            model = build_model(config.model)
            trainer = Trainer(model, train, config.optimizer, mesh, backend, loader)
            world.Barrier()
        recorder.step = 0
        if any(fault.get("shared") for fault in faults):
            shared_calls.SHARED = 0  # as of large gradients
        for fault in faults:
            if fault["rank"] == world.rank:
                Astray(fault, mesh, trainer).install()
        for step in range(STEPS):
            for fault in faults:
                if fault["rank"] == world.rank and fault["step"] == step:
                    (folder / "began").write_text(repr(time.time()))
            trainer.step()
            recorder.step = step + 1
            recorder.samples = trainer.samples_consumed
        recorder.goodbye("complete")
    mesh.free()
    return 0


if __name__ == "__main__":
    program._run = run
    program.entry()
