"""`mpillm` with a fault in it: every rank runs `python faulty.py PLAN train ...`, PLAN being JSON.

folder: where every rank leaves its process number, and the one with the fault when and where that
was. rank: the one that acts. call: "module:Class.method" or "module:function", or "file" for what
changes files (os.rename, os.fsync, ...). match: for files, a part of the path. nth: at which such
call, from 1. when: "before" it or "after" it. delay: seconds later, from another thread. fault: see
`_act`. Without a rank nothing happens.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import json
import os
import signal
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

FILE_CALLS = ("rename", "replace", "link", "mkdir", "rmdir", "unlink", "fsync", "fdatasync", "open")
NOTE = "fault.txt"


def main() -> None:
    """Put the fault in its place and run the command."""
    from mpillm import __main__ as program
    from mpillm.parallel.launch import rank_hint

    plan: dict[str, Any] = json.loads(sys.argv.pop(1))
    rank, folder = rank_hint(), Path(plan["folder"])
    name = folder / f"rank-{rank}"
    name.with_suffix(".tmp").write_text(str(os.getpid()), encoding="ascii")
    name.with_suffix(".tmp").rename(name.with_suffix(".pid"))
    if rank == plan.get("rank"):
        if plan["call"] == "file":
            for call in FILE_CALLS:
                setattr(os, call, _with_fault(getattr(os, call), plan, _path_of))
        else:
            owner, attribute = _find(plan["call"])
            setattr(owner, attribute, _with_fault(getattr(owner, attribute), plan, None))
    program.entry()


def _find(name: str) -> tuple[Any, str]:
    """What holds the attribute of a function's full name, and the attribute's name."""
    module, _, path = name.partition(":")
    *owners, attribute = path.split(".")
    return functools.reduce(getattr, owners, importlib.import_module(module)), attribute


_count = itertools.count(1)  # over all file calls together


def _with_fault(
    call: Callable[..., Any], plan: dict[str, Any], path_of: Callable[..., str] | None
) -> Callable[..., Any]:
    """The call, with the fault at its nth time."""

    @functools.wraps(call)
    def wrapped(*arguments: Any, **options: Any) -> Any:
        where = plan["call"]
        if path_of is not None:
            path = path_of(*arguments, **options)
            if plan.get("match", "") not in path:
                return call(*arguments, **options)
            where = f"{call.__name__} {path}"
        due = next(_count) == plan["nth"]
        if due and plan.get("when") != "after":
            _start(plan, f"before {where}")
        result = call(*arguments, **options)
        if due and plan.get("when") == "after":
            _start(plan, f"after {where}")
        return result

    return wrapped


def _path_of(first: Any, second: Any = None, *_: Any, dir_fd: int | None = None, **__: Any) -> str:
    """The path of a file call, of an open file or relative to a folder too; of two, both."""
    if isinstance(first, int):
        return os.readlink(f"/proc/self/fd/{first}")
    if isinstance(second, str | Path):
        return f"{first} to {second}"
    inside = f"{os.readlink(f'/proc/self/fd/{dir_fd}')}/" if dir_fd is not None else ""
    return inside + os.fsdecode(first)


def _start(plan: dict[str, Any], where: str) -> None:
    """Do it now, or a little later."""
    if not plan.get("delay"):
        _act(plan, where)
        return

    def later() -> None:
        time.sleep(plan["delay"])
        _act(plan, f"{1e3 * plan['delay']:.1f} ms {where.replace('before', 'after')}")

    threading.Thread(target=later, daemon=True).start()


def _act(plan: dict[str, Any], where: str) -> None:
    """Leave a note, and do what is planned."""
    with open(Path(plan["folder"]) / NOTE, "a", encoding="utf-8") as note:
        note.write(f"{time.monotonic()} {where}\n")
    fault = plan["fault"]
    if fault == "kill":
        os.kill(os.getpid(), signal.SIGKILL)
    elif fault == "kill all":
        others = (int(path.read_text()) for path in Path(plan["folder"]).glob("rank-*.pid"))
        for pid in sorted(others, key=lambda pid: pid == os.getpid()):
            os.kill(pid, signal.SIGKILL)
    elif fault == "raise":
        raise RuntimeError("an injected fault")
    elif fault == "raise in a thread":
        threading.Thread(target=lambda: {}["an injected fault"]).start()
    elif fault == "stall":
        time.sleep(3600)
    else:
        raise ValueError(f"no fault {fault!r}")


if __name__ == "__main__":
    main()
