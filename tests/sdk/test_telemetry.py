"""Turn records: percentiles by definition, log lines with ids and without text."""

import logging
import threading
from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sdk.telemetry import LoggingHook, TurnCollector, TurnHook, TurnRecord, percentile
from conserve_sdk.telemetry._record import TBT_OBSERVED_MAX, observed_gaps


def record(**fields) -> TurnRecord:
    return TurnRecord(**{"conversation_id": "c", "lineage": "l", **fields})


@pytest.mark.parametrize(("percent", "expected"), [(0, 15), (5, 15), (30, 20), (40, 20), (50, 35), (99, 50), (100, 50)])
def test_nearest_rank(percent: float, expected: float) -> None:
    assert percentile([40, 15, 50, 20, 35], percent) == expected


def test_percentile_of_nothing() -> None:
    assert percentile([], 50) is None


@given(st.lists(st.integers(), min_size=1), st.integers(1, 100))
def test_percentile_is_the_smallest_member_that_covers_the_share(values: list[int], percent: int) -> None:
    found = percentile(values, percent)
    assert found in values
    assert sum(value <= found for value in values) * 100 >= percent * len(values)
    smaller = [value for value in values if value < found]
    assert not smaller or len(smaller) * 100 < percent * len(values)


def test_collector_leaves_out_what_a_turn_did_not_have() -> None:
    collect = TurnCollector()
    hook: TurnHook = collect
    hook(record(ttft_ms=10, tbt_us=(1_000, 3_000)))
    hook(record(ttft_ms=30, ttfet_ms=90, tbt_us=(5_000,)))
    hook(record(error="stream_dropped"))
    assert collect.ttft_ms(50) == 10
    assert collect.ttft_ms(100) == 30
    assert collect.ttfet_ms(50) == 90
    assert collect.tbt_ms(50) == 3.0
    assert len(collect.records) == 3
    collect.clear()
    assert collect.records == ()
    assert collect.tbt_ms(50) is None


def test_collector_keeps_every_record_of_many_threads() -> None:
    collect = TurnCollector()
    threads = [threading.Thread(target=lambda: [collect(record()) for _ in range(200)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(collect.records) == 1600


@pytest.mark.parametrize(
    ("fields", "level"),
    [
        ({}, logging.DEBUG),
        ({"loss": "prefill_failed"}, logging.INFO),
        ({"loss": "prefill_failed", "error": "stream_dropped"}, logging.WARNING),
    ],
)
def test_logging_hook_levels(caplog, fields: dict, level: int) -> None:
    with caplog.at_level(logging.DEBUG, "conserve_sdk.turn"):
        LoggingHook()(record(ttft_ms=12, cached_tokens=0, decoder_id="d0", **fields))
    (line,) = caplog.records
    assert line.levelno == level
    assert line.getMessage().startswith("turn_finished conversation_id=c lineage=l turn=1 decoder_id=d0 ttft_ms=12")
    assert "cached_tokens=0" in line.getMessage()
    assert "lease_id" not in line.getMessage()


def test_logging_hook_is_silent_below_the_level(caplog) -> None:
    logger = logging.getLogger("quiet")
    with caplog.at_level(logging.WARNING, "quiet"):
        LoggingHook(logger)(record())
    assert caplog.records == []


@pytest.mark.parametrize("length", [0, 1, TBT_OBSERVED_MAX, TBT_OBSERVED_MAX + 1, 4096])
def test_a_metric_takes_a_bounded_even_share_of_the_gaps(length: int) -> None:
    gaps = tuple(range(length))
    observed = observed_gaps(record(tbt_us=gaps))
    assert len(observed) == length if length <= TBT_OBSERVED_MAX else len(observed) >= TBT_OBSERVED_MAX // 2
    assert len(observed) <= TBT_OBSERVED_MAX
    assert len({later - earlier for earlier, later in pairwise(observed)}) <= 1
