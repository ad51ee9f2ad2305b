"""Parameters, their arenas, and the parts that ZeRO cuts them into."""

from __future__ import annotations

from itertools import pairwise
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from mpillm.array.backend import Backend
from mpillm.array.ops import norm_block
from mpillm.array.random import fold
from mpillm.nn import store as store_module
from mpillm.nn.param import Init, Param, cut_into_parts
from mpillm.nn.store import ParamStore
from mpillm.parallel.shard import Shard

BACKEND = Backend.create("numpy")


def group(axis: str) -> Any:
    return SimpleNamespace(axis=axis, size=1, rank=0, zeros=BACKEND.zeros)


REPLICAS, EXPERTS = group("replicas"), group("experts")


def store_of(seed: int | None = 1) -> ParamStore:
    return ParamStore(BACKEND, "float64", seed)


def add(store: ParamStore, name: str, shape: tuple[int, ...], **options: Any) -> Param:
    defaults = {"reduce_over": (REPLICAS,), "decay": True, "owner": True}
    return store.add(name, Shard.whole(shape), Init("normal", 0.5), **{**defaults, **options})


def test_a_name_is_given_once() -> None:
    store = store_of()
    add(store, "plain", (3,))
    add(store, "tied", (3,), tied_use=0)
    for name, options in (("plain", {}), ("plain", {"tied_use": 0}), ("tied", {})):
        with pytest.raises(ValueError, match=name):
            add(store, name, (3,), **options)
    with pytest.raises(ValueError, match="tied"):
        add(store, "tied", (4,), tied_use=1)


def test_uses_of_a_tied_parameter_share_its_value_and_have_gradients_of_their_own() -> None:
    store = store_of()
    other = add(store, "other", (5,))
    uses = [add(store, "tied", (3, 2), tied_use=use) for use in range(3)]
    store.allocate()
    assert [param.name for param in store.params] == ["other", "tied"]
    assert [use.use for use in uses] == [0, 1, 2] and all(use.tied for use in uses)
    (tied,) = (arena for arena in store.arenas if arena.tied)
    assert tied.grads.shape == (3, tied.size)
    for number, use in enumerate(uses):
        use.value[0, number % 2] = 7.0 + number
        use.grad.fill(1.0 + number)
    for use in uses:
        assert np.shares_memory(use.value, uses[0].value)
        assert (use.value == uses[0].value).all()
    assert [use.grad.mean() for use in uses] == [1.0, 2.0, 3.0]
    assert tied.grad.sum() == 6 * 1.0 and not other.grad.any()


@pytest.mark.parametrize("zero", [0, 1, 3])
def test_laid_out_is_allocated_without_the_arrays(zero: int) -> None:
    replicas: Any = SimpleNamespace(axis="replicas", size=3, rank=1, zeros=BACKEND.zeros)
    stores = [ParamStore(BACKEND, "float64", 1, zero=zero) for _ in range(2)]
    for store in stores:
        for use in range(2):
            add(store, "tied", (40, 3), tied_use=use, reduce_over=(replicas,))
            add(store, f"plain{use}", (7, 90), decay=use == 0, reduce_over=(replicas,))
            store.next_layer()
    stores[0].lay_out()
    stores[1].allocate()
    for planned, made in zip(*(store.arenas for store in stores), strict=True):
        assert planned.value is planned.master is planned.grads is planned.grad is None
        assert (planned.offsets, planned.size, planned.cuts) == (made.offsets, made.size, made.cuts)
        for shared in (False, True):
            kept = [(p.name, part) for p, part, _ in planned.kept(shared=shared)]
            assert kept == [(p.name, part) for p, part, _ in made.kept(shared=shared)] != []
        views = made.pieces(made.master) if zero else made.wholes(made.value)
        for (param, part, view), (_, kept_part, place) in zip(
            views, planned.kept(shared=zero > 0), strict=True
        ):
            assert part == kept_part and view.size == place.stop - place.start
            assert part is not None or view.shape == param.shard.local_shape


def test_a_later_use_alone_has_the_first_row() -> None:
    """As on the last stage of a pipeline, where the embedding is on another rank."""
    store = store_of()
    use = add(store, "tied", (3,), tied_use=1)
    store.allocate()
    use.grad.fill(2.0)
    assert store.arenas[0].grads.shape[0] == 1
    assert store.arenas[0].grad[:3].tolist() == [2.0] * 3


@given(
    st.lists(
        st.tuples(
            st.lists(st.integers(0, 7), min_size=1, max_size=3),
            st.booleans(),
            st.sampled_from([(REPLICAS,), (EXPERTS,), (REPLICAS, EXPERTS)]),
            st.booleans(),
            st.booleans(),
        ),
        min_size=1,
        max_size=8,
    )
)
def test_the_layout_of_arenas(wanted: list[tuple[list[int], bool, Any, bool, bool]]) -> None:
    store = store_of()
    params, layers, layer = [], {}, 0
    for i, (shape, decay, over, tied, last) in enumerate(wanted):
        use = 0 if tied else None
        params.append(
            add(store, f"p{i}", tuple(shape), decay=decay, reduce_over=over, tied_use=use)
        )
        layers[f"p{i}"] = layer
        if last:
            store.next_layer()
            layer += 1
    store.allocate()
    assert store.params == params
    kinds = [(tuple(g.axis for g in arena.reduce_over), arena.tied) for arena in store.arenas]
    groups = [
        (*kind, () if kind[1] else tuple(arena.layers))
        for kind, arena in zip(kinds, store.arenas, strict=True)
    ]
    assert len(set(groups)) == len(groups)
    placed = []
    for arena, (axes, tied) in zip(store.arenas, kinds, strict=True):
        assert arena.value.shape == arena.master.shape == (arena.size,)
        assert arena.size == 0 or np.shares_memory(arena.value, arena.master)
        assert arena.layers == sorted({layers[param.name] for param in arena.params})
        assert tied or len(arena.layers) == 1
        ends = [*arena.offsets[1:], arena.size]
        decays = np.full(arena.size, -1)
        for param, offset, end in zip(arena.params, arena.offsets, ends, strict=True):
            assert (tuple(g.axis for g in param.reduce_over), param.tied) == (axes, tied)
            assert offset % 16 == 0 and 0 <= end - offset - param.shard.size < 16
            part = slice(offset, offset + param.shard.size)
            assert param.value.shape == param.grad.shape == param.shard.local_shape
            assert (arena.value[part] == param.value.reshape(-1)).all()
            assert not arena.value[part.stop : end].any()
            param.value.fill(3.0)
            param.grad.fill(4.0)
            assert (arena.value[part] == 3.0).all() and (arena.grad[part] == 4.0).all()
            decays[offset:end] = param.decay
            placed.append(param.name)
        assert int((arena.value == 3.0).sum()) == sum(param.shard.size for param in arena.params)
        spans = arena.spans()
        if arena.size == 0:
            assert spans == []
            continue
        assert len(spans) <= 2
        assert [start for start, _, _ in spans] == [0, *(stop for _, stop, _ in spans[:-1])]
        assert spans[-1][1] == arena.size
        assert all(a[2] != b[2] for a, b in pairwise(spans))
        for start, stop, decay in spans:
            assert (decays[start:stop] == decay).all()
    assert sorted(placed) == sorted(param.name for param in params)


@settings(max_examples=60)
@given(
    st.lists(st.integers(1, 6), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(1, 40),
    st.data(),
)
def test_initial_values_of_a_shard_are_those_of_the_whole(
    sizes: list[int], parts: int, block: int, data: st.DataObject
) -> None:
    shape = tuple(sizes)
    axis = data.draw(st.integers(0, len(shape) - 1))

    def values(shard: Shard) -> np.ndarray:
        store = store_of(seed=5)
        options: Any = {"reduce_over": (REPLICAS,), "decay": True, "owner": True}
        store.add("before", Shard.whole((data.draw(st.integers(1, 20)),)), Init("ones"), **options)
        param = store.add("p", shard, Init("normal", 0.5), **options)
        store.allocate()
        return np.asarray(param.value)

    whole = values(Shard.whole(shape))
    exact = BACKEND.random.normal_slab(fold(5, "init", "p"), shape, (0,) * len(shape), shape)
    assert (whole == 0.5 * exact).all()
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(store_module, "_INIT_BLOCK", block)
        for index in range(parts):
            shard = Shard.split(shape, axis, parts, index)
            assert values(shard).tobytes() == whole[shard.slices].tobytes()


def test_kinds_of_initial_values() -> None:
    def values(seed: int | None, dtype: str = "float64") -> list[np.ndarray]:
        store = ParamStore(BACKEND, dtype, seed)
        options: Any = {"reduce_over": (REPLICAS,), "decay": True, "owner": True}
        inits = [Init("zeros"), Init("ones"), Init("normal", 2.0), Init("normal", 2.0)]
        params = [
            store.add(f"p{i}", Shard.whole((500,)), init, **options) for i, init in enumerate(inits)
        ]
        store.allocate()
        assert all(param.value.dtype == param.grad.dtype == dtype for param in params)
        return [param.value for param in params]

    zeros, ones, normal, other = values(3)
    assert not zeros.any() and (ones == 1).all()
    assert abs(normal.std() - 2.0) < 0.3 and abs(normal.mean()) < 0.4
    assert abs(np.corrcoef(normal, other)[0, 1]) < 0.2
    assert (values(3)[2] == normal).all() and (values(4)[2] != normal).all()
    assert not any(value.any() for value in values(None))
    assert (values(3, "float32")[2] == normal.astype("float32")).all()


def test_tied_parameters_have_the_same_uses_in_their_order() -> None:
    store = store_of()
    second = add(store, "tied", (3,), tied_use=1)
    first = add(store, "tied", (3,), tied_use=0)
    store.allocate()
    (arena,) = store.arenas
    assert arena.uses == [[first, second]]
    store = store_of()
    add(store, "a", (3,), tied_use=0)
    add(store, "a", (3,), tied_use=1)
    add(store, "b", (3,), tied_use=0)
    with pytest.raises(ValueError, match="different uses"):
        store.allocate()


def test_weights_that_are_only_read_have_no_room_for_gradients() -> None:
    store = ParamStore(BACKEND, "float32", None, gradients=False)
    param = add(store, "p", (3, 4))
    store.allocate()
    assert param.value.shape == (3, 4) and param.grad is None
    assert store.arenas[0].grads is None and store.arenas[0].grad is None


# -- parts ----------------------------------------------------------------------------------------


def laid_out(shapes: list[tuple[int, ...]]) -> tuple[list[Any], list[int], int]:
    """Parameters of these shapes, where they begin, and the size of all."""
    params = [SimpleNamespace(shard=Shard.whole(shape)) for shape in shapes]
    offsets, size = [], 0
    for param in params:
        offsets.append(size)
        size += -(-param.shard.size // 16) * 16
    return params, offsets, size


@given(
    st.lists(st.integers(0, 40_000).map(lambda n: (n,)), min_size=1, max_size=6),
    st.integers(1, 9),
)
def test_parts_begin_at_blocks_and_are_even(shapes: list[tuple[int, ...]], parts: int) -> None:
    params, offsets, size = laid_out(shapes)
    cuts = cut_into_parts(params, offsets, size, parts)
    assert len(cuts) == parts + 1 and cuts[0] == 0 and cuts[-1] == size
    assert all(a <= b for a, b in pairwise(cuts))
    blocks = {size}
    for param, offset in zip(params, offsets, strict=True):
        blocks |= set(range(offset, offset + param.shard.size, norm_block(param.shard.shape)))
        blocks.add(offset)
    assert set(cuts) <= blocks
    largest = max(norm_block(shape) for shape in shapes)
    for number, cut in enumerate(cuts):
        assert abs(cut - size * number // parts) <= largest + 16


def test_whole_blocks_are_cut_evenly() -> None:
    params, offsets, size = laid_out([(1024 * 16,), (1024 * 16,), (64,)])
    assert size == 32 * 1024 + 64
    assert cut_into_parts(params, offsets, size, 4) == [0, 8208, 16416, 24624, size]
