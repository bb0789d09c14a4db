"""A cache on a GPU, over the double of the driver and in Triton's interpreter: the same results as
on the CPU, in each order in which the double can do things, and no use of a frame that races.

A GPU itself is not needed here; `make gpu-check` says how the same is run on one.
"""

from __future__ import annotations

import ctypes
import json
import os
import shutil
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import gpu_double
import pie
from pie._core import CapacityError, ConfigError, LogicError
from pie.gpu import runtime
from pie.hf import TieredCache, generation
from pie.hf.generation import cache_argument

pytestmark = pytest.mark.skipif(
    shutil.which("nvcc") is None and not gpu_double.DOUBLE.exists(),
    reason="the CUDA plugin is built where a CUDA toolkit is",
)

ORDERS = range(3)  # earliest, latest, random


@pytest.fixture(autouse=True)
def double(monkeypatch: pytest.MonkeyPatch) -> Iterator[Any]:
    """The double in the runtime's place; no test may leave behind what it complained of."""
    library = gpu_double.library()
    monkeypatch.setattr(runtime, "make", gpu_double.Double)
    yield library
    text = ctypes.create_string_buffer(500)
    count = library.fake_take_violations(text, 500)
    library.fake_set_order(0, 1)
    assert count == 0, text.value.decode()


def frame_bytes(device: str, kv_heads: int, dim: int, dtype: torch.dtype, tokens: int) -> int:
    unit = 4096 if device == "cpu" else 256
    return -(-2 * kv_heads * tokens * dim * dtype.itemsize // unit) * unit


BATCHES = (
    [("a", 37)],
    [("b", 50)],
    [("a", 1), ("b", 1)],
    [("a", 5), ("b", 1)],
    [("b", 1), ("a", 1)],
    [("a", 1), ("b", 1)],
)


def run(
    device: str, dtype: torch.dtype, frames: int, share: float | None = None, **shape: Any
) -> tuple[list[Any], Any]:
    """Results of every layer of BATCHES, on a device of so many frames."""
    layers, kv_heads, heads, dim, tokens = 2, 2, 6, 64, shape.get("block_tokens", 16)
    frame = frame_bytes(device, kv_heads, dim, dtype, tokens)
    generator = torch.Generator().manual_seed(1)

    def draw(rows: int, count: int) -> torch.Tensor:
        return torch.randn(rows, count, dim, generator=generator).to(dtype)

    results = []
    with pie.TieredKVCache(
        layers,
        kv_heads,
        dim,
        dtype,
        device,
        device_bytes=frame * frames,
        pool_bytes=frame * 200,
        block_tokens=tokens,
        windows=shape.get("windows"),
        in_place_share=share,
        policy=shape.get("policy", "adaptive"),
    ) as cache:
        names = {"a": cache.add(), "b": cache.add()}
        for batch in BATCHES:
            rows = sum(new for _, new in batch)
            with cache.step([(names[name], new) for name, new in batch]):
                for layer in range(layers):
                    q, k, v = draw(rows, heads), draw(rows, kv_heads), draw(rows, kv_heads)
                    out, lse = cache.attend(
                        layer,
                        q,
                        k,
                        v,
                        soft_cap=shape.get("soft_cap", 0.0),
                        sinks=shape.get("sinks"),
                        return_lse=True,
                    )
                    results.append((out.float(), lse))
            cache.check()
        return results, cache.stats()


SHAPES = (
    {},
    {"windows": [0, 20]},
    {"soft_cap": 5.0, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0, 30.0, -30.0])},
    {"block_tokens": 64},
)
ERRORS = {torch.float32: 5e-6, torch.float16: 4e-3, torch.bfloat16: 4e-2}


@pytest.mark.parametrize("order", ORDERS)
@pytest.mark.parametrize(
    ("dtype", "shape"),
    [(torch.float32, shape) for shape in SHAPES]
    + [(torch.float16, SHAPES[0]), (torch.bfloat16, SHAPES[0])],
)
def test_gpu_equals_cpu(double: Any, dtype: torch.dtype, shape: Any, order: int) -> None:
    double.fake_set_order(order, 11)
    wanted, _ = run("cpu", dtype, 400, **shape)
    got, stats = run("cuda", dtype, 11, **shape)
    assert stats["streamed_bytes"] > 0 or "windows" in shape or "block_tokens" in shape
    for (out, lse), (wanted_out, wanted_lse) in zip(got, wanted, strict=True):
        assert (out - wanted_out).abs().max() < ERRORS[dtype]
        assert (lse - wanted_lse).abs().max() < 1e-4


def test_each_of_two_gpus_has_its_cache(double: Any) -> None:
    double.fake_set_devices(2)
    try:
        first, _ = run("cuda:0", torch.float32, 11)
        second, stats = run("cuda:1", torch.float32, 11)
        with pytest.raises(ConfigError, match="'cuda:2'"):
            run("cuda:2", torch.float32, 11)
    finally:
        double.fake_set_devices(1)
    assert stats["streamed_bytes"] > 0
    for (out, lse), (wanted_out, wanted_lse) in zip(second, first, strict=True):
        assert torch.equal(out, wanted_out)
        assert torch.equal(lse, wanted_lse)


def test_a_table_edited_under_an_upload_is_seen(
    double: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    double.fake_set_order(1, 11)
    monkeypatch.setattr(gpu_double.Mark, "synchronize", lambda self: None)
    run("cuda", torch.float32, 400, policy="off")  # so nothing tells how far the stream is
    said = ctypes.create_string_buffer(100)
    assert double.fake_take_violations(said, len(said)) > 0
    assert b"CPU memory is written while it may be in use" in said.value


@pytest.mark.parametrize(
    ("dtype", "frames", "shape", "share", "order"),
    [
        (torch.float32, 11, {}, 0.5, 0),
        (torch.float32, 11, {}, 0.5, 1),
        (torch.float32, 11, {}, 1, 2),
        (torch.float32, 11, {"windows": [0, 20], "soft_cap": 5.0}, 1, 2),
        (torch.float32, 7, {"block_tokens": 32}, 1, 2),
        (torch.bfloat16, 11, {}, 1, 2),
    ],
)
def test_what_is_read_in_place_is_the_same(
    double: Any, dtype: torch.dtype, frames: int, shape: Any, share: float, order: int
) -> None:
    double.fake_set_order(order, 11)
    wanted, without = run("cuda", dtype, frames, 0, **shape)
    got, stats = run("cuda", dtype, frames, share, **shape)
    assert without["in_place_bytes"] == 0 < stats["in_place_bytes"]
    assert stats["streamed_bytes"] < without["streamed_bytes"]
    for (out, lse), (wanted_out, wanted_lse) in zip(got, wanted, strict=True):
        assert (out - wanted_out).abs().max() < ERRORS[dtype]
        assert (lse - wanted_lse).abs().max() < 1e-4


def reference(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor) -> torch.Tensor:
    """Attention of the last rows to all of k and v, in float64."""
    rows, heads, dim = q.shape
    tokens, kv_heads, _ = k.shape
    k, v = (x.double().repeat_interleave(heads // kv_heads, 1) for x in (k, v))
    scores = torch.einsum("rhd,thd->hrt", q.double(), k) * dim**-0.5
    hidden = torch.arange(tokens)[None, :] > torch.arange(tokens - rows, tokens)[:, None]
    return torch.einsum("hrt,thd->rhd", scores.masked_fill(hidden, float("-inf")).softmax(-1), v)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
@pytest.mark.parametrize(
    ("kv_heads", "group", "dim"),
    [(1, 1, 64), (2, 2, 80), (1, 3, 96), (1, 7, 128), (1, 16, 64), (1, 4, 256)],
)
def test_heads_of_any_group_and_size(
    dtype: torch.dtype, kv_heads: int, group: int, dim: int
) -> None:
    frame = frame_bytes("cuda", kv_heads, dim, dtype, 16)
    generator = torch.Generator().manual_seed(2)
    kept: list[list[torch.Tensor]] = [[], []]
    with pie.TieredKVCache(
        1,
        kv_heads,
        dim,
        dtype,
        "cuda",
        device_bytes=frame * 5,
        pool_bytes=frame * 20,
        block_tokens=16,
    ) as cache:
        sequence = cache.add()
        for new in (33, 1, 19, 30, 1):
            q, k, v = (
                torch.randn(new, heads, dim, generator=generator).to(dtype)
                for heads in (kv_heads * group, kv_heads, kv_heads)
            )
            kept[0].append(k)
            kept[1].append(v)
            with cache.step([(sequence, new)]):
                out = cache.attend(0, q, k, v)
            wanted = reference(q, torch.cat(kept[0]), torch.cat(kept[1]))
            assert (out - wanted).abs().max() < ERRORS[dtype]
        assert cache.stats().streamed_bytes > 0


def test_copies_of_tables_are_what_the_tables_are() -> None:
    frame = frame_bytes("cuda", 1, 16, torch.float32, 16)
    with pie.TieredKVCache(
        2,
        1,
        16,
        torch.float32,
        "cuda",
        device_bytes=frame * 40,
        pool_bytes=frame * 200,
        block_tokens=16,
        policy="fixed:0.5",
    ) as cache:
        layers = cache._gpu
        assert layers is not None
        sequences = [cache.add() for _ in range(3)]
        for step in range(24):
            batch = [(sequence, 17 if step < 3 else 1) for sequence in sequences]
            rows = sum(new for _, new in batch)
            q = torch.zeros(rows, 1, 16)
            with cache.step(batch):
                for layer in range(2):
                    cache.attend(layer, q, q, q)
                    told, *shape = cache._core.block_tables()
                    wanted = torch.frombuffer(bytearray(told), dtype=torch.int32).view(shape)
                    assert layers._tables is not None
                    known = wanted[layer] >= 0
                    assert torch.equal(layers._tables[layer][known], wanted[layer][known])
            if step == 10:
                sequences.append(cache.fork(sequences[0]))
            if step == 15:
                cache.free(sequences.pop(1))
            cache.check()


def test_kv_is_read_once_for_a_group_of_heads(monkeypatch: pytest.MonkeyPatch) -> None:
    """Counted from the addresses that the interpreted kernel loads from."""
    from triton.runtime import interpreter

    kv_heads, heads, dim, tokens = 2, 8, 64, 200
    frame = frame_bytes("cuda", kv_heads, dim, torch.float16, 16)
    with pie.TieredKVCache(
        1, kv_heads, dim, torch.float16, "cuda", device_bytes=frame * 20, pool_bytes=0,
        block_tokens=16,
    ) as cache:  # fmt: skip
        sequence = cache.add()
        k = torch.randn(tokens, kv_heads, dim).half()
        with cache.step([(sequence, tokens)]):
            cache._run(0, k, k, None, None)
        frames = cache.frames
        begin, end = frames.data_ptr(), frames.data_ptr() + frames.shape[0] * frame
        read = 0
        load = interpreter.InterpreterBuilder.create_masked_load

        def counted(self: Any, pointers: Any, mask: Any, *rest: Any) -> Any:
            nonlocal read
            there = (pointers.data >= begin) & (pointers.data < end) & mask.data
            read += int(there.sum()) * torch.float16.itemsize
            return load(self, pointers, mask, *rest)

        monkeypatch.setattr(interpreter.InterpreterBuilder, "create_masked_load", counted)
        q = torch.randn(1, heads, dim).half()
        with cache.step([(sequence, 1)]):
            cache.attend(0, q, k[:1], k[:1])
    assert read == 2 * (tokens + 1) * kv_heads * dim * torch.float16.itemsize


class LaunchesNothing(gpu_double.Double):
    """For what is asked of the driver: kernels take no time and do nothing."""

    def launch(self, *_: Any, **__: Any) -> None:
        self.launches += 1


# Launches: the append, the attention, and what a step is told by; edits of the tables where blocks
# come and go.
@pytest.mark.parametrize(
    ("policy", "copies", "records", "launches_most"),
    [("off", 0, 0, 2.5), ("fixed:0.5", 1.1, 3, 3.5)],
)
def test_calls_of_the_driver_a_layer(
    double: Any,
    monkeypatch: pytest.MonkeyPatch,
    policy: str,
    copies: float,
    records: float,
    launches_most: float,
) -> None:
    monkeypatch.setattr(runtime, "make", LaunchesNothing)
    layers, sequences, tokens, steps = 8, 64, 250, 10  # in one of them all fill a block
    frame = frame_bytes("cuda", 1, 8, torch.float16, 16)
    room = frame * layers * sequences * (tokens // 16 + 3)
    with pie.TieredKVCache(
        layers, 1, 8, torch.float16, "cuda", device_bytes=room, pool_bytes=room, block_tokens=16,
        policy=policy,
    ) as cache:  # fmt: skip
        batch = [(cache.add(), 1) for _ in range(sequences)]
        k = torch.zeros(tokens, 1, 8).half()
        for sequence, _ in batch:
            with cache.step([(sequence, tokens)]):
                for layer in range(layers):
                    cache._run(layer, k, k, None, None)
        row = torch.zeros(sequences, 1, 8).half()

        def step() -> None:
            with cache.step(batch):
                for layer in range(layers):
                    cache.attend(layer, row, row, row)

        step()
        assert cache._runtime is not None
        before, launches = calls(double), cache._runtime.launches
        for _ in range(steps):
            step()
        made = {name: count - before.get(name, 0) for name, count in calls(double).items()}
        made = {name: count / steps / layers for name, count in made.items() if count}
        launched = (cache._runtime.launches - launches) / steps / layers
    assert made.get("cuMemcpyBatchAsync", 0) <= copies, made
    assert made.get("cuEventRecord", 0) <= records, made
    assert not [name for name in made if name.endswith("Synchronize")]
    assert launched < launches_most
    if policy == "off":
        # Whether the stream can be used, once a step. (Of contexts the double asks, too.)
        made = {name: count for name, count in made.items() if not name.startswith("cuCtx")}
        assert made == {"cuStreamGetCtx": 1 / layers, "cuStreamIsCapturing": 1 / layers}


def calls(double: Any) -> dict[str, int]:
    text = ctypes.create_string_buffer(4096)
    double.fake_counts(text, 4096)
    pairs = (pair.split("=") for pair in text.value.decode().split(";") if pair)
    return {name: int(count) for name, count in pairs}


def tiny_model(attention: str) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig(
        vocab_size=200,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        max_position_embeddings=512,
    )
    config._attn_implementation = attention
    torch.manual_seed(3)
    return LlamaForCausalLM(config).eval()


@pytest.mark.parametrize(("attention", "order"), [("pie", 0), ("pie", 1), ("pie", 2), ("eager", 2)])
def test_a_model_says_the_same(double: Any, attention: str, order: int) -> None:
    double.fake_set_order(order, 5)
    prompt = torch.randint(0, 200, (2, 60), generator=torch.Generator().manual_seed(4))
    mask = torch.ones_like(prompt)
    mask[1, :7] = 0
    made = {}
    for name in ("eager", attention):
        model = tiny_model(name)
        options: dict[str, Any] = {}
        cache = None
        if name == attention and "wanted" in made:
            frame = frame_bytes("cuda", 2, 16, torch.float32, 16)
            cache = TieredCache(
                model.config,
                torch.float32,
                "cuda",
                device_bytes=frame * 14,
                pool_bytes=frame * 99,
                block_tokens=16,
                in_place_share=1 if order == 1 else None,
            )
            options = cache_argument(model, cache)
        with torch.inference_mode():
            made["got" if cache is not None else "wanted"] = model.generate(
                prompt,
                attention_mask=mask,
                max_new_tokens=8,
                do_sample=False,
                pad_token_id=0,
                **options,
            ).tolist()
        if cache is not None:
            assert cache.stats().streamed_bytes > 0
            assert (cache.stats().in_place_bytes > 0) == (order == 1)
            cache.kv.close()
    assert made["got"] == made["wanted"]


def test_a_real_model_says_the_same(double: Any, smollm: Any) -> None:
    double.fake_set_order(2, 6)
    model, tokenizer = smollm
    prompt = tokenizer("Paging moves what is not needed now out of the way, so that " * 2).input_ids
    wanted = model.generate(torch.tensor([prompt]), max_new_tokens=4, do_sample=False)
    frame = frame_bytes("cuda", 3, 64, torch.float32, 16)
    with TieredCache(
        model.config, torch.float32, "cuda", device_bytes=frame * 48, pool_bytes=frame * 300,
        block_tokens=16,
    ) as cache:  # fmt: skip
        got = list(generation.stream(model, prompt, cache, 4))
        stats = cache.stats()
    assert got == wanted[0, len(prompt) :].tolist()
    assert stats.streamed_bytes > stats.decode_steps * stats.kv_bytes // 2


def test_the_probe_of_a_model() -> None:
    from pie.hf.loading import probe

    probe(tiny_model("pie"), "cuda")


def test_a_long_prompt_in_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny_model("pie")
    frame = frame_bytes("cuda", 2, 16, torch.float32, 16)
    cache = TieredCache(
        model.config,
        torch.float32,
        "cuda",
        device_bytes=frame * 10,
        pool_bytes=frame * 99,
        block_tokens=16,
    )
    monkeypatch.setattr(generation, "CHUNK_TOKENS", 40)
    prompt = list(range(90))
    got = list(generation.stream(model, prompt, cache, 4))
    assert cache.stats().streamed_bytes > 0
    roomy = TieredCache(model.config, torch.float32, device_bytes="4MiB", pool_bytes=0)
    assert got == list(generation.stream(model, prompt, roomy, 4))
    cache.kv.close()


# ---- refusals -----------------------------------------------------------------------------------


def small(**options: Any) -> pie.TieredKVCache:
    given = {"device_bytes": "1MiB", "pool_bytes": "1MiB", **options}
    return pie.TieredKVCache(2, 1, 16, torch.float32, given.pop("device", "cuda"), **given)


@pytest.mark.parametrize("device", ["gpu", "cuda:x", "cuda:-1", "mps", "cuda:1:2"])
def test_unknown_devices(device: str) -> None:
    with pytest.raises(ConfigError, match="use 'cpu', 'cuda' or 'cuda:N'"):
        small(device=device)


def test_without_torch_for_cuda(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(runtime, "make", runtime.Runtime)
    with pytest.raises(ConfigError, match="install torch for CUDA"):
        small()


def test_no_driver(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_double.Double, "driver", "libnothing.so.1")
    with pytest.raises(ConfigError, match="there is no NVIDIA driver here"):
        small()


def test_more_than_the_gpu_has() -> None:
    with pytest.raises(CapacityError, match=r"device_bytes is 1024.0 MiB .* are free: give less"):
        small(device_bytes="1GiB")


def test_more_than_the_machine_has() -> None:
    with pytest.raises(ConfigError, match="are free to pin: give less"):
        small(pool_bytes="900TiB")


def test_no_directory_behind_a_gpu(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match="behind a GPU the pool is CPU memory"):
        small(pool_dir=tmp_path)


def test_pages_are_not_there_yet() -> None:
    with small() as cache, pytest.raises(ConfigError, match="no reader 'pages' yet"):
        cache.step([(cache.add(), 1)], reader="pages")


@pytest.mark.parametrize("reader", ["attend", "gather"])
def test_a_step_has_one_reader(reader: Any) -> None:
    row = torch.zeros(1, 1, 16)
    with small() as cache:
        step = cache.step([(cache.add(), 1)], reader=reader)
        with pytest.raises(LogicError, match="opened for the other reader"), step:
            cache.gather(0, row, row) if reader == "attend" else cache.attend(0, row, row, row)


def test_one_stream_a_step(monkeypatch: pytest.MonkeyPatch) -> None:
    with small() as cache:
        row = torch.zeros(1, 1, 16)
        sequence = cache.add()

        def step() -> None:
            with cache.step([(sequence, 1)]):
                cache.attend(0, row, row, row)
                monkeypatch.setattr(cache._runtime, "stream", lambda: 7)
                cache.attend(1, row, row, row)

        with pytest.raises(LogicError, match="run all of a step on one stream"):
            step()
        monkeypatch.undo()
        assert cache.length(sequence) == 0


# ---- the command for a machine with a GPU --------------------------------------------------------


def test_gpu_check_runs_to_its_end(tmp_path: Path) -> None:
    """The part of it that needs no torch for CUDA, over the double."""
    program = gpu_double.DOUBLE.parent / "test_cuda"
    if not program.exists():
        pytest.skip("the tests of the core are not built")
    report = tmp_path / "report.json"
    command = [str(gpu_double.ROOT / "bench/gpu_check.py"), "--report", str(report)]
    over = {"PIE_TEST_DRIVER": str(gpu_double.DOUBLE), "PIE_TEST_CUDA": str(program)}
    ran = subprocess.run(
        [sys.executable, *command, "--only", "conformance", "sanitizer"],
        env={**os.environ, **over},
        capture_output=True,
        text=True,
        check=False,
    )
    assert ran.returncode == 0, ran.stdout + ran.stderr
    told = json.loads(report.read_text())
    assert told["conformance"]["ok"] is True
    assert "PASSED" in told["conformance"]["said"]
    assert "## conformance" in report.with_suffix(".md").read_text()


class Kernel:
    """Stands for one of Triton's: counts who asks Triton to launch it."""

    def __init__(self, ptx: str) -> None:
        self.launched: list[tuple[Any, ...]] = []
        self._compiled = SimpleNamespace(
            function=5,
            src=SimpleNamespace(signature={"to": "*i32", "count": "i32", "BLOCK": "constexpr"}),
            asm={"ptx": ptx},
            metadata=SimpleNamespace(num_ctas=1, num_warps=4, shared=0),
        )

    def __getitem__(self, grid: tuple[int, ...]) -> Any:
        def launch(*arguments: Any, num_warps: int, num_stages: int) -> Any:
            self.launched.append((grid, *arguments[1:], num_warps, num_stages))
            return self._compiled

        return launch


def test_what_was_launched_is_launched_by_the_driver() -> None:
    """Where it is known how, all begins on 16 bytes, and the driver has nothing against it."""
    answers = [0, 0, 201]
    by_driver: list[tuple[int, ...]] = []

    def entry(function: Any, x: Any, y: Any, z: Any, threads: Any, *_: Any) -> int:
        by_driver.append((function.value, x.value, y.value, z.value, threads.value))
        return answers[len(by_driver) - 1]

    gpu = runtime.Runtime.__new__(runtime.Runtime)
    gpu._launched, gpu._entry = {}, entry
    head = ".visible .entry bring(\n.param .u64 .ptr .global .align 1 a,\n.param .u32 b{}\n)\n{{"
    kernel, strange = Kernel(head.format("")), Kernel(head.format(",\n.param .f64 c"))
    to = torch.zeros(4, dtype=torch.int32)

    def launch(kernel: Kernel, rows: int, aligned: bool = True) -> None:
        gpu.launch(kernel, (rows, 2), tuple, (to,), (7,), (64,), 9, aligned)

    for rows in (1, 2, 3, 4):
        launch(kernel, rows)
    assert [one[0] for one in kernel.launched] == [(1, 2), (4, 2)], "the driver refused the last"
    assert by_driver == [(5, rows, 2, 1, 128) for rows in (2, 3, 4)]
    launch(kernel, 5, aligned=False)
    launch(strange, 1)
    launch(strange, 2)
    assert len(kernel.launched) == 3
    assert len(strange.launched) == 2
    assert len(by_driver) == 3


# ---- for real processors ------------------------------------------------------------------------

COMPILE = """
import ctypes
import pathlib
import re
import subprocess
import sys
import tempfile
import types as python_types
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from pie.gpu import kernels
from pie.gpu.launch import Launch

numbers = ("q_row q_head out_row out_head frame_stride blocks found_rows split_tokens window k_row "
           "k_head v_row v_head first_row longest batch rows count").split()
floats = "found found_lse lse sinks state state_lse".split()
kv = "q out frames k v".split()
types = {**dict.fromkeys(numbers, "i32"), **dict.fromkeys(floats, "*fp32"),
         **dict.fromkeys(kv, "*bf16"), "scale": "fp32", "soft_cap": "fp32", "pool_offset": "i64"}
aligned = "q_row q_head out_row out_head frame_stride pool_offset".split()
cuobjdump = pathlib.Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"

def compiled(kernel, constants, **options):
    names = kernel.arg_names
    first = len(names) - len(constants)
    signature = {name: types.get(name, "*i32") for name in names[:first]}
    even = [i for i, name in enumerate(signature) if signature[name][0] == "*" or name in aligned]
    signature |= dict.fromkeys(names[first:], "constexpr")
    values = {(first + i,): value for i, value in enumerate(constants)}
    source = ASTSource(kernel, signature, values, {(i,): [["tt.divisibility", 16]] for i in even})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    check_launch(made, list(signature.values()))
    return made

# What the driver is given by us for a kernel, by what Triton compiled.
def check_launch(made, kinds):
    tensors = sum(kind[0] == "*" for kind in kinds)
    given = [1000 + i for i in range(tensors)]
    numbers = [1 if kind == "constexpr" else 2 + i for i, kind in enumerate(kinds[tensors:])]
    taken = {"i32": ctypes.c_int32, "i64": ctypes.c_int64, "fp32": ctypes.c_float}
    wanted = [(taken.get(kind, ctypes.c_uint64), value)
              for kind, value in zip(kinds, given + numbers) if kind != "constexpr"]
    head = made.asm["ptx"].split(".entry")[1].split("{")[0]
    extra = head.count(".param") - len(wanted)
    assert extra in (0, 1, 2), head
    seen = []

    @ctypes.CFUNCTYPE(ctypes.c_int, ctypes.c_void_p, *[ctypes.c_uint] * 7, ctypes.c_void_p,
                      ctypes.POINTER(ctypes.c_void_p), ctypes.c_void_p)
    def entry(function, x, y, z, threads, one, other, shared, stream, places, more):
        values = [kind.from_address(places[i]).value for i, (kind, _) in enumerate(wanted)]
        values += [ctypes.c_uint64.from_address(places[len(wanted) + i]).value
                   for i in range(extra)]
        seen.append([function, x, y, z, threads, one, other, shared, stream, values, more])
        return 4

    loaded = python_types.SimpleNamespace(
        function=77, src=made.src, asm=made.asm, metadata=made.metadata)
    launch = Launch(loaded, tensors, numbers, entry)
    threads, shared = 32 * made.metadata.num_warps, made.metadata.shared
    for stream, grid in ((8, (5,)), (9, (5, 6)), (10, (5, 6, 7))):
        given = [address + stream for address in given]
        assert launch(stream, grid, given) == 4
        wanted[:tensors] = [(ctypes.c_uint64, address) for address in given]
        values = [value for _, value in wanted] + [0] * extra
        sizes = [*(*grid, 1, 1)[:3], threads, 1, 1, shared]
        assert seen.pop() == [77, *sizes, stream, values, None]

def compiled_for_one():
    source = ASTSource(kernels.bring, {"to": "*i32", "staged": "*i32", "count": "constexpr",
                                       "BLOCK": "constexpr"}, {(2,): 1, (3,): 64})
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32))
    check_launch(made, ["*i32", "*i32", "constexpr", "constexpr"])

# Registers of a thread, and bytes that did not find one.
def usage(cubin):
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        told = subprocess.run([str(cuobjdump), "--dump-resource-usage", file.name],
                              capture_output=True, text=True, check=True).stdout
    return [int(re.search(word + ":([0-9]+)", told).group(1)) for word in ("REG", "STACK")]

def check(rows, block_tokens, by_item, in_place, warps, stages):
    made = compiled(kernels.attend, (32, 8, 128, block_tokens, 128, rows, 64, not by_item, by_item,
                                     in_place, False, False, False),
                    num_warps=warps, num_stages=stages)
    ptx = made.asm["ptx"]
    registers, spilled = usage(made.asm["cubin"])
    narrow = len(re.findall("ld[.]global[.]b16", ptx))
    print(capability, "rows", rows, "blocks", block_tokens, "in place", in_place, "registers",
          registers, "shared", made.metadata.shared, "spilled", spilled, "narrow loads", narrow)
    assert made.metadata.shared <= 99 << 10 and narrow == 0
    assert spilled <= (0 if by_item or capability in (90, 100) else 128)
    assert registers * warps * 32 * 2 <= 65536  # two programs at once on a processor

for capability in map(int, sys.argv[1:]):
    check(16, 16, True, True, 2, 3)
    check(64, 64, False, False, 4, 2)
    if capability == 90:
        check(16, 64, True, False, 2, 3)
    compiled(kernels.append, (8, 128, 64, 8, 128))
    compiled(kernels.merge, (32, 128, 128, False))
    compiled(kernels.gather, (8, 128, 64, 64, 128))
    compiled(kernels.edit, (64,))
    compiled(kernels.bring, (64,))
    compiled_for_one()
"""


def test_kernels_compile() -> None:
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    ran = subprocess.run(
        [sys.executable, "-c", COMPILE, "80", "90", "100", "120"],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    print(ran.stdout)
    assert ran.returncode == 0, ran.stdout + ran.stderr
