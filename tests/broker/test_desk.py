"""The broker's protocol, route by route, on the real core and desk under a fake clock."""

from typing import Any

import pytest

from conserve_sdk._desk import ROUTES, find_route
from conserve_sdk.core import BrokerSettings
from conserve_sdk.protocol import (
    BODY_BYTES_MAX,
    EngineInfo,
    EngineList,
    LeaseExplanation,
    LeaseGrant,
)
from conserve_sdk.testing import FakeClock, InMemoryBroker, small_fleet
from conserve_sdk.tokens import read_unverified
from tests.broker.desk_client import MIGRATING, TTL_MS, Client, problem, turn


@pytest.fixture
def broker() -> InMemoryBroker:
    return InMemoryBroker(settings=MIGRATING)


@pytest.fixture
def client(broker: InMemoryBroker) -> Client:
    return Client(broker)


# ---- grants ----------------------------------------------------------------------------------------------------------


def test_a_grant_tells_everything_a_client_needs(client: Client) -> None:
    response = client.ask()
    grant = LeaseGrant.model_validate_json(response.content)
    assert response.status_code == 201
    assert grant.mode == "migrate"
    assert grant.prefiller is not None
    assert (grant.prefiller.engine_id, grant.prefiller.url) == ("p0", "http://p0.invalid")
    assert (grant.decoder.engine_id, grant.decoder.incarnation) == ("d0", "d0#0")
    assert (grant.ttl_ms, grant.expires_in_ms, grant.renew_after_ms) == (TTL_MS, TTL_MS, TTL_MS // 3)
    assert (grant.epoch, grant.supersedes, grant.reused, grant.tenant) == (1, None, False, "default")
    assert grant.decision.preset == "paper"
    assert (grant.decision.rule, grant.decision.prefill_rule) == ("most_free_kv", "always_prefiller")
    assert (grant.decision.need_tokens, grant.decision.candidates) == (4_000, ())
    claims = read_unverified(grant.token)
    assert (claims.lease_id, claims.epoch, claims.ledger_tokens) == (grant.lease_id, 1, 4_000)


def test_the_same_key_gets_the_same_lease(client: Client) -> None:
    first = client.grant()
    again = client.ask()
    assert again.status_code == 200
    same = LeaseGrant.model_validate_json(again.content)
    assert (same.lease_id, same.reused) == (first.lease_id, True)
    assert client.grant(lineage="other").lease_id != first.lease_id


def test_the_hinted_decoder_wins_where_loads_are_alike() -> None:
    client = Client(InMemoryBroker())
    assert client.grant(hint_engine_id="d1").decoder.engine_id == "d1"


@pytest.mark.parametrize(
    ("changes", "status", "code", "retry"),
    [
        ({"model": "nobody"}, 404, "unknown_model", False),
        ({"first_turn_input_tokens": 99_000}, 422, "prompt_too_long", False),
    ],
)
def test_hopeless_requests_are_refused_at_once(
    client: Client, changes: dict[str, Any], status: int, code: str, *, retry: bool
) -> None:
    response = client.ask(wait_ms=10_000, **changes)
    found = problem(response)
    assert (found.status, found.code) == (status, code)
    assert ("retry-after" in response.headers) is retry
    assert found.retry_after_ms is None


def test_a_full_fleet_refuses_with_receipt_and_when_to_retry(client: Client) -> None:
    for number in range(6):
        client.grant(f"big-{number}", first_turn_input_tokens=32_000)
    response = client.ask("one-too-many", first_turn_input_tokens=32_000)
    found = problem(response)
    assert (found.status, found.code) == (503, "no_capacity")
    assert found.retry_after_ms == 1_000
    assert response.headers["retry-after"] == "1"
    assert found.decision is not None
    assert {candidate.verdict for candidate in found.decision.candidates} & {"over_watermark"}


def test_no_ready_engine() -> None:
    broker = InMemoryBroker(small_fleet(prefillers=0, decoders=1))
    broker.fail_engine("d0")
    broker.clock.advance(5_000)
    assert problem(Client(broker).ask()).code == "no_ready_engine"


def test_bounds_on_leases_and_queue() -> None:
    client = Client(InMemoryBroker(settings=BrokerSettings(leases_max=1, queue_max=0)))
    client.grant("a")
    found = problem(client.ask("b"))
    assert (found.status, found.code) == (429, "too_many_leases")
    full = Client(InMemoryBroker(small_fleet(decoders=1), settings=BrokerSettings(queue_max=0)))
    for number in range(2):
        full.grant(f"big-{number}", first_turn_input_tokens=32_000)
    full.grant("middle", first_turn_input_tokens=20_000)
    found = problem(full.ask("waits", first_turn_input_tokens=32_000, wait_ms=1_000))
    assert (found.status, found.code) == (429, "queue_full")


# ---- reading ---------------------------------------------------------------------------------------------------------


def test_the_holder_reads_its_lease(client: Client, broker: InMemoryBroker) -> None:
    grant = client.grant()
    broker.clock.advance(1_000)
    read = LeaseGrant.model_validate_json(client.read(grant.lease_id, grant.token).content)
    assert read.expires_in_ms == TTL_MS - 1_000, "reading extends nothing"
    assert read.token == grant.token
    client.report(turn(grant, migrated=True))
    fresh = LeaseGrant.model_validate_json(client.read(grant.lease_id, grant.token).content)
    assert (fresh.migrations, fresh.turns) == (1, 1)
    assert read_unverified(fresh.token).migrations == 1


def test_nobody_else_reads_it(client: Client) -> None:
    grant, other = client.grant("a"), client.grant("b")
    bare = client.http.get(f"/v1/leases/{grant.lease_id}")
    assert problem(bare).code == "bad_token"
    assert bare.headers["www-authenticate"] == "Lease"
    bearer = client.http.get(f"/v1/leases/{grant.lease_id}", headers={"authorization": f"Bearer {grant.token}"})
    assert bearer.status_code == 401
    assert problem(client.read(grant.lease_id, other.token)).code == "bad_token"
    assert problem(client.read(grant.lease_id, grant.token[:-2])).code == "bad_token"


def test_a_lease_that_is_gone_says_how(client: Client, broker: InMemoryBroker) -> None:
    grant = client.grant()
    successor = LeaseGrant.model_validate_json(client.supersede(grant).content)
    found = problem(client.read(grant.lease_id, grant.token))
    assert (found.status, found.code) == (409, "lease_superseded")
    assert successor.lease_id in found.detail
    client.release(successor)
    assert problem(client.read(successor.lease_id, successor.token)).code == "lease_unknown"


def test_explain_shows_the_receipt_and_the_present_but_no_token(client: Client, broker: InMemoryBroker) -> None:
    grant = client.grant()
    broker.clock.advance(2_000)
    client.report(turn(grant))
    response = client.http.get(f"/v1/leases/{grant.lease_id}/explain")
    found = LeaseExplanation.model_validate_json(response.content)
    assert "token" not in response.json()
    assert grant.token not in response.text
    assert {candidate.engine_id for candidate in found.decision.candidates} == {"d0", "d1", "p0"}
    assert found.decision.model_copy(update={"candidates": ()}) == grant.decision
    assert (found.ledger_tokens, found.turns, found.activity) == (4_096, 1, "idle")
    assert (found.granted_ago_ms, found.expires_in_ms) == (2_000, TTL_MS)
    assert found.decoder_now is not None
    assert found.decoder_now.kv_leased_tokens == 4_096
    assert found.prefiller_now is not None
    assert problem(client.http.get("/v1/leases/nobody/explain")).code == "lease_unknown"


# ---- supersede -------------------------------------------------------------------------------------------------------


def test_ten_failures_make_one_new_lease(client: Client) -> None:
    grant = client.grant()
    answers = [client.supersede(grant, failed_engine_id="d0") for _ in range(10)]
    assert [answer.status_code for answer in answers] == [201] + [200] * 9
    new = {LeaseGrant.model_validate_json(answer.content).lease_id for answer in answers}
    assert len(new) == 1
    first = LeaseGrant.model_validate_json(answers[0].content)
    assert (first.epoch, first.supersedes, first.decoder.engine_id) == (2, grant.lease_id, "d1")


def test_a_transfer_that_is_reported_after_the_successor_counts(client: Client) -> None:
    grant = client.grant()
    assert client.supersede(grant).is_success
    for _ in range(2):
        [status] = client.report(turn(grant, migrated=True))
        assert status.verdict == "superseded"
    assert client.http.get("/v1/fleet").json()["migrations_total"] == 1


def test_supersede_checks_token_and_epoch(client: Client) -> None:
    grant, other = client.grant("a"), client.grant("b")
    assert problem(client.supersede(grant, token=other.token)).code == "bad_token"
    assert problem(client.supersede(grant, token="x.y.z")).code == "bad_token"
    found = problem(client.supersede(grant, epoch=2))
    assert (found.status, found.code) == (422, "bad_request")
    assert "epoch" in found.detail


# ---- engines ---------------------------------------------------------------------------------------------------------


def test_draining_keeps_leases_and_gives_no_new_one(client: Client) -> None:
    grant = client.grant()
    drained = EngineInfo.model_validate_json(client.http.post("/v1/engines/d0/drain").content)
    assert (drained.state, drained.draining, drained.leases) == ("draining", True, 1)
    assert client.grant("b").decoder.engine_id == "d1"
    assert client.renew(grant.token)[0].verdict == "ok"
    assert EngineInfo.model_validate_json(client.http.post("/v1/engines/d0/undrain").content).state == "ready"


def test_engines_are_listed_by_id(client: Client) -> None:
    listed = EngineList.model_validate_json(client.http.get("/v1/engines").content)
    assert [engine.engine_id for engine in listed.engines] == ["d0", "d1", "p0"]
    assert client.engine("d0").observed_ago_ms == 0
    found = problem(client.http.post("/v1/engines/dx/drain"))
    assert (found.status, found.code) == (404, "engine_unknown")
    assert "d0, d1, p0" in found.detail


# ---- bad input -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "status", "names"),
    [
        (b"", 400, "not JSON"),
        (b"{", 400, "not JSON"),
        (b"[]", 422, "body"),
        (b"{}", 422, "conversation_id"),
        (b'{"conversation_id": "a b", "lineage": "m", "model": "m"}', 422, "conversation_id"),
        (b'{"conversation_id": "a", "lineage": "m", "model": "m", "wait_ms": -1}', 422, "wait_ms"),
        (b'{"conversation_id": "\xff", "lineage": "m", "model": "m"}', 400, "not JSON"),
    ],
)
def test_bad_bodies_are_named(client: Client, content: bytes, status: int, names: str) -> None:
    found = problem(client.http.post("/v1/leases", content=content))
    assert (found.status, found.code) == (status, "bad_request")
    assert names in found.detail


def test_many_faults_are_counted_not_listed(client: Client) -> None:
    found = problem(client.http.post("/v1/reports", json={"reports": [{"kind": "turn_started"}] * 9}))
    assert found.detail.count("Field required") == 3
    assert " more)" in found.detail


@pytest.mark.parametrize("path", ["/v1/reports", "/v1/renewals"])
def test_batches_have_bounds(client: Client, path: str) -> None:
    name = "reports" if path.endswith("reports") else "tokens"
    entry: Any = {"kind": "turn_started", "token": "t"} if name == "reports" else "t"
    assert client.http.post(path, json={name: [entry] * 500}).status_code == 200
    assert problem(client.http.post(path, json={name: [entry] * 501})).code == "bad_request"
    assert problem(client.http.post(path, json={name: []})).code == "bad_request"


def test_a_body_beyond_the_bound_is_refused(client: Client) -> None:
    found = problem(client.http.post("/v1/renewals", content=b" " * (BODY_BYTES_MAX + 1)))
    assert (found.status, found.code) == (413, "body_too_large")


def test_a_full_batch_of_the_longest_tokens_is_within_the_bound(client: Client) -> None:
    report = {"kind": "turn_finished", "token": "t" * 4_096, "error": "e" * 200, "tool_names": ["n" * 20] * 20}
    assert [status.verdict for status in client.report(*[report] * 500)] == ["bad_token"] * 500


def test_unknown_paths_and_methods(client: Client) -> None:
    assert problem(client.http.get("/v1/nothing")).code == "not_found"
    assert problem(client.http.get("/v1/leases//explain")).code == "not_found"
    found = problem(client.http.put("/v1/leases/x"))
    assert (found.status, found.code) == (405, "method_not_allowed")
    assert "GET, DELETE" in found.detail


def test_ids_may_hold_what_a_path_must_quote(client: Client) -> None:
    route, target = find_route("GET", "/v1/engines/a%2Fb%20c")
    assert (route.name, target) == ("read_engine", "a/b c")


def test_route_names_are_unique() -> None:
    assert len({route.name for route in ROUTES}) == len(ROUTES)
    assert len({(route.method, route.path) for route in ROUTES}) == len(ROUTES)


def test_the_clock_is_the_brokers_only_time() -> None:
    clock = FakeClock(5_000)
    broker = InMemoryBroker(clock=clock)
    Client(broker).grant()
    assert next(broker.core.leases()).granted_at_ms == 5_000
