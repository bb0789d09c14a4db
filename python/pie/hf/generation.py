"""A plain generation loop over a TieredCache: the prompt in chunks, then a token at a time."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from pie._core import ConfigError
from pie.hf.cache import TieredCache

CHUNK_TOKENS = 512  # of the prompt in one forward pass


@dataclass(frozen=True)
class Sampling:
    """How the next token is chosen: the likeliest where temperature is 0."""

    temperature: float = 0.0
    top_p: float = 1.0  # only the likeliest tokens that together have this probability
    seed: int = 0

    def __post_init__(self) -> None:
        if not self.temperature >= 0:
            raise ConfigError(f"temperature is {self.temperature}: give 0 (greedy) or more.")
        if not 0 < self.top_p <= 1:
            raise ConfigError(f"top_p is {self.top_p}: give more than 0, at most 1.")
        if not 0 <= self.seed < 2**63:
            raise ConfigError(f"seed is {self.seed}: give a whole number from 0, below 2**63.")


def stream(
    model: Any,
    prompt: Sequence[int],
    cache: TieredCache,
    max_new_tokens: int,
    sampling: Sampling | None = None,
    on_prompt: Callable[[int], None] | None = None,
) -> Iterator[int]:
    """Yields up to `max_new_tokens` tokens, the last of them the model's end token if it says one.

    `on_prompt` is told how many tokens of the prompt are done, after each chunk.
    """
    ends = end_tokens(model)
    choose = _chooser(sampling or Sampling())
    options: dict[str, Any] = {**cache_argument(model, cache), "use_cache": True}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = 1
    with torch.inference_mode():
        for begin in range(0, len(prompt), CHUNK_TOKENS):
            chunk = list(prompt[begin : begin + CHUNK_TOKENS])
            logits = model(torch.tensor([chunk], device=model.device), **options).logits
            if on_prompt is not None:
                on_prompt(begin + len(chunk))
        for count in range(1, max_new_tokens + 1):
            token = choose(logits[0, -1].float())
            yield token
            if token in ends or count == max_new_tokens:
                return
            # Made on the device: a copy to it would queue behind what is streamed there.
            last = torch.full((1, 1), token, device=model.device)
            logits = model(last, **options).logits


def cache_argument(model: Any, cache: TieredCache) -> dict[str, TieredCache]:
    """`cache` by the name that this version of the model's `forward` and `generate` takes it."""
    named = inspect.signature(model.forward).parameters
    return {"cache" if "cache" in named else "past_key_values": cache}


def end_tokens(model: Any) -> frozenset[int]:
    """Tokens at which the model's text ends."""
    ends = model.generation_config.eos_token_id
    if ends is None:
        return frozenset()
    return frozenset([ends] if isinstance(ends, int) else ends)


def _chooser(sampling: Sampling) -> Callable[[torch.Tensor], int]:
    if sampling.temperature == 0:
        return lambda logits: int(logits.argmax())
    generator = torch.Generator("cpu").manual_seed(sampling.seed)

    def choose(logits: torch.Tensor) -> int:
        likely, tokens = (logits / sampling.temperature).softmax(0).sort(descending=True)
        before = likely.cumsum(0) - likely  # probability of all that is likelier
        likely[before >= sampling.top_p] = 0
        return int(tokens[torch.multinomial(likely, 1, generator=generator)])

    return choose
