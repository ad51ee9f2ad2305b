"""What a schedule costs: programs against a clock, and the bubble that is left.

Nothing here sees an array or a communicator.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from mpillm.parallel.instructions import Compute, Program
from mpillm.parallel.programs import ScheduleError, lower
from mpillm.parallel.schedules import Action, Kind, peak_activations
from mpillm.parallel.walk import Span, walk

__all__ = ["Costs", "Span", "Timeline", "bubble_fraction", "simulate"]


@dataclass(frozen=True)
class Costs:
    """Seconds of the actions of each stage, by stage (chunk * ranks + rank), and of a message.

    backward: the gradients of the inputs alone. An action that computes those of the weights, too,
    takes as long as both. transfer: latency and transfer time of one message.
    """

    forward: Sequence[float]
    backward: Sequence[float]
    weight_gradient: Sequence[float]
    transfer: float = 0.0

    @classmethod
    def even(cls, stages: int, forward: float, backward: float, weight_gradient: float) -> Costs:
        """All stages alike, and messages that take no time."""
        return cls([forward] * stages, [backward] * stages, [weight_gradient] * stages)


@dataclass(frozen=True)
class Timeline:
    """When each rank computed what, simulated or measured: by rank, its actions in order."""

    rows: Sequence[Sequence[Span]]

    @property
    def start(self) -> float:
        """When the first action starts, in seconds."""
        return min((row[0].start for row in self.rows if row), default=0.0)

    @property
    def makespan(self) -> float:
        """Seconds from the first start to the last stop."""
        return max((row[-1].stop for row in self.rows if row), default=0.0) - self.start

    @property
    def busy(self) -> list[float]:
        """Seconds that each rank computes."""
        return [sum(span.stop - span.start for span in row) for row in self.rows]

    @property
    def idle(self) -> list[float]:
        """Seconds of the makespan that each rank does not compute."""
        makespan = self.makespan
        return [makespan - busy for busy in self.busy]

    @property
    def bubble(self) -> float:
        """The idle share of all ranks' time, 0 to 1."""
        makespan = self.makespan
        return sum(self.idle) / (len(self.rows) * makespan) if makespan else 0.0

    @property
    def peak_activations(self) -> list[int]:
        """See `mpillm.parallel.schedules.peak_activations`."""
        return peak_activations([[span.action for span in row] for row in self.rows])


def simulate(programs: Sequence[Program] | Sequence[Sequence[Action]], costs: Costs) -> Timeline:
    """Run programs, or a schedule's actions, against a clock.

    A rank does one thing at a time, in the order of its program: an action takes its stage's time,
    a post none. A message needs both its ends posted (rendezvous), is in `costs.transfer` seconds
    later whatever the ranks compute meanwhile, and messages do not slow each other down. A wait
    lasts until the message is in. ScheduleError for programs that do not end, ValueError for costs
    that do not fit.
    """
    ranks = len(programs)
    chunks, rest = divmod(len(costs.forward), ranks)
    if rest or not len(costs.forward) == len(costs.backward) == len(costs.weight_gradient):
        raise ValueError(f"costs of {len(costs.forward)} stages do not fit {ranks} ranks")
    ready = _lowered(programs, chunks)
    backward = list(costs.backward)
    seconds = {
        Kind.FORWARD: costs.forward,
        Kind.BACKWARD: backward,
        Kind.WEIGHT_GRADIENT: costs.weight_gradient,
    }
    split = {
        step.action.chunk * ranks + rank
        for rank, program in enumerate(ready)
        for step in program
        if isinstance(step, Compute) and step.action.kind is Kind.WEIGHT_GRADIENT
    }
    for stage in set(range(ranks * chunks)) - split:
        backward[stage] += costs.weight_gradient[stage]
    result = walk(
        ready,
        lambda rank, action: seconds[action.kind][action.chunk * ranks + rank],
        costs.transfer,
    )
    for rank, (index, _) in result.stuck.items():
        raise ScheduleError(rank, index, "waits for ever; see mpillm.parallel.programs.validate")
    return Timeline(result.rows)


def _lowered(
    programs: Sequence[Program] | Sequence[Sequence[Action]], chunks: int
) -> list[Program]:
    """Programs as they are, actions lowered."""
    rows = [tuple(row) for row in programs]
    actions = [[item for item in row if isinstance(item, Action)] for row in rows]
    if any(actions):
        return list(lower(actions, chunks))
    return [tuple(item for item in row if not isinstance(item, Action)) for row in rows]


def bubble_fraction(
    name: str,
    ranks: int,
    micros: int,
    chunks: int,
    forward: float,
    backward: float,
    weight_gradient: float,
) -> float | None:
    """The bubble by formula, of a schedule by its name, where all stages take equally long.

    It is the idle share of all ranks' time; the other arguments are those of the schedule and of
    `Costs.even`. None where no formula is known.

    With p ranks, m micro-batches, v chunks: (p - 1) / (v m + p - 1) for GPipe and 1F1B (Huang et
    al. 2019; Narayanan et al. 2021) and, of v chunks, interleaved 1F1B, for m >= p. Fewer
    micro-batches than ranks must wait for themselves before each next chunk: a makespan of
    v p + m - 1 forwards and backwards. ZB-H1 leaves each rank idle for (p - 1) (F + B - W), for
    m >= p and W <= min(F, B) (Qi et al. 2023, section 2.3). With fewer micro-batches it is
    (p - 1) (F + B) - (m - 1) W, and with a larger W (p - 1) max(F, B), the time for which a rank
    waits for the first micro-batch.
    """
    if name != "zero-bubble":
        rounds = chunks * max(micros, ranks) + min(micros, ranks) - 1
        return 1.0 - chunks * micros / rounds
    if weight_gradient <= min(forward, backward):
        idle = (ranks - 1) * (forward + backward) - (min(micros, ranks) - 1) * weight_gradient
    elif micros >= ranks:
        idle = (ranks - 1) * max(forward, backward)
    else:
        return None
    return idle / (micros * (forward + backward + weight_gradient) + idle)
