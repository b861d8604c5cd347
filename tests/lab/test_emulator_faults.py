"""Faults on demand, killing, restarting, and clients that leave."""

from __future__ import annotations

import threading
import time
from collections.abc import Callable
from typing import Any

import httpx2
import pydantic
import pytest

from conserve_lab.emulator import EmulatedFleet, default_fleet

DEADLINE_S = 30.0
CUT = (httpx2.RemoteProtocolError, httpx2.ReadError)
"""How a client sees a connection that was cut: by its missing end or by a reset."""
BODY = {"model": "emulated", "messages": [{"role": "user", "content": "hello"}]}


def chat(fleet: EmulatedFleet, http: httpx2.Client, engine: str = "d0", **body: Any) -> httpx2.Response:
    return http.post(fleet.engine(engine).url + "/v1/chat/completions", json={**BODY, **body})


def wait_until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + DEADLINE_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.005)


def start_time(fleet: EmulatedFleet, http: httpx2.Client) -> str:
    page = http.get(fleet.engine("d0").url + "/metrics").text
    return next(line for line in page.splitlines() if line.startswith("process_start_time_seconds"))


def test_a_killed_engine_refuses_and_a_restarted_one_is_new(fleet: EmulatedFleet, http: httpx2.Client) -> None:
    engine = fleet.engine("d0")
    first = chat(fleet, http).json()
    before = (engine.url, engine.nixl_engine_id, start_time(fleet, http))
    fleet.faults("d0", slow_ms=1)
    fleet.kill("d0")
    assert not engine.alive
    for _ in range(3):
        with pytest.raises(httpx2.ConnectError):
            http.get(engine.url + "/health")
    fleet.kill("d0")
    fleet.restart("d0")
    assert engine.alive
    assert engine.url == before[0]
    assert engine.nixl_engine_id != before[1]
    assert start_time(fleet, http) != before[2]
    again = chat(fleet, http).json()
    assert again["choices"] == first["choices"]
    assert again["usage"]["prompt_tokens_details"]["cached_tokens"] == 0
    assert http.get(engine.url + "/emulator/faults").json()["slow_ms"] == 0
    assert len({record.incarnation for record in engine.requests}) == 2
    fleet.kill("d0")
    with pytest.raises(httpx2.ConnectError):
        http.get(engine.url + "/health")


def test_kill_cuts_streams_and_works_over_http(http: httpx2.Client) -> None:
    with EmulatedFleet(default_fleet(prefillers=0, decoders=1, step_base_us=200_000)) as fleet:
        engine = fleet.engine("d0")
        url = engine.url + "/v1/chat/completions"
        with http.stream("POST", url, json={**BODY, "stream": True}) as stream:
            lines = stream.iter_lines()
            next(lines)
            assert http.post(engine.url + "/emulator/faults", json={"kill": True}).status_code == 200
            with pytest.raises(CUT):
                list(lines)
        wait_until(lambda: not engine.alive)
        with pytest.raises(httpx2.ConnectError):
            http.get(engine.url + "/health")


def test_next_requests_fail_and_then_no_more(fleet: EmulatedFleet, http: httpx2.Client) -> None:
    fleet.faults("d0", fail_next=2, fail_status=503)
    assert [chat(fleet, http).status_code for _ in range(3)] == [503, 503, 200]
    assert http.get(fleet.engine("d0").url + "/health").status_code == 200
    assert [record.status for record in fleet.engine("d0").requests] == [503, 503, 200]


def test_streams_drop_after_some_chunks(fleet: EmulatedFleet, http: httpx2.Client) -> None:
    fleet.faults("d0", drop_next=1, drop_after_chunks=3)
    seen: list[str] = []
    with (
        pytest.raises(CUT),
        http.stream("POST", fleet.engine("d0").url + "/v1/chat/completions", json={**BODY, "stream": True}) as stream,
    ):
        seen.extend(line for line in stream.iter_lines() if line)
    assert len(seen) <= 3
    wait_until(lambda: [record.status for record in fleet.engine("d0").requests] == [499])
    assert chat(fleet, http, stream=True).text.endswith("data: [DONE]\n\n")


def test_slow_adds_time(fleet: EmulatedFleet, http: httpx2.Client) -> None:
    fleet.faults("d0", slow_ms=300)
    start = time.monotonic()
    chat(fleet, http)
    assert time.monotonic() - start >= 0.3


def test_a_paused_engine_answers_nothing_until_it_goes_on(fleet: EmulatedFleet, http: httpx2.Client) -> None:
    fleet.faults("d0", pause=True)
    url = fleet.engine("d0").url
    for path in ("/health", "/metrics", "/v1/models"):
        with pytest.raises(httpx2.ReadTimeout):
            http.get(url + path, timeout=0.2)
    with pytest.raises(httpx2.ReadTimeout):
        http.post(url + "/v1/chat/completions", json=BODY, timeout=0.2)
    wait_until(lambda: [record.status for record in fleet.engine("d0").requests] == [499])
    answers: list[int] = []
    waiting = threading.Thread(target=lambda: answers.append(chat(fleet, http).status_code))
    waiting.start()
    assert http.get(url + "/emulator/faults").json()["pause"] is True
    fleet.faults("d0", pause=False)
    waiting.join(DEADLINE_S)
    assert answers == [200]
    fleet.faults("d0", pause=True, fail_next=3)
    fleet.faults("d0", reset=True)
    assert chat(fleet, http).status_code == 200


def test_a_client_that_leaves_frees_its_blocks(http: httpx2.Client) -> None:
    with EmulatedFleet(default_fleet(prefillers=0, decoders=1, step_base_us=50_000)) as fleet:
        engine = fleet.engine("d0")
        url = engine.url + "/v1/chat/completions"
        with http.stream("POST", url, json={**BODY, "stream": True, "n": 2}) as stream:
            lines = stream.iter_lines()  # kept: a collected iterator closes the connection
            next(lines)
            assert engine.kv_used_blocks > 0
        wait_until(lambda: engine.kv_used_blocks == 0)
        with pytest.raises(httpx2.ReadTimeout):
            http.post(url, json={**BODY, "max_tokens": 500, "ignore_eos": True}, timeout=0.3)
        wait_until(lambda: engine.kv_used_blocks == 0)
        wait_until(lambda: len(engine.requests) == 2)
        assert [record.status for record in engine.requests] == [499, 499]
        assert "num_requests_running" in http.get(engine.url + "/metrics").text


def test_fault_orders_are_checked(shared_fleet: EmulatedFleet, http: httpx2.Client) -> None:
    url = shared_fleet.engine("d0").url + "/emulator/faults"
    answer = http.post(url, json={"explode": True})
    assert answer.status_code == 400
    assert "explode" in answer.json()["error"]["message"]
    assert http.post(url, json={"fail_next": -1}).status_code == 400
    assert http.post(url, json={"slow_ms": 0}).json()["slow_ms"] == 0
    with pytest.raises(pydantic.ValidationError):
        shared_fleet.faults("d0", fail_status=200)


def test_a_fleet_is_used_as_documented() -> None:
    fleet = EmulatedFleet(default_fleet(prefillers=1, decoders=1, time_scale=0))
    with pytest.raises(RuntimeError, match="not running"):
        fleet.call(_nothing())
    with fleet:
        with pytest.raises(RuntimeError, match="runs already"):
            fleet.start()
        with pytest.raises(KeyError, match="engines are p0, d0"):
            fleet.engine("d9")
        assert [engine.id for engine in fleet.prefillers] == ["p0"]
        assert [engine.id for engine in fleet.decoders] == ["d0"]
        assert [engine.role for engine in fleet.engines] == ["prefiller", "decoder"]
        first = fleet.broker_engines()[0]
        assert (first["id"], first["url"], first["transfer_group"]) == ("p0", fleet.engine("p0").url, "emulated")
    fleet.stop()
    assert fleet.engines == ()
    with fleet:  # once more
        assert fleet.engine("d0").alive


async def test_a_fleet_is_an_async_context_manager() -> None:
    async with (
        EmulatedFleet(default_fleet(prefillers=0, decoders=1), time_scale=0) as fleet,
        httpx2.AsyncClient(timeout=30) as client,
    ):
        answer = await client.post(fleet.engine("d0").url + "/v1/chat/completions", json=BODY)
        assert answer.status_code == 200


def test_a_port_in_use_is_an_error_and_leaves_nothing_behind() -> None:
    with EmulatedFleet(default_fleet(prefillers=0, decoders=1)) as fleet:
        port = int(fleet.engine("d0").url.rsplit(":", 1)[1])
        taken = threading.active_count()
        import socket

        with socket.socket() as blocker:
            blocker.bind(("127.0.0.1", 0))
            blocker.listen()
            other = EmulatedFleet(default_fleet(prefillers=0, decoders=1), port=blocker.getsockname()[1])
            with pytest.raises(OSError, match="in use"):
                other.start()
        assert threading.active_count() == taken
        assert port


async def _nothing() -> None:
    """Do nothing."""


def test_a_broken_engine_fails_its_requests_instead_of_hanging(
    fleet: EmulatedFleet, http: httpx2.Client, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    def explode(*_args: object, **_kwargs: object) -> None:
        raise ZeroDivisionError

    monkeypatch.setattr("conserve_lab.engine_model.EngineModel.step", explode)
    for _ in range(2):
        answer = chat(fleet, http)
        assert (answer.status_code, answer.json()["error"]["message"]) == (500, "Internal server error")
    assert "engine d0 is broken" in caplog.text
    monkeypatch.undo()
    fleet.restart("d0")
    assert chat(fleet, http).status_code == 200
