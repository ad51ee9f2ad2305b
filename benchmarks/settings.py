"""The settings that training steps are timed at, the same for this package and for PyTorch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

from mpillm.models.gpt2 import Settings as ModelSettings
from mpillm.training.settings import OptimizerSettings, TrainSettings

if TYPE_CHECKING:
    import numpy as np

__all__ = ["OPTIMIZER", "SETTINGS", "Setting", "token_stream"]

SEED = 1337
STREAM = 1 << 20  # tokens

# A constant learning rate, so that a step's work is the same each time; no warm-up.
OPTIMIZER = OptimizerSettings(lr=1e-4, warmup=0, schedule="constant", betas=(0.9, 0.95), clip=1.0)


@dataclass(frozen=True)
class Setting:
    """A GPT-2, its batch, and what is measured of it.

    batch and length: sequences a step over all processes, and tokens of each. context: rows of the
    table of positions. steps: those of a turn; warmup: those before the first turn. ours, torch:
    layouts of this package and modes of PyTorch that compete. goals: by type, how many times as
    fast as PyTorch the package is to be.
    """

    name: str
    layers: int
    heads: int
    width: int
    vocabulary: int
    context: int
    bias: bool
    batch: int
    length: int
    steps: int
    warmup: int
    ours: tuple[str, ...]
    torch: tuple[str, ...]
    goals: Mapping[str, float] = field(default_factory=dict)

    @property
    def tokens(self) -> int:
        """Tokens of a step."""
        return self.batch * self.length

    @property
    def flops(self) -> float:
        """Floating-point operations of a step's matrix products, masked scores not counted.

        Forward 2 for each weight and token, head included, and 4 for each visible key and feature;
        backward twice that.
        """
        weights = self.layers * 12 * self.width**2 + self.vocabulary * self.width
        visible = self.layers * (self.length + 1) / 2 * self.width
        return 3 * self.tokens * (2 * weights + 4 * visible)

    def model(self) -> ModelSettings:
        """The model section of the package's settings."""
        return ModelSettings(
            layers=self.layers,
            heads=self.heads,
            width=self.width,
            vocabulary=self.vocabulary,
            context=self.context,
            bias=self.bias,
        )

    def train(self, dtype: str) -> TrainSettings:
        """The train section, before `resolve_batch`."""
        return TrainSettings(
            steps=1_000_000,
            batch_size=self.batch,
            sequence_length=self.length,
            dtype=dtype,  # type: ignore[arg-type]
            seed=SEED,
        )


SETTINGS = {
    setting.name: setting
    for setting in (
        Setting(
            name="gpt2-124m",
            layers=12,
            heads=12,
            width=768,
            vocabulary=50257,
            context=1024,
            bias=True,
            batch=4,
            length=256,
            steps=1,
            warmup=2,
            ours=("tensor=2,sequence=true", "tensor=2,sequence=true,run.backend=onednn"),
            torch=("eager", "compiled"),
            goals={"float32": 1.4, "bfloat16": 1.1},
        ),
        Setting(
            name="baby",
            layers=6,
            heads=6,
            width=384,
            vocabulary=65,
            context=256,
            bias=False,
            batch=16,
            length=256,
            steps=2,
            warmup=3,
            ours=("data=2,zero=1", "data=2,zero=1,run.backend=onednn"),
            torch=("eager", "compiled", "ddp"),
            goals={"float32": 1.25, "bfloat16": 1.1},
        ),
        Setting(
            name="baby-cpu",
            layers=4,
            heads=4,
            width=128,
            vocabulary=65,
            context=64,
            bias=False,
            batch=12,
            length=64,
            steps=30,
            warmup=20,
            ours=(
                "data=1",
                "data=2,zero=1,overlap=false",
                "data=2,zero=1,overlap=false,run.backend=onednn",
            ),
            torch=("eager", "compiled", "compiled-all", "ddp"),
            goals={"float32": 1.2},
        ),
    )
}


def token_stream(vocabulary: int) -> np.ndarray:
    """Random tokens, uint16 (STREAM,): token k is drawn about as often as 1 in k + 1.

    Like words in a text, so that the embedding is used as it would be, and that there is something
    to learn: the losses of the first steps fall, and mistakes in training show.
    """
    import numpy as np

    draw = np.random.default_rng(SEED).random(STREAM)
    return (np.power(vocabulary + 1.0, draw) - 1.0).astype(np.uint16)
