"""A mixture of experts in place of a block's feed-forward part.

Shazeer et al. 2017; Lepikhin et al. 2020, "GShard"; Fedus et al. 2021, "Switch Transformers"; Jiang
et al. 2024, "Mixtral of Experts". The experts are dealt out over the expert group, and the inner
width of each is cut over the tensor group. The ranks of the expert group have different sequences:
a token's row travels to the ranks of its experts, and what they make of it back.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from mpillm.nn.dispatch import Dispatch
from mpillm.nn.dropout import Dropout
from mpillm.nn.layer import Arrays, Build, GradientSink, Layer, Micro
from mpillm.nn.param import Init, Param
from mpillm.nn.router import Mixture, Router
from mpillm.parallel.shard import Shard, split_range

if TYPE_CHECKING:
    from mpillm.array.backend import Array
    from mpillm.parallel.group import Group

__all__ = ["Experts", "MixtureOfExperts"]


class MixtureOfExperts(Layer):
    """y = dropout(sum over a token's experts of gate * expert(x)), each expert W2 gelu(W1 x).

    Takes this rank's rows of x, (b, t, d) or (rows, d), see `mpillm.nn.rows`; gives these of y, and
    this rank's share of the balance loss, see `Router.forward`.
    """

    def __init__(
        self,
        build: Build,
        name: str,
        width: int,
        inner: int,
        mixture: Mixture,
        *,
        bias: bool,
        std: float,
        out_std: float,
        drop: float,
    ) -> None:
        self._backend = build.backend
        self._rows = build.rows
        self._tensor = build.mesh.tensor
        self._group = build.mesh.expert
        self._count = mixture.experts
        self.router = Router(build, f"{name}.router", width, mixture, std)
        self.experts = Experts(
            build, name, mixture.experts, width, inner, bias=bias, std=std, out_std=out_std
        )
        self._dropout = Dropout(build, f"{name}.down", drop)

    def forward(self, inputs: Arrays, micro: Micro) -> tuple[Arrays, Any]:
        """x -> (y, balance loss)."""
        ops = self._backend.ops
        x = self._rows.gather(inputs[0], *micro.shape)
        x_nd = x.reshape(-1, x.shape[-1])
        routing = self.router.forward(x_nd, micro)
        dispatch = Dispatch(routing, self._count, self._group, self._backend)
        tokens_m = dispatch.order_m // routing.chosen_nk.shape[1]
        rows_ad = dispatch.to_experts(x_nd[tokens_m])
        rows_ad, saved_experts = self.experts.forward(rows_ad, dispatch.runs)
        rows_md = dispatch.to_tokens(rows_ad)
        y_nd = ops.combine_forward(rows_md, dispatch.slots_nk, routing.weights_nk)
        y = self._rows.sum(y_nd.reshape(x.shape))
        (y,), saved_dropout = self._dropout.forward((y,), micro)
        if not micro.training:
            return (y, routing.loss), None
        return (y, routing.loss), (routing, dispatch, saved_experts, rows_md, saved_dropout)

    def backward(self, d_outputs: Arrays, saved: Any, micro: Micro) -> Arrays:
        """(dy, derivative by the balance loss) -> dx."""
        routing, dispatch, saved_experts, rows_md, saved_dropout = saved
        ops, sink = self._backend.ops, micro.gradients
        (dy,) = self._dropout.backward(d_outputs[:1], saved_dropout, micro)
        dy = self._rows.gather(dy, *micro.shape)
        dy_nd = dy.reshape(-1, dy.shape[-1])
        d_rows_md, d_weights_nk = ops.combine_backward(
            dy_nd, rows_md, dispatch.order_m, dispatch.slots_nk, routing.weights_nk
        )
        d_rows_ad = dispatch.to_experts(d_rows_md)
        d_rows_ad = self.experts.backward(d_rows_ad, saved_experts, dispatch.runs, sink)
        d_rows_md = dispatch.to_tokens(d_rows_ad)
        dx_nd = ops.combine_forward(d_rows_md, dispatch.slots_nk, routing.keep_nk)
        dx = self._rows.sum(dx_nd.reshape(dy.shape))
        # A tensor rank has only its part of what the experts gave. The router's part of dx is the
        # same on all of them, and added after the sum.
        self._tensor.allreduce(d_weights_nk)
        d_routed_nd = self.router.backward(d_weights_nk, d_outputs[1], routing, micro)
        dx += self._rows.take(d_routed_nd.reshape(dy.shape))
        return (dx,)


class Experts:
    """The experts of this expert rank, as far as this tensor rank has them.

    Weights are stacked: a parameter holds one matrix for each expert. A rank may have no expert, an
    expert no token, and a tensor rank no part of the inner width.
    """

    def __init__(
        self,
        build: Build,
        name: str,
        experts: int,
        width: int,
        inner: int,
        *,
        bias: bool,
        std: float,
        out_std: float,
    ) -> None:
        mesh = build.mesh
        self._backend = build.backend
        expert, tensor = mesh.expert, mesh.tensor

        def add(part: str, shape: tuple[int, ...], cut: int | None, init: Init) -> Param:
            cuts = {0: expert} if cut is None else {0: expert, cut: tensor}
            return build.store.add(
                f"{name}.{part}",
                _shard(shape, cuts),
                init,
                reduce_over=(mesh.expert_replicas,),
                decay=part.endswith("weight"),
                owner=cut is not None or tensor.rank == 0,
            )

        self.up = add("up.weight", (experts, inner, width), 1, Init("normal", std))
        self.down = add("down.weight", (experts, width, inner), 2, Init("normal", out_std))
        self.up_bias = self.down_bias = None
        if bias:
            self.up_bias = add("up.bias", (experts, inner), 1, Init("zeros"))
            self.down_bias = add("down.bias", (experts, width), None, Init("zeros"))
        # What the tensor ranks give is summed, so that one of them adds the bias.
        self._added_bias = self.down_bias if tensor.rank == 0 else None

    def forward(self, rows_ad: Array, runs: list[slice]) -> tuple[Array, Any]:
        """This tensor rank's part of what each expert makes of its run of the rows, (a, d)."""
        ops, up, down = self._backend.ops, self.up.value, self.down.value
        hidden_af = self._backend.empty((rows_ad.shape[0], up.shape[1]), rows_ad.dtype)
        out_ad = self._backend.empty(rows_ad.shape, rows_ad.dtype)
        for expert, run in _busy(runs):
            ops.matmul(rows_ad[run], up[expert].T, out=hidden_af[run])
            if self.up_bias is not None:
                hidden_af[run] += self.up_bias.value[expert]
        hidden_af, saved_gelu = ops.gelu_forward(hidden_af)
        for expert, run in _busy(runs):
            ops.matmul(hidden_af[run], down[expert].T, out=out_ad[run])
            if self._added_bias is not None:
                out_ad[run] += self._added_bias.value[expert]
        return out_ad, (rows_ad, hidden_af, saved_gelu)

    def backward(self, d_out_ad: Array, saved: Any, runs: list[slice], sink: GradientSink) -> Array:
        """Derivatives by the rows, (a, d), of which a tensor rank's are a part, too."""
        rows_ad, hidden_af, saved_gelu = saved
        ops, up, down = self._backend.ops, self.up, self.down
        d_hidden_af = self._backend.empty(hidden_af.shape, hidden_af.dtype)
        d_rows_ad = self._backend.empty(rows_ad.shape, rows_ad.dtype)
        for expert, run in _busy(runs):
            ops.matmul(d_out_ad[run], down.value[expert], out=d_hidden_af[run])
        d_hidden_af = ops.gelu_backward(d_hidden_af, saved_gelu)
        for expert, run in _busy(runs):
            ops.matmul(d_hidden_af[run], up.value[expert], out=d_rows_ad[run])
        up_bias, down_bias = self.up_bias, self.down_bias

        def add_gradients() -> None:
            for expert, run in _busy(runs):
                d_out, d_hidden = d_out_ad[run], d_hidden_af[run]
                ops.matmul(d_hidden.T, rows_ad[run], out=up.grad[expert], accumulate=True)
                ops.matmul(d_out.T, hidden_af[run], out=down.grad[expert], accumulate=True)
                if up_bias is not None and down_bias is not None:
                    ops.sum_rows(d_hidden, up_bias.grad[expert])
                    ops.sum_rows(d_out, down_bias.grad[expert])

        params = (up, down, up_bias, down_bias)
        sink.add(tuple(param for param in params if param is not None), add_gradients)
        return d_rows_ad


def _shard(shape: tuple[int, ...], cuts: dict[int, Group]) -> Shard:
    """This rank's part of an array whose axes `cuts` are cut over groups."""
    bounds = [
        split_range(size, cuts[axis].size, cuts[axis].rank) if axis in cuts else (0, size)
        for axis, size in enumerate(shape)
    ]
    return Shard(shape, tuple(a for a, _ in bounds), tuple(b for _, b in bounds))


def _busy(runs: list[slice]) -> list[tuple[int, slice]]:
    """The experts that have rows, with these."""
    return [(expert, run) for expert, run in enumerate(runs) if run.start < run.stop]
