"""The settings of a generation."""

from __future__ import annotations

from mpillm.config import Section
from mpillm.parallel.settings import ParallelSettings

__all__ = ["GenerateConfig"]


class GenerateConfig(Section, frozen=True, kw_only=True):
    """Every setting of a generation."""

    parallel: ParallelSettings = ParallelSettings()
