"""Dropout whose decisions do not depend on the layout."""

from __future__ import annotations

from typing import Any

from mpillm.nn.layer import Arrays, Build, Layer, Micro, row_keys

__all__ = ["Dropout"]


class Dropout(Layer):
    """Sets each feature to 0 with probability `drop`, when training, and scales up the rest."""

    def __init__(self, build: Build, name: str, drop: float) -> None:
        self._backend = build.backend
        self._rows = build.rows
        self._name = name
        self._drop = drop

    def forward(self, inputs: Arrays, micro: Micro) -> tuple[Arrays, Any]:
        """This rank's rows of x -> those of y."""
        if not micro.training or self._drop == 0.0:
            return inputs, None
        keys = self._rows.take(row_keys(self._backend, micro, self._name))
        y, saved = self._backend.ops.dropout_forward(inputs[0], keys, self._drop)
        return (y,), saved

    def backward(self, d_outputs: Arrays, saved: Any, micro: Micro) -> Arrays:
        """dy -> dx."""
        if saved is None:
            return d_outputs
        return (self._backend.ops.dropout_backward(d_outputs[0], saved),)
