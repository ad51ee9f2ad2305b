"""A stage: consecutive layers, run in turn, and the weights they need at that moment."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from mpillm.nn.layer import Arrays, Layer, Micro, PutOff

if TYPE_CHECKING:
    from mpillm.nn.store import ParamStore

__all__ = ["Stage"]


class Stage:
    """Consecutive layers, run in turn: what a pipeline rank does with one micro-batch."""

    def __init__(self, layers: list[Layer], store: ParamStore) -> None:
        self.layers = layers
        self.store = store

    def forward(self, inputs: Arrays, micro: Micro) -> tuple[Arrays, list[Any]]:
        """Outputs of the last layer, and what every layer saved."""
        saved = []
        for number, layer in enumerate(self.layers):
            self.store.acquire(number, number + 1)
            inputs, kept = layer.forward(inputs, micro)
            if micro.watch is not None:
                micro.watch(layer, inputs)
            self.store.release(number)
            saved.append(kept)
            micro.progress.poll()
        return inputs, saved

    def backward(
        self,
        d_outputs: Arrays,
        saved: list[Any],
        micro: Micro,
        later: list[Callable[[], None]] | None = None,
    ) -> Arrays:
        """Derivatives by the inputs of the first layer. `saved` is emptied on the way.

        With `later`, the work for weight gradients is appended to it in place of being done.
        """
        if later is not None:
            micro = replace(micro, gradients=PutOff(micro.gradients, later))
        for number in reversed(range(len(self.layers))):
            layer = self.layers[number]
            self.store.acquire(number, number - 1)
            d_outputs = layer.backward(d_outputs, saved.pop(), micro)
            self.store.release(number)
            micro.gradients.done(layer)
            micro.progress.poll()
        return d_outputs

    def new_state(self, b: int, capacity: int) -> dict[str, Any]:
        """The empty decoding state of all layers."""
        return {k: v for layer in self.layers for k, v in layer.new_state(b, capacity).items()}
