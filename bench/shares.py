"""Tokens a second against the share of the KV that the device holds, from all of it to a twentieth.

One cache whose device budget moves, a turn at each share in an order drawn anew for each round, and
the same steps with everything on the device in each round too. Beside what is measured it gives the
disk's bound: a step takes as long as with everything on the device, or as its bytes do at the rate
of plain direct reads by themselves. (Policies "adaptive" and "fit" stream the same; transformers'
caches that offload do so from a GPU to CPU memory and do not run here.)

    python bench/shares.py --picture docs/shares.svg
"""

import argparse
import random
import statistics
import time
from pathlib import Path
from typing import Any

import torch
from transparency import Arm, Reader, fill, stolen

from pie import _core, report
from pie.cache import kv_bytes, roomy_bytes
from pie.hf import TieredCache, load
from pie.hf.cache import geometry
from pie.info import describe
from pie.sizes import format_size

SHARES = [0.9, 0.75, 0.5, 0.35, 0.25, 0.15, 0.1, 0.05]
SETTLE, COUNT = 3, 3  # steps of a turn
BLOCK = 16  # tokens: what is not full of a sequence stays on the device, of however little it is


def plain_rate(directory: str) -> float:
    """Bytes a second of plain direct reads by themselves."""
    with Reader(directory) as reader:
        reader.read(1e12)
        began = time.perf_counter()
        time.sleep(1.5)
        return reader.read(0) / (time.perf_counter() - began)


def turn(arm: Arm, ids: torch.Tensor) -> tuple[float, float]:
    """Seconds of a step, and the bytes that it streams."""
    for _ in range(SETTLE):
        arm.step(ids)
    before = arm.cache.stats().streamed_bytes
    seconds = statistics.median(arm.step(ids) for _ in range(COUNT))
    return seconds, (arm.cache.stats().streamed_bytes - before) / COUNT


def measure(model: Any, batch: int, tokens: int, rounds: int, place: str) -> list[dict[str, float]]:
    """Of each share, 1 first: tokens a second, of all, the bound, and what a step streams."""
    shape = (*geometry(model.config), model.dtype)
    needed = kv_bytes(*shape, (tokens + 1) * batch)
    rate = plain_rate(place)
    print(
        f"{batch} x {tokens} tokens, {format_size(needed)} of KV; plain reads {rate / 1e9:.2f} GB/s"
    )
    ids = torch.full((batch, 1), 101)
    room = roomy_bytes(*shape, [tokens + 1] * batch)
    times: dict[float, list[float]] = {share: [] for share in [1.0, *SHARES]}
    streamed = dict.fromkeys(times, 0.0)
    before = stolen()
    with (
        TieredCache(
            model.config, model.dtype, device_bytes=room, pool_bytes=None, block_tokens=BLOCK
        ) as whole,
        TieredCache(
            model.config,
            model.dtype,
            device_bytes=room,
            pool_bytes=needed + (64 << 20),
            pool_dir=place,
            block_tokens=BLOCK,
        ) as part,
    ):
        for cache in (whole, part):
            fill(cache, model, batch, tokens)
        arms = Arm("whole", model, whole), Arm("part", model, part)
        for number in range(rounds):
            order = random.Random(number).sample(list(times), len(times))
            for share in order:
                if share < 1:
                    part.kv.resize(device_bytes=int(needed * share))
                seconds, streamed[share] = turn(arms[share < 1], ids)
                times[share].append(seconds)
    print(f"steal {stolen(before):.1%}, {rounds} rounds")
    alone = statistics.median(times[1.0])
    ratios = {
        share: statistics.median(a / b for a, b in zip(all_, times[1.0], strict=True))
        for share, all_ in times.items()
    }
    return [
        {
            "share": share,
            "tokens_per_s": batch / (alone * ratios[share]),
            "of_all": 1 / ratios[share],
            "bound": batch / max(alone, streamed[share] / rate),
            "streamed": streamed[share],
        }
        for share in times
    ]


def draw(figure: Any, points: list[dict[str, float]], title: str) -> None:
    axes = figure.subplots()
    shares = [100 * point["share"] for point in points]
    alone = points[0]["tokens_per_s"]
    axes.plot(shares, [p["bound"] for p in points], "--", color="#9aa3ad", label="the disk's bound")
    axes.plot(shares, [p["tokens_per_s"] for p in points], "o-", color="#2f6db5", label="Pie")
    axes.axhline(alone, color="#4fa36a", linewidth=0.8, label="all of it on the device")
    axes.set_xlim(102, 0)
    axes.set_ylim(0, 1.15 * alone)
    axes.set_xlabel("% of the KV that the device holds")
    axes.set_ylabel("tokens/s")
    axes.set_title(title, fontsize=9, loc="left")
    axes.legend(loc="lower left")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default=".cache/SmolLM2-135M-Instruct.Q4_1.gguf")
    parser.add_argument("--dtype", default="bf16")
    parser.add_argument("--tokens", type=int, default=1024, help="of each sequence")
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--pool-dir", default=_core.default_pool_dir())
    parser.add_argument("--picture", metavar="FILE", help="draw it as SVG, too")
    arguments = parser.parse_args()
    model, _ = load(arguments.model, arguments.dtype)
    print(f"{arguments.dtype}, {torch.get_num_threads()} threads\n{describe(arguments.pool_dir)}")
    shape = (arguments.batch, arguments.tokens, arguments.rounds)
    with torch.inference_mode():
        points = measure(model, *shape, arguments.pool_dir)
    print("  share on device    tokens/s    of all    the disk's bound    streamed a step")
    for point in points:
        print(
            f"  {point['share']:15.0%} {point['tokens_per_s']:11.1f} {point['of_all']:9.2f} "
            f"{point['bound']:19.1f} {format_size(int(point['streamed'])):>18}"
        )
    if arguments.picture:
        title = f"{Path(arguments.model).stem}, {arguments.dtype}, {arguments.batch} sequences of "
        title += f"{arguments.tokens:,} tokens, {torch.get_num_threads()} cores, pool on a disk"
        picture = report.svg(3.6, lambda figure: draw(figure, points, title), standalone=True)
        Path(arguments.picture).write_text(picture, encoding="utf-8")


if __name__ == "__main__":
    main()
