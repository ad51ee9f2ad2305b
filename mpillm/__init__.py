"""Large language models on anything that has MPI: training and generation.

    import mpillm

    mpillm.train("jobs/kjv.toml")
    print(mpillm.generate("runs/kjv", prompt="In the beginning")[0])

Importing the package loads neither NumPy nor mpi4py: a program may choose its thread counts first.
Under mpirun every rank makes the same calls.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mpillm.parallel.launch import Comm
    from mpillm.parallel.settings import ParallelSettings
    from mpillm.report.verification import Row
    from mpillm.training.loop import TrainResult
    from mpillm.training.settings import RunConfig

__all__ = ["__version__", "generate", "train", "verify_layouts"]

__version__ = "0.1.0"


def train(
    config: RunConfig | Mapping[str, Any] | str | Path,
    comm: Comm | None = None,
    *,
    overrides: Sequence[str] = (),
    fresh: bool = False,
) -> TrainResult:
    """Train a model, or go on with the run in its folder from its newest good checkpoint.

    config: the settings, as a `RunConfig`, as tables (`{"train": {"steps": 10}, ...}`) or as the
    path of a TOML file. overrides: `--section.key=value` strings as on the command line.
    comm: the communicator whose ranks train together, by default all ranks; then, as in the
    command, an uncaught exception on any rank from now on ends the job. fresh: start over even
    where the run folder holds checkpoints. A result with `stopped` is one of a run that was asked
    to end (by a signal, the time limit, a file) and has saved: the same call goes on. Collective.
    Raises `mpillm.errors.UserError`, on every rank, for settings that are wrong.
    """
    comm, checked = _begin(config, comm, overrides)

    from mpillm.training import loop

    return loop.train(checked, comm, fresh=fresh)


def verify_layouts(
    config: RunConfig | Mapping[str, Any] | str | Path,
    comm: Comm | None = None,
    *,
    overrides: Sequence[str] = (),
    ranks: Sequence[int] = (),
    layouts: Sequence[str] = (),
    vary: Sequence[str] = (),
    using: Sequence[str] = (),
    pairs: bool = False,
    steps: int = 3,
    tolerance: float | None = None,
    results: str | Path | None = None,
    fresh: bool = False,
) -> Iterator[Row]:
    """Do the first steps of a run under one layout after another; compare each with one rank's.

    config, overrides, comm: as for `train`. Every layout of the numbers in `ranks`, by default of
    all ranks; or those in `layouts`, such as `"data=2,pipe=2,schedule=gpipe"`, where sizes that are
    not named are 1 and other settings the run's. vary: settings to try all values of, such as
    `"model.tied=true,false"`. using: only layouts that cut these axes. pairs: of all these only so
    many that every two choices that can meet do. tolerance: largest difference that passes, by
    default 1e-10 in float64, 5e-5 in float32, 2e-2 in bfloat16. results: a file of rows that are
    done, by default `verify-layouts.jsonl` in the run folder; rows of the same settings, text and
    versions are taken from there, unless `fresh`. Yields a row for each layout, the same on every
    rank, and is collective as long as it is iterated over. Raises `mpillm.errors.UserError`, on
    every rank, for what does not fit.
    """
    comm, _ = _begin(config, comm, overrides)

    from mpillm.parallel.launch import agree
    from mpillm.training.cases import variants_of
    from mpillm.training.verify import verify

    with agree(comm):
        variants = variants_of(_source(config), overrides, vary)
    return verify(
        variants,
        comm,
        ranks=ranks,
        named=layouts,
        using=using,
        pairs=pairs,
        steps=steps,
        tolerance=tolerance,
        results=None if results is None else Path(results),
        fresh=fresh,
    )


def generate(
    run: str | Path,
    *,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    num_samples: int = 1,
    seed: int = 0,
    greedy: bool = False,
    parallel: ParallelSettings | Mapping[str, Any] | None = None,
    comm: Comm | None = None,
) -> list[str]:
    """Continue `prompt` with the newest checkpoint of the run folder `run`; one text a sample.

    temperature: divides the logits. top_k: sample from the k likeliest tokens (0: all). top_p:
    sample from the likeliest tokens that hold this probability together (1: all). greedy: always
    take the likeliest token. parallel: the layout of the ranks, as settings or as a table such as
    `{"pipe": 2, "tensor": 2}`, where data parallelism takes what is left as in training; by default
    all ranks share each layer's products. The same seed gives the same text in any layout.
    comm: the ranks that share the work, by default all ranks. Collective. Raises
    `mpillm.errors.UserError`, on every rank, for what does not fit.
    """
    from mpillm.parallel.launch import choose_threads, start

    comm = start() if comm is None else comm
    choose_threads(0, comm)

    from mpillm.inference import engine

    return engine.generate(
        Path(run),
        prompt=prompt,
        max_new_tokens=max_new_tokens,
        temperature=temperature,
        top_k=top_k,
        top_p=top_p,
        num_samples=num_samples,
        seed=seed,
        greedy=greedy,
        parallel=parallel,
        comm=comm,
    )


def _begin(
    config: RunConfig | Mapping[str, Any] | str | Path, comm: Comm | None, overrides: Sequence[str]
) -> tuple[Comm, RunConfig]:
    """Check the settings and prepare this process for them, before NumPy is imported."""
    from mpillm.config import load
    from mpillm.parallel.launch import agree, choose_threads, keep_freed_memory, start
    from mpillm.training.settings import RunConfig

    comm = start() if comm is None else comm
    with agree(comm):
        checked = load(RunConfig, _source(config), overrides)
    choose_threads(checked.run.threads, comm)
    keep_freed_memory()
    return comm, checked


def _source(config: RunConfig | Mapping[str, Any] | str | Path) -> Mapping[str, Any] | Path:
    """The settings as tables, or as a path."""
    from mpillm.config import Section, to_table

    if isinstance(config, Section):
        return to_table(config)
    return Path(config) if isinstance(config, str) else config
