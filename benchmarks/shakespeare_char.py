"""nanoGPT's CPU setting on tiny Shakespeare: mpillm against PyTorch, and layouts against one rank.

    python benchmarks/shakespeare_char.py input.txt
    mpirun -n 4 python benchmarks/shakespeare_char.py input.txt --layouts

The first trains the model of jobs/shakespeare-char-cpu.toml twice, by mpillm on one rank and by
PyTorch (the `oracle` extra), from the same initial weights on the same batches, a hundred steps of
one after a hundred of the other, and compares the validation losses and the speeds. The second
trains the first hundred steps of it under several layouts, without and with dropout, and compares
the losses with one rank's. Both write what they found to a file in benchmarks/results.
"""

from __future__ import annotations

import argparse
import statistics
import sys
import tempfile
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

from machine import describe, write_result
from msgspec.structs import replace

from mpillm.config import load
from mpillm.errors import UserError
from mpillm.parallel.launch import choose_threads, end_in_error, keep_freed_memory, start
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.settings import RunConfig

if TYPE_CHECKING:
    import numpy as np

    from mpillm.parallel.launch import Comm
    from mpillm.parallel.mesh import Mesh
    from mpillm.training.trainer import Trainer

ROOT = Path(__file__).resolve().parent.parent
JOB = ROOT / "jobs" / "shakespeare-char-cpu.toml"

BLOCK = 100  # steps of one, then of the other
GOAL_LOSS = 1.92  # nats a token
GOAL_DIFFERENCE = 0.01
GOAL_LAYOUTS = 1e-5

# Ranks, layout, sequences a micro-batch (0: a data rank's whole share).
LAYOUTS = [
    (1, ParallelSettings(), 0),
    (4, ParallelSettings(data=2, tensor=2), 0),
    (2, ParallelSettings(pipe=2), 0),
    (2, ParallelSettings(pipe=2), 3),
]


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(
        description=__doc__.partition("\n")[0] if __doc__ else None,
        epilog="any setting of the job can be given too: --train.seed=1, --run.threads=1, ...",
    )
    parser.add_argument("text", type=Path, help="tiny Shakespeare, input.txt")
    parser.add_argument("--layouts", action="store_true", help="layouts instead (mpirun -n 4)")
    parser.add_argument(
        "--results", type=Path, default=ROOT / "benchmarks" / "results", help="folder to write to"
    )
    arguments, overrides = parser.parse_known_args()
    comm = start()
    try:
        config = load(RunConfig, JOB, [f"--data.text={arguments.text}", *overrides])
        threads = choose_threads(config.run.threads, comm)  # before NumPy is imported
        keep_freed_memory()
        text = Text.read(config, comm)
        config = text.complete(config)
        if arguments.layouts:
            compare_layouts(config, text, comm, threads, arguments.results)
        elif comm.size == 1:
            compare_with_torch(config, text, comm, threads, arguments.results)
        else:
            raise UserError(f"{comm.size} ranks without --layouts; expected 1")
    except UserError as error:
        return end_in_error(error)
    return 0


# -- what both have in common ----------------------------------------------------------------------


@dataclass
class Text:
    """Token ids of both splits, and the number of token types."""

    train: np.ndarray
    validation: np.ndarray
    vocabulary: int

    @classmethod
    def read(cls, config: RunConfig, comm: Comm) -> Text:
        """The text of the settings, on every rank."""
        from mpillm.data.prepare import prepare
        from mpillm.data.tokens import TokenFile
        from mpillm.parallel.launch import agree

        text: Text | None = None
        with agree(comm), tempfile.TemporaryDirectory() as folder:
            if comm.rank == 0:
                tokens = TokenFile(prepare(config.data, Path(folder), write=True).tokens)
                text = cls(tokens.read("train"), tokens.read("validation"), tokens.vocabulary_size)
        shared: Text = comm.bcast(text)
        return shared

    def complete(self, config: RunConfig) -> RunConfig:
        """The settings with what they take from the text."""
        model = replace(
            config.model, vocabulary=self.vocabulary, context=config.train.sequence_length
        )
        return replace(config, model=model)


def new_trainer(config: RunConfig, text: Text, comm: Comm) -> tuple[Trainer, Mesh]:
    """A trainer at its first step, and its mesh on all ranks of `comm`."""
    from mpillm.array.backend import Backend
    from mpillm.data.loader import Loader
    from mpillm.models.settings import build_model
    from mpillm.parallel.mesh import Mesh, fit
    from mpillm.parallel.recorder import Recorder
    from mpillm.training.trainer import Trainer, resolve_batch

    backend = Backend.create(config.run.backend)
    mesh = Mesh(comm, fit(config.parallel, comm.size), backend, Recorder())
    t = resolve_batch(config.train, mesh.layout)
    loader = Loader(text.train, t.sequence_length, t.batch_size, t.micro_batch_size, t.seed)
    model = build_model(config.model)
    return Trainer(model, t, config.optimizer, mesh, backend, loader), mesh


def verdict(value: float, goal: float) -> str:
    """A goal, and whether it is reached."""
    return f"<= {goal:g}: {'reached' if value <= goal else 'MISSED'}"


# -- mpillm and PyTorch ----------------------------------------------------------------------------


@dataclass
class Contestant:
    """One of the two, its losses by step, and the seconds that each block of steps took."""

    name: str
    step: Callable[[], float]
    losses: list[float] = field(default_factory=list)
    seconds: list[float] = field(default_factory=list)

    def run(self, steps: int) -> None:
        """A block of steps."""
        begin = time.perf_counter()
        self.losses += [self.step() for _ in range(steps)]
        self.seconds.append((time.perf_counter() - begin) / steps)

    def speeds(self, tokens: int) -> list[float]:
        """Tokens a second of every block, `tokens` being those of a step."""
        return [tokens / seconds for seconds in self.seconds]


def compare_with_torch(
    config: RunConfig, text: Text, comm: Comm, threads: int, results: Path
) -> None:
    """Train both, evaluate both, report."""
    import torch

    from mpillm.data.loader import EvaluationSet, Loader

    # The model that the oracle tests compare with mpillm's, too.
    sys.path.insert(0, str(ROOT / "tests" / "oracle"))
    from gpt2_torch import GPT2, Training, from_mpillm

    torch.set_num_threads(threads)
    trainer, mesh = new_trainer(config, text, comm)
    t = replace(config.train, micro_batch_size=config.train.batch_size)
    settings: Any = config.model
    model = GPT2(settings).to(getattr(torch, t.dtype))
    (stage,) = trainer.stages
    weights = {param.name: param.value for param in stage.store.params}
    model.load_state_dict(from_mpillm(weights, settings.layers, settings.width))
    training = Training(model, config.optimizer, t.steps)
    loader = Loader(text.train, t.sequence_length, t.batch_size, t.batch_size, t.seed)

    def torch_step() -> float:
        batch = loader.micro_batch(training.number * t.batch_size, 0)
        tokens, labels = torch.from_numpy(batch.tokens), torch.from_numpy(batch.labels)
        return training.step(tokens.long(), labels.long())[0]

    ours = Contestant("mpillm", lambda: trainer.step().loss)
    theirs = Contestant("PyTorch", torch_step)
    tokens = t.batch_size * t.sequence_length
    for first in range(0, t.steps, BLOCK):
        pair = (ours, theirs) if first // BLOCK % 2 == 0 else (theirs, ours)
        for one in pair:
            one.run(min(BLOCK, t.steps - first))
        print(
            f"step {len(ours.losses):5d}: "
            + "; ".join(
                f"{one.name} {one.losses[-1]:.4f}, {one.speeds(tokens)[-1]:,.0f} tokens/s"
                for one in (ours, theirs)
            ),
            flush=True,
        )

    data = EvaluationSet(text.validation, t.sequence_length, t.batch_size)
    loss = trainer.evaluate(data)
    torch_loss = evaluate_torch(model, data)
    mesh.free()
    write_result(
        results,
        "shakespeare-char",
        [
            "# nanoGPT's CPU setting on tiny Shakespeare: mpillm and PyTorch",
            "",
            *describe(threads, "torch"),
            "",
            f"{t.steps:,} steps of {t.batch_size} x {t.sequence_length} tokens, seed {t.seed}, "
            f"{t.dtype}, one process, from the same initial weights on the same batches.",
            "",
            *loss_table(ours, theirs, loss, torch_loss, data.counted_tokens),
            "",
            *speed_table(ours, theirs, tokens),
        ],
    )


def evaluate_torch(model: Any, data: Any) -> float:
    """Mean loss over every target of an `EvaluationSet`, nats a token."""
    import torch
    from torch.nn.functional import cross_entropy

    total = 0.0
    model.eval()
    with torch.no_grad():
        for j in range(len(data)):
            batch = data.micro_batch(j)
            logits = model(torch.from_numpy(batch.tokens).long()).double()
            labels = torch.from_numpy(batch.labels).long()
            losses = cross_entropy(logits.flatten(0, 1), labels.flatten(), reduction="none")
            total += float(losses[torch.from_numpy(batch.mask).flatten()].sum())
    return total / int(data.counted_tokens)


def loss_table(
    ours: Contestant, theirs: Contestant, loss: float, torch_loss: float, targets: int
) -> list[str]:
    """Validation losses, and training losses at a few steps."""
    difference = loss - torch_loss
    lines = [
        "| | mpillm | PyTorch | difference |",
        "| --- | ---: | ---: | ---: |",
        f"| validation loss, nats a token | {loss:.4f} | {torch_loss:.4f} | {difference:+.4f} |",
        f"| goal | {verdict(loss, GOAL_LOSS)} | | {verdict(abs(difference), GOAL_DIFFERENCE)} |",
    ]
    for step in (1, 10, 100, 1000, len(ours.losses)):
        if step <= len(ours.losses):
            a, b = ours.losses[step - 1], theirs.losses[step - 1]
            lines.append(f"| training loss at step {step:,} | {a:.5f} | {b:.5f} | {a - b:+.1e} |")
    return [
        *lines,
        "",
        f"The validation loss is that of all {targets:,} targets of the last tenth of the text, in "
        "windows that do not overlap.",
    ]


def speed_table(ours: Contestant, theirs: Contestant, tokens: int) -> list[str]:
    """Speeds of both, and their ratio block by block."""
    lines = [
        f"| tokens/s, by blocks of {BLOCK} steps | median | lowest | highest |",
        "| --- | ---: | ---: | ---: |",
    ]
    for one in (ours, theirs):
        s = one.speeds(tokens)
        lines.append(
            f"| {one.name} | {statistics.median(s):,.0f} | {min(s):,.0f} | {max(s):,.0f} |"
        )
    ratios = [b / a for a, b in zip(ours.seconds, theirs.seconds, strict=True)]
    lines.append(
        f"| mpillm over PyTorch | {statistics.median(ratios):.2f} | {min(ratios):.2f} | "
        f"{max(ratios):.2f} |"
    )
    return [*lines, "", "The blocks alternate. Both steps include the loader's work."]


# -- layouts ---------------------------------------------------------------------------------------


def compare_layouts(config: RunConfig, text: Text, comm: Comm, threads: int, results: Path) -> None:
    """Train the first steps under every layout, and report the differences from one rank."""
    most = max(ranks for ranks, _, _ in LAYOUTS)
    if comm.size < most:
        raise UserError(f"--layouts on {comm.size} ranks; expected mpirun -n {most}")
    rows, worst = [], 0.0
    for drop in (0.0, 0.2):
        model = replace(config.model, dropout=drop)
        reference: list[float] = []
        for ranks, layout, micro in LAYOUTS:
            train = replace(config.train, micro_batch_size=micro)
            run = replace(config, model=model, train=train, parallel=layout)
            losses, name = first_losses(run, text, comm, ranks)
            if comm.rank > 0:
                continue
            reference = reference or losses
            differences = [abs(a - b) / b for a, b in zip(losses, reference, strict=True)]
            worst = max(worst, *differences)
            name += f", micro-batches of {micro}" if micro else ""
            row = f"{name} | {drop:g} | {losses[0]:.6f} | {losses[-1]:.6f}"
            row += "".join(f" | {max(differences[:n]):.1e}" for n in (10, BLOCK))
            print(row, flush=True)
            rows.append(f"| {row} |")
    if comm.rank == 0:
        write_result(
            results,
            "shakespeare-char-layouts",
            [
                "# nanoGPT's CPU setting on tiny Shakespeare: layouts",
                "",
                *describe(threads, "mpi4py"),
                "",
                f"The first {BLOCK} of {config.train.steps:,} steps, {config.train.dtype}, seed "
                f"{config.train.seed}; losses in nats a token, and their largest relative "
                "difference from one rank's.",
                "",
                f"| layout | dropout | loss at step 1 | at step {BLOCK} | difference to step 10 "
                f"| to step {BLOCK} |",
                "| --- | ---: | ---: | ---: | ---: | ---: |",
                *rows,
                "",
                f"Largest relative difference {worst:.1e}; goal {verdict(worst, GOAL_LAYOUTS)}",
            ],
        )


def first_losses(config: RunConfig, text: Text, comm: Comm, ranks: int) -> tuple[list[float], str]:
    """Losses of the first steps on the first `ranks` ranks, and the layout in words, on those."""
    losses: list[float] = []
    name = ""
    part: Any = comm.Split(0 if comm.rank < ranks else 1, comm.rank)
    if comm.rank < ranks:
        trainer, mesh = new_trainer(config, text, part)
        losses = [trainer.step().loss for _ in range(BLOCK)]
        name = mesh.describe()
        mesh.free()
    part.Free()
    # MPI's own waiting keeps a core busy, which the ranks at work need.
    everybody = comm.Ibarrier()
    while not everybody.Test():
        time.sleep(0.02)
    return losses, name


if __name__ == "__main__":
    sys.exit(main())
