"""The operators: torch's own checks of them, exact attention, and models under torch.compile."""

import pytest
import torch

import pie
from pie import ops  # noqa: F401, registers the operators

HEADS, KV_HEADS, DIM, BLOCK = 4, 2, 16, 16
BATCH = [(0, 5), (20, 3), (40, 1)]  # (position, rows) of each sequence
append, attend = torch.ops.pie.append, torch.ops.pie.attend


def pages(dtype: torch.dtype = torch.float32) -> tuple[torch.Tensor, ...]:
    """(frames full of random numbers, table, starts, positions)."""
    generator = torch.Generator().manual_seed(1)
    frames = torch.randn(12, 2, KV_HEADS, BLOCK, DIM, generator=generator).to(dtype)
    table = torch.randperm(12, generator=generator)[:9].view(3, 3).int()
    starts = torch.tensor([0, 5, 8, 9], dtype=torch.int32)
    positions = torch.tensor([position for position, _ in BATCH], dtype=torch.int32)
    return frames, table, starts, positions


def rows(heads: int, count: int = 9, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    return torch.randn(count, heads, DIM, generator=torch.Generator().manual_seed(heads)).to(dtype)


def reference(frames, table, q, scale, window, soft_cap, sinks):
    """(out, lse) in float64, one row and head after the other."""
    out, lse, row = [], [], 0
    for sequence, (position, count) in enumerate(BATCH):
        keys, values = (
            frames.double()[table[sequence].long(), part].transpose(0, 1).flatten(1, 2)
            for part in (0, 1)
        )
        for token in range(position, position + count):
            first = max(0, token - window + 1) if window else 0
            for head in range(HEADS):
                group = head * KV_HEADS // HEADS
                scores = keys[group, first : token + 1] @ q[row, head].double() * scale
                if soft_cap:
                    scores = soft_cap * torch.tanh(scores / soft_cap)
                extra = scores.new_tensor([] if sinks is None else [sinks[head]])
                lse.append(torch.logsumexp(torch.cat([scores, extra]), 0))
                out.append((scores - lse[-1]).exp() @ values[group, first : token + 1])
            row += 1
    return torch.stack(out).view(-1, HEADS, DIM), torch.stack(lse).view(-1, HEADS)


OPTIONS = [(0, 0.0, False), (7, 0.0, False), (0, 2.0, False), (0, 0.0, True), (24, 2.0, True)]


@pytest.mark.parametrize(("window", "soft_cap", "with_sinks"), OPTIONS)
@pytest.mark.parametrize(("dtype", "limit"), [(torch.float32, 1e-5), (torch.bfloat16, 2e-2)])
def test_attend_is_exact(dtype, limit: float, window: int, soft_cap: float, with_sinks) -> None:
    memory, table, *where = pages(dtype)
    if window:
        table[2, : (41 - window) // BLOCK] = -1  # nobody sees these
    q = rows(HEADS, dtype=dtype)
    sinks = torch.tensor([0.5, -1.0, 3.0, 0.0]) if with_sinks else None
    found = attend(memory, table, *where, q, 0.3, window, soft_cap, sinks)
    expected = reference(memory, table, q, 0.3, window, soft_cap, sinks)
    for ours, exact in zip(found, expected, strict=True):
        assert float((ours.double() - exact).norm() / exact.norm()) < limit


def test_append_writes_where_the_table_says() -> None:
    memory, table, starts, positions = pages()
    k, v = rows(KV_HEADS), rows(2 * KV_HEADS)[:, ::2]
    expected, row = memory.clone(), 0
    for sequence, (position, count) in enumerate(BATCH):
        for token in range(position, position + count):
            frame = expected[int(table[sequence, token // BLOCK])]
            frame[0, :, token % BLOCK], frame[1, :, token % BLOCK] = k[row], v[row]
            row += 1
    append(memory, table, starts, positions, k, v)
    assert torch.equal(memory, expected)


def test_long_prompt_goes_in_waves() -> None:
    memory = torch.randn(70, 2, KV_HEADS, BLOCK, DIM)
    table = torch.arange(70, dtype=torch.int32).view(2, 35)
    starts, positions = torch.tensor([[0, 550, 1070], [0, 5, 0]], dtype=torch.int32)
    q = rows(HEADS, 1070)
    whole, _ = attend(memory, table, starts, positions[:2].contiguous(), q, 0.25)
    last = torch.tensor([0, 1], dtype=torch.int32)
    one, _ = attend(memory, table[1:], last, torch.tensor([524]).int(), q[-1:], 0.25)
    assert torch.equal(whole[-1:], one)


@pytest.mark.parametrize("sinks", [None, torch.zeros(HEADS)])
def test_opcheck(sinks: torch.Tensor | None) -> None:
    memory, *where = pages()
    inputs = (memory, *where, rows(KV_HEADS), rows(KV_HEADS))
    torch.library.opcheck(append.default, inputs)
    torch.library.opcheck(attend.default, (memory, *where, rows(HEADS), 0.25, 8, 1.5, sinks))


def test_opcheck_of_the_tiered_operator() -> None:
    geometry = (64, KV_HEADS, DIM, "f32")  # opcheck calls often, and each call takes a layer
    with pie.TieredKVCache(*geometry, device_bytes="4MiB", pool_bytes=0) as cache:
        step = cache.step([(cache.add(), 9)])
        step.__enter__()
        q, k = rows(HEADS), rows(KV_HEADS)
        inputs = (cache._handle, q, k, k, torch.empty_like(q), None, -1)
        torch.library.opcheck(torch.ops.pie.attend_tiered.default, inputs)
        step.__exit__(ValueError, None, None)
        cache.check()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda a: {**a, "table": a["table"].long()}, "table is torch.int64"),
        (lambda a: {**a, "table": a["table"] + 9}, r"names frame \d+ for block"),
        (lambda a: {**a, "table": a["table"][:, :2].contiguous()}, "2 blocks of the table"),
        (lambda a: {**a, "starts": a["starts"] + 1}, "from 0 to the 9 rows"),
        (lambda a: {**a, "positions": a["positions"] - 1}, "rows for tokens -1"),
        (lambda a: {**a, "frames": a["frames"].transpose(2, 3)}, "each frame contiguous"),
        (lambda a: {**a, "frames": a["frames"].double()}, "frames is torch.float64"),
        (lambda a: {**a, "q": a["q"].half()}, "q is torch.float16"),
        (lambda a: {**a, "q": a["q"][:, :3]}, "multiple of the 2 KV heads"),
        (lambda a: {**a, "q": a["q"].requires_grad_()}, "requires grad"),
        (lambda a: {**a, "sinks": torch.zeros(3)}, r"shape \[4\]"),
        (lambda a: {**a, "window": -1}, "window is -1"),
    ],
)
def test_wrong_arguments(change, message: str) -> None:
    names = ("frames", "table", "starts", "positions")
    arguments = dict(zip(names, pages(), strict=True))
    with pytest.raises(pie.LogicError, match=message):
        attend(**change({**arguments, "q": rows(HEADS), "scale": 1.0}))


# A model of one's own, eager and compiled.

LAYERS, WIDTH, VOCABULARY = 3, HEADS * DIM, 50


class Model(torch.nn.Module):
    """A small decoder; `read(layer, q, k, v)` stores K and V and attends to them."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(3)
        self.embed = torch.nn.Embedding(VOCABULARY, WIDTH)
        self.qkv = torch.nn.ModuleList(
            torch.nn.Linear(WIDTH, (HEADS + 2 * KV_HEADS) * DIM) for _ in range(LAYERS)
        )

    def forward(self, tokens: torch.Tensor, read) -> torch.Tensor:
        hidden = self.embed(tokens)
        for layer, project in enumerate(self.qkv):
            qkv = project(hidden).view(tokens.shape[0], -1, DIM)
            q, k, v = qkv.split([HEADS, KV_HEADS, KV_HEADS], dim=1)
            hidden = hidden + read(layer, q, k, v).reshape(hidden.shape).tanh()
        return hidden @ self.embed.weight.T


def decode(forward, cache: pie.TieredKVCache) -> list[list[int]]:
    """Tokens that two sequences get, greedily, after prompts of different lengths."""
    sequences, tokens, found = [cache.add(), cache.add()], torch.arange(50) % VOCABULARY, []
    new = [30, 20]
    for _ in range(12):
        with cache.step(list(zip(sequences, new, strict=True))), torch.no_grad():
            logits = forward(tokens)
        tokens = logits[torch.tensor(new).cumsum(0) - 1].argmax(-1)
        found.append(tokens.tolist())
        new = [1, 1]
    return found


@pytest.fixture
def small():
    with pie.TieredKVCache(
        LAYERS, KV_HEADS, DIM, "f32", device_bytes="64KiB", pool_bytes="8MiB", policy="fixed:0.5"
    ) as cache:
        yield cache


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_model_over_the_tiers(small: pie.TieredKVCache, dynamic: bool | None) -> None:
    model = Model()
    expected = decode(lambda tokens: model(tokens, small.attend), small)
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    assert decode(lambda tokens: compiled(tokens, small.attend), small) == expected
    small.check()


def paged_reader(memory: torch.Tensor, table: torch.Tensor):
    """Both pure operators over frames of one's own, `[LAYERS, frames, ...]`."""

    def read(layer: int, q, k, v, starts, positions) -> torch.Tensor:
        append(memory[layer], table, starts, positions, k, v)
        return attend(memory[layer], table, starts, positions, q, DIM**-0.5)[0]

    return read


@pytest.mark.parametrize("dynamic", [None, True])
def test_compiled_model_over_pages(small: pie.TieredKVCache, dynamic: bool | None) -> None:
    model = Model()
    expected = decode(lambda tokens: model(tokens, small.attend), small)
    table = torch.arange(8, dtype=torch.int32).view(2, 4)
    read = paged_reader(torch.zeros(LAYERS, 8, 2, KV_HEADS, BLOCK, DIM), table)

    def whole(tokens, starts, positions):
        return model(tokens, lambda *inputs: read(*inputs, starts, positions))

    torch.compiler.reset()
    compiled = torch.compile(whole, backend="aot_eager", fullgraph=True, dynamic=dynamic)
    new, positions, tokens, found = [30, 20], torch.zeros(2).int(), torch.arange(50), []
    for _ in range(12):
        starts = torch.tensor([0, *torch.tensor(new).cumsum(0)], dtype=torch.int32)
        with torch.no_grad():
            logits = compiled(tokens % VOCABULARY, starts, positions)
        tokens, positions = (
            logits[starts[1:].long() - 1].argmax(-1),
            positions + torch.tensor(new).int(),
        )
        found.append(tokens.tolist())
        new = [1, 1]
    assert found == expected


def test_own_attention_over_the_caches_pages(small: pie.TieredKVCache) -> None:
    q, k, v = rows(HEADS), rows(KV_HEADS), rows(KV_HEADS) + 1
    sequence = small.add()
    with small.step([(sequence, 9)]) as step:
        expected = [step.attend(layer, q, k, v) for layer in range(LAYERS)]
    small.truncate(sequence, 0)
    starts, positions = torch.tensor([0, 9]).int(), torch.zeros(1).int()
    with small.step([(sequence, 9)], reader="pages") as step:
        for layer in range(LAYERS):
            table = step.pages(layer, k, v)
            found, _ = attend(small.frames, table, starts, positions, q, DIM**-0.5)
            assert torch.equal(found, expected[layer])
