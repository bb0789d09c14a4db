"""Traces as users get them, and the page that is drawn of one."""

import json
import re
from collections import defaultdict
from html.parser import HTMLParser
from pathlib import Path

import pytest
import torch

import pie
from pie import report
from pie.trace import Event, Step

LAYERS, HEADS, HEAD_DIM = 3, 2, 32


def traced(steps: int = 12, **options: object) -> tuple[pie.Trace, pie.Stats]:
    options = {"device_bytes": "256KiB", "pool_bytes": "8MiB", "block_tokens": 16, **options}
    with pie.TieredKVCache(LAYERS, HEADS, HEAD_DIM, "f32", **options) as cache:
        cache.start_trace()
        batch = [cache.add(), cache.add()]
        for tokens in [100] + [1] * steps:
            with cache.step([(sequence, tokens) for sequence in batch]) as step:
                for layer in range(LAYERS):
                    step.attend(layer, *(torch.randn(2 * tokens, HEADS, HEAD_DIM) for _ in "qkv"))
        return cache.take_trace(), cache.stats()


def total(events: list[Event], kind: str, field: str) -> int:
    return sum(getattr(event, field) for event in events if event.kind == kind)


def test_it_is_what_was_counted() -> None:
    trace, stats = traced()
    assert [step.decode for step in trace.steps] == [False] + [True] * 12
    assert [step.rows for step in trace.steps] == [200] + [2] * 12
    assert total(trace.events, "load", "bytes") == stats.streamed_bytes > 0
    assert total(trace.events, "write", "bytes") == stats.written_bytes > 0
    stalls = [e.ended_ns - e.began_ns for e in trace.events if e.kind == "stall"]
    assert sum(stalls) == stats.stall_ns
    for kind in ("layer", "attention"):
        assert sum(event.kind == kind for event in trace.events) == 13 * LAYERS
    assert sum(step.loaded_bytes for step in trace.steps) <= stats.streamed_bytes
    assert trace.steps[-1].kv_bytes == 2 * LAYERS * 7 * 16 * 2 * HEADS * HEAD_DIM * 4
    assert trace.steps[-1].budget_reason == stats.budget_reason


def test_nothing_is_recorded_unasked() -> None:
    with pie.TieredKVCache(LAYERS, HEADS, HEAD_DIM, "f32", device_bytes="8MiB") as cache:
        assert cache.take_trace() == pie.Trace([], [])
        with pytest.raises(pie.ConfigError, match="from 1 to 10,000,000"):
            cache.start_trace(0)
        with pytest.raises(pie.LogicError, match="events"):
            cache.start_trace("many")
        step = cache.step([(cache.add(), 1)])
        step.__enter__()
        for call in (cache.start_trace, cache.take_trace):
            with pytest.raises(pie.LogicError, match=call.__name__):
                call()
        cache.abort()


# What lies in one lane nests, or trace viewers draw it wrong.
def test_what_perfetto_reads(tmp_path: Path) -> None:
    trace, _ = traced()
    trace.save(tmp_path / "trace.json")
    records = json.loads((tmp_path / "trace.json").read_text())["traceEvents"]
    lanes = defaultdict(list)
    for record in records:
        assert record["ph"] in "MXC"
        if record["ph"] == "X":
            lanes[record["tid"]].append((record["ts"], record["ts"] + record["dur"]))
    names = {r["tid"]: r["args"]["name"] for r in records if r["ph"] == "M"}
    assert set(names) == set(lanes)
    assert {"steps", "compute", "to the device", "to the pool"} <= set(names.values())
    for spans in lanes.values():
        open_until: list[float] = []
        for began, ended in sorted(spans, key=lambda span: (span[0], -span[1])):
            while open_until and open_until[-1] <= began + 1e-3:
                open_until.pop()
            assert not open_until or ended <= open_until[-1] + 1e-3
            open_until.append(ended)


class Page(HTMLParser):
    """What the page is made of, and what it would load."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.loads: list[str] = []

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        for name, value in attributes:
            link = name in ("src", "href", "xlink:href") and not str(value).startswith(
                ("#", "data:")
            )
            self.loads += [str(value)] if link else []


def test_the_page_has_everything_in_it(tmp_path: Path) -> None:
    trace, _ = traced()
    report.write(trace, tmp_path / "report.html", "<b>mine</b>")
    text = (tmp_path / "report.html").read_text()
    page = Page()
    page.feed(text)
    assert page.tags.count("svg") == 4
    assert "script" not in page.tags
    assert "b" not in page.tags, "titles are text"
    assert page.loads == []
    assert "prefers-color-scheme: dark" in text
    assert report._INK not in text
    for words in ("13, of them 12 of decode", "stalled", "bound: ", "share on the device"):
        assert words in text
    shown = re.sub(r"\s+", " ", text)
    assert f"{trace.steps[-1].kv_bytes / 2**20:.1f} MiB" in shown


def test_pages_of_odd_traces() -> None:
    step = Step(1, False, 5, 0, 1000, 0, 0, 0, 0, 0, 0, 0, 0, 0, "starting", 0.0, 0.0)
    roomy = {"policy": "off", "pool_bytes": None, "device_bytes": "8MiB"}
    for trace in (pie.Trace([step], []), traced(0)[0], traced(3, **roomy)[0]):
        assert report.page(trace).count("<svg") == 4
    with pytest.raises(ValueError, match="No step was traced"):
        report.page(pie.Trace([], []))


def test_a_picture_by_itself_brings_its_colours() -> None:
    alone = report.svg(2, lambda figure: figure.subplots(), standalone=True)
    assert alone.startswith("<svg")
    assert "prefers-color-scheme" in alone


def test_without_matplotlib(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    with pytest.raises(ImportError, match=r"pip install '.\[report\]'"):
        report.require_matplotlib()
