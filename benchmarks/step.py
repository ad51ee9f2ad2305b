"""Time training steps of a setting in this package.

    python benchmarks/step.py baby
    mpirun -n 2 python benchmarks/step.py baby --layout data=2,zero=1 --threads 1

Prints a line of JSON for each step and one for all. With --export the initial weights are written
to a file, for PyTorch to begin with, and nothing is timed. `compare.py` uses the other options.
"""

from __future__ import annotations

import argparse
import json
import statistics
import sys
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from settings import OPTIMIZER, SETTINGS, Setting, token_stream
from turns import serve, timed_steps

from mpillm.config import Section, load, to_table
from mpillm.errors import UserError
from mpillm.parallel.launch import choose_threads, end_in_error, keep_freed_memory, start
from mpillm.parallel.layouts import split_list
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.settings import RunSettings, TrainSettings

if TYPE_CHECKING:
    from mpillm.parallel.launch import Comm
    from mpillm.training.trainer import Trainer

__all__ = ["new_trainer", "read_layout", "tell"]


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument(
        "--layout", default="", help="such as data=2,zero=1,train.micro_batch_size=2"
    )
    parser.add_argument("--threads", type=int, default=0, help="a rank; 0: its share of the cores")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=2, help="steps before these")
    parser.add_argument("--export", type=Path, help="write the initial weights to this .npz")
    parser.add_argument("--connect", help=argparse.SUPPRESS)
    parser.add_argument("--part-of", type=int, default=1, help=argparse.SUPPRESS)
    options = parser.parse_args()
    comm = start()
    try:
        choose_threads(options.threads, comm)  # before NumPy is imported
        keep_freed_memory()
        setting = SETTINGS[options.setting]
        setting = replace(setting, batch=setting.batch // options.part_of)
        trainer = new_trainer(setting, options.dtype, options.layout, comm)
    except UserError as error:
        return end_in_error(error)
    if options.export:
        export(trainer, options.export)
        return 0

    def run(steps: int) -> dict[str, Any]:
        return timed_steps(lambda: trainer.step().loss, steps, setting.tokens / comm.size)

    if options.connect:
        serve(options.connect, comm.rank, run)
        return 0
    run(options.warmup)
    results = comm.gather(run(options.steps))
    if results is not None:
        tell(results, setting)
    return 0


class _Config(Section, frozen=True, kw_only=True):
    """The sections that a layout in words may name."""

    parallel: ParallelSettings
    train: TrainSettings
    run: RunSettings = RunSettings()


def read_layout(text: str, train: TrainSettings) -> _Config:
    """The layout that `text` names, such as `data=2,zero=1`, and other sections with it.

    Their settings are named with the section: `data=2,run.backend=onednn`.
    """
    parts = split_list(text) if text else []
    options = [f"--{part}" if "." in part else f"--parallel.{part}" for part in parts]
    table = {"parallel": {"data": 1}, "train": to_table(train)}
    return load(_Config, table, options)


def new_trainer(setting: Setting, dtype: str, layout: str, comm: Comm) -> Trainer:
    """A trainer at its first step."""
    from mpillm.array.backend import Backend
    from mpillm.data.loader import Loader
    from mpillm.models.settings import build_model
    from mpillm.parallel.mesh import Mesh, fit
    from mpillm.parallel.recorder import Recorder
    from mpillm.training.trainer import Trainer, resolve_batch

    config = read_layout(layout, setting.train(dtype))
    backend = Backend.create(config.run.backend, dtype=dtype)
    mesh = Mesh(comm, fit(config.parallel, comm.size), backend, Recorder())
    train = resolve_batch(config.train, mesh.layout)
    loader = Loader(
        token_stream(setting.vocabulary),
        setting.length,
        setting.batch,
        train.micro_batch_size,
        train.seed,
    )
    return Trainer(build_model(setting.model()), train, OPTIMIZER, mesh, backend, loader)


def export(trainer: Trainer, path: Path) -> None:
    """Write a rank's weights, by their names; on one rank these are all, and whole."""
    import numpy as np

    (stage,) = trainer.stages
    np.savez(path, **{param.name: param.value for param in stage.store.params})


def tell(results: list[dict[str, Any]], setting: Setting) -> None:
    """A line for each step, of the slowest rank, and one for all."""
    steps = [max(times) for times in zip(*(r["seconds"] for r in results), strict=True)]
    for seconds, loss in zip(steps, results[0]["losses"], strict=True):
        print(json.dumps({"seconds": round(seconds, 6), "loss": loss}))
    median = statistics.median(steps)
    summary = {
        "setting": setting.name,
        "tokens": setting.tokens,
        "tokens_per_second": round(setting.tokens / median, 1),
        "gflop_per_second": round(setting.flops / median / 1e9, 1),
        "seconds": {"median": round(median, 6), "min": round(min(steps), 6)},
        "peak_memory_mib": [r["memory"]["peak"] >> 20 for r in results],
    }
    print(json.dumps(summary), flush=True)


if __name__ == "__main__":
    sys.exit(main())
