"""What this machine offers to Pie: cores, memory, disk and GPU. The text of `pie info`."""

from __future__ import annotations

import contextlib
import ctypes
import fcntl
import mmap
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from pie import _core
from pie.memory import available_memory, cgroup_limit, total_memory
from pie.sizes import format_size

_TRIAL_BYTES = 256 << 20  # of the file that is written and read
_TRIAL_PIECE = 2 << 20
_TRIAL_DEPTH = 8  # pieces under way at once


class Gpu(NamedTuple):
    """What a GPU was found to do, in bytes and bytes per second."""

    total_bytes: int
    memory: float
    to_device: float
    to_host: float


def describe(pool_dir: str | None = None, model: str | None = None) -> str:
    """What this machine offers, a line each; with the weights of a model, also what a pool behind
    its GPU would gain. ConfigError where a `pool_dir` that is named cannot hold a pool, or the
    model has no weights there.
    """
    weights = None if model is None else weights_bytes(Path(model).expanduser())
    gpu, words = _gpu()
    lines = {
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} for this process",
        "attention": _core.attention_isa(),
        "memory": _memory(),
        "disk": _disk(pool_dir),
        "gpu": words,
    }
    if weights is not None:
        lines["gain"] = _gain(gpu, weights)
    return "\n".join(f"{name:<10} {text}" for name, text in lines.items())


def _memory() -> str:
    limit = cgroup_limit()
    bound = "no cgroup limit" if limit is None else f"{format_size(limit)} by the cgroup's limit"
    total, available = total_memory(), available_memory()
    return f"{format_size(total)}, {format_size(available)} available, {bound}"


def _disk(pool_dir: str | None) -> str:
    """What a pool there is reached by, and its rates; where none is named, why there is none."""
    try:
        directory = pool_dir or _core.default_pool_dir()
        way, reason = _core.try_pool(directory)
    except (_core.ConfigError, OSError) as error:
        if pool_dir is not None:
            raise
        return f"not usable as a pool: {error}"
    place = directory.removeprefix("tmpfs:")
    free = format_size(_core.free_disk_bytes(place))
    try:
        written, read = _rates(place, direct=way.startswith("direct"))
    except OSError as error:
        return f"{place}, {free} free, by {way}, not tried: {error.strerror}"
    return (
        f"{place}, {free} free, by {way}{f' ({reason})' if reason else ''}, "
        f"writes {written / 1e9:.2f} GB/s, reads {read / 1e9:.2f} GB/s"
    )


def _huge_pages(size: int) -> memoryview:
    """Memory in huge pages, as the cache's is: some virtual disks are twice as fast to them."""
    page = 2 << 20
    memory = mmap.mmap(-1, size + page, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without them
        memory.madvise(mmap.MADV_HUGEPAGE)
    begin = -ctypes.addressof(ctypes.c_char.from_buffer(memory)) % page
    whole = memoryview(memory)[begin : begin + size]
    whole[:] = b"\x01" * size
    return whole


def _rates(directory: str, direct: bool) -> tuple[float, float]:
    """Bytes per second of writes and reads, several large ones under way at once."""
    file, name = tempfile.mkstemp(dir=directory)
    os.unlink(name)
    pieces = range(0, _TRIAL_BYTES, _TRIAL_PIECE)
    buffers = [_huge_pages(_TRIAL_PIECE) for _ in range(_TRIAL_DEPTH)]

    def write(offset: int) -> None:
        buffer = buffers.pop()
        os.pwritev(file, [buffer], offset)
        buffers.append(buffer)

    def read(offset: int) -> None:
        buffer = buffers.pop()
        os.preadv(file, [buffer], offset)
        buffers.append(buffer)

    try:
        if direct:
            fcntl.fcntl(file, fcntl.F_SETFL, fcntl.fcntl(file, fcntl.F_GETFL) | os.O_DIRECT)
        os.posix_fallocate(file, 0, _TRIAL_BYTES)
        seconds = []
        with ThreadPoolExecutor(_TRIAL_DEPTH) as threads:
            for work in (write, read):
                began = time.perf_counter()
                list(threads.map(work, pieces))
                seconds.append(time.perf_counter() - began)
    finally:
        os.close(file)
    return _TRIAL_BYTES / seconds[0], _TRIAL_BYTES / seconds[1]


def weights_bytes(model: Path) -> int:
    """Of a .gguf file, or of the safetensors in a folder."""
    files = [model] if model.is_file() else sorted(model.glob("*.safetensors"))
    if not files:
        raise _core.ConfigError(
            f"--model is {str(model)!r}: give a .gguf file, or a folder with .safetensors files."
        )
    return sum(file.stat().st_size for file in files)


def expected_gain(gpu: Gpu, weights: int) -> float:
    """How much more KV steps can read without a stall than the device holds, as a factor.

    While a step reads the weights and the KV on the device at the rate of its memory, the link
    brings what the device does not hold: see docs/hardware.md. A twentieth of the memory is left to
    activations. 0 where the weights do not leave any for KV.
    """
    kv = gpu.total_bytes * 0.95 - weights
    if kv <= 0:
        return 0.0
    share = min(0.95, gpu.to_device / gpu.memory)
    return 1 + share * (weights + kv) / (1 - share) / kv


def _gain(gpu: Gpu | None, weights: int) -> str:
    of = f"with {format_size(weights)} of weights"
    if gpu is None:
        return f"not told {of}: there is no GPU to measure; docs/hardware.md tells of some"
    gain = expected_gain(gpu, weights)
    if gain == 0:
        return f"none {of}: they leave no memory for KV"
    note = "next to none: a pool is for what would not fit at all" if gain < 1.05 else "by a pool"
    return f"{gain:.2f} times the KV {of}, {note}"


def _gpu() -> tuple[Gpu | None, str]:
    """The GPU that is there and how fast its link is, or why none is used."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return None, "none: no NVIDIA driver (libcuda.so.1) was found"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return None, "none: the NVIDIA driver is there, but finds no device that works"
    import torch

    if torch.version.cuda is None:
        why = f"not used: torch {torch.__version__} is without CUDA"
        return None, f"{count.value} by NVIDIA, {why}"
    free, total = torch.cuda.mem_get_info()
    gpu = Gpu(total, *_rates_of(torch))
    return gpu, (
        f"{torch.cuda.get_device_name()}, {format_size(free)} of {format_size(total)} free, "
        f"memory {gpu.memory / 1e9:.0f} GB/s; link {gpu.to_device / 1e9:.1f} GB/s to the device, "
        f"{gpu.to_host / 1e9:.1f} GB/s back; "
        f"{format_size(available_memory() // 2)} of CPU memory for a pool"
    )


def _rates_of(torch: Any) -> tuple[float, float, float]:
    """Bytes per second of the device's memory, from pinned memory to it, and back."""
    host = torch.zeros(_TRIAL_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    rates = []
    for to, of in ((torch.empty_like(device), device), (device, host), (host, device)):
        to.copy_(of)
        torch.cuda.synchronize()
        began = time.perf_counter()
        to.copy_(of, non_blocking=True)
        torch.cuda.synchronize()
        rates.append(_TRIAL_BYTES / (time.perf_counter() - began))
    return 2 * rates[0], rates[1], rates[2]  # a copy reads and writes
