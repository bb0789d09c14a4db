"""What a cache says of itself, and its names in Prometheus."""

from __future__ import annotations

from typing import Any

_NS = 1e-9  # seconds
# Of each number of stats(): its name without "pie_", its unit as Prometheus has it, and what a unit
# here is in units there. Those that end in "_total" are counters, the others gauges.
METRICS: dict[str, tuple[str, float]] = {
    "device_bytes": ("device_limit_bytes", 1),
    "device_bytes_used": ("device_used_bytes", 1),
    "device_bytes_peak": ("device_peak_bytes", 1),
    "pool_bytes": ("pool_limit_bytes", 1),
    "pool_bytes_used": ("pool_used_bytes", 1),
    "pool_bytes_peak": ("pool_peak_bytes", 1),
    "kv_bytes": ("kv_bytes", 1),
    "streamed_bytes": ("streamed_bytes_total", 1),
    "written_bytes": ("written_bytes_total", 1),
    "in_place_bytes": ("in_place_bytes_total", 1),
    "steps": ("steps_total", 1),
    "decode_steps": ("decode_steps_total", 1),
    "decode_tokens": ("decode_tokens_total", 1),
    "decode_ns": ("decode_seconds_total", _NS),
    "decode_stall_ns": ("decode_stall_seconds_total", _NS),
    "stall_ns": ("stall_seconds_total", _NS),
    "stall_fraction": ("decode_stall_ratio", 1),
    "decode_tokens_per_s": ("decode_tokens_per_second", 1),
    "retries": ("transfer_retries_total", 1),
    "failed_writes": ("failed_writes_total", 1),
    "sequences": ("sequences", 1),
    "block_tokens": ("block_tokens", 1),
    "resident_frames": ("resident_frames", 1),
    "ring_frames": ("ring_frames", 1),
    "budget_bytes": ("budget_bytes", 1),
    "budget_moves": ("budget_moves_total", 1),
    "link_bytes_per_s": ("link_bytes_per_second", 1),
    "interference_ns_per_byte": ("interference_seconds_per_byte", _NS),
    "slowdown": ("slowdown_ratio", 1),
}
_WORDS = ("policy", "pool_io", "budget_reason", "attention_isa")  # labels of pie_info


class Stats(dict[str, Any]):
    """Counters since construction, and gauges: keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"stats() has no {name!r}") from None

    def prometheus(self) -> str:
        """The same in Prometheus' text format: `pie_streamed_bytes_total` and so on, in bytes and
        seconds, and one `pie_info` whose labels are the words among them.
        """
        lines = []
        for key, (name, scale) in METRICS.items():
            kind = "counter" if name.endswith("_total") else "gauge"
            value = self[key] * scale
            lines += [f"# TYPE pie_{name} {kind}", f"pie_{name} {value}"]
        labels = ",".join(f'{word}="{_escaped(str(self[word]))}"' for word in _WORDS)
        lines += ["# TYPE pie_info gauge", f"pie_info{{{labels}}} 1", ""]
        return "\n".join(lines)


def _escaped(text: str) -> str:
    return text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n")
