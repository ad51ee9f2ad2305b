"""Train a model, or resume the run in its folder."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import mpillm
from mpillm.cli.parser import Parser
from mpillm.config import describe, setting_names
from mpillm.training.settings import RunConfig

__all__ = ["run"]


def run(arguments: Sequence[str]) -> int:
    """`mpillm train CONFIG.toml [--section.key=value ...] [--fresh]`."""
    overrides = [argument for argument in arguments if _is_setting(argument)]
    others = [argument for argument in arguments if not _is_setting(argument)]
    parser = Parser(
        "train",
        __doc__,
        usage="mpillm train CONFIG.toml [--section.key=value ...] [--fresh]",
        epilog="Settings, in the file or as options that override it (of the model, those of the "
        f"usual family):\n\n{describe(RunConfig)}",
    )
    parser.add_argument("config", metavar="CONFIG.toml", type=Path, help="the settings of the run")
    parser.add_argument(
        "--fresh", action="store_true", help="start over even where the run has checkpoints"
    )
    options = parser.parse(others)
    mpillm.train(options.config, overrides=overrides, fresh=options.fresh)
    return 0


def _is_setting(argument: str) -> bool:
    """Whether an argument is a setting: its name has a dot, or is a setting's without its section.

    The latter is a mistake that the settings' own error line explains better than a parser can.
    """
    name = argument.partition("=")[0]
    keys = {setting.rpartition(".")[2] for setting in setting_names(RunConfig)}
    return name.startswith("--") and ("." in name or name[2:] in keys)
