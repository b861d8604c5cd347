"""A client of the broker's protocol that hides nothing, for tests of the desk on a fake clock."""

from typing import Any

import httpx2

from conserve_sdk.core import PAPER, BrokerSettings, Ms
from conserve_sdk.protocol import (
    BatchAnswer,
    EngineInfo,
    LeaseGrant,
    LeaseStatus,
    Problem,
)
from conserve_sdk.testing import InMemoryBroker

TTL_MS = 60_000
MIGRATING = BrokerSettings(placement=PAPER, ttl_ms=Ms(TTL_MS))


class Client:
    """Speaks the protocol as an SDK would, without hiding anything."""

    def __init__(self, broker: InMemoryBroker) -> None:
        self.http = httpx2.Client(transport=broker, base_url=broker.url)

    def ask(self, conversation: str = "c", **changes: Any) -> httpx2.Response:
        body = {
            "conversation_id": conversation,
            "lineage": "main",
            "model": "test-model",
            "first_turn_input_tokens": 4_000,
        }
        return self.http.post("/v1/leases", json={**body, **changes})

    def grant(self, conversation: str = "c", **changes: Any) -> LeaseGrant:
        response = self.ask(conversation, **changes)
        assert response.is_success, response.text
        return LeaseGrant.model_validate_json(response.content)

    def supersede(self, grant: LeaseGrant, **changes: Any) -> httpx2.Response:
        body = {"token": grant.token, "epoch": grant.epoch, "reason": "decoder refused"}
        return self.http.post(f"/v1/leases/{grant.lease_id}/supersede", json={**body, **changes})

    def report(self, *reports: dict[str, Any]) -> list[LeaseStatus]:
        response = self.http.post("/v1/reports", json={"reports": reports})
        assert response.status_code == 200, response.text
        return list(BatchAnswer.model_validate_json(response.content).results)

    def renew(self, *tokens: str) -> list[LeaseStatus]:
        response = self.http.post("/v1/renewals", json={"tokens": tokens})
        assert response.status_code == 200, response.text
        return list(BatchAnswer.model_validate_json(response.content).results)

    def park(self, grant: LeaseGrant) -> LeaseStatus:
        response = self.http.post(f"/v1/leases/{grant.lease_id}/park", json={"token": grant.token})
        assert response.status_code == 200, response.text
        return LeaseStatus.model_validate_json(response.content)

    def release(self, grant: LeaseGrant) -> httpx2.Response:
        return self.http.delete(f"/v1/leases/{grant.lease_id}", headers=holder(grant.token))

    def read(self, lease_id: str, token: str) -> httpx2.Response:
        return self.http.get(f"/v1/leases/{lease_id}", headers=holder(token))

    def engine(self, engine_id: str) -> EngineInfo:
        return EngineInfo.model_validate_json(self.http.get(f"/v1/engines/{engine_id}").content)


def holder(token: str) -> dict[str, str]:
    return {"authorization": f"Lease {token}"}


def problem(response: httpx2.Response) -> Problem:
    assert response.headers["content-type"] == "application/problem+json"
    found = Problem.model_validate_json(response.content)
    assert found.status == response.status_code
    assert "\n" not in found.detail
    return found


def turn(grant: LeaseGrant, **changes: Any) -> dict[str, Any]:
    return {
        "kind": "turn_finished",
        "token": grant.token,
        "prompt_tokens": 4_000,
        "completion_tokens": 96,
        **changes,
    }
