"""What happened when: a record of a cache's last steps, for people to look at.

`cache.start_trace()`, some steps, and `cache.take_trace()` gives a Trace. `save` writes it for
https://ui.perfetto.dev (or chrome://tracing), pie.report draws it.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

_LANES = {"steps": 1, "compute": 2, "to the device": 10, "to the pool": 40}  # first thread ids
_COPIES = {"load": "to the device", "write": "to the pool"}


class Event(NamedTuple):
    """Something that took a while. Times are nanoseconds of one clock.

    kind: "layer", from where its attention begins to where that of the next one does or the step
        ends; "attention", of that, its KV appended and read; "stall", the computation waits for
        copies; "load" and "write", a copy to the device and to the pool.
    """

    kind: str
    step: int  # from 1; of a copy, when that ended
    layer: int  # of a copy, its first block's; of a stall, none
    began_ns: int
    ended_ns: int
    bytes: int  # that a layer reads, or a copy moves
    streamed_bytes: int  # of those that a layer reads, in the pool as it begins


class Step(NamedTuple):
    """A step that was finished. Stall and traffic are what became known since the one before."""

    step: int
    decode: bool  # every sequence gained one token
    rows: int  # new tokens
    began_ns: int
    ended_ns: int  # of a decode step that another follows, where that begins
    stall_ns: int
    loaded_bytes: int
    loads_busy_ns: int  # the link to the device was at work, at most
    written_bytes: int
    writes_busy_ns: int
    kv_bytes: int  # that it read
    resident_bytes: int  # on the device as it ended
    ring_bytes: int  # the ring's size
    budget_bytes: int  # that a step may stream by the objective
    budget_reason: str  # what bounds that
    link_bytes_per_s: float  # to the device while it is at work, as learned so far; 0: not yet
    slowdown: float  # of a decode step, against all on the device; estimated


@dataclass(frozen=True)
class Trace:
    """The last steps and events there was room for, oldest first."""

    steps: list[Step]
    events: list[Event]
    dropped: int = 0  # older ones, of both

    @staticmethod
    def of(steps: Iterable[Any], events: Iterable[Any], dropped: int) -> Trace:
        """From what the native side gives."""
        ordered = sorted((Event(*event) for event in events), key=lambda event: event.began_ns)
        return Trace([Step(*step) for step in steps], ordered, dropped)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Writes Chrome's trace event format, which Perfetto opens; OSError where it cannot."""
        Path(path).write_text(json.dumps(self.chrome()), encoding="utf-8")

    def chrome(self) -> dict[str, Any]:
        """The same as an object for JSON: a lane of steps, one of compute, and those of copies.

        Copies that are under way at once are in lanes of their own, since what is in one lane must
        nest.
        """
        records = [*self._compute(), *self._copies(), *self._counters()]
        threads = {record["tid"] for record in records if "tid" in record}
        names = [
            {
                "ph": "M",
                "name": "thread_name",
                "pid": 1,
                "tid": thread,
                "args": {"name": _lane_name(thread)},
            }
            for thread in sorted(threads)
        ]
        return {"displayTimeUnit": "ms", "traceEvents": names + records}

    def _compute(self) -> Iterator[dict[str, Any]]:
        for step in self.steps:
            name = f"{'decode' if step.decode else 'prompt'} {step.step}"
            args = step._asdict()
            yield _slice(name, "step", _LANES["steps"], step.began_ns, step.ended_ns, args)
        for event in self.events:
            if event.kind in _COPIES:
                continue
            name = event.kind if event.kind != "layer" else f"layer {event.layer}"
            args = {"bytes": event.bytes, "streamed_bytes": event.streamed_bytes}
            yield _slice(name, event.kind, _LANES["compute"], event.began_ns, event.ended_ns, args)

    def _copies(self) -> Iterator[dict[str, Any]]:
        for kind, lane in _COPIES.items():
            free_ns: list[int] = []  # of each lane of this way
            for event in self.events:
                if event.kind != kind:
                    continue
                at = next((i for i, ns in enumerate(free_ns) if ns <= event.began_ns), len(free_ns))
                free_ns[at : at + 1] = [event.ended_ns]
                args = {"bytes": event.bytes, "first_layer": event.layer}
                thread = _LANES[lane] + min(at, 29)
                yield _slice(kind, "copy", thread, event.began_ns, event.ended_ns, args)

    def _counters(self) -> Iterator[dict[str, Any]]:
        for step in self.steps:
            for name in ("resident_bytes", "ring_bytes", "budget_bytes", "loaded_bytes"):
                yield {
                    "ph": "C",
                    "name": name,
                    "pid": 1,
                    "ts": step.began_ns / 1e3,
                    "args": {name: getattr(step, name)},
                }


def _lane_name(thread: int) -> str:
    name = next(name for name, first in reversed(_LANES.items()) if thread >= first)
    return name if thread == _LANES[name] else f"{name}, {thread - _LANES[name] + 1}"


def _slice(
    name: str, category: str, thread: int, began_ns: int, ended_ns: int, args: dict[str, Any]
) -> dict[str, Any]:
    return {
        "ph": "X",
        "name": name,
        "cat": category,
        "pid": 1,
        "tid": thread,
        "ts": began_ns / 1e3,  # microseconds
        "dur": (ended_ns - began_ns) / 1e3,
        "args": args,
    }
