"""The operators `torch.ops.pie.append` and `torch.ops.pie.attend`, over frames and a table of them.

    append(frames, table, starts, positions, k, v)      writes to frames
    attend(frames, table, starts, positions, q, scale,
           window=0, soft_cap=0, sinks=None)            returns (out, lse)

frames     `[frames, 2 (K, V), kv_heads, block_tokens, head_dim]`: TieredKVCache.frames, or a tensor
           of one's own; block_tokens is a multiple of 16
table      `[batch, blocks]`, int32: which frame holds each block of each sequence, as `pages` says
starts     `[batch + 1]`, int32: where each sequence's rows start among the packed rows, and the end
positions  `[batch]`, int32: the position of each sequence's first row
k, v       `[rows, kv_heads, head_dim]`, the last stride 1; q with query heads
scale      multiplies q.k; then a `soft_cap` c makes c * tanh(s / c) of a score s
window     how many tokens a row sees, itself included; 0 is all up to itself
sinks      `[query_heads]`, float32: scores of tokens without a value
out        like q; lse: `[rows, query_heads]`, float32, the log-sum-exp of the scores

They are functions of their tensors alone, for eager use and under torch.compile. Importing this
registers them.
"""

from __future__ import annotations

from typing import Any, cast

import torch

from pie import _core
from pie._core import LogicError
from pie.threads import lend_threads

_DTYPES = (torch.float32, torch.bfloat16, torch.float16)
_GRANULE = 16  # block_tokens is a multiple of it

library: Any = cast(Any, torch.library).Library("pie", "FRAGMENT")
_PAGES = "Tensor table, Tensor starts, Tensor positions"
library.define(f"append(Tensor(a!) frames, {_PAGES}, Tensor k, Tensor v) -> ()")
library.define(
    f"attend(Tensor frames, {_PAGES}, Tensor q, float scale, int window=0, float soft_cap=0., "
    "Tensor? sinks=None) -> (Tensor out, Tensor lse)"
)


def _append(
    frames: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    positions: torch.Tensor,
    k: torch.Tensor,
    v: torch.Tensor,
) -> None:
    _check_pages(frames, table, starts, positions)
    _check_rows("k", k, frames, frames.shape[2])
    _check_rows("v", v, frames, frames.shape[2])
    if k.shape[0] != v.shape[0]:
        raise LogicError(f"k has {k.shape[0]} rows and v {v.shape[0]}: give as many.")
    _core.append_pages(frames, table, starts, positions, k.detach(), v.detach())


def _attend(
    frames: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    positions: torch.Tensor,
    q: torch.Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    _check_pages(frames, table, starts, positions)
    heads = q.shape[1] if q.dim() == 3 else 0
    if heads == 0 or heads % frames.shape[2]:
        raise LogicError(
            f"q has shape {list(q.shape)}: it must be [rows, query_heads, {frames.shape[4]}] with "
            f"query_heads a multiple of the {frames.shape[2]} KV heads."
        )
    _check_rows("q", q, frames, heads)
    if sinks is not None:
        check_sinks(sinks, heads, q.device)
    if not 0 <= window < 2**32:
        raise LogicError(f"window is {window}: give a number of tokens, or 0 for all.")
    out, lse = _attend_fake(frames, table, starts, positions, q, scale)
    lend_threads()
    pages = (frames, table, starts, positions)
    sinks = None if sinks is None else sinks.detach()
    _core.attend_pages(*pages, q.detach(), out, lse, scale, window, soft_cap, sinks)
    return out, lse


def _attend_fake(
    frames: torch.Tensor,
    table: torch.Tensor,
    starts: torch.Tensor,
    positions: torch.Tensor,
    q: torch.Tensor,
    scale: float,
    window: int = 0,
    soft_cap: float = 0.0,
    sinks: torch.Tensor | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:
    return q.new_empty(q.shape), q.new_empty(q.shape[:2], dtype=torch.float32)


library.impl("append", _append, "CPU")
library.impl("attend", _attend, "CPU")
torch.library.register_fake("pie::append", lambda *_: None, lib=library)
torch.library.register_fake("pie::attend", _attend_fake, lib=library)


def check_sinks(sinks: torch.Tensor, heads: int, device: torch.device) -> None:
    """Raises LogicError unless `sinks` has a score for each query head."""
    if (
        not isinstance(sinks, torch.Tensor)
        or sinks.shape != (heads,)
        or sinks.dtype is not torch.float32
        or not sinks.is_contiguous()
        or sinks.device != device
    ):
        raise LogicError(
            f"sinks must be a contiguous float32 tensor of shape [{heads}] on {device}, one for "
            "each query head."
        )


def _check_pages(
    frames: torch.Tensor, table: torch.Tensor, starts: torch.Tensor, positions: torch.Tensor
) -> None:
    if (
        frames.dim() != 5
        or frames.shape[1] != 2
        or frames.dtype not in _DTYPES
        or frames.shape[3] % _GRANULE
        or frames.shape[4] % 8
        or not 0 < frames.shape[4] <= 256
        or frames.stride()[1:] != frames[:0].contiguous().stride()[1:]
    ):
        raise LogicError(
            f"frames is {frames.dtype} of shape {list(frames.shape)}, strides "
            f"{list(frames.stride())}: it must be [frames, 2, kv_heads, block_tokens, head_dim] in "
            "float32, bfloat16 or float16, each frame contiguous, block_tokens a multiple of 16, "
            "head_dim one of 8 up to 256."
        )
    batch = table.shape[0] if table.dim() == 2 else 0
    wanted = {"table": (table, tuple(table.shape) if batch else ("batch", "blocks"))}
    wanted |= {"starts": (starts, (batch + 1,)), "positions": (positions, (batch,))}
    for name, (tensor, shape) in wanted.items():
        if tensor.shape != shape or tensor.dtype is not torch.int32 or not tensor.is_contiguous():
            raise LogicError(
                f"{name} is {tensor.dtype} of shape {list(tensor.shape)}: it must be contiguous "
                f"int32 of shape {list(shape)}."
            )


def _check_rows(name: str, rows: torch.Tensor, frames: torch.Tensor, heads: int) -> None:
    if rows.dim() != 3 or rows.shape[1:] != (heads, frames.shape[4]) or rows.stride(2) != 1:
        raise LogicError(
            f"{name} has shape {list(rows.shape)}: it must be [rows, {heads}, {frames.shape[4]}], "
            "contiguous in its last dimension."
        )
    if rows.dtype is not frames.dtype:
        raise LogicError(f"{name} is {rows.dtype}, the frames hold {frames.dtype}.")
    if rows.requires_grad and torch.is_grad_enabled():
        raise LogicError(
            f"{name} requires grad, which is not recorded: run under torch.no_grad(), or detach it."
        )
