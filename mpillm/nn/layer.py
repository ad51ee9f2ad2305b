"""The contract of a layer, what a micro-batch carries, and the stage that runs layers in turn."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, Literal

from mpillm.array.random import fold

if TYPE_CHECKING:
    from mpillm.array.backend import Array, Backend
    from mpillm.nn.param import Param, ParamStore
    from mpillm.parallel.mesh import Mesh

__all__ = ["Build", "GradientSink", "Layer", "Micro", "Stage", "row_keys"]

Arrays = tuple[Any, ...]


class GradientSink:
    """Where layers hand in the work that adds to weight gradients; it is done at once.

    Layers say which parameters a piece of work completes, and never touch `grad` outside of it, so
    that a sink may put the work off or follow which gradients are complete.
    """

    def add(self, params: tuple[Param, ...], work: Callable[[], None]) -> None:
        """Do `work`, which adds to `grad` of all of `params`."""
        work()


@dataclass
class Micro:
    """A micro-batch: b sequences of t tokens on the way through the stages.

    tokens: int (b, t). labels: int (b, t), the token after each; needed where the loss is. mask:
    (b, t), 1 for counted tokens, else 0, in the compute dtype. samples: int64 (b,), number of each
    sequence in the step, the same in every layout. index: int64 (t,) or (b, t), each token's place
    in its sequence. documents: int (b, t) or None for one document a sequence. key: the step's
    random key. want: what the head gives: the summed loss, or logits. state: for each attention
    layer's name its key/value cache, when decoding. gradients: the sink for weight gradients.
    """

    tokens: Array
    index: Array
    samples: Array
    labels: Array = None
    mask: Array = None
    documents: Array = None
    training: bool = False
    key: int = 0
    want: Literal["loss", "logits", "last_logits"] = "loss"
    state: dict[str, Any] | None = None
    gradients: GradientSink = field(default_factory=GradientSink)

    @property
    def shape(self) -> tuple[int, int]:
        """(b, t)."""
        b, t = self.tokens.shape
        return b, t


@dataclass(frozen=True)
class Build:
    """What a layer is built from: where it computes, whom it talks to, where its weights lie."""

    backend: Backend
    mesh: Mesh
    store: ParamStore


class Layer(ABC):
    """A pair of passes over tuples of arrays. A layer keeps its weights and nothing else."""

    @abstractmethod
    def forward(self, inputs: Arrays, micro: Micro) -> tuple[Arrays, Any]:
        """Returns (outputs, saved): saved is what `backward` needs, None when not training."""

    @abstractmethod
    def backward(self, d_outputs: Arrays, saved: Any, micro: Micro) -> Arrays:
        """Derivatives of the loss by the inputs, given those by the outputs.

        Hands the work for weight gradients to `micro.gradients`. May overwrite `d_outputs`, and
        what is in `saved`: both are used once.
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


class Stage:
    """Consecutive layers, run in turn: what a pipeline rank does with one micro-batch."""

    def __init__(self, layers: list[Layer], store: ParamStore) -> None:
        self.layers = layers
        self.store = store

    def forward(self, inputs: Arrays, micro: Micro) -> tuple[Arrays, list[Any]]:
        """Outputs of the last layer, and what every layer saved."""
        saved = []
        for layer in self.layers:
            inputs, kept = layer.forward(inputs, micro)
            saved.append(kept)
        return inputs, saved

    def backward(self, d_outputs: Arrays, saved: list[Any], micro: Micro) -> Arrays:
        """Derivatives by the inputs of the first layer. `saved` is emptied on the way."""
        for layer in reversed(self.layers):
            d_outputs = layer.backward(d_outputs, saved.pop(), micro)
        return d_outputs

    def new_state(self, b: int, capacity: int) -> dict[str, Any]:
        """The empty decoding state of all layers."""
        return {k: v for layer in self.layers for k, v in layer.new_state(b, capacity).items()}
