"""The `parallel` section: the layout of the ranks."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from mpillm.config import Section

__all__ = ["ParallelSettings"]


class ParallelSettings(Section, frozen=True, kw_only=True):
    """Sizes of the five mesh axes; their product is the number of ranks."""

    data: Annotated[
        int, Meta(ge=0, description="data-parallel replicas; 0: as many as the ranks allow")
    ] = 0
    tensor: Annotated[int, Meta(ge=1, description="ranks that share each layer's products")] = 1
    pipe: Annotated[int, Meta(ge=1, description="pipeline stages")] = 1
    context: Annotated[int, Meta(ge=1, description="ranks that share each sequence")] = 1
    expert: Annotated[int, Meta(ge=1, description="ranks that share the experts")] = 1
    schedule: Annotated[
        Literal["gpipe", "1f1b"], Meta(description="order of a pipeline stage's work")
    ] = "1f1b"
    reduction: Annotated[
        Literal["ordered", "library"],
        Meta(
            description="how sums over ranks are formed: ordered, by a fixed tree; library, as MPI "
            "likes, with no promise of the same bits twice"
        ),
    ] = "ordered"
