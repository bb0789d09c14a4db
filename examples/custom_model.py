"""TieredKVCache inside a model of one's own: a small transformer with random weights.

Two sequences of different lengths are prefilled together and then decoded token by token, with
room on the device for a fraction of their KV; the rest streams from a file. The result is compared
with attention over ordinary tensors. Fast: the tests run it.
"""

import torch

import pie

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 4, 8, 2, 64
WIDTH = QUERY_HEADS * HEAD_DIM


class Model:
    """Attention and a linear layer, LAYERS times; `read` stores K and V and attends to them."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        shape = (LAYERS, WIDTH, WIDTH + 2 * KV_HEADS * HEAD_DIM)
        self.to_qkv = torch.randn(shape, generator=generator) / WIDTH**0.5
        self.to_next = torch.randn((LAYERS, WIDTH, WIDTH), generator=generator) / WIDTH**0.5

    def __call__(self, hidden: torch.Tensor, read) -> torch.Tensor:
        """hidden: `[tokens, WIDTH]`, the new tokens of all sequences one after the other."""
        for layer in range(LAYERS):
            qkv = (hidden @ self.to_qkv[layer]).view(len(hidden), -1, HEAD_DIM)
            q, k, v = qkv.split([QUERY_HEADS, KV_HEADS, KV_HEADS], dim=1)
            attended = read(layer, q, k, v)
            hidden = hidden + torch.tanh(attended.reshape(len(hidden), WIDTH) @ self.to_next[layer])
        return hidden


def plain_reader(kept: dict, new: list[int]):
    """Attention over tensors that are simply kept, a list of (K, V) for each sequence and layer."""

    def read(layer, q, k, v):
        out = []
        pieces = zip(q.split(new), k.split(new), v.split(new), strict=True)
        for row, (q_row, k_row, v_row) in enumerate(pieces):
            keys, values = kept.get((row, layer), (k_row[:0], v_row[:0]))
            keys, values = torch.cat([keys, k_row]), torch.cat([values, v_row])
            kept[row, layer] = keys, values
            seen = torch.ones(len(q_row), len(keys)).tril(len(keys) - len(q_row)).bool()
            heads = [tensor.transpose(0, 1) for tensor in (q_row, keys, values)]
            attended = torch.nn.functional.scaled_dot_product_attention(
                *heads, attn_mask=seen, enable_gqa=True
            )
            out.append(attended.transpose(0, 1))
        return torch.cat(out)

    return read


def main() -> None:
    model, kept = Model(), {}
    torch.manual_seed(1)
    steps = [[700, 300]] + [[1, 1]] * 20  # tokens that the two sequences gain
    with pie.TieredKVCache(
        LAYERS, KV_HEADS, HEAD_DIM, "f32", device_bytes="1MiB", pool_bytes="1GiB"
    ) as cache:
        sequences = [cache.add(), cache.add()]
        for new in steps:
            hidden = torch.randn(sum(new), WIDTH)
            with cache.step(list(zip(sequences, new, strict=True))) as step:
                found = model(hidden, step.attend)
            expected = model(hidden, plain_reader(kept, new))
            torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        cache.check()
        stats = cache.stats()
    print(f"{stats.kv_bytes} bytes of KV in a budget of {stats.device_bytes}:")
    print(f"{stats.streamed_bytes} bytes streamed, and the same result as without.")
    assert stats.streamed_bytes > 0


if __name__ == "__main__":
    main()
