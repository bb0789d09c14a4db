"""Pie: language models whose running requests hold more KV cache than device memory.

Importing this package imports no torch, starts no thread and touches no device; the names that
need torch are loaded when they are first used.
"""

from __future__ import annotations

import importlib
from typing import TYPE_CHECKING, Any

from pie._core import CapacityError, ConfigError, IoError, LogicError

if TYPE_CHECKING:
    from pie import hf, ops, report
    from pie.cache import Headroom, TieredKVCache
    from pie.policy import Policy
    from pie.stats import Stats
    from pie.trace import Trace

__all__ = [
    "CapacityError",
    "ConfigError",
    "Headroom",
    "IoError",
    "LogicError",
    "Policy",
    "Stats",
    "TieredKVCache",
    "Trace",
    "hf",
    "ops",
    "report",
]

# Where names are that are loaded when they are first used.
_HOME = {
    "Headroom": "cache",
    "Policy": "policy",
    "Stats": "stats",
    "TieredKVCache": "cache",
    "Trace": "trace",
}


def __getattr__(name: str) -> Any:
    if name in _HOME:
        return getattr(importlib.import_module(f"pie.{_HOME[name]}"), name)
    if name in ("hf", "ops", "report"):
        return importlib.import_module(f"pie.{name}")
    if name == "__version__":
        return importlib.import_module("importlib.metadata").version("pie-core")
    raise AttributeError(f"module 'pie' has no attribute {name!r}")
