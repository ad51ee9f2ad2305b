"""Places in the grid and members of the groups, against arithmetic, for every layout that fits."""

from __future__ import annotations

import math
from collections.abc import Iterator
from itertools import product
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from msgspec import convert
from msgspec.structs import replace

import mpillm.parallel.mesh as mesh_module
from mpillm.array.backend import Backend
from mpillm.errors import UserError
from mpillm.parallel.group import Group
from mpillm.parallel.mesh import AXES, Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings

# The axes that each group runs along.
GROUPS = {
    "pipe": ("pipe",),
    "data": ("data",),
    "expert": ("expert",),
    "context": ("context",),
    "tensor": ("tensor",),
    "replicas": ("data", "expert", "context"),
    "batch": ("data", "expert"),
    "expert_replicas": ("data", "context"),
    "model": ("pipe", "expert", "tensor"),
    "world": AXES,
}

Sizes = tuple[int, ...]


def layouts(ranks: int) -> list[Sizes]:
    """Every choice of sizes of the five axes, in their order, with that product."""
    divisors = [size for size in range(1, ranks + 1) if ranks % size == 0]
    return [sizes for sizes in product(divisors, repeat=len(AXES)) if math.prod(sizes) == ranks]


def settings(sizes: Sizes) -> ParallelSettings:
    return convert(dict(zip(AXES, sizes, strict=True)), ParallelSettings)


def meshes(comm: Any) -> Iterator[tuple[Sizes, Mesh]]:
    backend = Backend.create("numpy")
    for sizes in layouts(comm.size):
        mesh = Mesh(comm, fit(settings(sizes), comm.size), backend, Recorder())
        yield sizes, mesh
        mesh.free()


def coordinates(sizes: Sizes, rank: int) -> dict[str, int]:
    """A rank's place along every axis, the last axis fastest."""
    place = {}
    for axis, size in reversed(list(zip(AXES, sizes, strict=True))):
        rank, place[axis] = divmod(rank, size)
    return place


def test_groups_hold_the_ranks_that_differ_along_their_axes_only(world: Any) -> None:
    for sizes, mesh in meshes(world):
        mine = coordinates(sizes, world.rank)
        for name, axes in GROUPS.items():
            others = [axis for axis in AXES if axis not in axes]
            members = [
                rank
                for rank in range(world.size)
                if all(coordinates(sizes, rank)[axis] == mine[axis] for axis in others)
            ]
            if name in ("replicas", "expert_replicas"):  # data before context
                members.sort(key=lambda rank: coordinates(sizes, rank)["context"])
            group = getattr(mesh, name)
            assert group.allgather_objects(world.rank) == members, (sizes, name)
            assert group.size == len(members) == math.prod(sizes[AXES.index(a)] for a in axes)
            assert members[group.rank] == world.rank
            assert group.axis == name


def test_ranks_along_an_axis_are_the_coordinates(world: Any) -> None:
    for sizes, mesh in meshes(world):
        place = coordinates(sizes, world.rank)
        assert {axis: getattr(mesh, axis).rank for axis in AXES} == place
        assert mesh.world.rank == world.rank
        assert mesh.batch.rank == place["data"] * mesh.expert.size + place["expert"]


def test_tied_are_the_first_and_the_last_stage(world: Any) -> None:
    for sizes, mesh in meshes(world):
        stages = sizes[AXES.index("pipe")]
        line = mesh.pipe.allgather_objects(world.rank)
        ends = sorted({line[0], line[-1]}) if mesh.pipe.rank in (0, stages - 1) else [world.rank]
        assert mesh.tied.allgather_objects(world.rank) == ends, sizes
        assert ends[mesh.tied.rank] == world.rank
        assert mesh.tied.axis == "tied"


def test_groups_sum_over_their_members(world: Any) -> None:
    for sizes, mesh in meshes(world):
        for name in [*GROUPS, "tied"]:
            group = getattr(mesh, name)
            total = group.allreduce(np.array([1.0, float(world.rank)]))
            assert total.tolist() == [group.size, sum(group.allgather_objects(world.rank))], sizes


class NotedGroup(Group):
    """A group that remembers what it was made with."""

    def __init__(self, comm: Any, axis: str, *arguments: Any) -> None:
        super().__init__(comm, axis, *arguments)
        self.arguments = arguments


@pytest.mark.parametrize("reduction", ["ordered", "library"])
def test_all_groups_get_what_the_mesh_was_given(
    world: Any, monkeypatch: pytest.MonkeyPatch, reduction: Any
) -> None:
    monkeypatch.setattr(mesh_module, "Group", NotedGroup)
    backend, recorder = Backend.create("numpy"), Recorder()
    layout = fit(ParallelSettings(reduction=reduction), world.size)
    mesh = Mesh(world, layout, backend, recorder, message_limit=8)
    for name in [*GROUPS, "tied"]:
        *others, node = getattr(mesh, name).arguments
        assert others == [backend, recorder, reduction, 8]
        assert node.size == mesh.node.size
    mesh.free()


def test_communicators_are_given_back(world: Any) -> None:
    """MPICH has 2,048 communicators: with most of them taken, a leak of one a mesh shows soon."""
    taken = [MPI.COMM_SELF.Dup() for _ in range(1_960)]
    backend, recorder, fitting = Backend.create("numpy"), Recorder(), layouts(world.size)
    for turn in range(100):
        Mesh(world, settings(fitting[turn % len(fitting)]), backend, recorder).free()
    for comm in taken:
        comm.Free()


def test_describe_names_the_axes_that_are_used() -> None:
    def words(**sizes: int) -> str:
        mesh = Mesh.__new__(Mesh)  # the words are of the layout alone
        mesh.layout = convert(sizes, ParallelSettings)
        return mesh.describe()

    assert words(data=1) == "1 rank"
    assert words(data=2, tensor=2) == "data 2 x tensor 2"
    assert words(data=1, pipe=4, context=2, expert=3) == "pipe 4 x context 2 x expert 3"


# --- fit -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"sequence": True, "data": 1}, r"sequence = true .*tensor is 1; set parallel.tensor >= 2"),
        ({"chunks": 2, "data": 1}, r"chunks = 2: .*pipe is 1; set parallel.pipe >= 2"),
        ({"pipe": 2, "schedule": "interleaved"}, r"interleaved.*chunks >= 2"),
        ({"pipe": 2, "chunks": 2}, r"1f1b.*chunks"),
        ({"pipe": 2, "boundaries": (1, 2)}, r"makes 3 stages, and pipe 2 x chunks 1 = 2; give 1 "),
    ],
)
def test_settings_that_mean_nothing_together(wrong: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        fit(convert(wrong, ParallelSettings), 2)


def test_fit_gives_the_data_axis_what_is_left() -> None:
    for ranks in (1, 2, 6, 12):
        for sizes in layouts(ranks):
            exact = settings(sizes)
            assert fit(exact, ranks) == exact
            assert fit(replace(exact, data=0), ranks) == exact


@pytest.mark.parametrize(
    ("layout", "ranks", "message"),
    [
        (
            {"tensor": 3},
            4,
            "parallel: tensor 3 x pipe 1 = 3 does not divide 4 ranks; "
            "start a multiple of 3 ranks (mpirun -n 3)",
        ),
        (
            {"tensor": 2, "pipe": 2},
            1,
            "parallel: tensor 2 x pipe 2 = 4 does not divide 1 rank; "
            "start a multiple of 4 ranks (mpirun -n 4)",
        ),
        (
            {"pipe": 2, "context": 5, "expert": 7},
            4,
            "parallel: tensor 1 x pipe 2 x context 5 x expert 7 = 70 does not divide 4 ranks; "
            "start a multiple of 70 ranks (mpirun -n 70)",
        ),
        (
            {"data": 2, "tensor": 2},
            8,
            "parallel: data 2 x tensor 2 x pipe 1 = 4 does not fit 8 ranks; "
            "start 4 (mpirun -n 4) or change the layout",
        ),
        (
            {"data": 3},
            1,
            "parallel: data 3 x tensor 1 x pipe 1 = 3 does not fit 1 rank; "
            "start 3 (mpirun -n 3) or change the layout",
        ),
    ],
)
def test_fit_says_what_does_not_fit(layout: dict[str, int], ranks: int, message: str) -> None:
    with pytest.raises(UserError) as caught:
        fit(convert(layout, ParallelSettings), ranks)
    assert str(caught.value) == message
