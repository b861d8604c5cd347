"""Options of the SDK, checked where they come in."""

from __future__ import annotations

import os
import platform
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, TypedDict

import httpx2

from conserve_sdk._broker_access import AccessFaultError, BrokerAccess
from conserve_sdk._turn import Timeouts, TurnOptions, TurnPlanner
from conserve_sdk.errors import ConfigError
from conserve_sdk.telemetry import Follower, LoggingHook

__all__ = ["BROKER_URL_ENV", "ConServeOptions", "Settings"]

BROKER_URL_ENV = "CONSERVE_BROKER_URL"
"""Names the broker where the program does not; several URLs are separated by commas."""
SLICE_CHARS_MIN = 1_024
"""Each slice is a request of its own, and finds all of the one before but a block and the template's words."""


class ConServeOptions(TypedDict, total=False):
    """Keyword options that `ConServe`, `connect`, the transports and the client factories share.

    Attributes:
        broker_api_key: this program's key at the broker; default: the environment's `CONSERVE_BROKER_API_KEY`, or the
            file that `CONSERVE_BROKER_API_KEY_FILE` names.
        broker_ca: PEM file with the authorities that vouch for an https broker (`CONSERVE_BROKER_CA`); default: the
            system's.
        broker_cert, broker_cert_key: PEM files with this program's own certificate and key, for brokers that ask for
            one (`CONSERVE_BROKER_CERT`, `CONSERVE_BROKER_CERT_KEY`).
        wait_s: how long a first turn waits for admission before `LeaseRefused`.
        timeouts: all other time limits.
        on_broker_unavailable: `"fallback"` sends new conversations to `fallback_engines` when no broker answers;
            `"raise"` raises `BrokerUnavailable`. Conversations that have a lease go on either way.
        fallback_engines: base URLs of engines that may answer without a lease.
        on_turn: one hook or several, called with a `TurnRecord` after each turn (or following it, see `TurnObserver`).
        stranger_bytes_max: longest prompt of a side request (title, summary, guardrail) that rides on its
            conversation's decoder instead of taking a lease; 0 switches that off.
        slice_chars: prompts with more than one and a half times so many new characters are computed in slices, between
            which engines take shorter ones; 0, the default: whole. 32 768 characters of English are about 8 000 tokens.
        broker_transport, engine_transport: replace the network, for tests.
        planner: replaces the choice of engines per turn, for experiments.
        clock_us: monotonic microseconds, for tests.
    """

    broker_api_key: str | None
    broker_ca: str | None
    broker_cert: str | None
    broker_cert_key: str | None
    wait_s: float
    timeouts: Timeouts
    on_broker_unavailable: Literal["fallback", "raise"]
    fallback_engines: Sequence[str]
    on_turn: Follower | Sequence[Follower]
    stranger_bytes_max: int
    slice_chars: int
    broker_transport: Any
    engine_transport: Any
    planner: TurnPlanner | None
    clock_us: Callable[[], int] | None


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The options, resolved; see `ConServeOptions` for what they mean."""

    broker_urls: tuple[str, ...]
    access: BrokerAccess = field(default_factory=BrokerAccess)
    wait_s: float = 30.0
    timeouts: Timeouts = field(default_factory=Timeouts)
    on_broker_unavailable: Literal["fallback", "raise"] = "fallback"
    fallback_engines: tuple[str, ...] = ()
    on_turn: tuple[Follower, ...] = ()
    stranger_bytes_max: int = 1_024
    slice_chars: int = 0
    broker_transport: Any = None
    engine_transport: Any = None
    planner: TurnPlanner | None = None
    clock_us: Callable[[], int] | None = None

    @classmethod
    def resolve(cls, broker_url: str | Sequence[str] | None, options: ConServeOptions) -> Settings:
        """Check the options and fill in what is missing.

        Raises:
            ConfigError: an option is wrong; the message names it.
        """
        unknown = sorted(set(options) - set(ConServeOptions.__annotations__))
        if unknown:
            raise ConfigError(f"unknown option {unknown[0]!r}: see conserve_sdk.ConServeOptions", key=unknown[0])
        values: dict[str, Any] = {**options}
        hooks = values.pop("on_turn", None)
        values["on_turn"] = _hooks(hooks)
        values["fallback_engines"] = _urls(values.pop("fallback_engines", ()), key="fallback_engines")
        values["access"] = _access(values)
        settings = cls(broker_urls=_broker_urls(broker_url), **values)
        settings._check()
        return settings

    def turn_options(self) -> TurnOptions:
        """What the flows need of it."""
        return TurnOptions(
            wait_ms=int(self.wait_s * 1000),
            timeouts=self.timeouts,
            fall_back=self.on_broker_unavailable == "fallback",
            fallback_engines=self.fallback_engines,
            stranger_bytes_max=self.stranger_bytes_max,
            slice_chars=self.slice_chars,
            client=f"conserve-sdk/python-{platform.python_version()} pid={os.getpid()}",
        )

    def _check(self) -> None:
        try:
            self.access.verify(self.broker_urls)
        except AccessFaultError as fault:
            raise ConfigError(str(fault), key=fault.key) from fault
        if not 0 <= self.wait_s <= 86_400:
            raise ConfigError("wait_s must lie between 0 and 86400 seconds", key="wait_s")
        if self.on_broker_unavailable not in ("fallback", "raise"):
            raise ConfigError("on_broker_unavailable must be 'fallback' or 'raise'", key="on_broker_unavailable")
        if self.stranger_bytes_max < 0:
            raise ConfigError("stranger_bytes_max must not be negative", key="stranger_bytes_max")
        if self.slice_chars != 0 and self.slice_chars < SLICE_CHARS_MIN:
            raise ConfigError(f"slice_chars must be 0 or at least {SLICE_CHARS_MIN}", key="slice_chars")


def _access(values: dict[str, Any]) -> BrokerAccess:
    try:
        return BrokerAccess.resolve(
            api_key=values.pop("broker_api_key", None),
            ca_file=values.pop("broker_ca", None),
            cert_file=values.pop("broker_cert", None),
            cert_key_file=values.pop("broker_cert_key", None),
        )
    except AccessFaultError as fault:
        raise ConfigError(str(fault), key=fault.key) from None


def _broker_urls(given: str | Sequence[str] | None) -> tuple[str, ...]:
    if given is None:
        given = os.environ.get(BROKER_URL_ENV, "")
    urls = [part.strip() for part in given.split(",") if part.strip()] if isinstance(given, str) else given
    if not urls:
        raise ConfigError(f"no broker: pass broker_url=, or set {BROKER_URL_ENV}", key="broker_url")
    return _urls(urls, key="broker_url")


def _urls(given: Sequence[str], *, key: str) -> tuple[str, ...]:
    if isinstance(given, str):
        given = (given,)
    for text in given:
        try:
            url = httpx2.URL(text)
        except (TypeError, httpx2.InvalidURL) as error:
            raise ConfigError(f"{key}: {text!r} is not a URL: {error}", key=key) from error
        if url.scheme not in ("http", "https") or not url.host:
            raise ConfigError(f"{key}: {text!r} must look like http://host:port", key=key)
    return tuple(given)


def _hooks(given: Follower | Sequence[Follower] | None) -> tuple[Follower, ...]:
    if given is None:
        return (LoggingHook(),)
    return tuple(given) if isinstance(given, Sequence) else (given,)
