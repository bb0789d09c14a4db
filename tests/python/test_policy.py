"""Policies of the caller's: what they say is done, and what cannot be relied on is left."""

import time
import warnings
from collections.abc import Callable

import pytest
import torch

import pie

LAYERS, HEADS, HEAD_DIM = 3, 2, 32
FRAME = 2 * HEADS * HEAD_DIM * 16 * 4  # bytes


class By:
    """A policy that is a function."""

    def __init__(self, rule: Callable[[pie.Stats], object]) -> None:
        self.rule = rule
        self.asked = 0

    def streamed_bytes(self, stats: pie.Stats) -> int:
        self.asked += 1
        return self.rule(stats)  # type: ignore[return-value]


def decode(
    policy: object, steps: int = 24, rest_s: float = 0, **options: object
) -> tuple[torch.Tensor, pie.Stats]:
    """What attention gave over a prompt and so many steps of two sequences.

    After the prompt and the first three steps the disk has time to write what they filled.
    """
    torch.manual_seed(5)
    options = {"device_bytes": "8MiB", "pool_bytes": "8MiB", "block_tokens": 16, **options}
    with pie.TieredKVCache(LAYERS, HEADS, HEAD_DIM, "f32", policy=policy, **options) as cache:
        batch = [cache.add(), cache.add()]
        outs = []
        for number, tokens in enumerate([100] + [1] * steps):
            time.sleep(rest_s if 1 <= number <= 4 else 0)
            with cache.step([(sequence, tokens) for sequence in batch]) as step:
                for layer in range(LAYERS):
                    rows = (torch.randn(2 * tokens, HEADS, HEAD_DIM) for _ in range(3))
                    outs.append(step.attend(layer, *rows)[:2])
        cache.check()
        return torch.cat(outs), cache.stats()


def test_what_it_says_is_streamed() -> None:
    policy = By(lambda _: 12 * FRAME)
    _, stats = decode(policy, rest_s=0.5)
    assert policy.asked == 25
    assert 20 * 12 * FRAME <= stats.streamed_bytes <= 24 * 16 * FRAME
    assert stats.policy == "By"
    assert decode(By(lambda _: 0))[1].streamed_bytes == 0


def test_it_is_told_what_was_measured() -> None:
    seen: list[pie.Stats] = []
    decode(By(lambda stats: seen.append(stats) or 0))
    assert [stats.steps for stats in seen] == list(range(25))
    assert seen[-1].kv_bytes > seen[1].kv_bytes > 0


@pytest.mark.parametrize("streamed", [1, FRAME - 1, 10**15])
@pytest.mark.parametrize("pool", [2 * FRAME, 40 * FRAME, "8MiB"])
def test_more_than_there_is_is_all_there_is(streamed: int, pool: object) -> None:
    expected, _ = decode("off")
    found, _ = decode(By(lambda _: streamed), pool_bytes=pool)
    assert torch.equal(found, expected)


def test_bits_do_not_depend_on_a_plan_that_changes_at_every_step() -> None:
    expected, _ = decode("off")
    answers = iter([0, 30, 3, 36, 0, 1, 18, 2, 40, 7] * 3)
    found, stats = decode(By(lambda _: next(answers) * FRAME), rest_s=0.5)
    assert torch.equal(found, expected)
    assert stats.streamed_bytes > 0


def raises(stats: pie.Stats) -> int:
    if stats.steps == 10:
        raise KeyError("a rule that fails")
    return 12 * FRAME


def is_slow(stats: pie.Stats) -> int:
    if stats.steps > 2:
        time.sleep(0.02)
    return 12 * FRAME


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (raises, "raised KeyError: 'a rule that fails'"),
        (is_slow, "more than 5 ms"),
        (lambda _: -1, "answered -1"),
        (lambda _: None, "answered None"),
        (lambda _: 0.5, "answered 0.5"),
        (lambda _: True, "answered True"),
        (lambda _: 2**80, "no number of bytes"),
    ],
)
def test_one_that_cannot_be_relied_on_is_left(rule: Callable[..., object], words: str) -> None:
    expected, _ = decode("off")
    policy = By(rule)
    with pytest.warns(RuntimeWarning, match="'fit' takes over") as caught:
        found, stats = decode(policy, device_bytes=32 * FRAME)
    assert [words in str(one.message) for one in caught] == [True]
    assert caught[0].filename == __file__
    assert torch.equal(found, expected), "nothing is lost"
    assert stats.policy == "fit"
    assert policy.asked <= 11
    assert stats.streamed_bytes > 0, "what does not fit is streamed"


def test_what_is_no_policy_is_refused() -> None:
    for policy in (None, 3, object()):
        with pytest.raises(pie.ConfigError, match=r"policy is .*streamed_bytes"):
            decode(policy)


def test_a_good_one_is_not_warned_of() -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        decode(By(lambda stats: stats.steps * FRAME))
