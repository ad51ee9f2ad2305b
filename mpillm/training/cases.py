"""What `verify` runs: layouts of variants of a run's settings, all of them or a covering set."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass
from itertools import product
from pathlib import Path
from typing import Any

from msgspec.structs import replace

from mpillm.config import load
from mpillm.errors import UserError, did_you_mean
from mpillm.models.settings import build_model
from mpillm.parallel.covering import covering
from mpillm.parallel.grid import fit
from mpillm.parallel.layouts import (
    SIZES,
    factors,
    layout_text,
    layouts,
    parse_layout,
    ranks_of,
    split_list,
)
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.batch import resolve_batch
from mpillm.training.settings import RunConfig

__all__ = ["Case", "Variants", "cases_of", "refusal", "variants_of"]

Variants = Mapping[tuple[str, ...], RunConfig]


@dataclass(frozen=True)
class Case:
    """A layout of a variant, before it has run.

    required: whether it is a failure when the layout is refused. refused: why it is, if it is.
    """

    variant: tuple[str, ...]
    layout: ParallelSettings
    text: str
    required: bool
    refused: str

    @property
    def factors(self) -> dict[str, Hashable]:
        """What tells the case from others, for a covering set."""
        varied = (setting.partition("=") for setting in self.variant)
        return {**factors(self.layout), **{name: value for name, _, value in varied}}


def variants_of(
    source: Path | Mapping[str, Any], overrides: Sequence[str], vary: Sequence[str]
) -> Variants:
    """Every combination of what is varied, `section.key=value,value` each, checked as `load` does.

    Keys: the settings varied and their values, such as `("model.tied=true",)`.
    """
    choices = []
    for text in vary:
        name, _, values = text.partition("=")
        choices.append([f"{name}={value}" for value in split_list(values)])
    return {
        chosen: load(RunConfig, source, [*overrides, *(f"--{setting}" for setting in chosen)])
        for chosen in product(*choices)
    }


def cases_of(
    variants: Variants,
    most: int,
    *,
    ranks: Sequence[int] = (),
    named: Sequence[str] = (),
    using: Sequence[str] = (),
    pairs: bool = False,
) -> list[Case]:
    """The cases of `verify`, variant by variant; `most` ranks are there. Needs no ranks itself."""
    if named and pairs:
        raise UserError("verify-layouts: --pairs chooses the layouts; leave it out, or --layouts")
    for axis in using:
        if axis not in SIZES:
            raise UserError(f"verify-layouts: --using {axis}: {did_you_mean(axis, SIZES)}")
    for count in ranks:
        if not 1 <= count <= most:
            raise UserError(
                f"verify-layouts: {count} ranks, and {most} were started; expected 1 to {most}, or "
                f"start mpirun -n {max(1, count)}"
            )
    cases = []
    for variant, config in variants.items():
        base = config.parallel
        if named:
            found = [layout for text in named for layout in _listed(text, base, most, ranks)]
        else:
            found = [layout for count in ranks or (most,) for layout in layouts(count, base)]
            found = [one for one in found if all(getattr(one, axis) > 1 for axis in using)]
        for layout in found:
            if ranks_of(layout) > most:
                raise UserError(
                    f"verify-layouts: {layout_text(layout, base)} takes {ranks_of(layout)} ranks, "
                    f"and {most} were started; start mpirun -n {ranks_of(layout)}"
                )
            reason = refusal(replace(config, parallel=layout))
            text = layout_text(layout, base)
            cases.append(Case(variant, layout, text, bool(named) or pairs, reason))
    if pairs:
        cases = [case for case in cases if not case.refused]
        cases = [cases[number] for number in covering([case.factors for case in cases])]
    return cases


def _listed(
    text: str, base: ParallelSettings, most: int, ranks: Sequence[int]
) -> list[ParallelSettings]:
    """A layout that was listed; with numbers of ranks, data parallelism takes what it leaves."""
    layout = parse_layout(text, base)
    if not ranks:
        return [fit(layout, most) if layout.data == 0 else layout]
    given = any(setting.startswith("data=") for setting in split_list(text))
    return [fit(layout if given else replace(layout, data=0), count) for count in ranks]


def refusal(config: RunConfig) -> str:
    """Why the model cannot be trained under `config.parallel`, as far as the settings tell; or ''.

    The model's `vocabulary` and `context` must be filled in.
    """
    layout = config.parallel
    try:
        build_model(config.model).check_layout(fit(layout, ranks_of(layout)))
        resolve_batch(config.train, layout)
    except UserError as error:
        return str(error)
    return ""
