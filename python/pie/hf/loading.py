"""Loads a model for Pie, and proves on a short probe that Pie computes what the model does."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

from pie._core import ConfigError, LogicError
from pie.cache import dtype_name, roomy_bytes, torch_dtype
from pie.gpu.runtime import tensor_device
from pie.hf.cache import TieredCache, geometry, windows
from pie.hf.generation import cache_argument

# Largest relative difference of the logits that rounding explains.
_PROBE_LIMIT = {"f32": 1e-3, "f16": 1e-2, "bf16": 5e-2}
_PROBE_CHUNKS = (37, 11)  # tokens
_PROBE_WINDOW = 16  # tokens, where the model's is longer
_PROBE_PADDING = 9  # columns of left padding in the probe's second row


def load(
    path: str | os.PathLike[str],
    dtype: torch.dtype | str = "bf16",
    attn_implementation: str = "pie",
    device: torch.device | str = "cpu",
) -> tuple[Any, Any]:
    """Returns (model, tokenizer) of a safetensors folder, a GGUF file or a hub id.

    The model is put on `device`, "cpu" or "cuda", and is for caches there.

    Weights are never unpickled, code of the model's own is never run. The model is refused, with a
    ConfigError that names it, where Pie cannot hold its K and V, and where two short chunks with
    left padding do not give what the model's own eager attention gives. The tokenizer pads on the
    left.
    """
    name = os.fspath(path)
    if not isinstance(attn_implementation, str):
        raise ConfigError(
            f"attn_implementation is {attn_implementation!r}: give a name, such as 'pie' or 'sdpa'."
        )
    source, gguf = _source(name)
    place = tensor_device(device)
    try:
        config = AutoConfig.from_pretrained(source, trust_remote_code=False, **gguf)
        geometry(config)
        loaded: Any = AutoModelForCausalLM.from_pretrained(
            source,
            config=config,
            dtype=torch_dtype(dtype),
            attn_implementation=attn_implementation,
            use_safetensors=True,
            trust_remote_code=False,
            output_loading_info=True,
            **_dequantised(gguf),
        )
        tokenizer = AutoTokenizer.from_pretrained(source, trust_remote_code=False, **gguf)
    except (ConfigError, MemoryError):
        raise
    except KeyError as error:
        if error.args != (attn_implementation,):
            raise ConfigError(f"{name} cannot be loaded: {_first_line(error)}") from error
        # The class looks its attention up in a table of its own.
        raise ConfigError(
            f"Pie does not run {name} with attn_implementation={attn_implementation!r}: its "
            "attention does not go through the attention interface of transformers. Use 'eager'."
        ) from error
    except Exception as error:
        # Whatever a damaged or foreign file makes the readers raise, the user gets one sentence.
        raise ConfigError(
            f"{name} cannot be loaded with attn_implementation={attn_implementation!r}: "
            f"{_first_line(error)}"
        ) from error
    model, info = loaded
    for what in ("missing_keys", "mismatched_keys", "error_msgs"):
        if info.get(what):
            some = ", ".join(str(key) for key in sorted(info[what], key=str)[:3])
            raise ConfigError(
                f"{name} is not whole: {len(info[what])} {what.replace('_', ' ')}, such as {some}."
            )
    tokenizer.padding_side = "left"
    model.to(place)
    probe(model, device)
    return model, tokenizer


def probe(model: Any, device: torch.device | str = "cpu") -> None:
    """Raises ConfigError unless `model` through a TieredCache on the device, where it is, matches
    its own eager attention.

    Two rows, one of them padded on the left, go through in two chunks. An attention window is
    made shorter than the chunks for as long as this takes.
    """
    name, asked = type(model).__name__, model.config._attn_implementation
    if asked == "pie" and not model._can_set_attn_implementation():
        raise ConfigError(
            f"Pie does not run {name} with attn_implementation='pie': its attention does not go "
            "through the attention interface of transformers. Use 'eager'."
        )
    try:
        geometry(model.config)
        inputs = _probe_inputs(model)
        with _short_window(model):
            model.set_attn_implementation("eager")
            with torch.no_grad():
                expected = model(**inputs, use_cache=False).logits[:, _PROBE_CHUNKS[0] :]
            model.set_attn_implementation(asked)
            found = _probe_in_chunks(model, inputs, device)
    except MemoryError:
        raise
    except Exception as error:
        # Whatever a model that Pie does not fit raises on the way, the user gets its name.
        raise ConfigError(f"Pie does not run {name}: {_first_line(error)}") from error
    finally:
        model.set_attn_implementation(asked)
    difference = float((found - expected).norm() / expected.norm())
    limit = _PROBE_LIMIT[dtype_name(model.dtype)]
    if not difference <= limit:
        raise ConfigError(
            f"Pie does not run {name}: with attn_implementation={asked!r} its logits differ from "
            f"those of its own attention by {difference:.2g} of their size, more than rounding "
            f"explains ({limit:g})."
        )


@contextmanager
def _short_window(model: Any) -> Iterator[None]:
    """Makes the model's sliding window shorter than the probe, wherever the model has noted it."""
    window = max(windows(model.config))
    configs = [model.config.get_text_config(decoder=True)]
    configs += [module.config for module in model.modules() if hasattr(module, "config")]
    noted = [*configs, *model.modules()] if window > _PROBE_WINDOW else []
    noted = [place for place in noted if getattr(place, "sliding_window", None) == window]
    try:
        for place in noted:
            place.sliding_window = _PROBE_WINDOW
        yield
    finally:
        for place in noted:
            place.sliding_window = window


def _probe_inputs(model: Any) -> dict[str, torch.Tensor]:
    tokens = sum(_PROBE_CHUNKS)
    vocabulary = model.config.get_text_config(decoder=True).vocab_size
    place: dict[str, Any] = {"dtype": torch.long, "device": model.device}
    ids = (torch.arange(2 * tokens, **place) * 7919 + 101) % vocabulary
    mask = torch.ones((2, tokens), **place)
    mask[1, :_PROBE_PADDING] = 0
    inputs = {"input_ids": ids.view(2, tokens), "attention_mask": mask}
    if "position_ids" in inspect.signature(model.forward).parameters:
        inputs["position_ids"] = (mask.cumsum(1) - 1).clamp(min=0)
    return inputs


def _probe_in_chunks(
    model: Any, inputs: dict[str, torch.Tensor], device: torch.device | str
) -> torch.Tensor:
    """Logits of the last chunk."""
    tokens = sum(_PROBE_CHUNKS)
    budget = roomy_bytes(*geometry(model.config), model.dtype, [tokens, tokens])
    options: dict[str, Any] = {"device_bytes": budget, "pool_bytes": None, "policy": "off"}
    with TieredCache(model.config, model.dtype, device, **options) as cache, torch.no_grad():
        end, logits = 0, inputs["input_ids"]
        for chunk in _PROBE_CHUNKS:
            begin, end = end, end + chunk
            part = {key: value[:, begin:end] for key, value in inputs.items()}
            part["attention_mask"] = inputs["attention_mask"][:, :end]
            logits = model(**part, **cache_argument(model, cache), use_cache=True).logits
            if cache.get_seq_length() != end:
                raise ConfigError("not every layer's attention used the cache.")
    return logits


def _source(name: str) -> tuple[str, dict[str, str]]:
    """What transformers takes: a folder or hub id, and the GGUF file in the folder if it is one."""
    path = Path(name).expanduser()
    if path.is_file():
        if path.suffix != ".gguf":
            raise ConfigError(f"{name} is a file but not .gguf: name the folder of its model.")
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ConfigError(f"{name} holds no config.json, so it is not the folder of a model.")
        return str(path), {}
    if path.is_absolute() or name.count("/") > 1 or name.startswith(".") or path.suffix == ".gguf":
        raise ConfigError(f"{name} does not exist: name a folder, a .gguf file or a hub id.")
    return name, {}


def _dequantised(gguf: dict[str, str]) -> dict[str, Any]:
    """Asks for GGUF weights in the model's dtype, where transformers could keep them packed."""
    if not gguf or not hasattr(transformers, "GgufConfig"):
        return dict(gguf)
    return {**gguf, "quantization_config": transformers.GgufConfig(dequantize=True)}


def _first_line(error: Exception) -> str:
    lines = str(error).strip().splitlines()
    if isinstance(error, (ConfigError, LogicError)):
        return lines[0]
    return f"{type(error).__name__}: {lines[0]}" if lines else type(error).__name__
