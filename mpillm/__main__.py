"""The one entry point: find the command, run it, turn what goes wrong into an exit code.

0: done; 1: a damaged checkpoint, or a defect (with a traceback); 2: a user's mistake (one line);
85: saved before the end, to be started again; 86: hung, ended by the watchdog; 130: Ctrl-C.
A command's module is imported when it is asked for, MPI and NumPy later still.
"""

from __future__ import annotations

import importlib
import sys
from collections.abc import Sequence

from mpillm import __version__
from mpillm.errors import UserError, did_you_mean
from mpillm.parallel.launch import end_in_error, end_interrupted, rank_hint

__all__ = ["entry", "main"]

COMMANDS = {
    "train": "train a model, or resume a run",
    "generate": "continue a prompt with a trained model",
    "doctor": "tell what became of a run, and which rank is at fault",
    "checkpoint": "inspect, verify, reshard or export a checkpoint",
    "verify-layouts": "try whether layouts give one rank's run",
    "schedule": "draw a pipeline schedule's timeline",
}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line `argv` (default: this process's) and return the exit code."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        return _run(arguments)
    except UserError as error:
        return end_in_error(error)
    except KeyboardInterrupt:
        return end_interrupted()
    except SystemExit as stop:  # a parser that has printed its help
        return int(stop.code or 0)


def entry() -> None:
    """The console command `mpillm`."""
    sys.exit(main())


def _run(arguments: list[str]) -> int:
    """Run one command."""
    name = arguments[0] if arguments else "--help"
    if name in ("-h", "--help", "--version"):
        if rank_hint() == 0:
            print(f"mpillm {__version__}" if name == "--version" else _usage())
        return 0
    if name not in COMMANDS:
        valid = [*COMMANDS, "--help", "--version"]
        raise UserError(f"no command '{name}'; {did_you_mean(name, valid)}")
    command = importlib.import_module(f"mpillm.cli.{name.replace('-', '_')}")
    code: int = command.run(arguments[1:])
    return code


def _usage() -> str:
    """The help of the program as a whole."""
    lines = ["usage: mpillm COMMAND ...", ""]
    lines += [f"  {name:<16}{text}" for name, text in COMMANDS.items()]
    lines += ["", "mpillm COMMAND --help tells more; so does mpillm --version.", ""]
    lines += ["Under MPI: mpirun -n 4 mpillm train CONFIG.toml"]
    return "\n".join(lines)


if __name__ == "__main__":
    entry()
