"""Continue a prompt with a trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import mpillm
from mpillm.cli.parser import Parser, integer, number
from mpillm.config import describe, load
from mpillm.inference.settings import GenerateConfig
from mpillm.parallel.launch import start

__all__ = ["run"]

_SEPARATOR = "-" * 80


def run(arguments: Sequence[str]) -> int:
    """`mpillm generate RUN --prompt TEXT [--parallel.key=value ...] ...`; rank 0 prints."""
    known, overrides = _parser().parse_with_settings(arguments, GenerateConfig)
    options = vars(known)
    parallel = load(GenerateConfig, None, overrides).parallel if overrides else None
    world = start()
    samples = mpillm.generate(options.pop("run"), parallel=parallel, comm=world, **options)
    if world.rank == 0:
        print(f"\n{_SEPARATOR}\n".join(samples), flush=True)
    return 0


def _parser() -> Parser:
    """The command's options: the arguments of `mpillm.generate`, which checks their values."""
    parser = Parser(
        "generate",
        __doc__,
        usage="mpillm generate RUN --prompt TEXT [--option ...] [--parallel.key=value ...]",
        epilog="Settings of the layout. Without any, all ranks share each layer's products, as "
        "with tensor = ranks.\nThe schedule, overlap and zero 1 and 2 are for training alone and "
        f"change nothing here.\n\n{describe(GenerateConfig)}\n",
    )
    parser.add_argument("run", metavar="RUN", type=Path, help="the run folder")
    parser.add_argument("--prompt", metavar="TEXT", required=True, help="the text to continue")

    def add(name: str, kind: Callable[[str], float], default: float, text: str) -> None:
        text = f"{text} (default: {default})"
        parser.add_argument(name, type=kind, default=default, metavar="N", help=text)

    add("--max-new-tokens", integer, 200, "tokens to generate")
    add("--temperature", number, 1.0, "divides the logits before sampling")
    add("--top-k", integer, 0, "sample from the k likeliest tokens; 0: from all")
    add("--top-p", number, 1.0, "sample from the likeliest tokens of this probability together")
    add("--num-samples", integer, 1, "texts to generate")
    add("--seed", integer, 0, "of the random numbers")
    parser.add_argument(
        "--greedy", action="store_true", help="always take the likeliest token: no randomness"
    )
    return parser
