"""Keyed random numbers: the same bits everywhere, and no pattern in dropout or in weights.

The statistics below are in standard deviations of what perfect random numbers would give. Each is
tried on a bad generator, too, which it must find out.
"""

from __future__ import annotations

import importlib.util
import math
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from mpillm.array.backend import Backend
from mpillm.array.random import KeyedRandom, fold, permute

BACKENDS = ["numpy", "strict"] + ["cupy"] * (importlib.util.find_spec("cupy") is not None)
HOST = KeyedRandom(np)
MASK = (1 << 64) - 1

# Far beyond chance for the few thousand statistics taken here.
LIMIT = 6.0

keys = st.integers(0, MASK)
words = st.integers(-(2**63), MASK)


def z_of_counts(observed: np.ndarray, expected: float) -> float:
    """How far a chi-square of counts, all of the same expectation, lies from its mean."""
    freedom = observed.size - 1
    chi_square = float(((observed - expected) ** 2).sum()) / expected
    return (chi_square - freedom) / math.sqrt(2 * freedom)


def z_of_products(a: np.ndarray, b: np.ndarray) -> float:
    """Correlation of two samples of the same shape with known mean 0 and variance 1."""
    return float((a * b).mean()) * math.sqrt(a.size)


# -- the same bits on every library, and those that are documented --------------------------------


@pytest.fixture(params=BACKENDS)
def backend(request: pytest.FixtureRequest) -> Backend:
    return Backend.create(request.param)


def test_every_library_gives_the_same_bits(backend: Backend) -> None:
    rng = np.random.default_rng(0)
    rows = rng.integers(0, 2**64, (5, 1, 3), dtype=np.uint64)
    counters = rng.integers(0, 2**32, 7, dtype=np.uint32)
    by_row = rng.integers(0, 2**32, (5, 1, 3, 7), dtype=np.int64)
    samples, places = np.arange(4, dtype=np.int64)[:, None], np.arange(-3, 3, dtype=np.int32)

    def results(random: KeyedRandom, device: Callable[[Any], Any]) -> list[Any]:
        return [
            random.bits(device(rows), device(counters)),
            random.bits(device(rows), device(by_row)),
            random.keep(device(rows), device(counters), 0.3),
            random.fold(11, device(samples), device(places)),
            random.fold(11),
        ]

    device = results(backend.random, backend.from_host)
    for ours, host in zip(device, results(HOST, np.asarray), strict=True):
        ours = backend.to_host(ours)
        assert ours.dtype == host.dtype
        assert np.array_equal(ours, host)
    slab = backend.to_host(backend.random.normal_slab(3, (4, 5, 6), (1, 0, 2), (3, 5, 6)))
    host = HOST.normal_slab(3, (4, 5, 6), (1, 0, 2), (3, 5, 6))
    assert slab.dtype == np.float64
    # Integers have the same bits everywhere; a GPU's logarithm may round another way.
    limit = 1e-14 if backend.name == "cupy" else 0.0
    assert np.abs(slab - host).max() <= limit


@given(keys, st.lists(words, max_size=3))
def test_fold_is_the_same_for_numbers_and_arrays(key: int, parts: list[int]) -> None:
    arrays = [np.array([part & MASK], dtype=np.uint64) for part in parts]
    assert HOST.fold(key, *arrays).tolist() == [fold(key, *parts)]
    signed = [array.view(np.int64) for array in arrays]
    assert HOST.fold(key, *signed).tolist() == [fold(key, *parts)]


def test_fold_broadcasts() -> None:
    table = HOST.fold(9, np.arange(3)[:, None], np.arange(4))
    assert table.shape == (3, 4)
    assert table.tolist() == [[fold(9, i, j) for j in range(4)] for i in range(3)]


def test_fold_tells_order_place_and_kind_of_its_parts_apart() -> None:
    parts: list[tuple[int | str, ...]] = [
        (), (0,), (0, 0), (1,), (1, 0), (0, 1), ("0",), ("1",), (-1,), ("ab", "c"), ("a", "bc"),
        ("abc",), ("",), ("", ""), ("a", 1), (1, "a"),
    ]  # fmt: skip
    assert len({fold(key, *part) for key in range(50) for part in parts}) == 50 * len(parts)


@given(keys, st.integers(0, 2**32 - 1))
def test_bits_are_those_of_the_documented_mixer(key: int, counter: int) -> None:
    mask = 2**32 - 1
    x = counter * 0x9E3779B9 + (key & mask) & mask
    x = (x ^ x >> 16) * 0x7FEB352D + (key >> 32) & mask
    x = (x ^ x >> 15) * 0x846CA68B & mask
    x ^= x >> 16
    row_keys, counters = np.array(key, dtype=np.uint64), np.array([counter], dtype=np.uint64)
    assert HOST.bits(row_keys, counters).tolist() == [x]


def test_normal_takes_the_published_numbers_of_splitmix64() -> None:
    # The first outputs of the SplitMix64 generator with seed 0.
    published = [0xE220A8397B1DCDAF, 0x6E789E6AA1B965F4, 0x06C45D188009454F]
    expected = [
        math.sqrt(-2 * math.log(((word >> 32) + 0.5) / 2**32))
        * math.cos(2 * math.pi * (word & 0xFFFFFFFF) / 2**32)
        for word in published
    ]
    numbers = HOST.normal(0, np.arange(1, 4, dtype=np.uint64))
    assert np.abs(numbers - expected).max() < 1e-14


GOLDEN_FOLD = [0x0, 0xFD8AAF89AA9E2D79, 0x5B42CDF42184245]
GOLDEN_KEYS = [
    [0x4170375BE49C35F7, 0x913FD827ABC1D474],
    [0x471A70EDE0988F59, 0xB9877B58AA320192],
]
GOLDEN_BITS = [
    [[0xC1A651A, 0xCB567F55, 0x774EC0DE], [0xE0D95B16, 0xE8828801, 0x41E45106]],
    [[0x65DCAB7A, 0x17226020, 0x321AAD5], [0xF0C22D7F, 0xF188CC3, 0xBC4D2DCC]],
]
GOLDEN_KEEP = "01100101100110111001111101111111"
GOLDEN_NORMAL = [
    0.7660954271229719, 0.7266062986293764, -0.5618312470418549,
    -0.8416044150248015, 1.2372974816436804, 0.4357476786215393,
]  # fmt: skip
GOLDEN_ORDER = [4, 3, 10, 11, 6, 7, 2, 8, 1, 0, 9, 5]


def test_golden_values_never_change() -> None:
    """Seeds of finished runs must go on to mean what they meant."""
    assert [fold(0), fold(1337, "init", "block.000.mlp.up.weight"), fold(1, 2, 3)] == GOLDEN_FOLD
    row_keys = HOST.fold(1337, np.arange(2)[:, None], np.arange(2))
    assert row_keys.tolist() == GOLDEN_KEYS
    assert HOST.bits(row_keys, np.arange(3)).tolist() == GOLDEN_BITS
    kept = HOST.keep(row_keys[0, 0], np.arange(32), 0.4)
    assert "".join("01"[int(k)] for k in kept) == GOLDEN_KEEP
    normal = HOST.normal_slab(1337, (2, 3), (0, 0), (2, 3)).reshape(-1)
    assert np.abs(normal - GOLDEN_NORMAL).max() < 1e-15
    assert [permute(i, 12, 1337) for i in range(12)] == GOLDEN_ORDER


# -- a part of an array is what the whole holds there ---------------------------------------------


@st.composite
def slabs(draw: st.DrawFn) -> tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]:
    shape = tuple(draw(st.lists(st.integers(1, 9), min_size=1, max_size=4)))
    ends = [sorted((draw(st.integers(0, n)), draw(st.integers(0, n)))) for n in shape]
    return shape, tuple(a for a, _ in ends), tuple(b for _, b in ends)


@given(keys, slabs())
def test_any_slab_is_bitwise_that_part_of_the_whole(
    key: int, slab: tuple[tuple[int, ...], tuple[int, ...], tuple[int, ...]]
) -> None:
    shape, start, stop = slab
    whole = HOST.normal_slab(key, shape, (0,) * len(shape), shape)
    part = HOST.normal_slab(key, shape, start, stop)
    region = tuple(slice(a, b) for a, b in zip(start, stop, strict=True))
    assert whole.shape == shape and part.dtype == np.float64
    assert part.tobytes() == whole[region].tobytes()
    flat = HOST.normal(key, np.arange(whole.size, dtype=np.uint64))
    assert flat.tobytes() == whole.tobytes()


def test_no_element_depends_on_its_neighbours_in_a_large_slab() -> None:
    """Vectorized loops must not treat the ends of an array another way than its middle."""
    whole = HOST.normal_slab(5, (97, 101), (0, 0), (97, 101))
    for low in range(0, 97, 8):
        for column in (0, 50, 100):
            one = HOST.normal_slab(5, (97, 101), (low, column), (low + 1, column + 1))
            assert one[0, 0] == whole[low, column]


def test_arrays_beyond_32_bits_are_indexed_in_full() -> None:
    shape = (2**20, 2**20)
    corner = HOST.normal_slab(1, shape, (2**20 - 1, 2**20 - 2), shape)
    assert corner.tolist() == [HOST.normal(1, np.array([2**40 - 2, 2**40 - 1], np.uint64)).tolist()]


# -- statistics of the bits -----------------------------------------------------------------------


class Unmixed(KeyedRandom):
    """Keys are added up, and a row's numbers are the multiples of a constant."""

    def _mix64(self, z: Any) -> Any:
        return z

    def bits(self, row_keys: Any, counters: Any) -> Any:
        low = row_keys.astype(np.uint32)[..., None]
        return counters.astype(np.uint32) * np.uint32(0x9E3779B9) + low


class Even(KeyedRandom):
    """Multiplied once more, by an even number."""

    def bits(self, row_keys: Any, counters: Any) -> Any:
        return super().bits(row_keys, counters) * np.uint32(2)


def draw(random: KeyedRandom) -> np.ndarray:
    """uint32 (steps, layers, samples, places, features), keyed as layers key their dropout."""
    samples, places = np.arange(8)[:, None], np.arange(16)
    features = np.arange(128, dtype=np.uint32)
    return np.array(
        [
            [
                random.bits(random.fold(fold(1337, "step", step, layer), samples, places), features)
                for layer in ("embedding", "block.000.mlp.down", "block.001.mlp.down")
            ]
            for step in range(4)
        ]
    )


def byte_counts(x: np.ndarray) -> float:
    """Each of the four bytes takes its 256 values equally often."""
    parts = x.reshape(-1).view(np.uint8).reshape(-1, 4).T
    return max(abs(z_of_counts(np.bincount(part, minlength=256), x.size / 256)) for part in parts)


def pair_counts(x: np.ndarray) -> float:
    """So do the upper halves of the upper bytes of two neighbours together."""
    pairs = (x[..., ::2] >> 28 << 4 | x[..., 1::2] >> 28).reshape(-1)
    return abs(z_of_counts(np.bincount(pairs, minlength=256), pairs.size / 256))


def bit_balance(x: np.ndarray) -> float:
    """Each bit is set half of the time."""
    return float(np.abs(bit_signs(x).mean(axis=0)).max()) * math.sqrt(x.size)


def row_totals(x: np.ndarray) -> float:
    """The number of dropped features in a row scatters as that of independent decisions does."""
    totals = (x < 2**30).sum(axis=-1).reshape(-1)
    variance = x.shape[-1] * 0.25 * 0.75
    chi_square = ((totals - x.shape[-1] * 0.25) ** 2).sum() / variance
    return float(abs(chi_square - totals.size)) / math.sqrt(2 * totals.size)


def neighbours(axis: int) -> Callable[[np.ndarray], float]:
    """No bit of a number tells anything about any bit of the next one along the axis."""

    def statistic(x: np.ndarray) -> float:
        x = np.moveaxis(x, axis, 0)
        a, b = bit_signs(np.ascontiguousarray(x[:-1])), bit_signs(np.ascontiguousarray(x[1:]))
        return float(np.abs(a.T @ b).max()) / math.sqrt(len(a))

    return statistic


def bit_signs(x: np.ndarray) -> np.ndarray:
    """The 32 bits of each number as -1 or 1, float32 (numbers, 32)."""
    bits = np.unpackbits(x.reshape(-1, 1).view(np.uint8), axis=1, bitorder="little")
    return bits.astype(np.float32) * 2 - 1


AXES = ["step", "layer", "sample", "place", "feature"]
STATISTICS: dict[str, tuple[Callable[[np.ndarray], float], type[KeyedRandom]]] = {
    "bytes": (byte_counts, Unmixed),
    "pairs": (pair_counts, Unmixed),
    "bits": (bit_balance, Even),
    "rows": (row_totals, Unmixed),
    **{f"next {axis}": (neighbours(i), Unmixed) for i, axis in enumerate(AXES)},
}


@pytest.fixture(scope="module")
def drawn() -> dict[type[KeyedRandom], np.ndarray]:
    return {kind: draw(kind(np)) for kind in (KeyedRandom, Unmixed, Even)}


@pytest.mark.parametrize("name", STATISTICS)
def test_bits_pass_and_a_bad_generator_fails(
    name: str, drawn: dict[type[KeyedRandom], np.ndarray]
) -> None:
    statistic, bad = STATISTICS[name]
    assert statistic(drawn[KeyedRandom]) < LIMIT
    assert statistic(drawn[bad]) > 2 * LIMIT


def avalanche(before: np.ndarray, after: np.ndarray) -> float:
    """Each output bit flips in half of the cases. (n,) integers each; the largest deviation."""
    flipped = (before ^ after).reshape(-1, 1).view(np.uint8)
    rates = np.unpackbits(flipped, axis=1).mean(axis=0)
    return float(np.abs(2 * rates - 1).max()) * math.sqrt(len(before))


def avalanche_of_fold(random: KeyedRandom) -> float:
    n = np.random.default_rng(0).integers(0, 2**64, 1 << 13, dtype=np.uint64)
    before, worst = random.fold(99, n, n), 0.0
    for bit in (np.uint64(1 << b) for b in range(64)):
        for after in (
            random.fold(99 ^ int(bit), n, n),
            random.fold(99, n ^ bit, n),
            random.fold(99, n, n ^ bit),
        ):
            worst = max(worst, avalanche(before, after))
    return worst


def avalanche_of_bits(random: KeyedRandom) -> float:
    """Of the counter and of the half of the key that is added to it."""
    rng = np.random.default_rng(0)
    row_keys = rng.integers(0, 2**64, 1 << 13, dtype=np.uint64)
    counters = rng.integers(0, 2**32, (1 << 13, 1), dtype=np.uint32)
    before, worst = random.bits(row_keys, counters), 0.0
    for b in range(32):
        for after in (
            random.bits(row_keys ^ np.uint64(1 << b), counters),
            random.bits(row_keys, counters ^ np.uint32(1 << b)),
        ):
            worst = max(worst, avalanche(before, after))
    return worst


@pytest.mark.parametrize("statistic", [avalanche_of_fold, avalanche_of_bits])
def test_one_flipped_bit_flips_half_of_the_output(
    statistic: Callable[[KeyedRandom], float],
) -> None:
    assert statistic(HOST) < LIMIT
    assert statistic(Unmixed(np)) > 2 * LIMIT


class HalfKey(KeyedRandom):
    """Takes the lower half of the key alone."""

    def bits(self, row_keys: Any, counters: Any) -> Any:
        return super().bits(row_keys & np.uint64(0xFFFFFFFF), counters)


def correlation_of_lower_half(random: KeyedRandom) -> float:
    """Between masks of rows whose keys share the lower half, as a hundred pairs in a million do."""
    rng = np.random.default_rng(0)
    low = rng.integers(0, 2**32, 1 << 12, dtype=np.uint64)
    high = rng.integers(0, 2**32, (2, 1 << 12), dtype=np.uint64) << np.uint64(32)
    a, b = (random.keep(low | part, np.arange(64), 0.5) * 2.0 - 1.0 for part in high)
    # Over many such pairs: the numbers of one pair differ by a constant, and so are correlated.
    return abs(float((a * b).mean(axis=1).mean())) * math.sqrt(len(low))


def test_the_upper_half_of_a_key_counts() -> None:
    assert correlation_of_lower_half(HOST) < 5
    assert correlation_of_lower_half(HalfKey(np)) > 2 * LIMIT


def collisions(random: KeyedRandom) -> int:
    """Among the keys of a million rows."""
    samples, places = np.arange(256)[:, None], np.arange(1024)
    layers = [random.fold(fold(7, layer), samples, places).reshape(-1) for layer in "abcd"]
    rows = np.sort(np.concatenate(layers))
    return int((rows[1:] == rows[:-1]).sum())


def test_keys_do_not_collide() -> None:
    assert collisions(HOST) == 0
    assert collisions(Unmixed(np)) > 1000


# -- dropout masks --------------------------------------------------------------------------------


@pytest.mark.parametrize("drop", [1e-5, 0.01, 0.1, 0.2, 0.5, 0.9, 0.999])
def test_dropout_rate(drop: float) -> None:
    keep = HOST.keep(HOST.fold(3, np.arange(1024)), np.arange(1024), drop)
    dropped = keep.size - int(keep.sum())
    assert abs(dropped - keep.size * drop) < 5 * math.sqrt(keep.size * drop * (1 - drop))


def test_dropout_rates_at_the_ends() -> None:
    rows, counters = HOST.fold(3, np.arange(64)), np.arange(1024)
    assert HOST.keep(rows, counters, 0.0).all()
    assert not HOST.keep(rows, counters, 1.0 - 1e-12).any()


def attention_masks(random: KeyedRandom) -> np.ndarray:
    """Decisions (samples, heads, queries, keys), as attention keys them; mean 0, variance 1."""
    drop = 0.3
    rows = random.fold(fold(5, "attention"), np.arange(6)[:, None], np.arange(64))
    row_keys = random.fold(fold(5, "heads"), rows[:, None, :], np.arange(8)[None, :, None])
    keep = random.keep(row_keys, np.arange(64), drop)
    return np.asarray((keep - (1 - drop)) / math.sqrt(drop * (1 - drop)))


@pytest.mark.parametrize(
    "shift",
    [(1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (0, 0, 0, 1), (0, 0, 1, 1), (1, 1, 0, 0),
     (0, 0, 2, 0), (0, 0, 0, 2)],
    ids=["sample", "head", "query", "key", "diagonal", "sample and head", "query + 2", "key + 2"],
)  # fmt: skip
def test_neighbouring_masks_are_not_correlated(shift: tuple[int, ...]) -> None:
    def correlation(masks: np.ndarray) -> float:
        first = masks[tuple(slice(0, n - s) for n, s in zip(masks.shape, shift, strict=True))]
        return abs(z_of_products(first, masks[tuple(slice(s, None) for s in shift)]))

    assert correlation(attention_masks(HOST)) < 5
    assert correlation(attention_masks(Unmixed(np))) > 2 * LIMIT


# -- normal numbers -------------------------------------------------------------------------------


def moments(x: np.ndarray) -> float:
    """The largest deviation of the first four moments."""
    variances = {1: 1.0, 2: 2.0, 3: 15.0, 4: 96.0}
    expected = {1: 0.0, 2: 1.0, 3: 0.0, 4: 3.0}
    return max(
        abs(float((x**k).mean()) - expected[k]) * math.sqrt(x.size / variances[k]) for k in expected
    )


def kolmogorov_smirnov(x: np.ndarray) -> float:
    """sqrt(n) times the largest distance from the normal distribution; 1.95 once in a thousand."""
    cdf = np.array([0.5 * math.erfc(-value / math.sqrt(2)) for value in np.sort(x)])
    steps = np.arange(x.size + 1) / x.size
    distance = max(float((steps[1:] - cdf).max()), float((cdf - steps[:-1]).max()))
    return distance * math.sqrt(x.size)


def serial_correlation(x: np.ndarray) -> float:
    """Of numbers, of squares, and of rows of a matrix of 256 columns."""
    squares = (x**2 - 1) / math.sqrt(2)
    return max(
        abs(z_of_products(series[lag:], series[:-lag]))
        for series in (x, squares)
        for lag in (1, 2, 256)
    )


def test_normal_numbers_are_normal() -> None:
    x = HOST.normal_slab(fold(1337, "init", "w"), (256, 256), (0, 0), (256, 256)).reshape(-1)
    assert moments(x) < 5
    assert kolmogorov_smirnov(x) < 1.95
    assert serial_correlation(x) < 5
    for key in (fold(1338, "init", "w"), fold(1337, "init", "v"), fold(1337, "init", "w", 0)):
        y = HOST.normal(key, np.arange(x.size, dtype=np.uint64))
        assert abs(z_of_products(x, y)) < 5


def test_other_numbers_are_not_normal() -> None:
    uniform = (HOST.bits(HOST.fold(1), np.arange(65536))[0] / 2**32 - 0.5) * math.sqrt(12)
    assert moments(uniform) > 2 * LIMIT
    assert kolmogorov_smirnov(uniform) > 4
    x = Unmixed(np).normal(1337, np.arange(65536, dtype=np.uint64))
    assert serial_correlation(x) > 2 * LIMIT


# -- permutations ---------------------------------------------------------------------------------


@given(st.integers(1, 200), keys)
def test_permute_is_a_bijection(size: int, key: int) -> None:
    assert sorted(permute(i, size, key) for i in range(size)) == list(range(size))


@given(st.integers(1, MASK), keys, st.data())
def test_permute_stays_in_the_range(size: int, key: int, data: st.DataObject) -> None:
    index = data.draw(st.integers(0, size - 1))
    assert 0 <= permute(index, size, key) < size


@pytest.mark.parametrize("index", [-1, 5, 6])
def test_permute_refuses_an_index_outside(index: int) -> None:
    with pytest.raises(ValueError, match="range"):
        permute(index, 5, 0)


def test_permutations_differ_by_key() -> None:
    orders = {tuple(permute(i, 20, key) for i in range(20)) for key in range(100)}
    assert len(orders) == 100


@pytest.mark.parametrize("size", [4, 6])
def test_every_pair_of_images_is_equally_likely(size: int) -> None:
    """Over the keys; the Feistel network's own size (a power of four), and one that must walk."""
    trials = 2000
    counts = np.zeros((size, size))
    for key in range(trials):
        counts[permute(0, size, fold(key)), permute(1, size, fold(key))] += 1
    assert not counts.diagonal().any()
    others = counts[~np.eye(size, dtype=bool)]
    assert abs(z_of_counts(others, trials / others.size)) < LIMIT


def test_an_order_shows_no_trend() -> None:
    size = 3000
    order = np.array([permute(i, size, 42) for i in range(size)])
    x = (order - (size - 1) / 2) / math.sqrt((size * size - 1) / 12)
    for lag in (1, 2, 64):
        assert abs(z_of_products(x[lag:], x[:-lag])) < 5
    assert abs(z_of_products(x, (np.arange(size) - size / 2) / (size / math.sqrt(12)))) < 5
    assert int((order == np.arange(size)).sum()) < 8  # one is expected
