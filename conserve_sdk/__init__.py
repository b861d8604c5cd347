"""Schedule whole agent conversations on your own vLLM fleet: one prefill, one KV transfer, one decoder for the tail.

```python
from conserve_sdk import conversation, openai_client

client = openai_client("http://127.0.0.1:7070")  # the broker; completions go to the engines directly
with conversation("ticket-17"):
    client.chat.completions.create(model="...", messages=[...])
```
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from conserve_sdk._lean import make_lean
    from conserve_sdk._recent import last_turn
    from conserve_sdk._turn import Timeouts
    from conserve_sdk.client import BASE_URL, ConServe, async_openai_client, connect, openai_client
    from conserve_sdk.errors import (
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
    from conserve_sdk.identity import HEADER_CONVERSATION, HEADER_LINEAGE, conversation, current_conversation, wire_id
    from conserve_sdk.telemetry import (
        ConversationStats,
        LoggingHook,
        OpenTelemetryHook,
        PrometheusHook,
        TurnCollector,
        TurnHook,
        TurnObserver,
        TurnRecord,
    )
    from conserve_sdk.transport import AsyncConServeTransport, ConServeOptions, ConServeTransport

__all__ = [
    "BASE_URL",
    "HEADER_CONVERSATION",
    "HEADER_LINEAGE",
    "AccessDenied",
    "AsyncConServeTransport",
    "BrokerError",
    "BrokerUnavailable",
    "ConServe",
    "ConServeError",
    "ConServeOptions",
    "ConServeTransport",
    "ConfigError",
    "ConversationStats",
    "EngineError",
    "EngineRefused",
    "EngineUnavailable",
    "LeaseClosed",
    "LeaseError",
    "LeaseExpired",
    "LeaseLost",
    "LeaseRefused",
    "LoggingHook",
    "OpenTelemetryHook",
    "PrometheusHook",
    "ProtocolError",
    "RateLimited",
    "Timeouts",
    "TurnCollector",
    "TurnHook",
    "TurnObserver",
    "TurnRecord",
    "TurnTimeout",
    "async_openai_client",
    "connect",
    "conversation",
    "current_conversation",
    "last_turn",
    "make_lean",
    "openai_client",
    "wire_id",
]

_HOMES = {  # loaded when first used: the broker and the core must not wait for openai's import
    "conserve_sdk._lean": ("make_lean",),
    "conserve_sdk._recent": ("last_turn",),
    "conserve_sdk._turn": ("Timeouts",),
    "conserve_sdk.client": (
        "BASE_URL",
        "ConServe",
        "async_openai_client",
        "connect",
        "openai_client",
    ),
    "conserve_sdk.errors": (
        "AccessDenied",
        "BrokerError",
        "BrokerUnavailable",
        "ConfigError",
        "ConServeError",
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
    ),
    "conserve_sdk.identity": (
        "HEADER_CONVERSATION",
        "HEADER_LINEAGE",
        "conversation",
        "current_conversation",
        "wire_id",
    ),
    "conserve_sdk.telemetry": (
        "ConversationStats",
        "LoggingHook",
        "OpenTelemetryHook",
        "PrometheusHook",
        "TurnCollector",
        "TurnHook",
        "TurnObserver",
        "TurnRecord",
    ),
    "conserve_sdk.transport": (
        "AsyncConServeTransport",
        "ConServeOptions",
        "ConServeTransport",
    ),
}
_HOME_OF = {name: module for module, names in _HOMES.items() for name in names}


def __getattr__(name: str) -> Any:
    """Load a public name from its module at its first use (PEP 562)."""
    home = _HOME_OF.get(name)
    if home is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    value = globals()[name] = getattr(import_module(home), name)
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
