"""Stats as Prometheus reads them."""

import re

import pie
from pie.stats import METRICS

LINE = re.compile(r'pie_[a-z_]+(\{([a-z_]+="([^"\\\n]|\\.)*",?)+\})? [-+.e0-9]+')
WORDS = {"policy", "pool_io", "pool_io_reason", "budget_reason", "attention_isa"}


def stats() -> pie.Stats:
    with pie.TieredKVCache(2, 2, 32, "f32", device_bytes="8MiB", policy="fit") as cache:
        cache.add()
        return cache.stats()


def test_every_number_has_a_name() -> None:
    assert set(stats()) - WORDS == set(METRICS)
    names = [name for name, _ in METRICS.values()]
    assert len(set(names)) == len(names)


def test_names_say_what_they_count_in() -> None:
    for key, (name, scale) in METRICS.items():
        assert ("seconds" in name) == (scale != 1), key
        assert ("bytes" in name) == ("bytes" in key), key


def test_the_text_is_one_that_prometheus_reads() -> None:
    now = stats()
    now["policy"] = 'my "own"\npolicy\\'
    now["stall_ns"] = 1_500_000_000
    lines = now.prometheus().split("\n")
    assert lines[-1] == ""
    for kind, line in zip(lines[:-1:2], lines[1::2], strict=True):
        name = re.split(r"[{ ]", line)[0]
        assert kind == f"# TYPE {name} {'counter' if name.endswith('_total') else 'gauge'}"
        assert LINE.fullmatch(line), line
    assert "pie_stall_seconds_total 1.5" in lines
    assert "pie_sequences 1" in lines
    assert 'policy="my \\"own\\"\\npolicy\\\\"' in lines[-2]
