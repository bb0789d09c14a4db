"""Checks and measures Pie on a GPU: `make gpu-check`, or this file by itself.

What tests show over a double of the driver and in Triton's interpreter is run for real: the
backend's conformance suite, the kernels against a reference, tokens of a model against the cache of
transformers. Then what only a GPU can tell: the link by size of copy, the rate of attention beside
torch's, and whether a step that streams is slower than one that does not. One report: JSON, and a
page.
"""

from __future__ import annotations

import argparse
import importlib.util
import json
import mmap
import multiprocessing
import os
import platform
import shutil
import statistics
import subprocess
import sys
import threading
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ProcessPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch

import pie

ROOT = Path(__file__).resolve().parents[1]
GPU = torch.device("cuda", 0)
MIB = 1 << 20

Report = dict[str, Any]


# ---- what is measured on


def machine() -> Report:
    properties = torch.cuda.get_device_properties(GPU)
    query = "driver_version,pcie.link.gen.current,pcie.link.width.current,clocks.sm,clocks.mem"
    smi = subprocess.run(
        ["nvidia-smi", f"--query-gpu={query}", "--format=csv,noheader"],
        capture_output=True,
        text=True,
        check=False,
    )
    import triton

    return {
        "gpu": properties.name,
        "processors": properties.multi_processor_count,
        "memory_bytes": properties.total_memory,
        "nvidia_smi": {query: smi.stdout.strip()},
        "torch": torch.__version__,
        "triton": triton.__version__,
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "pie": pie.__version__,
    }


# ---- is it right


REAL = "Cuda/*Earliest:Cuda/*Pageable:CudaAnywhere.*"  # what needs no double


def conformance(under: Sequence[str] = (), tests: str = REAL) -> Report:
    """The backend's suite over the real driver, or the one that PIE_TEST_DRIVER names."""
    program = os.environ.get("PIE_TEST_CUDA", str(ROOT / "build/release/test_cuda"))
    if not Path(program).exists():
        return {"ok": False, "said": f"{program} was not built"}
    ran = subprocess.run(
        [*under, program, f"--gtest_filter={tests}", "--gtest_brief=1"],
        env={"PIE_TEST_DRIVER": "libcuda.so.1", **os.environ},
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
    )
    return {"ok": ran.returncode == 0, "said": ran.stdout[-3000:] + ran.stderr[-1000:]}


def sanitizer() -> Report:
    """A few of the same tests under compute-sanitizer, where that is installed."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"said": "compute-sanitizer is not there"}
    few = "Cuda/*ComeBack*/Earliest:Cuda/*Wait*/Earliest"
    return conformance([tool, "--error-exitcode=9"], few)


# dtype, kv_heads, heads, head_dim, window
Case = tuple[torch.dtype, int, int, int, int]

CASES: list[Case] = [
    (torch.bfloat16, 8, 32, 128, 0),
    (torch.float16, 8, 32, 128, 0),
    (torch.float32, 2, 6, 64, 0),
    (torch.bfloat16, 4, 4, 80, 0),
    (torch.bfloat16, 2, 14, 96, 100),
    (torch.float16, 1, 16, 256, 0),
    (torch.bfloat16, 3, 9, 64, 40),
]


def reference(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, window: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """Attention of the last rows to all of k and v, in float64; out and log-sum-exp."""
    rows, heads, dim = q.shape
    tokens, kv_heads, _ = k.shape
    k = k.double().repeat_interleave(heads // kv_heads, 1)
    v = v.double().repeat_interleave(heads // kv_heads, 1)
    scores = torch.einsum("rhd,thd->hrt", q.double(), k) * dim**-0.5
    at = torch.arange(tokens - rows, tokens, device=q.device)[:, None]
    token = torch.arange(tokens, device=q.device)[None, :]
    hidden = (token > at) | ((token <= at - window) if window else (token < 0))
    scores = scores.masked_fill(hidden, float("-inf"))
    return torch.einsum("hrt,thd->rhd", scores.softmax(-1), v), scores.logsumexp(-1).T


def kernel_case(case: Case, share: float = 0, tokens: int = 64) -> Report:
    """Prompts and tokens of two sequences, most of their KV streamed, against float64."""
    dtype, kv_heads, heads, dim, window = case
    layers = 2
    frame = 2 * kv_heads * tokens * dim * dtype.itemsize
    cache = pie.TieredKVCache(
        layers,
        kv_heads,
        dim,
        dtype,
        GPU,
        device_bytes=frame * 40 * 64 // tokens,
        pool_bytes=frame * 200 * 64 // tokens,
        block_tokens=tokens,
        windows=[window] * layers,
        in_place_share=share,
    )
    generator = torch.Generator(GPU).manual_seed(1)

    def draw(rows: int, count: int) -> torch.Tensor:
        return torch.randn(rows, count, dim, device=GPU, generator=generator).to(dtype)

    one, other = cache.add(), cache.add()
    kept: dict[tuple[int, int], list[list[torch.Tensor]]] = {}
    worst, worst_lse = 0.0, 0.0
    steps = [[(one, 500)], [(other, 700)], [(one, 3), (other, 1)], [(one, 1), (other, 300)]]
    steps += [[(one, 1), (other, 1)] for _ in range(20)]
    for batch in steps:
        rows = sum(new for _, new in batch)
        with cache.step(batch):
            for layer in range(layers):
                q, k, v = draw(rows, heads), draw(rows, kv_heads), draw(rows, kv_heads)
                out, lse = cache.attend(layer, q, k, v, return_lse=True)
                first = 0
                for sequence, new in batch:
                    mine = slice(first, first + new)
                    held = kept.setdefault((sequence, layer), [[], []])
                    held[0].append(k[mine])
                    held[1].append(v[mine])
                    wanted, wanted_lse = reference(
                        q[mine], torch.cat(held[0]), torch.cat(held[1]), window
                    )
                    worst = max(worst, float((out[mine] - wanted).abs().max()))
                    worst_lse = max(worst_lse, float((lse[mine] - wanted_lse).abs().max()))
                    first += new
    cache.check()
    stats = cache.stats()
    streamed, in_place = stats.streamed_bytes, stats.in_place_bytes
    cache.close()
    bound = {torch.float32: 2e-5, torch.float16: 4e-3, torch.bfloat16: 3e-2}[dtype]
    return {
        "case": [str(dtype), kv_heads, heads, dim, window, share, tokens],
        "error": worst,
        "lse_error": worst_lse,
        "streamed_bytes": streamed,
        "in_place_bytes": in_place,
        "ok": worst < bound
        and worst_lse < 1e-2
        and (streamed > 0 or window > 0)
        and (in_place > 0 or share == 0),
    }


def kernels() -> Report:
    """Each case in a process of its own, since most of the time is the compiler's."""
    cases: list[tuple[Case, float, int]] = [(case, 0, 64) for case in CASES]
    cases += [(case, 0.5, size) for case in CASES[:3] for size in (16, 64)]
    context = multiprocessing.get_context("spawn")
    with ProcessPoolExecutor(max_workers=len(cases), mp_context=context) as pool:
        found = list(pool.map(kernel_case, *zip(*cases, strict=True)))
    return {"ok": all(case["ok"] for case in found), "cases": found}


def tokens() -> Report:
    """Greedy tokens of a small model in float32, most of its KV streamed, against DynamicCache."""
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from pie.hf import TieredCache
    from pie.hf.generation import cache_argument

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=1000,
        hidden_size=512,
        intermediate_size=1024,
        num_hidden_layers=6,
        num_attention_heads=8,
        num_key_value_heads=2,
        max_position_embeddings=4096,
    )
    results: dict[str, list[list[int]]] = {}
    prompt = torch.randint(0, 1000, (3, 400), device=GPU)
    streamed = 0
    for name in ("dynamic", "pie", "gather"):
        config._attn_implementation = "pie" if name == "pie" else "eager"
        torch.manual_seed(1)
        model = LlamaForCausalLM(config).to(GPU).eval()
        if name == "dynamic":
            cache: Any = DynamicCache(config=config)
        else:
            cache = TieredCache(
                model.config, torch.float32, GPU, device_bytes="6MiB", pool_bytes="256MiB"
            )
        with torch.inference_mode():
            made = model.generate(
                prompt,
                attention_mask=torch.ones_like(prompt),
                max_new_tokens=64,
                do_sample=False,
                pad_token_id=0,
                eos_token_id=None,
                **cache_argument(model, cache),
            )
        results[name] = made.tolist()
        if name != "dynamic":
            streamed = max(streamed, cache.stats().streamed_bytes)
    equal = {name: made == results["dynamic"] for name, made in results.items()}
    return {"ok": all(equal.values()) and streamed > 0, "equal": equal, "streamed_bytes": streamed}


# ---- how fast it is


@contextmanager
def timed(into: list[float]) -> Iterator[None]:
    """Seconds of the current stream."""
    began, ended = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    began.record()
    yield
    ended.record()
    ended.synchronize()
    into.append(began.elapsed_time(ended) / 1e3)


def rate_of(work: Callable[[], None], count_bytes: int, repeats: int = 5) -> float:
    """Bytes a second, the median."""
    work()
    times: list[float] = []
    for _ in range(repeats):
        with timed(times):
            work()
    return count_bytes / statistics.median(times)


def link() -> Report:
    """Copies each way, pinned and not, by size of copy: 256 MiB in all each time."""
    total = 256 * MIB
    device = torch.empty(total, dtype=torch.uint8, device=GPU)
    curves: Report = {}
    for kind in ("pinned", "pageable"):
        host = torch.zeros(total, dtype=torch.uint8, pin_memory=kind == "pinned")
        for way in ("to_device", "to_host"):
            curve = {}
            for size in (64 << 10, 256 << 10, MIB, 4 * MIB, 16 * MIB, 64 * MIB):
                if kind == "pageable" and size < 4 * MIB:
                    continue

                def copy(size: int = size, host: torch.Tensor = host, way: str = way) -> None:
                    for at in range(0, total, size):
                        here, there = host[at : at + size], device[at : at + size]
                        to, of = (there, here) if way == "to_device" else (here, there)
                        to.copy_(of, non_blocking=True)

                curve[size] = rate_of(copy, total, 3) / 1e9
            curves[f"{kind}_{way}_gb_s"] = curve
        curves[f"{kind}_asked_ms"], curves[f"{kind}_done_ms"] = asked_and_done(host, device)
    return curves | {"both_ways_gb_s": both_ways(device)}


def asked_and_done(host: torch.Tensor, device: torch.Tensor) -> tuple[float, float]:
    """Milliseconds that asking for a copy takes, and until it is done: far apart where the copy is
    asynchronous.
    """
    torch.cuda.synchronize()
    began = time.perf_counter()
    device.copy_(host, non_blocking=True)
    asked = time.perf_counter()
    torch.cuda.synchronize()
    return 1e3 * (asked - began), 1e3 * (time.perf_counter() - began)


def both_ways(device: torch.Tensor) -> Report:
    """Pinned copies to the device and from it at once, each way on a stream of its own."""
    half = device.numel() // 2
    hosts = [torch.zeros(half, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    streams = [torch.cuda.Stream(GPU) for _ in range(2)]
    times: dict[str, list[float]] = {"to_device": [], "to_host": []}
    for _ in range(4):
        torch.cuda.synchronize()
        marks = [[torch.cuda.Event(enable_timing=True) for _ in range(2)] for _ in range(2)]
        for part, (stream, (begin, end)) in enumerate(zip(streams, marks, strict=True)):
            here, there = hosts[part], device[part * half : (part + 1) * half]
            with torch.cuda.stream(stream):
                begin.record()
                for _ in range(8):
                    (here if part else there).copy_(there if part else here, non_blocking=True)
                end.record()
        torch.cuda.synchronize()
        for way, (begin, end) in zip(times, marks, strict=True):
            times[way].append(begin.elapsed_time(end) / 1e3)
    return {way: 8 * half / statistics.median(all_of[1:]) / 1e9 for way, all_of in times.items()}


def registration() -> Report:
    """Microseconds that a launch takes the host, alone and while another thread registers memory,
    and that a piece of it takes: of memory that the system has only promised, and of memory taken
    from it before, which is how a growing pool does it, 8 MiB at a time.
    """
    found: Report = {"alone_us": launches()}
    for size, taken in ((64 * MIB, False), (64 * MIB, True), (8 * MIB, True)):
        ending, registered = threading.Event(), [0.0]
        thread = threading.Thread(target=register, args=(size, taken, ending, registered))
        thread.start()
        beside = launches()
        ending.set()
        thread.join()
        name = f"{size // MIB} MiB, {'taken' if taken else 'promised'}"
        found[name] = {"piece_us": 1e6 * statistics.median(registered[1:]), "beside_us": beside}
    return found


def register(size: int, taken: bool, ending: threading.Event, registered: list[float]) -> None:
    """Registers and gives back until the end; adds the seconds that each piece took."""
    torch.cuda.set_device(GPU)
    runtime = torch.cuda.cudart()
    while not ending.is_set():
        with mmap.mmap(-1, 512 * MIB) as memory:
            host = torch.frombuffer(memory, dtype=torch.uint8)
            for at in range(0, host.numel(), size):
                if taken:
                    host[at : at + size : mmap.PAGESIZE] = 1
                began = time.perf_counter()
                runtime.cudaHostRegister(host.data_ptr() + at, size, 0)
                registered.append(time.perf_counter() - began)
            for at in range(0, host.numel(), size):
                runtime.cudaHostUnregister(host.data_ptr() + at)
            del host


def launches() -> Report:
    """Of two seconds of launches."""
    small = torch.zeros(64, device=GPU)
    took = []
    until = time.perf_counter() + 2
    while time.perf_counter() < until:
        began = time.perf_counter()
        small.add_(1)
        took.append(1e6 * (time.perf_counter() - began))
        if len(took) % 200 == 0:
            torch.cuda.synchronize()
    took.sort()
    p99 = took[len(took) * 99 // 100]
    return {"count": len(took), "median": statistics.median(took), "p99": p99, "most": took[-1]}


def filled(
    lengths: list[int],
    layers: int,
    policy: str,
    device_bytes: int,
    pool_bytes: int,
    share: float | None = None,
    objective: str = "transparent",
) -> tuple[pie.TieredKVCache, list[int]]:
    """A cache of Llama-8B's geometry whose sequences have these lengths."""
    cache = pie.TieredKVCache(
        layers,
        8,
        128,
        torch.bfloat16,
        GPU,
        device_bytes=device_bytes,
        pool_bytes=pool_bytes,
        block_tokens=64,
        policy=policy,
        in_place_share=share,
        objective=objective,
    )
    sequences: list[int] = []
    for length in lengths:
        append(cache, sequences, length)
    torch.cuda.synchronize()
    return cache, sequences


def append(cache: pie.TieredKVCache, sequences: list[int], length: int) -> None:
    """One more sequence, of random K and V."""
    sequences.append(cache.add())
    for begin in range(0, length, 2048):
        rows = min(2048, length - begin)
        k, v = (torch.randn(rows, 8, 128, device=GPU, dtype=torch.bfloat16) for _ in range(2))
        with cache.step([(sequences[-1], rows)]):
            for layer in range(cache.num_layers):
                cache._run(layer, k, v, None, None)


def host() -> Report:
    """Microseconds that a layer's `attend` takes the host, resident and with a quarter streamed."""
    layers, found = 32, {}
    for batch, length, policy in ((8, 2016, "off"), (8, 2016, "fixed:0.25"), (256, 480, "off")):
        room = 2 * 8 * 128 * 2 * (length + 64) * batch * layers
        cache, sequences = filled([length] * batch, layers, policy, room * 5 // 4, room)
        q = torch.randn(batch, 32, 128, device=GPU, dtype=torch.bfloat16)
        k, v = (torch.randn(batch, 8, 128, device=GPU, dtype=torch.bfloat16) for _ in range(2))
        took = []
        for _ in range(16):
            with cache.step([(sequence, 1) for sequence in sequences]):
                began = time.perf_counter()
                for layer in range(layers):
                    cache.attend(layer, q, k, v)
                took.append(1e6 * (time.perf_counter() - began) / layers)
        torch.cuda.synchronize()
        found[f"{batch}x{length}, {policy}"] = statistics.median(took[6:])
        cache.close()
    return found


class Spy:
    """Keeps how attention was launched last, and launches it again and again."""

    def __init__(self, cache: pie.TieredKVCache) -> None:
        from pie.gpu import kernels

        runtime = cache._runtime
        assert runtime is not None
        self._launch = runtime.launch
        self._kernel = kernels.attend
        self._last: tuple[tuple[Any, ...], dict[str, Any]] = ((), {})
        runtime.launch = self._spy  # type: ignore[method-assign]

    def _spy(self, kernel: Any, *args: Any, **options: Any) -> None:
        if kernel is self._kernel:
            self._last = ((kernel, *args), options)
        self._launch(kernel, *args, **options)

    def again(self) -> None:
        args, options = self._last
        self._launch(*args, **options)


def flashinfer_rate(q: torch.Tensor, length: int) -> float:
    """Of its decode kernel, over pages as our frames are: bytes of KV a second."""
    import flashinfer

    page, batch = 64, len(q)
    pages = length // page * batch
    kv = torch.randn(pages, 2, 8, page, 128, device=GPU, dtype=torch.bfloat16)
    wrapper = flashinfer.BatchDecodeWithPagedKVCacheWrapper(
        torch.empty(256 * MIB, dtype=torch.uint8, device=GPU), "HND"
    )
    wrapper.plan(
        torch.arange(0, pages + 1, length // page, dtype=torch.int32, device=GPU),
        torch.randperm(pages, device=GPU).int(),
        torch.full((batch,), page, dtype=torch.int32, device=GPU),
        *(32, 8, 128, page),
        q_data_type=q.dtype,
        kv_data_type=kv.dtype,
    )

    def work() -> None:
        for _ in range(20):
            wrapper.run(q, kv)

    return rate_of(work, 20 * kv.nbytes)


def attention() -> Report:
    """Decode attention over frames beside torch's own over contiguous K and V: GB/s of KV, of the
    kernel alone; and what a layer costs the host.
    """
    results = {}
    for batch, length in ((1, 32768), (8, 8192), (64, 2048), (256, 1024)):
        kv = 2 * 8 * 128 * 2 * length * batch
        layers = 4
        cache, sequences = filled([length] * batch, layers, "off", kv * layers * 5 // 4, 0)
        q = torch.randn(batch, 32, 128, device=GPU, dtype=torch.bfloat16)
        k, v = (torch.randn(batch, 8, 128, device=GPU, dtype=torch.bfloat16) for _ in range(2))
        host: list[float] = []
        spy = Spy(cache)
        for _ in range(12):
            torch.cuda.synchronize()
            with cache.step([(sequence, 1) for sequence in sequences]):
                began = time.perf_counter()
                for layer in range(layers):
                    cache.attend(layer, q, k, v)
                host.append((time.perf_counter() - began) / layers)

        def ours(spy: Spy = spy) -> None:
            for _ in range(20):
                spy.again()

        rate = rate_of(ours, 20 * kv)
        cache.close()
        keys, values = (
            torch.randn(layers, batch, 8, length, 128, device=GPU, dtype=torch.bfloat16)
            for _ in range(2)
        )

        def theirs(
            q: torch.Tensor = q, keys: torch.Tensor = keys, values: torch.Tensor = values
        ) -> None:
            for _ in range(5):
                for layer in range(len(keys)):
                    torch.nn.functional.scaled_dot_product_attention(
                        q[:, :, None], keys[layer], values[layer], enable_gqa=True
                    )

        results[f"{batch}x{length}"] = {
            "pie_gb_s": rate / 1e9,
            "torch_gb_s": rate_of(theirs, 5 * kv * layers) / 1e9,
            "host_us_a_layer": 1e6 * statistics.median(host[2:]),
        }
        del keys, values
        if importlib.util.find_spec("flashinfer") is not None:
            results[f"{batch}x{length}"]["flashinfer_gb_s"] = flashinfer_rate(q, length) / 1e9
    return results


def in_place() -> Report:
    """The decode kernel where a share of the KV is read in CPU memory: GB/s of all KV, and against
    none. What `in_place_share` says pays is the last at which nothing is lost.
    """
    batch, length, layers = 64, 2048, 2
    kv = 2 * 8 * 128 * 2 * length * batch
    q = torch.randn(batch, 32, 128, device=GPU, dtype=torch.bfloat16)
    k, v = (torch.randn(batch, 8, 128, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    rates: dict[float, float] = {}
    for share in (0.0, 0.04, 0.1, 0.2, 0.5):
        policy = f"fixed:{share}" if share else "off"
        cache, sequences = filled([length] * batch, layers, policy, 3 * kv, 3 * kv, share)
        spy = Spy(cache)
        for _ in range(3):
            with cache.step([(sequence, 1) for sequence in sequences]):
                for layer in range(layers):
                    cache.attend(layer, q, k, v)

        def again(spy: Spy = spy) -> None:
            for _ in range(10):
                spy.again()

        read = cache.stats().in_place_bytes / 3 / layers / kv
        rates[round(read, 3)] = rate_of(again, 10 * kv) / 1e9
        cache.close()
    none = rates[0.0]
    return {"gb_s": rates, "against_none": {share: rate / none for share, rate in rates.items()}}


def prompt() -> Report:
    """A chunk of 2,048 tokens after 6,144: the chunked kernel beside torch's own, TFLOP/s."""
    length, rows = 6144, 2048
    cache, (sequence,) = filled([length], 1, "off", 256 * MIB, 0)
    q = torch.randn(rows, 32, 128, device=GPU, dtype=torch.bfloat16)
    k, v = (torch.randn(rows, 8, 128, device=GPU, dtype=torch.bfloat16) for _ in range(2))
    flops = int(4 * 32 * 128 * (rows * length + rows * rows / 2))
    spy = Spy(cache)
    with cache.step([(sequence, rows)]):
        cache.attend(0, q, k, v)

    def ours() -> None:
        for _ in range(5):
            spy.again()

    rate = rate_of(ours, 5 * flops)
    cache.close()
    from torch.nn.attention.bias import causal_lower_right

    keys, values = (
        torch.randn(1, 8, length + rows, 128, device=GPU, dtype=torch.bfloat16) for _ in range(2)
    )
    bias = causal_lower_right(rows, length + rows)
    queries = q.transpose(0, 1)[None]
    keys, values = (x.repeat_interleave(4, 1) for x in (keys, values))

    def theirs() -> None:
        for _ in range(5):
            torch.nn.functional.scaled_dot_product_attention(queries, keys, values, attn_mask=bias)

    return {"pie_tflop_s": rate / 1e12, "torch_tflop_s": rate_of(theirs, 5 * flops) / 1e12}


class Decoder:
    """The matrix products of a decode step of a Llama, with attention over a cache."""

    def __init__(self, layers: int, hidden: int = 4096, inner: int = 14336) -> None:
        def weight(rows: int, columns: int) -> list[torch.Tensor]:
            return [
                torch.randn(rows, columns, device=GPU, dtype=torch.bfloat16) * 0.01
                for _ in range(layers)
            ]

        self.layers, self.hidden = layers, hidden
        self.heads = hidden // 128
        self.qkv, self.o = weight(hidden, hidden + 2048), weight(hidden, hidden)
        self.up, self.down = weight(hidden, 2 * inner), weight(inner, hidden)

    def step(
        self,
        cache: pie.TieredKVCache,
        sequences: list[int],
        beside: Callable[[int], None] | None = None,
    ) -> None:
        batch, heads = len(sequences), self.heads
        x = torch.ones(batch, self.hidden, device=GPU, dtype=torch.bfloat16)
        with torch.inference_mode(), cache.step([(sequence, 1) for sequence in sequences]):
            for layer in range(self.layers):
                if beside is not None:
                    beside(layer)
                qkv = (x @ self.qkv[layer]).view(batch, heads + 16, 128)
                q, k, v = qkv.split([heads, 8, 8], 1)
                out = cache.attend(layer, q, k, v)
                x = x + out.flatten(1) @ self.o[layer]
                gate, up = (x @ self.up[layer]).chunk(2, 1)
                x = torch.nn.functional.rms_norm(
                    x + (torch.nn.functional.silu(gate) * up) @ self.down[layer], (self.hidden,)
                )


@contextmanager
def left_as_before(cache: pie.TieredKVCache, sequences: list[int]) -> Iterator[None]:
    """What is decoded inside is taken back."""
    lengths = [cache.length(sequence) for sequence in sequences]
    yield
    for sequence, length in zip(sequences, lengths, strict=True):
        cache.truncate(sequence, length)


def seconds(
    decoder: Decoder,
    cache: pie.TieredKVCache,
    sequences: list[int],
    steps: int = 6,
    beside: Callable[[int], None] | None = None,
) -> float:
    """Of a step, the mean of several that follow each other; then the sequences are as before."""
    with left_as_before(cache, sequences):
        for _ in range(2):
            decoder.step(cache, sequences, beside)
        torch.cuda.synchronize()
        began = time.perf_counter()
        for _ in range(steps):
            decoder.step(cache, sequences, beside)
        torch.cuda.synchronize()
        return (time.perf_counter() - began) / steps


def asking_ms(decoder: Decoder, cache: pie.TieredKVCache, sequences: list[int]) -> float:
    """Milliseconds that a step takes the host, which asks for it."""
    took = []
    with left_as_before(cache, sequences):
        for _ in range(5):
            torch.cuda.synchronize()
            began = time.perf_counter()
            decoder.step(cache, sequences)
            took.append(1e3 * (time.perf_counter() - began))
    return statistics.median(took)


def transparency(rounds: int = 9, batch: int = 256, length: int = 3072) -> Report:
    """Decode steps resident, resident beside the same copies, and streaming, in turn.

    The shares are such that what is streamed takes from none to 1.5 times the step on the link.
    """
    layers = 8
    decoder = Decoder(layers)
    kv = 2 * 8 * 128 * 2 * length * batch * layers
    room = kv * 5 // 4
    cache, sequences = filled([length] * batch, layers, "off", room, 0)
    seconds(decoder, cache, sequences)
    base = seconds(decoder, cache, sequences, 10)
    host = torch.zeros(64 * MIB, dtype=torch.uint8, pin_memory=True)
    there = torch.empty(64 * MIB, dtype=torch.uint8, device=GPU)
    link_rate = rate_of(lambda: there.copy_(host, non_blocking=True), 64 * MIB)
    side = torch.cuda.Stream()
    points = []
    for load in (0.25, 0.5, 0.75, 1.0, 1.5):
        share = load * base * link_rate / kv
        streaming, theirs = filled(
            [length] * batch, layers, f"fixed:{share:.5f}", room, int(kv * share * 2) + 512 * MIB
        )
        seconds(decoder, streaming, theirs)
        before = streaming.stats()
        seconds(decoder, streaming, theirs)
        after = streaming.stats()
        a_step = (after.streamed_bytes - before.streamed_bytes) // (after.steps - before.steps)
        host_ms = asking_ms(decoder, streaming, theirs)
        a_layer = min(64 * MIB, a_step // layers)

        def copy(_: int, a_layer: int = a_layer) -> None:
            with torch.cuda.stream(side):
                for at in range(0, a_layer, 8 * MIB):
                    part = slice(at, min(at + 8 * MIB, a_layer))
                    there[part].copy_(host[part], non_blocking=True)

        arms: dict[str, list[float]] = {"resident": [], "beside": [], "streaming": []}
        for _ in range(rounds):
            arms["resident"].append(seconds(decoder, cache, sequences))
            arms["beside"].append(seconds(decoder, cache, sequences, beside=copy))
            arms["streaming"].append(seconds(decoder, streaming, theirs))
        ratio = [s / r for s, r in zip(arms["streaming"], arms["resident"], strict=True)]
        against = [s / b for s, b in zip(arms["streaming"], arms["beside"], strict=True)]
        points.append(
            {
                "load": load,
                "share": share,
                "streamed_bytes_a_step": a_step,
                "host_ms_a_step": host_ms,
                "stall_ms_a_step": (after.stall_ns - before.stall_ns)
                / 1e6
                / (after.steps - before.steps),
                **{f"{arm}_ms": 1e3 * statistics.median(times) for arm, times in arms.items()},
                "against_resident": statistics.median(ratio),
                "against_copies": statistics.median(against),
            }
        )
        streaming.close()
    host_ms = asking_ms(decoder, cache, sequences)
    cache.close()
    return {
        "batch": batch,
        "length": length,
        "link_gb_s": link_rate / 1e9,
        "resident_ms": 1e3 * base,
        "host_ms_a_step": host_ms,
        "points": points,
    }


def admitted(objective: str) -> Report:
    """Layers of Llama-70B's shape, and sequences by `headroom()` beside those that fill the device:
    how many, what the link could bring in a step, and what a step takes against one with all KV on
    the device.
    """
    layers, length, fitting = 4, 1056, 96  # half a block stays free
    decoder = Decoder(layers, 8192, 28672)
    one = 2 * 8 * 128 * 2 * (length + 32) * layers
    budgets = (one * fitting, 2 * one * fitting)
    cache, sequences = filled([length] * fitting, layers, "adaptive", *budgets, None, objective)
    whole, theirs = filled([length] * fitting, layers, "off", 3 * one * fitting, 0)
    waited = 0
    while waited < 12 and len(sequences) < 2 * fitting:
        waited += 1
        if cache.headroom().tokens >= length + 32:
            append(cache, sequences, length)
            append(whole, theirs, length)
            waited = 0
        seconds(decoder, cache, sequences)
    ratios, before = [], cache.stats()
    for _ in range(15):
        alone = seconds(decoder, whole, theirs)
        ratios.append(seconds(decoder, cache, sequences) / alone)
    stats = cache.stats()
    steps = stats.steps - before.steps
    found = {
        "fitting": fitting,
        "running": len(sequences),
        "step_ms": 1e3 * alone,
        "against_resident": statistics.median(ratios),
        "worst": max(ratios),
        "streamed_bytes_a_step": (stats.streamed_bytes - before.streamed_bytes) // steps,
        "link_bytes_a_step": int(stats.link_bytes_per_s * alone),
        "link_gb_s": stats.link_bytes_per_s / 1e9,
        "beside_ns_a_byte": stats.interference_ns_per_byte,
        "budget": stats.budget_reason,
    }
    cache.close()
    whole.close()
    return found


def adaptive() -> Report:
    return {objective: admitted(objective) for objective in ("transparent", "throughput")}


def model(batch: int = 8, length: int = 2016, rounds: int = 9) -> Report:
    """Decode steps of Llama-8B's shape by transformers, random weights in bf16: the cache of
    transformers, Pie's with all KV on the device, with three quarters, with a half; in turn.
    """
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM

    from pie.hf import TieredCache
    from pie.hf.generation import cache_argument

    config = LlamaConfig(
        vocab_size=128256,
        hidden_size=4096,
        intermediate_size=14336,
        num_hidden_layers=32,
        num_attention_heads=32,
        num_key_value_heads=8,
        max_position_embeddings=131072,
        dtype=torch.bfloat16,
    )
    with GPU:
        llama = LlamaForCausalLM(config).to(torch.bfloat16).eval()
    kv = 2 * 8 * 128 * 2 * 32 * (length + 64) * batch
    caches: dict[str, Any] = {"transformers": DynamicCache(config=config)}
    config._attn_implementation = "pie"
    for share in (1.0, 0.75, 0.5):
        room = int(kv * share) if share < 1 else 2 * kv
        caches[f"pie {share}"] = TieredCache(
            config, torch.bfloat16, GPU, device_bytes=room, pool_bytes=2 * kv
        )
    ids = torch.ones(batch, 1, dtype=torch.long, device=GPU)

    def step(name: str) -> None:
        config._attn_implementation = "pie" if name.startswith("pie") else "sdpa"
        arguments = cache_argument(llama, caches[name])
        llama(ids, use_cache=True, logits_to_keep=1, **arguments)
        caches[name].crop(-1)

    took: dict[str, list[float]] = {name: [] for name in caches}
    with torch.inference_mode():
        for name, cache in caches.items():
            store(cache, name, batch, length)
        before = {name: caches[name].stats() for name in list(caches)[1:]}
        for turn in range(-1, rounds):
            for name, times in took.items():
                step(name)
                torch.cuda.synchronize()
                began = time.perf_counter()
                for _ in range(4):
                    step(name)
                torch.cuda.synchronize()
                if turn >= 0:
                    times.append((time.perf_counter() - began) / 4)
    base = took["transformers"]
    found: Report = {"batch": batch, "length": length, "kv_bytes": kv}
    for name, times in took.items():
        found[f"{name}, ms"] = 1e3 * statistics.median(times)
        ratios = [t / b for t, b in zip(times, base, strict=True)]
        found[f"{name}, against transformers"] = statistics.median(ratios)
        if name != "transformers":
            stats = caches[name].stats()
            steps = stats.steps - before[name].steps
            streamed = stats.streamed_bytes - before[name].streamed_bytes
            found[f"{name}, streamed bytes a step"] = streamed // steps
            caches[name].close()
    return found


def store(cache: Any, name: str, batch: int, length: int) -> None:
    """Random K and V of so many tokens, in chunks that a small device holds."""
    for begin in range(0, length, 256):
        new = min(256, length - begin)
        query = torch.zeros(batch, 32, new, 128, device=GPU, dtype=torch.bfloat16)
        for layer in range(32):
            k, v = torch.randn(2, batch, 8, new, 128, device=GPU, dtype=torch.bfloat16)
            cache.update(k, v, layer)
            if name.startswith("pie"):
                cache.attend(layer, query, k, v, None, None)


SECTIONS: dict[str, Callable[[], Report]] = {
    "machine": machine,
    "conformance": conformance,
    "sanitizer": sanitizer,
    "kernels": kernels,
    "tokens": tokens,
    "link": link,
    "registration": registration,
    "host": host,
    "attention": attention,
    "in_place": in_place,
    "prompt": prompt,
    "transparency": transparency,
    "adaptive": adaptive,
    "model": model,
}


def entries(found: Any, name: str = "") -> Iterator[tuple[str, str]]:
    """Of what was found each number, by all its names."""
    parts = found.items() if isinstance(found, dict) else enumerate(found)
    for key, value in parts:
        full = f"{name} {key}".strip()
        if isinstance(value, dict | list):
            yield from entries(value, full)
        else:
            yield full, f"{value:.4g}" if isinstance(value, float) else str(value)


def page(report: Report) -> str:
    """The report as Markdown: a table a section."""
    lines = ["# Pie on " + str(report.get("machine", {}).get("gpu", "a GPU"))]
    for name, found in report.items():
        lines += ["", f"## {name}", "", "| what | found |", "| --- | --- |"]
        for key, value in entries(found):
            words = " ".join(value.split()).replace("|", "/")
            lines.append(f"| {key} | {words[:300]} |")
    return "\n".join(lines) + "\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--only", nargs="*", choices=SECTIONS, help="these parts")
    parser.add_argument(
        "--report", type=Path, help="where the report goes, as JSON, and a page beside it"
    )
    arguments = parser.parse_args()
    report: Report = {}
    failed = False
    for name in arguments.only or SECTIONS:
        began = time.perf_counter()
        try:
            report[name] = SECTIONS[name]()
        except Exception:
            report[name] = {"ok": False, "raised": traceback.format_exc()[-3000:]}
        report[name]["took_s"] = round(time.perf_counter() - began, 1)
        failed = failed or report[name].get("ok") is False
        print(f"== {name}")
        print(json.dumps(report[name], indent=1), flush=True)
        if arguments.report is not None:
            arguments.report.write_text(json.dumps(report, indent=1) + "\n")
            arguments.report.with_suffix(".md").write_text(page(report))
    return int(failed)


if __name__ == "__main__":
    sys.exit(main())
