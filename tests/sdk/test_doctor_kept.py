"""What `conserve doctor` says of holds by lease and of a host tier, and of those that contradict."""

import json

import httpx2
import pytest

from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_lab.emulator import EmulatedFleet, default_fleet
from conserve_sdk.doctor import main

GUARD = {"role": "decoder", "connector": "NixlConnector", "engine_id": "d0", "kv_load_failure_policy": "recompute"}
PREFILLER = {"role": "prefiller"}


@pytest.fixture(scope="module")
def fleet():
    with EmulatedFleet(default_fleet(prefillers=0, decoders=1, time_scale=0)) as fleet:
        yield fleet


class Told(httpx2.HTTPTransport):
    """The way to an engine whose guard tells what a test wants."""

    def __init__(self, facts) -> None:
        super().__init__()
        self._facts = facts

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        if request.url.path == "/conserve/engine":
            return httpx2.Response(200, json=self._facts)
        return super().handle_request(request)


@pytest.fixture
def examine(capsys, monkeypatch):
    monkeypatch.delenv("CONSERVE_BROKER_URL", raising=False)

    def run(*argv, **told):
        """The findings about how KV is kept, by check: verdict and what is said."""
        with Told(GUARD | told) as network:
            code = main([*argv, "--no-requests", "--json"], transport=network, sleep=lambda _: None)
        found = json.loads(capsys.readouterr().out)["findings"]
        kept = [one for one in found if one["check"] in ("holds", "host_tier", "host_tier_counted")]
        assert code == any(one["verdict"] == "fail" for one in found)
        return {one["check"]: (one["verdict"], f"{one['detail']}: {one['fix']}") for one in kept}

    return run


@pytest.mark.parametrize(
    ("told", "check", "verdict", "words"),
    [
        ({"leased_holds": True}, "holds", "ok", "ends with its lease"),
        ({"leased_holds": False}, "holds", "note", "--leased-holds"),
        ({"leased_holds": True} | PREFILLER, "holds", "note", "leave out kv_connector_module_path"),
        ({"leased_holds": False} | PREFILLER, "holds", "ok", "nothing between turns"),
        ({"host_tier_tokens": 65_536}, "host_tier", "ok", "65,536 tokens"),
        ({"host_tier_tokens": None}, "host_tier", "note", "--kv-cache-memory-bytes"),
        ({"host_tier_tokens": 65_536} | PREFILLER, "host_tier", "note", "leave out the OffloadingConnector"),
    ],
    ids=["leased", "stock", "leased prefiller", "prefiller", "tier", "tier of no size", "tier on a prefiller"],
)
def test_what_a_guard_tells(fleet, examine, told, check, verdict, words) -> None:
    found = examine(fleet.engine("d0").url, **told)
    assert list(found) == [check]
    assert found[check][0] == verdict
    assert words in found[check][1]


@pytest.mark.parametrize("told", [{}, {"host_tier_tokens": 0}], ids=["nothing", "no tier"])
def test_what_is_not_there_is_not_talked_about(fleet, examine, told) -> None:
    assert examine(fleet.engine("d0").url, **told) == {}


@pytest.mark.parametrize(
    ("counted", "has", "check", "verdict", "words"),
    [
        (65_536, 0, "host_tier", "fail", "the broker counts on 65,536 tokens"),
        (0, 65_536, "host_tier_counted", "note", "set host_tier_tokens = 65536"),
        (0, None, "host_tier_counted", "note", "set host_tier_tokens = its size"),
    ],
    ids=["counted only", "not counted", "size unknown"],
)
def test_a_host_tier_of_which_the_broker_knows_better(fleet, examine, counted, has, check, verdict, words) -> None:
    [entry] = fleet.broker_engines()
    tables = {
        "listen": {"port": 0},
        "scrape": {"interval_ms": 100},
        "engine": [entry | {"host_tier_tokens": counted}],
    }
    with BrokerServer(BrokerConfig.from_mapping(tables)) as broker:
        broker.wait_until_ready(engines=1, timeout_s=40)
        found = examine("--broker", broker.url, host_tier_tokens=has)
    assert found[check][0] == verdict
    assert words in found[check][1]


def test_a_host_tier_that_all_agree_on(fleet, examine) -> None:
    [entry] = fleet.broker_engines()
    tables = {"listen": {"port": 0}, "scrape": {"interval_ms": 100}, "engine": [entry | {"host_tier_tokens": 65_536}]}
    with BrokerServer(BrokerConfig.from_mapping(tables)) as broker:
        broker.wait_until_ready(engines=1, timeout_s=40)
        found = examine("--broker", broker.url, host_tier_tokens=65_536, leased_holds=True)
    assert {check: verdict for check, (verdict, _) in found.items()} == {"holds": "ok", "host_tier": "ok"}
