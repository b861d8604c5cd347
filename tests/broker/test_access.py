"""API keys: who may ask what, whose leases they see, what the answers say, and how fast they may ask."""

import json
from collections.abc import AsyncIterator
from datetime import timedelta
from typing import Any

import pytest

from conserve_broker._access_tables import AccessTable, ApiKeyTable
from conserve_broker.api_keys import digest_of, id_in, new_key
from conserve_broker.rate_limit import TokenBucket
from conserve_broker.service import BrokerService
from conserve_sdk._desk import ROUTES
from conserve_sdk.core import PAPER, BrokerSettings, TenantId, TenantQuota, Tokens
from conserve_sdk.protocol import LeaseGrant

from .in_process import BODY, problem, running_service
from .keyed import ADMIN, BLUE, EVERYBODY, RED, Clock, House


@pytest.fixture
def clock() -> Clock:
    return Clock()


@pytest.fixture
async def service() -> AsyncIterator[BrokerService]:
    async with running_service(BrokerSettings(placement=PAPER)) as service:
        yield service


@pytest.fixture
async def house(service: BrokerService, clock: Clock) -> House:
    return House(service, clock, *EVERYBODY)


# ---- keys -------------------------------------------------------------------------------------------------------


def test_a_key_names_its_entry_and_is_kept_as_a_digest() -> None:
    key = new_key(tenant="red", scopes=("agent", "admin"))
    assert id_in(key.text) == key.table.id
    assert key.table.sha256 == digest_of(key.text)
    secret = key.text.rpartition(".")[2]
    assert len(secret) == 43, "256 bits"
    for shown in (repr(key), str(key.table), key.toml(), key.table.model_dump_json()):
        assert secret not in shown
    assert ApiKeyTable.model_validate(key.table.model_dump()) == key.table


@pytest.mark.parametrize("text", ["", "csk", "csk.", "csk.a", "csk.a.", "other.a.b", "csk." + "a" * 300 + ".b"])
def test_what_is_no_key_names_none(text: str) -> None:
    assert id_in(text) == ""


# ---- who may what -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("route", ROUTES, ids=lambda route: route.name)
async def test_every_route_wants_a_key_of_the_right_scope(house: House, route: Any) -> None:
    path = route.path.replace("{lease_id}", "x").replace("{engine_id}", "d0")
    missing = await house.ask(route.method, path, None)
    assert (missing.status_code, problem(missing).code) == (401, "key_missing")
    assert missing.headers["www-authenticate"] == 'Bearer realm="conserve"'
    for key in EVERYBODY:
        answer = await house.ask(route.method, path, key, {})
        allowed = {*route.scopes, "admin"}.intersection(key.table.scopes)
        assert (answer.status_code == 403) is not bool(allowed)
        if not allowed:
            assert problem(answer).code == "scope_missing"
            assert 'error="insufficient_scope"' in answer.headers["www-authenticate"]


def test_agents_cannot_drain_and_workers_see_no_lease() -> None:
    scopes = {route.name: set(route.scopes) for route in ROUTES}
    assert scopes["drain_engine"] == scopes["undrain_engine"] == scopes["read_advice"] == set()
    seen_by_workers = {name for name, allowed in scopes.items() if "worker" in allowed}
    assert seen_by_workers == {"list_engines", "read_engine"}


@pytest.mark.parametrize(
    "sent",
    [
        "Bearer csk.red-1.wrong",
        f"Bearer {RED.text}x",
        f"Bearer {RED.text[:-1]}",
        "Bearer csk.nobody." + "a" * 43,
        "Bearer " + "a" * 100_000,
        "Bearer é\x00ß",
        f"Bearer {RED.table.sha256}",
    ],
    ids=["guessed", "longer", "shorter", "nobody", "huge", "no_text", "hash"],
)
async def test_a_wrong_key_is_unknown_whatever_is_wrong_with_it(house: House, sent: str) -> None:
    answer = await house.http.get("/v1/fleet", headers={"authorization": sent.encode("latin-1")})
    found = problem(answer)
    assert (answer.status_code, found.code) == (401, "key_unknown")
    assert 'error="invalid_token"' in answer.headers["www-authenticate"]
    assert sent.removeprefix("Bearer ") not in answer.text


@pytest.mark.parametrize(
    "sent",
    ["", "Basic abc", "Bearer", "Bearer  ", f"Lease {RED.text}"],
    ids=["none", "basic", "bare", "blank", "lease"],
)
async def test_another_scheme_is_no_key(house: House, sent: str) -> None:
    assert problem(await house.ask("GET", "/v1/fleet", sent)).code == "key_missing"


async def test_the_end_of_a_key(service: BrokerService, clock: Clock) -> None:
    key = new_key(tenant="red", scopes=("agent",), expires_at=clock.date + timedelta(days=1))
    house = House(service, clock, key)
    assert (await house.ask("GET", "/v1/fleet", key)).status_code == 200
    clock.date += timedelta(days=1)
    answer = await house.ask("GET", "/v1/fleet", key)
    assert (answer.status_code, problem(answer).code) == (401, "key_expired")


async def test_keys_are_rotated_without_a_gap(house: House) -> None:
    new = new_key(tenant="red", scopes=("agent",), key_id="red-2")
    lease = await house.grant(RED)
    house.gate.replace([RED.table, new.table], access=AccessTable())
    for key in (RED, new):
        again = await house.ask("GET", f"/v1/leases/{lease.lease_id}", key, lease=lease.token)
        assert again.status_code == 200, "both keys are the tenant's"
    house.gate.replace([new.table], access=AccessTable())
    assert problem(await house.ask("GET", "/v1/fleet", RED)).code == "key_unknown"
    renewed = await house.ask("POST", "/v1/renewals", new, {"tokens": [lease.token]})
    assert renewed.json()["results"][0]["verdict"] == "ok"


async def test_an_emptied_table_refuses_everybody_and_never_opens(house: House) -> None:
    house.gate.replace([], access=AccessTable())
    assert problem(await house.ask("GET", "/v1/fleet", ADMIN)).code == "key_unknown"
    assert (await house.http.get("/readyz")).json()["access"] == "keys"


async def test_keys_close_an_open_broker_while_it_runs(service: BrokerService, clock: Clock) -> None:
    house = House(service, clock)
    assert (await house.ask("GET", "/v1/fleet", None)).status_code == 200
    assert (await house.http.get("/readyz")).json()["access"] == "open"
    house.gate.replace([RED.table], access=AccessTable())
    assert (await house.ask("GET", "/v1/fleet", None)).status_code == 401
    assert (await house.ask("GET", "/v1/fleet", RED)).status_code == 200


async def test_probes_and_the_document_are_open_and_metrics_as_configured(
    house: House, service: BrokerService, clock: Clock
) -> None:
    for path in ("/healthz", "/readyz", "/openapi.json", "/metrics"):
        assert (await house.http.get(path)).status_code == 200
    strict = House(service, clock, *EVERYBODY, metrics="admin")
    assert (await strict.http.get("/metrics")).status_code == 401
    assert (await strict.ask("GET", "/metrics", RED)).status_code == 403
    page = await strict.ask("GET", "/metrics", ADMIN)
    assert 'conserve_api_key_requests_total{key_id="ops-1"} 1.0' in page.text
    assert 'conserve_requests_denied_total{code="key_missing"} 1.0' in page.text
    assert 'conserve_requests_denied_total{code="scope_missing"} 1.0' in page.text


# ---- tenants ----------------------------------------------------------------------------------------------------


async def test_the_tenant_comes_from_the_key_and_not_from_the_body(house: House) -> None:
    answer = await house.ask("POST", "/v1/leases", RED, {**BODY, "tenant": "blue"})
    assert answer.json()["tenant"] == "red"
    assert (await house.grant(BLUE)).lease_id != answer.json()["lease_id"], (
        "the same conversation of two tenants is two"
    )


async def test_one_tenant_cannot_touch_or_see_the_leases_of_another(house: House, service: BrokerService) -> None:
    lease = await house.grant(RED)
    path, token = f"/v1/leases/{lease.lease_id}", lease.token
    supersede = {"token": token, "epoch": 1, "reason": "theft"}
    for method, where, body, header in (
        ("GET", path, None, token),
        ("DELETE", path, None, token),
        ("POST", f"{path}/park", {"token": token}, ""),
        ("POST", f"{path}/supersede", supersede, ""),
    ):
        answer = await house.ask(method, where, BLUE, body, lease=header)
        assert (answer.status_code, problem(answer).code) == (401, "bad_token"), (method, where)
    assert problem(await house.ask("GET", f"{path}/explain", BLUE)).code == "lease_unknown"
    report = {"kind": "turn_finished", "token": token, "prompt_tokens": 99_999}
    failure = {"kind": "engine_failure", "token": token, "engine_id": "d0", "incarnation": "one", "phase": "decode"}
    reported = await house.ask("POST", "/v1/reports", BLUE, {"reports": [report, failure]})
    renewed = await house.ask("POST", "/v1/renewals", BLUE, {"tokens": [token]})
    verdicts = [result["verdict"] for answer in (reported, renewed) for result in answer.json()["results"]]
    assert verdicts == ["bad_token"] * 3
    kept = service.core.lease(lease.lease_id)
    assert kept is not None
    assert (kept.ledger_tokens, kept.turns, kept.epoch) == (4_000, 0, 1), "nothing of it had any effect"
    stolen_parent = {**BODY, "conversation_id": "d", "parent_lease_id": lease.lease_id}
    own = LeaseGrant.model_validate_json((await house.ask("POST", "/v1/leases", BLUE, stolen_parent)).content)
    assert own.tenant == "blue"
    assert lease.lease_id not in own.model_dump_json()


async def test_a_token_alone_opens_nothing_where_keys_are_demanded(house: House) -> None:
    lease = await house.grant(RED)
    path = f"/v1/leases/{lease.lease_id}"
    assert (await house.http.get(path, headers={"x-conserve-lease": lease.token})).status_code == 401
    assert (await house.http.get(path, headers={"authorization": f"Lease {lease.token}"})).status_code == 401
    assert problem(await house.ask("GET", path, RED)).code == "bad_token", "and a key alone opens no lease"
    assert (await house.ask("DELETE", path, RED, lease=lease.token)).status_code == 204


async def test_admins_explain_leases_of_everybody(house: House) -> None:
    lease = await house.grant(RED)
    for key in (RED, ADMIN):
        assert (await house.ask("GET", f"/v1/leases/{lease.lease_id}/explain", key)).json()["tenant"] == "red"


# ---- rates ------------------------------------------------------------------------------------------------------


def test_a_bucket_lets_a_burst_through_and_then_its_rate() -> None:
    bucket = TokenBucket(rate_per_s=2.0, burst=3, now_s=0.0)
    assert [bucket.take(0.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5]
    assert bucket.take(0.4) == pytest.approx(0.1)
    assert bucket.take(0.5) == 0.0
    assert [bucket.take(1_000.0) for _ in range(4)] == [0.0, 0.0, 0.0, 0.5], "it holds no more than its burst"


async def test_a_key_above_its_rate_is_told_when_to_come_back(service: BrokerService, clock: Clock) -> None:
    house = House(service, clock, RED, BLUE, requests_per_s=0.5, burst=2)
    assert [(await house.ask("GET", "/v1/fleet", RED)).status_code for _ in range(2)] == [200, 200]
    slow = await house.ask("GET", "/v1/fleet", RED)
    found = problem(slow)
    assert (slow.status_code, found.code, found.retry_after_ms, slow.headers["retry-after"]) == (
        429,
        "rate_limited",
        2_000,
        "2",
    )
    assert (await house.ask("GET", "/v1/fleet", BLUE)).status_code == 200, "each key has its own rate"
    clock.now_s += 2.0
    assert (await house.ask("GET", "/v1/fleet", RED)).status_code == 200


async def test_a_key_has_a_rate_of_its_own_and_a_reload_keeps_its_level(service: BrokerService, clock: Clock) -> None:
    fast = RED.table.model_copy(update={"requests_per_s": 1.0, "burst": 1})
    house = House(service, clock, RED)
    house.gate.replace([fast], access=AccessTable())
    assert (await house.ask("GET", "/v1/fleet", RED)).status_code == 200
    house.gate.replace([fast, BLUE.table], access=AccessTable(requests_per_s=9.0))
    assert (await house.ask("GET", "/v1/fleet", RED)).status_code == 429
    house.gate.replace([RED.table], access=AccessTable())
    assert (await house.ask("GET", "/v1/fleet", RED)).status_code == 200, "a limit that was lifted is gone"


async def test_what_is_denied_is_logged_once_a_second_and_shows_no_secret(
    house: House, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    with caplog.at_level("DEBUG", logger="conserve.broker"):
        for _ in range(50):
            await house.ask("GET", "/v1/fleet", f"{'Bearer'} csk.red-1.stolen-secret")
        clock.now_s += 1.5
        await house.ask("POST", "/v1/engines/d0/drain", RED)
    lines = [record.getMessage() for record in caplog.records if "access_denied" in record.getMessage()]
    assert len(lines) == 2
    assert "'key_unknown': 49" in lines[1]
    assert "stolen-secret" not in json.dumps(lines)
    assert RED.text not in json.dumps(lines)


async def test_a_tenant_at_its_quota_is_told_when_to_come_back_and_holds_up_nobody(clock: Clock) -> None:
    quota = TenantQuota(leases_max=1, leased_tokens_max=Tokens(5_000))
    settings = BrokerSettings(placement=PAPER, tenant_quotas={TenantId("red"): quota})
    async with running_service(settings) as bounded:
        house = House(bounded, clock, RED, BLUE)
        large = await house.ask("POST", "/v1/leases", RED, {**BODY, "first_turn_input_tokens": 6_000})
        assert (large.status_code, problem(large).code) == (429, "over_quota")
        assert (await house.ask("POST", "/v1/leases", RED, BODY)).status_code == 201
        more = await house.ask("POST", "/v1/leases", RED, {**BODY, "conversation_id": "d"})
        assert (more.status_code, problem(more).code, more.headers["retry-after"]) == (429, "too_many_leases", "1")
        assert [(await house.grant(BLUE, name)).tenant for name in "cde"] == ["blue"] * 3


# ---- the engines' own keys --------------------------------------------------------------------------------------


def key_of(engine_id: str) -> str:
    return "" if engine_id == "d1" else f"key-of-{engine_id}"


async def test_leases_bring_engine_keys_only_where_the_configuration_says_so(
    service: BrokerService, clock: Clock, caplog: pytest.LogCaptureFixture
) -> None:
    shut = House(service, clock, RED, engine_key=key_of)
    closed = await shut.grant(RED)
    assert closed.prefiller is not None
    assert (closed.decoder.api_key, closed.prefiller.api_key) == (None, None)
    opened = House(service, clock, engine_key=key_of, share_engine_credentials="agent")
    assert (await opened.ask("POST", "/v1/leases", None, BODY)).json()["decoder"]["api_key"] is None
    shared = House(service, clock, RED, ADMIN, engine_key=key_of, share_engine_credentials="agent")
    with caplog.at_level("DEBUG"):
        grants = [await shared.grant(RED, name) for name in ("c", "d", "e")]
        path = f"/v1/leases/{grants[0].lease_id}"
        held = await shared.ask("GET", path, RED, lease=grants[0].token)
        explained = await shared.ask("GET", f"{path}/explain", ADMIN)
        engines = await shared.ask("GET", "/v1/engines", ADMIN)
        page = await shared.http.get("/metrics")
    for grant in (*grants, LeaseGrant.model_validate_json(held.content)):
        assert grant.prefiller is not None
        assert grant.prefiller.api_key == "key-of-p0"
        assert (grant.decoder.api_key or "") == key_of(grant.decoder.engine_id)
    told = [
        caplog.text,
        explained.text,
        engines.text,
        page.text,
        grants[0].token,
        repr(grants),
        repr(service.core.leases()),
    ]
    assert all("key-of-" not in text for text in told)
