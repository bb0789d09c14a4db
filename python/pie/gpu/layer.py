"""What a layer of a step on a GPU is given."""

from __future__ import annotations

from dataclasses import dataclass

import torch


@dataclass(slots=True)
class Queries:
    """What attends to a layer, and where the results go."""

    q: torch.Tensor  # [rows, heads, head_dim], as out
    out: torch.Tensor
    lse: torch.Tensor  # [rows, heads]
    scale: float
    soft_cap: float = 0.0
    sinks: torch.Tensor | None = None


@dataclass(slots=True)
class Layer:
    """What one layer of a step is given: to be attended to, or gathered, or neither."""

    number: int
    window: int
    k: torch.Tensor  # [rows, kv_heads, head_dim]
    v: torch.Tensor
    queries: Queries | None = None
    gathered: torch.Tensor | None = None  # [2, batch, kv_heads, longest, head_dim]

    @property
    def aligned(self) -> bool:
        """Whether what the caller brought begins on 16 bytes."""
        address = self.k.data_ptr() | self.v.data_ptr()
        if self.queries is not None:
            address |= self.queries.q.data_ptr() | self.queries.out.data_ptr()
            if self.queries.sinks is not None:
                address |= self.queries.sinks.data_ptr()
        return address % 16 == 0
