"""The worker's side of the broker: register, repeat, drain, leave. What fails is said once and tried again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import httpx2

from conserve_sdk._tls import verify_for

__all__ = ["Registration"]

log = logging.getLogger("conserve_vllm.worker")

CALL_TIMEOUT_S = 5.0


class Registration:
    """One engine's entry at one broker. No failure here ends the engine: leases go on without the broker.

    Args:
        broker_url: where the broker answers.
        engine_id: whose entry.
        worker_key: bearer key; "" sends none.
    """

    def __init__(self, broker_url: str, *, engine_id: str, worker_key: str) -> None:
        self._path = f"/v1/engines/{quote(engine_id, safe='')}"
        self._http = httpx2.Client(
            base_url=broker_url.rstrip("/"),
            headers={"Authorization": f"Bearer {worker_key}"} if worker_key else {},
            timeout=CALL_TIMEOUT_S,
            verify=verify_for([broker_url]),
            trust_env=False,
        )
        self._well = True

    def beat(self, entry: Mapping[str, Any]) -> bool:
        """Register, or say that the engine still lives; returns whether the broker took it."""
        return self._call("PUT", self._path, json=dict(entry)) is not None

    def drain(self) -> bool:
        """Ask for no new leases on this engine."""
        return self._call("POST", f"{self._path}/drain") is not None

    def leases(self) -> int | None:
        """How many leases the engine still has; None if the broker does not say."""
        answer = self._call("GET", self._path)
        found = answer.get("leases") if isinstance(answer, dict) else None
        return found if isinstance(found, int) else None

    def leave(self) -> bool:
        """Take the entry back."""
        return self._call("DELETE", self._path) is not None

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _call(self, method: str, path: str, **extra: Any) -> Any:
        """The answer's JSON ({} for none), or None if the call failed."""
        try:
            answer = self._http.request(method, path, **extra)
            answer.raise_for_status()
            found = answer.json() if answer.content else {}
        except (httpx2.HTTPError, ValueError) as error:
            # The first failure in a row is worth a warning; the next ones say nothing new.
            log.log(logging.WARNING if self._well else logging.DEBUG, "broker %s %s failed: %s", method, path, error)
            self._well = False
            return None
        if not self._well:
            log.warning("the broker answers again")
        self._well = True
        return found
