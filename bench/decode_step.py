"""Time of a decode step with all KV on the device: Pie's attention against DynamicCache and SDPA.

One process, one sequence, the same weights and tokens; steps of the two in turn, each going first
every other time. Prints the median of the pairs' ratios, Pie over transformers, with a bootstrap
interval, and fails where the median is above 1.

    python bench/decode_step.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import argparse
import random
import statistics
import time
from typing import Any

import torch

from pie.cache import roomy_bytes


class Side:
    """One way of decoding: an attention, a cache, the times of its steps."""

    def __init__(self, model: Any, attention: str, cache: Any) -> None:
        self.model, self.attention, self.cache = model, attention, cache
        self.seconds: list[float] = []

    def forward(self, tokens: list[int]) -> float:
        """Seconds of one forward pass."""
        self.model.set_attn_implementation(self.attention)
        ids = torch.tensor([tokens])
        began = time.perf_counter()
        self.model(ids, past_key_values=self.cache, use_cache=True, logits_to_keep=1)
        return time.perf_counter() - began


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[-51]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--tokens", type=int, default=1024, help="in the cache when it starts")
    parser.add_argument("--pairs", type=int, default=90)
    arguments = parser.parse_args()
    from transformers import DynamicCache

    from pie.hf import TieredCache, load
    from pie.hf.cache import geometry

    model, _ = load(arguments.model, arguments.dtype)
    lengths = [arguments.tokens + arguments.pairs + 10]
    budget = roomy_bytes(*geometry(model.config), model.dtype, lengths)
    options: dict[str, Any] = {"device_bytes": budget, "pool_bytes": None, "policy": "off"}
    ours = Side(model, "pie", TieredCache(model.config, model.dtype, **options))
    theirs = Side(model, "sdpa", DynamicCache(config=model.config))
    with torch.inference_mode():
        prompt = [(7919 * n + 11) % model.config.vocab_size for n in range(arguments.tokens)]
        for side in (ours, theirs):
            side.forward(prompt)
        for pair in range(arguments.pairs + 5):  # the first ones warm up
            for side in (ours, theirs) if pair % 2 else (theirs, ours):
                side.seconds.append(side.forward([101 + pair]))
    ratios = [a / b for a, b in zip(ours.seconds[5:], theirs.seconds[5:], strict=True)]
    ratio, (low, high) = statistics.median(ratios), interval(ratios)
    print(f"{arguments.dtype}, 1 sequence at {arguments.tokens} tokens, {len(ratios)} pairs")
    print(f"{torch.get_num_threads()} threads, {ours.cache.stats().attention_isa}")
    for name, side in (("pie", ours), ("DynamicCache, sdpa", theirs)):
        print(f"{name:<20} {statistics.median(side.seconds[5:]) * 1e3:7.2f} ms a step (median)")
    print(f"ratio {ratio:.3f} (95 %: {low:.3f} to {high:.3f}); to reach: at most 1")
    return 0 if ratio <= 1 else 1


if __name__ == "__main__":
    raise SystemExit(main())
