"""Errors that a user can mend, told in one line.

A `UserError` ends a command with its message, printed once, and exit code 2. Every other exception
is a defect or a fault of the machine: it ends the whole job with a traceback and the rank.
"""

from __future__ import annotations

import difflib
from collections.abc import Iterable

__all__ = ["EXIT_HUNG", "EXIT_REQUEUE", "EXIT_USER_ERROR", "UserError", "did_you_mean"]

EXIT_USER_ERROR = 2
EXIT_REQUEUE = 85  # saved before its end: the same command goes on
EXIT_HUNG = 86  # ended by the watchdog


class UserError(Exception):
    """A mistake that the user can mend: the message says what, where and what was expected."""


def did_you_mean(name: str, valid: Iterable[str]) -> str:
    """The end of an error line: the nearest valid name, or all of them when none is near.

    >>> did_you_mean("tensr", ["tensor", "data"])
    "did you mean 'tensor'?"
    >>> did_you_mean("zzz", ["tensor", "data"])
    'valid: data, tensor'
    """
    choices = sorted(valid)
    near = difflib.get_close_matches(name, choices, n=1, cutoff=0.6)
    if near:
        return f"did you mean '{near[0]}'?"
    return "valid: " + (", ".join(choices) if choices else "none")
