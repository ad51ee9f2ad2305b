"""Generation from a trained run, under any layout that a run can be trained in."""

from __future__ import annotations

import hashlib
import sys
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from mpillm.array.backend import Backend
from mpillm.array.random import fold
from mpillm.checkpoint.reader import Checkpoint
from mpillm.checkpoint.verify import resolve
from mpillm.config import from_table
from mpillm.data.tokenizer import load_tokenizer
from mpillm.errors import UserError
from mpillm.inference.decoding import Decoding
from mpillm.inference.loading import load
from mpillm.inference.sampling import sample
from mpillm.inference.settings import GenerateConfig
from mpillm.models.settings import ModelSettings, build_model
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
    """A trained model, ready to generate. All calls are collective over the communicator.

    The rows of a call are shared out over the data and expert ranks. Each of them computes equally
    many, some for nothing where the numbers do not divide: ranks that share weights or experts must
    make the same calls. What is drawn for a row is a function of its number and not of the layout.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        comm: Comm,
        backend: Backend,
        layout: ParallelSettings | None = None,
    ) -> None:
        """Load the weights, whatever layout wrote them, for this one of all ranks of `comm`.

        layout: by default all ranks share each layer's products (tensor parallelism). UserError for
        one that fits neither the ranks nor the model.
        """
        settings = checkpoint.manifest.settings
        model_settings = from_table(ModelSettings, settings["model"])
        model = build_model(model_settings)
        layout = ParallelSettings(tensor=comm.size) if layout is None else layout
        self._context: int = model_settings.context
        self._vocabulary: int = model_settings.vocabulary
        self._dtype = backend.dtype(settings["train"]["dtype"])
        self._backend = backend
        self._mesh = Mesh(comm, fit(layout, comm.size), backend, Recorder())
        try:
            with agree(comm):
                self._pipeline = load(model, checkpoint, self._mesh, backend, self._dtype)
        except UserError:  # raised by all ranks alike
            self._mesh.free()
            raise

    def logits(self, tokens: np.ndarray) -> np.ndarray:
        """Logits (b, t, v) after every token of (b, t) token ids; t may not exceed the context."""
        b, t = tokens.shape
        numbers = self._numbers(b)
        # What stands in the rows beyond b is given to nobody.
        mine = tokens[np.minimum(numbers, b - 1)]
        logits = Decoding(self._pipeline, numbers.size, t).read(mine, "logits")
        if logits is None:
            logits = np.empty((numbers.size, t, self._vocabulary), self._dtype)
        return self._gather(self._broadcast(logits))[:b]

    def generate(
        self, prompt: Sequence[int], count: int, samples: int, sampling: Sampling
    ) -> np.ndarray:
        """`samples` continuations of a prompt by `count` tokens each, int64 (samples, count).

        Keys and values of earlier tokens are kept. When the model's context is full, the older
        half of the text is forgotten and the rest is read anew.
        """
        numbers = self._numbers(samples)
        begin, end = len(prompt), len(prompt) + count
        text = np.empty((numbers.size, end), dtype=np.int64)
        text[:, :begin] = prompt
        decoding = Decoding(self._pipeline, numbers.size, min(end, self._context))
        unread = max(0, begin - self._context)  # where that which was not read yet begins
        for place in range(begin, end):
            if decoding.length + place - unread > self._context:
                decoding.forget()
                unread = place - max(1, self._context // 2)
            logits = decoding.read(text[:, unread:place], "last_logits")
            unread = place
            text[:, place] = self._draw(logits, numbers, place - begin, sampling)
        return self._gather(text[:, begin:])[:samples]

    def free(self) -> None:
        """Give the communicators back."""
        self._mesh.free()

    def _numbers(self, rows: int) -> np.ndarray:
        """Numbers of the rows that this rank computes, as many as every other one."""
        share = -(-rows // self._mesh.batch.size)
        return np.arange(share) + share * self._mesh.batch.rank

    def _draw(
        self, logits: np.ndarray | None, numbers: np.ndarray, place: int, sampling: Sampling
    ) -> np.ndarray:
        """The token after `place` others that each row goes on with, int64 (rows,)."""
        drawn = np.zeros(numbers.size, dtype=np.int64)
        mesh = self._mesh
        if logits is not None and mesh.tensor.rank == mesh.context.rank == 0:
            drawn[:] = [
                sample(
                    logits[row, 0],
                    temperature=sampling.temperature,
                    top_k=sampling.top_k,
                    top_p=sampling.top_p,
                    greedy=sampling.greedy,
                    key=fold(sampling.seed, "generate", number, place),
                )
                for row, number in enumerate(numbers.tolist())
            ]
        return self._broadcast(drawn)

    def _broadcast(self, values: np.ndarray) -> np.ndarray:
        """The values of the first of the last stage's ranks, on all ranks that have the same rows.

        Each of them may have rounded differently, and a token that differs on one of them would
        leave a row with two texts.
        """
        mesh, array = self._mesh, self._backend.from_host(values)
        for group, root in ((mesh.tensor, 0), (mesh.context, 0), (mesh.pipe, mesh.pipe.size - 1)):
            group.broadcast(array, root)
        return self._backend.to_host(array)

    def _gather(self, mine: np.ndarray) -> np.ndarray:
        """The rows (all, ...) of all ranks from each one's (rows, ...)."""
        batch = self._mesh.batch
        array = self._backend.from_host(np.ascontiguousarray(mine))
        whole = self._backend.empty((batch.size * mine.shape[0], *mine.shape[1:]), array.dtype)
        batch.allgather(array.reshape(-1), whole.reshape(-1))
        return self._backend.to_host(whole)


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
    parallel: ParallelSettings | Mapping[str, Any] | None = None,
    backend: str = "numpy",
    comm: Comm | None = None,
) -> list[str]:
    """Continue `prompt` with the newest checkpoint of a run; returns `num_samples` texts.

    run: a run folder or one checkpoint of it. parallel: the layout of the ranks, by default tensor
    parallelism over all. Every rank of `comm` (default: all of MPI's world) calls, and every rank
    gets the same texts, which begin with the prompt. They do not depend on the number of ranks nor
    on their layout, up to the rounding of sums. UserError for a run, a prompt or a layout that does
    not work.
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
        if isinstance(parallel, Mapping):
            parallel = from_table(GenerateConfig, {"parallel": parallel}).parallel
    dtype = checkpoint.manifest.settings["train"]["dtype"]
    engine = Engine(checkpoint, comm, _backend(backend, dtype, comm), parallel)
    sampling = Sampling(temperature, top_k, top_p, greedy, seed)
    drawn = engine.generate(ids.tolist(), max_new_tokens, num_samples, sampling)
    engine.free()
    return [prompt + tokenizer.decode(row) for row in drawn]


def _backend(name: str, dtype: str, comm: Comm) -> Backend:
    """The backend with products as in the training; in float32 where a rank has no bfloat16 ones.

    The weights are float32 in any case. Rank 0 tells why. Collective.
    """
    backend, problem = None, ""
    try:
        backend = Backend.create(name, dtype=dtype)
    except UserError as error:
        if dtype != "bfloat16":
            raise
        problem = str(error)
    problems = [text for text in comm.allgather(problem) if text]
    if backend is not None and not problems:
        return backend
    if comm.rank == 0:
        print(f"computing in float32: {problems[0]}", file=sys.stderr, flush=True)
    return Backend.create(name)


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
