"""Look at a checkpoint: list what is in it, or verify that all of it is whole."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from mpillm.cli.parser import Parser
from mpillm.errors import did_you_mean

__all__ = ["run"]

_ACTIONS = ("inspect", "verify")


def run(arguments: Sequence[str]) -> int:
    """`mpillm checkpoint inspect|verify PATH`; 1 when a checkpoint to verify is damaged."""
    parser = Parser("checkpoint", __doc__)
    parser.add_argument("action", metavar="inspect|verify", help="what to do")
    parser.add_argument("path", metavar="PATH", type=Path, help="a run, or one of its checkpoints")
    options = parser.parse(arguments)
    if options.action not in _ACTIONS:
        parser.error(f"no action '{options.action}'; {did_you_mean(options.action, _ACTIONS)}")

    from mpillm.checkpoint.manifest import read_manifest
    from mpillm.checkpoint.verify import inspect, resolve, verify

    path = resolve(options.path)
    if options.action == "inspect":
        print(inspect(path))
        return 0
    problems = verify(path)
    for problem in problems:
        print(problem, file=sys.stderr)
    if problems:
        return 1
    manifest = read_manifest(path)
    size = sum(file.bytes for file in manifest.files)
    pieces = sum(len(array.pieces) for array in manifest.arrays)
    print(
        f"{path} is whole: {len(manifest.files)} files, {size:,} bytes, "
        f"{len(manifest.arrays)} arrays in {pieces} pieces, sizes and hashes checked"
    )
    return 0
