"""The transformers integration on small random models: tokens, padding, refusals, loading."""

import copy
import random
import shutil
import signal
import time
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    DynamicCache,
    LlamaConfig,
    StaticCache,
    masking_utils,
)

import pie
from pie.hf import TieredCache, generation, loading
from pie.hf import attention as attention_of_pie
from pie.hf.generation import cache_argument

ATTENTIONS = ["pie", "sdpa", "eager"]
SHAPE = {
    "vocab_size": 96,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "bos_token_id": 1,
    "eos_token_id": None,
    "pad_token_id": 0,
}
ROOMY = {"device_bytes": "4MiB", "pool_bytes": "64MiB"}
TIGHT = {"device_bytes": "192KiB", "pool_bytes": "64MiB"}
# Less than several rows take, and room for a layer of theirs twice: attention that is not Pie's
# reads a whole layer at once. What does not fit is streamed however slow the disk is, where a
# policy streams what the disk has written by then.
CROWDED = {"device_bytes": "512KiB", "pool_bytes": "64MiB"}


def build(kind: str = "llama", attention: str = "sdpa", **changes: object):
    torch.manual_seed(0)
    shape = {**SHAPE, "num_key_value_heads": 2} if kind == "llama" else SHAPE
    config = AutoConfig.for_model(kind, **{**shape, **changes})
    return AutoModelForCausalLM.from_config(config, attn_implementation=attention).eval()


@pytest.fixture
def model():
    return build()


def batch(lengths: list[int], seed: int = 0) -> dict[str, torch.Tensor]:
    """Random prompts of these lengths, padded on the left."""
    longest, generator = max(lengths), torch.Generator().manual_seed(seed)
    mask = torch.stack([(torch.arange(longest) >= longest - n).long() for n in lengths])
    ids = torch.randint(3, 96, mask.shape, generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask}


def greedy(model, inputs, new=24, cache=None, **options) -> torch.Tensor:
    options = {"max_new_tokens": new, "do_sample": False, **options}
    return model.generate(**inputs, **cache_argument(model, cache), **options)


# Tokens.


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("lengths", [[150], [150, 97, 33, 1]])
def test_generates_the_tokens_of_transformers(model, attention: str, lengths: list[int]) -> None:
    inputs = batch(lengths)
    expected = greedy(model, inputs)
    model.set_attn_implementation(attention)
    for options in (ROOMY, TIGHT if attention == "pie" else CROWDED):
        with TieredCache(model.config, model.dtype, **options) as cache:
            assert torch.equal(greedy(model, inputs, cache=cache), expected)
            assert cache.get_seq_length() == expected.shape[1] - 1
            cache.check()
            if options is not ROOMY:
                assert len(lengths) < 3 or cache.stats().streamed_bytes > 0


class Fickle:
    """Another share of what is held at every step."""

    def __init__(self) -> None:
        self.random = random.Random(4)

    def streamed_bytes(self, stats: pie.Stats) -> int:
        return int(stats.kv_bytes * self.random.random())


@pytest.mark.parametrize("objective", ["transparent", "throughput"])
@pytest.mark.parametrize("beams", [1, 3])
def test_tokens_do_not_depend_on_a_policy_that_never_rests(
    model, objective: str, beams: int
) -> None:
    inputs = batch([150, 97, 33])
    expected = greedy(model, inputs, num_beams=beams)
    model.set_attn_implementation("pie")
    options = {**TIGHT, "device_bytes": "240KiB", "block_tokens": 16, "objective": objective}
    with TieredCache(model.config, model.dtype, policy=Fickle(), **options) as cache:
        assert torch.equal(greedy(model, inputs, cache=cache, num_beams=beams), expected)
        cache.check()
        assert cache.stats().streamed_bytes > 0
        assert cache.stats().policy == "Fickle"


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_prompt_in_chunks(model, attention: str) -> None:
    inputs = batch([61, 20, 3])
    expected = greedy(model, inputs)
    model.set_attn_implementation(attention)
    for chunk in (1, 7, 64):
        with TieredCache(model.config, model.dtype, **ROOMY) as cache:
            assert torch.equal(
                greedy(model, inputs, cache=cache, prefill_chunk_size=chunk), expected
            )


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_sampling(model, attention: str) -> None:
    inputs = batch([30, 12])
    torch.manual_seed(11)
    expected = greedy(model, inputs, do_sample=True, temperature=0.7, top_k=20)
    model.set_attn_implementation(attention)
    torch.manual_seed(11)
    with TieredCache(model.config, model.dtype, **ROOMY) as cache:
        found = greedy(model, inputs, cache=cache, do_sample=True, temperature=0.7, top_k=20)
    assert torch.equal(found, expected)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_several_turns_with_one_cache(model, attention: str) -> None:
    inputs = batch([40, 17])
    model.set_attn_implementation(attention)
    with TieredCache(model.config, model.dtype, **ROOMY) as cache:
        for turn in range(3):
            found = greedy(model, inputs, 8, cache)
            model.set_attn_implementation("sdpa")
            assert torch.equal(found, greedy(model, inputs, 8))
            model.set_attn_implementation(attention)
            more = batch([5, 5], seed=turn)
            ones = torch.ones((2, 8), dtype=torch.long)
            mask = torch.cat([inputs["attention_mask"], ones, more["attention_mask"]], 1)
            ids = torch.cat([found, more["input_ids"]], 1)
            inputs = {"input_ids": ids, "attention_mask": mask}
        cache.check()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_crop_and_reset(model, attention: str) -> None:
    inputs = batch([40, 17])
    model.set_attn_implementation(attention)
    with TieredCache(model.config, model.dtype, **ROOMY) as cache:
        expected = greedy(model, inputs, 12, cache)
        cache.crop(-6)
        assert cache.get_seq_length() == 51 - 6
        ids = expected[:, :46]
        ones = torch.ones((2, 6), dtype=torch.long)
        mask = torch.cat([inputs["attention_mask"], ones], 1)
        again = greedy(model, {"input_ids": ids, "attention_mask": mask}, 6, cache)
        assert torch.equal(again, expected)
        cache.crop(10)
        assert cache.get_seq_length() == 10
        cache.reset()
        assert cache.get_seq_length() == 0
        assert cache.stats().kv_bytes == 0
        found = greedy(model, batch([9]), 4, cache)  # a batch of another size
    model.set_attn_implementation("eager")
    assert torch.equal(found, greedy(model, batch([9]), 4))


def test_padding_is_stored_by_gather_only(model) -> None:
    stored = {}
    for attention in ("pie", "sdpa"):
        model.set_attn_implementation(attention)
        with TieredCache(model.config, model.dtype, **ROOMY) as cache:
            greedy(model, batch([40, 10]), 1, cache)
            stored[attention] = cache.stats().kv_bytes
    assert stored["pie"] * 80 == stored["sdpa"] * 50


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_as_near_as_transformers(dtype: torch.dtype) -> None:
    exact, model, inputs = build(), build().to(dtype), batch([50])
    wanted = exact(**inputs).logits
    theirs = float((model(**inputs).logits - wanted).norm().detach())
    model.set_attn_implementation("pie")
    with TieredCache(model.config, dtype, **ROOMY) as cache, torch.no_grad():
        ours = float((model(**inputs, **cache_argument(model, cache)).logits - wanted).norm())
    assert ours <= 1.5 * theirs


def test_what_transformers_asks_of_a_cache(model) -> None:
    with TieredCache(model.config, model.dtype, **ROOMY) as cache:
        assert len(cache) == 3
        assert cache.batch_size == -1
        greedy(model, batch([5, 5]), 2, cache)
        assert cache.batch_size == 2
        assert cache.get_mask_sizes(4, 0) == (10, 0)
        assert cache.get_max_length() == cache.get_max_cache_shape() == -1
        assert not cache.is_compileable
        assert cache.is_sliding == [False] * 3
        assert "gather" in repr(cache)


GROUPED = "qwen2 qwen3 gemma phi phi3 olmo2 granite stablelm cohere starcoder2 mixtral mistral"
UNGROUPED = "gpt2 gpt_neox opt"


@pytest.mark.parametrize("attention", ["pie", "sdpa"])
@pytest.mark.parametrize("kind", f"{GROUPED} {UNGROUPED}".split())
def test_families_pass_the_probe(kind: str, attention: str) -> None:
    grouped = {"num_key_value_heads": 2, "head_dim": 16} if kind in GROUPED.split() else {}
    loading.probe(build(kind, attention, sliding_window=None, **grouped))


# What is refused, by name.


@pytest.mark.parametrize(
    ("kind", "changes", "what"),
    [
        ("qwen3_next", {}, "linear_attention"),
        ("llama4_text", {}, "chunked_attention"),
        ("deepseek_v3", {}, "kv_lora_rank"),
        ("t5", {}, "encoder"),
    ],
)
def test_geometries_beyond_pie(kind: str, changes: dict, what: str) -> None:
    config = AutoConfig.for_model(kind, **changes)
    with pytest.raises(pie.ConfigError, match=f"type '{kind}' with .*{what}"):
        TieredCache(config, "f32", **ROOMY)


def test_shared_layers_are_refused() -> None:
    config = LlamaConfig(**SHAPE)
    config.num_kv_shared_layers = 2
    with pytest.raises(pie.ConfigError, match="share their K and V"):
        TieredCache(config, "f32", **ROOMY)


def test_other_shapes_than_the_config_promises(model) -> None:
    config = copy.deepcopy(model.config)
    config.num_key_value_heads = 4
    with TieredCache(config, "f32", **ROOMY) as cache:
        with pytest.raises(pie.ConfigError, match=r"K has shape .* promises"):
            greedy(model, batch([5]), 1, cache)
        assert cache.get_seq_length() == 0


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_dtype_that_is_not_the_models(model, attention: str) -> None:
    model.set_attn_implementation(attention)
    cache = TieredCache(model.config, "bf16", **ROOMY)
    with cache, pytest.raises(pie.LogicError, match=r"float32, this cache holds torch.bfloat16"):
        greedy(model, batch([5]), 1, cache)


@pytest.mark.parametrize(
    ("argument", "value"),
    [("sliding_window", 8), ("anything", 1)],
)
def test_unknown_arguments_of_the_attention(model, argument: str, value: object) -> None:
    model.set_attn_implementation("pie")
    with TieredCache(model.config, "f32", **ROOMY) as cache:
        with pytest.raises(pie.ConfigError, match=f"LlamaAttention asks .*{argument}="):
            model(**batch([5]), **cache_argument(model, cache), **{argument: value})
        assert cache.get_seq_length() == 0


def test_dropout_is_refused(model) -> None:
    model.set_attn_implementation("pie")
    for layer in model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    model.train()
    cache = TieredCache(model.config, "f32", **ROOMY)
    with cache, torch.no_grad(), pytest.raises(pie.ConfigError, match=r"dropout=0.5"):
        model(**batch([5]), **cache_argument(model, cache))


def test_model_whose_attention_is_its_own() -> None:
    model = build("bloom", "pie", n_head=4)
    cache = TieredCache(model.config, "f32", **ROOMY)
    with cache, pytest.raises(pie.ConfigError, match="computes with K or V itself"):
        model(batch([5])["input_ids"], **cache_argument(model, cache))
    with pytest.raises(pie.ConfigError, match=r"BloomForCausalLM .*does not go through"):
        loading.probe(model)


def test_cache_made_for_another_attention(model) -> None:
    inputs = batch([25, 9])
    expected = greedy(model, inputs, 5)
    with TieredCache(model.config, "f32", **ROOMY) as gathering:
        model.set_attn_implementation("pie")  # attends to what a gathering cache copies together
        assert torch.equal(greedy(model, inputs, 5, gathering), expected)
        with TieredCache(model.config, "f32", **ROOMY) as in_place:
            model.set_attn_implementation("sdpa")
            with pytest.raises(pie.ConfigError, match="computes with K or V itself"):
                greedy(model, batch([5]), 1, in_place)


@pytest.mark.parametrize("kind", ["llama", "mistral"])
def test_pie_without_its_cache_attends_as_sdpa(kind: str) -> None:
    model = build(kind, sliding_window=8, num_key_value_heads=2)
    inputs = batch([30, 11])
    ids = inputs["input_ids"]
    found = {}
    for attention in ("sdpa", "pie"):
        model.set_attn_implementation(attention)
        kept = DynamicCache(config=model.config)
        fixed = StaticCache(config=model.config, max_cache_len=64)
        with torch.no_grad():
            scored = model(**inputs, labels=ids).loss
            in_chunks = [
                model(part, **cache_argument(model, kept)).logits for part in ids.split(12, 1)
            ]
            static = model(**inputs, **cache_argument(model, fixed)).logits
        model(**inputs, labels=ids).loss.backward()  # it can be trained too
        weight = model.model.layers[0].self_attn.q_proj.weight
        found[attention] = [scored, *in_chunks, static, greedy(model, inputs, 9), weight.grad]
        weight.grad = None
    for plain, ours in zip(found["sdpa"], found["pie"], strict=True):
        assert torch.equal(plain, ours)


def test_pie_without_its_cache_refuses_what_sdpa_lacks() -> None:
    for kind, what in (("gemma2", "softcap"), ("gpt_oss", "s_aux")):
        model = windowed(kind, "pie")
        with pytest.raises(pie.LogicError, match=what):
            model(**batch([5]))


@pytest.mark.parametrize(
    ("mask", "message"),
    [
        ([[1, 1, 1, 0, 0]], "not left padding"),
        ([[1, 0, 1, 1, 1]], "not left padding"),
        ([[0, 0, 0, 0, 0]], "All tokens"),
        ([[1, 1, 1]], r"\[1, 3\]"),
    ],
)
def test_masks_beyond_left_padding(model, mask: list[list[int]], message: str) -> None:
    model.set_attn_implementation("pie")
    ids = batch([5])["input_ids"]
    with TieredCache(model.config, "f32", **ROOMY) as cache:
        with pytest.raises(pie.ConfigError, match=message):
            model(ids, attention_mask=torch.tensor(mask), **cache_argument(model, cache))
        four = torch.zeros(1, 1, 5, 5)
        with pytest.raises(pie.ConfigError, match=r"\[1, 1, 5, 5\]"):
            model(ids, attention_mask=four, **cache_argument(model, cache))
        assert cache.get_seq_length() == 0


def test_mask_must_stay_the_same(model) -> None:
    model.set_attn_implementation("pie")
    inputs = batch([9, 6])
    token = torch.tensor([[5], [6]])
    with TieredCache(model.config, "f32", **ROOMY) as cache, torch.no_grad():
        model(**inputs, **cache_argument(model, cache))
        with pytest.raises(pie.LogicError, match="pass their attention_mask"):
            model(token, **cache_argument(model, cache))
        mask = torch.cat([inputs["attention_mask"], torch.ones(2, 1)], 1)
        mask[1, 3] = 0
        with pytest.raises(pie.ConfigError, match="hides 4 tokens of a row of which 3"):
            model(token, attention_mask=mask, **cache_argument(model, cache))
        assert cache.get_seq_length() == 9


def test_another_batch_size_needs_reset(model) -> None:
    for attention in ATTENTIONS:
        model.set_attn_implementation(attention)
        with TieredCache(model.config, "f32", **ROOMY) as cache, torch.no_grad():
            model(**batch([4, 4]), **cache_argument(model, cache))
            with pytest.raises(pie.LogicError, match=r"batch of 3 .* holds one of 2"):
                model(torch.tensor([[1], [1], [1]]), **cache_argument(model, cache))


# Beams and other selections of rows.


@pytest.mark.parametrize("attention", ATTENTIONS)
@pytest.mark.parametrize("options", [ROOMY, {**TIGHT, "device_bytes": "1MiB"}])
def test_beam_search(model, attention: str, options: dict) -> None:
    inputs = batch([50, 23])
    beams = {"num_beams": 4, "num_return_sequences": 3, "length_penalty": 0.5}
    expected = greedy(model, inputs, **beams)
    model.set_attn_implementation(attention)
    with TieredCache(model.config, model.dtype, **options) as cache:
        assert torch.equal(greedy(model, inputs, cache=cache, **beams), expected)
        cache.check()
        assert cache.stats().sequences == 8


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_rows_are_repeated_and_selected(model, attention: str) -> None:
    inputs, token = batch([20, 9]), torch.tensor([[7], [8], [9]])
    plain = DynamicCache(config=model.config)
    rows, repeats = torch.tensor([3, 0, 3]), 2
    mask = inputs["attention_mask"].repeat_interleave(repeats, 0)[rows]
    mask = torch.cat([mask, torch.ones(3, 1).long()], 1)
    config, logits = copy.deepcopy(model.config), []
    config._attn_implementation = attention
    with TieredCache(config, model.dtype, **ROOMY) as cache, torch.no_grad():
        for kind, used in (("sdpa", plain), (attention, cache)):
            model.set_attn_implementation(kind)
            used.batch_repeat_interleave(repeats)  # of nothing: nothing
            model(**inputs, **cache_argument(model, used))
            used.batch_repeat_interleave(repeats)
            used.batch_select_indices(rows)
            logits.append(model(token, attention_mask=mask, **cache_argument(model, used)).logits)
        torch.testing.assert_close(logits[1], logits[0])
        cache.batch_select_indices(torch.tensor([False, True, False]))
        assert cache.batch_size == cache.stats().sequences == 1
        with pytest.raises(pie.LogicError, match=r"Rows \[1\] of a batch of 1"):
            cache.batch_select_indices(torch.tensor([1]))
        cache.check()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_assisted_generation(model, attention: str) -> None:
    inputs = batch([40])
    expected = greedy(model, inputs)
    model.set_attn_implementation(attention)
    with TieredCache(model.config, model.dtype, **ROOMY) as cache:
        found = greedy(model, inputs, cache=cache, prompt_lookup_num_tokens=3)
        assert torch.equal(found, expected)
        cache.check()


# Windows, soft caps and sinks.

HYBRID = {"layer_types": ["sliding_attention", "full_attention", "sliding_attention"]}
WINDOWED = {
    "mistral": {},
    "qwen2": {**HYBRID, "use_sliding_window": True},
    "gemma2": {**HYBRID, "attn_logit_softcapping": 2.0, "query_pre_attn_scalar": 4},
    "gemma3_text": HYBRID,
    "gpt_oss": {**HYBRID, "num_local_experts": 4, "num_experts_per_tok": 2},
    "cohere2": HYBRID,
}


def windowed(kind: str, attention: str = "eager"):
    shape = {"num_key_value_heads": 2, "head_dim": 16, "sliding_window": 24}
    model = build(kind, attention, **shape, **WINDOWED[kind])
    for name, parameter in model.named_parameters():
        if "sinks" in name:
            torch.nn.init.normal_(parameter, 1.0)
    return model


@pytest.mark.parametrize("attention", ["pie", "eager"])
@pytest.mark.parametrize("kind", WINDOWED)
def test_windowed_families(kind: str, attention: str) -> None:
    model, inputs = windowed(kind), batch([90, 61, 7])
    expected = greedy(model, inputs, 40)
    model.set_attn_implementation(attention)
    loading.probe(model)
    for options in (ROOMY, {**ROOMY, "policy": "fixed:0.8"}):
        with TieredCache(model.config, model.dtype, block_tokens=16, **options) as cache:
            found = greedy(model, inputs, 40, cache, prefill_chunk_size=50)
            assert torch.equal(found, expected)
            full = cache.is_sliding.count(False)
            token_bytes = 2 * 2 * 16 * 4 * len(inputs["input_ids"])
            assert cache.stats().kv_bytes <= token_bytes * (129 * full + 64 * (3 - full))
            cache.check()


@pytest.mark.parametrize("attention", ["pie", "eager"])
def test_beam_search_with_windows(attention: str) -> None:
    model, inputs = windowed("mistral"), batch([50, 23])
    expected = greedy(model, inputs, num_beams=3)
    model.set_attn_implementation(attention)
    with TieredCache(model.config, model.dtype, **ROOMY) as cache:
        assert torch.equal(greedy(model, inputs, cache=cache, num_beams=3), expected)
        cache.check()


def test_probe_sees_a_window_that_is_longer_than_it(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("mistral", "pie", num_key_value_heads=2, sliding_window=1000)
    loading.probe(model)
    assert model.config.sliding_window == 1000
    monkeypatch.setattr("pie.hf.cache.windows", lambda config: [0, 0, 0])
    with pytest.raises(pie.ConfigError, match=r"MistralForCausalLM.*sliding_window=16"):
        loading.probe(model)
    assert model.config.sliding_window == 1000


def test_masks_that_are_not_the_windows() -> None:
    window = masking_utils.sliding_window_causal_mask_function
    overlay = masking_utils.sliding_window_overlay(8)
    four = attention_of_pie.TieredLength(4)
    assert attention_of_pie.mask(kv_length=four, mask_function=window(8), local_size=8) is None
    for function, size in (
        (window(9), 8),
        (window(8), None),
        (masking_utils.causal_mask_function, 8),
        (overlay, 8),
        (masking_utils.and_masks(window(8), overlay), 8),
        (masking_utils.sliding_window_bidirectional_mask_function(8), 8),
    ):
        with pytest.raises(pie.ConfigError, match="not plainly causal"):
            attention_of_pie.mask(kv_length=four, mask_function=function, local_size=size)


def test_windows_limit_crop() -> None:
    model = windowed("mistral", "pie")
    with TieredCache(model.config, model.dtype, block_tokens=16, **ROOMY) as cache:
        greedy(model, batch([90]), 2, cache)
        assert not cache.is_croppable
        with pytest.raises(pie.LogicError, match="window"):
            cache.crop(40)
        assert cache.get_seq_length() == 91
        cache.crop(0)


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_tokens_beyond_a_table_of_positions(attention: str) -> None:
    model = build("gpt2", attention, n_positions=30)
    with TieredCache(model.config, model.dtype, **ROOMY) as cache, torch.no_grad():
        assert greedy(model, batch([20]), 11, cache).shape[1] == 31  # the last is not stored
        model.transformer.wpe = torch.nn.Embedding(40, 64)  # or the model fails before its layers
        with pytest.raises(pie.ConfigError, match=r"31 tokens.*max_position_embeddings\) for 30"):
            model(torch.tensor([[5]]), **cache_argument(model, cache))
        assert cache.get_seq_length() == 30


YARN = {"rope_type": "yarn", "factor": 4.0, "rope_theta": 1e4}


@pytest.mark.parametrize(
    ("rope", "context"),
    [({}, 30), (YARN, 120), ({**YARN, "original_max_position_embeddings": 20}, 80)],
)
def test_tokens_beyond_the_context_are_computed_and_said_once(rope: dict, context: int) -> None:
    changes = {"rope_parameters": rope} if rope else {}
    model = build("llama", "pie", max_position_embeddings=30, **changes)
    inputs = batch([context - 1])
    with TieredCache(model.config, model.dtype, **ROOMY) as cache, torch.no_grad():
        with warnings.catch_warnings():
            warnings.simplefilter("error")
            found = greedy(model, inputs, 2, cache)  # the last is not stored
        with pytest.warns(RuntimeWarning, match=f"more than the {context} that") as said:
            greedy(model, {"input_ids": found}, 4, cache)
        assert len([w for w in said if "was made for" in str(w.message)]) == 1
        cache.crop(context)
    model.set_attn_implementation("eager")
    assert torch.equal(found, greedy(model, inputs, 2))


def test_compiled_model_is_refused() -> None:
    model = build(attention="pie")
    compiled = torch.compile(model, backend="eager")
    with TieredCache(model.config, model.dtype, **ROOMY) as cache, torch.no_grad():
        with pytest.raises(Exception, match=r"torch.compile does not reach through"):
            compiled(**batch([20]), **cache_argument(model, cache))
        model(**batch([20]), **cache_argument(model, cache))
        assert cache.get_seq_length() == 20


# What breaks in the middle.


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_interrupted_forward_is_taken_back(model, attention: str) -> None:
    model.set_attn_implementation(attention)
    inputs = batch([20])
    token = torch.tensor([[7]])
    with TieredCache(model.config, "f32", **ROOMY) as cache, torch.no_grad():
        model(**inputs, **cache_argument(model, cache))
        hook = model.model.layers[1].mlp.register_forward_hook(lambda *_: 1 / 0)
        with pytest.raises(ZeroDivisionError):
            model(token, **cache_argument(model, cache))
        hook.remove()
        assert cache.get_seq_length() == 20
        found = model(token, **cache_argument(model, cache)).logits
        plain = DynamicCache(config=model.config)
        model.set_attn_implementation("eager")
        model(**inputs, **cache_argument(model, plain))
        torch.testing.assert_close(found, model(token, **cache_argument(model, plain)).logits)
        cache.check()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_an_error_in_the_first_layer_is_taken_back(model, attention: str) -> None:
    model.set_attn_implementation(attention)
    inputs = batch([20])
    with TieredCache(model.config, "f32", **ROOMY) as cache:
        for _ in range(3):  # and the same error again is no missing layer
            with pytest.raises(pie.LogicError, match="requires grad"):
                model(**inputs, **cache_argument(model, cache))
        assert cache.stats().sequences == 0
        cache.reset()
        found = greedy(model, inputs, 4, cache)
    model.set_attn_implementation("eager")
    assert torch.equal(found, greedy(model, inputs, 4))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_two_failures_at_one_layer_are_no_missing_layers(model, attention: str) -> None:
    model.set_attn_implementation(attention)
    inputs = batch([20])
    expected = greedy(model, inputs, 4)

    def interrupt(*_: object) -> None:
        raise KeyboardInterrupt

    with TieredCache(model.config, "f32", **ROOMY) as cache:
        hook = model.model.layers[1].mlp.register_forward_hook(interrupt)
        for _ in range(3):
            with pytest.raises(KeyboardInterrupt):
                greedy(model, inputs, 4, cache)
        hook.remove()
        cache.reset()
        assert torch.equal(greedy(model, inputs, 4, cache), expected)
        cache.check()


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_a_refused_batch_changes_nothing(model, attention: str) -> None:
    model.set_attn_implementation(attention)
    small = {"device_bytes": "128KiB", "pool_bytes": None, "block_tokens": 16}
    with TieredCache(model.config, "f32", **small) as cache:
        with pytest.raises(pie.CapacityError):
            greedy(model, batch([90] * 8), 2, cache)
        assert cache.batch_size == -1
        assert cache.stats().sequences == 0
        cache.batch_select_indices(torch.tensor([0]))
        inputs = batch([30, 12])
        found = greedy(model, inputs, 4, cache)
        assert cache.batch_size == 2
        with pytest.raises(pie.LogicError, match="Rows"):
            cache.batch_select_indices(torch.tensor([0, 7]))
        assert cache.batch_size == 2
        cache.batch_select_indices(torch.tensor([1]))
        assert cache.batch_size == 1
        cache.check()
    model.set_attn_implementation("eager")
    assert torch.equal(found, greedy(model, inputs, 4))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_interrupts_leave_the_cache_as_it_was(model, attention: str) -> None:
    model.set_attn_implementation(attention)
    inputs, choose, interrupts = batch([20, 9]), random.Random(0), 0
    began = time.perf_counter()
    greedy(model, inputs, 20)
    pass_s = (time.perf_counter() - began) / 20
    handler = signal.signal(signal.SIGALRM, signal.default_int_handler)
    with TieredCache(model.config, "f32", **TIGHT) as cache, torch.no_grad():
        ids, mask = inputs["input_ids"], inputs["attention_mask"]
        while ids.shape[1] < 60:
            new = ids[:, cache.get_seq_length() :]
            try:
                signal.setitimer(signal.ITIMER_REAL, choose.uniform(1e-4, max(3e-4, 2 * pass_s)))
                out = model(new, attention_mask=mask, **cache_argument(model, cache)).logits
                signal.setitimer(signal.ITIMER_REAL, 0)
            except KeyboardInterrupt:
                interrupts += 1
                signal.setitimer(signal.ITIMER_REAL, 0)
                if cache.get_seq_length() < ids.shape[1]:
                    continue
                # It came after the end of the step: the tokens are stored, their logits are lost.
                cache.crop(-1)
                continue
            ids = torch.cat([ids, out[:, -1:].argmax(-1)], 1)
            mask = torch.cat([mask, torch.ones((2, 1), dtype=torch.long)], 1)
        cache.check()
    signal.signal(signal.SIGALRM, handler)
    assert interrupts > 5
    model.set_attn_implementation("eager")
    assert torch.equal(ids, greedy(model, inputs, 40))


@pytest.mark.parametrize("attention", ATTENTIONS)
def test_guidance_is_served(model, attention: str) -> None:
    """transformers keeps the unguided branch in a plain cache of its own."""
    inputs = batch([20])
    expected = greedy(model, inputs, 12, guidance_scale=1.7)
    assert not torch.equal(expected, greedy(model, inputs, 12))
    model.set_attn_implementation(attention)
    with TieredCache(model.config, model.dtype, **ROOMY) as cache:
        assert torch.equal(greedy(model, inputs, 12, cache, guidance_scale=1.7), expected)


def test_implicit_default_device_is_not_used(model) -> None:
    model.set_attn_implementation("pie")
    inputs = batch([20, 9])
    expected = greedy(model, inputs, 2)
    with TieredCache(model.config, model.dtype, **ROOMY) as cache, torch.device("meta"):
        padded = greedy(model, inputs, 2, cache)  # rows are picked by their index
        cache.reset()
        prompt = inputs["input_ids"][0].tolist()
        tokens = list(generation.stream(model, prompt, cache, 2))
    assert torch.equal(padded, expected)
    assert tokens == expected[0, 20:].tolist()


def test_model_that_leaves_layers_out(model) -> None:
    model.model.layers = model.model.layers[:2]
    cache = TieredCache(model.config, "f32", **ROOMY)
    with cache, pytest.raises(pie.ConfigError, match="updated 2 of the 3 layers"):
        greedy(model, batch([5]), 5, cache)
    with pytest.raises(pie.ConfigError, match="not every layer"):
        loading.probe(model)


@pytest.mark.parametrize("attention", ["pie", "sdpa"])
def test_pool_exhausted_in_mid_generation(model, attention: str) -> None:
    model.set_attn_implementation(attention)
    small = {"device_bytes": "192KiB", "pool_bytes": "128KiB"}
    with TieredCache(model.config, "f32", **small) as cache:
        with pytest.raises(pie.CapacityError, match="tier"):
            greedy(model, batch([20]), 2000, cache)
        length = cache.get_seq_length()
        assert length > 20
        cache.check()
        cache.crop(-length // 2)
        assert greedy(model, batch([length // 2 + 1]), 2, cache).shape[1] == length // 2 + 3


def test_closed_cache(model) -> None:
    cache = TieredCache(model.config, "f32", **ROOMY)
    cache.close()
    with pytest.raises(pie.LogicError, match="closed"):
        greedy(model, batch([5]), 1, cache)


def test_config_is_not_changed() -> None:
    config = LlamaConfig(**SHAPE)
    before = config.to_dict()
    TieredCache(config, "f32", **ROOMY).close()
    assert config.to_dict() == before


# Loading.


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a small model with its tokenizer."""
    folder = tmp_path_factory.mktemp("model")
    build().save_pretrained(folder)
    words = {"<pad>": 0, "<s>": 1, **{f"w{n}": n for n in range(2, 96)}}
    tokenizer = Tokenizer(WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = WhitespaceSplit()
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>"
    ).save_pretrained(folder)
    return folder


@pytest.fixture
def folder(saved: Path, tmp_path: Path) -> Path:
    """A copy of it that a test may damage."""
    return Path(shutil.copytree(saved, tmp_path / "model"))


@pytest.mark.parametrize("attention", ["pie", "sdpa"])
def test_load_and_generate(saved: Path, attention: str) -> None:
    model, tokenizer = pie.hf.load(saved, "f32", attention)
    inputs = tokenizer(["w5 w6 w7", "w9"], return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    assert inputs["attention_mask"].tolist() == [[1, 1, 1], [0, 0, 1]]
    with TieredCache(model.config, model.dtype, **ROOMY) as cache:
        found = greedy(model, inputs, 8, cache)
    assert torch.equal(found, greedy(build(), inputs, 8))
    assert pie.hf.load(saved)[0].dtype is torch.bfloat16


def test_load_truncated_weights(folder: Path) -> None:
    weights = folder / "model.safetensors"
    for keep in (3, weights.stat().st_size // 2):
        weights.write_bytes(weights.read_bytes()[:keep])
        with pytest.raises(pie.ConfigError, match=rf"{folder} cannot be loaded"):
            pie.hf.load(folder)


def test_load_missing_weights(folder: Path) -> None:
    weights = load_file(folder / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(pie.ConfigError, match=r"not whole: 1 missing keys.*layers.1.mlp.up_proj"):
        pie.hf.load(folder)


def test_load_never_unpickles(folder: Path) -> None:
    torch.save(load_file(folder / "model.safetensors"), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()
    with pytest.raises(pie.ConfigError, match="cannot be loaded"):
        pie.hf.load(folder)


@pytest.mark.parametrize("name", ["nothing.gguf", "/no/such/folder", "./none", "a/b/c"])
def test_load_missing_paths(name: str) -> None:
    with pytest.raises(pie.ConfigError, match="does not exist"):
        pie.hf.load(name)


def test_load_what_is_no_model(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(pie.ConfigError, match=r"is a file but not .gguf"):
        pie.hf.load(folder / "config.json")
    with pytest.raises(pie.ConfigError, match=r"no config.json"):
        pie.hf.load(tmp_path)
    with pytest.raises(pie.ConfigError, match="dtype 'int4'"):
        pie.hf.load(folder, "int4")
    (tmp_path / "bad.gguf").write_bytes(b"GGUF" + bytes(100))
    with pytest.raises(pie.ConfigError, match=r"bad.gguf cannot be loaded"):
        pie.hf.load(tmp_path / "bad.gguf")


def test_load_refuses_a_model_by_name(folder: Path) -> None:
    config = folder / "config.json"
    config.write_text(config.read_text().replace("{", '{"kv_lora_rank": 8,', 1))
    with pytest.raises(pie.ConfigError, match="'llama' with compressed K and V"):
        pie.hf.load(folder)
    with pytest.raises(pie.ConfigError, match="attn_implementation is None"):
        pie.hf.load(folder, attn_implementation=None)


def test_load_refuses_what_the_probe_finds_wrong(
    saved: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    attend = TieredCache.attend
    monkeypatch.setattr(TieredCache, "attend", lambda *arguments: attend(*arguments) * 1.01)
    with pytest.raises(pie.ConfigError, match=r"LlamaForCausalLM.* logits differ"):
        pie.hf.load(saved, "f32")


def test_gguf_on_real_weights(smollm: Any) -> None:
    model, tokenizer = smollm
    prompts = ["The capital of France is", "One, two, three, four,"]
    inputs = tokenizer(prompts, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    model.set_attn_implementation("sdpa")
    expected = greedy(model, inputs, 12)
    assert "Paris" in tokenizer.decode(expected[0])
    for attention in ("sdpa", "pie"):
        model.set_attn_implementation(attention)
        options = {**TIGHT, "device_bytes": "4MiB", "policy": "fixed:0.9"}
        with TieredCache(model.config, model.dtype, **options) as cache:
            assert torch.equal(greedy(model, inputs, 12, cache), expected)
