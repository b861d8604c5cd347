"""Engines behind a guard, spoken to by hand with leases that a broker with the fleet's key might have granted."""

from __future__ import annotations

import time

from conserve_sdk.core.lease import EngineBinding, Mode
from conserve_sdk.core.units import EngineId, Incarnation, LeaseId, Ms, Tokens
from conserve_sdk.tokens import LeaseClaims, SigningKey, TokenSigner

from .raw import RawProtocol

PREFILL = {"do_remote_decode": True, "do_remote_prefill": False}
HOLD = {"do_remote_decode": True}


class Leased(RawProtocol):
    """Speaks by hand, with a lease that a broker with the fleet's key might have granted."""

    def __init__(self, fleet, http):
        super().__init__(fleet, http)
        key = fleet.token_key
        self.signer = TokenSigner([SigningKey(kid=key["kid"], secret=key["secret"].encode())])
        self.lease_token = self.token()

    def identity(self, engine_id):
        return self.http.get(f"{self.fleet.engines[engine_id].url}/conserve/engine").raise_for_status().json()

    def token(self, *, decoder="d0", life=None, ends_in_ms=600_000, lease_id="by-hand", hold_ms=30_000):
        now_ms = time.time_ns() // 1_000_000
        return self.signer.sign(
            LeaseClaims(
                lease_id=LeaseId(lease_id),
                epoch=1,
                tenant="default",
                conversation_id="c",
                lineage="main",
                model=self.fleet.model,
                mode=Mode.MIGRATE,
                prefiller=self._binding("p0", None),
                decoder=self._binding(decoder, life),
                ttl_ms=Ms(60_000),
                hold_ms=Ms(hold_ms),
                append_threshold_tokens=Tokens(0),
                ledger_tokens=Tokens(0),
                granted_at_ms=Ms(now_ms),
                exp_ms=Ms(now_ms + ends_in_ms),
            )
        )

    def _binding(self, engine_id, life):
        engine = self.fleet.engines[engine_id]
        told = self.identity(engine_id)["incarnation"] if life is None and engine_id != "d1" else life or ""
        return EngineBinding(engine_id=EngineId(engine_id), url=engine.url, incarnation=Incarnation(told))

    def post(self, engine_id, body, *, path="chat/completions"):
        url = f"{self.fleet.engines[engine_id].api}/{path}"
        return self.http.post(url, json=body, headers={"X-ConServe-Lease": self.lease_token})

    def prefill(self, body, *, path="chat/completions"):
        one = {"max_output_tokens": 1} if path == "responses" else {"max_tokens": 1}
        leg = body | one | {"stream": False, "return_token_ids": True, "kv_transfer_params": PREFILL}
        answer = self.ask("p0", leg, path=path)
        params = answer["kv_transfer_params"]
        if path == "chat/completions":
            params["prompt_token_ids"] = answer["prompt_token_ids"]
        return params

    def refused(self, body, params, *, code, engine_id="d0", path="chat/completions"):
        answer = self.post(engine_id, body | {"kv_transfer_params": params}, path=path)
        assert 400 <= answer.status_code < 500, answer.text
        assert answer.json()["error"]["code"] == code

    def check_well(self, body, *, engine_id="d0", path="chat/completions"):
        """The decoder lives, and what it says about this prompt is what an engine that never pulled says."""
        assert self.fleet.is_alive(engine_id)
        assert self.said(self.ask(engine_id, body, path=path)) == self.said(self.ask("a0", body, path=path))
