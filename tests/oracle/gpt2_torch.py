"""GPT-2 and its training in PyTorch, written from the papers to check mpillm against.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners": learned positions,
norms before both branches and after the last block, GELU in its tanh form, one product for queries,
keys and values. AdamW, warm-up and cosine as nanoGPT (github.com/karpathy/nanoGPT) sets them.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import numpy as np
import torch
import torch.nn.functional as F  # noqa: N812 - everybody's name for it
from torch import Tensor, nn

if TYPE_CHECKING:
    from mpillm.models.gpt2 import Settings
    from mpillm.training.settings import OptimizerSettings

__all__ = ["GPT2", "Training", "from_mpillm"]


class Block(nn.Module):
    """x + attention(norm1(x)), then x + mlp(norm2(x))."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.heads, self.drop = s.heads, s.dropout
        self.norm1 = nn.LayerNorm(s.width, eps=s.norm_eps, bias=s.bias)
        self.qkv = nn.Linear(s.width, 3 * s.width, bias=s.bias)
        self.out = nn.Linear(s.width, s.width, bias=s.bias)
        self.norm2 = nn.LayerNorm(s.width, eps=s.norm_eps, bias=s.bias)
        self.up = nn.Linear(s.width, 4 * s.width, bias=s.bias)
        self.down = nn.Linear(4 * s.width, s.width, bias=s.bias)
        self.dropout = nn.Dropout(s.dropout)

    def attention(self, x: Tensor) -> Tensor:
        """(b, t, d) -> (b, t, d); every token sees itself and those before it."""
        b, t, d = x.shape
        q, k, v = (
            part.view(b, t, self.heads, d // self.heads).transpose(1, 2)
            for part in self.qkv(x).split(d, dim=2)
        )
        drop = self.drop if self.training else 0.0
        y = F.scaled_dot_product_attention(q, k, v, dropout_p=drop, is_causal=True)
        return self.dropout(self.out(y.transpose(1, 2).reshape(b, t, d)))  # type: ignore[no-any-return]

    def forward(self, x: Tensor) -> Tensor:
        """(b, t, d) -> (b, t, d)."""
        x = x + self.attention(self.norm1(x))
        hidden = F.gelu(self.up(self.norm2(x)), approximate="tanh")
        return x + self.dropout(self.down(hidden))  # type: ignore[no-any-return]


class GPT2(nn.Module):
    """Token ids (b, t) -> logits (b, t, v). A tied head is the token table."""

    def __init__(self, s: Settings) -> None:
        super().__init__()
        self.tokens = nn.Embedding(s.vocabulary, s.width)
        self.positions = nn.Embedding(s.context, s.width)
        self.dropout = nn.Dropout(s.dropout)
        self.blocks = nn.ModuleList(Block(s) for _ in range(s.layers))
        self.norm = nn.LayerNorm(s.width, eps=s.norm_eps, bias=s.bias)
        self.head = None if s.tied else nn.Linear(s.width, s.vocabulary, bias=False)

    def forward(self, ids: Tensor) -> Tensor:
        """(b, t) -> (b, t, v)."""
        x = self.tokens(ids) + self.positions(torch.arange(ids.shape[1]))
        x = self.dropout(x)
        for block in self.blocks:
            x = block(x)
        table = self.tokens if self.head is None else self.head
        return F.linear(self.norm(x), table.weight)


def from_mpillm(arrays: Mapping[str, np.ndarray], layers: int, width: int) -> dict[str, Tensor]:
    """Weights or gradients of mpillm's GPT-2, whole, with PyTorch's names and shapes.

    mpillm keeps the parts of a fused product as axes: queries, keys and values are (3, heads, e),
    and what goes into the attention's output product is (heads, e). Here they are one axis.
    """
    into, out_of, flat = (-1, width), (width, -1), (-1,)
    names = {
        "embedding.tokens": ("tokens.weight", into),
        "embedding.positions": ("positions.weight", into),
        "head.norm.gain": ("norm.weight", flat),
        "head.norm.bias": ("norm.bias", flat),
        "head.weight": ("head.weight", into),
    }
    for number in range(layers):
        ours, theirs = f"block.{number:03d}", f"blocks.{number}"
        names |= {
            f"{ours}.norm1.gain": (f"{theirs}.norm1.weight", flat),
            f"{ours}.norm1.bias": (f"{theirs}.norm1.bias", flat),
            f"{ours}.attention.qkv.weight": (f"{theirs}.qkv.weight", into),
            f"{ours}.attention.qkv.bias": (f"{theirs}.qkv.bias", flat),
            f"{ours}.attention.out.weight": (f"{theirs}.out.weight", out_of),
            f"{ours}.attention.out.bias": (f"{theirs}.out.bias", flat),
            f"{ours}.norm2.gain": (f"{theirs}.norm2.weight", flat),
            f"{ours}.norm2.bias": (f"{theirs}.norm2.bias", flat),
            f"{ours}.mlp.up.weight": (f"{theirs}.up.weight", into),
            f"{ours}.mlp.up.bias": (f"{theirs}.up.bias", flat),
            f"{ours}.mlp.down.weight": (f"{theirs}.down.weight", out_of),
            f"{ours}.mlp.down.bias": (f"{theirs}.down.bias", flat),
        }
    tensors = {}
    for name, array in arrays.items():
        other, shape = names[name]
        tensors[other] = torch.from_numpy(array.copy()).reshape(shape)
    return tensors


class Training:
    """AdamW steps on a model; the learning rate falls along a cosine after the warm-up."""

    def __init__(self, model: nn.Module, s: OptimizerSettings, steps: int) -> None:
        self.model, self.settings, self.steps, self.number = model, s, steps, 0
        groups = [
            {"params": [p for p in model.parameters() if p.dim() >= 2], "weight_decay": s.decay},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]
        self.optimizer = torch.optim.AdamW(groups, lr=s.lr, betas=s.betas, eps=s.eps, fused=True)

    def step(self, ids: Tensor, labels: Tensor) -> tuple[float, float]:
        """One step on ids and labels (b, t): the mean loss in nats, the norm before clipping.

        The gradients stay, clipped, in `grad` of the model's parameters.
        """
        for group in self.optimizer.param_groups:
            group["lr"] = self.learning_rate()
        self.optimizer.zero_grad()
        loss = F.cross_entropy(self.model(ids).flatten(0, 1), labels.flatten())
        loss.backward()  # type: ignore[no-untyped-call]
        norm = nn.utils.clip_grad_norm_(self.model.parameters(), self.settings.clip)
        self.optimizer.step()
        self.number += 1
        return loss.item(), norm.item()

    def learning_rate(self) -> float:
        """Of the next step."""
        s, i = self.settings, self.number
        if i < s.warmup:
            return s.lr * (i + 1) / (s.warmup + 1)
        turn = math.pi * (i - s.warmup) / (self.steps - s.warmup)
        return s.min_lr + (s.lr - s.min_lr) * (1.0 + math.cos(turn)) / 2.0
