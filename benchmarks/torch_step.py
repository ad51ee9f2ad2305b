"""Time training steps of a setting in PyTorch: the same model, optimizer and batches.

    python benchmarks/torch_step.py baby
    python benchmarks/torch_step.py baby --mode compiled --dtype bfloat16
    python benchmarks/torch_step.py baby --mode ddp

Prints a line of JSON for each step and one for all. The model is that of the oracle tests, written
as PyTorch is meant to be used: fused attention, fused AdamW, gradients set to none. The modes:

    eager         one process with all threads
    compiled      the same; model and loss through torch.compile
    compiled-all  the same; clipping and the optimizer, too
    ddp           a process a core, a thread each, with DistributedDataParallel over gloo
    ddp-compiled  both

With --weights it begins with the weights that `step.py --export` wrote, else with random ones.
"""

from __future__ import annotations

import argparse
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Any

from settings import OPTIMIZER, SEED, SETTINGS, Setting, token_stream
from step import tell
from turns import serve, timed_steps

if TYPE_CHECKING:
    from torch import Tensor, nn

ROOT = Path(__file__).resolve().parent.parent
MODES = ("eager", "compiled", "compiled-all", "ddp", "ddp-compiled")


def main() -> int:
    """Run from the command line; returns the exit code."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else None)
    parser.add_argument("setting", choices=SETTINGS)
    parser.add_argument("--mode", choices=MODES, default="eager")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--threads", type=int, default=0, help="in all; 0: as many as cores")
    parser.add_argument("--steps", type=int, default=5, help="steps that are timed")
    parser.add_argument("--warmup", type=int, default=2, help="steps before these")
    parser.add_argument("--weights", type=Path, help="initial weights, .npz")
    parser.add_argument("--connect", help=argparse.SUPPRESS)
    parser.add_argument("--rank", type=int, help=argparse.SUPPRESS)
    parser.add_argument("--meet", help=argparse.SUPPRESS)
    options = parser.parse_args()
    threads = options.threads or len(os.sched_getaffinity(0))
    ranks = threads if options.mode.startswith("ddp") else 1
    if ranks > 1 and options.rank is None:
        return start_ranks(ranks, threads)
    work(options, options.rank or 0, ranks, threads // ranks)
    return 0


def start_ranks(ranks: int, threads: int) -> int:
    """Start this program again, once for each rank; returns the exit code."""
    with tempfile.TemporaryDirectory() as folder:
        command = [sys.executable, *sys.argv, "--threads", str(threads)]
        meet = ["--meet", f"file://{folder}/meet"]
        running = [
            subprocess.Popen([*command, *meet, "--rank", str(rank)]) for rank in range(ranks)
        ]
        codes = [process.wait() for process in running]
    return max(map(abs, codes))


def work(options: argparse.Namespace, rank: int, ranks: int, threads: int) -> None:
    """One rank's part."""
    os.environ["OMP_NUM_THREADS"] = str(threads)
    # The compiler's own processes would stay, and count as memory.
    os.environ.setdefault("TORCHINDUCTOR_COMPILE_THREADS", "1")
    if ranks > 1:
        os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")

    import torch

    torch.set_num_threads(threads)
    if ranks > 1:
        torch.distributed.init_process_group(
            "gloo", init_method=options.meet, rank=rank, world_size=ranks
        )
    setting = SETTINGS[options.setting]
    training = Training(setting, options, rank, ranks)

    def run(steps: int) -> dict[str, Any]:
        training.prepare(steps)
        return timed_steps(training.step, steps, setting.tokens / ranks)

    if options.connect:
        serve(options.connect, rank, run)
    else:
        run(options.warmup)
        results: list[Any] = [run(options.steps)]
        if ranks > 1:
            results *= ranks
            torch.distributed.all_gather_object(results, results[rank])
        if rank == 0:
            tell(results, setting)
    if ranks > 1:
        torch.distributed.destroy_process_group()


class Training:
    """A model with its optimizer and its batches, on one rank."""

    def __init__(
        self, setting: Setting, options: argparse.Namespace, rank: int, ranks: int
    ) -> None:
        import torch
        from torch.nn.parallel import DistributedDataParallel

        from mpillm.data.loader import Loader

        if setting.batch % ranks:
            raise SystemExit(f"{setting.batch} sequences over {ranks} ranks; expected a divisor")
        self._batch, self._mine = setting.batch, setting.batch // ranks
        stream = token_stream(setting.vocabulary)
        self._loader = Loader(stream, setting.length, setting.batch, self._mine, SEED)
        self._rank, self._samples = rank, 0
        self._batches: list[tuple[Tensor, Tensor]] = []
        self._bfloat16 = options.dtype == "bfloat16"
        torch.manual_seed(SEED)
        module = model_with_loss(setting, options.weights)
        self._parameters = [p for p in module.parameters() if p.requires_grad]
        self._loss: Callable[..., Tensor] = module
        if ranks > 1:
            self._loss = DistributedDataParallel(module, gradient_as_bucket_view=True)
        if "compiled" in options.mode:
            self._loss = torch.compile(self._loss)
        s = OPTIMIZER
        groups = [
            {"params": [p for p in self._parameters if p.dim() >= 2], "weight_decay": s.decay},
            {"params": [p for p in self._parameters if p.dim() < 2], "weight_decay": 0.0},
        ]
        # The compiler fuses the optimizer itself.
        kind = {"foreach": True} if options.mode == "compiled-all" else {"fused": True}
        self._optimizer = torch.optim.AdamW(groups, lr=s.lr, betas=s.betas, eps=s.eps, **kind)
        self._update: Callable[[], None] = self._clip_and_update
        if options.mode == "compiled-all":
            self._update = torch.compile(self._clip_and_update)

    def prepare(self, steps: int) -> None:
        """Make the batches of the next steps: the loader's work is not timed."""
        import torch

        for _ in range(steps):
            batch = self._loader.micro_batch(self._samples, self._rank)
            pair = (torch.from_numpy(batch.tokens).long(), torch.from_numpy(batch.labels).long())
            self._batches.append(pair)
            self._samples += self._batch
        self._batches.reverse()

    def step(self) -> float:
        """One step; the loss."""
        import torch

        ids, labels = self._batches.pop()
        self._optimizer.zero_grad(set_to_none=True)
        with torch.autocast("cpu", torch.bfloat16, enabled=self._bfloat16):
            loss = self._loss(ids, labels)
        loss.backward()
        self._update()
        return loss.item()

    def _clip_and_update(self) -> None:
        import torch

        torch.nn.utils.clip_grad_norm_(self._parameters, OPTIMIZER.clip)
        self._optimizer.step()


def model_with_loss(setting: Setting, weights: Path | None) -> nn.Module:
    """A module from ids and labels (b, t) to the mean loss."""
    import numpy as np
    import torch
    from torch.nn.functional import cross_entropy

    # The model that the oracle tests compare with this package's.
    sys.path.insert(0, str(ROOT / "tests" / "oracle"))
    from gpt2_torch import GPT2, from_mpillm

    class Loss(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = GPT2(setting.model())

        def forward(self, ids: Tensor, labels: Tensor) -> Tensor:
            return cross_entropy(self.model(ids).flatten(0, 1), labels.flatten())

    module = Loss()
    if weights is not None:
        with np.load(weights) as arrays:
            state = from_mpillm(arrays, setting.layers, setting.width)
        module.model.load_state_dict(state)
    else:
        for parameter in module.parameters():
            if parameter.dim() == 2:
                torch.nn.init.normal_(parameter, std=0.02)
    return module


if __name__ == "__main__":
    sys.exit(main())
