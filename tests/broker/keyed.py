"""A broker that knows API keys, and one key of each kind."""

from collections.abc import Callable
from datetime import UTC, datetime
from typing import Any

import httpx2

from conserve_broker._access_tables import AccessTable
from conserve_broker.api_keys import NewKey, new_key
from conserve_broker.app import create_app
from conserve_broker.gate import Gate
from conserve_broker.metrics import BrokerMetrics
from conserve_broker.service import BrokerService
from conserve_sdk.protocol import LeaseGrant

from .in_process import BODY

__all__ = ["ADMIN", "BLUE", "EVERYBODY", "RED", "WORKER", "Clock", "House"]

RED = new_key(tenant="red", scopes=("agent",), key_id="red-1")
BLUE = new_key(tenant="blue", scopes=("agent",), key_id="blue-1")
WORKER = new_key(tenant="gpu", scopes=("worker",), key_id="gpu-1")
ADMIN = new_key(tenant="ops", scopes=("admin",), key_id="ops-1")
EVERYBODY = (RED, BLUE, WORKER, ADMIN)


class Clock:
    def __init__(self) -> None:
        self.now_s = 1_000.0
        self.date = datetime(2026, 1, 1, tzinfo=UTC)


class House:
    """A broker with keys, and clients of it."""

    def __init__(
        self,
        service: BrokerService,
        clock: Clock,
        *keys: NewKey,
        engine_key: Callable[[str], str] = lambda _: "",
        **access: Any,
    ) -> None:
        self.metrics = BrokerMetrics()
        self.gate = Gate(
            [key.table for key in keys],
            access=AccessTable(**access),
            admitted=self.metrics.admitted,
            denied=self.metrics.denied,
            clock_s=lambda: clock.now_s,
            now=lambda: clock.date,
        )
        self.app = create_app(service, metrics=self.metrics, gate=self.gate, engine_key=engine_key)
        transport = httpx2.ASGITransport(self.app, raise_app_exceptions=False)
        self.http = httpx2.AsyncClient(transport=transport, base_url="http://broker.test")

    async def ask(
        self, method: str, path: str, key: NewKey | str | None, body: Any = None, lease: str = ""
    ) -> httpx2.Response:
        headers = {} if key is None else {"authorization": key if isinstance(key, str) else f"Bearer {key.text}"}
        if lease:
            headers["x-conserve-lease"] = lease
        return await self.http.request(method, path, headers=headers, json=body)

    async def grant(self, key: NewKey, conversation: str = "c") -> LeaseGrant:
        answer = await self.ask("POST", "/v1/leases", key, {**BODY, "conversation_id": conversation})
        return LeaseGrant.model_validate_json(answer.content)
