"""A broker that lost everything but its signing key: good tokens bring their leases back, all others are refused."""

import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import httpx2
import pytest

from conserve_broker.journal import MemoryJournal
from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_lab.emulator import EmulatedFleet, default_fleet
from conserve_sdk.core.units import LeaseId, Ms
from conserve_sdk.protocol import LeaseGrant, Problem
from conserve_sdk.tokens import SigningKey, TokenSigner, read_unverified

from .broker_process import BrokerProcess, until

SECRET = "the secret that survives all loss of state"
SIGNER = TokenSigner([SigningKey(kid="ours", secret=SECRET.encode())])
FOREIGN = TokenSigner([SigningKey(kid="ours", secret=b"a secret of somebody else entirely, sorry")])


class Forgetful(BrokerProcess):
    """A broker in this process that loses its state whenever a test wants it."""

    def __init__(self, config: BrokerConfig) -> None:
        super().__init__(Path("unused"), {})
        self._config = config
        self.server = BrokerServer(config, journal=MemoryJournal()).start()
        self.url = self.server.url

    def lose_everything(self) -> None:
        self.server.kill()
        port = int(self.url.rsplit(":", 1)[1])
        config = self._config.model_copy(update={"listen": self._config.listen.model_copy(update={"port": port})})
        self.server = BrokerServer(config, journal=MemoryJournal()).start()

    def supersede(self, grant: LeaseGrant) -> LeaseGrant:
        body = {"token": grant.token, "epoch": grant.epoch, "reason": "test"}
        response = httpx2.post(f"{self.url}/v1/leases/{grant.lease_id}/supersede", json=body)
        assert response.is_success, response.text
        return LeaseGrant.model_validate_json(response.content)

    def release(self, lease_id: str, token: str) -> httpx2.Response:
        return httpx2.delete(f"{self.url}/v1/leases/{lease_id}", headers={"authorization": f"Lease {token}"})

    def verdict(self, token: str) -> str:
        body = {"tokens": [token]}
        return httpx2.post(f"{self.url}/v1/renewals", json=body).json()["results"][0]["verdict"]

    def live(self) -> int:
        return int(self.metric("conserve_leases_active"))


@pytest.fixture(scope="module")
def fleet() -> Iterator[EmulatedFleet]:
    with EmulatedFleet(default_fleet(prefillers=1, decoders=2, time_scale=0)) as running:
        yield running


@pytest.fixture
def broker(fleet: EmulatedFleet) -> Iterator[Forgetful]:
    tables: dict[str, Any] = {
        "listen": {"port": 0},
        "lease": {"ttl_ms": 5_000, "park_ttl_ms": 1_000, "grace_ms": 20_000},
        "scrape": {"interval_ms": 100},
        "token": {"keys": [{"kid": "ours", "secret": SECRET}]},
        "engine": fleet.broker_engines(),
    }
    running = Forgetful(BrokerConfig.from_mapping(tables))
    try:
        running.server.wait_until_ready(engines=3)
        yield running
    finally:
        running.server.stop()


def resigned(token: str, signer: TokenSigner = SIGNER, **changes: Any) -> str:
    return signer.sign(replace(read_unverified(token), **changes))


def test_a_good_token_brings_its_lease_back_and_the_grace_applies(broker: Forgetful) -> None:
    grant = broker.grant("c")
    broker.lose_everything()
    assert broker.live() == 0
    before = time.monotonic()
    assert broker.renew(grant) == ["ok"]
    assert broker.live() == 1
    holder = {"authorization": f"Lease {grant.token}"}
    back = httpx2.get(f"{broker.url}/v1/leases/{grant.lease_id}", headers=holder).json()
    left_ms = 20_000 - (time.monotonic() - before) * 1000
    assert back["expires_in_ms"] > 5_000, "a TTL is 5 s; the grace after a start is longer"
    assert back["expires_in_ms"] <= 20_000
    assert left_ms > 0
    assert (back["epoch"], back["decoder"]["engine_id"]) == (1, grant.decoder.engine_id)
    assert broker.grant("c").lease_id == grant.lease_id, "and its key finds it"


Forge = Callable[[str], str]
BAD: dict[str, Forge] = {
    "another key": lambda token: resigned(token, FOREIGN),
    "a key nobody knows": lambda token: TokenSigner([SigningKey(kid="theirs", secret=b"x" * 32)]).sign(
        read_unverified(token)
    ),
    "no signature": lambda token: token.rpartition(".")[0] + ".",
    "another signature": lambda token: token[:-8] + ("A" * 8 if not token.endswith("A" * 8) else "B" * 8),
    "claims of another": lambda token: ".".join(
        [token.split(".")[0], resigned(token, lease_id=LeaseId("lease-other")).split(".")[1], token.split(".")[2]]
    ),
    "no algorithm": lambda token: "eyJhbGciOiJub25lIiwidHlwIjoiSldUIn0." + token.split(".")[1] + ".",
    "nonsense": lambda _: "not.a.token",
}


@pytest.mark.parametrize("forge", BAD.values(), ids=BAD.keys())
def test_forged_and_foreign_tokens_bring_nothing_back(broker: Forgetful, forge: Forge) -> None:
    grant = broker.grant("c")
    broker.lose_everything()
    token = forge(grant.token)
    assert broker.verdict(token) == "bad_token"
    assert httpx2.post(f"{broker.url}/v1/leases/{grant.lease_id}/park", json={"token": token}).status_code == 401
    refused = broker.release(grant.lease_id, token)
    assert (refused.status_code, Problem.model_validate_json(refused.content).code) == (401, "bad_token")
    report = {"kind": "turn_finished", "token": token, "prompt_tokens": 5}
    answer = httpx2.post(f"{broker.url}/v1/reports", json={"reports": [report]}).json()
    assert answer["results"][0]["verdict"] == "bad_token"
    assert broker.live() == 0
    assert broker.renew(grant) == ["ok"], "its holder still can"


def test_an_expired_token_brings_nothing_back(broker: Forgetful) -> None:
    grant = broker.grant("c")
    broker.lose_everything()
    over = resigned(grant.token, exp_ms=Ms(time.time_ns() // 1_000_000 - 1))
    assert broker.verdict(over) == "unknown"
    assert broker.live() == 0


def test_a_released_lease_stays_released(broker: Forgetful) -> None:
    grant = broker.grant("c")
    assert broker.release(grant.lease_id, grant.token).status_code == 204
    assert broker.verdict(grant.token) == "unknown"
    assert broker.live() == 0
    second = broker.grant("d")
    broker.lose_everything()
    assert broker.release(second.lease_id, second.token).status_code == 204, "also by a broker that never knew it"
    assert broker.verdict(second.token) == "unknown"
    assert broker.live() == 0


def test_an_older_epoch_never_comes_back_beside_a_newer_one(broker: Forgetful) -> None:
    first = broker.grant("c")
    second = broker.supersede(first)
    assert (second.epoch, broker.verdict(first.token)) == (2, "superseded")
    broker.lose_everything()
    assert broker.verdict(second.token) == "ok"
    assert broker.verdict(first.token) == "superseded"
    assert broker.live() == 1


def test_a_newer_epoch_takes_the_place_of_an_older_one_that_came_first(broker: Forgetful) -> None:
    first = broker.grant("c")
    second = broker.supersede(first)
    broker.lose_everything()
    assert broker.verdict(first.token) == "ok", "nothing here says that it is out of date"
    assert broker.verdict(second.token) == "ok"
    assert broker.verdict(first.token) == "superseded"
    assert broker.live() == 1
    assert broker.grant("c").lease_id == second.lease_id


def test_a_token_of_a_restarted_engine_brings_nothing_back(broker: Forgetful, fleet: EmulatedFleet) -> None:
    grant = broker.grant("c")
    broker.lose_everything()
    fleet.restart(grant.decoder.engine_id)
    broker.server.wait_until_ready(engines=3)
    until(lambda: broker.verdict(grant.token) == "engine_lost", what="the loss of the engine")
    assert broker.live() == 0
