"""TieredKVCache against attention over plain tensors, and against what is done wrong with it."""

import contextlib
import gc
import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

import pie
from pie.cache import kv_bytes

LAYERS, QUERY_HEADS, KV_HEADS, HEAD_DIM = 3, 6, 2, 32
ROOMY, TIGHT = "8MiB", "256KiB"


def make(device_bytes: int | str = ROOMY, dtype: object = "f32", **options: object):
    options.setdefault("pool_bytes", "64MiB")
    return pie.TieredKVCache(
        LAYERS, KV_HEADS, HEAD_DIM, dtype, device_bytes=device_bytes, **options
    )


@pytest.fixture
def cache() -> Iterator[pie.TieredKVCache]:
    with make() as made:
        yield made
        made.check()


class Reference:
    """K and V simply kept, and attention over them in float64."""

    def __init__(self) -> None:
        self.kept: dict[tuple[int, int], tuple[torch.Tensor, torch.Tensor]] = {}

    def attend(self, layer, entries, q, k, v, scale=HEAD_DIM**-0.5):
        outs, lses = [], []
        new = [tokens for _, tokens in entries]
        pieces = zip(entries, q.split(new), k.split(new), v.split(new), strict=True)
        for (sequence, _), q_row, k_row, v_row in pieces:
            old = self.kept.get((sequence, layer), (k_row[:0], v_row[:0]))
            keys, values = torch.cat([old[0], k_row]), torch.cat([old[1], v_row])
            self.kept[sequence, layer] = keys, values
            group = q.shape[1] // KV_HEADS
            wide = [x.double().repeat_interleave(group, 1).transpose(0, 1) for x in (keys, values)]
            scores = q_row.double().transpose(0, 1) @ wide[0].transpose(1, 2) * scale
            hidden = torch.ones(scores.shape[1:]).triu(len(keys) - len(q_row) + 1).bool()
            scores = scores.masked_fill(hidden, -torch.inf)
            outs.append((scores.softmax(-1) @ wide[1]).transpose(0, 1))
            lses.append(scores.logsumexp(-1).transpose(0, 1))
        return torch.cat(outs), torch.cat(lses)


def random_rows(tokens: int, dtype: torch.dtype = torch.float32) -> list[torch.Tensor]:
    heads = (QUERY_HEADS, KV_HEADS, KV_HEADS)
    return [torch.randn(tokens, n, HEAD_DIM).to(dtype) for n in heads]


def run_step(cache, entries, reference=None, dtype=torch.float32) -> list[torch.Tensor]:
    outs = []
    with cache.step(entries) as step:
        for layer in range(LAYERS):
            q, k, v = random_rows(sum(tokens for _, tokens in entries), dtype)
            outs.append(step.attend(layer, q, k, v))
            if reference is not None:
                expected, _ = reference.attend(layer, entries, q, k, v)
                error = (outs[-1].double() - expected).norm() / expected.norm()
                assert error < (1e-5 if dtype is torch.float32 else 2e-2)
    return outs


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("device_bytes", [ROOMY, TIGHT])
def test_attends_like_plain_tensors(dtype: torch.dtype, device_bytes: str) -> None:
    torch.manual_seed(0)
    reference = Reference()
    with make(device_bytes, dtype) as cache:
        a, b, c = (cache.add() for _ in range(3))
        for entries in (
            [(a, 200), (b, 33)],
            [(b, 1), (a, 1)],
            [(c, 90)],
            [(a, 1), (b, 1), (c, 1)],
            [(a, 40), (b, 1), (c, 7)],
            [(a, 1), (b, 1), (c, 1)],
        ):
            run_step(cache, entries, reference, dtype)
            cache.check()
        assert [cache.length(s) for s in (a, b, c)] == [243, 37, 99]
        streamed = cache.stats().streamed_bytes
        assert streamed > 0 if device_bytes == TIGHT else streamed == 0


@pytest.mark.parametrize("policy", ["fit", "fixed:0.5", "fixed:1", "off"])
def test_bits_do_not_depend_on_the_plan(policy: str) -> None:
    def decode(**options: object) -> list[torch.Tensor]:
        torch.manual_seed(3)
        with make(**options) as cache:
            sequence = cache.add()
            outs = run_step(cache, [(sequence, 150)])
            for _ in range(20):
                outs += run_step(cache, [(sequence, 1)])
            return outs

    expected = decode()
    for options in ({"policy": policy}, {"device_bytes": TIGHT, "block_tokens": 16}):
        for found, wanted in zip(decode(**options), expected, strict=True):
            assert torch.equal(found, wanted)


def test_lse_scale_and_out(cache: pie.TieredKVCache) -> None:
    sequence, reference = cache.add(), Reference()
    out = torch.full((9, 10, HEAD_DIM), 7.0)[:, 2:8]
    with cache.step([(sequence, 9)]) as step:
        for layer in range(LAYERS):
            q, k, v = random_rows(9)
            found, lse = step.attend(layer, q, k, v, scale=0.3, out=out, return_lse=True)
            expected, expected_lse = reference.attend(layer, [(sequence, 9)], q, k, v, 0.3)
            assert found is out
            torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-5)
            torch.testing.assert_close(lse.double(), expected_lse, rtol=1e-4, atol=1e-5)
    assert (out._base[:, :2] == 7).all()
    assert (out._base[:, 8:] == 7).all()


def test_strides_are_free(cache: pie.TieredKVCache) -> None:
    a, b = cache.add(), cache.add()
    heads_first = [x.transpose(0, 1).contiguous().transpose(0, 1) for x in random_rows(5)]
    wide = [torch.cat([x, x], dim=2)[:, :, :HEAD_DIM] for x in heads_first]
    assert not any(x.is_contiguous() for x in heads_first + wide)
    plain = [x.contiguous() for x in heads_first]
    with cache.step([(a, 5)]) as step:
        expected = [step.attend(layer, *plain) for layer in range(LAYERS)]
    with cache.step([(b, 5)]) as step:
        for layer in range(LAYERS):
            rows = wide if layer % 2 else heads_first
            assert torch.equal(step.attend(layer, *rows), expected[layer])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gather_returns_all_of_k_and_v(dtype: torch.dtype) -> None:
    with make("512KiB", dtype) as cache:
        a, b = cache.add(), cache.add()
        kept: dict[tuple[int, int], list[list[torch.Tensor]]] = {}
        for entries in ([(a, 90), (b, 20)], [(a, 1), (b, 3)], [(b, 1), (a, 1)]):
            with cache.step(entries, reader="gather") as step:
                for layer in range(LAYERS):
                    new = [tokens for _, tokens in entries]
                    _, k, v = random_rows(sum(new), dtype)
                    got = step.gather(layer, k, v)
                    for which, (rows, found) in enumerate(zip((k, v), got, strict=True)):
                        assert found.dtype is dtype
                        for row, (sequence, _) in enumerate(entries):
                            pieces = kept.setdefault((sequence, layer), [[], []])[which]
                            pieces.append(rows.split(new)[row])
                            whole = torch.cat(pieces).transpose(0, 1)
                            length = whole.shape[1]
                            assert torch.equal(found[row, :, :length], whole)
                            assert not found[row, :, length:].any()
        cache.check()


def test_tensors_of_gather_outlive_close() -> None:
    cache = make()
    sequence = cache.add()
    _, k, v = random_rows(4)
    with cache.step([(sequence, 4)], reader="gather") as step:
        for layer in range(LAYERS):
            keys, _ = step.gather(layer, k, v)
    cache.close()
    gc.collect()
    assert torch.equal(keys[0], k.transpose(0, 1))  # the memory is still there


def test_truncate_and_free(cache: pie.TieredKVCache) -> None:
    sequence, reference = cache.add(), Reference()
    run_step(cache, [(sequence, 70)], reference)
    cache.truncate(sequence, 35)
    assert cache.length(sequence) == 35
    reference.kept = {key: (k[:35], v[:35]) for key, (k, v) in reference.kept.items()}
    run_step(cache, [(sequence, 2)], reference)
    cache.free(sequence)
    assert cache.stats().kv_bytes == 0
    assert cache.add() != sequence


def test_stats(cache: pie.TieredKVCache) -> None:
    sequence = cache.add()
    run_step(cache, [(sequence, 10)])
    run_step(cache, [(sequence, 1)])
    stats = cache.stats()
    assert stats.kv_bytes == stats["kv_bytes"] == kv_bytes(LAYERS, KV_HEADS, HEAD_DIM, "f32", 11)
    assert (stats.steps, stats.decode_steps, stats.decode_tokens) == (2, 1, 1)
    assert 0 < stats.device_bytes_peak <= stats.device_bytes <= 8 << 20
    promised = "device_bytes_peak pool_bytes_peak streamed_bytes written_bytes stall_fraction"
    promised += " decode_tokens_per_s pool_io policy attention_isa block_tokens"
    assert set(promised.split()) <= set(stats)
    with pytest.raises(AttributeError, match="no 'nothing'"):
        _ = stats.nothing


def test_device_budget_holds_while_the_pool_grows() -> None:
    with make(TIGHT) as cache:
        sequence = cache.add()
        for _ in range(8):
            run_step(cache, [(sequence, 100)])
        stats = cache.stats()
        assert stats.kv_bytes > stats.device_bytes
        assert stats.device_bytes_peak <= 256 << 10
        assert stats.pool_bytes_peak > 0
        assert stats.written_bytes > 0


# What is done wrong.


@pytest.mark.parametrize("size", [0, -4, "0", "nothing", None, 1.5])
def test_bad_device_bytes(size: object) -> None:
    with pytest.raises(pie.ConfigError, match="device_bytes"):
        make(size)


@pytest.mark.parametrize("size", [-4, "much", 2.5])
def test_bad_pool_bytes(size: object) -> None:
    with pytest.raises(pie.ConfigError, match="pool_bytes"):
        make(pool_bytes=size)


def test_budget_too_small_names_the_least_that_works() -> None:
    with pytest.raises(pie.ConfigError, match=r"device_bytes is 1000\b") as refused:
        make(1000)
    sizes = [int(word) for word in str(refused.value).replace(",", " ").split() if word.isdigit()]
    least = max(size for size in sizes if size != 1000)
    with make(least) as cache:
        sequence = cache.add()
        for _ in range(50):
            run_step(cache, [(sequence, 1)])
        cache.check()
        assert cache.stats().streamed_bytes > 0
    assert least <= 3 * LAYERS * kv_bytes(1, KV_HEADS, HEAD_DIM, "f32", 16)


@pytest.mark.parametrize("dtype", ["int8", "fp4", torch.float64, torch.int32, None])
def test_unknown_dtype(dtype: object) -> None:
    with pytest.raises(pie.ConfigError, match=r"not supported: use one of f32, bf16, f16"):
        make(dtype=dtype)


def test_other_devices_are_refused() -> None:
    with pytest.raises(pie.ConfigError, match=r"'cuda'.*use device='cpu'"):
        pie.TieredKVCache(1, 1, 64, "f32", "cuda", device_bytes="1MiB")


@pytest.mark.parametrize("policy", ["", "lru", "fixed:", "fixed:2", "fixed:-1", "fixed:x"])
def test_unknown_policy(policy: str) -> None:
    with pytest.raises(pie.ConfigError, match="policy"):
        make(policy=policy)


@pytest.mark.parametrize("pool_io", ["", "pinned", "fast", None])
def test_unknown_pool_io(pool_io: Any) -> None:
    with pytest.raises(pie.ConfigError, match="pool_io"):
        make(pool_io=pool_io)


def test_pool_io_as_told() -> None:
    with make(pool_io="buffered-threads") as cache:
        assert cache.stats().pool_io == "buffered-threads"


@pytest.mark.parametrize("share", [-0.1, 1.5, float("nan"), "half", True, 0.5])
def test_shares_that_a_cpu_does_not_read_in_place(share: Any) -> None:
    with pytest.raises(pie.ConfigError, match="in_place_share"):
        make(in_place_share=share)


@pytest.mark.parametrize(
    ("option", "value"),
    [("objective", "fast"), ("objective", None), ("slack", -0.1), ("slack", 11), ("slack", "5%"),
     ("slack", float("nan")), ("max_tpot_ms", -1), ("max_tpot_ms", True)],
)  # fmt: skip
def test_objectives_that_cannot_be(option: str, value: Any) -> None:
    with pytest.raises(pie.ConfigError, match=option):
        make(**{option: value})


def test_headroom() -> None:
    """Learned from decode steps: what can be admitted beyond the device, and at what price."""
    with make("1MiB", slack=0.5) as cache:
        assert cache.stats().policy == "adaptive"
        empty = cache.headroom()
        assert 0 < empty.tokens < empty.tokens_most
        assert empty.slowdown_most == 0, "nothing is known yet"
        assert cache.stats().budget_reason == "starting"
        sequence = cache.add()
        rows = empty.tokens + 200
        fill(cache, sequence, rows)
        for _ in range(20):
            fill(cache, sequence, 1)
        stats = cache.stats()
        assert stats.link_bytes_per_s > 0
        assert stats.budget_reason != "starting"
        full = cache.headroom()
        assert full.tokens < empty.tokens
        assert full.tokens_most < empty.tokens_most
        with pytest.raises(pie.LogicError, match="headroom"), cache.step([(sequence, 1)]):
            cache.headroom()


def fill(cache: pie.TieredKVCache, sequence: int, tokens: int) -> None:
    q, k, v = rows_of(tokens)
    with cache.step([(sequence, tokens)]):
        for layer in range(LAYERS):
            cache.attend(layer, q, k, v)


def rows_of(tokens: int) -> tuple[torch.Tensor, ...]:
    heads = (QUERY_HEADS, KV_HEADS, KV_HEADS)
    return tuple(torch.randn(tokens, count, HEAD_DIM) for count in heads)


@pytest.mark.parametrize("block_tokens", [-16, 0, 17, 2**40, "16"])
def test_bad_block_tokens(block_tokens: object) -> None:
    with pytest.raises(pie.ConfigError, match="block_tokens"):
        make(block_tokens=block_tokens)


@pytest.mark.parametrize("geometry", [(0, 2, 32), (3, 0, 32), (3, 2, 0), (3, 2, 33), (3.0, 2, 32)])
def test_bad_geometry(geometry: tuple[int, int, int]) -> None:
    with pytest.raises(pie.ConfigError, match=r"num_layers|num_kv_heads|head_dim"):
        pie.TieredKVCache(*geometry, "f32", device_bytes=ROOMY)


def test_missing_pool_directory(tmp_path: Path) -> None:
    with pytest.raises(pie.ConfigError, match="nowhere"):
        make(pool_dir=tmp_path / "nowhere")
    with pytest.raises(pie.ConfigError, match="nowhere"):
        make(pool_dir=tmp_path / "nowhere", pool_bytes="auto")


def test_file_as_pool_directory(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(pie.ConfigError, match="file"):
        make(pool_dir=tmp_path / "file")


def test_unwritable_pool_directory() -> None:
    with pytest.raises(pie.ConfigError, match="/proc"):
        make(pool_dir="/proc")


@pytest.mark.skipif(not os.path.isdir("/dev/shm"), reason="there is no tmpfs at /dev/shm")
def test_tmpfs_must_be_asked_for() -> None:
    with pytest.raises(pie.ConfigError, match="tmpfs:"):
        make(pool_dir="/dev/shm")
    with pytest.warns(RuntimeWarning, match="buffered-threads"):
        asked = make(TIGHT, pool_dir="tmpfs:/dev/shm")
    with asked as cache:
        sequence = cache.add()
        for _ in range(5):
            run_step(cache, [(sequence, 100)])
        assert "buffered" in cache.stats().pool_io


def test_pool_leaves_no_file(tmp_path: Path) -> None:
    with make(TIGHT, pool_dir=tmp_path) as cache:
        sequence = cache.add()
        for _ in range(5):
            run_step(cache, [(sequence, 100)])
        assert cache.stats().pool_bytes_used > 0
        assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("pool_bytes", [None, "512KiB"])
def test_exhausted_tiers_lose_nothing(pool_bytes: str | None) -> None:
    torch.manual_seed(5)
    reference = Reference()
    with make(TIGHT, pool_bytes=pool_bytes) as cache:
        sequence = cache.add()
        run_step(cache, [(sequence, 60)], reference)
        with pytest.raises(pie.CapacityError, match=r"tier|pool|device"):
            run_step(cache, [(sequence, 5000)])
        assert cache.length(sequence) == 60
        cache.check()
        run_step(cache, [(sequence, 1)], reference)
        assert cache.length(sequence) == 61


def test_use_after_free(cache: pie.TieredKVCache) -> None:
    sequence = cache.add()
    cache.free(sequence)
    for call in (
        lambda: cache.free(sequence),
        lambda: cache.length(sequence),
        lambda: cache.truncate(sequence, 0),
        lambda: cache.step([(sequence, 1)]).__enter__(),
    ):
        with pytest.raises(pie.LogicError, match=f"sequence {sequence}"):
            call()


def test_use_after_close() -> None:
    cache = make()
    sequence = cache.add()
    cache.close()
    cache.close()
    for call in (
        cache.add,
        cache.stats,
        cache.check,
        lambda: cache.length(sequence),
        lambda: cache.step([(sequence, 1)]).__enter__(),
    ):
        with pytest.raises(pie.LogicError, match="closed"):
            call()


def test_close_inside_a_step() -> None:
    cache = make()
    sequence = cache.add()

    def close_and_go_on() -> None:
        with cache.step([(sequence, 1)]) as step:
            cache.close()
            step.attend(0, *random_rows(1))

    with pytest.raises(pie.LogicError, match="closed"):
        close_and_go_on()


def test_step_inside_a_step(cache: pie.TieredKVCache) -> None:
    sequence = cache.add()
    inner = cache.step([(sequence, 1)])
    with pytest.raises(pie.LogicError, match="step"), cache.step([(sequence, 1)]):
        inner.__enter__()
    assert cache.length(sequence) == 0


def test_changing_sequences_inside_a_step(cache: pie.TieredKVCache) -> None:
    sequence = cache.add()
    run_step(cache, [(sequence, 3)])
    for call in (lambda: cache.truncate(sequence, 1), lambda: cache.free(sequence)):
        with pytest.raises(pie.LogicError, match="step"), cache.step([(sequence, 1)]):
            call()
    assert cache.length(sequence) == 3


def test_bad_batches(cache: pie.TieredKVCache) -> None:
    sequence = cache.add()
    bad = ([], [(sequence, 1)] * 2, [(999, 1)], [(sequence, 0)], [(sequence, -1)], [("a", 1)])
    for batch in bad:
        with pytest.raises(pie.LogicError, match=r"batch|sequence|tokens"), cache.step(batch):
            pass
    run_step(cache, [(sequence, 1)])


def test_layers_out_of_order(cache: pie.TieredKVCache) -> None:
    sequence = cache.add()

    def attend_in(layers: list[int]) -> None:
        with cache.step([(sequence, 1)]) as step:
            for layer in layers:
                step.attend(layer, *random_rows(1))

    for layers in ([1], [0, 0], [0, 2], [0, 1, 2, 0], [-1], [LAYERS]):
        with pytest.raises(pie.LogicError, match="layer"):
            attend_in(layers)
        assert cache.length(sequence) == 0
    attend_in([0, 1, 2])


def test_missing_layers_take_the_step_back(cache: pie.TieredKVCache) -> None:
    sequence, reference = cache.add(), Reference()
    run_step(cache, [(sequence, 20)], reference)
    with pytest.raises(pie.LogicError, match="layers"), cache.step([(sequence, 30)]) as step:
        step.attend(0, *random_rows(30))
    assert cache.length(sequence) == 20
    run_step(cache, [(sequence, 1)], reference)


def test_exception_takes_the_step_back(cache: pie.TieredKVCache) -> None:
    sequence, reference = cache.add(), Reference()
    run_step(cache, [(sequence, 20)], reference)
    with contextlib.suppress(KeyError), cache.step([(sequence, 30)]) as step:
        step.attend(0, *random_rows(30))
        raise KeyError
    assert cache.length(sequence) == 20
    run_step(cache, [(sequence, 1)], reference)


def test_outside_a_step(cache: pie.TieredKVCache) -> None:
    q, k, v = random_rows(1)
    with pytest.raises(pie.LogicError, match=r"attend\(\) was called outside a step"):
        cache.attend(0, q, k, v)
    with pytest.raises(pie.LogicError, match=r"gather\(\) was called outside a step"):
        cache.gather(0, k, v)


def test_reader_must_be_the_one_asked_for(cache: pie.TieredKVCache) -> None:
    sequence = cache.add()
    q, k, v = random_rows(1)
    with pytest.raises(pie.LogicError, match="reader"), cache.step([(sequence, 1)]) as step:
        step.gather(0, k, v)
    gather = cache.step([(sequence, 1)], reader="gather")
    with pytest.raises(pie.LogicError, match="reader"), gather as step:
        step.attend(0, q, k, v)
    with pytest.raises(pie.ConfigError, match="'copy'"):
        cache.step([(sequence, 1)], reader="copy").__enter__()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda q, k, v: (q[:1], k, v), "q has shape"),
        (lambda q, k, v: (q, k[:1], v), "k has shape"),
        (lambda q, k, v: (q, k, v[:, :1]), "v has shape"),
        (lambda q, k, v: (q[:, :5], k, v), "query_heads a multiple"),
        (lambda q, k, v: (q[:, :, :16], k, v), "q has shape"),
        (lambda q, k, v: (q.flatten(1), k, v), "q has shape"),
        (lambda q, k, v: (q, k.double(), v), "k is torch.float64"),
        (lambda q, k, v: (q.bfloat16(), k, v), "q is torch.bfloat16"),
        (lambda q, k, v: (q, k, v.to("meta")), "v is on meta"),
        (lambda q, k, v: (q, k.repeat(1, 1, 2)[:, :, ::2], v), "k is not contiguous in its last"),
        (lambda q, k, v: (q.requires_grad_(), k, v), "q requires grad"),
    ],
)
def test_wrong_tensors(cache: pie.TieredKVCache, change, message: str) -> None:
    sequence = cache.add()
    with pytest.raises(pie.LogicError, match=message), cache.step([(sequence, 2)]) as step:
        step.attend(0, *change(*random_rows(2)))
    assert cache.length(sequence) == 0


def test_wrong_out(cache: pie.TieredKVCache) -> None:
    sequence = cache.add()
    with pytest.raises(pie.LogicError, match="out has shape"), cache.step([(sequence, 2)]) as step:
        step.attend(0, *random_rows(2), out=torch.empty(2, 1, HEAD_DIM))


def test_grad_is_fine_where_it_is_off(cache: pie.TieredKVCache) -> None:
    sequence = cache.add()
    with torch.no_grad(), cache.step([(sequence, 2)]) as step:
        for layer in range(LAYERS):
            step.attend(layer, *[x.requires_grad_() for x in random_rows(2)])
    assert cache.length(sequence) == 2


def test_two_threads_at_once_are_refused() -> None:
    with make("32MiB") as cache:
        sequence = cache.add()
        refused: list[pie.LogicError] = []

        def call(work) -> None:
            try:
                work()
            except pie.LogicError as error:
                refused.append(error)

        with contextlib.suppress(KeyError), cache.step([(sequence, 3000)]) as step:
            rows = random_rows(3000)
            worker = threading.Thread(target=call, args=[lambda: step.attend(0, *rows)])
            worker.start()
            while worker.is_alive() and not refused:
                call(cache.stats)
            worker.join()
            raise KeyError  # takes the step back
        assert refused, "the long attend() and stats() never met"
        assert "second thread" in str(refused[0])
        run_step(cache, [(sequence, 1)])
        cache.check()


# ---- forks, budgets, tables of frames ------------------------------------------------------------


@pytest.mark.parametrize("budget", [ROOMY, TIGHT])
def test_a_fork_goes_its_own_way(budget):
    with make(budget) as cache:
        reference = Reference()
        first = cache.add()
        run_step(cache, [(first, 70)], reference)
        second = cache.fork(first)
        for layer in range(LAYERS):
            reference.kept[second, layer] = reference.kept[first, layer]
        for _ in range(20):
            run_step(cache, [(first, 1), (second, 2)], reference)
        cache.free(first)
        run_step(cache, [(second, 40)], reference)
        assert cache.length(second) == 150
        cache.check()


def test_budgets_move_and_refusals_say_what_is_there(cache):
    reference = Reference()
    sequence = cache.add()
    run_step(cache, [(sequence, 400)], reference)
    cache.resize(device_bytes="128KiB")
    assert cache.stats().device_bytes <= 128 << 10
    assert cache.stats().device_bytes_used <= 128 << 10
    run_step(cache, [(sequence, 1)], reference)
    cache.resize(pool_bytes=2 << 20, device_bytes="4MiB")
    assert cache.stats().pool_bytes <= 2 << 20
    for _ in range(3):
        run_step(cache, [(sequence, 1)], reference)
    with pytest.raises(pie.ConfigError, match="device_bytes"):
        cache.resize(device_bytes=1)
    with pytest.raises(pie.CapacityError, match="cannot hold"):
        cache.resize(device_bytes="256KiB", pool_bytes=0)
    run_step(cache, [(sequence, 1)], reference)
    with pytest.raises(pie.LogicError, match="step is running"), cache.step([(sequence, 1)]):
        cache.resize(device_bytes="4MiB")


def test_pages_and_frames_are_the_memory_itself():
    with make("2MiB", block_tokens=16) as cache:
        first, second = cache.add(), cache.add()
        entries = [(first, 40), (second, 3)]
        with cache.step(entries, reader="pages") as step:
            for layer in range(LAYERS):
                _, k, v = random_rows(43)
                table = step.pages(layer, k, v)
                frames = cache.frames
                assert table.dtype is torch.int32
                assert table.tolist()[1][1:] == [-1, -1]
                blocks = frames[table[0].long()]  # [3, 2, heads, 16, dim]
                for side, rows in ((0, k), (1, v)):
                    kept = blocks[:, side].transpose(1, 2).flatten(0, 1)[:40]
                    assert torch.equal(kept, rows[:40])
                frames[table[1, 0], 0, 0, 2] = 7.0
                assert frames.data_ptr() == cache.frames.data_ptr()
        with cache.step([(second, 1)], reader="gather") as step:
            for layer in range(LAYERS):
                keys, _ = step.gather(layer, *random_rows(1)[1:])
                assert bool((keys[0, 0, 2] == 7.0).all()), (
                    "what torch writes is what the cache holds"
                )


def test_tables_outlive_larger_ones():
    with make(block_tokens=16) as cache:
        sequence = cache.add()
        kept = []
        for tokens in (20, 3000):
            with cache.step([(sequence, tokens)], reader="pages") as step:
                for layer in range(LAYERS):
                    table = step.pages(layer, *random_rows(tokens)[1:])
                    kept.append((table, table.clone()))
        for table, said in kept:
            assert torch.equal(table, said)
    table, said = kept[-1]
    assert torch.equal(table, said), "closing the cache does not take it away"


def open_files() -> list[str]:
    """What this process holds open, but for the listing itself."""
    found = []
    for descriptor in os.listdir("/proc/self/fd"):
        with contextlib.suppress(FileNotFoundError):
            found.append(os.readlink(f"/proc/self/fd/{descriptor}"))
    return sorted(found)


def test_views_outlive_the_cache_and_keep_its_memory_alone():
    before = open_files()
    cache = make("2MiB")
    frames = cache.frames
    with torch.inference_mode():
        assert not cache.frames.is_inference()
    sequence = cache.add()
    with cache.step([(sequence, 40)], reader="gather") as step:
        for layer in range(LAYERS):
            keys, _ = step.gather(layer, *random_rows(40)[1:])
    gathered = keys.clone()
    assert open_files() != before
    cache.close()
    assert open_files() == before, "the pool's file and ring are given back at once"
    del cache
    gc.collect()
    assert torch.equal(keys, gathered)
    assert frames.sum().isfinite()
    frames.fill_(1.0)


def test_implicit_default_device_is_not_used():
    with torch.device("meta"), make() as cache:
        sequence = cache.add()
        rows = [
            torch.randn(3, n, HEAD_DIM, device="cpu") for n in (QUERY_HEADS, KV_HEADS, KV_HEADS)
        ]
        with cache.step([(sequence, 3)]) as step:
            outs = [step.attend(layer, *rows) for layer in range(LAYERS)]
        assert all(out.device.type == "cpu" for out in outs)


def test_a_pool_shrinks_below_what_idle_sequences_set_aside():
    """What fits on the device by then is brought back."""
    frame = kv_bytes(1, KV_HEADS, HEAD_DIM, "f32", 16)  # a block of one layer
    reference = Reference()
    with make(60 * frame, block_tokens=16, pool_bytes=300 * frame) as cache:
        idle, large = cache.add(), cache.add()
        run_step(cache, [(idle, 160)], reference)
        run_step(cache, [(large, 480)])
        cache.free(large)
        small = cache.add()
        run_step(cache, [(small, 16)], reference)  # while all would fit
        assert cache.stats().pool_bytes_used > 4 * frame
        cache.resize(pool_bytes=4 * frame)
        assert cache.stats().pool_bytes_used <= 4 * frame
        cache.check()
        run_step(cache, [(idle, 1), (small, 1)], reference)


def test_a_resize_that_does_not_fit_speaks_of_the_resize():
    with make(policy="off", block_tokens=16) as cache:
        run_step(cache, [(cache.add(), 2000)])
        with pytest.raises(pie.CapacityError, match="cannot hold what the sequences hold"):
            cache.resize(device_bytes="512KiB")


def test_windows_hide_and_give_back():
    window = 20
    with make(windows=[window, 0, window], block_tokens=16) as cache:
        sequence = cache.add()
        run_step(cache, [(sequence, 200)])
        frame = 2 * KV_HEADS * 16 * HEAD_DIM * 4
        assert cache.stats().kv_bytes == frame // 16 * (200 + 2 * (200 - 176))
        with pytest.raises(pie.LogicError, match="window of 20"):
            cache.truncate(sequence, 100)
        run_step(cache, [(sequence, 1)])
    with pytest.raises(pie.ConfigError, match="windows has 2 entries"):
        make(windows=[1, 2])


@pytest.mark.parametrize(
    ("options", "name"),
    [({"policy": None}, "policy"), ({"windows": [-1, 0, 0]}, "window")],
)
def test_odd_options_are_refused(options, name):
    with pytest.raises((pie.ConfigError, pie.LogicError), match=name):
        make(**options)


def test_what_is_no_tensor_is_refused(cache):
    sequence = cache.add()
    _, k, v = random_rows(1)
    with pytest.raises(pie.LogicError, match="q is a list"), cache.step([(sequence, 1)]) as step:
        step.attend(0, [1.0], k, v)


def run_steps(cache, entries) -> None:
    """Three, since what is on the device already needs no reading."""
    for _ in range(3):
        run_step(cache, entries)


def pool_file_of(directory: Path) -> Path:
    files = [Path(f"/proc/self/fd/{fd}") for fd in os.listdir("/proc/self/fd")]
    return next(f for f in files if f.exists() and str(f.resolve()).startswith(str(directory)))


def test_a_garbled_frame_fails_its_sequence_and_no_other(tmp_path):
    with make(TIGHT, policy="fixed:1", pool_dir=tmp_path, block_tokens=16) as cache:
        bad, good = cache.add(), cache.add()
        for sequence, value in ((bad, 1.5), (good, 2.5)):
            with cache.step([(sequence, 200)]) as step:
                for layer in range(LAYERS):
                    rows = torch.full((200, KV_HEADS, HEAD_DIM), value)
                    step.attend(layer, torch.randn(200, QUERY_HEADS, HEAD_DIM), rows, rows)
        while cache.stats().written_bytes < cache.stats().kv_bytes * 0.9:
            run_step(cache, [(good, 1)])
        with pool_file_of(tmp_path).open("r+b") as file:
            content = file.read()
            at = content.find(torch.tensor([1.5]).numpy().tobytes() * 64)
            file.seek(at)
            file.write(b"?")
            file.flush()
            os.fsync(file.fileno())
        for _ in range(2):
            with pytest.raises(pie.IoError, match="not the data written") as failure:
                run_steps(cache, [(good, 1), (bad, 1)])
            assert failure.value.sequence == bad
        assert cache.length(bad) < 203
        for _ in range(3):
            run_step(cache, [(good, 1)])
        cache.free(bad)
        run_step(cache, [(good, 1)])
        cache.check()
