"""What the SDK tells about each turn: a `TurnRecord` to every hook, after the turn ended.

```python
from conserve_sdk import ConServe, LoggingHook, OpenTelemetryHook, PrometheusHook

conserve = ConServe("http://127.0.0.1:7070", on_turn=[LoggingHook(), OpenTelemetryHook(), PrometheusHook()])
```

A hook is anything that can be called with a record. One that must know about a turn before it has ended (a trace has
to, since the engines join it) is a `TurnObserver` instead. Hooks run in the thread that finished the turn and must be
quick; an exception out of a hook is logged and changes nothing. Nothing told here holds prompt text.
"""

from __future__ import annotations

from conserve_sdk.telemetry._hooks import LoggingHook, TurnCollector
from conserve_sdk.telemetry._observer import Follower, HopEnd, HopStart, TurnObserver, TurnStart, TurnWatch, Watching
from conserve_sdk.telemetry._opentelemetry import OpenTelemetryHook
from conserve_sdk.telemetry._prometheus import PrometheusHook
from conserve_sdk.telemetry._record import TBT_SAMPLES_MAX, TurnHook, TurnRecord, percentile
from conserve_sdk.telemetry._stats import ConversationStats, StatsBook, Tally

__all__ = [
    "TBT_SAMPLES_MAX",
    "ConversationStats",
    "Follower",
    "HopEnd",
    "HopStart",
    "LoggingHook",
    "OpenTelemetryHook",
    "PrometheusHook",
    "StatsBook",
    "Tally",
    "TurnCollector",
    "TurnHook",
    "TurnObserver",
    "TurnRecord",
    "TurnStart",
    "TurnWatch",
    "Watching",
    "percentile",
]
