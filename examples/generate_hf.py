"""`model.generate` of transformers over a TieredCache: two prompts, both ways of reading KV.

python examples/generate_hf.py --model .cache/SmolLM2-135M-Instruct.Q4_1.gguf
"""

import argparse

import pie.hf

PROMPTS = ["The three primary colours are", "To boil an egg, first"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", required=True, help="folder of safetensors, .gguf, or hub id")
    arguments = parser.parse_args()

    # The model attends by Pie: K and V are read where they lie. Its tokenizer pads on the left.
    model, tokenizer = pie.hf.load(arguments.model, dtype="f32")
    inputs = tokenizer(PROMPTS, return_tensors="pt", padding=True)
    inputs.pop("token_type_ids", None)
    for attention in ("pie", "sdpa"):
        # With an attention of transformers' own, the cache copies K and V together for it instead.
        model.set_attn_implementation(attention)
        options = {"device_bytes": "8MiB", "pool_bytes": "1GiB"}
        with pie.hf.TieredCache(model.config, model.dtype, **options) as cache:
            # Before transformers 5.24 the argument is called `past_key_values`.
            output = model.generate(**inputs, cache=cache, max_new_tokens=24, do_sample=False)
            print(f"--- attn_implementation={attention!r}: {cache.stats().kv_bytes} bytes of KV")
        for text in tokenizer.batch_decode(output, skip_special_tokens=True):
            print(text)


if __name__ == "__main__":
    main()
