"""Whether the broker answers, is ready, and which engines it knows."""

from __future__ import annotations

from collections.abc import Iterator

import httpx2
import pydantic

from conserve_sdk._broker_access import API_KEY_ENV, BrokerAccess
from conserve_sdk.doctor._finding import Finding, fail, note, ok, reason
from conserve_sdk.doctor._look import Target
from conserve_sdk.protocol import PROTOCOL_VERSION, EngineInfo, FleetInfo

__all__ = ["BrokerVisit"]


class BrokerVisit:
    """Asks one broker.

    Args:
        http: of the doctor.
        url: where the broker answers.
        access: this machine's key at the broker, and whom it trusts.

    Attributes:
        targets: the engines it knows and believes to be there; filled by `findings`.
    """

    def __init__(self, http: httpx2.Client, url: str, *, access: BrokerAccess) -> None:
        self.targets: list[Target] = []
        self._http = http
        self._url = url.rstrip("/")
        self._headers = access.headers()

    def findings(self) -> Iterator[Finding]:
        """Report the broker and what it says about its engines."""
        try:
            health = self._http.get(f"{self._url}/healthz")
            ready = self._http.get(f"{self._url}/readyz")
            answer = self._http.get(f"{self._url}/v1/fleet", headers=self._headers)
            if answer.status_code in (401, 403):
                detail = f"{self._url} refuses this key (HTTP {answer.status_code})"
                how = f"give the key of a tenant, of scope agent: {API_KEY_ENV}, or --broker-key"
                yield fail("broker", "broker", detail, fix=how)
                return
            fleet = FleetInfo.model_validate_json(answer.raise_for_status().content)
        except (httpx2.HTTPError, httpx2.InvalidURL) as exc:
            detail = f"no answer from {self._url} ({reason(exc)})"
            yield fail("broker", "broker", detail, fix="is it running, and is this its URL?")
            return
        except pydantic.ValidationError:
            detail = f"what answers at {self._url} is not a ConServe broker"
            yield fail("broker", "broker", detail, fix="is this its URL?")
            return
        if health.is_success and ready.is_success:
            yield ok("broker", "broker", f"ready at {self._url}, preset {fleet.preset}")
        else:
            status = f"/healthz {health.status_code}, /readyz {ready.status_code}"
            yield fail("broker", "broker", f"not ready at {self._url} ({status})", fix="see its log")
        if ready.headers.get("content-type") == "application/json" and ready.json().get("access") == "open":
            detail = "open: no API key is configured, so whoever reaches it may use it and drain its engines"
            yield note("broker", "access", detail, fix="make keys with `conserve broker keygen`")
        yield from self._fleet(fleet)

    def _fleet(self, fleet: FleetInfo) -> Iterator[Finding]:
        if fleet.protocol_version != PROTOCOL_VERSION:
            older = "the broker" if fleet.protocol_version < PROTOCOL_VERSION else "this SDK"
            detail = f"the broker speaks version {fleet.protocol_version}, this SDK {PROTOCOL_VERSION}"
            yield fail("protocol", "protocol", detail, fix=f"upgrade {older}")
        if not fleet.engines:
            yield fail("engines", "engines", "the broker knows none", fix="name them in its configuration")
        for engine in fleet.engines:
            finding = _known(engine)
            yield finding
            if finding.verdict != "fail":
                self.targets.append(
                    Target(
                        name=f"engine {engine.engine_id}",
                        url=engine.url.rstrip("/"),
                        role=engine.role,
                        group=engine.transfer_group,
                        model=engine.model,
                        from_broker=True,
                        engine_id=engine.engine_id,
                        host_tier_tokens=engine.host_tier_tokens,
                    )
                )


def _known(engine: EngineInfo) -> Finding:
    subject, seen = f"engine {engine.engine_id}", f"{engine.role} of {engine.model}, {engine.state}"
    if engine.state in ("ready", "draining"):
        held = f"{engine.kv_leased_tokens:,} of {engine.kv_capacity_tokens:,} KV tokens leased"
        return note(subject, "broker_sees", f"the broker sees it as {seen}; {held}")
    return fail(subject, "broker_sees", seen, fix=engine.detail or "see the broker's log")
