"""Mixtures of experts against PyTorch's autograd: every expert applied to every token.

Needs the `oracle` extra (torch); skipped without it.
"""

from __future__ import annotations

import math
from typing import Any

import numpy as np
import pytest
from mpi4py import MPI

from mpillm.array.backend import Backend
from mpillm.models.gpt2 import Settings
from mpillm.models.model import build_stages
from mpillm.models.settings import build_model
from mpillm.nn.experts import MixtureOfExperts
from mpillm.nn.layer import Build, Micro
from mpillm.nn.router import Mixture
from mpillm.nn.store import ParamStore
from mpillm.parallel.mesh import Mesh, fit
from mpillm.parallel.recorder import Recorder
from mpillm.parallel.settings import ParallelSettings

torch = pytest.importorskip("torch", reason="needs PyTorch: pip install 'mpillm[oracle]'")

import torch.nn.functional as F  # noqa: E402, N812
from gpt2_torch import GPT2, Block, from_mpillm  # noqa: E402
from torch import Tensor, nn  # noqa: E402

# The arrays are too small for threads to help.
torch.set_num_threads(1)

# What a type allows, against the largest element or the length of a gradient.
TOLERANCE = {"float32": 2e-5, "float64": 1e-11}

B, T, WIDTH, INNER = 3, 16, 12, 20
BACKEND = Backend.create("numpy")


class Experts(nn.Module):
    """A router and experts; the weights are stacked as mpillm's are."""

    def __init__(self, width: int, inner: int, mixture: Mixture) -> None:
        super().__init__()
        self.mixture, e = mixture, mixture.experts
        self.router = nn.Linear(width, e, bias=False)
        self.up = nn.Parameter(torch.empty(e, inner, width))
        self.down = nn.Parameter(torch.empty(e, width, inner))
        self.up_bias = nn.Parameter(torch.empty(e, inner))
        self.down_bias = nn.Parameter(torch.empty(e, width))

    def forward(self, x: Tensor, mask: Tensor) -> tuple[Tensor, Tensor]:
        """y (b, t, d), and the balance loss summed over the counted tokens."""
        m = self.mixture
        p = self.router(x).softmax(dim=-1)
        gates, chosen = p.topk(m.per_token, dim=-1)
        if m.per_token > 1:
            gates = gates / gates.sum(dim=-1, keepdim=True)
        y, loss = torch.zeros_like(x), torch.zeros((), dtype=torch.float64)
        limit = math.ceil(m.capacity * m.per_token * x.shape[1] / m.experts)
        counted = mask.sum(dim=1)
        for e in range(m.experts):
            assigned = (chosen == e).any(dim=-1)  # (b, t)
            gate = (gates * (chosen == e)).sum(dim=-1)
            if m.capacity > 0:
                gate = gate * (assigned.cumsum(dim=1) <= limit)
            hidden = F.gelu(F.linear(x, self.up[e], self.up_bias[e]), approximate="tanh")
            y = y + gate[..., None] * F.linear(hidden, self.down[e], self.down_bias[e])
            f = (assigned * mask).sum(dim=1) / (m.per_token * counted)
            mean = (p[..., e] * mask).sum(dim=1) / counted
            loss = loss + m.balance * m.experts * (counted * f * mean).sum()
        return y, loss


NAMES = {
    "router.weight": "router.weight",
    "up.weight": "up",
    "up.bias": "up_bias",
    "down.weight": "down",
    "down.bias": "down_bias",
}


def to_torch(array: np.ndarray) -> Tensor:
    return torch.from_numpy(array.copy())


def assert_close(ours: np.ndarray, theirs: Any, tolerance: float, what: str) -> None:
    expected = theirs.detach().numpy()
    assert ours.shape == expected.shape
    difference = np.linalg.norm((ours - expected).ravel())
    assert difference <= tolerance * max(1.0, np.linalg.norm(expected.ravel())), what


def text(dtype: str, vocabulary: int = 1) -> Micro:
    """The sequences are of different lengths."""
    rng = np.random.default_rng(3)
    tokens, labels = rng.integers(0, vocabulary, (2, B, T))
    mask = np.ones((B, T), dtype)
    mask[0, -3:], mask[2, 5:] = 0, 0
    return Micro(
        tokens=tokens,
        labels=labels,
        mask=mask,
        index=np.arange(T),
        samples=np.arange(B),
        training=True,
    )


@pytest.fixture
def mesh() -> Any:
    mesh = Mesh(MPI.COMM_SELF, fit(ParallelSettings(), 1), BACKEND, Recorder())
    yield mesh
    mesh.free()


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("capacity", [0.0, 0.8])
@pytest.mark.parametrize("k", [1, 2, 4])
def test_the_layer(k: int, capacity: float, dtype: str, mesh: Mesh) -> None:
    mixture = Mixture(experts=6, per_token=k, capacity=capacity, balance=0.2)
    store = ParamStore(BACKEND, dtype, seed=1)
    build = Build(BACKEND, mesh, store)
    layer = MixtureOfExperts(
        build, "experts", WIDTH, INNER, mixture, bias=True, std=0.4, out_std=0.4, drop=0.0
    )
    store.allocate()
    rng = np.random.default_rng(2)
    module = Experts(WIDTH, INNER, mixture).to(getattr(torch, dtype))
    theirs = dict(module.named_parameters())
    for param in store.params:
        param.value += 0.1 * rng.standard_normal(param.value.shape)
        theirs[NAMES[param.name.removeprefix("experts.")]].data = to_torch(param.value)
    x, dy = rng.standard_normal((2, B, T, WIDTH)).astype(dtype)
    micro = text(dtype)

    (y, loss), saved = layer.forward((x,), micro)
    (dx,) = layer.backward((dy.copy(), np.array([0.3])), saved, micro)

    x_torch = to_torch(x).requires_grad_()
    y_torch, loss_torch = module(x_torch, to_torch(micro.mask))
    ((y_torch * to_torch(dy)).sum() + 0.3 * loss_torch).backward()
    tolerance = TOLERANCE[dtype]
    assert_close(y, y_torch, tolerance, "y")
    assert_close(dx, x_torch.grad, tolerance, "dx")
    assert float(loss[0]) == pytest.approx(loss_torch.item(), rel=tolerance)
    for param in store.params:
        gradient = theirs[NAMES[param.name.removeprefix("experts.")]].grad
        assert_close(param.grad, gradient, tolerance, param.name)


class MixtureBlock(Block):
    """A block whose feed-forward part is a mixture; keeps its balance loss."""

    def __init__(self, s: Settings, mixture: Mixture) -> None:
        super().__init__(s)
        self.experts = Experts(s.width, 4 * s.width, mixture)
        self.mask: Any = None
        self.loss: Any = None
        del self.up, self.down

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d) -> (b, t, d)."""
        x = x + self.attention(self.norm1(x))
        y, self.loss = self.experts(self.norm2(x), self.mask)
        return x + y


@pytest.mark.parametrize("dtype", TOLERANCE)
def test_the_model(dtype: str, mesh: Mesh) -> None:
    """Loss, balance loss and all gradients of a GPT-2 whose second block is a mixture."""
    s = Settings(
        vocabulary=17, context=T, layers=3, heads=2, width=WIDTH, init_std=0.3, experts=4,
        expert_every=2, expert_capacity=1.1, balance=0.1,
    )  # fmt: skip
    mixture = Mixture(s.experts, s.experts_per_token, s.expert_capacity, s.balance)
    (stage,) = build_stages(build_model(s), BACKEND, mesh, dtype, seed=1)
    model = GPT2(s)
    block = MixtureBlock(s, mixture)
    model.blocks[1] = block
    model.to(getattr(torch, dtype))

    def renamed(arrays: dict[str, np.ndarray]) -> dict[str, Tensor]:
        prefix, dense, mixed = "block.001.experts.", {}, {}
        for name, array in arrays.items():
            if name.startswith(prefix):
                mixed[f"blocks.1.experts.{NAMES[name.removeprefix(prefix)]}"] = to_torch(array)
            else:
                dense[name] = array
        return from_mpillm(dense, s.layers, s.width) | mixed

    model.load_state_dict(renamed({param.name: param.value for param in stage.store.params}))
    micro = text(dtype, s.vocabulary)
    mask = to_torch(micro.mask)
    scale = 1.0 / float(micro.mask.sum())
    (loss, auxiliary), saved = stage.forward((), micro)
    stage.backward((scale,), saved, micro)

    block.mask = mask
    losses = F.cross_entropy(
        model(to_torch(micro.tokens)).flatten(0, 1),
        to_torch(micro.labels).flatten(),
        reduction="none",
    )
    loss_torch = (losses * mask.flatten()).sum()
    ((loss_torch + block.loss) * scale).backward()
    tolerance = TOLERANCE[dtype]
    assert float(loss) == pytest.approx(loss_torch.item(), rel=tolerance)
    assert auxiliary.item() == pytest.approx(block.loss.item(), rel=tolerance)
    gradients = renamed(
        {
            param.name: param.arena.grads[:, : param.grad.size]
            .sum(axis=0)
            .reshape(param.shard.shape)
            if param.tied
            else param.grad
            for param in stage.store.params
        }
    )
    named = dict(model.named_parameters())
    assert gradients.keys() == named.keys()
    for name, gradient in gradients.items():
        assert_close(gradient.numpy(), named[name].grad, tolerance, name)
