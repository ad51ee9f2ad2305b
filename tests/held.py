"""How much memory the arrays that a pass has saved take."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import numpy as np

__all__ = ["held_bytes"]


def held_bytes(saved: Any, without: Iterable[np.ndarray] = ()) -> int:
    """Bytes that cannot be freed while `saved` is there.

    Each array counts as a whole, once, however small the views of it are. `without`: arrays that
    are there anyway, such as weights.
    """
    owners = {id(owner): owner.nbytes for owner in map(_owner, _arrays(saved))}
    anyway = {id(_owner(array)) for array in without}
    return sum(size for key, size in owners.items() if key not in anyway)


def _arrays(saved: Any) -> Iterator[np.ndarray]:
    if isinstance(saved, np.ndarray):
        yield saved
    elif isinstance(saved, (tuple, list)):
        for item in saved:
            yield from _arrays(item)
    else:
        assert saved is None or isinstance(saved, (bool, int, float, np.generic)), type(saved)


def _owner(array: np.ndarray) -> np.ndarray:
    while isinstance(array.base, np.ndarray):
        array = array.base
    return array
