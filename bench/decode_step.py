"""One decode step of a model with all KV on the device, Pie against DynamicCache and SDPA.

One process, the same weights and tokens; steps of the two in turn, each going first every other
time. Prints the median of the pairs' ratios, Pie over transformers, with a bootstrap interval, for
one sequence (to reach: 1) and for a batch of eight (to reach: 1 / 1.5), and fails where one is not.

    python bench/decode_step.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import argparse
import random
import statistics
import time
from typing import Any

import torch

from pie import _core
from pie.cache import roomy_bytes
from pie.hf.generation import cache_argument

WARM_UP = 5  # pairs


class Side:
    """One way of decoding: an attention, a cache, the times of its steps."""

    def __init__(self, model: Any, attention: str, cache: Any) -> None:
        self.model, self.attention, self.cache = model, attention, cache
        self.seconds: list[float] = []

    def fill(self, layers: list[tuple[torch.Tensor, torch.Tensor]], query: torch.Tensor) -> None:
        """Stores K and V of a prompt, `[batch, heads, tokens, head_dim]` for each layer."""
        for layer, (k, v) in enumerate(layers):
            self.cache.update(k, v, layer)
            if self.attention == "pie":
                self.cache.attend(layer, query, k, v, None, None)

    def step(self, token: int, batch: int) -> None:
        """Gives every sequence a token and notes how long that took."""
        self.model.set_attn_implementation(self.attention)
        ids = torch.full((batch, 1), token)
        began = time.perf_counter()
        self.model(ids, **cache_argument(self.model, self.cache), use_cache=True, logits_to_keep=1)
        self.seconds.append(time.perf_counter() - began)


def interval(ratios: list[float]) -> tuple[float, float]:
    """95 % bootstrap interval of the median."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return medians[50], medians[-51]


def prompt(model: Any, batch: int, tokens: int) -> tuple[list[Any], torch.Tensor]:
    """(random K and V of every layer, a query), of the shapes that the model has."""
    from pie.hf.cache import geometry

    layers, kv_heads, head_dim = geometry(model.config)
    shape = (batch, kv_heads, tokens, head_dim)
    kv = [tuple(torch.randn(shape).to(model.dtype) for _ in "kv") for _ in range(layers)]
    query = torch.randn(batch, model.config.num_attention_heads, tokens, head_dim)
    return kv, query.to(model.dtype)


def compare(model: Any, batch: int, tokens: int, pairs: int, most: float) -> bool:
    """Prints how the two compare; whether the median ratio is at most `most`."""
    from transformers import DynamicCache

    from pie.hf import TieredCache
    from pie.hf.cache import geometry

    budget = roomy_bytes(*geometry(model.config), model.dtype, [tokens + pairs + 10] * batch)
    options: dict[str, Any] = {"device_bytes": budget, "pool_bytes": None, "policy": "off"}
    model.set_attn_implementation("pie")
    ours = Side(model, "pie", TieredCache(model.config, model.dtype, **options))
    theirs = Side(model, "sdpa", DynamicCache(config=model.config))
    with torch.inference_mode():
        stored = prompt(model, batch, tokens)
        for side in (ours, theirs):
            side.fill(*stored)
        for pair in range(pairs + WARM_UP):
            for side in (ours, theirs) if pair % 2 else (theirs, ours):
                side.step(101 + pair, batch)
    pairwise = zip(ours.seconds[WARM_UP:], theirs.seconds[WARM_UP:], strict=True)
    ratios = [a / b for a, b in pairwise]
    ratio, (low, high) = statistics.median(ratios), interval(ratios)
    print(f"{batch} x {tokens} tokens, {len(ratios)} pairs")
    for name, side in (("pie", ours), ("DynamicCache, sdpa", theirs)):
        print(f"  {name:<20} {statistics.median(side.seconds[WARM_UP:]) * 1e3:7.2f} ms a step")
    verdict = "reached" if ratio <= most else "NOT REACHED"
    print(
        f"  ratio {ratio:.3f} (95 %: {low:.3f} to {high:.3f}), {1 / ratio:.2f}x as fast; ", end=""
    )
    print(f"to reach: {most:.3f}: {verdict}")
    ours.cache.close()
    return ratio <= most


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--tokens", type=int, default=1024, help="in the cache when it starts")
    parser.add_argument("--pairs", type=int, default=90)
    arguments = parser.parse_args()
    from pie.hf import load

    model, _ = load(arguments.model, arguments.dtype)
    print(f"{arguments.dtype}, {torch.get_num_threads()} threads, {_core.attention_isa()}")
    ok = compare(model, 1, arguments.tokens, arguments.pairs, 1.0)
    ok &= compare(model, 8, arguments.tokens, arguments.pairs, 1 / 1.5)
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
