"""Versions of the manifest: an older one is made into the newest, any other is refused by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from mpillm.errors import UserError
from mpillm.storage.disk import Damaged

__all__ = ["VERSION", "upgraded"]

VERSION = 2

Table = dict[str, Any]


def upgraded(manifest: Table, where: object) -> Table:
    """A decoded manifest with the members of the newest version; `version` stays its own.

    Raises UserError in one line for a version that was never released or is newer than `VERSION`.
    """
    version = manifest.get("version")
    if type(version) is not int or not 1 <= version <= VERSION:
        known = type(version) is int and version > VERSION
        raise UserError(
            f"{where} has format version {repr(version)[:20]}, which "
            f"{'a newer mpillm has written' if known else 'no mpillm has ever written'}; this one "
            f"reads versions 1 to {VERSION}" + ("; install a newer one" if known else "")
        )
    for step in range(version, VERSION):
        manifest = _UPGRADES[step](manifest, where)
    return manifest


def _from_1(manifest: Table, where: object) -> Table:
    """Version 2 has `state`, of which a run of version 1 had none."""
    if "state" in manifest:
        raise Damaged(f"{where} is damaged: version 1 has no field `state`")
    return {**manifest, "state": {}}


_UPGRADES: dict[int, Callable[[Table, object], Table]] = {1: _from_1}
