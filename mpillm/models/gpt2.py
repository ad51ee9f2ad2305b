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
from mpillm.nn.head import LanguageModelHead
from mpillm.nn.layer import Build, Layer, Micro
from mpillm.nn.mlp import MLP
from mpillm.nn.norm import LayerNorm
from mpillm.nn.recompute import recomputed
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
    out_std = s.init_std / math.sqrt(2 * s.layers)

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
        )

    def block(number: int) -> Unit:
        name = f"block.{number:03d}"

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
                norm1,
                recomputed(build, "attention", attention),
                norm(build, f"{name}.norm2"),
                MLP(
                    build,
                    f"{name}.mlp",
                    s.width,
                    4 * s.width,
                    bias=s.bias,
                    std=s.init_std,
                    out_std=out_std,
                    drop=s.dropout,
                ),
            )
            return recomputed(build, "block", block)

        products = 12 * s.width * s.width
        scores = s.context * s.width  # half of the keys are visible, two products
        return Unit(name, products + scores, layer)

    def head(build: Build) -> Layer:
        return LanguageModelHead(
            build, norm(build, "head.norm"), s.vocabulary, s.width, std=s.init_std, tied=s.tied
        )

    def boundary(micro: Micro, dtype: Any, rows: SharedRows) -> tuple[Spec, ...]:
        return ((rows.shape(*micro.shape, s.width), dtype),)

    units = (
        # Rows are copied, not multiplied: a few operations a feature.
        Unit("embedding", 4.0 * s.width, embedding),
        *(block(number) for number in range(s.layers)),
        Unit("head", float(s.vocabulary * s.width), head),
    )
    return Model("gpt2", units, boundary, frozenset({"data", "tensor", "pipe"}))
