"""The attention function that transformers calls for `attn_implementation="pie"`.

A cache in this mode does not hand K and V to the model: `TieredCache.update()` returns the new ones
wrapped in `PendingKV`, which remembers its cache and layer and refuses to be computed with. Only
`attention` below unwraps it, so a model whose attention goes elsewhere meets a sentence, never
wrong tokens.
"""

from __future__ import annotations

import inspect
from typing import TYPE_CHECKING, Any

import torch
from transformers import AttentionInterface
from transformers.masking_utils import AttentionMaskInterface, causal_mask_function

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
        raise ConfigError(
            f"The model computes with K or V itself ({getattr(func, '__name__', func)}) instead of "
            "calling the attention function 'pie', so this cache cannot serve it: load it with "
            "another attn_implementation, such as 'eager', and make a new pie.hf.TieredCache."
        )


def attention(
    module: torch.nn.Module,
    query: torch.Tensor,
    key: torch.Tensor,
    value: torch.Tensor,
    attention_mask: torch.Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: torch.Tensor | None = None,
    **kwargs: Any,
) -> tuple[torch.Tensor, None]:
    """Appends the pending K and V and attends; returns `[batch, tokens, heads, head_dim]`."""
    if not isinstance(key, PendingKV) or not isinstance(value, PendingKV):
        raise LogicError(
            "attn_implementation='pie' attends to a pie.hf.TieredCache made for it: pass "
            "past_key_values=pie.hf.TieredCache(model.config, ...) with the config that says 'pie'."
        )
    if dropout:
        raise _refusal(module, "dropout", dropout)
    for name, argument in kwargs.items():
        if argument is not None and name not in _HARMLESS and argument is not _NEUTRAL.get(name):
            raise _refusal(module, name, argument)
    if not getattr(module, "is_causal", True):
        raise _refusal(module, "is_causal", False)
    cache, layer = key.cache, key.layer
    if sliding_window is not None and sliding_window != cache.windows[layer]:
        raise _refusal(module, "sliding_window", sliding_window)
    attended = cache.attend(
        layer, query, key.rows, value.rows, attention_mask, scaling, softcap, s_aux
    )
    return attended, None


def _refusal(module: torch.nn.Module, name: str, argument: object) -> ConfigError:
    said = f"a {type(argument).__name__}" if isinstance(argument, torch.Tensor) else repr(argument)
    return ConfigError(
        f"{type(module).__name__} asks its attention for {name}={said}, which the attention 'pie' "
        "does not do: load the model with another attn_implementation."
    )


def mask(
    *args: Any,
    kv_length: int,
    mask_function: Any = causal_mask_function,
    attention_mask: torch.Tensor | None = None,
    **kwargs: Any,
) -> torch.Tensor | None:
    """The mask that models get for "pie": the 2-D padding mask, None where it hides nothing.

    Causality needs no mask, nor do the sliding windows of the config, which the cache knows. Any
    other pattern (chunks, packed sequences, images) is refused.
    """
    window = getattr(kwargs.get("config"), "sliding_window", None)
    if mask_function is not causal_mask_function and not _is_sliding(mask_function, window):
        raise ConfigError(
            "The model asks for an attention mask that is neither plainly causal nor the sliding "
            "window of its config (chunks, blocks or packed sequences), which the attention 'pie' "
            "does not do: load it with another attn_implementation."
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


def _is_sliding(mask_function: Any, window: int | None) -> bool:
    """Whether this is what transformers makes of one sliding window of this size, and no more.

    A mask function tells nothing of itself but its name and what it closes over.
    """
    if window is None or "and_masks" not in getattr(mask_function, "__qualname__", ""):
        return False
    parts = inspect.getclosurevars(mask_function).nonlocals.get("mask_functions", ())
    if len(parts) != 2 or parts[1] is not causal_mask_function:
        return False
    overlay = parts[0]
    if not overlay.__qualname__.startswith("sliding_window_overlay."):
        return False
    return bool(inspect.getclosurevars(overlay).nonlocals == {"sliding_window": window})


def register() -> None:
    """Makes the name "pie" known to transformers, for attention and for masks."""
    AttentionInterface.register("pie", attention)
    AttentionMaskInterface.register("pie", mask)
