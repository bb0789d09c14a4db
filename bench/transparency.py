"""What streaming costs a decode step, and how much of that is the disk's alone.

Three arms in turn, in one process and at the same length: all KV on the device; the same beside
another process that reads as many bytes a second directly (bench/paced_read.cpp: io_uring, Pie's
request size and depth, huge pages, paced; the cheapest reader there is); most of the KV streamed by
Pie. Each turn is one step to settle and a few that count. Prints for 1 and 8 sequences, with a half
and a quarter of the KV on the device, the medians of the rounds' ratios with bootstrap intervals:

    third / second   what Pie adds to what the disk costs anyway; to reach: 1.05
    third / first    what a user sees

and the processor's time that the machine below took away (steal) in each arm.

    python bench/transparency.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf --rounds 90
"""

import argparse
import random
import statistics
import subprocess
import time
from pathlib import Path
from types import TracebackType
from typing import Any

import torch

from pie import _core
from pie.cache import kv_bytes, roomy_bytes
from pie.hf import TieredCache
from pie.hf.cache import geometry
from pie.hf.generation import cache_argument
from pie.sizes import format_size

READER = Path("build/release/bench/paced_read")
READER_BYTES = 1 << 30
SETTLE, COUNT = 1, 2  # steps of a turn
TO_REACH = 1.05


class Reader:
    """The other process."""

    def __init__(self, directory: str) -> None:
        command = [str(READER), directory, str(READER_BYTES)]
        self._process = subprocess.Popen(
            command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True
        )
        if self._answer() != "ready":
            raise RuntimeError(f"{READER} did not start")

    def read(self, bytes_per_s: float) -> int:
        """Reads at this rate from now on; returns the bytes read at the one before."""
        assert self._process.stdin is not None
        self._process.stdin.write(f"{bytes_per_s}\n")
        self._process.stdin.flush()
        return int(self._answer())

    def _answer(self) -> str:
        assert self._process.stdout is not None
        return self._process.stdout.readline().strip()

    def __enter__(self) -> "Reader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._process.communicate()


class Arm:
    """A cache, and the steps that were made with it."""

    def __init__(self, name: str, model: Any, cache: TieredCache) -> None:
        self.name, self.model, self.cache = name, model, cache
        self.rounds: list[float] = []  # seconds of a step, by round
        self.steal: list[float] = []

    def step(self, ids: torch.Tensor) -> float:
        """Gives every sequence a token and takes it back; returns how long the first took."""
        began = time.perf_counter()
        options = {"use_cache": True, "logits_to_keep": 1}
        self.model(ids, **cache_argument(self.model, self.cache), **options)
        seconds = time.perf_counter() - began
        self.cache.crop(-1)
        return seconds

    def turn(self, ids: torch.Tensor) -> None:
        for _ in range(SETTLE):
            self.step(ids)
        before = stolen()
        self.rounds.append(statistics.median(self.step(ids) for _ in range(COUNT)))
        self.steal.append(stolen(before))


def stolen(before: list[int] | None = None) -> Any:
    """Ticks of all processors, total and stolen; since `before`, the share that was stolen."""
    fields = [int(x) for x in Path("/proc/stat").read_text().splitlines()[0].split()[1:9]]
    now = [sum(fields), fields[7]]
    if before is None:
        return now
    return (now[1] - before[1]) / max(1, now[0] - before[0])


def interval(ratios: list[float]) -> str:
    """The median, and the 95 % bootstrap interval of it."""
    draw = random.Random(0)
    medians = sorted(statistics.median(draw.choices(ratios, k=len(ratios))) for _ in range(2000))
    return f"{statistics.median(ratios):.3f} (95 %: {medians[50]:.3f} to {medians[-51]:.3f})"


def fill(cache: TieredCache, model: Any, batch: int, tokens: int) -> None:
    """Stores random K and V, in chunks that a small device holds."""
    layers, kv_heads, head_dim = geometry(model.config)
    heads = model.config.num_attention_heads
    for begin in range(0, tokens, 128):
        new = min(128, tokens - begin)
        query = torch.zeros(batch, heads, new, head_dim, dtype=model.dtype)
        for layer in range(layers):
            k, v = torch.randn(2, batch, kv_heads, new, head_dim).to(model.dtype)
            cache.update(k, v, layer)
            cache.attend(layer, query, k, v, None, None)


def compare(model: Any, batch: int, tokens: int, share: float, rounds: int, place: str) -> bool:
    shape = (*geometry(model.config), model.dtype)
    needed = kv_bytes(*shape, (tokens + 1) * batch)
    roomy = {"device_bytes": roomy_bytes(*shape, [tokens + 1] * batch), "pool_bytes": None}
    tight = {"device_bytes": int(needed * share), "pool_bytes": needed + (64 << 20)}
    ids = torch.full((batch, 1), 101)
    with (
        TieredCache(model.config, model.dtype, **roomy, policy="off") as whole,
        TieredCache(model.config, model.dtype, **tight, pool_dir=place) as part,
        Reader(place) as reader,
    ):
        arms = [
            Arm("on the device", model, whole),
            Arm("beside plain reads", model, whole),
            Arm("streamed", model, part),
        ]
        for cache in (whole, part):
            fill(cache, model, batch, tokens)
        for _ in range(4):
            arms[2].step(ids)
        before, began = part.stats(), time.perf_counter()
        for _ in range(4):
            arms[2].step(ids)
        seconds, after = time.perf_counter() - began, part.stats()
        rate = (after.streamed_bytes - before.streamed_bytes) / seconds
        read = 0.0
        for number in range(rounds):
            for arm in arms if number % 2 else reversed(arms):
                if arm is arms[1]:
                    reader.read(rate)
                    began = time.perf_counter()
                arm.turn(ids)
                if arm is arms[1]:
                    read += reader.read(0) / (time.perf_counter() - began) / rounds
        end = part.stats()
    stall = (end.decode_stall_ns - after.decode_stall_ns) / (end.decode_ns - after.decode_ns)
    print(
        f"\n{batch} x {tokens} tokens, {share:.0%} of {format_size(needed)} on the device: "
        f"{rate / 1e9:.2f} GB/s streamed, {read / 1e9:.2f} read beside, stalled {stall:.1%}, "
        f"{rounds} rounds"
    )
    for arm in arms:
        ms = statistics.median(arm.rounds) * 1e3
        print(f"  {arm.name:<20} {ms:8.2f} ms a step, steal {statistics.mean(arm.steal):.1%}")
    first, second, third = (arm.rounds for arm in arms)
    ours = [a / b for a, b in zip(third, second, strict=True)]
    seen = [a / b for a, b in zip(third, first, strict=True)]
    reached = statistics.median(ours) <= TO_REACH
    verdict = "reached" if reached else "NOT REACHED"
    print(f"  third / second {interval(ours)}; to reach: {TO_REACH}: {verdict}")
    print(f"  third / first  {interval(seen)}")
    return reached


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--tokens", type=int, default=1536, help="of each sequence")
    parser.add_argument("--rounds", type=int, default=15, help="90 or more for a claim of 5 %%")
    parser.add_argument("--pool-dir", default=_core.default_pool_dir())
    parser.add_argument("--batches", type=int, nargs="+", default=[1, 8])
    arguments = parser.parse_args()
    from pie.hf import load
    from pie.info import describe

    model, _ = load(arguments.model, arguments.dtype)
    print(f"{arguments.dtype}, {torch.get_num_threads()} threads\n{describe(arguments.pool_dir)}")
    ok = True
    with torch.inference_mode():
        for batch in arguments.batches:
            for share in (0.5, 0.25):
                ok &= compare(
                    model, batch, arguments.tokens, share, arguments.rounds, arguments.pool_dir
                )
    return 0 if ok else 1


if __name__ == "__main__":
    raise SystemExit(main())
