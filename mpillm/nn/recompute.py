"""Activations that are computed anew in the backward pass, in place of being kept until then.

Chen et al. 2016, "Training Deep Nets with Sublinear Memory Cost", for whole blocks; Korthikanti et
al. 2022, "Reducing Activation Recomputation in Large Transformer Models", section 5, for attention
alone. The probabilities are never kept here, so what recomputing attention saves are queries, keys,
values and the outputs of heads: a branch is computed anew as a whole, its products too.
"""

from __future__ import annotations

from typing import Any

from mpillm.nn.layer import Arrays, Build, Layer, Micro, Recomputed

__all__ = ["Recompute", "recomputed"]


class Recompute(Layer):
    """A layer that keeps its inputs only, and runs forward again before its backward pass.

    The second pass gives the same bits, as dropout is keyed, where sums over ranks are ordered.
    What the first one communicates, it communicates again. The inputs are the caller's arrays,
    which must be left as they are until then.
    """

    def __init__(self, layer: Layer) -> None:
        self.layer = layer

    def forward(self, inputs: Arrays, micro: Micro) -> tuple[Arrays, Any]:
        """As the layer's; saves the inputs."""
        outputs, _ = self.layer.forward(inputs, micro)
        return outputs, inputs if micro.training else None

    def backward(self, d_outputs: Arrays, saved: Any, micro: Micro) -> Arrays:
        """As the layer's."""
        kept = self.layer.forward(saved, micro)[1]  # and the outputs are let go at once
        return self.layer.backward(d_outputs, kept, micro)

    def new_state(self, b: int, capacity: int) -> dict[str, Any]:
        """The layer's."""
        return self.layer.new_state(b, capacity)


def recomputed(build: Build, part: Recomputed, layer: Layer) -> Layer:
    """The layer, which is a `part` of the model, as `build.recompute` wants it."""
    return Recompute(layer) if build.recompute == part else layer
