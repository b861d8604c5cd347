"""The front door: options, sharing, what is public."""

from __future__ import annotations

import asyncio
import subprocess
import sys

import httpx2
import openai
import pytest

import conserve_sdk
from conserve_sdk import BASE_URL, ConfigError, ConServe, Timeouts, TurnCollector, async_openai_client, connect
from conserve_sdk.client import _shared
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.testing import EngineReply, InMemoryBroker, ScriptedEngine, deny_network
from conserve_sdk.transport import Settings

BROKER = "http://127.0.0.1:9"


@pytest.fixture(autouse=True)
def no_sharing_between_tests(monkeypatch):
    monkeypatch.delenv("CONSERVE_BROKER_URL", raising=False)
    yield
    for shared in _shared.values():
        shared.close()
    _shared.clear()


# ---- options --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "key"),
    [
        ({"broker_url": None}, "broker_url"),
        ({"broker_url": []}, "broker_url"),
        ({"broker_url": "127.0.0.1:7070"}, "broker_url"),
        ({"broker_url": "ftp://x"}, "broker_url"),
        ({"broker_url": "http://[::1"}, "broker_url"),
        ({"broker_url": [3]}, "broker_url"),
        ({"fallback_engines": ["nowhere"]}, "fallback_engines"),
        ({"fallback_engines": "http:///v1"}, "fallback_engines"),
        ({"wait_s": -1}, "wait_s"),
        ({"on_broker_unavailable": "panic"}, "on_broker_unavailable"),
        ({"stranger_bytes_max": -1}, "stranger_bytes_max"),
        ({"slice_chars": 1_023}, "slice_chars"),
        ({"slice_chars": -1}, "slice_chars"),
        ({"tiemout": 3}, "tiemout"),
    ],
)
def test_a_wrong_option_is_named(options, key) -> None:
    with pytest.raises(ConfigError) as caught:
        ConServe(**{"broker_url": BROKER, **options})
    assert caught.value.key == key


@pytest.mark.parametrize("field", ["connect_s", "read_s", "broker_s", "prefill_s", "prefill_share", "transfer_s"])
def test_time_limits_are_positive(field) -> None:
    with pytest.raises(ConfigError, match=field):
        Timeouts(**{field: 0})


def test_a_prefill_must_leave_time() -> None:
    with pytest.raises(ConfigError, match="prefill_share"):
        Timeouts(prefill_share=1.0)


def test_the_environment_names_the_broker(monkeypatch) -> None:
    monkeypatch.setenv("CONSERVE_BROKER_URL", "http://a:1, http://b:2")
    assert Settings.resolve(None, {}).broker_urls == ("http://a:1", "http://b:2")
    assert Settings.resolve("http://c:3", {}).broker_urls == ("http://c:3",)
    assert Settings.resolve(["http://c:3", "http://d:4"], {}).broker_urls == ("http://c:3", "http://d:4")


def test_one_hook_or_several() -> None:
    one, two = TurnCollector(), TurnCollector()
    assert Settings.resolve(BROKER, {"on_turn": one}).on_turn == (one,)
    assert Settings.resolve(BROKER, {"on_turn": [one, two]}).on_turn == (one, two)
    assert len(Settings.resolve(BROKER, {}).on_turn) == 1


# ---- clients --------------------------------------------------------------------------------------------------


def test_clients_say_where_nothing_goes(monkeypatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-somebody-elses")
    with ConServe(BROKER) as conserve:
        client = conserve.openai_client()
        assert str(client.base_url).rstrip("/") == BASE_URL
        assert client.api_key == "EMPTY"
        assert conserve.openai_client(api_key="mine", max_retries=7).max_retries == 7
        assert conserve.async_openai_client().timeout == httpx2.Timeout(600.0, connect=5.0)
        with pytest.raises(ConfigError, match="transport"):
            conserve.openai_client(http_client=httpx2.Client())


def test_clients_of_one_broker_share_one_object() -> None:
    first = connect(BROKER)
    assert connect(BROKER) is first
    assert connect([BROKER]) is first
    assert connect(BROKER, wait_s=3.0) is not first
    assert connect(BROKER, wait_s=3.0) is connect(BROKER, wait_s=3.0)
    assert connect(BROKER, timeouts=Timeouts(read_s=3)) is connect(BROKER, timeouts=Timeouts(read_s=3))
    assert connect(BROKER, fallback_engines=["http://f"]) is connect(BROKER, fallback_engines=("http://f",))
    hook = TurnCollector()
    assert connect(BROKER, on_turn=hook) is connect(BROKER, on_turn=hook)
    assert connect(BROKER, on_turn=TurnCollector()) is not connect(BROKER, on_turn=hook)
    first.close()
    assert connect(BROKER) is not first


def test_factories_use_the_shared_object() -> None:
    client = conserve_sdk.openai_client(BROKER, max_retries=0)
    other = async_openai_client(BROKER)
    assert isinstance(client, openai.OpenAI)
    assert isinstance(other, openai.AsyncOpenAI)
    assert len(_shared) == 1


async def test_closing_twice_is_fine() -> None:
    conserve = ConServe(BROKER)
    async with conserve:
        pass
    conserve.close()
    await conserve.aclose(release=True)
    conserve.close(release=True)
    assert conserve.closed
    assert conserve.reports_dropped == 0


# ---- what is public -------------------------------------------------------------------------------------------


def test_every_public_name_is_there_and_loads_late() -> None:
    assert set(conserve_sdk._HOME_OF) == set(conserve_sdk.__all__)
    assert set(conserve_sdk.__all__) <= set(dir(conserve_sdk))
    for name in conserve_sdk.__all__:
        assert getattr(conserve_sdk, name) is not None
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        conserve_sdk.nothing  # noqa: B018
    code = "import sys, conserve_sdk.core, conserve_sdk.protocol; sys.exit('openai' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_reports_of_the_last_turns_are_sent_at_exit() -> None:
    code = """
import atexit
from conserve_sdk.testing import InMemoryBroker, ScriptedEngine
broker = InMemoryBroker()
atexit.register(lambda: print(sum(e.path == "/v1/reports" for e in broker.exchanges), conserve.closed))  # runs last
import conserve_sdk
conserve = conserve_sdk.connect(
    broker.url, broker_transport=broker, engine_transport=ScriptedEngine(then="answer")
)
messages = [{"role": "user", "content": "x"}]
conserve.openai_client().chat.completions.create(model="test-model", messages=messages)
"""
    ran = subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, text=True)
    assert ran.stdout.split() == ["1", "True"]


# ---- the testing package --------------------------------------------------------------------------------------


def test_a_scripted_engine_says_what_was_not_played() -> None:
    engine = ScriptedEngine(EngineReply.chat()).script("d1", EngineReply.failure(500))
    with pytest.raises(AssertionError, match="2 scripted replies"):
        engine.assert_complete()
    with httpx2.Client(transport=engine) as client:
        assert client.post("http://d0.invalid/v1/chat/completions", json={}).status_code == 200
        assert client.post("http://d1.invalid/v1/chat/completions", json={}).status_code == 500
        engine.assert_complete()
        with pytest.raises(AssertionError, match="no reply scripted for GET /x on d0"):
            client.get("http://d0.invalid/x")
    assert [call.engine for call in engine.calls] == ["d0", "d1", "d0"]


def test_the_network_is_denied() -> None:
    with deny_network(), httpx2.Client(trust_env=False) as client, pytest.raises(AssertionError, match="denied"):
        client.get("http://127.0.0.1:9")
    with deny_network(allow_loopback=True), httpx2.Client(trust_env=False) as client:
        with pytest.raises(httpx2.ConnectError):
            client.get("http://127.0.0.1:9")
        with pytest.raises(AssertionError, match="denied"):
            client.get("http://192.0.2.1:9")
    with httpx2.Client(trust_env=False) as client, pytest.raises(httpx2.ConnectError):
        client.get("http://127.0.0.1:9")


async def test_the_network_is_denied_to_event_loops() -> None:
    with deny_network(), pytest.raises(AssertionError, match="denied"):
        await asyncio.open_connection("127.0.0.1", 9)


def test_a_planner_may_send_every_turn_through_a_prefiller() -> None:
    from conserve_lab.baselines.per_turn import PerTurnPlanner

    broker = InMemoryBroker(settings=BrokerSettings(placement=PAPER))
    engine, turns = ScriptedEngine(then="answer"), TurnCollector()
    with ConServe(
        broker.url, broker_transport=broker, engine_transport=engine, planner=PerTurnPlanner(), on_turn=turns
    ) as conserve:
        client = conserve.openai_client()
        messages = [{"role": "user", "content": "hello " * 300}]
        for _ in range(3):
            client.chat.completions.create(model="test-model", messages=messages)
            messages += [{"role": "assistant", "content": "ok"}, {"role": "user", "content": "more"}]
    assert [call.engine for call in engine.calls] == ["p0", "d0"] * 3
    assert [record.migrated for record in turns.records] == [True] * 3
