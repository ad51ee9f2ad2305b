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
    sequence: Annotated[
        bool,
        Meta(description="tensor ranks share out the tokens between the products, too"),
    ] = False
    schedule: Annotated[
        Literal["gpipe", "1f1b", "interleaved", "zero-bubble"],
        Meta(description="order of a pipeline stage's work"),
    ] = "1f1b"
    chunks: Annotated[int, Meta(ge=1, description="stages that each pipeline rank holds")] = 1
    boundaries: Annotated[
        tuple[int, ...],
        Meta(description="layers that begin a new stage, counted from 0; none: cut evenly by cost"),
    ] = ()
    zero: Annotated[
        int,
        Meta(
            ge=0,
            le=3,
            description="what replicas share out: 1 optimizer state, 2 also gradients, 3 also "
            "weights (ZeRO)",
        ),
    ] = 0
    overlap: Annotated[
        bool, Meta(description="sum gradients while others are still being computed")
    ] = True
    reduction: Annotated[
        Literal["ordered", "library"],
        Meta(
            description="how sums over ranks are formed: ordered, by a fixed tree; library, as MPI "
            "likes, with no promise of the same bits twice"
        ),
    ] = "ordered"
