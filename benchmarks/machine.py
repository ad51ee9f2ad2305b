"""The machine that a benchmark runs on, and the file that its result goes to."""

from __future__ import annotations

import datetime
import importlib.metadata
import os
import platform
import re
import shutil
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path

__all__ = ["cores", "describe", "free_memory", "mpirun", "write_result"]

ROOT = Path(__file__).resolve().parent.parent


def describe(threads: int, *packages: str) -> list[str]:
    """What a figure depends on besides the settings, as a Markdown list.

    threads: those of a rank; 0 where there is no one number.
    """
    versions = [f"{name} {importlib.metadata.version(name)}" for name in ("numpy", *packages)]
    git = ("git", "-C", str(ROOT))
    commit = _command(*git, "rev-parse", "--short", "HEAD")
    changed = _command(*git, "status", "--porcelain", "mpillm", "jobs", "benchmarks")
    load = ", ".join(f"{average:.1f}" for average in os.getloadavg())
    return [
        f"- {_processor()}, {cores()} cores, "
        + (f"{threads} thread{'s' if threads > 1 else ''} a rank; " if threads else "")
        + f"load averages at the end {load}",
        f"- {platform.system()}, Python {platform.python_version()}, {', '.join(versions)}",
        f"- {datetime.date.today().isoformat()}, commit {commit or 'unknown'}"
        + (" with changes" if changed else ""),
    ]


def write_result(folder: Path, what: str, lines: Sequence[str]) -> None:
    """Print the lines and write them to a Markdown file named by benchmark, machine and date."""
    print("\n".join(lines), flush=True)
    name = re.sub(r"[^a-z0-9]+", "-", f"{_processor()} {cores()} cores".lower()).strip("-")
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{what}_{name}_{datetime.date.today().isoformat()}.md"
    path.write_text("\n".join(lines) + "\n", encoding="utf-8")
    print(f"\nwritten to {path}")


def mpirun(ranks: int) -> list[str]:
    """The start of a command that runs on so many ranks.

    With the launcher in the environment's MPIRUN, such as "mpirun --bind-to core", else with that
    of this Python's MPI, else with the one on the path.
    """
    beside = Path(sys.executable).with_name("mpirun")
    launcher = str(beside) if beside.exists() else shutil.which("mpirun") or "mpirun"
    return [*(os.environ.get("MPIRUN", "").split() or [launcher]), "-n", str(ranks)]


def free_memory() -> int:
    """Bytes that programs can still have; as good as endless where the system does not say."""
    try:
        text = Path("/proc/meminfo").read_text(encoding="utf-8")
    except OSError:
        return sys.maxsize
    found = re.search(r"^MemAvailable:\s*(\d+) kB$", text, re.MULTILINE)
    return 1024 * int(found[1]) if found else sys.maxsize


def _processor() -> str:
    """The processor's name, without marks."""
    try:
        text = Path("/proc/cpuinfo").read_text(encoding="utf-8")
    except OSError:
        text = ""
    found = re.search(r"^model name\s*:\s*(.+)$", text, re.MULTILINE)
    name = found[1] if found else platform.processor() or platform.machine()
    return re.sub(r"\((R|TM)\)|\bCPU\b|@.*", "", name).strip()


def cores() -> int:
    """Cores that this process may use."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _command(*command: str) -> str:
    """What a command prints; nothing where it is missing or fails."""
    try:
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        return ""
