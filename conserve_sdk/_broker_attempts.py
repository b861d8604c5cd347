"""The attempts of one broker call: which broker is next, how long to pause, when to stop. No I/O."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import TypeVar

import httpx2
import tenacity

from conserve_sdk._broker_calls import BrokerCall, TryAgain
from conserve_sdk.errors import BrokerUnavailable, ConfigError, ProtocolError

__all__ = ["Attempts", "BrokerUrls"]

ANSWER_BYTES_MAX = 8 * 1024 * 1024
"""Longer than any answer of a broker: a whole batch of results with fresh tokens of the longest allowed size fits."""

BACKOFF_FIRST_MS = 100
BACKOFF_MAX_MS = 2_000
CONNECT_MAX_MS = 2_000
REFUSAL_MARGIN_MS = 500
"""The broker's refusal must come before our own timeout: it says more."""

_HEADERS = {"Accept": "application/json", "User-Agent": "conserve-sdk"}

_T = TypeVar("_T")


class BrokerUrls:
    """The brokers of a client; remembers which one answered last.

    Args:
        urls: `http://` or `https://`, tried in order.

    Raises:
        ConfigError: none given, or one that cannot be a URL.
    """

    def __init__(self, urls: Sequence[str]) -> None:
        self.urls = tuple(url.rstrip("/") for url in urls)
        self.preferred = 0
        if not self.urls:
            raise ConfigError("no broker URL: pass broker_url= or set CONSERVE_BROKER_URL", key="broker_url")
        for url in self.urls:
            if not _is_url(url):
                raise ConfigError(f"not a broker URL: {url!r} (it must look like http://broker:7070)", key="broker_url")


class Attempts:
    """One call. `pause_s` and `is_over` are tenacity's `wait` and `stop`.

    Args:
        brokers: where to go.
        budget_ms: for all attempts together.
        patience_ms: how long of it may pass waiting for admission. Only a broker that answers may use it up: brokers
            that stay silent are given up after the rest of the budget, or every new conversation would stand still
            for the whole patience when there is no broker.
        clock: seconds.
        jitter: uniform in [0, 1).
        gone_ms: how long brokers are tried again that do not even take a connection; None: as those that are silent.
    """

    def __init__(
        self,
        brokers: BrokerUrls,
        *,
        budget_ms: int,
        patience_ms: int,
        gone_ms: int | None = None,
        clock: Callable[[], float],
        jitter: Callable[[], float],
    ) -> None:
        self._brokers = brokers
        self._index = brokers.preferred
        self._clock = clock
        self._jitter = jitter
        self._started_s = clock()
        self._budget_ms = budget_ms
        self._silence_ms = max(budget_ms - patience_ms, min(budget_ms, CONNECT_MAX_MS))
        self._gone_ms = self._silence_ms if gone_ms is None else min(gone_ms, self._silence_ms)
        self._silent_since_s: float | None = None
        self._patience_ms = min(patience_ms, max(0, budget_ms - REFUSAL_MARGIN_MS))
        self._failures = 0
        self._ends_s = self._started_s

    def wait_left_ms(self) -> int:
        """Return how long the broker may still keep us waiting for admission."""
        return max(0, self._patience_ms - self._elapsed_ms())

    def time_left_s(self) -> float:
        """Return how long the call may still take."""
        return max(0, self._budget_ms - self._elapsed_ms()) / 1000

    def request(self, call: BrokerCall, headers: Mapping[str, str]) -> httpx2.Request:
        """Address the call to the current broker, with what is left of the budget as its timeout."""
        timeout_s = max(1, min(call.timeout_ms, self._budget_ms - self._elapsed_ms())) / 1000
        timeout = {
            **dict.fromkeys(("read", "write", "pool"), timeout_s),
            "connect": min(timeout_s, CONNECT_MAX_MS / 1000),
        }
        self._ends_s = self._clock() + timeout_s
        url = _url(self._brokers.urls[self._index] + call.path)
        return httpx2.Request(
            call.method,
            url,
            headers={**_HEADERS, **headers, **call.headers},
            content=call.content,
            extensions={"timeout": timeout},
        )

    def received(self, head: httpx2.Response, body: bytearray) -> None:
        """Check an answer that is being read; `head` is without its body still.

        Raises:
            ProtocolError: it is longer than an answer can be.
            httpx2.ReadTimeout: its time is over: httpx2's own limit is one between two pieces.
        """
        if len(body) > ANSWER_BYTES_MAX:
            raise ProtocolError(
                f"the broker's answer is longer than {ANSWER_BYTES_MAX} bytes: is this URL a ConServe broker?",
                broker_url=self._brokers.urls[self._index],
                status=head.status_code,
            )
        if self._clock() > self._ends_s:
            raise httpx2.ReadTimeout("the answer did not end in time", request=head.request)

    def answered(self, result: _T) -> _T:
        """Note that the current broker answered, and return its answer."""
        self._brokers.preferred = self._index
        return result

    def unanswered(self, exc: httpx2.TransportError) -> TryAgain:
        """Note that the current broker did not answer."""
        what = f"{type(exc).__name__}: {exc}" if str(exc) else type(exc).__name__
        return TryAgain(
            BrokerUnavailable(
                f"no answer from the broker ({what}): is it running, and is this its URL?",
                broker_url=self._brokers.urls[self._index],
            ),
            gone=isinstance(exc, httpx2.ConnectError),
        )

    def pause_s(self, state: tenacity.RetryCallState) -> float:
        """Return the pause before the next attempt: none before another broker; after a whole round, full jitter."""
        problem = _problem_of(state)
        if problem.refusal or problem.throttled:
            self._silent_since_s = None
            return problem.retry_after_ms / 1000
        if self._silent_since_s is None:
            self._silent_since_s = self._clock()
        self._failures += 1
        self._index = (self._index + 1) % len(self._brokers.urls)
        rounds, position = divmod(self._failures, len(self._brokers.urls))
        if position:
            return 0.0
        backoff_ms = min(BACKOFF_MAX_MS, BACKOFF_FIRST_MS << min(rounds, 16) >> 1) * self._jitter()
        return max(backoff_ms, problem.retry_after_ms) / 1000

    def is_over(self, state: tenacity.RetryCallState) -> bool:
        """Tell whether the next attempt would start too late."""
        pause_ms = state.upcoming_sleep * 1000
        if _problem_of(state).refusal:
            return self._elapsed_ms() + pause_ms >= self._patience_ms
        if _problem_of(state).throttled:
            return self._elapsed_ms() + pause_ms >= self._budget_ms
        silent_s = self._clock() - (self._silent_since_s or self._started_s)
        asked_all = self._failures >= len(self._brokers.urls)
        silence_ms = self._gone_ms if _problem_of(state).gone and asked_all else self._silence_ms
        return silent_s * 1000 + pause_ms >= silence_ms or self._elapsed_ms() + pause_ms >= self._budget_ms

    def _elapsed_ms(self) -> int:
        return round((self._clock() - self._started_s) * 1000)


def _problem_of(state: tenacity.RetryCallState) -> TryAgain:
    problem = state.outcome.exception() if state.outcome else None
    assert isinstance(problem, TryAgain), "only TryAgain is retried"
    return problem


@functools.lru_cache(maxsize=32)  # the same few with nearly every call
def _url(text: str) -> httpx2.URL:
    return httpx2.URL(text)


def _is_url(text: str) -> bool:
    try:
        url = httpx2.URL(text)
    except httpx2.InvalidURL:
        return False
    return url.scheme in ("http", "https") and bool(url.host)
