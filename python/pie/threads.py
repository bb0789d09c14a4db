"""Native loops run on torch's own OpenMP team, so that two teams never wait for one core."""

from __future__ import annotations

import re
import threading
import warnings
from pathlib import Path

import torch

from pie import _core


class _Lent(threading.local):
    threads = 1  # as many as native loops of this thread run on


_lent = _Lent()


def lend_threads() -> None:
    """Runs this thread's native loops on torch's OpenMP team, of the size that torch has now."""
    threads = torch.get_num_threads()
    if threads == _lent.threads:
        return
    _lent.threads = threads
    if not any(_core.use_openmp(path, threads) for path in _openmp_libraries()) and threads > 1:
        warnings.warn(
            "torch's OpenMP library was not found in this process, so Pie attends on one thread.",
            RuntimeWarning,
            stacklevel=2,
        )


def _openmp_libraries() -> list[str]:
    """Paths of the OpenMP libraries that are loaded, torch's first."""
    maps = Path("/proc/self/maps").read_text()
    paths = sorted(set(re.findall(r"(/\S*/lib(?:gomp|omp|iomp5)[-.]\S*)$", maps, re.MULTILINE)))
    return sorted(paths, key=lambda path: "/torch" not in path)
