"""Which part of the training state each rank writes to a checkpoint."""

from __future__ import annotations

import heapq
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING, TypeVar, cast

from mpillm.array.backend import Backend
from mpillm.models.model import Model, build_stages
from mpillm.parallel.plan import PlannedMesh
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.optimizer import state_arrays

if TYPE_CHECKING:
    from mpillm.nn.param import Param
    from mpillm.parallel.mesh import Mesh

__all__ = ["mine", "planned", "share_out"]

Payload = TypeVar("Payload")
Entry = tuple[str, "Param", "tuple[int, int] | None", Payload]


def planned(model: Model, layout: ParallelSettings, rank: int) -> list[Entry[None]]:
    """(kind, parameter, range, None) as `Trainer.state` has them on a rank, which need not run.

    layout: has been through `fit` and `Model.check_layout`. Makes no arrays.
    """
    mesh = cast("Mesh", PlannedMesh(layout, rank))  # as far as building layers goes
    backend = Backend.create("numpy")
    stages = build_stages(model, backend, mesh, "float32", None, allocate=False)
    arenas = [arena for stage in stages for arena in stage.store.arenas]
    return [
        (kind, param, part, None)
        for kind, arena, shared in state_arrays(arenas)
        for param, part, _ in arena.kept(shared=shared)
    ]


def mine(state: Iterable[Entry[Payload]]) -> list[Entry[Payload]]:
    """What this rank writes of the training state that it holds, in the order of the state.

    state: (kind, parameter, range, anything) of all that this rank holds, see `Trainer.state`.

    Of the tensor and pipeline ranks that hold the same shard its owner writes it. A range is this
    rank's alone among the replicas, over whom ZeRO has shared out the shard. Whole shards all
    replicas hold, in the same order, and so each of them finds the same shares without a word: as
    even as can be, by elements, which are all of one type.
    """
    owned = [entry for entry in state if entry[1].owner]
    # Experts have fewer replicas than other weights, or else the same ones in the same order.
    wholes: dict[tuple[int, int], list[int]] = {}
    for place, (_, param, part, _) in enumerate(owned):
        if part is None:
            replicas = param.reduce_over[0]
            wholes.setdefault((replicas.rank, replicas.size), []).append(place)
    others: set[int] = set()
    for (rank, ranks), places in wholes.items():
        writers = share_out([owned[place][1].shard.size for place in places], ranks)
        others.update(at for at, writer in zip(places, writers, strict=True) if writer != rank)
    return [entry for place, entry in enumerate(owned) if place not in others]


def share_out(sizes: Sequence[int], writers: int) -> list[int]:
    """The writer, 0 to writers - 1, of each item: the largest first, each to the least loaded.

    Ties go to the item that comes first and to the lowest writer, so that the same sizes give the
    same writers everywhere. No writer has more than 4/3 of the best possible largest load (Graham
    1969, "Bounds on multiprocessing timing anomalies").

    >>> share_out([5, 1, 4, 2], 2)
    [0, 0, 1, 1]
    """
    chosen = [0] * len(sizes)
    loads = [(0, writer) for writer in range(writers)]
    for item in sorted(range(len(sizes)), key=lambda item: -sizes[item]):  # stable
        load, writer = loads[0]
        chosen[item] = writer
        heapq.heapreplace(loads, (load + sizes[item], writer))
    return chosen
