"""What a layer of a step on a GPU is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class Queries:
    """What attends to a layer, and where the results go."""

    q: torch.Tensor  # [rows, heads, head_dim], as out
    out: torch.Tensor
    lse: torch.Tensor  # [rows, heads]
    scale: float
    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None


@dataclass(frozen=True)
class Layer:
    """What one layer of a step is given: to be attended to, or gathered, or neither."""

    number: int
    window: int
    k: torch.Tensor  # [rows, kv_heads, head_dim]
    v: torch.Tensor
    queries: Queries | None = None
    gathered: torch.Tensor | None = None  # [2, batch, kv_heads, longest, head_dim]
