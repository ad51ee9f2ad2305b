"""The end of the demo: what the trained network is worth, what it writes, and where everything is.

    python jobs/demo.py runs/kjv

Compares the run's validation loss with that of a trigram model of the same text on the same split.
Exit code 1 when the network is not the better one.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import mpillm
from mpillm.data.ngram import trigram_loss
from mpillm.data.tokens import TokenFile

PROMPT = "And the LORD said"


def validation_loss(run: Path) -> float:
    """The last validation loss of a run, nats a character."""
    with (run / "metrics.jsonl").open() as file:
        losses = [step["val_loss"] for step in map(json.loads, file) if "val_loss" in step]
    return float(losses[-1])


def main(run: Path) -> int:
    """Compare, generate, say where everything is."""
    tokens = TokenFile(run / "tokens.h5")
    train, validation = tokens.read("train"), tokens.read("validation")
    network = validation_loss(run)
    trigram = trigram_loss(train, validation, tokens.vocabulary_size)
    print(f"\nvalidation loss over {len(validation) - 1:,} characters, nats a character")
    print(f"  trigram model   {trigram:.4f}\n  network         {network:.4f}")

    print(f"\nthe network goes on from {PROMPT!r}:\n", flush=True)
    print(mpillm.generate(run, prompt=PROMPT, max_new_tokens=300, temperature=0.5, seed=1)[0])

    places = {
        "config.toml": "every setting of the run",
        "metrics.jsonl": "loss, speed and more of every step",
        "loss.png": "the loss curve",
        "log.txt": "what was printed",
        "checkpoints": "the weights: mpillm checkpoint inspect " + str(run),
    }
    print("\nwhere everything is")
    for name, text in places.items():
        if (run / name).exists():
            print(f"  {run / name!s:<28}{text}")
    if network >= trigram:
        print("\nthe network is no better than the trigram model")
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
