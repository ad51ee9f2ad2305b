"""How a step's sequences are cut into micro-batches, and dealt to the ranks."""

from __future__ import annotations

from msgspec.structs import replace

from mpillm.errors import UserError
from mpillm.parallel.settings import ParallelSettings
from mpillm.training.settings import TrainSettings

__all__ = ["micros_a_rank", "resolve_batch", "takes_turns"]


def resolve_batch(settings: TrainSettings, layout: ParallelSettings) -> TrainSettings:
    """The settings with `micro_batch_size = 0` replaced by a data rank's share of the batch.

    UserError where deterministic mode cannot keep its promise: its tree over the micro-batches
    must have each data rank's block, or each round of all data ranks, as a subtree.
    """
    data_ranks = layout.data * layout.expert
    if settings.deterministic and layout.reduction != "ordered":
        raise UserError(
            f"train.deterministic: parallel.reduction = {layout.reduction!r} promises no bits; set "
            "parallel.reduction = 'ordered'"
        )
    micro = settings.micro_batch_size or -(-settings.batch_size // data_ranks)
    settings = replace(settings, micro_batch_size=min(micro, settings.batch_size))
    if settings.deterministic and takes_turns(layout):
        if data_ranks & (data_ranks - 1):
            raise UserError(
                f"train.deterministic: with parallel.zero = {layout.zero} the number of data ranks "
                f"(data x expert) must be a power of two, and it is {data_ranks}; use "
                f"{1 << data_ranks.bit_length() - 1} of them"
            )
    elif settings.deterministic and data_ranks > 1:

        def fits(size: int) -> bool:
            rounds = micros_a_rank(replace(settings, micro_batch_size=size), data_ranks)
            return rounds & (rounds - 1) == 0

        size = settings.micro_batch_size
        if not fits(size):
            # The whole batch in one micro-batch always fits.
            near = min(filter(fits, range(1, settings.batch_size + 1)), key=lambda m: abs(m - size))
            raise UserError(
                f"train.deterministic: {settings.batch_size} sequences in micro-batches of {size} "
                f"over {data_ranks} data ranks make {micros_a_rank(settings, data_ranks)} "
                "micro-batches a rank, which must be a power of two; the nearest that fits is "
                f"train.micro_batch_size = {near}"
            )
    return settings


def takes_turns(layout: ParallelSettings) -> bool:
    """Whether data ranks take micro-batches in turn, and not a block of them each.

    Sharded gradients are summed over the ranks after each micro-batch: the micro-batches of a round
    then stand side by side in the tree over all.
    """
    return layout.zero >= 2


def micros_a_rank(settings: TrainSettings, data_ranks: int) -> int:
    """Micro-batches that every data rank runs in a step; the last ones may be padding."""
    micros = -(-settings.batch_size // settings.micro_batch_size)
    return -(-micros // data_ranks)
