"""The `data` section: where the text comes from and how it becomes tokens."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from mpillm.config import Section

__all__ = ["DataSettings"]


class DataSettings(Section, frozen=True, kw_only=True):
    """The text of a run: exactly one of `corpus` and `text` is set (checked where it is read)."""

    corpus: Annotated[str, Meta(description="a built-in corpus, by name: kjv")] = ""
    text: Annotated[
        tuple[str, ...], Meta(description="files, folders (their *.txt) or globs of UTF-8 text")
    ] = ()
    tokenizer: Annotated[Literal["character"], Meta(description="how text is cut into tokens")] = (
        "character"
    )
    validation: Annotated[
        float, Meta(ge=0, lt=1, description="last fraction of the characters, kept from training")
    ] = 0.1
