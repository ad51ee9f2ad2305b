"""The same steps under one layout after another, each compared with one rank's run.

The text, the model and the settings are those of a run; only `parallel` differs, and what is asked
to be varied. A layout of fewer ranks than there are runs on the first ones, while the others sleep.
Nothing but the prepared text and the file of results is written.
"""

from __future__ import annotations

import hashlib
import platform
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, cast

import msgspec
import numpy as np
from msgspec.structs import replace as with_settings

from mpillm import __version__
from mpillm.config import to_table
from mpillm.data.loader import Tokens
from mpillm.data.tokens import TokenFile
from mpillm.errors import UserError
from mpillm.parallel.launch import agree, mpi_library, wait_idle
from mpillm.parallel.layouts import ranks_of
from mpillm.parallel.settings import ParallelSettings
from mpillm.report.verification import Row, RowsFile
from mpillm.training.cases import Case, Variants, cases_of
from mpillm.training.folder import make_folder
from mpillm.training.settings import RunConfig
from mpillm.training.setup import open_data, resolve
from mpillm.training.trial import Outcome, Trial, compare

if TYPE_CHECKING:
    from mpillm.parallel.launch import Comm

__all__ = ["TOLERANCE", "verify"]

# Largest difference that rounding explains, by dtype.
TOLERANCE = {"float64": 1e-10, "float32": 5e-5, "bfloat16": 2e-2}

_ONE_RANK = ParallelSettings(data=1)


def verify(
    variants: Variants,
    comm: Comm,
    *,
    ranks: Sequence[int] = (),
    named: Sequence[str] = (),
    using: Sequence[str] = (),
    pairs: bool = False,
    steps: int = 3,
    tolerance: float | None = None,
    results: Path | None = None,
    fresh: bool = False,
) -> Iterator[Row]:
    """Run the cases in turn and yield a row for each, the same on every rank; collective.

    variants: the settings to run, by what was varied in them (`("model.tied=true",)`), all of one
    text and run folder. ranks: run every layout of these numbers of ranks, by default of as many as
    `comm` has, or those `named`, as texts. using: axes that a layout must cut. pairs: of all
    layouts and variants only so many that every two choices that can meet do. results: a file of
    the rows that are done, by default `verify-layouts.jsonl` in the run folder; rows that it holds
    of the same settings, text and versions are not run again, unless `fresh`. tolerance: by default
    that of the dtype. UserError, on every rank, for settings that one rank cannot run, and for more
    ranks than `comm` has.
    """
    if steps < 1:
        raise UserError(f"verify-layouts: {steps} steps; expected at least 1")
    config = _common(variants)
    with agree(comm):
        if comm.rank == 0:
            make_folder(Path(config.run.dir))
    _, tokens = open_data(config, comm)
    with agree(comm):
        text = tokens.read("train")
        variants = {name: _resolved(config, tokens) for name, config in variants.items()}
        cases = cases_of(variants, comm.size, ranks=ranks, named=named, using=using, pairs=pairs)
    path = results or Path(config.run.dir) / "verify-layouts.jsonl"
    with agree(comm):
        file = RowsFile(path, fresh) if comm.rank == 0 else None
    # By which rank 0 knows its rows again; the others need not read the source.
    facts = (steps, tokens.attributes.get("fingerprint"), _versions()) if file else ()
    runner = _Runner(comm, variants, text, steps)
    for case in cases:
        row = _row(case, variants[case.variant], tolerance)
        if not case.refused:
            key = _key(with_settings(variants[case.variant], parallel=case.layout), *facts)
            known: Row | None = comm.bcast(file.rows.get(key) if file else None)
            if known is not None:
                row = replace(known, required=row.required, tolerance=row.tolerance)
            else:
                row = runner.run(case, row)
                if file:
                    file.write(key, row)
        yield row
    runner.free()
    if file:
        file.close()


def _row(case: Case, config: RunConfig, tolerance: float | None) -> Row:
    """The row of a case that has not run."""
    dtype = config.train.dtype
    return Row(
        layout=case.text,
        ranks=ranks_of(case.layout),
        dtype=dtype,
        variant=case.variant,
        required=case.required,
        refused=case.refused,
        tolerance=TOLERANCE[dtype] if tolerance is None else tolerance,
    )


class _Runner:
    """Runs cases. Every method is collective."""

    def __init__(self, comm: Comm, variants: Variants, text: Tokens, steps: int) -> None:
        self._comm = comm
        self._variants = variants
        self._text = text
        self._steps = steps
        self._parts: dict[int, Comm] = {}
        # The variant that one rank has run, and what it gave: on rank 0.
        self._variant: tuple[str, ...] | None = None
        self._reference: tuple[Outcome, dict[str, np.ndarray]] | None = None

    def run(self, case: Case, row: Row) -> Row:
        """The row of a case with what came of it, the same on every rank."""
        if self._variant != case.variant:
            self._run_reference(case.variant)
        part = self._first(row.ranks)
        if part is not None:
            config = with_settings(self._variants[case.variant], parallel=case.layout)
            row = self._compare(part, config, row)
        wait_idle(self._comm)
        found: Row = self._comm.bcast(row)
        return found

    def free(self) -> None:
        """Give the communicators back to MPI."""
        for part in self._parts.values():
            part.Free()

    def _run_reference(self, variant: tuple[str, ...]) -> None:
        """One rank's run of a variant, by rank 0."""
        self._variant, self._reference = variant, None
        config = with_settings(self._variants[variant], parallel=_ONE_RANK)
        part, wrong = self._first(1), None
        if part is not None:
            try:
                trial = Trial(part, config, self._text)
                self._reference = trial.run(self._steps), dict(trial.weights())
                trial.free()
            except UserError as error:
                wrong = error
        wait_idle(self._comm)
        with agree(self._comm):
            if wrong is not None:
                raise wrong

    def _compare(self, part: Comm, config: RunConfig, row: Row) -> Row:
        """Run a layout on the ranks of `part`; what came of it is in the row of rank 0."""
        try:
            trial = Trial(part, config, self._text)
        except UserError as error:
            return replace(row, refused=str(error))
        try:
            outcome = trial.run(self._steps)
        except UserError as error:
            trial.free()
            return replace(row, problems=(str(error),))
        if self._reference is None:  # not rank 0, to which the weights go
            for _ in trial.weights():
                raise AssertionError("weights on another rank than 0")
            trial.free()
            return row
        difference = compare(*self._reference, outcome, trial.weights())
        trial.free()
        return replace(
            row,
            loss=difference.loss,
            norm=difference.norm,
            weights=difference.weights,
            bitwise=difference.bitwise,
            seconds=outcome.seconds,
            sent=outcome.sent,
            problems=(*trial.problems, *difference.problems),
        )

    def _first(self, ranks: int) -> Comm | None:
        """A communicator of the first ranks; None on the others."""
        if ranks not in self._parts:
            color = int(self._comm.rank >= ranks)
            self._parts[ranks] = cast("Comm", self._comm.Split(color, self._comm.rank))
        return self._parts[ranks] if self._comm.rank < ranks else None


def _common(variants: Variants) -> RunConfig:
    """The first variant, of which all have the text and the folder."""
    first, *others = variants.values()
    for config in others:
        if (config.data, config.run.dir) != (first.data, first.run.dir):
            raise UserError(
                "verify-layouts: data and run.dir cannot be varied; verify each by itself"
            )
    return first


def _resolved(config: RunConfig, tokens: TokenFile) -> RunConfig:
    """The settings with what the model takes from the text filled in."""
    alone = resolve(with_settings(config, parallel=_ONE_RANK), tokens)
    return with_settings(config, model=alone.model)


def _key(config: RunConfig, *facts: object) -> str:
    """Hash of all that the outcome of a case depends on."""
    table = to_table(config)
    sections = [table[name] for name in ("model", "parallel", "train", "optimizer")]
    run = [config.run.backend, config.run.threads]
    return hashlib.sha256(msgspec.json.encode([sections, run, facts], order="sorted")).hexdigest()


def _versions() -> list[str]:
    """What a result holds for: the source of this package and what it computes with."""
    source = hashlib.sha256()
    for path in sorted(Path(__file__).parents[1].rglob("*")):
        if path.suffix in (".py", ".cu"):
            source.update(path.read_bytes())
    return [
        __version__,
        source.hexdigest(),
        platform.python_version(),
        np.__version__,
        mpi_library(),
    ]
