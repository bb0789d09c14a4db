"""TieredCache: what `model.generate(past_key_values=...)` of transformers stores K and V in.

Two modes, decided by the config's attention when the cache is made:

gather    the model's own attention. Every `update()` returns all K and V of the layer, copied
          together. Padding is stored like any token; the model's mask hides it.
in place  `attn_implementation="pie"`. Nothing is copied together: the attention reads K and V where
          they lie. Left padding is not stored, so the rows of a batch differ in length.

One forward pass is one step: it opens at layer 0 and is finished after the last layer. One that
fails is taken back, at once or by the next call, whatever has interrupted it: whether a step is
open, and whether it was finished, is asked of the cache underneath and never remembered here.
"""

from __future__ import annotations

import json
import os
import warnings
from collections.abc import Sequence
from contextlib import AbstractContextManager, suppress
from dataclasses import dataclass, field
from typing import Any

import torch
from transformers import Cache, PreTrainedConfig

from pie._core import ConfigError, LogicError
from pie.cache import TieredKVCache, torch_dtype
from pie.hf.attention import PendingKV, TieredLength
from pie.policy import Policy
from pie.stats import Stats


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


def positions(config: PreTrainedConfig) -> int | None:
    """How many positions the model has in a table; None where it computes them, however many."""
    config = config.get_text_config(decoder=True)
    if getattr(config, "rope_parameters", None) is not None:
        return None
    return getattr(config, "max_position_embeddings", None)


def context(config: PreTrainedConfig) -> int | None:
    """Tokens that the model was made for; None where it does not say, or stretches."""
    config = config.get_text_config(decoder=True)
    made_for: int | None = getattr(config, "max_position_embeddings", None)
    rope = getattr(config, "rope_parameters", None)
    if made_for is None or '"dynamic"' in json.dumps(rope, default=str):
        return None
    for scaling in (rope, *rope.values()) if isinstance(rope, dict) else ():
        if isinstance(scaling, dict) and scaling.get("factor"):
            original = scaling.get("original_max_position_embeddings") or made_for
            made_for = max(made_for, int(original * scaling["factor"]))
    return made_for


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


@dataclass(frozen=True)
class _Rows:
    """The rows of the batch, as finished forward passes have left them."""

    sequences: tuple[int, ...] = ()
    pads: tuple[int, ...] = (0,)  # of each row, how many of its tokens are padding, not stored
    length: int = 0  # tokens seen, padding included


@dataclass
class _Pass:
    """A forward pass under way."""

    before: _Rows
    after: _Rows  # what holds once its step is finished
    step: AbstractContextManager[TieredKVCache]
    real: torch.Tensor | None  # indices of new rows to store; None: all
    masks: list[torch.Tensor | None] = field(default_factory=list)  # of its layers, all the same


class TieredCache(Cache):
    """KV cache of one batch, for `generate` and `forward`, over device memory and a pool behind it.

    config: the model's; its attention implementation decides the mode, and is checked at use.
    dtype: of K and V; by default that of the config. device: the model's; None is "cpu".
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
        policy: str | Policy = "adaptive",
        objective: str = "transparent",
        slack: float = 0.05,
        max_tpot_ms: float | None = None,
        pool_io: str = "auto",
        in_place_share: float | None = None,
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
            objective=objective,
            slack=slack,
            max_tpot_ms=max_tpot_ms,
            windows=windows(config),
            pool_io=pool_io,
            in_place_share=in_place_share,
        )
        self._windows = windows(config)
        self._positions = positions(config)
        self._context = context(config)
        self._rows = _Rows()
        self._pass: _Pass | None = None
        self._keys: torch.Tensor | None = None  # what layer 0 brought last
        self._short: tuple[int, torch.Tensor | None] | None = None  # see _note_short

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
        try:
            return self._update(layer_idx, key_states, value_states)
        except BaseException:
            self._take_back()
            raise

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
        options: dict[str, Any] = {"scale": scaling, "soft_cap": soft_cap, "sinks": sinks}
        try:
            return self._attend(layer, query, key, value, mask, options)
        except BaseException:
            self._take_back()
            raise

    def window(self, layer: int) -> int:
        """How many tokens a token sees in a layer, itself included; 0 is all."""
        return self._windows[layer]

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens seen, left padding included."""
        return self._now().length

    def get_mask_sizes(self, query_length: int, layer_idx: int = 0) -> tuple[int, int]:
        """(length, offset) of the K and V that a query of `query_length` new tokens sees."""
        length = self._now().length + int(query_length)
        return TieredLength(length) if self.in_place else length, 0

    def get_max_length(self, layer_idx: int | None = None) -> int:
        """-1: no maximum."""
        return -1

    def get_max_cache_shape(self, layer_idx: int = 0) -> int:
        """-1: no maximum. (The older name of `get_max_length`.)"""
        return -1

    # What `generate` and users call between forward passes.

    def crop(self, tokens_to_remove: int) -> None:
        """Removes the last -n tokens where n is negative, keeps the first n where positive."""
        self._settle()
        rows, count = self._rows, int(tokens_to_remove)
        length = min(count, rows.length) if count > 0 else max(0, rows.length + count)
        pads = tuple(min(pad, length) for pad in rows.pads)
        for sequence, pad in zip(rows.sequences, pads, strict=False):
            self.kv.truncate(sequence, length - pad)
        self._rows = _Rows(rows.sequences, pads, length)

    def reset(self) -> None:
        """Forgets everything: the next forward pass may bring a batch of another size."""
        self._settle()
        sequences, self._rows, self._short = self._rows.sequences, _Rows(), None
        for sequence in sequences:
            self.kv.free(sequence)

    def stats(self) -> Stats:
        """Counters and gauges of the TieredKVCache underneath."""
        return self.kv.stats()

    def check(self) -> None:
        """Raises LogicError naming the first invariant that does not hold."""
        self.kv.check()

    def close(self) -> None:
        """Gives all memory back."""
        self._pass = None
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
        self._select([row for row in range(len(self._now().sequences)) for _ in range(repeats)])

    def batch_select_indices(self, indices: torch.Tensor) -> None:
        """Keeps the rows that `indices` names, or for which it is true."""
        if indices.dtype is torch.bool:
            indices = indices.nonzero()[:, 0]
        self._select(indices.tolist())

    def _select(self, rows: list[int]) -> None:
        self._settle()
        now = self._rows
        if not now.sequences:
            return
        if any(not -len(now.sequences) <= row < len(now.sequences) for row in rows):
            raise LogicError(f"Rows {rows} of a batch of {len(now.sequences)} were asked for.")
        free, taken = set(now.sequences), []
        for row in rows:
            sequence = now.sequences[row]
            taken.append(sequence if sequence in free else self.kv.fork(sequence))
            free.discard(sequence)
        self._rows = _Rows(tuple(taken), tuple(now.pads[row] for row in rows), now.length)
        for sequence in free:
            self.kv.free(sequence)

    # What transformers asks about every cache.

    def __len__(self) -> int:
        return self.kv.num_layers

    def __repr__(self) -> str:
        mode = "in place" if self.in_place else "gather"
        return f"TieredCache(layers={len(self)}, tokens={self._rows.length}, {mode})"

    @property
    def batch_size(self) -> int:
        """Rows of the batch; -1 before the first forward pass."""
        return len(self._now().sequences) or -1

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

    def _due(self) -> int:
        """The layer that comes next."""
        return self.kv.open_step()[1]

    def _forward(self) -> _Pass:
        if self._pass is None:
            raise LogicError("No forward pass is under way.")
        return self._pass

    def _update(
        self, layer: int, keys: torch.Tensor, values: torch.Tensor
    ) -> tuple[torch.Tensor, torch.Tensor]:
        self._check_states(keys, values)
        if layer == 0:
            self._note_short(keys)
        elif layer != (due := self._due()):
            raise LogicError(
                f"Layer {layer} came where layer {due} was due: every layer must update this cache "
                "once in each forward pass, in order."
            )
        if self.in_place:
            return PendingKV.wrap(self, layer, keys), PendingKV.wrap(self, layer, values)
        if layer == 0:
            self._open(keys.shape[0], keys.shape[2], [0] * keys.shape[0])
        gathered = self.kv.gather(layer, _packed(keys), _packed(values))
        self._advance(layer)
        return gathered

    def _attend(
        self,
        layer: int,
        query: torch.Tensor,
        key: torch.Tensor,
        value: torch.Tensor,
        mask: torch.Tensor | None,
        options: dict[str, Any],
    ) -> torch.Tensor:
        batch, heads, tokens, head_dim = query.shape
        if layer != (due := self._due()):
            raise LogicError(f"Layer {layer} attends where layer {due} is due.")
        if layer == 0:
            self._open(batch, tokens, self._pads_of(mask, batch, tokens))
        forward = self._forward()
        self._check_same(forward, mask)
        rows = [_packed(query), _packed(key), _packed(value)]
        if forward.real is None:
            out: torch.Tensor = self.kv.attend(layer, *rows, **options)
        else:
            real = [matrix.index_select(0, forward.real) for matrix in rows]
            attended = self.kv.attend(layer, *real, **options)
            out = query.new_zeros((batch * tokens, heads, head_dim))
            out.index_copy_(0, forward.real, attended)
        self._advance(layer)
        return out.view(batch, tokens, heads, head_dim)

    def _take_back(self) -> None:
        """Ends a forward pass in which something was raised, and raises nothing itself: where the
        cache cannot be asked now, the next call ends it.
        """
        self.kv.abort()
        with suppress(LogicError):
            self._settle()

    def _open(self, batch: int, new: int, pads: Sequence[int]) -> None:
        """Begins the step of a forward pass that brings every row `new` tokens."""
        self._settle()
        now = self._rows
        self._check_length(now.length + new - min(pads))
        if now.sequences and len(now.sequences) != batch:
            raise LogicError(
                f"A batch of {batch} came to a cache that holds one of {len(now.sequences)}: "
                "call reset() first, or make a new pie.hf.TieredCache."
            )
        for sequence, pad in zip(now.sequences, now.pads, strict=False):
            if self.kv.length(sequence) != now.length - pad:
                raise LogicError(
                    "The cache's rows differ from what its forward passes have stored, since a "
                    "call that changed them was interrupted, or `kv` was used: call reset()."
                )
        gains = [now.length + new - max(pad, now.length) for pad in pads]
        if not any(gains):
            raise ConfigError(
                "All tokens of this forward pass are padding: leave such columns out."
            )
        sequences = now.sequences or tuple(self.kv.add() for _ in range(batch))
        step = self.kv.step(
            [(row, gain) for row, gain in zip(sequences, gains, strict=True) if gain > 0],
            reader="attend" if self.in_place else "gather",
        )
        real = None
        if sum(gains) < batch * new:
            real = torch.tensor(
                [row * new + token for row, n in enumerate(gains) for token in range(new - n, new)],
                device=self.kv.device,
            )
        after = _Rows(sequences, tuple(pads), now.length + new)
        self._pass = _Pass(now, after, step, real)
        step.__enter__()

    def _check_length(self, longest: int) -> None:
        if self._positions is not None and longest > self._positions:
            raise ConfigError(
                f"This forward pass would make a sequence of {longest} tokens, and the model has "
                f"positions (max_position_embeddings) for {self._positions}: give it fewer."
            )
        if self._context is not None and longest > self._context:
            warnings.warn(
                f"A sequence has come to {longest} tokens, more than the {self._context} that the "
                "model's config says it was made for (max_position_embeddings, rope scaling): what "
                "it says may get worse.",
                RuntimeWarning,
                stacklevel=2,
            )
            self._context = None  # said once

    def _advance(self, layer: int) -> None:
        """A layer is done; after the last one the step is."""
        if layer + 1 == len(self):
            forward = self._forward()
            forward.step.__exit__(None, None, None)
            self._rows = forward.after  # an interrupt before this line is mended by _settle
            self._pass = None
            self._keys = self._short = None

    def _is_finished(self, forward: _Pass) -> bool:
        rows = zip(forward.after.sequences, forward.after.pads, strict=True)
        return all(self.kv.length(row) == forward.after.length - pad for row, pad in rows)

    def _now(self) -> _Rows:
        """The rows as they are; a forward pass that runs has not changed them yet."""
        if self._pass is not None and self.kv.open_step()[0] == 0:
            self._settle()
        return self._rows

    def _settle(self) -> None:
        """Takes the step of a forward pass back that has not got to its end."""
        forward = self._pass
        if forward is None:
            return
        self.kv.abort()
        if self._is_finished(forward):
            self._rows = forward.after
            self._pass = None
            return
        self._pass = None
        if not forward.before.sequences:
            for sequence in forward.after.sequences:
                self.kv.free(sequence)

    def _note_short(self, keys: torch.Tensor) -> None:
        """Refuses a model that does not update every layer: two forward passes that were left
        open at the same layer, and went on from there to other tokens, were not interrupted.
        """
        rows, due = self.kv.open_step()
        self._settle()
        before, came, self._keys = self._short, self._keys, keys
        self._short = (due, came) if rows > 0 else None
        if rows == 0 or before is None or before[0] != due or _equal(before[1], came):
            return
        self._short = None
        raise ConfigError(
            f"Two forward passes in a row updated {due} of the {len(self)} layers that the config "
            "names: every layer must have attention with K and V of its own."
        )

    def _pads_of(self, mask: torch.Tensor | None, batch: int, new: int) -> Sequence[int]:
        """Left padding of each row, which `mask` may add only to rows that hold no token yet."""
        now = self._rows
        old = now.pads if now.sequences else (0,) * batch
        if mask is None:
            if any(old):
                raise LogicError(
                    "The cache holds left-padded rows: pass their attention_mask, all of it."
                )
            return old
        total = now.length + new
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
        for pad, before in zip(pads, old, strict=False):
            if pad != before and (before < now.length or pad < before):
                raise ConfigError(
                    f"The attention mask hides {pad} tokens of a row of which {before} were hidden "
                    "when they came: it must stay the same for what the cache holds."
                )
        return pads

    @staticmethod
    def _check_same(forward: _Pass, mask: torch.Tensor | None) -> None:
        """Layers of one kind share a mask; those of different kinds must hide the same padding."""
        masks = forward.masks
        if any(mask is known for known in masks):
            return
        if masks and (mask is None or masks[0] is None or not torch.equal(mask, masks[0])):
            raise ConfigError(
                "The model's layers attend under different masks, which the attention 'pie' does "
                "not do: load it with another attn_implementation."
            )
        masks.append(mask)

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


def _equal(one: torch.Tensor | None, other: torch.Tensor | None) -> bool:
    return one is not None and other is not None and torch.equal(one, other)
