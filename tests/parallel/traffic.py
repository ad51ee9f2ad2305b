"""The formulas of `docs/parallel.md`: what a rank hands to calls in one training step, in bytes.

One function for each mode; `step` adds them up. Sizes come from the settings, never from what a
trainer has built. What is taken from the package is where things are cut: `Model.cuts`,
`split_range`, `zigzag`, and `cut_into_parts` for the parts of ZeRO.
"""

from __future__ import annotations

import dataclasses
import math
from collections import Counter
from dataclasses import dataclass
from functools import cached_property
from itertools import product
from types import SimpleNamespace
from typing import Any

from mpillm.models.gpt2 import Settings
from mpillm.models.settings import build_model
from mpillm.nn.param import cut_into_parts
from mpillm.parallel.mesh import AXES
from mpillm.parallel.programs import lower, turns_at_once
from mpillm.parallel.schedules import SCHEDULES
from mpillm.parallel.settings import ParallelSettings
from mpillm.parallel.shard import split_range, zigzag
from mpillm.training.settings import TrainSettings

__all__ = ["Arena", "Case", "Ledger", "arriving", "step"]

Ledger = Counter[tuple[str, str]]  # bytes by (axis, operation)


@dataclass(frozen=True)
class Weight:
    """A parameter on this rank: elements of all of it, and of its shard here."""

    name: str
    whole: int
    local: int
    decay: bool
    group: str = "replicas"  # that its gradient is summed over
    rows: bool = False  # whether tensor ranks have the gradients of their rows only
    tied: bool = False


@dataclass(frozen=True)
class Arena:
    """Weights of a layer with the same groups: elements with alignment, and of this rank's part."""

    group: str
    rows: bool
    tied: bool
    uses: int  # by layers of the stage
    zero: int
    size: int
    part: int


@dataclass(frozen=True)
class Case:
    """One rank of a run; `train` and `layout` as `resolve_batch` and `fit` give them."""

    model: Settings
    train: TrainSettings
    layout: ParallelSettings
    rank: int

    @cached_property
    def place(self) -> dict[str, int]:
        """Rank along each axis, the last one fastest."""
        place, rank = {}, self.rank
        for axis in reversed(AXES):
            rank, place[axis] = divmod(rank, getattr(self.layout, axis))
        return place

    @cached_property
    def itemsize(self) -> int:
        return {"float32": 4, "float64": 8}[self.train.dtype]

    @cached_property
    def data_ranks(self) -> int:
        """Those that share out a step's sequences."""
        return self.layout.data * self.layout.expert

    @cached_property
    def micros(self) -> int:
        """Micro-batches a rank, m."""
        total = math.ceil(self.train.batch_size / self.train.micro_batch_size)
        return math.ceil(total / self.data_ranks)

    def tokens(self, context_rank: int) -> int:
        """Tokens of a sequence that a context rank holds, t."""
        runs = zigzag(self.train.sequence_length, self.layout.context, context_rank)
        return sum(stop - start for start, stop in runs)

    @cached_property
    def n(self) -> int:
        """Tokens of a micro-batch on this rank, b * t."""
        return self.train.micro_batch_size * self.tokens(self.place["context"])

    @cached_property
    def activation(self) -> int:
        """Bytes of an activation of all these tokens, n * d * s."""
        return self.n * self.model.width * self.itemsize

    @cached_property
    def heads(self) -> int:
        return self.share(self.model.heads, "tensor")

    @cached_property
    def stages(self) -> dict[int, range]:
        """The layers of this rank's stages, by the stages' numbers; 0 is the embedding."""
        cuts = build_model(self.model).cuts(self.layout)
        mine = range(self.place["pipe"], len(cuts), self.layout.pipe)
        return {number: range(*cuts[number]) for number in mine}

    @cached_property
    def layers(self) -> list[int]:
        return [layer for stage in self.stages.values() for layer in stage]

    @cached_property
    def embeddings(self) -> int:
        """1 where the embedding is, else 0."""
        return self.layers.count(0)

    @property
    def head_turns_at_once(self) -> bool:
        """Whether the head's backward pass always comes right after its forward pass.

        In deterministic mode its weight's gradient, too, before the next micro-batch.
        """
        pipe, schedule = self.size("pipe"), self.layout.schedule
        if self.micros == 1 or schedule == "1f1b":
            return True
        if schedule == "interleaved":
            if self.micros % pipe == 0:
                return True
            chunks = self.layout.chunks  # a rule by numbers alone would be a long one
            programs = lower(SCHEDULES[schedule](pipe, self.micros, chunks), chunks)
            return turns_at_once(programs[-1], chunks - 1, weights=self.train.deterministic)
        return schedule == "zero-bubble" and (pipe == 1 or not self.train.deterministic)

    @cached_property
    def heads_of_model(self) -> int:
        """1 where the head is, else 0."""
        return self.layers.count(self.model.layers + 1)

    @cached_property
    def blocks(self) -> int:
        return len(self.layers) - self.embeddings - self.heads_of_model

    @cached_property
    def mixtures(self) -> int:
        """Blocks with experts."""
        return sum(self.has_experts(layer) for layer in self.layers)

    def has_experts(self, layer: int) -> bool:
        inside = 0 < layer <= self.model.layers
        return inside and self.model.experts > 0 and layer % self.model.expert_every == 0

    @cached_property
    def attention_passes(self) -> int:
        """Forward passes of attention for a micro-batch, those for recomputing included."""
        return 1 + (self.train.recompute != "none")

    @cached_property
    def block_passes(self) -> int:
        """The same of the feed-forward part."""
        return 1 + (self.train.recompute == "block")

    def size(self, group: str) -> int:
        """Ranks of a group."""
        axes = {
            "replicas": ("data", "expert", "context"),
            "expert_replicas": ("data", "context"),
            "model": ("pipe", "expert", "tensor"),
            "world": AXES,
        }
        return math.prod(getattr(self.layout, axis) for axis in axes.get(group, (group,)))

    def share(self, items: int, axis: str) -> int:
        """How many of `items` this rank has along an axis."""
        start, stop = split_range(items, getattr(self.layout, axis), self.place[axis])
        return stop - start

    # -- weights -----------------------------------------------------------------------------------

    def weights(self, layer: int) -> list[Weight]:
        """The parameters of a layer, in the order in which it asks for them."""
        model, d = self.model, self.model.width
        if layer == 0:
            positions = model.context * d
            return [self._table(), Weight("embedding.positions", positions, positions, True)]
        if layer == model.layers + 1:
            return [*self._norm("head.norm"), self._table(head=True)]
        name, inner = f"block.{layer - 1:03d}", 4 * d
        found = self._norm(f"{name}.norm1")
        found += self._product(f"{name}.qkv", 3 * d, 3 * d // model.heads * self.heads, d)
        found += self._row_product(f"{name}.out", d // model.heads * self.heads, d)
        found += self._norm(f"{name}.norm2")
        if self.has_experts(layer):
            return found + self._experts(name, inner)
        found += self._product(f"{name}.up", inner, self.share(inner, "tensor"), d)
        return found + self._row_product(f"{name}.down", self.share(inner, "tensor"), inner)

    def _table(self, head: bool = False) -> Weight:
        v, d, tied = self.model.vocabulary, self.model.width, self.model.tied
        name = "head.weight" if head and not tied else "embedding.tokens"
        return Weight(name, v * d, self.share(v, "tensor") * d, True, tied=tied)

    def _norm(self, name: str) -> list[Weight]:
        parts = ("gain", "bias") if self.model.bias else ("gain",)
        d, rows = self.model.width, self.layout.sequence
        return [Weight(f"{name}.{part}", d, d, False, rows=rows) for part in parts]

    def _product(self, name: str, outputs: int, mine: int, inputs: int) -> list[Weight]:
        """With cut outputs, `mine` of which are here."""
        weight = Weight(f"{name}.weight", outputs * inputs, mine * inputs, True)
        bias = [Weight(f"{name}.bias", outputs, mine, False)] if self.model.bias else []
        return [weight, *bias]

    def _row_product(self, name: str, mine: int, inputs: int) -> list[Weight]:
        """With cut inputs, `mine` of which are here, and d outputs."""
        d = self.model.width
        weight = Weight(f"{name}.weight", d * inputs, d * mine, True)
        return [weight, *([Weight(f"{name}.bias", d, d, False)] if self.model.bias else [])]

    def _experts(self, name: str, inner: int) -> list[Weight]:
        experts, d = self.model.experts, self.model.width
        here, mine = self.share(experts, "expert"), self.share(inner, "tensor")

        def stacked(part: str, a: int, b: int, decay: bool) -> Weight:
            return Weight(f"{name}.{part}", experts * a, here * b, decay, group="expert_replicas")

        found = [
            Weight(f"{name}.router", experts * d, experts * d, True),
            stacked("up.weight", inner * d, mine * d, True),
            stacked("down.weight", d * inner, d * mine, True),
        ]
        if self.model.bias:
            found += [stacked("up.bias", inner, mine, False), stacked("down.bias", d, d, False)]
        return found

    @cached_property
    def arenas(self) -> list[Arena]:
        """The arenas of this rank."""
        return [arena for stage in self.stages.values() for arena in self._stage_arenas(stage)]

    def _stage_arenas(self, stage: range) -> list[Arena]:
        together: dict[Any, list[Weight]] = {}
        for layer in stage:
            for weight in self.weights(layer):
                key = weight.group, weight.rows, "tied" if weight.tied else layer
                together.setdefault(key, []).append(weight)
        return [self._arena(weights) for weights in together.values()]

    def _arena(self, weights: list[Weight]) -> Arena:
        distinct = {weight.name: weight for weight in weights}
        uses = len(weights) // len(distinct)  # a table that is tied on one stage is there twice
        weights = sorted(distinct.values(), key=lambda weight: not weight.decay)
        offsets, size = [], 0
        for weight in weights:
            offsets.append(size)
            size += math.ceil(weight.local / 16) * 16
        first = weights[0]
        group = first.group
        zero = self.layout.zero if self.size(group) > 1 else 0
        part = size
        if zero:
            # All that the rule looks at: elements of the whole parameter, and of its shard.
            params: Any = [
                SimpleNamespace(shard=SimpleNamespace(shape=(w.whole,), size=w.local))
                for w in weights
            ]
            cuts = cut_into_parts(params, offsets, size, self.size(group))
            rank = self.rank_among(group)
            part = cuts[rank + 1] - cuts[rank]
        return Arena(group, first.rows, first.tied, uses, zero, size, part)

    def rank_among(self, group: str) -> int:
        """Rank in `replicas` or `expert_replicas`: the context slowest, then data, then expert."""
        axes = ("context", "data", "expert") if group == "replicas" else ("context", "data")
        rank = 0
        for axis in axes:
            rank = rank * getattr(self.layout, axis) + self.place[axis]
        return rank


def arriving(op: str, nbytes: int, ranks: int) -> int:
    """Bytes that reach a rank from others in a call with this payload, cut evenly.

    Sums are ordered ones. What a collective of MPI does with them on the way is its own affair.
    """
    if op == "allreduce" and (ranks == 2 or nbytes * ranks <= 1 << 15):
        return (ranks - 1) * nbytes
    once = (ranks - 1) * nbytes // ranks
    return {
        "allreduce": 2 * once,
        "reduce_scatter": once,
        "allgather": once,
        "alltoall": once,
        "recv": nbytes,
    }[op]


# -- the modes -------------------------------------------------------------------------------------


def step(case: Case, sent: int, arrived: int) -> Ledger:
    """All of a step. sent, arrived: see `experts`."""
    modes = (
        tensor,
        vocabulary,
        context,
        pipeline,
        gradients,
        ties,
        norms_of_rows,
        norm,
        losses,
        verdict,
    )
    total: Ledger = Counter()
    for mode in modes:
        total.update(mode(case))
    total.update(experts(case, sent, arrived))
    return +total


def tensor(case: Case) -> Ledger:
    """Sums of whole rows, or their two halves where the ranks share out the rows."""
    found: Ledger = Counter()
    if case.size("tensor") == 1:
        return found
    a = case.micros * case.activation
    # One sum a branch and pass.
    sums = (
        case.embeddings
        + case.blocks * (case.attention_passes + 1 + case.block_passes + 1)
        + case.heads_of_model
    )
    if not case.layout.sequence:
        found["tensor", "allreduce"] += sums * a
    else:
        found["tensor", "reduce_scatter"] += sums * a
        # Before each first product, before each second one's backward pass; and again for the
        # weight gradients of what was not kept, which experts keep.
        found["tensor", "allgather"] += a * (
            case.embeddings
            + case.blocks * (case.attention_passes + 1 + case.block_passes + 1)
            + case.blocks
            + (case.blocks - case.mixtures)
            + case.heads_of_model * (1 if case.head_turns_at_once else 2)
        )
    choices = case.n * case.model.experts_per_token * case.itemsize
    found["tensor", "allreduce"] += case.micros * case.mixtures * choices
    return found


def vocabulary(case: Case) -> Ledger:
    """Three numbers a token for the loss."""
    found: Ledger = Counter()
    if case.size("tensor") > 1:
        found["tensor", "allreduce"] += (
            case.heads_of_model * case.micros * 3 * case.n * case.itemsize
        )
    return found


def norms_of_rows(case: Case) -> Ledger:
    """Gradients of norms, of which tensor ranks with shared rows have their rows' part."""
    found: Ledger = Counter()
    if case.size("tensor") > 1:
        for arena in case.arenas:
            if arena.rows:
                found["tensor", "allreduce"] += arena.part * case.itemsize
    return found


def context(case: Case) -> Ledger:
    """Keys and values round the ring, and back again with their derivatives."""
    found: Ledger = Counter()
    ranks, model = case.size("context"), case.model
    if ranks == 1:
        return found
    b, length, mine = case.train.micro_batch_size, case.train.sequence_length, case.place["context"]
    token = 2 * b * case.heads * (model.width // model.heads) * case.itemsize
    times = case.micros * case.blocks
    for op, rank in (("send", (mine + 1) % ranks), ("recv", mine)):
        others = token * (length - case.tokens(rank))
        found["context", op] += times * ((case.attention_passes + 1) * others + token * length)
    forwards = case.micros * case.mixtures * case.block_passes
    if model.expert_capacity:
        chosen = b * length * model.experts_per_token * 4
        found["context", "allgather"] += forwards * chosen
    if model.balance:
        found["context", "allreduce"] += forwards * b * model.experts * 8
    return found


def experts(case: Case, sent: int, arrived: int) -> Ledger:
    """Rows to the experts and back, in both passes, and before that how many.

    sent, arrived: over the micro-batches and mixtures, the assignments that this rank sends, and
    those that its experts get.
    """
    found: Ledger = Counter()
    if case.size("expert") > 1:
        row = case.model.width * case.itemsize
        found["expert", "alltoall"] += (case.block_passes + 1) * (sent + arrived) * row
        counts = case.block_passes * case.micros * case.mixtures * case.model.experts
        found["expert", "alltoall"] += 8 * counts
    return found


def pipeline(case: Case) -> Ledger:
    """A message there and one back for each micro-batch and cut."""
    found: Ledger = Counter()
    if case.size("pipe") == 1:
        return found
    rows = case.share(case.n, "tensor") if case.layout.sequence else case.n
    message = rows * case.model.width * case.itemsize + 8 * (case.model.experts > 0)
    last = case.layout.pipe * case.layout.chunks - 1
    cuts = sum((stage > 0) + (stage < last) for stage in case.stages)
    found["pipe", "send"] = found["pipe", "recv"] = case.micros * cuts * message
    return found


def gradients(case: Case) -> Ledger:
    """Sums over the replicas, and what ZeRO moves in their place."""
    found: Ledger = Counter()
    for arena in case.arenas:
        if case.size(arena.group) == 1:
            continue
        size = arena.size * case.itemsize
        rows = arena.uses if case.train.deterministic else 1
        if arena.zero == 0:
            found[arena.group, "allreduce"] += rows * size
        else:
            times = 1 if arena.zero == 1 else case.micros
            found[arena.group, "reduce_scatter"] += times * rows * size
        if arena.zero in (1, 2):
            found[arena.group, "allgather"] += size
        if arena.zero == 3:  # for each layer that uses it, forward and backward
            found[arena.group, "allgather"] += 2 * case.micros * arena.uses * size
    return found


def ties(case: Case) -> Ledger:
    """The table's gradients of the first and of the last stage."""
    found: Ledger = Counter()
    if case.size("pipe") > 1:
        for arena in case.arenas:
            if arena.tied:
                found["tied", "allreduce"] += arena.part * case.itemsize
    return found


def norm(case: Case) -> Ledger:
    """A float64 sum of squares for each block of each shard of each parameter of the model."""
    found: Ledger = Counter()
    group = "world" if case.layout.zero else "model"
    if case.size(group) > 1:
        expert, tensor = case.layout.expert, case.layout.tensor
        sizes = {}
        for e, t in product(range(expert), range(tensor)):
            cut = _weights(case, {"expert": expert, "tensor": tensor}, e * tensor + t)
            uncut = _weights(case, {"expert": expert}, e)
            for name, weight in cut.items():
                place = (
                    e if weight.group == "expert_replicas" else 0,
                    t if weight.local != uncut[name].local else 0,
                )
                sizes[name, place] = weight.local, weight.whole
        blocks = sum(
            math.ceil(local / max(16, math.ceil(whole / 1024))) for local, whole in sizes.values()
        )
        found[group, "allreduce"] += 8 * blocks
    return found


def _weights(case: Case, sizes: dict[str, int], rank: int) -> dict[str, Weight]:
    """All parameters of the model, by name, on a rank of a layout of these sizes."""
    layout = ParallelSettings(data=1, **sizes)
    other = dataclasses.replace(case, layout=layout, rank=rank)
    layers = range(case.model.layers + 2)
    return {weight.name: weight for layer in layers for weight in other.weights(layer)}


def losses(case: Case) -> Ledger:
    """A float64 loss for each micro-batch of all ranks, and an auxiliary one."""
    found: Ledger = Counter()
    kinds = 2 if case.model.experts else 1
    nbytes = 8 * kinds * case.data_ranks * case.micros
    if case.size("replicas") > 1:
        found["replicas", "allreduce"] += case.heads_of_model * nbytes
    if case.size("pipe") > 1:
        found["pipe", "broadcast"] += nbytes
    return found


def verdict(case: Case) -> Ledger:
    """Whether the update may be applied: a 64-bit number, without notes beside it."""
    return Counter({("world", "allreduce"): 8 * (case.size("world") > 1)})
