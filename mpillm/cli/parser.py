"""The command line's parser: errors in one line, help once in a parallel job."""

from __future__ import annotations

import argparse
from collections.abc import Callable, Sequence
from typing import IO, NoReturn, TypeVar

from mpillm.config import Section, setting_names
from mpillm.errors import UserError, did_you_mean
from mpillm.parallel.launch import rank_hint

__all__ = ["Parser", "integer", "number"]

Number = TypeVar("Number", int, float)


class Parser(argparse.ArgumentParser):
    """An `ArgumentParser` that raises `UserError` and whose help rank 0 prints."""

    def __init__(self, command: str, description: str | None, **options: str) -> None:
        """Options are those of `ArgumentParser`, such as `usage` and `epilog`."""
        super().__init__(
            prog=f"mpillm {command}",
            description=description,
            allow_abbrev=False,
            formatter_class=argparse.RawDescriptionHelpFormatter,
            **options,  # type: ignore[arg-type]
        )
        self._command = command

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """Parse all of `arguments`; one that is not known is an error with the nearest that is."""
        known, unknown = self.parse_known_args(arguments)
        options = [argument for argument in unknown if argument.startswith("-")]
        if options:
            name = options[0].partition("=")[0]
            valid = [text for action in self._actions for text in action.option_strings]
            self.error(f"no option {name}; {did_you_mean(name, valid)}")
        if unknown:
            self.error(f"unexpected argument {unknown[0]!r}; {self.format_usage()}")
        return known

    def parse_with_settings(
        self, arguments: Sequence[str], kind: type[Section]
    ) -> tuple[argparse.Namespace, list[str]]:
        """`parse` what is no setting of `kind`; the settings, to be read by `mpillm.config.load`.

        A setting's name has a dot, or is a setting's without its section: a mistake that the
        settings' own error line explains better than a parser can.
        """
        own = {text for action in self._actions for text in action.option_strings}
        keys = {f"--{name.rpartition('.')[2]}" for name in setting_names(kind)} - own

        def is_setting(argument: str) -> bool:
            name = argument.partition("=")[0]
            known = "." in name or name in keys
            return name.startswith("--") and known and len(name.split()) == 1

        settings = [argument for argument in arguments if is_setting(argument)]
        return self.parse([text for text in arguments if not is_setting(text)]), settings

    def error(self, message: str) -> NoReturn:
        """Raise the message as a `UserError`."""
        raise UserError(f"{self._command}: {' '.join(message.split())}")

    def print_help(self, file: IO[str] | None = None) -> None:  # type: ignore[override]
        """Print the help, once in a parallel job."""
        if rank_hint() == 0:
            super().print_help(file)


def integer(text: str) -> int:
    """An option's value as an integer."""
    return _number(int, text, "an integer")


def number(text: str) -> float:
    """An option's value as a number."""
    return _number(float, text, "a number")


def _number(kind: Callable[[str], Number], text: str, expected: str) -> Number:
    try:
        return kind(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"expected {expected}, got {text!r}") from None
