"""Only type-checked: hooks, observers and figures."""

from __future__ import annotations

import logging
from collections.abc import MutableMapping
from typing import Literal, assert_type

from conserve_sdk import (
    ConversationStats,
    LoggingHook,
    OpenTelemetryHook,
    PrometheusHook,
    TurnCollector,
    TurnHook,
    TurnObserver,
    TurnRecord,
    connect,
    conversation,
    last_turn,
)
from conserve_sdk.telemetry import HopEnd, HopStart, TurnStart, TurnWatch


class Watch:
    def begin_hop(self, hop: HopStart, headers: MutableMapping[str, str], /) -> None:
        headers["x-from"] = hop.request_id

    def end_hop(self, hop: HopEnd, /) -> None: ...

    def end(self, record: TurnRecord, /, *, at_us: int) -> None: ...


class Observer:
    def begin_turn(self, turn: TurnStart, /) -> TurnWatch:
        assert_type(turn.streams, bool)
        return Watch()


class HalfAWatch:
    def end_hop(self, hop: HopEnd, /) -> None: ...


def hook(record: TurnRecord) -> None:
    assert_type(record.mode, Literal["migrate", "local"] | None)
    assert_type(record.migrated, bool)
    assert_type(record.ttft_ms, int | None)


def figures(collector: TurnCollector) -> None:
    observer: TurnObserver = Observer()
    as_hook: TurnHook = collector
    connect("http://a", on_turn=[hook, as_hook, observer, LoggingHook(logging.getLogger("turns"))])
    connect("http://a", on_turn=[OpenTelemetryHook(), PrometheusHook(registry=None)])
    assert_type(collector.records, tuple[TurnRecord, ...])
    with conversation("c") as block:
        stats: ConversationStats = block.stats()
    assert_type(stats.last, TurnRecord | None)
    assert_type(str(stats), str)
    if (record := last_turn()) is not None:
        assert_type(record.error, str)


def telemetry_wrong(record: TurnRecord, stats: ConversationStats) -> None:
    record.turn = 3  # type: ignore[misc]
    TurnRecord(turn=1)  # type: ignore[call-arg]
    stats.turns = 3  # type: ignore[misc]
    ConversationStats()  # type: ignore[call-arg]
    LoggingHook("conserve")  # type: ignore[arg-type]
    OpenTelemetryHook(None)  # type: ignore[call-arg]
    PrometheusHook(registry="default")  # type: ignore[arg-type]
    TurnCollector([])  # type: ignore[call-arg]
    last_turn("c")  # type: ignore[call-arg]
    a_hook: TurnHook = HalfAWatch()  # type: ignore[assignment]
    an_observer: TurnObserver = hook  # type: ignore[assignment]
    connect("http://a", on_turn=[a_hook, an_observer, "log"])  # type: ignore[list-item]
