"""Native loops run on torch's own OpenMP team, so that two teams never wait for one core."""

from __future__ import annotations

import re
import warnings
from pathlib import Path

import torch

from pie import _core

_lent_threads = 0


def lend_threads() -> None:
    """Runs the native loops on torch's own OpenMP team, of the size that torch has now."""
    global _lent_threads
    threads = torch.get_num_threads()
    if threads == _lent_threads:
        return
    _lent_threads = threads
    if threads > 1 and not any(_core.use_openmp(path, threads) for path in _openmp_libraries()):
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
