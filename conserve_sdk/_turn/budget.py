"""One time budget over all hops of a turn: broker, prefill, transfer, first byte of the decode."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import httpx2

from conserve_sdk.errors import ConfigError, TurnTimeout

__all__ = ["Budget", "Timeouts"]

REACH_PHASES = ("pool", "connect", "write")
"""The parts of a hop, by httpx2's names, after which the engine has the whole request."""
UNBOUNDED_MS = 86_400_000
"""What "no timeout" means where a number is needed: a day."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timeouts:
    """Time limits, in seconds.

    Attributes:
        connect_s, read_s: used where a request brings no timeout of its own (openai's clients always do). `read_s` is
            also the budget of a whole turn up to its first byte.
        broker_s: for the broker to answer, on top of the time a request may wait for admission.
        prefill_s: longest a prefiller may take; after it the decoder computes the prompt itself.
        prefill_share: share of the turn's remaining budget that the prefill may use at most.
        transfer_s: how long after the prefill's answer its KV may be pulled. Must stay well under the engine's own
            lease (vLLM: `kv_lease_duration`, 30 s): later than that the answer could be silently wrong.
        broker_gone_s: with fallback engines: how long brokers are tried again where nobody takes the connection.
            Without such engines, and for brokers that take it and say nothing, `broker_s` counts.
        broker_rest_s: with fallback engines: how long a broker that did not answer is left alone.

    Raises:
        ConfigError: a limit that is not positive.
    """

    connect_s: float = 5.0
    read_s: float = 600.0
    broker_s: float = 5.0
    prefill_s: float = 60.0
    prefill_share: float = 0.5
    transfer_s: float = 20.0
    broker_gone_s: float = 0.5
    broker_rest_s: float = 5.0

    def __post_init__(self) -> None:
        for name in ("connect_s", "read_s", "broker_s", "prefill_s", "prefill_share", "transfer_s"):
            if getattr(self, name) <= 0:
                raise ConfigError(f"timeouts.{name} must be positive", key=name)
        if self.prefill_share >= 1:
            raise ConfigError("timeouts.prefill_share must leave time for the decode: below 1", key="prefill_share")


class Budget:
    """What is left of a turn's time.

    The application's `read` timeout bounds the turn up to its first byte; every hop gets the application's own
    timeouts, none longer than what is left.

    Args:
        timeout: `extensions["timeout"]` of the application's request.
        timeouts: defaults.
        clock_us: monotonic microseconds.
    """

    def __init__(self, timeout: Mapping[str, Any] | None, *, timeouts: Timeouts, clock_us: Callable[[], int]) -> None:
        given = timeout or {"connect": timeouts.connect_s, "read": timeouts.read_s, "write": None, "pool": None}
        self._limits: dict[str, float | None] = {key: given.get(key) for key in ("connect", "read", "write", "pool")}
        self._clock_us = clock_us
        self._started_us = clock_us()
        read_s = self._limits["read"]
        self.total_ms = UNBOUNDED_MS if read_s is None else max(int(read_s * 1000), 1)

    def elapsed_ms(self) -> int:
        """Milliseconds since the turn arrived."""
        return (self._clock_us() - self._started_us) // 1000

    def left_ms(self) -> int:
        """Milliseconds left, at least one.

        Raises:
            httpx2.ReadTimeout: nothing is left; openai's clients show it as `APITimeoutError`.
        """
        left = self.total_ms - self.elapsed_ms()
        if left > 0:
            return left
        spent = TurnTimeout("the turn's time budget ran out before its first byte", budget_ms=self.total_ms)
        raise httpx2.ReadTimeout(str(spent)) from spent

    def hop(self, *, at_most_ms: int | None = None, reach_ms: int | None = None) -> dict[str, float | None]:
        """Timeouts for the next hop, as httpx2's `extensions["timeout"]`.

        Args:
            at_most_ms: bounds each of them.
            reach_ms: bounds what comes before the engine has the whole request, each part by this.
        """
        limits = self._hop(at_most_ms)
        if reach_ms is not None:
            reach_s = reach_ms / 1000
            limits |= {phase: min(limits[phase] or reach_s, reach_s) for phase in REACH_PHASES}
        return limits

    def _hop(self, at_most_ms: int | None) -> dict[str, float | None]:
        left_s = min(self.left_ms(), at_most_ms or UNBOUNDED_MS) / 1000
        if self.total_ms == UNBOUNDED_MS and at_most_ms is None:
            return dict(self._limits)
        return {key: left_s if limit is None else min(limit, left_s) for key, limit in self._limits.items()}
