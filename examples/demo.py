"""One generation twice: with all of its KV on the device, then with room for a quarter of it.

The same model, prompt and greedy choice; the second time three quarters of the KV lie in a file and
are read while the layers before them compute. Prints what each run took, and fails where their
tokens differ.

    python examples/demo.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import argparse
import os
import time
from dataclasses import dataclass

from pie.sizes import format_size

PLACES = ["the harbour", "the mill", "the north gate", "the observatory", "the glass works"]
EVENTS = [
    "a barrel of lamp oil was delivered",
    "the keeper counted the passing ships",
    "two visitors asked for the road to town",
    "the bell rang a quarter hour late",
    "rain came through the roof again",
    "the clerk copied last year's accounts",
    "somebody had moved the ladder",
]


@dataclass
class Run:
    """What one generation gave and took."""

    title: str
    tokens: list[int]
    prompt_s: float
    decode_s: float
    stats: dict


def prompt_of(tokenizer, length: int) -> list[int]:
    """About `length` tokens of a town's diary, and the beginning of an answer."""
    text = "The diary of a small town.\n\n"
    day = 1
    while len(tokenizer(text).input_ids) < length:
        place, event = PLACES[day % len(PLACES)], EVENTS[day % len(EVENTS)]
        text += f"Day {day}. At {place}, {event}; {day * 37 % 90 + 10} people saw it.\n"
        day += 1
    return tokenizer(text + "\nA summary of the diary, for the mayor:\n\n").input_ids


def generate(title: str, model, prompt: list[int], new_tokens: int, **options) -> Run:
    from pie.hf import TieredCache
    from pie.hf.generation import stream

    with TieredCache(model.config, model.dtype, **options) as cache:
        began = time.perf_counter()
        tokens, times = [], []
        for token in stream(model, prompt, cache, new_tokens):
            tokens.append(token)
            times.append(time.perf_counter())
        cache.check()
        stats = cache.stats()
    return Run(title, tokens, times[0] - began, times[-1] - times[0], stats)


def report(runs: list[Run], prompt_tokens: int) -> None:
    rows = {
        "": [run.title for run in runs],
        "prompt, tokens/s": [f"{prompt_tokens / run.prompt_s:.0f}" for run in runs],
        "decode, tokens/s": [f"{(len(run.tokens) - 1) / run.decode_s:.1f}" for run in runs],
        "prompt, slower by": [f"{1 - runs[0].prompt_s / run.prompt_s:.0%}" for run in runs],
        "decode, slower by": [f"{1 - runs[0].decode_s / run.decode_s:.0%}" for run in runs],
        "decode, stalled": [
            f"{run.stats['decode_stall_ns'] / 1e9 / run.decode_s:.1%}" for run in runs
        ],
        "device at peak": [format_size(run.stats["device_bytes_peak"]) for run in runs],
        "pool at peak": [format_size(run.stats["pool_bytes_peak"]) for run in runs],
        "streamed": [format_size(run.stats["streamed_bytes"]) for run in runs],
        "pool reached by": [run.stats["pool_io"] for run in runs],
    }
    for name, cells in rows.items():
        print(f"{name:<18}" + "".join(f"{cell:>22}" for cell in cells))


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True)
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--prompt-tokens", type=int, default=1500)
    parser.add_argument("--new-tokens", type=int, default=96)
    arguments = parser.parse_args()
    os.environ.setdefault("TQDM_DISABLE", "1")  # the loaders' progress bars

    print(f"Loading {arguments.model} ...", flush=True)
    from pie.cache import kv_bytes, roomy_bytes
    from pie.hf import load
    from pie.hf.cache import geometry

    model, tokenizer = load(arguments.model, arguments.dtype)
    prompt = prompt_of(tokenizer, arguments.prompt_tokens)
    new = arguments.new_tokens
    shape = (*geometry(model.config), model.dtype)
    needed = kv_bytes(*shape, len(prompt) + new)
    print(f"{len(prompt)} tokens of prompt and {new} new ones need {format_size(needed)} of KV.\n")
    runs = [
        generate(
            "all on the device",
            model,
            prompt,
            new,
            device_bytes=roomy_bytes(*shape, [len(prompt) + new]),
            pool_bytes=None,
            policy="off",
        ),
        generate("a quarter of it", model, prompt, new, device_bytes=needed // 4),
    ]
    print(tokenizer.decode(runs[0].tokens, skip_special_tokens=True).strip(), "\n")
    report(runs, len(prompt))
    equal = runs[0].tokens == runs[1].tokens
    print(f"\nThe {len(runs[0].tokens)} tokens are {'equal' if equal else 'NOT EQUAL'}.")
    return 0 if equal else 1


if __name__ == "__main__":
    raise SystemExit(main())
