"""Generation from a trained run, on one process or with the model cut over the tensor group."""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.array.backend import Array, Backend
from mpillm.array.random import fold
from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.verify import resolve
from mpillm.config import from_table
from mpillm.data.tokenizer import load_tokenizer
from mpillm.errors import UserError
from mpillm.inference.sampling import sample
from mpillm.models.model import build_stage
from mpillm.models.settings import ModelSettings, build_model
from mpillm.nn.layer import Micro
from mpillm.nn.stage import Stage
from mpillm.parallel.launch import agree, start
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings

if TYPE_CHECKING:
    from mpillm.parallel.launch import Comm

__all__ = ["Engine", "Sampling", "generate"]


@dataclass(frozen=True)
class Sampling:
    """How tokens are drawn, see `mpillm.inference.sampling.sample`; `seed` makes it repeatable."""

    temperature: float = 1.0
    top_k: int = 0
    top_p: float = 1.0
    greedy: bool = False
    seed: int = 0


class Engine:
    """A trained model, ready to generate. All calls are collective over the communicator."""

    def __init__(self, checkpoint: Checkpoint, comm: Comm, backend: Backend) -> None:
        """Load the weights, whatever layout wrote them, cut over all ranks of `comm`."""
        settings = checkpoint.manifest.settings
        model_settings = from_table(ModelSettings, settings["model"])
        model = build_model(model_settings)
        self._context: int = model_settings.context
        self._backend = backend
        self._mesh = Mesh(
            comm, fit(ParallelSettings(tensor=comm.size), comm.size), backend, Recorder()
        )
        model.check_layout(self._mesh)
        dtype = backend.dtype(settings["train"]["dtype"])
        with agree(comm):
            self._stage = build_stage(model, backend, self._mesh, dtype, seed=None)
            load_weights(self._stage, checkpoint, backend)

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits (b, t, v) after every token of (b, t) token ids; t may not exceed the context."""
        micro = Micro(
            tokens=self._backend.from_host(tokens),
            index=self._backend.xp.arange(tokens.shape[1]),
            samples=self._backend.xp.arange(tokens.shape[0]),
            want="logits",
        )
        (logits,), _ = self._stage.forward((), micro)
        return self._backend.to_host(logits)

    def generate(
        self, prompt: Sequence[int], count: int, samples: int, sampling: Sampling
    ) -> np.ndarray:
        """`samples` continuations of a prompt by `count` tokens each, int64 (samples, count).

        Keys and values of earlier tokens are kept. When the model's context is full, the older
        half of the text is forgotten and the rest is read anew.
        """
        text = np.tile(np.asarray(prompt, dtype=np.int64), (samples, 1))[:, -self._context :]
        drawn = np.empty((samples, count), dtype=np.int64)
        state, length, unread = self._stage.new_state(samples, self._context), 0, text
        for place in range(count):
            if length + unread.shape[1] > self._context:
                unread = text[:, -max(1, self._context // 2) :]
                state, length = self._stage.new_state(samples, self._context), 0
            logits = self._read(unread, length, state)
            length += unread.shape[1]
            for row in range(samples):
                drawn[row, place] = sample(
                    logits[row],
                    temperature=sampling.temperature,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                    greedy=sampling.greedy,
                    key=fold(sampling.seed, "generate", row, place),
                )
            unread = drawn[:, place : place + 1]
            text = np.concatenate([text, unread], axis=1)
        return drawn

    def free(self) -> None:
        """Give the communicators back."""
        self._mesh.free()

    def _read(self, tokens: np.ndarray, start: int, state: dict[str, Any]) -> np.ndarray:
        """Logits (b, v) after the last of `tokens` (b, t), which stand at `start` and after."""
        xp = self._backend.xp
        micro = Micro(
            tokens=self._backend.from_host(tokens),
            index=xp.arange(start, start + tokens.shape[1]),
            samples=xp.arange(tokens.shape[0]),
            want="last_logits",
            state=state,
        )
        (logits,), _ = self._stage.forward((), micro)
        return self._backend.to_host(logits)[:, 0]


def load_weights(stage: Stage, checkpoint: Checkpoint, backend: Backend) -> None:
    """Fill in this rank's shards from the pieces that overlap them."""
    for param in stage.store.params:
        values: Array = checkpoint.read("parameter", param.name, param.shard)
        param.master[...] = backend.from_host(values.astype(param.master.dtype, copy=False))


def generate(
    run: Path,
    *,
    prompt: str,
    max_new_tokens: int = 200,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    num_samples: int = 1,
    seed: int = 0,
    greedy: bool = False,
    backend: str = "numpy",
    comm: Comm | None = None,
) -> list[str]:
    """Continue `prompt` with the newest checkpoint of a run; returns `num_samples` texts.

    run: a run folder or one checkpoint of it. Every rank of `comm` (default: all of MPI's world)
    calls, and every rank gets the same texts, which begin with the prompt. The result does not
    depend on the number of ranks, up to the rounding of sums. UserError for a run or a prompt that
    does not work.
    """
    comm = start() if comm is None else comm
    with agree(comm):
        path = resolve(run)
        checkpoint = Checkpoint.open(path)
        tokenizer_path = path.parent.parent / "tokenizer.json"
        tokenizer = load_tokenizer(tokenizer_path)
        digest = hashlib.sha256(tokenizer_path.read_bytes()).hexdigest()
        if checkpoint.manifest.extra.get("tokenizer.json") != digest:
            raise UserError(f"{tokenizer_path} is not the one that {path} was trained with")
        if not prompt:
            raise UserError("--prompt: the text is empty; expected at least one character")
        ids = tokenizer.encode(prompt)
        _check_sampling(max_new_tokens, temperature, top_k, top_p, num_samples)
    engine = Engine(checkpoint, comm, Backend.create(backend))
    sampling = Sampling(temperature, top_k, top_p, greedy, seed)
    drawn = engine.generate(ids.tolist(), max_new_tokens, num_samples, sampling)
    engine.free()
    return [prompt + tokenizer.decode(row) for row in drawn]


def _check_sampling(
    max_new_tokens: int, temperature: float, top_k: int, top_p: float, num_samples: int
) -> None:
    """UserError for settings that mean nothing."""
    for name, value, valid, expected in (
        ("--max-new-tokens", max_new_tokens, max_new_tokens >= 0, "at least 0"),
        ("--temperature", temperature, 0.0 < temperature < float("inf"), "above 0 (or --greedy)"),
        ("--top-k", top_k, top_k >= 0, "at least 0, where 0 keeps all"),
        ("--top-p", top_p, 0.0 < top_p <= 1.0, "above 0 and at most 1"),
        ("--num-samples", num_samples, num_samples >= 1, "at least 1"),
    ):
        if not valid:
            raise UserError(f"{name} {value}: expected {expected}")
