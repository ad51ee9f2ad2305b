"""Look at checkpoints, check them, and write them anew: in another layout, or as one plain file."""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from pathlib import Path

from mpillm.cli.parser import Parser, integer
from mpillm.config import describe, load
from mpillm.errors import did_you_mean
from mpillm.parallel.launch import rank_hint
from mpillm.parallel.layouts import LayoutConfig, ranks_of
from mpillm.training.settings import RunConfig

__all__ = ["run"]

_EPILOG = """\
actions:
  inspect PATH            what is in a checkpoint, or in an exported file
  verify PATH             read all of it; exit code 1 where anything is damaged
  reshard SRC DST ...     write it as another layout would have saved it
  export SRC FILE         whole arrays in one file: .h5, .hdf5 or .safetensors

PATH and SRC: a run, which stands for its newest checkpoint, or one checkpoint.
mpillm checkpoint ACTION --help tells more.
"""

_RESHARD_EPILOG = """\
DST becomes the folder of a run: mpirun -n N mpillm train DST/config.toml goes on with it. The
layout is named as for mpillm train; sizes that are not named are 1, other settings stay as they
were where the layout has a use for them:

"""


def run(arguments: Sequence[str]) -> int:
    """`mpillm checkpoint ACTION ...`; 1 when a checkpoint to verify is damaged."""
    action, rest = (arguments[0], arguments[1:]) if arguments else ("", ())
    if action in _ACTIONS:
        # Nothing here is shared out: of a parallel job one rank does it.
        return _ACTIONS[action](rest) if rank_hint() == 0 else 0
    parser = Parser("checkpoint", __doc__, usage="mpillm checkpoint ACTION ...", epilog=_EPILOG)
    parser.add_argument("action", metavar="ACTION", help=" | ".join(_ACTIONS))
    parser.parse([action] if action else [])
    return parser.error(f"no action '{action}'; {did_you_mean(action, _ACTIONS)}")


def _inspect(arguments: Sequence[str]) -> int:
    parser = Parser("checkpoint inspect", "What is in a checkpoint, or in an exported file.")
    parser.add_argument("path", metavar="PATH", type=Path, help="a run, a checkpoint, or a file")
    path = parser.parse(arguments).path

    from mpillm.checkpoint.export import inspect_export
    from mpillm.checkpoint.verify import inspect, resolve

    print(inspect_export(path) if path.is_file() else inspect(resolve(path)))
    return 0


def _verify(arguments: Sequence[str]) -> int:
    parser = Parser("checkpoint verify", "Read all of a checkpoint and say what is damaged.")
    parser.add_argument("path", metavar="PATH", type=Path, help="a run, or one of its checkpoints")
    given = parser.parse(arguments).path

    from mpillm.checkpoint.manifest import read_manifest
    from mpillm.checkpoint.verify import resolve, verify

    path = resolve(given)
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


def _reshard(arguments: Sequence[str]) -> int:
    parser = Parser(
        "checkpoint reshard",
        "Write a checkpoint as another layout would have saved it, without a rank of that layout.",
        usage="mpillm checkpoint reshard SRC DST [--parallel.key=value ...] [--ranks N]",
        epilog=_RESHARD_EPILOG + describe(LayoutConfig),
    )
    parser.add_argument("source", metavar="SRC", type=Path, help="a run, or one of its checkpoints")
    parser.add_argument("target", metavar="DST", type=Path, help="the folder of the new run")
    parser.add_argument(
        "--ranks", metavar="N", type=integer, help="ranks in all; data takes what is left of them"
    )
    options, settings = parser.parse_with_settings(arguments, RunConfig)

    from mpillm.checkpoint.manifest import read_manifest
    from mpillm.training.reshard import reshard

    path = reshard(options.source, options.target, settings, ranks=options.ranks)
    layout = load(LayoutConfig, {"parallel": read_manifest(path).layout}).parallel
    print(
        f"{path} is written; to go on: mpirun -n {ranks_of(layout)} mpillm train "
        f"{options.target / 'config.toml'}"
    )
    return 0


def _export(arguments: Sequence[str]) -> int:
    parser = Parser("checkpoint export", "Write a checkpoint's whole arrays to one plain file.")
    parser.add_argument("source", metavar="SRC", type=Path, help="a run, or one of its checkpoints")
    parser.add_argument("file", metavar="FILE", type=Path, help="NAME.h5, .hdf5 or .safetensors")
    parser.add_argument("--optimizer", action="store_true", help="the optimizer's state, too")
    parser.add_argument("--overwrite", action="store_true", help="replace FILE where it exists")
    options = parser.parse(arguments)

    from mpillm.checkpoint.export import export
    from mpillm.checkpoint.reader import Checkpoint
    from mpillm.checkpoint.verify import resolve

    with Checkpoint.open(resolve(options.source)) as checkpoint:
        export(checkpoint, options.file, optimizer=options.optimizer, overwrite=options.overwrite)
    print(f"{options.file} is written and read back")
    return 0


_ACTIONS: dict[str, Callable[[Sequence[str]], int]] = {
    "inspect": _inspect,
    "verify": _verify,
    "reshard": _reshard,
    "export": _export,
}
