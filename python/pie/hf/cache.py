"""TieredCache: what `model.generate(past_key_values=...)` of transformers stores K and V in.

Two modes, decided by the config's attention when the cache is made:

gather    the model's own attention. Every `update()` returns all K and V of the layer, copied
          together. Padding is stored like any token; the model's mask hides it.
in place  `attn_implementation="pie"`. Nothing is copied together: the attention reads K and V where
          they lie. Left padding is not stored, so the rows of a batch differ in length.

One forward pass is one step: it opens at layer 0, is finished after the last layer, and is taken
back at the next layer 0 if it never got there.
"""

from __future__ import annotations

import json
import os
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig

from pie._core import ConfigError, LogicError
from pie.cache import Stats, TieredKVCache, torch_dtype
from pie.hf.attention import PendingKV


def geometry(config: PreTrainedConfig) -> tuple[int, int, int]:
    """(layers, KV heads, head_dim) of a model's KV; ConfigError where Pie cannot hold it."""
    config = config.get_text_config(decoder=True)
    what = _unsupported(config)
    if what is not None:
        raise ConfigError(f"Models of type {config.model_type!r} {what}, which Pie does not hold.")
    heads = config.num_attention_heads
    return (
        config.num_hidden_layers,
        getattr(config, "num_key_value_heads", None) or heads,
        getattr(config, "head_dim", None) or config.hidden_size // heads,
    )


def windows(config: PreTrainedConfig) -> list[int]:
    """Of each layer, how many tokens a token sees, itself included; 0 is all."""
    config = config.get_text_config(decoder=True)
    size = getattr(config, "sliding_window", None) or 0
    kinds = getattr(config, "layer_types", None) or ["sliding_attention"] * config.num_hidden_layers
    return [size if kind == "sliding_attention" else 0 for kind in kinds]


def context(config: PreTrainedConfig) -> int | None:
    """Tokens that the model was made for; None where it does not say, or stretches."""
    config = config.get_text_config(decoder=True)
    if '"dynamic"' in json.dumps(getattr(config, "rope_parameters", None), default=str):
        return None
    return getattr(config, "max_position_embeddings", None)


def _unsupported(config: PreTrainedConfig) -> str | None:
    """What in this config is beyond Pie, as the predicate of a sentence."""
    others = set(getattr(config, "layer_types", None) or ())
    others -= {"full_attention", "sliding_attention"}
    if others:
        return f"with layers other than full or sliding attention ({', '.join(sorted(others))})"
    if getattr(config, "is_encoder_decoder", False):
        return "with an encoder"
    if getattr(config, "is_heterogeneous", False):
        return "with a geometry that differs between layers"
    if getattr(config, "attention_chunk_size", None) is not None:
        return f"with attention_chunk_size={config.attention_chunk_size}"
    if getattr(config, "num_kv_shared_layers", 0):
        return "with layers that share their K and V"
    if getattr(config, "kv_lora_rank", None) is not None:
        return "with compressed K and V (kv_lora_rank)"
    return None


class TieredCache(Cache):
    """KV cache of one batch, for `generate` and `forward`, over device memory and a pool behind it.

    config: the model's; its attention implementation decides the mode, and is checked at use.
    dtype: of K and V; by default that of the config. device: "cpu", or None for that.
    The other arguments are those of pie.TieredKVCache. `kv` is the TieredKVCache underneath.
    """

    def __init__(
        self,
        config: PreTrainedConfig,
        dtype: torch.dtype | str | None = None,
        device: torch.device | str | None = None,
        *,
        device_bytes: int | str,
        pool_bytes: int | str | None = "auto",
        pool_dir: str | os.PathLike[str] | None = None,
        block_tokens: int | None = None,
        policy: str = "fit",
    ) -> None:
        super().__init__(layers=[])
        layers, kv_heads, head_dim = geometry(config)
        text_config = config.get_text_config(decoder=True)
        dtype = dtype if dtype is not None else getattr(text_config, "dtype", None)
        if dtype is None:
            raise ConfigError("The config names no dtype: give dtype=model.dtype.")
        self.in_place = text_config._attn_implementation == "pie"
        self.kv = TieredKVCache(
            layers,
            kv_heads,
            head_dim,
            torch_dtype(dtype),
            device if device is not None else "cpu",
            device_bytes=device_bytes,
            pool_bytes=pool_bytes,
            pool_dir=pool_dir,
            block_tokens=block_tokens,
            policy=policy,
            windows=windows(config),
        )
        self._windows = windows(config)
        self._context = context(config)
        self._sequences: list[int] = []  # one for each row of the batch
        self._length = 0  # tokens seen, padding included
        self._pads = [0]  # of each row, how many of them are padding that is not stored
        self._due = 0  # the layer that comes next; 0 where no step is open
        self._broke_at = 0  # where the last unfinished forward ended
        # Of the open step:
        self._new = 0  # tokens that every row gains, padding included
        self._new_pads = [0]
        self._masks: list[torch.Tensor | None] = []  # of its layers, all the same
        self._real: torch.Tensor | None = None  # indices of new rows to store; None: all

    # What a model calls in its forward pass.

    @torch.compiler.disable  # type: ignore[untyped-decorator]
    def update(
        self,
        key_states: torch.Tensor,
        value_states: torch.Tensor,
        layer_idx: int,
        *args: Any,
        **kwargs: Any,
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Takes the new K and V of a layer, `[batch, kv_heads, tokens, head_dim]` each."""
        self._check_states(key_states, value_states)
        if layer_idx == 0:
            self._take_back()
        elif layer_idx != self._due:
            raise LogicError(
                f"Layer {layer_idx} came where layer {self._due} was due: every layer must update "
                "this cache once in each forward pass, in order."
            )
        if self.in_place:
            return (
                PendingKV.wrap(self, layer_idx, key_states),
                PendingKV.wrap(self, layer_idx, value_states),
            )
        if layer_idx == 0:
            self._open(key_states.shape[0], key_states.shape[2], [0] * key_states.shape[0])
        gathered = self.kv.gather(layer_idx, _packed(key_states), _packed(value_states))
        self._advance()
        return gathered

    def attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        scaling: float | None,
        soft_cap: float = 0.0,
        sinks: torch.Tensor | None = None,
    ) -> torch.Tensor:
        """Appends a layer's K and V and attends; for the attention function "pie" to call."""
        batch, heads, tokens, head_dim = query.shape
        if layer != self._due:
            raise LogicError(f"Layer {layer} attends where layer {self._due} is due.")
        if layer == 0:
            self._open(batch, tokens, self._pads_of(mask, batch, tokens))
            self._masks = [mask]
        elif not any(mask is known for known in self._masks):
            self._check_same(mask)
        rows = [_packed(query), _packed(key), _packed(value)]
        options: dict[str, Any] = {"scale": scaling, "soft_cap": soft_cap, "sinks": sinks}
        if self._real is None:
            out: torch.Tensor = self.kv.attend(layer, *rows, **options)
        else:
            real = [matrix.index_select(0, self._real) for matrix in rows]
            attended = self.kv.attend(layer, *real, **options)
            out = query.new_zeros((batch * tokens, heads, head_dim))
            out.index_copy_(0, self._real, attended)
        self._advance()
        return out.view(batch, tokens, heads, head_dim)

    def window(self, layer: int) -> int:
        """How many tokens a token sees in a layer, itself included; 0 is all."""
        return self._windows[layer]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, left padding included."""
        return self._length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(length, offset) of the K and V that a query of `query_length` new tokens sees."""
        return self._length + int(query_length), 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no maximum."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: no maximum. (The older name of `get_max_length`.)"""
        return -1

    # What `generate` and users call between forward passes.

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -n tokens where n is negative, keeps the first n where positive."""
        self._take_back()
        count = int(tokens_to_remove)
        length = min(count, self._length) if count > 0 else max(0, self._length + count)
        self._pads = [min(pad, length) for pad in self._pads]
        for sequence, pad in zip(self._sequences, self._pads, strict=True):
            self.kv.truncate(sequence, length - pad)
        self._length = length

    def reset(self) -> None:
        """Forgets everything: the next forward pass may bring a batch of another size."""
        self._take_back()
        for sequence in self._sequences:
            self.kv.free(sequence)
        self._sequences = []
        self._pads = [0]
        self._length = 0

    def stats(self) -> Stats:
        """Counters and gauges of the TieredKVCache underneath."""
        return self.kv.stats()

    def check(self) -> None:
        """Raises LogicError naming the first invariant that does not hold."""
        self.kv.check()

    def close(self) -> None:
        """Gives all memory back."""
        self.kv.close()

    def __enter__(self) -> TieredCache:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def reorder_cache(self, beam_idx: torch.Tensor) -> None:
        """Row i becomes what row beam_idx[i] was; what rows have in common is held once."""
        self._select(beam_idx.tolist())

    def batch_repeat_interleave(self, repeats: int) -> None:
        """Every row becomes `repeats` rows, one after the other."""
        self._select([row for row in range(len(self._sequences)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows that `indices` names, or for which it is true."""
        if indices.dtype is torch.bool:
            indices = indices.nonzero()[:, 0]
        self._select(indices.tolist())

    def _select(self, rows: list[int]) -> None:
        self._take_back()
        if not self._sequences:
            return
        if any(not -len(self._sequences) <= row < len(self._sequences) for row in rows):
            raise LogicError(f"Rows {rows} of a batch of {len(self._sequences)} were asked for.")
        free, taken = set(self._sequences), []
        for row in rows:
            sequence = self._sequences[row]
            taken.append(sequence if sequence in free else self.kv.fork(sequence))
            free.discard(sequence)
        for sequence in free:
            self.kv.free(sequence)
        self._sequences = taken
        self._pads = [self._pads[row] for row in rows]

    # What transformers asks about every cache.

    def __len__(self) -> int:
        return self.kv.num_layers

    def __repr__(self) -> str:
        mode = "in place" if self.in_place else "gather"
        return f"TieredCache(layers={len(self)}, tokens={self._length}, {mode})"

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first forward pass."""
        return len(self._sequences) or -1

    @property
    def is_initialized(self) -> bool:
        """Always: nothing is made lazily."""
        return True

    @property
    def is_compileable(self) -> bool:
        """Never: its shapes change from step to step."""
        return False

    @property
    def is_croppable(self) -> bool:
        """Whether `crop` always can; layers with a window have given old frames back."""
        return not any(self._windows)

    @property
    def is_sliding(self) -> list[bool]:
        """Which layers have a window."""
        return [window > 0 for window in self._windows]

    @property
    def is_linear(self) -> list[bool]:
        """No layer is."""
        return [False] * len(self)

    is_dummy = is_linear

    # The step.

    def _open(self, batch: int, new: int, pads: list[int]) -> None:
        longest = self._length + new - min(pads)
        if self._context is not None and longest > self._context:
            raise ConfigError(
                f"This forward pass would make a sequence of {longest} tokens, and the model's "
                f"context (max_position_embeddings) is {self._context}: give it fewer."
            )
        if not self._sequences:
            self._sequences = [self.kv.add() for _ in range(batch)]
        elif len(self._sequences) != batch:
            raise LogicError(
                f"A batch of {batch} came to a cache that holds one of {len(self._sequences)}: "
                "call reset() first, or make a new pie.hf.TieredCache."
            )
        gains = [self._length + new - max(pad, self._length) for pad in pads]
        if not any(gains):
            raise ConfigError(
                "All tokens of this forward pass are padding: leave such columns out."
            )
        entries = [
            (sequence, gain)
            for sequence, gain in zip(self._sequences, gains, strict=True)
            if gain > 0
        ]
        self.kv._begin(entries, "attend" if self.in_place else "gather")
        self._new, self._new_pads = new, pads
        self._real = None
        if sum(gains) < batch * new:
            self._real = torch.tensor(
                [row * new + token for row, n in enumerate(gains) for token in range(new - n, new)]
            )

    def _advance(self) -> None:
        """A layer is done; after the last one the step is."""
        self._due += 1
        if self._due < len(self):
            return
        self._due = 0
        self.kv._finish()
        self._length += self._new
        self._pads = self._new_pads
        self._broke_at = 0

    def _take_back(self) -> None:
        """Aborts a forward pass that did not reach the last layer."""
        if self._due == 0:
            return
        self.kv._abort()
        broke_at, self._due = self._due, 0
        again = broke_at == self._broke_at
        self._broke_at = 0 if again else broke_at
        if again:
            raise ConfigError(
                f"Two forward passes in a row updated {broke_at} of the {len(self)} layers that "
                "the config names: every layer must have attention with K and V of its own."
            )

    def _pads_of(self, mask: torch.Tensor | None, batch: int, new: int) -> list[int]:
        """Left padding of each row, which `mask` may add only to rows that hold no token yet."""
        old = self._pads if self._sequences else [0] * batch
        if mask is None:
            if any(old):
                raise LogicError(
                    "The cache holds left-padded rows: pass their attention_mask, all of it."
                )
            return old
        total = self._length + new
        if mask.shape != (batch, total):
            raise ConfigError(
                f"The attention mask has shape {list(mask.shape)}, where the attention 'pie' takes "
                f"{[batch, total]}, with zeros for left padding only."
            )
        pads: list[int] = (total - mask.sum(dim=1)).tolist()
        if not bool((mask[:, 1:] >= mask[:, :-1]).all()):
            raise ConfigError(
                "The attention mask hides tokens that are not left padding (right padding, or a "
                "hole), which the attention 'pie' does not do: pad on the left."
            )
        for pad, before in zip(pads, old, strict=True):
            if pad != before and (before < self._length or pad < before):
                raise ConfigError(
                    f"The attention mask hides {pad} tokens of a row of which {before} were hidden "
                    "when they came: it must stay the same for what the cache holds."
                )
        return pads

    def _check_same(self, mask: torch.Tensor | None) -> None:
        """Layers of one kind share a mask; those of different kinds must hide the same padding."""
        first = self._masks[0]
        if mask is None or first is None or not torch.equal(mask, first):
            raise ConfigError(
                "The model's layers attend under different masks, which the attention 'pie' does "
                "not do: load it with another attn_implementation."
            )
        self._masks.append(mask)

    def _check_states(self, key: torch.Tensor, value: torch.Tensor) -> None:
        expected = (self.kv.num_kv_heads, self.kv.head_dim)
        for name, states in (("K", key), ("V", value)):
            if states.dim() != 4 or (states.shape[1], states.shape[3]) != expected:
                raise ConfigError(
                    f"The model's {name} has shape {list(states.shape)} where its config promises "
                    f"[batch, {expected[0]}, tokens, {expected[1]}] in every layer: "
                    "Pie does not hold such a model."
                )


def _packed(states: torch.Tensor) -> torch.Tensor:
    """`[batch, heads, tokens, head_dim]` as `[batch * tokens, heads, head_dim]`."""
    rows = states.transpose(1, 2).flatten(0, 1)
    return rows if rows.stride(2) == 1 else rows.contiguous()
