"""The log: ids of whom an event concerns, as text for people and as JSON for collectors; never a prompt."""

import json
import logging
import sys
import threading
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest

from conserve_broker.logbook import LOGGER_NAME, JsonFormatter, Logbook, logger, trace_id
from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_lab.emulator import EmulatedFleet, default_fleet
from conserve_sdk._desk import Outcome
from conserve_sdk.core import Ms, RefusalReason, Refused, RequestId, Tokens
from conserve_sdk.core.receipt import Receipt
from tests.broker.broker_process import BrokerProcess, until

BUDGET_S = 40.0
TRACE = "4bf92f3577b34da6a3ce929d0e0e4736"
PARENT = {"traceparent": f"00-{TRACE}-00f067aa0ba902b7-01"}


class Lines(logging.Handler):
    """What a JSON log would hold."""

    def __init__(self) -> None:
        super().__init__()
        self.setFormatter(JsonFormatter())
        self.lines: list[dict] = []

    def emit(self, record: logging.LogRecord) -> None:
        self.lines.append(json.loads(self.format(record)))

    def of(self, event: str) -> list[dict]:
        return [line for line in self.lines if line["event"] == event]


@pytest.fixture
def lines() -> Iterator[Lines]:
    handler = Lines()
    target = logging.getLogger(LOGGER_NAME)
    before = target.level
    target.addHandler(handler)
    target.setLevel(logging.INFO)
    yield handler
    target.removeHandler(handler)
    target.setLevel(before)


@pytest.fixture(scope="module")
def fleet() -> Iterator[EmulatedFleet]:
    with EmulatedFleet(default_fleet(prefillers=0, decoders=1, time_scale=0)) as running:
        yield running


@pytest.fixture
def url(fleet: EmulatedFleet) -> Iterator[str]:
    engines = [{**engine, "kv_capacity_tokens": 20_000} for engine in fleet.broker_engines()]
    tables = {"listen": {"port": 0}, "scrape": {"interval_ms": 100}, "engine": engines}
    with BrokerServer(BrokerConfig.from_mapping(tables)) as server:
        server.wait_until_ready(timeout_s=BUDGET_S)
        yield server.url


def ask(url: str, conversation: str, *, tokens: int = 1_000, wait_ms: int = 0, **headers: str) -> httpx2.Response:
    body = {"conversation_id": conversation, "lineage": "main", "model": "emulated", "wait_ms": wait_ms}
    sent = {**body, "first_turn_input_tokens": tokens}
    return httpx2.post(f"{url}/v1/leases", json=sent, headers=headers, timeout=BUDGET_S)


def test_a_grant_with_its_ids(url: str, lines: Lines) -> None:
    lease = ask(url, "c1", **PARENT).json()
    (line,) = lines.of("lease_granted")
    assert (line["lease_id"], line["tenant"], line["conversation_id"]) == (lease["lease_id"], "default", "c1")
    assert (line["lineage"], line["trace_id"], line["level"]) == ("main", TRACE, "info")
    assert line["time"].endswith("+00:00")
    ask(url, "c2")
    assert "trace_id" not in lines.of("lease_granted")[1]
    ask(url, "c3", traceparent="garbage")
    assert "trace_id" not in lines.of("lease_granted")[2]


def test_who_waits_keeps_its_own_trace(url: str, lines: Lines) -> None:
    first = ask(url, "holder", tokens=15_000, **PARENT).json()
    other = {"traceparent": f"00-{'a' * 32}-{'b' * 16}-01"}
    waiting = threading.Thread(target=ask, args=(url, "patient"), kwargs={"tokens": 15_000, "wait_ms": 30_000, **other})
    waiting.start()
    until(lambda: bool(lines.of("lease_waiting")))
    holder = {"authorization": f"Lease {first['token']}", **PARENT}
    httpx2.delete(f"{url}/v1/leases/{first['lease_id']}", headers=holder)
    waiting.join(BUDGET_S)
    (line,) = lines.of("lease_waiting")
    assert (line["conversation_id"], line["trace_id"], line["position"]) == ("patient", "a" * 32, 1)
    granted = lines.of("lease_granted")[1]
    assert (granted["conversation_id"], granted["trace_id"]) == ("patient", "a" * 32)
    assert lines.of("lease_dropped")[0]["conversation_id"] == "holder"


def test_a_refusal_says_whose_it_was(url: str, lines: Lines) -> None:
    ask(url, "holder", tokens=15_000)
    assert ask(url, "too-much", tokens=15_000, **PARENT).status_code == 503
    (line,) = lines.of("lease_refused")
    assert (line["level"], line["conversation_id"], line["trace_id"]) == ("warning", "too-much", TRACE)
    assert line["reason"] == "no_capacity"


def test_who_goes_away_is_forgotten(lines: Lines) -> None:
    book = Logbook(logger())
    receipt = Receipt(preset="p", rule="r", prefill_rule="", need_tokens=Tokens(0), waited_ms=0, candidates=())
    refused = Refused(
        request_id=RequestId("r1"),
        reason=RefusalReason.NO_CAPACITY,
        detail="",
        retry_after_ms=Ms(0),
        receipt=receipt,
    )
    book.forget(RequestId("r1"))
    book.write(Outcome(reply=None, waiting=None, settled=(), events=(), decisions=(refused,)))
    (line,) = lines.of("lease_refused")
    assert "conversation_id" not in line
    assert trace_id.get() == ""


def test_what_others_log_is_json_too() -> None:
    formatter = JsonFormatter()
    try:
        raise ValueError("broken")
    except ValueError:
        record = logging.LogRecord("other", logging.ERROR, "f", 1, "it %s", ("failed",), sys.exc_info())
    line = json.loads(formatter.format(record))
    assert (line["event"], line["logger"], line["level"]) == ("it failed", "other", "error")
    assert "ValueError: broken" in line["exception"]


def test_text_stays_one_line_of_keys(url: str, caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER_NAME)
    ask(url, "c9")
    assert any("event='lease_granted'" in line and "conversation_id='c9'" in line for line in caplog.messages)


def test_a_broker_process_logs_json(fleet: EmulatedFleet, tmp_path: Path) -> None:
    tables = {
        "listen": {"port": 0},
        "watch": {"log_format": "json"},
        "scrape": {"interval_ms": 100},
        "engine": fleet.broker_engines(),
    }
    process = BrokerProcess(tmp_path / "broker.toml", tables)
    with process:
        until(lambda: process.readyz()["ready"])
        process.grant("c1")
        process.signal(15)
        process.wait()
    told = [json.loads(line) for line in process.log]
    events = [line["event"] for line in told]
    assert any("journal.path: empty" in event for event in events), "warnings of the configuration are lines as well"
    assert {"broker_recovered", "broker_started", "engine_state", "lease_granted"} <= set(events)
