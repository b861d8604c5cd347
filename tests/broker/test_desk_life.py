"""What a holder says of its lease and how that ends, on the real core and desk under a fake clock."""

import httpx2
import pytest

from conserve_sdk._desk import Call, Reply, find_route
from conserve_sdk.core import TenantId
from conserve_sdk.protocol import (
    FleetInfo,
    LeaseGrant,
    Problem,
)
from conserve_sdk.testing import InMemoryBroker
from conserve_sdk.tokens import read_unverified
from tests.broker.desk_client import MIGRATING, TTL_MS, Client, problem, turn


@pytest.fixture
def broker() -> InMemoryBroker:
    return InMemoryBroker(settings=MIGRATING)


@pytest.fixture
def client(broker: InMemoryBroker) -> Client:
    return Client(broker)


# ---- reports and renewals --------------------------------------------------------------------------------------------


def test_a_turn_makes_the_ledger_exact_and_renews(client: Client, broker: InMemoryBroker) -> None:
    grant = client.grant()
    broker.clock.advance(30_000)
    started = client.report({"kind": "turn_started", "token": grant.token, "input_tokens": 4_000})
    assert [(status.verdict, status.expires_in_ms) for status in started] == [("ok", TTL_MS)]
    [status] = client.report(turn(grant, migrated=True, prefill_engine_id="p0", prefill_ms=400, prompt_bytes=16_000))
    assert (status.verdict, status.lease_id) == ("ok", grant.lease_id)
    [lease] = broker.core.leases()
    assert (lease.ledger_tokens, lease.turns, lease.migrations) == (4_096, 1, 1)
    assert client.engine("d0").kv_leased_tokens == 4_096
    fleet = FleetInfo.model_validate_json(client.http.get("/v1/fleet").content)
    assert (fleet.migrations_total, fleet.grants_total, fleet.leases, fleet.preset) == (1, 1, 1, "paper")


def test_one_bad_token_spoils_nothing_else(client: Client) -> None:
    grant, other = client.grant("a"), client.grant("b")
    client.release(other)
    forged = grant.token[:-3] + "abc"
    statuses = client.renew(forged, grant.token, "nonsense", other.token)
    assert [status.verdict for status in statuses] == ["bad_token", "ok", "bad_token", "unknown"]
    assert [status.lease_id for status in statuses] == [grant.lease_id, grant.lease_id, "", other.lease_id]


def test_an_engine_failure_counts_for_the_engines_of_the_lease_only(client: Client) -> None:
    grant = client.grant()
    report = {"kind": "engine_failure", "token": grant.token, "incarnation": "d0#0", "phase": "decode"}
    [status] = client.report({**report, "engine_id": "d0", "detail": "connection refused"})
    assert status.verdict == "ok"
    assert client.engine("d0").state == "suspect"
    assert "decode: connection refused" in client.engine("d0").detail
    [status] = client.report({**report, "engine_id": "d1", "incarnation": "d1#0"})
    assert status.verdict == "bad_token"
    assert client.engine("d1").state == "ready"


def test_an_old_incarnations_failure_is_history(client: Client, broker: InMemoryBroker) -> None:
    grant = client.grant()
    broker.restart_engine("p0")
    report = {"kind": "engine_failure", "token": grant.token, "engine_id": "p0", "phase": "prefill"}
    [status] = client.report({**report, "incarnation": "p0#0"})
    assert status.verdict == "ok"
    assert client.engine("p0").state == "ready"


def test_prefill_times_of_engines_outside_the_lease_teach_nothing(client: Client) -> None:
    grant = client.grant()
    before = client.engine("d1").prefill_rate_tokens_per_s
    client.report(turn(grant, prefill_engine_id="d1", prefill_ms=1))
    assert client.engine("d1").prefill_rate_tokens_per_s == before
    client.report(turn(grant, prefill_engine_id="p0", prefill_ms=100))
    assert client.engine("p0").prefill_rate_tokens_per_s == 40_000


def test_a_restarted_decoder_loses_its_leases(client: Client, broker: InMemoryBroker) -> None:
    grant = client.grant()
    broker.restart_engine("d0")
    assert [status.verdict for status in client.renew(grant.token)] == ["engine_lost"]
    fresh = LeaseGrant.model_validate_json(client.supersede(grant).content)
    assert (fresh.epoch, fresh.supersedes) == (2, grant.lease_id)
    assert [status.verdict for status in client.renew(grant.token, fresh.token)] == ["engine_lost", "ok"]


# ---- park and release ------------------------------------------------------------------------------------------------


def test_park_shortens_the_life(client: Client, broker: InMemoryBroker) -> None:
    grant = client.grant()
    status = client.park(grant)
    assert (status.verdict, status.expires_in_ms) == ("ok", 10_000)
    broker.clock.advance(9_999)
    assert broker.core.lease_count() == 1
    broker.clock.advance(1)
    assert broker.core.lease_count() == 0
    assert client.park(grant).verdict == "unknown"


def test_release_is_idempotent_and_final(client: Client, broker: InMemoryBroker) -> None:
    grant = client.grant()
    assert [client.release(grant).status_code for _ in range(2)] == [204, 204]
    assert client.release(grant).content == b""
    assert broker.core.lease_count() == 0
    assert client.engine("d0").kv_leased_tokens == 0
    assert [status.verdict for status in client.renew(grant.token)] == ["unknown"]
    assert problem(client.http.delete(f"/v1/leases/{grant.lease_id}")).code == "bad_token"


# ---- the life of tokens ----------------------------------------------------------------------------------------------


def test_a_token_outlives_the_lease_it_stands_for(client: Client, broker: InMemoryBroker) -> None:
    """Whoever renews at a third of the TTL and takes fresh tokens as they come never holds one that is over."""
    token = client.grant().token
    tokens = {token}
    for _ in range(60):
        broker.clock.advance(TTL_MS // 3)
        [status] = client.renew(token)
        assert status.verdict == "ok"
        token = status.token or token
        tokens.add(token)
        assert read_unverified(token).exp_ms >= broker.clock.now_ms() + status.expires_in_ms
    assert 10 <= len(tokens) <= 25, "fresh ones are given out when due, not every time"


def test_a_fresh_token_follows_what_a_readoption_would_need(client: Client) -> None:
    grant = client.grant()
    assert client.renew(grant.token)[0].token is None
    [moved] = client.report(turn(grant, migrated=True))
    assert moved.token is not None
    assert read_unverified(moved.token).migrations == 1
    held = grant.model_copy(update={"token": moved.token})
    assert client.report(turn(held, prompt_tokens=4_100))[0].token is None, "a little growth is not worth a token"
    [grown] = client.report(turn(held, prompt_tokens=9_000))
    assert grown.token is not None
    assert read_unverified(grown.token).ledger_tokens == 9_096


def test_the_lease_ends_exactly_at_its_ttl(client: Client, broker: InMemoryBroker) -> None:
    grant = client.grant()
    broker.clock.advance(TTL_MS - 1)
    assert broker.core.lease_count() == 1
    broker.clock.advance(1)
    assert broker.core.lease_count() == 0
    assert [status.verdict for status in client.renew(grant.token)] == ["unknown"], "no resurrection"


def test_another_tenants_token_counts_nothing(broker: InMemoryBroker, client: Client) -> None:
    grant = client.grant()
    route, target = find_route("POST", f"/v1/leases/{grant.lease_id}/park")
    call = Call(
        now_ms=broker.clock.now_ms(),
        tenant=TenantId("somebody else"),
        target=target,
        raw=b'{"token": "%s"}' % grant.token.encode(),
    )
    reply = broker._desk.handle(route, call).reply
    assert isinstance(reply, Reply)
    assert isinstance(reply.body, Problem)
    assert (reply.status, reply.body.code) == (401, "bad_token")


# ---- a broker that lost its state ------------------------------------------------------------------------------------


def test_renewals_bring_leases_back(client: Client, broker: InMemoryBroker) -> None:
    grant = client.grant()
    [status] = client.report(turn(grant, migrated=True))
    assert status.token is not None
    before = client.engine("d0").kv_leased_tokens
    broker.restart(lose_state=True)
    assert client.engine("d0").kv_leased_tokens == 0
    [status] = client.renew(status.token)
    assert (status.verdict, status.lease_id) == ("ok", grant.lease_id)
    assert client.engine("d0").kv_leased_tokens == before == 4_096
    [lease] = broker.core.leases()
    assert (lease.epoch, lease.migrations, lease.receipt.rule) == (1, 1, "readopted")
    assert broker.core.counters.readopted == 1
    assert client.grant().lease_id == grant.lease_id, "the key is taken again"


def test_a_batch_renews_who_is_known_and_brings_back_who_is_not(client: Client, broker: InMemoryBroker) -> None:
    lost, other = client.grant("lost", first_turn_input_tokens=100), client.grant("other", first_turn_input_tokens=100)
    broker.restart(lose_state=True)
    known, ended = client.grant("known", first_turn_input_tokens=100), client.grant("e", first_turn_input_tokens=100)
    client.release(ended)
    broker.clock.advance(20_000)
    batch = (lost, known, ended, other, known, lost)
    statuses = client.renew(*(grant.token for grant in batch))
    assert [status.lease_id for status in statuses] == [grant.lease_id for grant in batch]
    assert [status.verdict for status in statuses] == ["ok", "ok", "unknown", "ok", "ok", "ok"]
    assert {status.expires_in_ms for status in statuses if status.verdict == "ok"} == {TTL_MS}
    assert {lease.lease_id for lease in broker.core.leases()} == {lost.lease_id, known.lease_id, other.lease_id}
    assert broker.core.counters.readopted == 2


@pytest.mark.parametrize("word", ["report", "park", "supersede", "release"])
def test_any_word_of_a_holder_will_do(client: Client, broker: InMemoryBroker, word: str) -> None:
    grant = client.grant()
    broker.restart(lose_state=True)
    match word:
        case "report":
            assert client.report(turn(grant))[0].verdict == "ok"
            assert broker.core.lease_count() == 1
        case "park":
            assert client.park(grant).verdict == "ok"
        case "supersede":
            assert LeaseGrant.model_validate_json(client.supersede(grant).content).epoch == 2
        case _:
            assert client.release(grant).status_code == 204
            assert client.renew(grant.token)[0].verdict == "unknown", "released here, so it stays released"


def test_nothing_is_readopted_after_its_token_ended(client: Client, broker: InMemoryBroker) -> None:
    grant = client.grant()
    broker.stop()
    broker.clock.advance(2 * TTL_MS - 1)
    broker.start(lose_state=True)
    assert client.renew(grant.token)[0].verdict == "ok", "the last instant to which a renewal may have carried it"
    broker.stop()
    broker.clock.advance(1)
    broker.start(lose_state=True)
    assert client.renew(grant.token)[0].verdict == "unknown"
    assert problem(client.read(grant.lease_id, grant.token)).code == "lease_unknown"
    assert problem(client.supersede(grant)).code == "lease_unknown"


def test_nothing_is_readopted_onto_another_incarnation(client: Client, broker: InMemoryBroker) -> None:
    grant = client.grant()
    broker.stop()
    broker.restart_engine("d0")
    broker.start(lose_state=True)
    assert client.renew(grant.token)[0].verdict == "engine_lost"


def test_after_an_outage_longer_than_tokens_live_the_journal_still_counts(
    client: Client, broker: InMemoryBroker
) -> None:
    grant = client.grant()
    broker.stop()
    with pytest.raises(httpx2.ConnectError):
        client.renew(grant.token)
    broker.clock.advance(10 * TTL_MS)
    broker.start()
    [status] = client.renew(grant.token)
    assert status.verdict == "ok", "recovered from the journal, inside the grace"
    assert status.token is not None, "and no longer dependent on a token that is over"
    assert client.renew(status.token)[0].verdict == "ok"
