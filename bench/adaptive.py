"""What adapting comes to on this machine, beside what could be had.

First the same steps under `adaptive` and under the best `fixed:F`, which a sweep of its own finds,
in turn: the median of the rounds' ratios with its bootstrap interval. Then how many tokens may be
held: sequences that start on the device grow for as long as the headroom allows it, by 5 % and 10 %
of slack and for throughput. What it offers in the end counts, too, and is less than they grow by.
Beside it is what the arithmetic allows with the link, the step and the interference that were
measured on the way, where they were, and how much longer a step has come to take.

    python bench/adaptive.py --rounds 90
"""

import argparse
import statistics
from typing import Any

import torch
from transparency import Arm, fill, interval, stolen

from pie import _core
from pie.cache import kv_bytes
from pie.hf import TieredCache, load
from pie.hf.cache import geometry
from pie.info import describe
from pie.sizes import format_size

SHARES = [0.5, 0.6, 0.75, 0.9, 1.0]  # of the KV that is streamed
WITHIN = 1.07
REACH = 0.85
DEVICE_BYTES = 48 << 20
BLOCK = 16  # tokens
STEPS = 8  # between two looks at the headroom
PATIENCE = 8  # times so many steps without room, until no more is to come
OBJECTIVES = [("transparent", 0.05), ("transparent", 0.1), ("throughput", 0.05)]


def streaming(arguments: argparse.Namespace, model: Any, policy: str) -> Arm:
    """Half of the KV on the device."""
    needed = kv_bytes(
        *geometry(model.config), model.dtype, (arguments.tokens + 1) * arguments.batch
    )
    cache = TieredCache(
        model.config,
        model.dtype,
        device_bytes=needed // 2,
        pool_bytes=2 * needed + (64 << 20),
        pool_dir=arguments.pool_dir,
        policy=policy,
    )
    fill(cache, model, arguments.batch, arguments.tokens)
    return Arm(policy, model, cache)


def sweep(arguments: argparse.Namespace, model: Any, ids: torch.Tensor) -> str:
    """The fixed share whose steps are the shortest."""
    found = {}
    for share in SHARES:
        arm = streaming(arguments, model, f"fixed:{share}")
        with arm.cache:
            for _ in range(5):
                arm.turn(ids)
        found[arm.name] = statistics.median(arm.rounds)
        print(f"  {arm.name:<10} {found[arm.name] * 1e3:8.2f} ms a step")
    return min(found, key=lambda name: found[name])


def compare(arguments: argparse.Namespace, model: Any) -> bool:
    ids = torch.full((arguments.batch, 1), 101)
    print(f"{arguments.batch} x {arguments.tokens} tokens, half of their KV on the device")
    best = sweep(arguments, model, ids)
    arms = [streaming(arguments, model, policy) for policy in ("adaptive", best)]
    before = stolen()
    with arms[0].cache, arms[1].cache:
        for number in range(arguments.rounds):
            for arm in arms if number % 2 else reversed(arms):
                arm.turn(ids)
    ratios = [a / b for a, b in zip(arms[0].rounds, arms[1].rounds, strict=True)]
    reached = statistics.median(ratios) <= WITHIN
    print(
        f"  adaptive / {best} {interval(ratios)}, {arguments.rounds} rounds, steal "
        f"{stolen(before):.1%}; to reach: {WITHIN}: {'reached' if reached else 'NOT REACHED'}"
    )
    return reached


def median_step(arm: Arm, ids: torch.Tensor) -> float:
    return statistics.median(arm.step(ids) for _ in range(STEPS))


def allowed(objective: str, slack: float, step_ns: float, kept: float, stats: Any) -> float:
    """Bytes that a step may stream, by what was measured: all that arrives in time and slows it
    within the slack, or as many of those as give the best rate of KV read.
    """
    link = stats.link_bytes_per_s / 1e9  # bytes a nanosecond
    beside = max(stats.interference_ns_per_byte, 1e-12)
    if objective == "transparent":
        return float(min(link * (1 + slack) * step_ns, slack * step_ns / beside))
    most = link * step_ns / max(1e-12, 1 - link * beside) if link * beside < 1 else 8 * DEVICE_BYTES
    return max(
        (most * share / 100 for share in range(101)),
        key=lambda streamed: (DEVICE_BYTES + kept * streamed) / (step_ns + beside * streamed),
    )


def capacity(
    arguments: argparse.Namespace, model: Any, batch: int, objective: str, slack: float
) -> None:
    layers, *shape = geometry(model.config)
    token = kv_bytes(layers, *shape, model.dtype, BLOCK) / BLOCK
    ids = torch.full((batch, 1), 101)
    with TieredCache(
        model.config,
        model.dtype,
        device_bytes=DEVICE_BYTES,
        pool_bytes=8 * DEVICE_BYTES,
        pool_dir=arguments.pool_dir,
        block_tokens=BLOCK,
        objective=objective,
        slack=slack,
    ) as cache:
        arm = Arm(objective, model, cache)
        length = int(DEVICE_BYTES / token / batch * 0.9) // BLOCK * BLOCK
        fill(cache, model, batch, length)
        alone = median_step(arm, ids)
        chunk = max(1, length // (16 * BLOCK)) * BLOCK
        waited = 0
        while waited < PATIENCE:
            waited += 1
            if cache.kv.headroom().tokens >= chunk * batch:
                fill(cache, model, batch, chunk)
                length += chunk
                waited = 0
            median_step(arm, ids)
        taken = median_step(arm, ids)
        stats = cache.stats()
        offered = cache.kv.headroom().tokens
    held = (length + BLOCK) * batch  # whole blocks, with the one that a step's token begins
    bound = of_bound = "-"
    if stats.link_bytes_per_s > 0:
        kept = 1 - 2.5 / layers  # the rest of what is streamed is in the ring
        streamed = allowed(objective, slack, alone * 1e9, kept, stats)
        most = (DEVICE_BYTES + streamed * kept) / token
        bound, of_bound = f"{most:.0f}", f"{(held + offered) / most:.2f}"
    name = objective if objective == "throughput" else f"{objective} {slack:.0%}"
    print(
        f"  {batch:9} {name:<16} {held:6} {offered:8} {bound:>6} {of_bound:>9} {alone * 1e3:9.1f} "
        f"{taken / alone:9.2f} {stats.link_bytes_per_s / 1e9:6.2f} "
        f"{stats.interference_ns_per_byte:8.2f}   {stats.budget_reason}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--tokens", type=int, default=1024, help="of each sequence, compared")
    parser.add_argument("--batch", type=int, default=8, help="sequences, compared")
    parser.add_argument("--rounds", type=int, default=10, help="90 or more for a claim")
    parser.add_argument("--batches", type=int, nargs="*", default=[1, 8, 32], help="that grow")
    parser.add_argument("--pool-dir", default=_core.default_pool_dir())
    arguments = parser.parse_args()
    model, _ = load(arguments.model, arguments.dtype)
    print(f"{arguments.dtype}, {torch.get_num_threads()} threads\n{describe(arguments.pool_dir)}")
    with torch.inference_mode():
        reached = compare(arguments, model) if arguments.rounds > 0 else True
        print(f"\ntokens that {format_size(DEVICE_BYTES)} of device hold; to reach: {REACH}")
        print(
            "  sequences objective          held  offered  bound  of bound  step, ms  of alone"
            "   GB/s  ns/byte"
        )
        for batch in arguments.batches:
            for objective, slack in OBJECTIVES:
                capacity(arguments, model, batch, objective, slack)
    return 0 if reached else 1


if __name__ == "__main__":
    raise SystemExit(main())
