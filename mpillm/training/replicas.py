"""Silent corruption is found by comparing what several ranks should hold alike.

Replicas of a weight get the same sum of gradients and make the same update of it, so that weights
and moments stay the same, bit for bit, in every layout. A bit that a memory or a processor has
flipped stays, too, and is found here by comparing hashes. What ZeRO has shared out one rank alone
holds: of that nothing can be compared but what the tensor ranks and a tied table's two stages hold
alike. Weights that ZeRO 1 and 2 share out are sent to everybody after each update: what was
flipped on their owner before is then the same everywhere.
"""

from __future__ import annotations

import hashlib
import platform
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Any

import numpy as np

from mpillm.array.backend import Array, Backend
from mpillm.errors import UserError
from mpillm.parallel.group import Group
from mpillm.parallel.mesh import Mesh
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.settings import RunSettings
from mpillm.training.trainer import Trainer
from mpillm.training.watch import place_text

__all__ = ["check_comparable", "check_replicas"]

# Kind, parameter, start and stop of its shard, range inside of that where ZeRO has cut it.
_Key = tuple[str, str, tuple[int, ...], tuple[int, ...], "tuple[int, int] | None"]

_DIGEST = 16  # bytes of a hash that are kept


def check_comparable(run: RunSettings, layout: ParallelSettings) -> None:
    """UserError for settings under which replicas need not hold the same bits."""
    if run.check_replicas and layout.reduction != "ordered":
        raise UserError(
            f"run.check_replicas = {run.check_replicas}: with parallel.reduction = "
            f"{layout.reduction!r} ranks may get sums of different bits; set parallel.reduction = "
            "'ordered', or run.check_replicas = 0"
        )


def check_replicas(trainer: Trainer, mesh: Mesh, backend: Backend) -> None:
    """Compare the weights and moments that several ranks hold alike; collective.

    Every rank hashes what it holds, and sends 16 bytes to each group that holds the same. UserError
    on every rank alike, with the ranks and the parameter, if a bit differs.
    """
    held = {
        (kind, param.name, param.shard.start, param.shard.stop, part): (view, param.reduce_over[0])
        for kind, param, part, view in trainer.optimizer.state()
        if view.size
    }
    digests = {key: _digest(backend, view) for key, (view, _) in held.items()}
    # By kind of group. A rank whose copy of a weight is wrong makes other gradients of what it and
    # other tensor ranks hold alike; among replicas nothing but the fault itself differs.
    differing: tuple[list[_Key], list[_Key]] = [], []
    for group in (mesh.replicas, mesh.expert_replicas):
        # Ranges are of what this rank alone keeps of the group.
        keys = [key for key, (_, over) in held.items() if over is group and key[-1] is None]
        differing[0].extend(_compare(group, keys, digests, backend))
    for group in (mesh.tensor, mesh.tied):
        differing[1].extend(_compare(group, _shared(group, digests), digests, backend))
    if not _anywhere(mesh, backend, len(differing[0]) + len(differing[1])):
        return
    arrays = {key: view for key, (view, _) in held.items()}
    raise UserError(
        f"after step {trainer.step_number} replicas differ: "
        f"{_describe(mesh, backend, differing, digests, arrays)}; memory or "
        "a processor may be faulty: go on without that node, from a checkpoint from before the "
        "last comparison that passed (every run.check_replicas steps)"
    )


def _digest(backend: Backend, x: Array) -> bytes:
    host = np.ascontiguousarray(backend.to_host(x))
    return hashlib.sha256(host.reshape(-1).view(np.uint8).data).digest()[:_DIGEST]


def _shared(group: Group, digests: Iterable[_Key]) -> list[_Key]:
    """What all ranks of a group hold, in the same order on each; collective over the group."""
    mine = list(digests)
    if group.size == 1:
        return mine
    everyone = group.allgather_objects(mine)
    common = set(mine).intersection(*everyone)
    return [key for key in everyone[0] if key in common]


def _compare(
    group: Group, keys: Sequence[_Key], digests: dict[_Key, bytes], backend: Backend
) -> list[_Key]:
    """Those of `keys`, the same on all ranks of the group, of which these hold different bits."""
    if group.size == 1 or not keys:
        return []
    mine = [digests[key] for key in keys]
    together = hashlib.sha256(b"".join(mine)).digest()[:_DIGEST]
    if len(set(_gather(group, [together], backend))) == 1:
        return []
    everyone = _gather(group, mine, backend)
    columns = (everyone[number :: len(keys)] for number in range(len(keys)))
    return [key for key, column in zip(keys, columns, strict=True) if len(set(column)) > 1]


def _gather(group: Group, mine: Sequence[bytes], backend: Backend) -> list[bytes]:
    """The digests of all ranks of a group, one rank's after another's."""
    part = np.frombuffer(b"".join(mine), dtype=np.uint8)
    out = backend.empty((part.size * group.size,), "uint8")
    group.allgather(backend.from_host(part), out, [part.size] * group.size)
    raw = backend.to_host(out).tobytes()
    return [raw[start : start + _DIGEST] for start in range(0, len(raw), _DIGEST)]


def _anywhere(mesh: Mesh, backend: Backend, count: int) -> bool:
    """Whether any rank has seen a difference; collective."""
    seen = backend.from_host(np.array([count], dtype=np.int64))
    return bool(backend.to_host(mesh.world.allreduce(seen, "max"))[0])


def _describe(
    mesh: Mesh,
    backend: Backend,
    differing: tuple[list[_Key], list[_Key]],
    digests: dict[_Key, bytes],
    arrays: dict[_Key, Array],
) -> str:
    """The first difference in words, the same on every rank; collective.

    Whoever holds the same has a vote, also those who are in no group with the ranks that differ.
    """
    world = mesh.world
    count = len({*differing[0], *differing[1]})
    told = world.allgather_objects(([keys[:1] for keys in differing], count))
    key: _Key = next(keys[kind][0] for kind in (0, 1) for keys, _ in told if keys[kind])
    most = max(count for _, count in told)
    mine = (digests.get(key), platform.node(), _meta(arrays.get(key)))
    everyone = dict(enumerate(world.allgather_objects(mine)))
    holders = {rank: held for rank, held in everyone.items() if held[0] is not None}
    (right, agreed), (_, second) = Counter(held[0] for held in holders.values()).most_common(2)
    good = next(rank for rank, held in holders.items() if held[0] == right)
    wrong = [(rank, held[1]) for rank, held in holders.items() if held[0] != right]
    size, dtype = holders[good][2]
    elements = _count(mesh, backend, good, size, dtype, arrays.get(key))
    what = f"the weight {key[1]}" if key[0] == "parameter" else f"{key[0]} of {key[1]}"
    more = f" (and {most - 1} other arrays)" if most > 1 else ""
    differ = f"{elements:,} of {size:,} elements {'differs' if elements == 1 else 'differ'}"
    if agreed > second:
        return f"{what}{more} on {place_text(mesh, wrong)}: {differ} from {agreed} other ranks'"
    ranks = place_text(mesh, sorted([(good, holders[good][1]), *wrong]))
    return (
        f"{what}{more} on {ranks}: {differ}, and which is right cannot be told from {len(holders)} "
        "replicas"
    )


def _meta(x: Array | None) -> tuple[int, Any] | None:
    return None if x is None else (int(x.size), np.dtype(x.dtype).str)


def _count(
    mesh: Mesh, backend: Backend, root: int, size: int, dtype: str, mine: Array | None
) -> int:
    """The most elements in which a rank's array differs from the root's; collective."""
    right = backend.zeros((size,), dtype)
    if mine is not None and mesh.world.rank == root:
        right[...] = mine.reshape(-1)
    mesh.world.broadcast(right, root)
    count = 0
    if mine is not None:
        a, b = (np.ascontiguousarray(backend.to_host(x)).reshape(-1) for x in (mine, right))
        bits = (x.view(np.uint8).reshape(x.size, -1) for x in (a, b))
        count = int(np.not_equal(*bits).any(axis=1).sum())
    counts: list[int] = mesh.world.allgather_objects(count)
    return max(counts)
