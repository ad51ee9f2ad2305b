"""A checkpoint's model on the ranks of a mesh, ready for forward passes."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from mpillm.models.model import Model, Spec, build_stages
from mpillm.nn.rows import SharedRows
from mpillm.parallel.pipeline import Executor
from mpillm.parallel.progress import Progress

if TYPE_CHECKING:
    from mpillm.array.backend import Array, Backend
    from mpillm.checkpoint.reader import Checkpoint
    from mpillm.nn.layer import Micro
    from mpillm.nn.stage import Stage
    from mpillm.parallel.group import Group
    from mpillm.parallel.mesh import Mesh

__all__ = ["Pipeline", "load"]


@dataclass(frozen=True)
class Pipeline:
    """This rank's stages of a model, by chunk, and what runs them."""

    pipe: Group
    stages: list[Stage]
    executor: Executor
    backend: Backend
    progress: Progress


def load(
    model: Model, checkpoint: Checkpoint, mesh: Mesh, backend: Backend, dtype: Any
) -> Pipeline:
    """Build the model and fill in the weights, whatever layout wrote them.

    A rank reads what it keeps and waits for no other. UserError for a layout that the model cannot
    use, and for a checkpoint that does not hold the model.
    """
    model.check_layout(mesh.layout)
    progress = Progress()
    stages = build_stages(
        model, backend, mesh, dtype, seed=None, gradients=False, progress=progress
    )
    for stage in stages:
        for param, part, view in stage.store.weights():
            values: Array = checkpoint.read("parameter", param.name, param.shard, part)
            view[...] = backend.from_host(values.astype(view.dtype, copy=False))
    rows = SharedRows(mesh.tensor, backend, mesh.layout.sequence)

    def boundary(micro: Micro) -> tuple[Spec, ...]:
        return model.boundary(micro, dtype, rows)

    executor = Executor(mesh.pipe, stages, boundary, backend, progress)
    return Pipeline(mesh.pipe, stages, executor, backend, progress)
