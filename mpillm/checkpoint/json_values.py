"""Values that JSON can hold and give back as they are."""

from __future__ import annotations

import math
from typing import Any

__all__ = ["check_json"]

_DEEPEST = 16
_LONGEST_KEY = 200


def check_json(value: Any, where: str, depth: int = 0) -> None:
    """ValueError unless a value can be written as JSON and read back equal."""
    inner: list[tuple[str, Any]] = []
    if type(value) is dict:
        for key in value:
            if type(key) is not str or len(key) > _LONGEST_KEY or not key.isprintable():
                raise ValueError(f"{where} has the key {str(key)[:50]!r}, expected a short word")
        inner = [(f"{where}.{key}", item) for key, item in value.items()]
    elif isinstance(value, list | tuple):
        inner = [(f"{where}[{place}]", item) for place, item in enumerate(value)]
    elif type(value) is float and not math.isfinite(value):
        raise ValueError(f"{where} is {value}, which JSON has not")
    elif type(value) is int and not -(2**63) <= value < 2**63:
        raise ValueError(f"{where} = {value} has more than 64 bits")
    elif value is not None and type(value) not in (bool, int, float, str):
        raise ValueError(f"{where} is a {type(value).__name__}, which JSON has not")
    if inner and depth == _DEEPEST:
        raise ValueError(f"{where} is nested too deeply")
    for place, item in inner:
        check_json(item, place, depth + 1)
