"""The attention function that transformers calls for `attn_implementation="pie"`.

A cache in this mode does not hand K and V to the model: `TieredCache.update()` returns the new ones
wrapped in `PendingKV`, which remembers its cache and layer and refuses to be computed with. Only
`attention` below unwraps it, so a model whose attention goes elsewhere meets a sentence, never
wrong tokens. Where a model runs without such a cache (to score a text, or in code that brings a
cache of its own), masks and attention are those of "sdpa".
"""

from __future__ import annotations

from types import FunctionType
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface
from transformers.integrations.sdpa_attention import sdpa_attention_forward
from transformers.masking_utils import (
    AttentionMaskInterface,
    causal_mask_function,
    sdpa_mask,
    sliding_window_causal_mask_function,
)

from pie._core import ConfigError, LogicError

if TYPE_CHECKING:
    from pie.hf.cache import TieredCache

# Keyword arguments that transformers hands to every attention and that change nothing here:
# positions have been applied to q and k already, the rest is the model's bookkeeping.
_HARMLESS = frozenset(
    {
        "cache_position",
        "num_items_in_batch",
        "output_hidden_states",
        "output_router_logits",
        "position_ids",
        "use_cache",
    }
)
# Values of further arguments that ask for nothing.
_NEUTRAL = {"is_causal": True, "output_attentions": False}

_PROPERTIES = ("shape", "ndim", "dtype", "device")
_READABLE = {getattr(torch.Tensor, name).__get__ for name in _PROPERTIES}
_READABLE |= {torch.Tensor.size, torch.Tensor.dim}


class TieredLength(int):
    """The length of K and V that a TieredCache tells, by which `mask` knows whom it is for."""


class PendingKV(torch.Tensor):
    """K or V of one layer's new tokens, on its way from the model to `attention`."""

    cache: TieredCache
    layer: int
    rows: torch.Tensor  # what is wrapped, [batch, kv_heads, tokens, head_dim]

    @classmethod
    def wrap(cls, cache: TieredCache, layer: int, rows: torch.Tensor) -> PendingKV:
        pending: PendingKV = rows.as_subclass(cls)
        pending.cache = cache
        pending.layer = layer
        pending.rows = rows
        return pending

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: Any = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func in _READABLE:
            with torch._C.DisableTorchFunctionSubclass():
                return func(*args, **(kwargs or {}))
        if torch._guards.TracingContext.try_get() is not None:
            raise ConfigError(
                "torch.compile does not reach through the attention 'pie': run this model without "
                "it. (A model that calls pie.TieredKVCache.attend itself can be compiled.)"
            )
        raise ConfigError(
            f"The model computes with K or V itself ({getattr(func, '__name__', func)}) instead of "
            "calling the attention function 'pie', so this cache cannot serve it: load it with "
            "another attn_implementation, such as 'eager', and make a new pie.hf.TieredCache."
        )


@torch.compiler.disable  # type: ignore[untyped-decorator]
def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Appends the pending K and V and attends; returns `[batch, tokens, heads, head_dim]`."""
    if not isinstance(key, PendingKV) or not isinstance(value, PendingKV):
        beyond = [name for name in ("softcap", "s_aux") if kwargs.get(name) is not None]
        if beyond:
            raise LogicError(
                "Without a pie.hf.TieredCache 'pie' attends as 'sdpa' does, which knows no "
                f"{beyond[0]}, and {type(module).__name__} asks for it: pass a TieredCache made "
                "with the config that says 'pie', or load the model with 'eager'."
            )
        inputs = (module, query, key, value, attention_mask)
        plain: tuple[torch.Tensor, None] = sdpa_attention_forward(
            *inputs, dropout=dropout, scaling=scaling, **kwargs
        )
        return plain
    if dropout:
        raise _refusal(module, "dropout", dropout)
    cache, soft_cap, sinks = key.cache, 0.0, None
    for name, argument in kwargs.items():
        if name == "sliding_window":
            if (argument or 0) != cache.window(key.layer):
                raise _refusal(module, name, argument)
        elif argument is None or name in _HARMLESS or argument is _NEUTRAL.get(name):
            continue
        elif name == "softcap":
            soft_cap = float(argument)
        elif name == "s_aux":
            sinks = argument.detach().float().contiguous()
        else:
            raise _refusal(module, name, argument)
    if not getattr(module, "is_causal", True):
        raise _refusal(module, "is_causal", False)
    rows = (query, key.rows, value.rows)
    return cache.attend(key.layer, *rows, attention_mask, scaling, soft_cap, sinks), None


def _refusal(module: torch.nn.Module, name: str, argument: object) -> ConfigError:
    said = f"a {type(argument).__name__}" if isinstance(argument, torch.Tensor) else repr(argument)
    return ConfigError(
        f"{type(module).__name__} asks its attention for {name}={said}, which the attention 'pie' "
        "does not do: load the model with another attn_implementation."
    )


def mask(
    *,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    local_size: int | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask that models get for "pie": the 2-D padding mask, None where it hides nothing.

    Causality and a layer's window need no mask. Any other pattern (chunks, packed sequences,
    images) is refused. Without a TieredCache it is the mask of "sdpa".
    """
    if not isinstance(kv_length, TieredLength):
        plain: torch.Tensor | None = sdpa_mask(
            kv_length=kv_length,
            mask_function=mask_function,
            attention_mask=attention_mask,
            local_size=local_size,
            **kwargs,
        )
        return plain
    wanted = sliding_window_causal_mask_function(local_size) if local_size else causal_mask_function
    if not _same(mask_function, wanted):
        raise ConfigError(
            "The model asks for an attention mask that is not plainly causal, with or without a "
            "sliding window (chunks, blocks or packed sequences), which the attention 'pie' does "
            "not do: load it with another attn_implementation."
        )
    if attention_mask is None:
        return None
    if attention_mask.dim() != 2 or attention_mask.shape[1] < kv_length:
        raise ConfigError(
            f"attention_mask has shape {list(attention_mask.shape)}: it must be [batch, tokens] "
            f"and cover the {kv_length} tokens of cache and input."
        )
    attention_mask = attention_mask[:, :kv_length].bool()
    return None if bool(attention_mask.all()) else attention_mask


def _same(one: Any, other: Any) -> bool:
    """Whether two values are equal; functions, when their code and what they enclose is."""
    if isinstance(one, FunctionType) and isinstance(other, FunctionType):
        pairs = zip(one.__closure__ or (), other.__closure__ or (), strict=False)
        return one.__code__ is other.__code__ and all(
            _same(mine.cell_contents, theirs.cell_contents) for mine, theirs in pairs
        )
    if isinstance(one, tuple) and isinstance(other, tuple):
        return len(one) == len(other) and all(map(_same, one, other))
    return type(one) is type(other) and bool(one == other)


def register() -> None:
    """Makes the name "pie" known to transformers, for attention and for masks."""
    AttentionInterface.register("pie", attention)
    AttentionMaskInterface.register("pie", mask)
