"""The HTTP face: every route, every problem of the framework, the document, the probes, the metrics page."""

import asyncio
from collections.abc import AsyncIterator
from dataclasses import replace
from typing import Any

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from conserve_broker.api_keys import new_key
from conserve_broker.app import create_app
from conserve_broker.gate import Gate
from conserve_broker.journal import MemoryJournal
from conserve_broker.metrics import BrokerMetrics
from conserve_broker.service import BrokerService
from conserve_sdk._desk import ROUTES
from conserve_sdk.core import PAPER, BrokerSettings, Tokens
from conserve_sdk.protocol import BODY_BYTES_MAX, EngineInfo, LeaseGrant
from conserve_sdk.testing import small_fleet

from .in_process import BODY, SIGNER, problem, running_service


class Running:
    """A service, its application and a client of it."""

    def __init__(self, service: BrokerService, metrics: BrokerMetrics, **options: Any) -> None:
        self.service = service
        self.app = create_app(service, metrics=metrics, **options)
        transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx2.AsyncClient(transport=transport, base_url="http://broker.test")

    async def metrics(self) -> dict[str, float]:
        page = await self.http.get("/metrics")
        assert page.headers["content-type"].startswith("text/plain")
        samples = [sample for family in text_string_to_metric_families(page.text) for sample in family.samples]
        return {_name(sample.name, sample.labels): sample.value for sample in samples}


def _name(name: str, labels: dict[str, str]) -> str:
    inner = ",".join(f"{key}={value}" for key, value in sorted(labels.items()))
    return f"{name}{{{inner}}}" if inner else name


@pytest.fixture
async def running() -> AsyncIterator[Running]:
    metrics = BrokerMetrics()
    async with running_service(BrokerSettings(placement=PAPER), observer=metrics) as service:
        metrics.watch(service.core, clock=service.clock)
        yield Running(service, metrics)


async def test_a_conversation_from_grant_to_release(running: Running) -> None:
    http = running.http
    response = await http.post("/v1/leases", json=BODY)
    assert (response.status_code, response.headers["content-type"]) == (201, "application/json")
    grant = LeaseGrant.model_validate_json(response.content)
    assert (await http.post("/v1/leases", json=BODY)).status_code == 200
    holder = {"authorization": f"Lease {grant.token}"}
    path = f"/v1/leases/{grant.lease_id}"
    assert (await http.get(path, headers=holder)).json()["lease_id"] == grant.lease_id
    assert (await http.get(f"{path}/explain")).json()["decision"]["preset"] == "paper"
    report = {"kind": "turn_finished", "token": grant.token, "prompt_tokens": 4_000, "migrated": True}
    answer = (await http.post("/v1/reports", json={"reports": [report]})).json()
    assert answer["results"][0]["verdict"] == "ok"
    renewed = (await http.post("/v1/renewals", json={"tokens": [grant.token]})).json()
    assert renewed["results"][0]["verdict"] == "ok"
    parked = await http.post(f"{path}/park", json={"token": grant.token})
    assert parked.json()["verdict"] == "ok"
    new = await http.post(f"{path}/supersede", json={"token": grant.token, "epoch": 1, "reason": "test"})
    successor = LeaseGrant.model_validate_json(new.content)
    assert (new.status_code, successor.epoch) == (201, 2)
    gone = await http.delete(f"/v1/leases/{successor.lease_id}", headers={"authorization": f"Lease {successor.token}"})
    assert (gone.status_code, gone.content, gone.headers.get("content-type")) == (204, b"", None)
    fleet = (await http.get("/v1/fleet")).json()
    assert (fleet["leases"], fleet["grants_total"], fleet["migrations_total"]) == (0, 2, 1)


async def test_engines(running: Running) -> None:
    http = running.http
    assert [one["engine_id"] for one in (await http.get("/v1/engines")).json()["engines"]] == ["d0", "d1", "p0"]
    assert EngineInfo.model_validate_json((await http.get("/v1/engines/d0")).content).state == "ready"
    assert (await http.post("/v1/engines/d0/drain")).json()["state"] == "draining"
    assert (await http.post("/v1/engines/d0/undrain")).json()["state"] == "ready"
    assert problem(await http.post("/v1/engines/nobody/drain")).code == "engine_unknown"


# ---- problems ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("content", "status", "names"), [(b"{", 400, "JSON"), (b"{}", 422, "conversation_id"), (b"[1]", 422, "body")]
)
async def test_bad_bodies(running: Running, content: bytes, status: int, names: str) -> None:
    found = problem(await running.http.post("/v1/leases", content=content))
    assert (found.status, found.code) == (status, "bad_request")
    assert names in found.detail


async def test_unknown_paths_and_methods(running: Running) -> None:
    assert problem(await running.http.get("/nope")).code == "not_found"
    assert problem(await running.http.get("/v1/leases/")).code == "not_found", "no redirects: bodies would get lost"
    wrong = await running.http.put("/v1/leases")
    assert (problem(wrong).code, wrong.headers["allow"]) == ("method_not_allowed", "POST")


async def test_refusals_say_when_to_come_back(running: Running) -> None:
    for engine_id in ("d0", "d1"):
        await running.http.post(f"/v1/engines/{engine_id}/drain")
    response = await running.http.post("/v1/leases", json=BODY)
    found = problem(response)
    assert (found.status, found.code, response.headers["retry-after"]) == (503, "no_ready_engine", "1")
    assert found.decision is not None


async def test_a_body_is_given_up_as_soon_as_it_is_too_long(running: Running) -> None:
    sent = 0

    async def endless() -> AsyncIterator[bytes]:
        nonlocal sent
        for _ in range(1_000):
            sent += 64 * 1024
            yield b" " * 64 * 1024

    response = await running.http.post("/v1/reports", content=endless())
    assert problem(response).code == "body_too_large"
    assert sent <= BODY_BYTES_MAX + 2 * 64 * 1024


async def test_a_client_that_leaves_in_mid_body_gets_nothing(running: Running) -> None:
    messages = iter([{"type": "http.request", "body": b"{", "more_body": True}, {"type": "http.disconnect"}])
    sent = await call(running, "/v1/leases", messages)
    assert sent[0]["status"] == 499
    assert running.service.core.lease_count() == 0


async def test_a_client_that_leaves_while_it_waits_leaves_the_queue(running: Running) -> None:
    for engine_id in ("d0", "d1"):
        await running.http.post(f"/v1/engines/{engine_id}/drain")
    body = b'{"conversation_id": "c", "lineage": "m", "model": "test-model", "wait_ms": 60000}'
    leave = asyncio.Event()

    async def receive() -> dict[str, Any]:
        nonlocal body
        if body:
            content, body = body, b""
            return {"type": "http.request", "body": content, "more_body": False}
        await leave.wait()
        return {"type": "http.disconnect"}

    sent: list[dict[str, Any]] = []
    task = asyncio.create_task(running.app(scope("/v1/leases"), receive, _collect(sent)))
    async with asyncio.timeout(30):
        while running.service.core.waiting() == 0:  # noqa: ASYNC110  # the queue has no event to wait for
            await asyncio.sleep(0.001)
        leave.set()
        await task
    assert running.service.core.waiting() == 0
    assert sent[0]["status"] == 499


async def test_room_that_appears_answers_who_waits(running: Running) -> None:
    for engine_id in ("d0", "d1"):
        await running.http.post(f"/v1/engines/{engine_id}/drain")
    waiting = asyncio.create_task(running.http.post("/v1/leases", json={**BODY, "wait_ms": 60_000}))
    async with asyncio.timeout(30):
        while running.service.core.waiting() == 0:  # noqa: ASYNC110
            await asyncio.sleep(0.001)
        await running.http.post("/v1/engines/d1/undrain")
        response = await waiting
    grant = LeaseGrant.model_validate_json(response.content)
    assert (response.status_code, grant.decoder.engine_id) == (201, "d1")


async def test_a_crash_is_a_problem_too(running: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    async def broken(*_: Any, **__: Any) -> None:
        raise RuntimeError("a fault of ours")

    monkeypatch.setattr(running.service, "handle", broken)
    found = problem(await running.http.get("/v1/fleet"))
    assert (found.status, found.code) == (500, "internal_error")
    assert "a fault of ours" not in found.detail


def scope(path: str) -> dict[str, Any]:
    return {
        "type": "http",
        "asgi": {"version": "3.0"},
        "http_version": "1.1",
        "method": "POST",
        "scheme": "http",
        "path": path,
        "raw_path": path.encode(),
        "query_string": b"",
        "headers": [],
        "client": ("127.0.0.1", 1),
        "server": ("broker.test", 80),
    }


def _collect(sent: list[dict[str, Any]]) -> Any:
    async def send(message: dict[str, Any]) -> None:
        sent.append(message)

    return send


async def call(running: Running, path: str, messages: Any) -> list[dict[str, Any]]:
    async def receive() -> Any:
        return next(messages)

    sent: list[dict[str, Any]] = []
    await running.app(scope(path), receive, _collect(sent))
    return sent


# ---- tenants ----------------------------------------------------------------------------------------------------


async def test_the_tenant_is_decided_in_one_place(running: Running) -> None:
    keys = {name: new_key(tenant=name, scopes=("agent",)) for name in "ab"}
    shared = Running(running.service, BrokerMetrics(), gate=Gate([key.table for key in keys.values()]))
    sent = {name: {"authorization": f"Bearer {key.text}"} for name, key in keys.items()}
    grants = [(await shared.http.post("/v1/leases", json=BODY, headers=sent[name])).json() for name in "ab"]
    assert [grant["tenant"] for grant in grants] == ["a", "b"]
    assert grants[0]["lease_id"] != grants[1]["lease_id"], "the same conversation of two tenants is two"
    headers = {"x-conserve-lease": grants[0]["token"], **sent["b"]}
    stolen = await shared.http.get(f"/v1/leases/{grants[0]['lease_id']}", headers=headers)
    assert problem(stolen).code == "bad_token"


# ---- probes, document, metrics ----------------------------------------------------------------------------------


async def test_probes(running: Running) -> None:
    assert (await running.http.get("/healthz")).json() == {"status": "ok"}
    ready = await running.http.get("/readyz")
    assert (ready.status_code, ready.json()) == (
        200,
        {"ready": True, "role": "alone", "access": "open", "reasons": [], "warnings": []},
    )
    running.service.quiesce()
    late = await running.http.get("/readyz")
    assert (late.status_code, late.json()["reasons"]) == (503, ["the broker is shutting down"])
    assert problem(await running.http.post("/v1/leases", json=BODY)).code == "shutting_down"


async def test_the_document_lists_every_route_with_its_models(running: Running) -> None:
    document = (await running.http.get("/openapi.json")).json()
    for route in ROUTES:
        operation = document["paths"][route.path][route.method.lower()]
        assert operation["operationId"] == route.name
        if route.body is not None:
            schema = operation["requestBody"]["content"]["application/json"]["schema"]
            assert schema == {"$ref": f"#/components/schemas/{route.body.__name__}"}
        usual = operation["responses"][str(route.statuses[0])]
        if route.answer is not None:
            schema = usual["content"]["application/json"]["schema"]
            assert schema == {"$ref": f"#/components/schemas/{route.answer.__name__}"}
        for status in route.problems:
            content = operation["responses"][str(status)]["content"]
            assert content == {"application/problem+json": {"schema": {"$ref": "#/components/schemas/Problem"}}}
        headers = [parameter["name"] for parameter in operation.get("parameters", []) if parameter["in"] == "header"]
        assert headers == (["X-ConServe-Lease"] if route.holder else [])
    assert {"/healthz", "/readyz", "/metrics"} <= document["paths"].keys()
    assert "HTTPValidationError" not in document["components"]["schemas"]
    assert (await running.http.get("/openapi.json")).json() == document


async def test_metrics_tell_what_happened(running: Running) -> None:
    grant = LeaseGrant.model_validate_json((await running.http.post("/v1/leases", json=BODY)).content)
    await running.http.post("/v1/leases", json=BODY)
    await running.http.post("/v1/leases", json={**BODY, "model": "nobody"})
    report = {"kind": "turn_finished", "token": grant.token, "prompt_tokens": 4_000, "migrated": True}
    await running.http.post("/v1/reports", json={"reports": [report]})
    await running.http.post("/v1/renewals", json={"tokens": [grant.token]})
    found = await running.metrics()
    expected = {
        "conserve_lease_granted_total": 1,
        "conserve_lease_reused_total": 1,
        "conserve_lease_renewed_total": running.service.core.counters.renewed,
        "conserve_lease_refused_total{reason=unknown_model}": 1,
        "conserve_lease_refused_total{reason=no_capacity}": 0,
        "conserve_lease_readopted_total": 0,
        "conserve_lease_released_total": 0,
        "conserve_lease_expired_total": 0,
        "conserve_lease_superseded_total": 0,
        "conserve_migrations_total": 1,
        "conserve_leases_active": 1,
        "conserve_waiting_requests": 0,
        "conserve_decoder_kv_leased_tokens{engine_id=d0}": 4_000,
        "conserve_decoder_kv_occupancy_ratio{engine_id=d0}": 0.04,
        "conserve_engine_state{engine_id=d0,state=ready}": 1,
        "conserve_engine_state{engine_id=d0,state=gone}": 0,
        "conserve_placement_duration_seconds_count": 3,
        "conserve_lease_wait_seconds_count": 1,
    }
    assert {name: found[name] for name in expected} == expected
    assert found["conserve_journal_commit_seconds_count"] >= 2
    assert 0 <= found["conserve_observation_age_seconds{engine_id=p0}"] < 60


async def test_an_engine_never_observed_has_no_age_and_no_division_by_zero() -> None:
    metrics = BrokerMetrics()
    bare = tuple(replace(spec, kv_capacity_tokens=Tokens(0)) for spec in small_fleet())
    service = BrokerService(
        BrokerSettings(),
        engines=bare,
        signer=SIGNER,
        journal=MemoryJournal(),
    )
    metrics.watch(service.core, clock=service.clock)
    async with service:
        found = await Running(service, metrics).metrics()
    assert found["conserve_decoder_kv_occupancy_ratio{engine_id=d0}"] == 0
    assert "conserve_observation_age_seconds{engine_id=d0}" not in found


async def test_without_metrics_there_is_no_page(running: Running) -> None:
    app = create_app(running.service)
    async with httpx2.AsyncClient(transport=httpx2.ASGITransport(app), base_url="http://broker.test") as http:
        assert problem(await http.get("/metrics")).code == "not_found"
