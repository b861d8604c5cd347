"""Schedule whole agent conversations on your own vLLM fleet: one prefill, one KV transfer, one decoder for the tail.

```python
from conserve_sdk import conversation, openai_client

client = openai_client("http://127.0.0.1:7070")  # the broker; completions go to the engines directly
with conversation("ticket-17"):
    client.chat.completions.create(model="...", messages=[...])
```
"""

from __future__ import annotations

from conserve_sdk._turn import Timeouts
from conserve_sdk.client import BASE_URL, ConServe, async_openai_client, connect, openai_client
from conserve_sdk.errors import (
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
    TurnTimeout,
)
from conserve_sdk.identity import HEADER_CONVERSATION, HEADER_LINEAGE, conversation, current_conversation, wire_id
from conserve_sdk.telemetry import LoggingHook, TurnCollector, TurnHook, TurnRecord
from conserve_sdk.transport import AsyncConServeTransport, ConServeOptions, ConServeTransport

__all__ = [
    "BASE_URL",
    "HEADER_CONVERSATION",
    "HEADER_LINEAGE",
    "AsyncConServeTransport",
    "BrokerError",
    "BrokerUnavailable",
    "ConServe",
    "ConServeError",
    "ConServeOptions",
    "ConServeTransport",
    "ConfigError",
    "EngineError",
    "EngineRefused",
    "EngineUnavailable",
    "LeaseClosed",
    "LeaseError",
    "LeaseExpired",
    "LeaseLost",
    "LeaseRefused",
    "LoggingHook",
    "ProtocolError",
    "Timeouts",
    "TurnCollector",
    "TurnHook",
    "TurnRecord",
    "TurnTimeout",
    "async_openai_client",
    "connect",
    "conversation",
    "current_conversation",
    "openai_client",
    "wire_id",
]
