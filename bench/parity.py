"""Tokens of Pie against those of transformers' own DynamicCache: greedy, f32, every one compared.

One prompt, and four of different lengths in one left-padded batch; through the gathering cache and
through the attention "pie"; a quarter of the KV on the device. Fails on any difference.

    python bench/parity.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import argparse
import time
from typing import Any

import torch

from pie.cache import kv_bytes
from pie.hf.generation import cache_argument
from pie.sizes import format_size

BATCH_SHARES = (1.0, 0.7, 0.4, 0.15)  # lengths of the batch's prompts, of the longest


def prompt_ids(tokenizer: Any, tokens: int) -> list[int]:
    """`tokens` tokens of a text whose lines all differ."""
    lines = [f"Entry {n}: {n * n % 97} crates for dock {n % 7}." for n in range(tokens)]
    ids: list[int] = tokenizer("\n".join(lines)).input_ids[:tokens]
    return ids


def left_padded(prompts: list[list[int]], pad: int) -> dict[str, torch.Tensor]:
    longest = max(map(len, prompts))
    rows = [[pad] * (longest - len(prompt)) + prompt for prompt in prompts]
    mask = [[0] * (longest - len(prompt)) + [1] * len(prompt) for prompt in prompts]
    return {"input_ids": torch.tensor(rows), "attention_mask": torch.tensor(mask)}


def generate(model: Any, inputs: dict[str, torch.Tensor], new: int, cache: Any) -> torch.Tensor:
    output: torch.Tensor = model.generate(
        **inputs,
        **cache_argument(model, cache),
        max_new_tokens=new,
        min_new_tokens=new,
        do_sample=False,
    )
    return output[:, inputs["input_ids"].shape[1] :]


def compare(model: Any, prompts: list[list[int]], new: int) -> bool:
    """Prints a row for each way; returns whether all gave the same tokens."""
    from transformers import DynamicCache

    from pie.hf import TieredCache
    from pie.hf.cache import geometry

    inputs = left_padded(prompts, model.config.pad_token_id or 0)
    padded = inputs["input_ids"].numel() + len(prompts) * new
    real = sum(map(len, prompts)) + len(prompts) * new
    reference, equal = None, True
    for attention, pie_cache in (("sdpa", 0), ("eager", 0), ("sdpa", 1), ("pie", 1)):
        model.set_attn_implementation(attention)
        cache: Any = DynamicCache(config=model.config)
        stored = real if attention == "pie" else padded  # gathering stores padding too
        budget = kv_bytes(*geometry(model.config), model.dtype, stored) // 4
        if pie_cache:
            cache = TieredCache(model.config, model.dtype, device_bytes=budget)
        began = time.perf_counter()
        tokens = generate(model, inputs, new, cache)
        seconds = time.perf_counter() - began
        reference = tokens if reference is None else reference
        different = int((tokens != reference).sum())
        equal = equal and different == 0
        name = f"{type(cache).__name__}, {attention}"
        row = f"{len(prompts)} x {max(map(len, prompts))}  {name:<20} {seconds:6.1f} s  "
        row += f"{tokens.numel()} tokens, {different} different"
        if pie_cache:
            stats = cache.stats()
            row += f"; device {format_size(stats.device_bytes_peak)} of {format_size(budget)}, "
            row += f"pool {format_size(stats.pool_bytes_peak)}, "
            row += f"{format_size(stats.streamed_bytes)} streamed"
            cache.close()
        print(row, flush=True)
    return equal


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--new-tokens", type=int, default=256)
    arguments = parser.parse_args()
    from pie.hf import load

    model, tokenizer = load(arguments.model, "f32")
    longest = prompt_ids(tokenizer, arguments.prompt_tokens)
    lengths = [round(share * len(longest)) for share in BATCH_SHARES]
    ok = compare(model, [longest], arguments.new_tokens)
    ok &= compare(model, [longest[-length:] for length in lengths], arguments.new_tokens)
    print("every token is the same" if ok else "TOKENS DIFFER")
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
