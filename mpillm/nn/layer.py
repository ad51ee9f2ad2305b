"""The contract of a layer, what a micro-batch carries, and what a layer is built from."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mpillm.array.random import fold
from mpillm.nn.rows import SharedRows
from mpillm.parallel.progress import Progress

if TYPE_CHECKING:
    from mpillm.array.backend import Array, Backend
    from mpillm.nn.param import Param
    from mpillm.nn.store import ParamStore
    from mpillm.parallel.mesh import Mesh

__all__ = ["Build", "GradientSink", "Keys", "Layer", "Micro", "PutOff", "Recomputed", "row_keys"]

Arrays = tuple[Any, ...]

# What is computed anew in the backward pass, in place of being kept.
Recomputed = Literal["none", "attention", "block"]


class GradientSink:
    """Where layers hand in the work that adds to weight gradients; it is done at once.

    Layers say which parameters a piece of work completes, and never touch `grad` outside of it, so
    that a sink may put the work off or follow which gradients are complete. Work may talk to the
    tensor group: a sink does it in the order in which it was handed in, alike on all tensor ranks.
    """

    def add(self, params: tuple[Param, ...], work: Callable[[], None]) -> None:
        """Do `work`, which adds to `grad` of all of `params`."""
        work()

    def done(self, layer: Layer) -> None:
        """All work of this layer of the stage, for this micro-batch, was handed in."""


class PutOff(GradientSink):
    """Keeps the work for later: the list `work` holds it in order, with the notices of its end."""

    def __init__(self, sink: GradientSink, work: list[Callable[[], None]]) -> None:
        self._sink = sink
        self._work = work

    def add(self, params: tuple[Param, ...], work: Callable[[], None]) -> None:
        """Keep the work, which then goes to the sink."""
        self._work.append(lambda: self._sink.add(params, work))

    def done(self, layer: Layer) -> None:
        """Keep the notice."""
        self._work.append(lambda: self._sink.done(layer))


@dataclass(frozen=True)
class Keys:
    """The tokens that one context rank holds: their places (t,), document ids (b, t) or None."""

    index: Array
    documents: Array


@dataclass
class Micro:
    """A micro-batch: b sequences of t tokens on the way through the stages.

    With context parallelism t counts the tokens that this rank holds, of `length` in the sequence.

    tokens: int (b, t). labels: int (b, t), the token after each; needed where the loss is. mask:
    (b, t), 1 for counted tokens, else 0, in the compute dtype. samples: int64 (b,), number of each
    sequence in the step, the same in every layout. index: int64 (t,) or (b, t), each token's place
    in its sequence. documents: int (b, t) or None for one document a sequence. length: tokens in a
    sequence, over all context ranks; 0: t. counted: (b,), counted tokens of each sequence over all
    context ranks, in the compute dtype. keys: what each context rank holds; empty where there is
    but one. key: the step's random key. want: what the head gives: the summed loss, or logits.
    state: for each attention layer's name its key/value cache, when decoding. scale: the derivative
    of the step's loss by a token's loss, where the head's backward pass follows its forward pass at
    once: it then does both in one, and hands in its weight's gradient during the forward pass, to a
    sink that does the work at once. gradients: the sink for weight gradients. progress: the calls
    under way, polled between layers. watch: is shown each layer of a stage and its outputs.
    """

    tokens: Array
    index: Array
    samples: Array
    labels: Array = None
    mask: Array = None
    documents: Array = None
    length: int = 0
    counted: Array = None
    keys: tuple[Keys, ...] = ()
    training: bool = False
    key: int = 0
    want: Literal["loss", "logits", "last_logits"] = "loss"
    state: dict[str, Any] | None = None
    scale: float | None = None
    gradients: GradientSink = field(default_factory=GradientSink)
    progress: Progress = field(default_factory=Progress)
    watch: Callable[[Layer, Arrays], None] | None = None

    @property
    def shape(self) -> tuple[int, int]:
        """(b, t)."""
        b, t = self.tokens.shape
        return b, t


@dataclass(frozen=True)
class Build:
    """What a layer is built from: where it computes, whom it talks to, where its weights lie.

    recompute: what is computed anew in the backward pass in place of being kept, see
    `mpillm.nn.recompute`.
    """

    backend: Backend
    mesh: Mesh
    store: ParamStore
    recompute: Recomputed = "none"

    @property
    def rows(self) -> SharedRows:
        """How the tensor ranks share out the tokens between the products."""
        return SharedRows(self.mesh.tensor, self.backend, self.mesh.layout.sequence)


class Layer(ABC):
    """A pair of passes over tuples of arrays. A layer keeps its weights and nothing else."""

    @abstractmethod
    def forward(self, inputs: Arrays, micro: Micro) -> tuple[Arrays, Any]:
        """Returns (outputs, saved): saved is what `backward` needs, None when not training."""

    @abstractmethod
    def backward(self, d_outputs: Arrays, saved: Any, micro: Micro) -> Arrays:
        """Derivatives of the loss by the inputs, given those by the outputs.

        Hands the work for weight gradients to `micro.gradients`. May overwrite what is in `saved`,
        which is used once, and leaves `d_outputs` as they are: a residual path uses them again, and
        so may work that was put off.
        """

    def new_state(self, b: int, capacity: int) -> dict[str, Any]:
        """What decoding b sequences of at most `capacity` tokens keeps in `Micro.state`, empty."""
        return {}


def row_keys(backend: Backend, micro: Micro, name: str) -> Array:
    """Random keys of the rows of a layer's dropout, uint64 (b, t).

    A function of (seed, step) by `micro.key`, of the layer's name, and of each token's sequence and
    place, so the decisions do not depend on the layout.
    """
    index = micro.index if micro.index.ndim == 2 else micro.index[None, :]
    return backend.random.fold(fold(micro.key, name), micro.samples[:, None], index)
