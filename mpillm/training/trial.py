"""A few steps under one layout, and how far what comes out is from another layout's.

How differences are measured: of losses and gradient norms relative to the reference's; of weights
max|a - b| / (max|a| + sum of the learning rates), by parameter. A gradient may be nothing but
rounding noise, and so may what it does to a weight that is near zero: elementwise relative errors
mean nothing there.
"""

from __future__ import annotations

import hashlib
import statistics
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from mpillm.array.backend import Backend
from mpillm.array.random import fold
from mpillm.data.loader import Loader, Tokens
from mpillm.errors import UserError
from mpillm.models.settings import build_model
from mpillm.parallel.group import MESSAGE_LIMIT
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.shard import Shard
from mpillm.training.settings import RunConfig
from mpillm.training.trainer import StepResult, Trainer, resolve_batch

if TYPE_CHECKING:
    from mpillm.parallel.launch import Comm

__all__ = ["Difference", "Outcome", "RaggedLoader", "Trial", "compare"]


class RaggedLoader(Loader):
    """A loader whose sequences end early, each at a place of its own: 1 to T labels of it count.

    What a wrong weighting of tokens would do to the loss then shows: sequences, micro-batches and
    the parts that context ranks hold have unequal numbers of counted tokens, some of them none.
    """

    def counted_tokens(self, first_sample: int) -> int:
        """Number of labels that count in the step after `first_sample` samples."""
        samples = range(first_sample, first_sample + self._batch_size)
        return sum(len(self._window(sample)) - 1 for sample in samples)

    def _window(self, sample: int) -> Tokens:
        """The sample's text, cut off at a place that is a function of the seed and its number."""
        targets = 1 + fold(self._seed, "length", sample) % self._length
        return super()._window(sample)[: targets + 1]


@dataclass(frozen=True)
class Outcome:
    """What some steps gave, by step; seconds a step (median); bytes a step by axis.

    The bytes are payload handed to the calls of the busiest rank of each axis.
    """

    losses: list[float]
    norms: list[float]
    rates: list[float]
    seconds: float
    sent: dict[str, int]


@dataclass(frozen=True)
class _Piece:
    """A range of a parameter's flattened shard."""

    name: str
    shard: Shard
    start: int
    stop: int


class Trial:
    """A model in training under one layout, for some steps. Every method is collective."""

    def __init__(
        self, comm: Comm, config: RunConfig, text: Tokens, *, message_limit: int = MESSAGE_LIMIT
    ) -> None:
        """Build the model under `config.parallel` on all ranks of `comm`.

        text: token ids (N,) to train on. UserError, on every rank, for a layout that cannot be.
        """
        layout = fit(config.parallel, comm.size)
        train = resolve_batch(config.train, layout)
        model = build_model(config.model)
        backend = Backend.create(config.run.backend, dtype=train.dtype)
        loader = RaggedLoader(
            text, train.sequence_length, train.batch_size, train.micro_batch_size, train.seed
        )
        # What is wrong with the weights, once they were gathered; on rank 0.
        self.problems: list[str] = []
        self._recorder = Recorder()
        self._mesh = Mesh(comm, layout, backend, self._recorder, message_limit)
        try:
            self.trainer = Trainer(model, train, config.optimizer, self._mesh, backend, loader)
        except UserError:
            self._mesh.free()
            raise

    def run(self, steps: int) -> Outcome:
        """Do the steps. UserError where one is skipped."""
        before = self._sent()
        results: list[StepResult] = []
        for number in range(1, steps + 1):
            results.append(self.trainer.step())
            if results[-1].skipped is not None:
                raise UserError(f"step {number} was skipped: {results[-1].skipped}")
        mine = {axis: nbytes // steps for axis, nbytes in (self._sent() - before).items()}
        busiest: Counter[str] = Counter()
        for sent in self._mesh.world.allgather_objects(mine):
            busiest |= Counter(sent)
        return Outcome(
            [result.loss for result in results],
            [result.grad_norm for result in results],
            [result.lr for result in results],
            statistics.median(result.seconds for result in results),
            dict(sorted(busiest.items())),
        )

    def weights(self) -> Iterator[tuple[str, np.ndarray]]:
        """Name and whole value of every parameter, one after another, on rank 0 only.

        All replicas must hold the same bits, and somebody every element: what is wrong with that is
        put into `problems` of rank 0. Only one replica of each piece is sent.
        """
        mine: list[tuple[_Piece, np.ndarray]] = []
        for kind, param, part, values in self.trainer.state():
            if kind == "parameter" and values.size:
                start, stop = part or (0, param.shard.size)
                piece = _Piece(param.name, param.shard, start, stop)
                mine.append((piece, np.ascontiguousarray(values).reshape(-1)))
        world = self._mesh.world
        hashes = [(piece, hashlib.sha256(values.data).digest()) for piece, values in mine]
        holders: dict[_Piece, tuple[int, bytes]] = {}
        for rank, held in enumerate(world.allgather_objects(hashes)):
            for piece, digest in held:
                holder, first = holders.setdefault(piece, (rank, digest))
                if digest != first:
                    self.problems.append(
                        f"replicas of {piece.name} differ (ranks {holder} and {rank})"
                    )
        for name in sorted({piece.name for piece in holders}):
            sent = [
                (piece, values)
                for piece, values in mine
                if piece.name == name and holders[piece][0] == world.rank
            ]
            pieces = world.gather_objects(sent)
            if pieces is not None:
                yield name, self._whole(name, [item for held in pieces for item in held])

    def free(self) -> None:
        """Give the communicators back to MPI."""
        self._mesh.free()

    def _whole(self, name: str, pieces: list[tuple[_Piece, np.ndarray]]) -> np.ndarray:
        """A parameter from its pieces."""
        shape, dtype = pieces[0][0].shard.shape, pieces[0][1].dtype
        whole, seen = np.zeros(shape, dtype), np.zeros(shape, np.bool_)
        for piece, values in pieces:
            shard, part = piece.shard, slice(piece.start, piece.stop)
            old, known = whole[shard.slices].reshape(-1), seen[shard.slices].reshape(-1)
            if not np.array_equal(old[part][known[part]], values[known[part]]):
                self.problems.append(f"shards of {name} overlap and differ")
            old[part], known[part] = values, True
            whole[shard.slices] = old.reshape(shard.local_shape)
            seen[shard.slices] = known.reshape(shard.local_shape)
        if not seen.all():
            self.problems.append(f"no rank holds {seen.size - seen.sum()} elements of {name}")
        return whole

    def _sent(self) -> Counter[str]:
        """Bytes that this rank has handed to calls that send, by axis."""
        total: Counter[str] = Counter()
        for (axis, op), traffic in self._recorder.traffic.items():
            if op != "recv":
                total[axis] += traffic.bytes
        return total


@dataclass
class Difference:
    """Largest differences from a reference; whether everything is the same, bit for bit."""

    loss: float = 0.0
    norm: float = 0.0
    weights: float = 0.0
    bitwise: bool = True
    problems: list[str] = field(default_factory=list)


def compare(
    reference: Outcome,
    expected: Mapping[str, np.ndarray],
    outcome: Outcome,
    weights: Iterable[tuple[str, np.ndarray]],
) -> Difference:
    """How far an outcome and its weights are from a reference and the weights expected by it."""
    found = Difference(
        loss=_relative(reference.losses, outcome.losses),
        norm=_relative(reference.norms, outcome.norms),
        bitwise=(reference.losses, reference.norms) == (outcome.losses, outcome.norms),
    )
    missing = set(expected)
    for name, b in weights:
        missing.discard(name)
        a = expected.get(name)
        if a is None or a.shape != b.shape or a.dtype != b.dtype:
            found.problems.append(f"the reference has no parameter {name} {b.shape} {b.dtype}")
        elif not np.isfinite(b).all():
            found.problems.append(f"{name} holds values that are not finite")
        elif not np.array_equal(_bits(a), _bits(b)):
            found.bitwise = False
            scale = float(np.abs(a).max()) + sum(reference.rates)
            found.weights = max(found.weights, float(np.abs(a - b).max()) / scale)
    found.problems += [f"no parameter {name}" for name in sorted(missing)]
    return found


def _bits(x: np.ndarray) -> np.ndarray:
    """The bytes of an array, which tell -0.0 from 0.0."""
    return np.ascontiguousarray(x).reshape(-1).view(np.uint8)


def _relative(expected: list[float], given: list[float]) -> float:
    """Largest relative difference of two lists of finite numbers."""
    return max(
        0.0 if a == b else abs(a - b) / max(abs(a), abs(b))
        for a, b in zip(expected, given, strict=True)
    )
