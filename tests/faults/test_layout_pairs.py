"""A -> B -> A, by ranks that train and by no ranks at all: every bit comes back.

Short form: 3 pairs of layouts of up to 4 ranks. Long form: some 60 pairs of layouts of up to 8, in
which every two choices meet that can meet, in one layout or from one to the other: axes cut and
uncut, sequence, schedules and chunks, ZeRO stages, tied and untied heads, experts, both types; and
every two sizes of axes in one layout.
"""

from __future__ import annotations

import json
import subprocess
from collections.abc import Callable, Hashable
from pathlib import Path
from random import Random

from fault_table import Table

from mpillm.config import to_table
from mpillm.parallel.covering import covering
from mpillm.parallel.layouts import SIZES, factors
from mpillm.training.cases import Case, Variants, cases_of, variants_of

Run = Callable[..., "subprocess.CompletedProcess[str]"]
Pair = tuple[Case, Case]

PROGRAM = Path(__file__).parent / "layout_pairs.py"
TINY = Path(__file__).parents[2] / "jobs" / "verify-tiny.toml"
VARY = ["model.tied=true,false", "model.experts=0,5", "train.dtype=float64,float32"]
FEWER_LAYERS = ["--model.layers=4", "--model.expert_every=2"]
UNEVEN = "data=1,pipe=2,schedule=gpipe,boundaries=[3]"  # stages that begin where the settings say


def sampled(variants: Variants, most: int, count: int) -> list[Pair]:
    """So many pairs of layouts of up to `most` ranks, of one variant each."""
    ranks = [n for n in (1, 2, 4, 8) if n <= most]
    cases: dict[tuple[str, ...], list[Case]] = {}
    for variant, config in variants.items():
        one = {variant: config}
        found = cases_of(one, most, ranks=ranks) + cases_of(one, most, named=[UNEVEN])
        cases[variant] = [case for case in found if not case.refused]
    rng, pairs = Random(0), list[Pair]()
    while len(pairs) < count:
        a, b = rng.choices(cases[rng.choice(list(cases))], k=2)
        pairs.append((a, b))
    return pairs


def choices(pair: Pair) -> dict[str, Hashable]:
    """What tells a pair of layouts from others; of an axis, whether it is cut."""
    a, b = pair
    told: dict[str, Hashable] = dict(name.split("=") for name in a.variant)
    for place, case in (("from", a), ("to", b)):
        told |= {f"{place} {name}": value for name, value in factors(case.layout).items()}
        told |= {f"{place} {axis}": getattr(case.layout, axis) > 1 for axis in SIZES}
        told[f"{place} boundaries"] = bool(case.layout.boundaries)
    return told


def sizes(pair: Pair) -> dict[str, Hashable]:
    """The sizes of a pair's first layout."""
    return {axis: getattr(pair[0].layout, axis) for axis in SIZES}


def test_there_and_back_is_bitwise_the_same(
    mpirun: Run, table: Table, long: bool, tmp_path: Path
) -> None:
    variants = variants_of(TINY, ["--model.context=12", *(FEWER_LAYERS, [])[long]], VARY)
    most = 8 if long else 4
    pairs = sampled(variants, most, 4000)
    numbers = {number for told in (choices, sizes) for number in covering(list(map(told, pairs)))}
    pairs = [pairs[number] for number in sorted(numbers)]
    if not long:
        pairs = Random(1).sample(pairs, 3)
    listed = [[to_table(variants[a.variant]), a.text, b.text] for a, b in pairs]
    (tmp_path / "pairs.json").write_text(json.dumps(listed))
    result = mpirun(most, PROGRAM, tmp_path / "pairs.json", tmp_path, timeout=1800 if long else 60)
    assert result.returncode == 0, result.stderr
    lines = [json.loads(line) for line in result.stdout.splitlines() if line.startswith("[")]
    wrong = [
        f"{a.text} -> {b.text} {' '.join(a.variant)}: {problem}"
        for (a, b), problems in zip(pairs, lines, strict=True)
        for problem in problems
    ]
    assert len(pairs) >= (40 if long else 3)
    told = (
        wrong[0] if wrong else "every array, the state, the next step and resharded files bitwise"
    )
    table.row("layout A -> B -> A", len(pairs), told, not wrong)
