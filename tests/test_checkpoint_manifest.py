"""The manifest: versions, the table of state, its size at scale; and what retention keeps."""

from __future__ import annotations

import json
import math
import time
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
from checkpoint_fakes import items_of, save_ranks
from hypothesis import given
from hypothesis import strategies as st

from mpillm.checkpoint import manifest as manifest_module
from mpillm.checkpoint.commit import clean, retire
from mpillm.checkpoint.files import list_checkpoints
from mpillm.checkpoint.manifest import Manifest, Piece, decode, encode
from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.shard_file import Part
from mpillm.checkpoint.store import Facts, File, Report, manifest_of
from mpillm.checkpoint.verify import inspect, verify
from mpillm.errors import UserError
from mpillm.parallel.shard import Shard

VERSION_1 = Path(__file__).parent / "samples" / "run-v1" / "checkpoints" / "step-00000003"


def empty(**changes: Any) -> Manifest:
    """A manifest without arrays."""
    facts = {"layout": {}, "settings": {}, "state": {}, "extra": {}, **changes}
    return manifest_of(Facts(step=1, samples=1, **facts), [])


# -- versions --------------------------------------------------------------------------------------


def test_a_checkpoint_of_version_1_is_read_as_it_is() -> None:
    """Every array, against plain h5py; its bytes pass all checks."""
    assert verify(VERSION_1) == []
    raw = json.loads((VERSION_1 / "manifest.json").read_bytes())
    assert raw["version"] == 1 and "state" not in raw
    assert "format      mpillm checkpoint, version 1" in inspect(VERSION_1)
    with Checkpoint.open(VERSION_1) as checkpoint:
        manifest = checkpoint.manifest
        assert (manifest.version, manifest.step, manifest.samples) == (1, 3, 12)
        assert manifest.state == {}
        assert len(manifest.arrays) == len(raw["arrays"]) > 30
        for array in raw["arrays"]:
            full = np.empty(array["shape"], array["dtype"])
            for start, stop, flat, file, dataset, _ in array["pieces"]:
                where = tuple(slice(low, high) for low, high in zip(start, stop, strict=True))
                part = full[where].reshape(-1)
                with h5py.File(VERSION_1 / raw["files"][file]["name"]) as h5:
                    part[slice(*(flat or (0, part.size)))] = np.ravel(h5[dataset][...])
                full[where] = part.reshape(full[where].shape)
            shard = Shard.whole(full.shape)
            assert np.array_equal(checkpoint.read(array["kind"], array["name"], shard), full)
    again = decode(encode(manifest), Path("again"))
    assert (again.version, again.arrays, again.state) == (2, manifest.arrays, {})


# -- the table of state ----------------------------------------------------------------------------

_SCALARS = st.none() | st.booleans() | st.integers(-(2**63), 2**63 - 1) | st.text(max_size=9)
_KEYS = st.text(max_size=5).filter(str.isprintable)
_VALUES = st.recursive(
    _SCALARS | st.floats(allow_nan=False, allow_infinity=False),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(_KEYS, inner),
    max_leaves=20,
)


@given(st.dictionaries(_KEYS, _VALUES))
def test_state_comes_back_bit_by_bit(state: dict[str, Any]) -> None:
    again = decode(encode(empty(state=state)), Path("manifest.json")).state
    assert repr(again) == repr(state)  # 1 is not 1.0, -0.0 is not 0.0


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (math.nan, r"state.x\[1\] is nan, which JSON has not"),
        (-math.inf, r"state.x\[1\] is -inf"),
        (np.float32(1), r"state.x\[1\] is a float32"),
        (np.float64(1), r"state.x\[1\] is a float64"),
        (2**63, r"state.x\[1\] = 9223372036854775808 has more than 64 bits"),
        ({1: 2}, r"state.x\[1\] has the key '1', expected a short word"),
        ({"\n": 2}, r"state.x\[1\] has the key '\\n', expected a short word"),
        (b"", r"state.x\[1\] is a bytes"),
    ],
)
def test_state_that_json_would_change_is_refused(value: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        encode(empty(state={"x": [0, value]}))


def test_state_that_is_nested_without_end() -> None:
    state: dict[str, Any] = {}
    state["x"] = state
    with pytest.raises(ValueError, match="nested too deeply"):
        encode(empty(state=state))


def test_bad_state_is_raised_on_every_rank_and_commits_nothing(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="state.loss is nan"):
        save_ranks(tmp_path, 1, items_of(1), state={"loss": math.nan})
    assert list(tmp_path.iterdir()) == []


# -- size ------------------------------------------------------------------------------------------


def reports(ranks: int, tensor: int, layers: int) -> list[Report]:
    """Those of a GPT of so many layers, ZeRO 1 over all ranks but the tensor ones.

    Each tensor rank's parameters lie one after another in an arena, of which each data rank has a
    contiguous slice; the parameters are shared out among the data ranks.
    """
    data, width = ranks // tensor, 8192
    shapes = [(3, width, width), (3, width), (width, width), (width,), (width,), (width,)]
    shapes += [(4 * width, width), (4 * width,), (width, 4 * width), (width,)]
    named = [(f"block{layer}.{i}", s) for layer in range(layers) for i, s in enumerate(shapes)]
    parts: list[list[Part]] = [[] for _ in range(ranks)]
    digest = "0123456789abcdef" * 4
    for t in range(tensor):
        shards = [Shard.split(shape, len(shape) - 1, tensor, t) for _, shape in named]
        total = sum(shard.size for shard in shards)
        place = 0
        for number, ((name, shape), shard) in enumerate(zip(named, shards, strict=True)):
            piece = Piece(shard.start, shard.stop, None, 0, f"parameter/{name}", digest)
            parts[number % data * tensor + t].append(
                Part("parameter", name, "float32", shape, piece)
            )
            first, last = place * data // total, (place + shard.size - 1) * data // total
            for d in range(first, last + 1):
                low, high = -(-d * total // data), -(-(d + 1) * total // data)
                part = (max(low - place, 0), min(high - place, shard.size))
                for kind in ("optimizer/m", "optimizer/v") if part[0] < part[1] else ():
                    piece = Piece(shard.start, shard.stop, part, 0, f"{kind}/{name}", digest)
                    parts[d * tensor + t].append(Part(kind, name, "float32", shape, piece))
            place += shard.size
    return [
        Report(None, File(f"shard-{rank:05d}.h5", 2**40, digest), tuple(part))
        for rank, part in enumerate(parts)
    ]


def test_the_manifest_of_ten_thousand_ranks(tmp_path: Path) -> None:
    """Made, encoded, read and checked in a few seconds, and a small part of the limit."""
    written = reports(ranks=10_000, tensor=8, layers=96)
    facts = Facts(1, 1, {}, {}, {}, {})
    begin = time.process_time()
    manifest = manifest_of(facts, written)
    raw = encode(manifest)
    made = time.process_time()
    again = decode(raw, tmp_path / "manifest.json")
    read = time.process_time()
    pieces = sum(len(array.pieces) for array in again.arrays)
    print(
        f"{pieces:,} pieces, {len(raw) / 2**20:.1f} MiB, {made - begin:.2f} + {read - made:.2f} s"
    )
    assert again.arrays == manifest.arrays
    assert pieces > 30_000 and len(again.files) == 10_000
    assert len(raw) < 24 * 2**20
    assert made - begin < 5 and read - made < 5


def test_a_manifest_that_no_reader_would_take(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    save_ranks(tmp_path, 1, items_of(1))
    with monkeypatch.context() as patch:
        patch.setattr(manifest_module, "_MAX_BYTES", 1000)
        with pytest.raises(
            UserError, match="the manifest of 8 pieces has .* pieces .a lower parallel.zero"
        ):
            save_ranks(tmp_path, 2, items_of(2))
    assert [path.name for path in tmp_path.iterdir()] == ["step-00000001"]


# -- what is kept ----------------------------------------------------------------------------------


def steps(folder: Path) -> list[int]:
    return [int(path.name.split("-")[1]) for path in list_checkpoints(folder)]


def test_every_so_many_steps_are_kept_for_good(tmp_path: Path) -> None:
    for step in range(1, 11):
        save_ranks(tmp_path, step, items_of(step, 1), keep=2, keep_every=4)
    assert steps(tmp_path) == [4, 8, 9, 10]


def test_what_is_damaged_does_not_count_among_those_that_are_kept(tmp_path: Path) -> None:
    for step in (1, 2, 3, 4):
        save_ranks(tmp_path, step, items_of(step), keep=9)
    (tmp_path / "step-00000003" / "shard-00001.h5").unlink()
    (tmp_path / "step-00000004" / "manifest.json").write_bytes(b"{}")
    save_ranks(tmp_path, 5, items_of(5), keep=2)
    assert steps(tmp_path) == [2, 3, 4, 5]
    save_ranks(tmp_path, 6, items_of(6), keep=1)
    assert steps(tmp_path) == [6]


def test_the_last_good_one_is_never_removed(tmp_path: Path) -> None:
    for step in (1, 2, 3):
        path = save_ranks(tmp_path, step, items_of(step), keep=9)
        if step > 1:
            (path / "shard-00000.h5").write_bytes(b"")
    retire(tmp_path, 3, keep=1)
    assert steps(tmp_path) == [1, 2, 3]
    retire(tmp_path, 2, keep=1)  # a later one is not looked at
    assert steps(tmp_path) == [1, 2, 3]


def test_leftovers_are_cleaned_at_the_start(tmp_path: Path) -> None:
    assert clean(tmp_path / "none") == []
    for step in (1, 2, 3):
        save_ranks(tmp_path, step, items_of(step), keep=9)
    first, second, third = list_checkpoints(tmp_path)
    (tmp_path / ".tmp-00000004" / "deep").mkdir(parents=True)
    (tmp_path / ".tmp-removed-step-00000000").mkdir()
    first.rename(tmp_path / "step-00000001.old")  # cut before the new one came
    for path in (second, third):  # cut after it
        old = tmp_path / f"{path.name}.old"
        old.mkdir()
        (old / "manifest.json").write_bytes((path / "manifest.json").read_bytes())
    (third / "shard-00000.h5").write_bytes(b"")  # the new one is damaged: the old one is kept
    left = [".tmp-00000004", ".tmp-removed-step-00000000", "step-00000002.old"]
    assert clean(tmp_path) == left
    assert [path.name for path in list_checkpoints(tmp_path)] == [
        "step-00000001.old",
        "step-00000002",
        "step-00000003.old",
        "step-00000003",
    ]
    assert clean(tmp_path) == []
    save_ranks(tmp_path, 3, items_of(3), keep=9)
    assert verify(tmp_path / "step-00000003") == []
    assert not (tmp_path / "step-00000003.old").exists()
