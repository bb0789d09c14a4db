"""Policies of the caller's: how much each step streams, by a rule in Python."""

from __future__ import annotations

import time
import warnings
from typing import TYPE_CHECKING, Any, Protocol

from pie import _core
from pie._core import ConfigError

if TYPE_CHECKING:
    from pie.stats import Stats

_SLOW_NS = 5_000_000  # a call takes longer than this,
_SLOW_CALLS = 3  # so many times in a row


class Policy(Protocol):
    """What `policy=` of a cache takes besides a name: an object with this one method."""

    def streamed_bytes(self, stats: Stats) -> int:
        """Bytes of KV that the next step is to stream, by what `stats()` says before it.

        0 is "no more than must be". What does not fit on the device is streamed in any case, and
        more than the step reads or the pool holds is as much as that. It is called on the caller's
        thread, once a step, and must not call the cache.
        """
        ...


class Told:
    """A policy of the caller's in force: asked before each step until it cannot be relied on.

    One that raises, answers with anything but a whole number from 0 on, or takes longer than 5 ms
    three times in a row, is warned of once and not asked again; "fit" takes over.
    """

    def __init__(self, policy: Policy) -> None:
        if not callable(getattr(policy, "streamed_bytes", None)):
            raise ConfigError(
                f"policy is {policy!r}: give 'adaptive' or another name as text, or an object with "
                "a method streamed_bytes(stats)."
            )
        self._policy: Policy | None = policy
        self.name = type(policy).__name__  # for stats()
        self._slow = 0  # calls in a row

    def apply(self, core: _core.Cache, stats: Stats) -> None:
        """Asks, and tells the cache."""
        if self._policy is None:
            return
        trouble, streamed = self._ask(self._policy, stats)
        core.set_streamed(streamed)
        if not trouble:
            return
        name, self.name, self._policy = self.name, "fit", None
        warnings.warn(
            f"The policy {name} {trouble}. It is not asked again; 'fit' takes over.",
            RuntimeWarning,
            stacklevel=4,
        )

    def _ask(self, policy: Policy, stats: Stats) -> tuple[str, int]:
        """(what is wrong with its answer, its answer)."""
        began = time.perf_counter_ns()
        try:
            answer: Any = policy.streamed_bytes(stats)
        except Exception as error:
            return f"raised {type(error).__name__}: {error}", 0
        took = time.perf_counter_ns() - began
        if type(answer) is not int or not 0 <= answer < 2**63:
            return f"answered {answer!r}, which is no number of bytes", 0
        self._slow = self._slow + 1 if took > _SLOW_NS else 0
        if self._slow == _SLOW_CALLS:
            return f"took {took / 1e6:.0f} ms, and more than 5 ms before", 0
        return "", answer
