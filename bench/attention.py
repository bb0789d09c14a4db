"""Attention over frames against torch's scaled_dot_product_attention over contiguous K and V.

Decode: 8 sequences of 4096 tokens, 14 query and 2 KV heads of 64; prefill: a chunk of 512 tokens
behind 2048 earlier ones, 9 query and 3 KV heads of 64. Both in bf16, on torch's threads, going
round over 512 MiB of K and V so that no cache holds them. Each pair of measurements is taken side
by side; printed are medians, and the median of the pairs' ratios. Ours includes appending the new
K and V, which torch's has there already.
"""

import argparse
import statistics
import time
from collections.abc import Callable

import torch
from torch.nn.functional import scaled_dot_product_attention as sdpa

import pie

HEAD_DIM = 64
BYTES = 512 << 20


def parse_arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="not used: taken so that all benches are called alike")
    parser.add_argument("--seconds", type=float, default=4.0, help="for each formulation")
    return parser.parse_args()


class Problem:
    """K and V of some layers, in frames and contiguous, and one query."""

    def __init__(self, batch: int, query_heads: int, kv_heads: int, rows: int, before: int) -> None:
        self.rows, self.before, self.group = rows, before, query_heads // kv_heads
        tokens = before + rows
        layer_bytes = 2 * batch * kv_heads * tokens * HEAD_DIM * 2
        self.layers = -(-BYTES // layer_bytes)
        new = batch * rows
        self.q = torch.randn(new, query_heads, HEAD_DIM).bfloat16()
        self.k, self.v = torch.randn(2, new, kv_heads, HEAD_DIM).bfloat16()
        shape = (batch, kv_heads, tokens, HEAD_DIM)
        self.kept = [torch.randn(2, *shape).bfloat16() for _ in range(self.layers)]
        self.cache = pie.TieredKVCache(
            self.layers,
            kv_heads,
            HEAD_DIM,
            "bf16",
            device_bytes=2 * self.layers * layer_bytes,
            pool_bytes=None,
            policy="off",
        )
        self.sequences = [self.cache.add() for _ in range(batch)]
        for sequence in self.sequences:
            with self.cache.step([(sequence, before)], reader="pages") as step:
                earlier = torch.randn(before, kv_heads, HEAD_DIM).bfloat16()
                for layer in range(self.layers):
                    step.pages(layer, earlier, earlier)

    def ours(self) -> float:
        """Seconds of one layer."""
        batch = [(sequence, self.rows) for sequence in self.sequences]
        with self.cache.step(batch) as step:
            began = time.perf_counter()
            for layer in range(self.layers):
                step.attend(layer, self.q, self.k, self.v)
            took = time.perf_counter() - began
        for sequence in self.sequences:
            self.cache.truncate(sequence, self.before)
        return took / self.layers

    def torch_seconds(self, attend: Callable[..., torch.Tensor]) -> float:
        """Seconds of one layer."""
        batch = len(self.sequences)
        q = self.q.view(batch, self.rows, -1, HEAD_DIM).transpose(1, 2).contiguous()
        began = time.perf_counter()
        for keys, values in self.kept:
            attend(q, keys, values)
        return (time.perf_counter() - began) / self.layers


def grouped(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """The query heads of a KV head as rows of one; without a mask, so for one new token."""
    return sdpa(q.view(k.shape[0], k.shape[1], -1, HEAD_DIM), k, v)


def by_hand(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    rows = q.view(k.shape[0], k.shape[1], -1, HEAD_DIM)
    return (rows @ k.transpose(2, 3) * HEAD_DIM**-0.5).softmax(-1) @ v


def with_mask(mask: torch.Tensor | None, repeat: bool) -> Callable[..., torch.Tensor]:
    def attend(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
        if not repeat:
            return sdpa(q, k, v, attn_mask=mask, enable_gqa=True)
        wide = [x.repeat_interleave(q.shape[1] // k.shape[1], 1) for x in (k, v)]
        return sdpa(q, *wide, attn_mask=mask)

    return attend


def compare(
    problem: Problem, name: str, attend: Callable[..., torch.Tensor], seconds: float
) -> None:
    ours, theirs = [], []
    until = time.perf_counter() + seconds
    while time.perf_counter() < until or len(ours) < 5:
        ours.append(problem.ours())
        theirs.append(problem.torch_seconds(attend))
    ratio = statistics.median(b / a for a, b in zip(ours, theirs, strict=True))
    print(
        f"  {name:24} {statistics.median(ours) * 1e3:8.3f} ms ours  "
        f"{statistics.median(theirs) * 1e3:8.3f} ms torch   torch / ours {ratio:6.2f}"
        f"   ({len(ours)} pairs)"
    )


def main() -> None:
    seconds = parse_arguments().seconds
    torch.manual_seed(0)
    problem = Problem(8, 14, 2, 1, 4096)
    stats = problem.cache.stats()
    print(f"{torch.get_num_threads()} threads, {stats.attention_isa}, torch {torch.__version__}")
    print(f"decode, bf16, 8 x 4096, 14/2 heads of 64, {problem.layers} layers, one layer:")
    compare(problem, "enable_gqa", with_mask(None, repeat=False), seconds)
    compare(problem, "grouped view", grouped, seconds)
    compare(problem, "repeated K and V", with_mask(None, repeat=True), seconds)
    compare(problem, "two products by hand", by_hand, seconds)
    problem.cache.close()
    problem = Problem(1, 9, 3, 512, 2048)
    mask = torch.ones(512, 2560, dtype=torch.bool).tril(2048)
    print(f"prefill, bf16, 512 at 2048, 9/3 heads of 64, {problem.layers} layers, one layer:")
    compare(problem, "enable_gqa, mask", with_mask(mask, repeat=False), seconds)
    compare(problem, "repeated K and V, mask", with_mask(mask, repeat=True), seconds)
    problem.cache.close()


if __name__ == "__main__":
    main()
