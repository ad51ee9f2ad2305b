"""Reads mutated files: `python hostile.py FOLDER READER:FIRST:STOP ...` tells what came of them.

FOLDER holds whole files in `0` and `1` (`hostile_files`); each case is made in `here`. Case number
n of a reader is always the same. This process may take little memory and each case little time;
what breaks that, or a library, kills it. For each case a line of JSON is printed: reader, number,
"read", "refused" or "broken", and the words of what was raised.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import resource
import shutil
import signal
import sys
import traceback
from collections.abc import Callable
from pathlib import Path
from random import Random
from typing import Any

import numpy as np
from hostile_hdf5 import attack
from hostile_mutators import Metadata, change_bytes, change_text, change_value

from mpillm.checkpoint.export import inspect_export, open_export
from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.verify import inspect, verify
from mpillm.config import dump, load
from mpillm.data.tokenizer import load_tokenizer
from mpillm.data.tokens import TokenFile
from mpillm.errors import UserError
from mpillm.parallel.flight import read_flight
from mpillm.parallel.shard import Shard
from mpillm.report.metrics import MetricsFile, read_metrics
from mpillm.storage.hdf5 import Hdf5File
from mpillm.training.settings import RunConfig

MEMORY = 2**28  # bytes that a case may take beyond what the imported libraries have
SECONDS = 20  # that a case may take
_TAIL = 64 + len('"}\n')


class Cases:
    """The whole files, and the folder in which a case is made and read."""

    def __init__(self, folder: Path) -> None:
        self.whole, self.other = folder / "0", folder / "1"
        self.here = folder / "here"
        self.manifest = json.loads((self.whole / "checkpoint/manifest.json").read_bytes())
        self.metadata: dict[str, Metadata] = {}
        with Checkpoint.open(self.whole / "checkpoint") as checkpoint:
            self.arrays = {
                (kind, name): checkpoint.read(kind, name, Shard.whole(shape))
                for kind in checkpoint.kinds()
                for name in checkpoint.names(kind)
                for shape in [checkpoint.shape(name, kind)]
            }

    def bytes(self, rng: Random, name: str, text: float = 0.0) -> None:
        """Mutate a file as bytes or, at a probability, as text."""
        whole = (self.whole / name).read_bytes()
        if rng.random() < text:
            changed = change_text(rng, whole.decode()).encode("utf-8", "surrogatepass")
        else:
            changed = change_bytes(rng, whole, (self.other / name).read_bytes())
        (self.here / name).write_bytes(changed)

    def hdf5(self, rng: Random, name: str, dataset: str) -> None:
        """Mutate an HDF5 file: as bytes, in its metadata with right checksums, or by libhdf5."""
        match rng.randrange(4):
            case 0:
                self.bytes(rng, name)
            case 1:
                shutil.copy(self.whole / name, self.here / name)
                attack(rng, self.here / name, dataset)
            case _:
                path = self.whole / name
                if name not in self.metadata:
                    self.metadata[name] = Metadata(path)
                changed = self.metadata[name].change(rng, path.read_bytes())
                (self.here / name).write_bytes(changed)

    def write_manifest(self, manifest: Any) -> None:
        """Write a manifest with the right hash of itself."""
        if isinstance(manifest, dict):
            manifest.pop("sha256", None)
            manifest = {**manifest, "sha256": "0" * 64}
        self.seal(json.dumps(manifest, separators=(",", ":"), ensure_ascii=False) + "\n")

    def seal(self, text: str) -> None:
        """Write the text of a manifest with the right hash of itself at its end."""
        raw = text.encode("utf-8", "surrogatepass")
        blank = raw[:-_TAIL] + b"0" * 64 + raw[-_TAIL + 64 :]
        digest = hashlib.sha256(blank).hexdigest().encode()
        path = self.here / "checkpoint/manifest.json"
        path.write_bytes(raw[:-_TAIL] + digest + raw[-_TAIL + 64 :])


def _read_checkpoint(cases: Cases) -> None:
    """Whatever is read of a checkpoint is what was saved."""
    path = cases.here / "checkpoint"
    for problem in verify(path):
        assert "\n" not in problem and len(problem) < 2000, problem
    with Checkpoint.open(path) as checkpoint:
        inspect(path)
        refused: UserError | None = None
        for (kind, name), array in cases.arrays.items():
            try:
                got = checkpoint.read(kind, name, Shard.whole(array.shape))
            except UserError as error:
                refused = error
            else:
                assert got.tobytes() == array.tobytes(), f"{kind} {name} is not what was saved"
        if refused is not None:
            raise refused


def shard(rng: Random, cases: Cases) -> Callable[[], object]:
    """A checkpoint's HDF5 file, with its size and hash in the manifest right again."""
    name = f"checkpoint/shard-0000{rng.randrange(2)}.h5"
    cases.hdf5(rng, name, f"parameter/block.{rng.randrange(1, 12):03d}.weight")
    raw = (cases.here / name).read_bytes()
    manifest = {**cases.manifest, "files": [dict(file) for file in cases.manifest["files"]]}
    if rng.random() < 0.9:
        entry = manifest["files"][int(name[-4])]
        entry.update(bytes=len(raw), sha256=hashlib.sha256(raw).hexdigest())
    cases.write_manifest(manifest)
    return lambda: _read_checkpoint(cases)


def manifest(rng: Random, cases: Cases) -> Callable[[], object]:
    """A checkpoint's manifest, mostly with the right hash of itself."""
    name = "checkpoint/manifest.json"
    match rng.randrange(4):
        case 0:
            cases.bytes(rng, name, text=0.5)
        case 1:
            cases.seal(change_text(rng, (cases.whole / name).read_text()))
        case _:
            cases.write_manifest(change_value(rng, cases.manifest))
    return lambda: _read_checkpoint(cases)


def tokens(rng: Random, cases: Cases) -> Callable[[], object]:
    """A token file."""
    cases.hdf5(rng, "tokens.h5", "train")

    def read() -> None:
        file = TokenFile(cases.here / "tokens.h5")
        file.verify()
        assert file.length("train") == len(file.read("train"))
        assert int(file.read("train").max(initial=0)) < file.vocabulary_size

    return read


def tokenizer(rng: Random, cases: Cases) -> Callable[[], object]:
    """A tokenizer."""
    cases.bytes(rng, "tokenizer.json", text=0.5)

    def read() -> None:
        found = load_tokenizer(cases.here / "tokenizer.json")
        ids = np.arange(found.vocabulary_size)
        assert np.array_equal(found.encode(found.decode(ids)), ids)

    return read


def _read_export(path: Path) -> None:
    with open_export(path) as file:
        if isinstance(file, Hdf5File):
            kinds = str(file.attributes().get("kinds")).split()
            names = [f"{kind}/{name}" for kind in kinds for name in file.names(kind)]
        else:
            names = file.names()
        for name in names:
            array = file.find(name)
            assert array.read().nbytes == array.size * array.dtype.itemsize <= path.stat().st_size
    inspect_export(path)


def exported(rng: Random, cases: Cases) -> Callable[[], object]:
    """An exported HDF5 file."""
    cases.hdf5(rng, "export.h5", f"parameter/block.{rng.randrange(70):03d}.weight")
    return lambda: _read_export(cases.here / "export.h5")


def safetensors(rng: Random, cases: Cases) -> Callable[[], object]:
    """An exported safetensors file; mostly its header, with the right length."""
    path = cases.here / "export.safetensors"
    if rng.random() < 0.3:
        cases.bytes(rng, path.name)
    else:
        whole = (cases.whole / path.name).read_bytes()
        length = int.from_bytes(whole[:8], "little")
        text, rest = whole[8 : 8 + length].decode(), whole[8 + length :]
        if rng.random() < 0.5:
            text = json.dumps(change_value(rng, json.loads(text)))
        else:
            text = change_text(rng, text)
        header = text.encode("utf-8", "surrogatepass")
        path.write_bytes(len(header).to_bytes(8, "little") + header + rest)
    return lambda: _read_export(path)


def config(rng: Random, cases: Cases) -> Callable[[], object]:
    """A file of settings."""
    cases.bytes(rng, "config.toml", text=0.7)
    return lambda: dump(load(RunConfig, cases.here / "config.toml"))


def metrics(rng: Random, cases: Cases) -> Callable[[], object]:
    """The numbers of a run, step by step."""
    cases.bytes(rng, "metrics.jsonl", text=0.5)

    def read() -> None:
        path = cases.here / "metrics.jsonl"
        rows = read_metrics(path)
        assert all(isinstance(row["loss"], int | float) for row in rows)
        file = MetricsFile(path)
        file.rewind(10)
        file.close()
        assert [row for row in read_metrics(path) if row["step"] > 10] == []

    return read


def flight(rng: Random, cases: Cases) -> Callable[[], object]:
    """A flight file."""
    cases.bytes(rng, "rank-00001.bin")

    def read() -> None:
        found = read_flight(cases.here / "rank-00001.bin")
        list(found.under_way())
        text = f"{found!r} {found.last_completed} {found.left} {found.seen}"
        for axis in ("data", "pipe", "world"):
            text += f"{found.begun(axis)} {found.completed(axis)} {found.find(axis, 3)}"
        assert "\n" not in text.replace(repr(found.ring), "")
        assert dataclasses.asdict(found)

    return read


_ALL = (shard, manifest, tokens, tokenizer, exported, safetensors, config, metrics, flight)
READERS: dict[str, Callable[[Random, Cases], Callable[[], object]]] = {
    reader.__name__: reader for reader in _ALL
}


def outcome(read: Callable[[], object]) -> tuple[str, str]:
    """What came of reading: "read", "refused" or "broken", and the words."""
    try:
        read()
    except UserError as error:
        words = str(error)
        if "\n" in words or len(words) > 2000 or not words.isprintable():
            return "broken", f"not one line: {words!r}"
        return "refused", words
    except Exception as error:
        place = traceback.extract_tb(error.__traceback__)[-1]
        return "broken", f"{error!r} at {Path(place.filename).name}:{place.lineno}"
    return "read", ""


def run(cases: Cases, name: str, number: int) -> tuple[str, str]:
    """Make a case and read it."""
    shutil.rmtree(cases.here, ignore_errors=True)
    cases.here.mkdir()
    reader = READERS[name]
    if reader in (shard, manifest):
        shutil.copytree(cases.whole / "checkpoint", cases.here / "checkpoint")
    return outcome(reader(Random(f"{name} {number}"), cases))


def main() -> None:
    """Run the cases of the command line."""
    cases = Cases(Path(sys.argv[1]))
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    limit = pages * resource.getpagesize() + MEMORY
    resource.setrlimit(resource.RLIMIT_AS, (limit, limit))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))
    for item in sys.argv[2:]:
        name, first, stop = item.split(":")
        for number in range(int(first), int(stop)):
            signal.alarm(SECONDS)  # not handled: it ends the process, wherever that is
            print(json.dumps([name, number, *run(cases, name, number)]), flush=True)


if __name__ == "__main__":
    main()
