"""What this machine offers to Pie: cores, memory, disk and GPU. The text of `pie info`."""

from __future__ import annotations

import ctypes
import fcntl
import mmap
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from pie import _core
from pie.memory import available_memory, cgroup_limit, total_memory
from pie.sizes import format_size

_TRIAL_BYTES = 256 << 20  # of the file that is written and read
_TRIAL_PIECE = 1 << 20
_TRIAL_DEPTH = 8  # pieces under way at once


def describe(pool_dir: str | None = None) -> str:
    """What this machine offers, a line each. ConfigError where a `pool_dir` that is named cannot
    hold a pool.
    """
    lines = {
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} for this process",
        "attention": _core.attention_isa(),
        "memory": _memory(),
        "disk": _disk(pool_dir),
        "gpu": _gpu(),
    }
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


def _rates(directory: str, direct: bool) -> tuple[float, float]:
    """Bytes per second of writes and reads, several large ones under way at once."""
    file, name = tempfile.mkstemp(dir=directory)
    os.unlink(name)
    pieces = range(0, _TRIAL_BYTES, _TRIAL_PIECE)

    def write(offset: int) -> None:
        with mmap.mmap(-1, _TRIAL_PIECE) as buffer:
            os.pwrite(file, buffer, offset)

    def read(offset: int) -> None:
        with mmap.mmap(-1, _TRIAL_PIECE) as buffer:
            os.preadv(file, [buffer], offset)

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


def _gpu() -> str:
    """The GPU that is there and how fast its link is, or why none is used."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "none: no NVIDIA driver (libcuda.so.1) was found"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return "none: the NVIDIA driver is there, but finds no device that works"
    import torch

    if torch.version.cuda is None:
        return f"{count.value} by NVIDIA, not used: torch {torch.__version__} is without CUDA"
    free, total = torch.cuda.mem_get_info()
    to_device, to_host = _link_rates(torch)
    return (
        f"{torch.cuda.get_device_name()}, {format_size(free)} of {format_size(total)} free; link "
        f"{to_device / 1e9:.1f} GB/s to the device, {to_host / 1e9:.1f} GB/s back; "
        f"{format_size(available_memory() // 2)} of CPU memory for a pool"
    )


def _link_rates(torch: Any) -> tuple[float, float]:
    """Bytes per second from pinned memory to the device, and back."""
    host = torch.zeros(_TRIAL_BYTES, dtype=torch.uint8, pin_memory=True)
    device = torch.empty_like(host, device="cuda")
    rates = []
    for to, of in ((device, host), (host, device)):
        to.copy_(of)
        torch.cuda.synchronize()
        began = time.perf_counter()
        to.copy_(of, non_blocking=True)
        torch.cuda.synchronize()
        rates.append(_TRIAL_BYTES / (time.perf_counter() - began))
    return rates[0], rates[1]
