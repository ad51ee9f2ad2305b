"""The `checkpoint` section: when a run is saved and what is kept."""

from __future__ import annotations

from typing import Annotated

from msgspec import Meta

from mpillm.config import Section

__all__ = ["CheckpointSettings"]


class CheckpointSettings(Section, frozen=True):
    """When a run is saved and how many checkpoints are kept."""

    every: Annotated[
        int, Meta(ge=0, description="steps between checkpoints; 0: only after the last step")
    ] = 0
    keep: Annotated[int, Meta(ge=1, description="checkpoints kept, the newest ones")] = 2
