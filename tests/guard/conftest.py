"""The guard in front of an emulated fleet: real HTTP, the emulator's own rules behind it, and leases signed here."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Any

import httpx2
import pytest

from conserve_lab.emulator import EmulatedFleet, default_fleet
from conserve_sdk.core.lease import EngineBinding, Mode
from conserve_sdk.core.units import EngineId, Incarnation, LeaseId, Ms
from conserve_sdk.tokens import LeaseClaims, SigningKey, TokenSigner
from conserve_vllm import GuardSettings, LeaseGuard

KEY = SigningKey(kid="main", secret=b"a secret of at least thirty-two bytes")
NOW_MS = 1_800_000_000_000
LIFE = "life-1"
MESSAGES = [{"role": "system", "content": "word " * 200}, {"role": "user", "content": "hello"}]

Json = dict[str, Any]


def binding(engine_id: str, *, incarnation: str = LIFE) -> EngineBinding:
    return EngineBinding(
        engine_id=EngineId(engine_id), url=f"http://{engine_id}.invalid", incarnation=Incarnation(incarnation)
    )


def lease(**changes: Any) -> LeaseClaims:
    claims = LeaseClaims(
        lease_id=LeaseId("lease-1"),
        epoch=1,
        tenant="default",
        conversation_id="c",
        lineage="main",
        model="emulated",
        mode=Mode.MIGRATE,
        prefiller=binding("p0"),
        decoder=binding("d0"),
        ttl_ms=Ms(60_000),
        hold_ms=Ms(30_000),
        append_threshold_tokens=0,
        ledger_tokens=0,
        granted_at_ms=Ms(NOW_MS),
        exp_ms=Ms(NOW_MS + 120_000),
    )
    return replace(claims, **changes)


def token(key: SigningKey = KEY, **changes: Any) -> str:
    return TokenSigner([key]).sign(lease(**changes))


def settings(engine_id: str, **changes: Any) -> GuardSettings:
    return replace(GuardSettings(engine_id=EngineId(engine_id), keys=(KEY,)), **changes)


@dataclass
class Clock:
    now_ms: int = NOW_MS


@dataclass
class Guarded:
    """A fleet whose engines each have a guard, and a client that speaks the protocol by hand."""

    fleet: EmulatedFleet
    http: httpx2.Client
    clock: Clock = field(default_factory=Clock)
    lives: dict[str, str] = field(default_factory=dict)

    def guard(self, **changes: Any) -> None:
        """Put a guard in front of every engine; `d1` stays as it is, for comparison."""
        for engine in self.fleet.engines:
            if engine.id == "d1":
                continue
            server = engine.engine_on_loop._server
            inner = server._app if not isinstance(server._app, LeaseGuard) else server._app._app
            server._app = LeaseGuard(
                inner,
                settings(engine.id, **changes),
                now_ms=lambda: Ms(self.clock.now_ms),
                incarnation=lambda name=engine.id: Incarnation(self.lives.get(name, LIFE)),
            )
            engine.restart()

    def post(
        self,
        engine_id: str,
        body: Json | bytes,
        *,
        lease_token: str | None = None,
        path: str = "/v1/chat/completions",
        headers: dict[str, str] | None = None,
    ) -> httpx2.Response:
        sent = {"content-type": "application/json", **(headers or {})}
        if lease_token is not None:
            sent["X-ConServe-Lease"] = lease_token
        url = self.fleet.engine(engine_id).url + path
        if isinstance(body, bytes):
            return self.http.post(url, content=body, headers=sent)
        return self.http.post(url, json=body, headers=sent)

    def body(self, **extra: Any) -> Json:
        return {"model": self.fleet.engines[0].model, "messages": MESSAGES, "max_tokens": 12, **extra}

    def prefill(self, body: Json | None = None, *, lease_token: str | None = None, **extra: Any) -> Json:
        """The params for a decode leg, as the SDK makes them."""
        leg = (body or self.body()) | {"max_tokens": 1, "return_token_ids": True, "stream": False} | extra
        leg["kv_transfer_params"] = {"do_remote_decode": True, "do_remote_prefill": False}
        answer = self.post("p0", leg, lease_token=lease_token or token())
        assert answer.status_code == 200, answer.text
        found = answer.json()
        return found["kv_transfer_params"] | {"prompt_token_ids": found["prompt_token_ids"]}

    def decode(self, params: Json, *, lease_token: str | None = None, body: Json | None = None) -> httpx2.Response:
        leg = (body or self.body()) | {"kv_transfer_params": params}
        return self.post("d0", leg, lease_token=lease_token or token())

    def transferred(self, engine_id: str = "d0") -> int:
        page = self.http.get(self.fleet.engine(engine_id).url + "/metrics").text
        lines = [line for line in page.splitlines() if 'source="external_kv_transfer"' in line]
        return sum(int(float(line.rsplit(" ", 1)[1])) for line in lines)


@pytest.fixture(scope="session")
def http() -> Iterator[httpx2.Client]:
    with httpx2.Client(timeout=30, trust_env=False) as client:
        yield client


@pytest.fixture
def guarded(http: httpx2.Client) -> Iterator[Guarded]:
    """One prefiller and one decoder behind guards, and `d1` without one; time stands still."""
    with EmulatedFleet(default_fleet(prefillers=1, decoders=2, time_scale=0)) as fleet:
        front = Guarded(fleet, http)
        front.guard()
        yield front


def code(answer: httpx2.Response) -> str:
    return str(answer.json()["error"]["code"])
