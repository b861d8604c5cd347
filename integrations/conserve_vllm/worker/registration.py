"""The worker's side of the broker: register, repeat, drain, leave. What fails is said once and tried again."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from typing import Any
from urllib.parse import quote

import httpx2

from conserve_sdk._broker_access import AccessFaultError, BrokerAccess
from conserve_vllm.worker.options import Clash

__all__ = ["Registration"]

log = logging.getLogger("conserve_vllm.worker")

CALL_TIMEOUT_S = 5.0


class Registration:
    """One engine's entry at one broker. No failure here ends the engine: leases go on without the broker.

    Args:
        broker_url: where the broker answers.
        engine_id: whose entry.
        worker_key: its API key, of scope `worker`; "" takes `CONSERVE_BROKER_API_KEY`, or sends none.

    Raises:
        Clash: a key, an authority or a certificate cannot be used.
    """

    def __init__(self, broker_url: str, *, engine_id: str, worker_key: str) -> None:
        self._path = f"/v1/engines/{quote(engine_id, safe='')}"
        try:
            access = BrokerAccess.resolve(api_key=worker_key or None)
            verify = access.verify([broker_url])
        except AccessFaultError as fault:
            raise Clash(str(fault)) from fault
        self._http = httpx2.Client(
            base_url=broker_url.rstrip("/"),
            headers=access.headers(),
            timeout=CALL_TIMEOUT_S,
            verify=verify,
            trust_env=False,
        )
        self._well = True

    def beat(self, entry: Mapping[str, Any]) -> bool:
        """Register, or say that the engine still lives; returns whether the broker took it."""
        return self._call("PUT", self._path, json=dict(entry)) is not None

    def drain(self) -> bool:
        """Ask for no new leases on this engine. A worker's key may not (operators drain); `leave` drains, too."""
        return self._call("POST", f"{self._path}/drain", expected=httpx2.codes.FORBIDDEN) is not None

    def leases(self) -> int | None:
        """How many leases the engine still has; 0 once it is forgotten; None if the broker does not say."""
        answer = self._call("GET", self._path, expected=httpx2.codes.NOT_FOUND, otherwise={"leases": 0})
        found = answer.get("leases") if isinstance(answer, dict) else None
        return found if isinstance(found, int) else None

    def leave(self) -> bool:
        """Take the entry back: no new leases, and the engine is forgotten with its last one."""
        return self._call("DELETE", self._path) is not None

    def close(self) -> None:
        """Close the connections."""
        self._http.close()

    def _call(self, method: str, path: str, *, expected: int = 0, otherwise: Any = None, **extra: Any) -> Any:
        """The answer's JSON ({} for none), None if the call failed, or `otherwise` for a status that is no failure."""
        try:
            answer = self._http.request(method, path, **extra)
            if answer.status_code == expected:
                return otherwise
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
