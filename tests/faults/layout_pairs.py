"""A program for mpirun: checkpoints that go from one layout to another and back.

    mpirun -n 8 python layout_pairs.py PAIRS.json FOLDER

For every pair (settings, A, B), on as many of the first ranks as each layout takes: two steps in A,
saved, and one more step in A. Loaded in B and saved. Loaded in A again, saved, and the third step
done anew. Then one process reshards both ways without any rank. Prints a line of JSON for each
pair: what is not bitwise the same.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from msgspec.structs import replace

from mpillm.array.backend import Backend
from mpillm.checkpoint.manifest import Manifest, read_manifest
from mpillm.checkpoint.verify import resolve, verify
from mpillm.config import from_table
from mpillm.data.loader import Loader
from mpillm.models.settings import build_model
from mpillm.parallel.launch import start, wait_idle
from mpillm.parallel.layouts import parse_layout, ranks_of
from mpillm.parallel.mesh import Mesh
from mpillm.parallel.recorder import Recorder
from mpillm.training.batch import resolve_batch
from mpillm.training.checkpoints import Checkpoints
from mpillm.training.reshard import reshard
from mpillm.training.settings import RunConfig
from mpillm.training.trainer import StepResult, Trainer

if TYPE_CHECKING:
    from mpillm.parallel.launch import Comm

TEXT = np.random.default_rng(0).integers(0, 65, 3000).astype(np.uint16)
STEPS = 2


class Run:
    """Some ranks with a trainer in a layout."""

    def __init__(self, comm: Comm, mesh: Mesh, config: RunConfig, tokenizer: Path) -> None:
        t = config.train
        backend = Backend.create("numpy")
        loader = Loader(TEXT, t.sequence_length, t.batch_size, t.micro_batch_size, t.seed)
        self._comm, self._mesh, self._config, self._tokenizer = comm, mesh, config, tokenizer
        self.trainer = Trainer(
            build_model(config.model), t, config.optimizer, mesh, backend, loader
        )

    def load(self, folder: Path) -> None:
        """Go on from what was saved there."""
        self._checkpoints(folder).restore()

    def save(self, folder: Path) -> None:
        """Save there."""
        self._checkpoints(folder).save(beside=False)

    def step(self) -> tuple[float, float]:
        """Loss and gradient norm of a step."""
        result: StepResult = self.trainer.step()
        return result.loss, result.grad_norm

    def _checkpoints(self, folder: Path) -> Checkpoints:
        config = replace(self._config, run=replace(self._config.run, dir=str(folder)))
        return Checkpoints(
            config, self._comm, self._mesh, self.trainer, self._tokenizer, lambda line: None
        )


@contextmanager
def running(comm: Comm, config: RunConfig, tokenizer: Path) -> Iterator[Run]:
    """The layout of `config` on the ranks of `comm`."""
    mesh = Mesh(comm, config.parallel, Backend.create("numpy"), Recorder())
    yield Run(comm, mesh, config, tokenizer)
    mesh.free()


def in_layout(table: dict[str, Any], text: str) -> RunConfig:
    """The settings under a layout."""
    config = from_table(RunConfig, table)
    layout = parse_layout(text, config.parallel)
    return replace(config, parallel=layout, train=resolve_batch(config.train, layout))


def there_and_back(
    parts: dict[int, Comm | None], a: RunConfig, b: RunConfig, folder: Path, tokenizer: Path
) -> tuple[Any, Any] | None:
    """The third step's numbers without the detour and after it; None on ranks without a part."""
    direct = detoured = None
    first, second = parts[ranks_of(a.parallel)], parts[ranks_of(b.parallel)]
    if first is not None:
        with running(first, a, tokenizer) as run:
            for _ in range(STEPS):
                run.step()
            run.save(folder / "a")
            direct = run.step()
    wait_idle(parts[0])
    if second is not None:
        with running(second, b, tokenizer) as run:
            run.load(folder / "a")
            run.save(folder / "b")
    wait_idle(parts[0])
    if first is not None:
        with running(first, a, tokenizer) as run:
            run.load(folder / "b")
            run.save(folder / "c")
            detoured = run.step()
    return (direct, detoured) if first is not None else None


def problems(a: RunConfig, b: RunConfig, folder: Path, numbers: tuple[Any, Any]) -> list[str]:
    """What is not bitwise the same, for one process."""
    found = []
    if numbers[0] != numbers[1]:
        found.append(f"the next step gives {numbers[1]} after the detour, {numbers[0]} without")
    reshard(folder / "a", folder / "offline b", b.parallel)
    reshard(folder / "offline b", folder / "offline c", a.parallel)
    names = ("a", "b", "c", "offline b", "offline c")
    paths = {name: resolve(folder / name) for name in names}
    for name in ("a", "b"):  # the others must be the same
        found += [f"{name}: {problem}" for problem in verify(paths[name])]
    for one, other in (("a", "c"), ("b", "offline b"), ("a", "offline c")):
        ours, theirs = contents(paths[one]), contents(paths[other])
        different = {key for key in ours.keys() | theirs.keys() if ours.get(key) != theirs.get(key)}
        found += [f"{other} differs from {one} in {key}" for key in sorted(different)]
    return found


def contents(path: Path) -> dict[str, Any]:
    """All that must be the same of two checkpoints in one layout: files, and the run's state."""
    manifest: Manifest = read_manifest(path)
    files = {file.name: (path / file.name).read_bytes() for file in manifest.files}
    state = {name: getattr(manifest, name) for name in ("step", "samples", "state", "extra")}
    return {**files, **state, "arrays": manifest.arrays, "layout": manifest.layout}


def main() -> None:
    """Try all pairs."""
    world = start()
    pairs, folder = json.loads(Path(sys.argv[1]).read_text()), Path(sys.argv[2])
    tokenizer = folder / "tokenizer.json"
    if world.rank == 0:
        tokenizer.write_text("{}")
    parts: dict[int, Any] = {0: world}
    for ranks in sorted({ranks_of(in_layout(t, x).parallel) for t, *ab in pairs for x in ab}):
        part = world.Split(int(world.rank >= ranks), world.rank)
        parts[ranks] = part if world.rank < ranks else None
    wait_idle(world)
    for table, *texts in pairs:
        a, b = (in_layout(table, text) for text in texts)
        place = folder / "pair"
        numbers = there_and_back(parts, a, b, place, tokenizer)
        wait_idle(world)
        if numbers is not None and world.rank == 0:
            print(json.dumps(problems(a, b, place, numbers)), flush=True)
            shutil.rmtree(place)
        wait_idle(world)


if __name__ == "__main__":
    main()
