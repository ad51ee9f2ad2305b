"""The `model` section: a union of the families, told apart by `family`.

A family is a module of this package that defines `Settings` (a `ModelSettings`). Families are found
by their module's name, so that a new one edits no central file.
"""

from __future__ import annotations

import importlib
import pkgutil
from typing import TYPE_CHECKING, Annotated, Any

from msgspec import Meta

from mpillm.config import Section
from mpillm.errors import UserError, did_you_mean

if TYPE_CHECKING:
    from mpillm.models.model import Model

__all__ = ["ModelSettings", "build_model", "families"]

_NOT_FAMILIES = {"settings", "model"}


def families() -> list[str]:
    """Names of the model families."""
    import mpillm.models as package

    names = (module.name for module in pkgutil.iter_modules(package.__path__))
    return sorted(name for name in names if name not in _NOT_FAMILIES)


class ModelSettings(Section, frozen=True, kw_only=True):
    """What every family has."""

    family: Annotated[str, Meta(description="the model family")]
    vocabulary: Annotated[int, Meta(ge=0, description="token types; 0: the tokenizer's")] = 0
    context: Annotated[
        int, Meta(ge=0, description="longest sequence; 0: train.sequence_length")
    ] = 0

    @classmethod
    def variant(cls, table: dict[str, Any], where: str) -> type[ModelSettings]:
        """The family's own settings class for the table of a `model` section."""
        name = table.get("family", "gpt2")
        if name not in families():
            raise UserError(
                f"{where}.family: no family {name!r}; {did_you_mean(str(name), families())}"
            )
        settings: type[ModelSettings] = importlib.import_module(f"mpillm.models.{name}").Settings
        return settings


def build_model(settings: ModelSettings) -> Model:
    """The model that the settings describe; `vocabulary` and `context` must be filled in."""
    model: Model = importlib.import_module(f"mpillm.models.{settings.family}").build(settings)
    return model
