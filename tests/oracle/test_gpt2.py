"""mpillm against PyTorch: a GPT-2 with the same weights on the same text.

Needs the `oracle` extra (torch); skipped without it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI
from msgspec.structs import replace

from mpillm.array.backend import Backend
from mpillm.data.loader import Loader
from mpillm.models.gpt2 import Settings
from mpillm.models.settings import build_model
from mpillm.nn.layer import Micro
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.learning_rate import learning_rate
from mpillm.training.settings import OptimizerSettings, TrainSettings
from mpillm.training.trainer import Trainer

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'mpillm[oracle]'")

from gpt2_torch import GPT2, Training, from_mpillm  # noqa: E402

# The arrays are too small for threads to help.
torch.set_num_threads(1)

# What a type allows.
TOLERANCE = {"float32": 1e-4, "float64": 1e-9}

# Weights large enough for attention to be far from uniform; a context longer than the sequences.
MODEL = Settings(vocabulary=65, context=24, layers=3, heads=4, width=48, init_std=0.1)

# Three micro-batches a step, the last one with a padded row. The steps see the warm-up and the fall
# of the learning rate, and the clipping bites.
TRAIN = TrainSettings(steps=10, batch_size=5, micro_batch_size=2, sequence_length=16, seed=5)
OPTIMIZER = OptimizerSettings(lr=5e-3, min_lr=5e-4, warmup=3, betas=(0.9, 0.99), clip=1.0)
TEXT = np.random.default_rng(3).integers(0, MODEL.vocabulary, 1000)


@dataclass
class Run:
    """Logits and gradients at the initial weights; loss and gradient norm of every step.

    logits: of the first step's sequences, (b, t, v). gradients: with PyTorch's names and shapes.
    """

    logits: Any
    gradients: dict[str, Any]
    losses: np.ndarray
    norms: np.ndarray


def batch(loader: Loader, step: int) -> tuple[np.ndarray, np.ndarray]:
    """Tokens and labels (b, t) of a step, from 0."""
    first = step * TRAIN.batch_size
    pairs = [loader.sample(first + i) for i in range(TRAIN.batch_size)]
    tokens, labels = zip(*pairs, strict=True)
    return np.stack(tokens), np.stack(labels)


def run_mpillm(settings: Settings, dtype: str, loader: Loader) -> tuple[Run, dict[str, Any]]:
    """A run of mpillm on one rank, and the weights it began with, with PyTorch's names."""
    backend = Backend.create("numpy")
    mesh = Mesh(MPI.COMM_SELF, fit(ParallelSettings(), 1), backend, Recorder())
    train = replace(TRAIN, dtype=dtype)
    trainer = Trainer(build_model(settings), train, OPTIMIZER, mesh, backend, loader)
    (stage,) = trainer.stages
    rng = np.random.default_rng(11)
    for param in stage.store.params:
        if not param.decay:  # gains of one and biases of zero would hide mistakes
            param.value += 0.1 * rng.standard_normal(param.shard.shape)

    def to_torch(arrays: dict[str, np.ndarray]) -> dict[str, Any]:
        return from_mpillm(arrays, settings.layers, settings.width)

    weights = to_torch({param.name: param.value for param in stage.store.params})
    tokens, _ = batch(loader, 0)
    samples = np.arange(TRAIN.batch_size)
    micro = Micro(tokens, np.arange(TRAIN.sequence_length), samples, want="logits")
    (logits,), _ = stage.forward((), micro)
    results = [trainer.step()]
    gradients = to_torch({param.name: param.grad for param in stage.store.params})
    results += [trainer.step() for _ in range(TRAIN.steps - 1)]
    mesh.free()
    losses = np.array([result.loss for result in results])
    norms = np.array([result.grad_norm for result in results])
    return Run(torch.from_numpy(logits), gradients, losses, norms), weights


def run_torch(settings: Settings, dtype: str, loader: Loader, weights: dict[str, Any]) -> Run:
    """The same run in PyTorch."""
    model = GPT2(settings).to(getattr(torch, dtype))
    model.load_state_dict(weights)  # strict: every weight has exactly one counterpart
    training = Training(model, OPTIMIZER, TRAIN.steps)
    batches = [batch(loader, step) for step in range(TRAIN.steps)]
    tensors = [(torch.from_numpy(x), torch.from_numpy(y)) for x, y in batches]
    logits = model(tensors[0][0]).detach()
    results = [training.step(*tensors[0])]
    # Clipped in place: back to the length they had.
    length = max(1.0, (results[0][1] + 1e-6) / OPTIMIZER.clip)
    gradients = {}
    for name, param in model.named_parameters():
        assert param.grad is not None
        gradients[name] = param.grad * length
    results += [training.step(*pair) for pair in tensors[1:]]
    losses, norms = np.array(results).T
    return Run(logits, gradients, losses, norms)


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("bias", [True, False], ids=["bias", "no bias"])
@pytest.mark.parametrize("tied", [True, False], ids=["tied", "untied"])
def test_logits_gradients_and_losses_are_those_of_pytorch(
    tied: bool, bias: bool, dtype: str
) -> None:
    settings = replace(MODEL, tied=tied, bias=bias)
    loader = Loader(TEXT, TRAIN.sequence_length, TRAIN.batch_size, TRAIN.micro_batch_size, 5)
    ours, weights = run_mpillm(settings, dtype, loader)
    theirs = run_torch(settings, dtype, loader, weights)
    tolerance = TOLERANCE[dtype]

    assert (ours.logits - theirs.logits).abs().max() <= tolerance * theirs.logits.abs().max()

    assert ours.gradients.keys() == theirs.gradients.keys()
    # A key's bias has a gradient of exactly zero here and of rounding noise there: hence the floor.
    floor = 1e-3 * theirs.norms[0]
    for name, gradient in theirs.gradients.items():
        difference = (ours.gradients[name] - gradient).norm()
        assert difference <= tolerance * max(gradient.norm(), floor), name

    np.testing.assert_allclose(ours.losses, theirs.losses, rtol=tolerance)
    np.testing.assert_allclose(ours.norms[0], theirs.norms[0], rtol=tolerance)
    assert ours.norms.max() > 1.5 * OPTIMIZER.clip
    assert ours.losses[-1] < ours.losses[0]


def test_the_learning_rate_is_the_same() -> None:
    training = Training(torch.nn.Linear(1, 1), OPTIMIZER, TRAIN.steps)
    for step in range(TRAIN.steps):
        training.number = step
        expected = training.learning_rate()
        assert learning_rate(step, TRAIN.steps, OPTIMIZER) == pytest.approx(expected, rel=1e-14)
