"""GPT-2: learned positions, pre-norm blocks, tanh GELU, tied head.

Radford et al. 2019, "Language Models are Unsupervised Multitask Learners".
"""

from __future__ import annotations

import math
from typing import Annotated, Any

from msgspec import Meta

from mpillm.errors import UserError
from mpillm.models.model import Model, Spec, Unit
from mpillm.models.settings import ModelSettings
from mpillm.nn.attention import SelfAttention
from mpillm.nn.block import PreNormBlock
from mpillm.nn.embedding import Embedding
from mpillm.nn.experts import MixtureOfExperts
from mpillm.nn.head import LanguageModelHead
from mpillm.nn.layer import Build, Layer, Micro
from mpillm.nn.mlp import MLP
from mpillm.nn.norm import LayerNorm
from mpillm.nn.recompute import recomputed
from mpillm.nn.router import Mixture
from mpillm.nn.rows import SharedRows

__all__ = ["Settings", "build"]


class Settings(ModelSettings, frozen=True, kw_only=True):
    """The `model` section for `family = "gpt2"`."""

    family: str = "gpt2"
    layers: Annotated[int, Meta(ge=1, description="blocks")] = 4
    heads: Annotated[int, Meta(ge=1, description="attention heads; divides width")] = 4
    width: Annotated[int, Meta(ge=1, description="features of a token")] = 128
    bias: Annotated[bool, Meta(description="biases in products and norms")] = True
    tied: Annotated[bool, Meta(description="the head is the embedding's table")] = True
    dropout: Annotated[
        float, Meta(ge=0, lt=1, description="of embeddings, attention and both branches")
    ] = 0.0
    init_std: Annotated[
        float, Meta(gt=0, description="of weights; residual projections over sqrt(2 layers)")
    ] = 0.02
    norm_eps: Annotated[float, Meta(gt=0, description="added to the variance in norms")] = 1e-5
    experts: Annotated[
        int, Meta(ge=0, description="feed-forward parts that a token's router chooses from; 0: one")
    ] = 0
    experts_per_token: Annotated[int, Meta(ge=1, description="experts that a token goes to")] = 2
    expert_every: Annotated[
        int, Meta(ge=1, description="every so many blocks, the last one has experts")
    ] = 1
    expert_capacity: Annotated[
        float,
        Meta(
            ge=0,
            description="in training an expert takes this many times its even share of a sequence "
            "at most; 0: all that it is chosen for",
        ),
    ] = 0.0
    balance: Annotated[
        float, Meta(ge=0, description="weight of the loss that spreads tokens over the experts")
    ] = 0.01


def build(settings: Settings) -> Model:
    """The model; `vocabulary` and `context` must have been filled in."""
    s = settings
    if s.width % s.heads:
        divisors = [h for h in range(1, s.width + 1) if s.width % h == 0]
        near = min(divisors, key=lambda h: abs(h - s.heads))
        raise UserError(
            f"model.heads = {s.heads} does not divide model.width = {s.width}; "
            f"the nearest number of heads that does is {near}"
        )
    _check_experts(s)
    out_std = s.init_std / math.sqrt(2 * s.layers)
    mixture = Mixture(s.experts, s.experts_per_token, s.expert_capacity, s.balance)

    def norm(build: Build, name: str) -> LayerNorm:
        return LayerNorm(build, name, s.width, bias=s.bias, eps=s.norm_eps)

    def embedding(build: Build) -> Layer:
        return Embedding(
            build,
            s.vocabulary,
            s.context,
            s.width,
            std=s.init_std,
            drop=s.dropout,
            tied=s.tied,
            auxiliary=s.experts > 0,
        )

    def feed_forward(build: Build, name: str, experts: bool) -> Layer:
        inner, stds = 4 * s.width, {"std": s.init_std, "out_std": out_std}
        if not experts:
            return MLP(build, f"{name}.mlp", s.width, inner, bias=s.bias, drop=s.dropout, **stds)
        return MixtureOfExperts(
            build, f"{name}.experts", s.width, inner, mixture, bias=s.bias, drop=s.dropout, **stds
        )

    def block(number: int) -> Unit:
        name = f"block.{number:03d}"
        experts = s.experts > 0 and (number + 1) % s.expert_every == 0

        def layer(build: Build) -> Layer:
            norm1 = norm(build, f"{name}.norm1")
            attention = SelfAttention(
                build,
                f"{name}.attention",
                s.width,
                s.heads,
                bias=s.bias,
                std=s.init_std,
                out_std=out_std,
                drop=s.dropout,
            )
            block = PreNormBlock(
                build,
                norm1,
                recomputed(build, "attention", attention),
                norm(build, f"{name}.norm2"),
                feed_forward(build, name, experts),
            )
            return recomputed(build, "block", block)

        # Attention, then two products 4 times as wide for each expert, and the router's.
        products = 4 * s.width * s.width
        products += 8 * s.width * s.width * (s.experts_per_token if experts else 1)
        products += s.experts * s.width if experts else 0
        scores = s.context * s.width  # half of the keys are visible, two products
        return Unit(name, products + scores, layer)

    def head(build: Build) -> Layer:
        return LanguageModelHead(
            build, norm(build, "head.norm"), s.vocabulary, s.width, std=s.init_std, tied=s.tied
        )

    def boundary(micro: Micro, dtype: Any, rows: SharedRows) -> tuple[Spec, ...]:
        x = (rows.shape(*micro.shape, s.width), dtype)
        return (x, ((1,), "float64")) if s.experts else (x,)

    units = (
        # Rows are copied, not multiplied: a few operations a feature.
        Unit("embedding", 4.0 * s.width, embedding),
        *(block(number) for number in range(s.layers)),
        Unit("head", float(s.vocabulary * s.width), head),
    )
    axes = {"data", "tensor", "pipe", "context"} | ({"expert"} if s.experts else set())
    why_not = {"expert": "the model has no experts to share out (model.experts = 0)"}
    return Model("gpt2", units, boundary, frozenset(axes), why_not, auxiliary=s.experts > 0)


def _check_experts(s: Settings) -> None:
    """UserError for numbers of experts that do not fit together."""
    if s.experts and s.experts_per_token > s.experts:
        raise UserError(
            f"model.experts_per_token = {s.experts_per_token}: the model has {s.experts} "
            f"experts; expected 1 to {s.experts}, the nearest is {s.experts}"
        )
    if s.experts and s.expert_every > s.layers:
        raise UserError(
            f"model.expert_every = {s.expert_every} leaves none of {s.layers} layers with "
            f"experts; expected 1 to {s.layers}, the nearest is {s.layers}"
        )
