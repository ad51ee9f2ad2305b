"""Whole files of every kind that mpillm reads, to be mutated by `hostile.py`."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from checkpoint_fakes import save_ranks

from mpillm.checkpoint.export import export
from mpillm.checkpoint.item import Item
from mpillm.checkpoint.reader import Checkpoint
from mpillm.config import dump, from_table
from mpillm.data.tokenizer import CharacterTokenizer
from mpillm.data.tokens import write_tokens
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.shard import Shard
from mpillm.report.metrics import MetricsFile, StepMetrics
from mpillm.training.settings import RunConfig

__all__ = ["make_files"]

FEW = 12  # so many names of a group lie in a heap, under a B-tree
MANY = 70  # the B-tree has inner nodes


def make_files(folder: Path, seed: int) -> None:
    """Fill a folder; files of another seed differ in a few numbers, so that they can be spliced."""
    folder.mkdir()
    rng = np.random.default_rng(seed)
    state = {"skipped": [seed, 0.5]}
    save_ranks(folder, 3 + seed, _items(rng, FEW), state=state).rename(folder / "checkpoint")
    with Checkpoint.open(save_ranks(folder, 3 + seed, _items(rng, MANY))) as source:
        export(source, folder / "export.h5", optimizer=True)
        export(source, folder / "export.safetensors", optimizer=True)
    splits = {"train": rng.integers(0, 60, 3000), "validation": rng.integers(0, 60, 90)}
    write_tokens(folder / "tokens.h5", splits, 60, {"source": "x" * 20, "fingerprint": "0" * 64})
    characters = "".join(map(chr, [*range(32, 100 + seed), 233, 0x4E00]))
    CharacterTokenizer(characters).save(folder / "tokenizer.json")
    model = {"family": "gpt2", "width": 64 + 8 * seed}
    config = {"model": model, "data": {"text": ["a.txt", "b"]}, "train": {"seed": seed}}
    (folder / "config.toml").write_text(dump(from_table(RunConfig, config)))
    metrics = MetricsFile(folder / "metrics.jsonl")
    for number in range(1, 30):
        loss = float("nan") if number == 7 else 4 / (number + seed)
        metrics.write(StepMetrics(number, loss, 1e-3, 0.5, 1000.0, 0.1, loss, None, 8 * number))
    metrics.close()
    recorder = Recorder(folder / "rank-00001.bin", 32, rank=1, size=4, layout={"data": 4})
    for number in range(40 + seed):
        recorder.step = number
        recorder.end(recorder.begin("data", "allreduce", 1000, -1, 0))
    recorder.begin("pipe", "recv", 4096, 0, 7)
    recorder.beat()
    recorder.flush()


def _items(rng: np.random.Generator, count: int) -> list[list[Item]]:
    """Of two ranks: parameters cut by rows, first moments by ranges."""
    items: list[list[Item]] = [[], []]
    for number in range(count):
        shape = ((6, 2), (4,), (2, 3, 2))[number % 3] if number else ()
        kind = ("f4", "f4", "f8", "f2", "i8")[number % 5]
        array = rng.standard_normal(shape).astype(kind)
        name, whole = f"block.{number:03d}.weight", Shard.whole(shape)
        half = array.size // 2
        for rank, (low, high) in enumerate([(0, half), (half, array.size)]):
            if shape:
                shard = Shard.split(shape, 0, 2, rank)
                items[rank].append(Item("parameter", name, shard, array[shard.slices]))
            elif rank == number % 2:
                items[rank].append(Item("parameter", name, whole, array))
            moment = array.reshape(-1)[low:high]
            items[rank].append(Item("optimizer/m", name, whole, moment, (low, high)))
    return items
