"""Only type-checked: how a program with strict types tells failures apart."""

from __future__ import annotations

from typing import assert_type

import openai

from conserve_sdk import (
    AccessDenied,
    BrokerError,
    BrokerUnavailable,
    ConfigError,
    ConServeError,
    EngineError,
    EngineRefused,
    EngineUnavailable,
    LeaseClosed,
    LeaseError,
    LeaseExpired,
    LeaseLost,
    LeaseRefused,
    ProtocolError,
    RateLimited,
    TurnTimeout,
)


def told_apart(error: Exception) -> str | None:
    match error:
        case LeaseRefused():
            assert_type(error.reason, str)
            assert_type(error.retry_after_ms, int)
        case RateLimited():
            assert_type(error.retry_after_ms, int)
        case BrokerUnavailable() | ProtocolError() | AccessDenied():
            assert_type(error.code, str | None)
            as_broker: BrokerError = error
            return as_broker.broker_url
        case LeaseExpired() | LeaseLost() | LeaseClosed():
            as_lease: LeaseError = error
            return as_lease.lease_id
        case EngineRefused() | EngineUnavailable() | TurnTimeout():
            as_engine: EngineError = error
            assert_type(as_engine.status, int | None)
            return as_engine.engine_id
        case ConfigError():
            return error.key
        case ConServeError():
            as_openai: openai.OpenAIError = error
            assert_type(error.conversation_id, str | None)
            return str(as_openai)
    return None


def errors_wrong(error: ConServeError) -> None:
    print(error.reason)  # type: ignore[attr-defined]
    ConServeError()  # type: ignore[call-arg]
    ConfigError("m", option="x")  # type: ignore[call-arg]
    BrokerError("m", status="503")  # type: ignore[arg-type]
    print(BrokerUnavailable("m").reason)  # type: ignore[attr-defined]
    print(AccessDenied("m").key)  # type: ignore[attr-defined]
    RateLimited("m", retry_after_ms="1")  # type: ignore[arg-type]
    ProtocolError("m", broker="http://a")  # type: ignore[call-arg]
    LeaseError("m", lease_id=3)  # type: ignore[arg-type]
    LeaseExpired("m", "c")  # type: ignore[call-arg]
    LeaseLost("m", reason="restarted")  # type: ignore[call-arg]
    LeaseClosed()  # type: ignore[call-arg]
    LeaseRefused("m")  # type: ignore[call-arg]
    EngineError("m", engine="d0")  # type: ignore[call-arg]
    EngineRefused("m", status=None, engine_id=3)  # type: ignore[arg-type]
    print(EngineUnavailable("m").broker_url)  # type: ignore[attr-defined]
    TurnTimeout("m", timeout_s=3)  # type: ignore[call-arg]
