"""The `checkpoint` section: when a run is saved and what is kept."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from mpillm.config import Section

__all__ = ["CheckpointSettings"]


class CheckpointSettings(Section, frozen=True, kw_only=True, rename={"async_": "async"}):
    """When and how a run is saved, and how many checkpoints are kept."""

    every: Annotated[
        int, Meta(ge=0, description="steps between checkpoints; 0: only after the last step")
    ] = 0
    keep: Annotated[int, Meta(ge=1, description="checkpoints kept, the newest ones")] = 2
    keep_every: Annotated[
        int, Meta(ge=0, description="keep those of every so many steps for good; 0: none")
    ] = 0
    async_: Annotated[bool, Meta(description="write while training goes on")] = False
    writers_per_node: Annotated[
        int, Meta(ge=0, description="ranks of a node that write files; 0: all")
    ] = 0
    verify: Annotated[
        bool, Meta(description="read back what was written before it counts as saved")
    ] = True
