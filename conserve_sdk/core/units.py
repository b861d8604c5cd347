"""Names for the ids and quantities of the core: distinct types instead of bare `str` and `int`.

Time is whole milliseconds and token counts are whole tokens everywhere in the core, so that a boundary is a
boundary (no float that is "almost" expired) and a simulated trace is bit-exact.
"""

from __future__ import annotations

from typing import NewType

TenantId = NewType("TenantId", str)
ConversationId = NewType("ConversationId", str)
LineageId = NewType("LineageId", str)
"""One growing prefix inside a conversation; a sub-agent or a summariser is another lineage."""
ModelName = NewType("ModelName", str)
LeaseId = NewType("LeaseId", str)
EngineId = NewType("EngineId", str)
Incarnation = NewType("Incarnation", str)
"""Changes whenever an engine restarts (its KV cache is then empty)."""
TransferGroup = NewType("TransferGroup", str)
"""Engines whose connectors can move KV between each other; `""` stands for "moves no KV"."""
PrefixKey = NewType("PrefixKey", str)
"""Names the preamble (system prompt and tools) that conversations share; equal keys mean equal first tokens."""
RequestId = NewType("RequestId", str)
"""Names one grant or supersede request while it waits for admission."""

Ms = NewType("Ms", int)
"""Milliseconds: an instant on the broker's clock (`*_at_ms`, `now_ms`) or a span (`*_ms`)."""
Tokens = NewType("Tokens", int)
Ppm = NewType("Ppm", int)
"""Parts per million: how the core writes a ratio without floats (0.89 is 890_000)."""

MILLION = 1_000_000
FOREVER_MS = Ms(2**62)
"""Later than any instant that a clock will show."""
