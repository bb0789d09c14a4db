"""What this machine offers to Pie: cores, memory, disk and GPU. The text of `pie info`."""

from __future__ import annotations

import ctypes
import mmap
import os
import tempfile
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from pie import _core
from pie.sizes import format_size

_TRIAL_BYTES = 256 << 20  # of the file that is written and read
_TRIAL_PIECE = 1 << 20
_TRIAL_DEPTH = 8  # pieces under way at once


def describe(pool_dir: str | None = None) -> str:
    """What this machine offers, a line each."""
    lines = {
        "cores": f"{len(os.sched_getaffinity(0))} of {os.cpu_count()} for this process",
        "attention": _core.attention_isa(),
        "memory": _memory(),
        "disk": _disk(pool_dir),
        "gpu": _gpu(),
    }
    return "\n".join(f"{name:<10} {text}" for name, text in lines.items())


def available_memory() -> int:
    """Bytes of RAM that this process may still take, its cgroup's limit considered."""
    available = _meminfo("MemAvailable")
    limit = cgroup_limit()
    if limit is not None:
        used = _number("/sys/fs/cgroup/memory.current")
        available = min(available, limit - (used or 0))
    return max(0, available)


def cgroup_limit() -> int | None:
    """Bytes of RAM that this process's cgroup allows; None where there is no limit."""
    limits = ("/sys/fs/cgroup/memory.max", "/sys/fs/cgroup/memory/memory.limit_in_bytes")
    found = [number for number in map(_number, limits) if number is not None]
    return min((number for number in found if number < _meminfo("MemTotal")), default=None)


def _memory() -> str:
    limit = cgroup_limit()
    bound = "no cgroup limit" if limit is None else f"{format_size(limit)} by the cgroup's limit"
    total, available = _meminfo("MemTotal"), available_memory()
    return f"{format_size(total)}, {format_size(available)} available, {bound}"


def _meminfo(key: str) -> int:
    for line in Path("/proc/meminfo").read_text().splitlines():
        if line.startswith(key + ":"):
            return int(line.split()[1]) * 1024
    return 0


def _number(path: str) -> int | None:
    try:
        text = Path(path).read_text().strip()
    except OSError:
        return None
    return int(text) if text.isdigit() else None


def _disk(pool_dir: str | None) -> str:
    try:
        directory = (pool_dir or "").removeprefix("tmpfs:") or _core.default_pool_dir()
        free = format_size(_core.free_disk_bytes(directory))
        written, read = _direct_rates(directory)
    except (_core.ConfigError, OSError) as error:
        return f"not usable as a pool: {error}"
    return (
        f"{directory}, {free} free, direct I/O writes {written / 1e9:.2f} GB/s, "
        f"reads {read / 1e9:.2f} GB/s"
    )


def _direct_rates(directory: str) -> tuple[float, float]:
    """Bytes per second of direct writes and reads, several large ones under way at once."""
    file, name = tempfile.mkstemp(dir=directory)
    os.close(file)
    file = os.open(name, os.O_RDWR | os.O_DIRECT)
    os.unlink(name)
    pieces = range(0, _TRIAL_BYTES, _TRIAL_PIECE)

    def write(offset: int) -> None:
        with mmap.mmap(-1, _TRIAL_PIECE) as buffer:
            os.pwrite(file, buffer, offset)

    def read(offset: int) -> None:
        with mmap.mmap(-1, _TRIAL_PIECE) as buffer:
            os.preadv(file, [buffer], offset)

    try:
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
    """The GPU that is there, or why none is used; its driver is asked, nothing runs on it."""
    try:
        driver = ctypes.CDLL("libcuda.so.1")
    except OSError:
        return "none: no NVIDIA driver (libcuda.so.1) was found"
    count = ctypes.c_int(0)
    if driver.cuInit(0) != 0 or driver.cuDeviceGetCount(ctypes.byref(count)) != 0:
        return "none: the NVIDIA driver is there, but finds no device that works"
    return f"{count.value} by NVIDIA, not used: this build of Pie computes on the CPU only"
