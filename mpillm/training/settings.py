"""The `train`, `optimizer` and `run` sections, and all sections together: `RunConfig`."""

from __future__ import annotations

from typing import Annotated, Literal

from msgspec import Meta

from mpillm.checkpoint.settings import CheckpointSettings
from mpillm.config import Section
from mpillm.data.settings import DataSettings
from mpillm.models.settings import ModelSettings
from mpillm.parallel.settings import ParallelSettings

__all__ = ["OptimizerSettings", "RunConfig", "RunSettings", "TrainSettings"]


class TrainSettings(Section, frozen=True, kw_only=True):
    """What a step is and how many there are."""

    steps: Annotated[int, Meta(ge=1, description="optimizer steps in the whole run")] = 1000
    batch_size: Annotated[int, Meta(ge=1, description="sequences a step, over all ranks")] = 16
    micro_batch_size: Annotated[
        int, Meta(ge=0, description="sequences a forward pass; 0: a data rank's whole share")
    ] = 0
    sequence_length: Annotated[int, Meta(ge=1, description="tokens a sequence")] = 64
    dtype: Annotated[
        Literal["float32", "float64", "bfloat16"],
        Meta(description="type of numbers; bfloat16: of products' operands, the rest is float32"),
    ] = "float32"
    recompute: Annotated[
        Literal["none", "attention", "block"],
        Meta(description="what the backward pass computes anew, to keep fewer activations"),
    ] = "none"
    seed: Annotated[int, Meta(ge=0, description="of weights, dropout and data order")] = 1337
    eval_every: Annotated[
        int, Meta(ge=0, description="steps between validations; 0: only after the last step")
    ] = 0
    deterministic: Annotated[
        bool,
        Meta(description="the same bits in every data, pipe and accumulation layout"),
    ] = False
    max_skipped: Annotated[
        int, Meta(ge=1, description="updates skipped in a row for bad numbers that end the run")
    ] = 10
    spike_zscore: Annotated[
        float,
        Meta(ge=0, description="skip updates whose loss is so many deviations high; 0: none"),
    ] = 0.0
    spike_window: Annotated[
        int, Meta(ge=2, le=10_000, description="steps whose losses a spike is measured by")
    ] = 100


class OptimizerSettings(Section, frozen=True, kw_only=True):
    """AdamW and its learning rate."""

    name: Annotated[Literal["adamw"], Meta(description="the optimizer")] = "adamw"
    lr: Annotated[float, Meta(gt=0, description="peak learning rate")] = 1e-3
    min_lr: Annotated[float, Meta(ge=0, description="learning rate at the end of the decay")] = 1e-4
    warmup: Annotated[int, Meta(ge=0, description="steps of linear warm-up")] = 100
    schedule: Annotated[
        Literal["cosine", "constant"], Meta(description="learning rate after the warm-up")
    ] = "cosine"
    betas: Annotated[
        tuple[float, float], Meta(description="decay of the first and second moment")
    ] = (0.9, 0.95)
    eps: Annotated[float, Meta(gt=0, description="added to the root of the second moment")] = 1e-8
    decay: Annotated[float, Meta(ge=0, description="decoupled weight decay of matrices")] = 0.1
    clip: Annotated[float, Meta(ge=0, description="largest global gradient norm; 0: any")] = 1.0


class RunSettings(Section, frozen=True, kw_only=True):
    """Where the run lives and what it runs on."""

    dir: Annotated[str, Meta(description="the run folder")] = "runs/default"
    backend: Annotated[
        Literal["numpy", "onednn", "cupy", "strict"],
        Meta(
            description="array library; onednn: NumPy with oneDNN's products; strict: NumPy behind "
            "CuPy's rules, for tests"
        ),
    ] = "numpy"
    threads: Annotated[
        int, Meta(ge=0, description="BLAS threads a rank; 0: cores divided by ranks of the node")
    ] = 0
    time_limit: Annotated[
        int | str,
        Meta(description="save and end in time for this limit: seconds or HH:MM:SS; 0: none"),
    ] = 0
    signals: Annotated[
        tuple[str, ...], Meta(description="signals on which the run saves and ends")
    ] = ("USR1", "TERM")
    flight_dir: Annotated[
        str, Meta(description="folder of the ranks' flight files; empty: in the run folder")
    ] = ""
    hang_timeout: Annotated[
        float, Meta(ge=0, description="seconds in one call that end a job as hung; 0: never")
    ] = 600.0
    slow_timeout: Annotated[
        float, Meta(ge=0, description="the same while a rank loads, saves or evaluates")
    ] = 3600.0
    check_replicas: Annotated[
        int, Meta(ge=0, description="steps between comparisons of all replicas' bits; 0: none")
    ] = 0
    profile: Annotated[
        bool, Meta(description="measure where each step's time goes; the steps get a little slower")
    ] = False


class RunConfig(Section, frozen=True, kw_only=True):
    """Every setting of a run."""

    model: ModelSettings
    parallel: ParallelSettings = ParallelSettings()
    train: TrainSettings = TrainSettings()
    optimizer: OptimizerSettings = OptimizerSettings()
    data: DataSettings = DataSettings()
    checkpoint: CheckpointSettings = CheckpointSettings()
    run: RunSettings = RunSettings()
