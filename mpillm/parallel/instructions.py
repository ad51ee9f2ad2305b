"""What a pipeline rank is told to do: computations, messages, and waits for messages.

A `Program` is a rank's list of instructions. `mpillm.parallel.programs` makes programs from a
schedule's actions and proves that they run, `walk` and `simulate` tell when, and the executor in
`pipeline` obeys them. Nothing here sees an array or a communicator.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple, TypeAlias

from mpillm.errors import UserError
from mpillm.parallel.schedules import Action, Kind

__all__ = [
    "TAG_LIMIT",
    "Compute",
    "Direction",
    "Instruction",
    "Message",
    "Program",
    "Receive",
    "Ring",
    "Send",
    "Wait",
    "What",
]

TAG_LIMIT = 32768  # MPI promises the tags 0 to 32767 (MPI_TAG_UB) and no more

Direction: TypeAlias = Literal["send", "receive"]
What: TypeAlias = Literal["activation", "gradient"]


class Message(NamedTuple):
    """What one stage hands to a stage on another rank.

    `source` and `target` are pipeline ranks; `source_chunk` is the chunk of the source that made
    the content, `chunk` the chunk of the target that takes it.
    """

    source: int
    target: int
    tag: int
    what: What
    micro: int
    chunk: int
    source_chunk: int

    @property
    def maker(self) -> Action:
        """The action of the source that makes the content."""
        return Action(_MAKERS[self.what], self.micro, self.source_chunk)

    @property
    def taker(self) -> Action:
        """The action of the target that takes the content."""
        return Action(_MAKERS[self.what], self.micro, self.chunk)

    def __str__(self) -> str:
        return (
            f"{self.what} of micro-batch {self.micro} from rank {self.source} chunk "
            f"{self.source_chunk} to rank {self.target} chunk {self.chunk} (tag {self.tag})"
        )


_MAKERS: dict[What, Kind] = {"activation": Kind.FORWARD, "gradient": Kind.BACKWARD}


@dataclass(frozen=True, slots=True)
class Compute:
    """Run an action; its input has been waited for."""

    action: Action


@dataclass(frozen=True, slots=True)
class Send:
    """Post a non-blocking send."""

    message: Message


@dataclass(frozen=True, slots=True)
class Receive:
    """Post a non-blocking receive."""

    message: Message


@dataclass(frozen=True, slots=True)
class Wait:
    """Complete the posted send or receive of a message; its buffer is free, or filled, after."""

    message: Message
    direction: Direction


Instruction: TypeAlias = Compute | Send | Receive | Wait
Program: TypeAlias = tuple[Instruction, ...]


# The way a kind's result goes along the stages; a weight gradient stays where it is.
_STEP = {Kind.FORWARD: 1, Kind.BACKWARD: -1, Kind.WEIGHT_GRADIENT: 0}


class Ring:
    """The stages of a pipeline and the routes between them.

    With one rank there are no messages: neighbouring stages stand on the same rank, and the
    executor hands over between chunks itself. With more, neighbouring stages never share a rank.
    """

    def __init__(self, ranks: int, chunks: int) -> None:
        if 2 * chunks > TAG_LIMIT:
            raise UserError(
                f"parallel.chunks = {chunks}: messages are told apart by {TAG_LIMIT} tags; "
                f"set parallel.chunks <= {TAG_LIMIT // 2}"
            )
        self.ranks = ranks
        self.chunks = chunks
        self._stages = ranks * chunks
        self._lanes = 2 * chunks
        # After so many micro-batches a tag comes round again, long after its last message is in.
        self._rounds = TAG_LIMIT // self._lanes

    def incoming(self, rank: int, action: Action) -> Message | None:
        """The message that brings an action its input, if one does."""
        stage = action.chunk * self.ranks + rank
        return self._message(action, stage - _STEP[action.kind], stage)

    def outgoing(self, rank: int, action: Action) -> Message | None:
        """The message that takes an action's output on, if one does."""
        stage = action.chunk * self.ranks + rank
        return self._message(action, stage, stage + _STEP[action.kind])

    def before(self, rank: int, action: Action) -> Action | None:
        """With one rank: the action of a neighbouring chunk that hands over the input, if any."""
        chunk = action.chunk - _STEP[action.kind]
        if self.ranks > 1 or chunk == action.chunk or not 0 <= chunk < self.chunks:
            return None
        return action._replace(chunk=chunk)

    def _message(self, action: Action, source: int, target: int) -> Message | None:
        """The message from stage to stage; None on one rank, or where there is no such stage.

        A tag tells apart what, chunk and micro-batch.
        """
        if self.ranks == 1 or source == target:
            return None
        if not (0 <= source < self._stages and 0 <= target < self._stages):
            return None
        source_chunk, source_rank = divmod(source, self.ranks)
        chunk, target_rank = divmod(target, self.ranks)
        gradient = action.kind is Kind.BACKWARD
        return Message(
            source_rank,
            target_rank,
            2 * chunk + gradient + self._lanes * (action.micro % self._rounds),
            "gradient" if gradient else "activation",
            action.micro,
            chunk,
            source_chunk,
        )
