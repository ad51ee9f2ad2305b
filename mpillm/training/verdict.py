"""Ranks agree whether a step's update may be applied, and if not, where the fault began.

No rank is trusted alone: replicas should hold the same numbers, and one that does not is the case
that this is for.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence

import numpy as np

from mpillm.array.backend import Array, Backend
from mpillm.nn.param import Param
from mpillm.parallel.mesh import Mesh
from mpillm.training.health import Health, Verdict
from mpillm.training.watch import Kind, Watch, first_of

__all__ = ["Verdicts"]

State = Iterable[tuple[str, Param, "tuple[int, int] | None", Array]]


class Verdicts:
    """The verdicts of all ranks. Every method is collective."""

    def __init__(self, mesh: Mesh, backend: Backend, health: Health, watch: Watch) -> None:
        self._world = mesh.world
        self._mesh = mesh
        self._backend = backend
        self._health = health
        self._watch = watch

    def agree(self, mine: Verdict, notes: Sequence[int]) -> tuple[Verdict, tuple[int, ...]]:
        """The worst verdict, and the largest of each note, over all ranks: one call."""
        numbers = self._backend.from_host(np.array([mine, *notes], dtype=np.int64))
        worst, *most = self._backend.to_host(self._world.allreduce(numbers, "max")).tolist()
        return Verdict(worst), tuple(most)

    def explain(
        self,
        verdict: Verdict,
        mine: tuple[Verdict, str],
        losses: Sequence[np.ndarray],
        state: State,
        repeat: Callable[[], None],
    ) -> str:
        """Why an update is skipped, and once in a row where it began; the same on every rank.

        verdict: of all ranks, not a good one. mine: this rank's, and why. losses: of the step's
        micro-batches, float64 (micros,), of each kind. state: weights and moments. repeat: runs the
        step's forward passes again.
        """
        told = self._world.allgather_objects(mine)
        reason: str = next(text for of_rank, text in told if of_rank == verdict)
        if verdict is not Verdict.BAD or self._health.located:
            return reason
        self._health.located = True
        return f"{reason}; {self._locate(losses, state, repeat)}"

    def _locate(
        self, losses: Sequence[np.ndarray], state: State, repeat: Callable[[], None]
    ) -> str:
        """Where what is not finite appeared first, in words."""
        mesh, watch = self._mesh, self._watch
        mine = watch.findings(state)
        if mesh.pipe.rank == mesh.pipe.size - 1:
            mine += watch.losses(losses)
        found = first_of(mesh, sorted(mine))
        if found is None:
            return "every weight, every layer's output and every gradient is finite"
        finding, ranks = found
        where = f"first in {finding.what} on {ranks}"
        if finding.kind not in (Kind.OUTPUT, Kind.LOSS):
            return where
        watch.begin_step()
        repeat()
        if first_of(mesh, watch.seen()) is not None:
            return f"{where}, and again when the forward passes were repeated"
        return (
            f"{where}, but not when the forward passes were repeated: a fault of the machine is "
            "likely"
        )
