"""Sums in tiles: the bits of the pairwise tree, wherever they are written."""

from __future__ import annotations

import numpy as np
import pytest

from mpillm.parallel import sums
from mpillm.parallel.sums import add_up, pairwise_sum


def parts_of(count: int, size: int, dtype: str) -> list[np.ndarray]:
    draw = np.random.default_rng([count, size])
    values = draw.normal(size=(count, size)) * 10.0 ** draw.integers(-2, 3, (count, size))
    return list(values.astype(dtype) if dtype[0] == "f" else (values * 9).astype(dtype))


@pytest.mark.parametrize("dtype", ["float64", "float32", "float16", "int32", "int8"])
@pytest.mark.parametrize("count", range(1, 10))
def test_sums_in_tiles(monkeypatch: pytest.MonkeyPatch, count: int, dtype: str) -> None:
    monkeypatch.setattr(sums, "_TILE", 64 * count)
    for size in (0, 1, 8, 64, 65, 333):
        parts = parts_of(count, size, dtype)
        wide = [part.astype("float32") for part in parts] if dtype == "float16" else parts
        expected = np.asarray(pairwise_sum(wide)).astype(dtype).tobytes()
        outs = [np.empty(size, dtype), np.empty(2 * size, dtype)[::2]]
        add_up(parts, outs)
        assert [out.tobytes() for out in outs] == [expected] * 2
        for place in range(count):  # over one of the parts
            copies = [part.copy() for part in parts]
            add_up(copies, [copies[place]])
            assert copies[place].tobytes() == expected
        add_up(parts, parts)
        assert all(part.tobytes() == expected for part in parts)


def test_a_sum_of_16_bit_floats_may_be_infinite() -> None:
    out = np.empty(3, np.float16)
    add_up([np.full(3, 60_000, np.float16)] * 2, [out])
    assert np.isinf(out).all()


def test_a_sum_of_bfloat16_accumulates_in_float32() -> None:
    bfloat16 = pytest.importorskip("ml_dtypes").bfloat16
    out = np.empty(2, bfloat16)
    add_up([np.full(2, value, bfloat16) for value in (256, 1, 1, 1, 1)], [out])
    assert out.tolist() == [260, 260]
