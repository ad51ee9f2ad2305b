"""Pairwise covering sets: few cases in which everything still meets everything.

Most mistakes in a system of switches show when two of them are set in a certain way (Kuhn, Wallace
and Gallo 2004, "Software Fault Interactions and Implications for Software Testing"). So in place of
all cases one runs a set of them in which every two values of two factors that occur together
anywhere occur together once.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from itertools import combinations
from random import Random

__all__ = ["covering", "pairs"]

Case = Mapping[str, Hashable]
Pair = tuple[tuple[str, Hashable], tuple[str, Hashable]]


def pairs(case: Case) -> list[Pair]:
    """The pairs of (factor, value) that occur in a case."""
    return list(combinations(sorted(case.items(), key=lambda item: item[0]), 2))


def covering(cases: Sequence[Case]) -> list[int]:
    """Numbers of cases, ascending, in which every pair occurs that occurs in any of `cases`.

    Greedy: the case that adds most pairs, until none is missing; then those are dropped whose pairs
    the others have too. The same cases give the same set.

    >>> covering([{"a": a, "b": b} for a in (0, 1) for b in (0, 1)])
    [0, 1, 2, 3]
    """
    numbers: dict[Pair, int] = {}
    held = [  # a bit for each pair
        sum(1 << numbers.setdefault(pair, len(numbers)) for pair in pairs(case)) for case in cases
    ]
    # In no order: of equals the first would always have the first values.
    order = list(range(len(cases)))
    Random(0).shuffle(order)
    missing = (1 << len(numbers)) - 1
    chosen: list[int] = []
    while missing:
        best = max(order, key=lambda number: (held[number] & missing).bit_count())
        chosen.append(best)
        missing &= ~held[best]
    for number in list(chosen):
        others = 0
        for other in chosen:
            if other != number:
                others |= held[other]
        if not held[number] & ~others:
            chosen.remove(number)
    return sorted(chosen)
