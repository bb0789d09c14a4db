"""What a cache says of itself."""

from __future__ import annotations

from typing import Any


class Stats(dict[str, Any]):
    """Counters since construction, and gauges: keys are attributes too."""

    def __getattr__(self, name: str) -> Any:
        try:
            return self[name]
        except KeyError:
            raise AttributeError(f"stats() has no {name!r}") from None
