"""`conserve top`: one snapshot or many, on a screen, as lines, as JSON; and what happens when the broker goes."""

import io
import json
import threading
import time
from collections.abc import Iterator
from typing import Any

import httpx2
import pytest
from rich.console import Console

from conserve_broker import top as top_module
from conserve_broker.cli import top_main
from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_broker.snapshot import Snapshot, Totals
from conserve_broker.top import Rates, _screen
from conserve_lab.emulator import EmulatedFleet, default_fleet
from conserve_sdk.protocol import EngineInfo

BUDGET_S = 40.0
SAID = Snapshot(at_ms=0, version="1", role="alone", leader_url="", ready=True, reasons=(), warnings=())


@pytest.fixture(scope="module")
def broker() -> Iterator[BrokerServer]:
    with EmulatedFleet(default_fleet(prefillers=1, decoders=1, time_scale=0)) as fleet:
        tables = {"listen": {"port": 0}, "scrape": {"interval_ms": 100}, "engine": fleet.broker_engines()}
        with BrokerServer(BrokerConfig.from_mapping(tables)) as server:
            server.wait_until_ready(engines=2, timeout_s=BUDGET_S)
            yield server


def test_once(broker: BrokerServer, capsys: Any) -> None:
    body = {"conversation_id": "c", "lineage": "main", "model": "emulated", "first_turn_input_tokens": 6_554}
    httpx2.post(f"{broker.url}/v1/leases", json=body)
    assert top_main(["--once", "--broker", broker.url]) == 0
    printed = capsys.readouterr().out
    for expected in (
        "alone, preset default",
        "1 leases: 1 busy",
        "grants 1",
        "#.........  10 %",
        "nobody waits for room",
    ):
        assert expected in printed
    assert top_main(["--once", "--json", "--broker", broker.url]) == 0
    told = json.loads(capsys.readouterr().out)
    assert [engine["engine_id"] for engine in told["engines"]] == ["d0", "p0"]


def test_nobody_there_is_one_line(broker: BrokerServer, capsys: Any) -> None:
    assert top_main(["--once", "--broker", "http://127.0.0.1:9"]) == 1
    assert top_main(["--broker", "no url"]) == 1
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 2
    assert all("start it, or correct --broker" in line for line in lines)
    assert top_main(["--broker", f"{broker.url}/nothing"]) == 1
    assert "no route /nothing/v1/events" in capsys.readouterr().err
    assert top_main(["--often"]) == 2


class Captured(io.StringIO):
    """Standard output of a command that runs in another thread."""

    def until(self, words: str) -> None:
        deadline = time.monotonic() + BUDGET_S
        while words not in self.getvalue():
            assert time.monotonic() < deadline, self.getvalue()[-500:]
            time.sleep(0.02)


class EnoughError(Exception):
    """Ends the command in the middle, as Ctrl-C would."""


@pytest.mark.parametrize("terminal", [False, True])
def test_it_goes_on_when_the_broker_comes_back(monkeypatch: pytest.MonkeyPatch, terminal: bool) -> None:
    out = Captured()
    console = Console(file=out, force_terminal=terminal, width=150, markup=False)
    monkeypatch.setattr(top_module, "output", lambda: console)
    monkeypatch.setattr(top_module, "_PAUSE_S", 0.05)
    enough = threading.Event()
    shown = top_module._screen

    def screen(told: Any, rates: Rates) -> Any:
        if enough.is_set():
            raise EnoughError
        return shown(told, rates)

    monkeypatch.setattr(top_module, "_screen", screen)
    server = BrokerServer(BrokerConfig.from_mapping({"listen": {"port": 0}})).start()
    ends: list[BaseException] = []

    def run() -> None:
        try:
            top_module.top(server.url, once=False, as_json=False, plain=not terminal)
        except EnoughError as end:
            ends.append(end)

    thread = threading.Thread(target=run)
    thread.start()
    try:
        out.until("not ready: no engine is ready")
        server.stop()
        out.until("trying again")
        seen = out.getvalue().count("not ready")
        server.start()
        deadline = time.monotonic() + BUDGET_S
        while out.getvalue().count("not ready") == seen:
            assert time.monotonic() < deadline
            time.sleep(0.02)
    finally:
        enough.set()
        thread.join(BUDGET_S)
        server.stop()
    assert len(ends) == 1


def test_json_lines_hold_snapshots_alone(capsys: Any) -> None:
    top_module._print_line("the broker closed the connection; trying again")
    assert capsys.readouterr().out == ""
    top_module._print_line(SAID)
    assert Snapshot.model_validate_json(capsys.readouterr().out) == SAID


# ---- what the screen says ---------------------------------------------------------------------------------------


def text_of(snapshot: Snapshot, *before: Snapshot) -> str:
    rates = Rates()
    for each in (*before, snapshot):
        rates.add(each)
    console = Console(file=io.StringIO(), width=160, markup=False)
    console.print(_screen(snapshot, rates))
    return console.file.getvalue()


def engine(**changes: Any) -> EngineInfo:
    names = EngineInfo.model_fields
    blank: dict[str, Any] = {name: 0 for name, field in names.items() if field.is_required()}
    words = {"engine_id": "d0", "url": "u", "role": "decoder", "model": "m", "state": "gone", "detail": "no answer"}
    return EngineInfo.model_validate({**blank, **words, "incarnation": None, "transfer_group": "", **changes})


def test_a_standby_shows_who_leads() -> None:
    reason = "standby: http://b leads"
    told = text_of(SAID.model_copy(update={"role": "standby", "reasons": (reason,), "warnings": ("look",)}))
    assert "not ready: standby: http://b leads" in told
    assert "warning: look" in told
    assert "leases" not in told


def test_rates_are_of_the_last_minute() -> None:
    def at(seconds: int, grants: int) -> Snapshot:
        return SAID.model_copy(update={"at_ms": seconds * 1000, "totals": Totals(grants=grants)})

    assert "grants 7 " in text_of(at(0, 7))
    assert "grants 90 (60/min)" in text_of(at(90, 90), *(at(second, second) for second in range(0, 90, 10)))
    assert "grants 4  " in text_of(at(90, 4), at(80, 900)), "another broker's totals"


def test_engines_and_queue() -> None:
    waiting = {
        "conversation_id": "w",
        "tenant": "t",
        "model": "m",
        "need_tokens": 1_000,
        "waited_ms": 500,
        "left_ms": 1,
    }
    told = text_of(
        Snapshot.model_validate(
            {
                **SAID.model_dump(),
                "engines": [engine(observed_ago_ms=None).model_dump(), engine(engine_id="d1").model_dump()],
                "waiting_requests": 12,
                "waiting": [waiting] * 12,
            }
        )
    )
    assert "never" in told
    assert "d0: no answer" in told
    assert "12 wait for room" in told
    assert told.count("needs 1,000 tokens of m") == 8
