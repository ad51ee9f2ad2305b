"""Continue a prompt with a trained model."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

import mpillm
from mpillm.cli.parser import Parser, integer, number
from mpillm.parallel.launch import start

__all__ = ["run"]

_SEPARATOR = "-" * 80


def run(arguments: Sequence[str]) -> int:
    """`mpillm generate RUN --prompt TEXT ...`; rank 0 prints the samples."""
    options = vars(_parser().parse(arguments))
    world = start()
    samples = mpillm.generate(options.pop("run"), comm=world, **options)
    if world.rank == 0:
        print(f"\n{_SEPARATOR}\n".join(samples), flush=True)
    return 0


def _parser() -> Parser:
    """The command's options: the arguments of `mpillm.generate`, which checks their values."""
    parser = Parser("generate", __doc__)
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
