"""Every error this package raises, in one tree.

```
openai.OpenAIError
  ConServeError            has fields; str() is one line that says what to do
    ConfigError            wrong option, environment or configuration file
    BrokerError
      BrokerUnavailable    no broker answered in time
      LeaseRefused         the broker cannot admit the conversation; .reason, .retry_after_ms
      AccessDenied         the broker does not know this program's API key (401), or it may not do this (403)
      RateLimited          the API key sends too many requests; .retry_after_ms
      ProtocolError        an answer that this version does not understand, or a request the broker rejects
    LeaseError
      LeaseExpired         not live any more: the next turn is a first turn again
      LeaseLost            its decoder restarted or is gone, or another lease superseded it
      LeaseClosed          used after `close()` or `release()`: a mistake in the calling program
    EngineError
      EngineUnavailable    could not be reached, or failed before its first byte
      EngineRefused        answered, but will not serve this request
      TurnTimeout          the turn's time budget ran out
```

The root derives from `openai.OpenAIError`: `except openai.OpenAIError` in an application catches it, and openai's
client raises it as it is instead of retrying it. Errors of httpx2 are mapped at the edge (`raise ... from exc`).
"""

# ruff: noqa: N818 -- the names say what happened; the tree says that they are errors

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, ClassVar, TypedDict, Unpack

import openai

__all__ = [
    "AccessDenied",
    "BrokerError",
    "BrokerUnavailable",
    "ConServeError",
    "ConfigError",
    "EngineError",
    "EngineRefused",
    "EngineUnavailable",
    "LeaseClosed",
    "LeaseError",
    "LeaseExpired",
    "LeaseLost",
    "LeaseRefused",
    "ProtocolError",
    "RateLimited",
    "TurnTimeout",
]


def _rebuild(kind: type[ConServeError], message: str, fields: Mapping[str, Any]) -> ConServeError:
    return kind(message, **fields)


class _BrokerFields(TypedDict, total=False):
    """What every error of a broker may say of itself."""

    conversation_id: str | None
    lease_id: str | None
    broker_url: str | None
    status: int | None
    code: str | None


class _EngineFields(TypedDict, total=False):
    """What every error of an engine may say of itself."""

    conversation_id: str | None
    lease_id: str | None
    engine_id: str | None
    phase: str | None
    status: int | None


class ConServeError(openai.OpenAIError):
    """Root of the tree.

    Attributes:
        message: what happened and what to do, without the ids.
        conversation_id: the conversation it happened in, where known.
        lease_id: the lease it happened to, where known.
    """

    _fields: ClassVar[tuple[str, ...]] = ("conversation_id", "lease_id")

    def __init__(self, message: str, *, conversation_id: str | None = None, lease_id: str | None = None) -> None:
        super().__init__(message)
        self.message = " ".join(message.split())
        self.conversation_id = conversation_id
        self.lease_id = lease_id

    def __str__(self) -> str:
        shown = [f"{name}={value!r}" for name, value in self.fields().items() if value not in (None, "")]
        return f"{self.message} ({', '.join(shown)})" if shown else self.message

    def __reduce__(self) -> tuple[Any, ...]:
        return _rebuild, (type(self), self.message, self.fields())

    def fields(self) -> dict[str, Any]:
        """Return the error's fields by name, for logs."""
        return {name: getattr(self, name) for name in self._fields}


class ConfigError(ConServeError):
    """An option is wrong.

    Attributes:
        key: the option, environment variable or configuration key to change.
    """

    _fields: ClassVar[tuple[str, ...]] = ("key",)

    def __init__(self, message: str, *, key: str | None = None) -> None:
        super().__init__(message)
        self.key = key


class BrokerError(ConServeError):
    """The broker could not be asked, or said no.

    Attributes:
        broker_url: the broker that was asked last.
        status: its HTTP status, None when there was no answer.
        code: its stable problem code.
    """

    _fields: ClassVar[tuple[str, ...]] = ("conversation_id", "lease_id", "broker_url", "status", "code")

    def __init__(
        self,
        message: str,
        *,
        conversation_id: str | None = None,
        lease_id: str | None = None,
        broker_url: str | None = None,
        status: int | None = None,
        code: str | None = None,
    ) -> None:
        super().__init__(message, conversation_id=conversation_id, lease_id=lease_id)
        self.broker_url = broker_url
        self.status = status
        self.code = code


class BrokerUnavailable(BrokerError):
    """No broker answered within the budget. Trying again later may help."""


class LeaseRefused(BrokerError):
    """The broker cannot admit the conversation now.

    Attributes:
        reason: stable code of the refusal (`conserve_sdk.core.RefusalReason`).
        retry_after_ms: when trying again may help; 0: it will not help.
    """

    _fields: ClassVar[tuple[str, ...]] = (*BrokerError._fields, "reason", "retry_after_ms")

    def __init__(self, message: str, *, reason: str, retry_after_ms: int = 0, **where: Unpack[_BrokerFields]) -> None:
        super().__init__(message, **where)
        self.reason = reason
        self.retry_after_ms = retry_after_ms


class AccessDenied(BrokerError):
    """The broker demands an API key and refuses this program's, or lets it do other things only; see `.code`."""


class RateLimited(BrokerError):
    """The program's API key sends more requests than its limit, for longer than the call could wait.

    Attributes:
        retry_after_ms: when the broker takes the next one.
    """

    _fields: ClassVar[tuple[str, ...]] = (*BrokerError._fields, "retry_after_ms")

    def __init__(self, message: str, *, retry_after_ms: int = 0, **where: Unpack[_BrokerFields]) -> None:
        super().__init__(message, **where)
        self.retry_after_ms = retry_after_ms


class ProtocolError(BrokerError):
    """The broker's answer is not one this version understands, or it rejected our request as malformed."""


class LeaseError(ConServeError):
    """A lease is not usable."""


class LeaseExpired(LeaseError):
    """The lease is not live any more. A normal path: the next turn of its conversation is a first turn again."""


class LeaseLost(LeaseError):
    """The lease's decoder restarted or is gone, or another lease superseded it.

    Attributes:
        engine_id: the decoder whose KV cache is lost, where known.
    """

    _fields: ClassVar[tuple[str, ...]] = ("conversation_id", "lease_id", "engine_id")

    def __init__(
        self,
        message: str,
        *,
        conversation_id: str | None = None,
        lease_id: str | None = None,
        engine_id: str | None = None,
    ) -> None:
        super().__init__(message, conversation_id=conversation_id, lease_id=lease_id)
        self.engine_id = engine_id


class LeaseClosed(LeaseError):
    """Used after it was closed: a mistake in the calling program."""


class EngineError(ConServeError):
    """An engine could not serve a turn.

    Attributes:
        engine_id: the engine.
        phase: `prefill`, `transfer` or `decode`.
        status: its HTTP status, None when there was no answer.
    """

    _fields: ClassVar[tuple[str, ...]] = ("conversation_id", "lease_id", "engine_id", "phase", "status")

    def __init__(
        self,
        message: str,
        *,
        conversation_id: str | None = None,
        lease_id: str | None = None,
        engine_id: str | None = None,
        phase: str | None = None,
        status: int | None = None,
    ) -> None:
        super().__init__(message, conversation_id=conversation_id, lease_id=lease_id)
        self.engine_id = engine_id
        self.phase = phase
        self.status = status


class EngineUnavailable(EngineError):
    """The engine could not be reached, or failed before its first byte."""


class EngineRefused(EngineError):
    """The engine answered, but will not serve this request."""


class TurnTimeout(EngineError):
    """The turn's time budget (broker, prefill and decode together) ran out.

    Attributes:
        budget_ms: the budget.
    """

    _fields: ClassVar[tuple[str, ...]] = (*EngineError._fields, "budget_ms")

    def __init__(self, message: str, *, budget_ms: int, **where: Unpack[_EngineFields]) -> None:
        super().__init__(message, **where)
        self.budget_ms = budget_ms
