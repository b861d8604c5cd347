"""`conserve doctor`: what is installed here, does the broker answer, and do its engines answer from this machine.

The last question matters because turns go to the engines directly: a broker that sees them is not enough.
"""

from __future__ import annotations

import argparse
import os
import platform
import re
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib import metadata
from typing import Final, Literal

import httpx2
import pydantic

from conserve_sdk._tls import verify_for
from conserve_sdk.protocol import PROTOCOL_VERSION, EngineInfo, FleetInfo

__all__ = ["main"]

DISTRIBUTION: Final = "conserve-sdk"
CALL_TIMEOUT_S: Final = 3.0

_REQUIREMENT = re.compile(r"""^(?P<name>[A-Za-z0-9._-]+).*;.*extra\s*==\s*['"](?P<extra>[^'"]+)['"]""")


@dataclass(frozen=True, slots=True, kw_only=True)
class Finding:
    """One line of the report.

    Attributes:
        verdict: `fail` makes the exit code 1; `note` is for what is absent but not needed.
    """

    verdict: Literal["ok", "note", "fail"]
    subject: str
    detail: str

    def __str__(self) -> str:
        return f"{self.verdict:<4}  {self.subject}: {self.detail}"


def main(argv: Sequence[str] | None = None, *, transport: httpx2.BaseTransport | None = None) -> int:
    """Print the report.

    Args:
        argv: arguments without the program's name; those of the process by default.
        transport: replaces the network (tests).

    Returns:
        0 when nothing failed, else 1.
    """
    options = _parser().parse_args(argv)
    findings = [*check_installation()]
    broker_url = options.broker or os.environ.get("CONSERVE_BROKER_URL", "").split(",")[0].strip()
    if broker_url:
        verify = verify_for(["https:"])  # engines may be https even when the broker is not
        with httpx2.Client(transport=transport or httpx2.HTTPTransport(verify=verify), timeout=CALL_TIMEOUT_S) as http:
            findings += check_broker(http, broker_url.rstrip("/"))
    else:
        findings.append(Finding(verdict="note", subject="broker", detail="not asked: give --broker URL"))
    sys.stdout.write("".join(f"{finding}\n" for finding in findings))
    return int(any(finding.verdict == "fail" for finding in findings))


def check_installation() -> Iterator[Finding]:
    """Report versions, and for each extra whether everything it needs is installed."""
    yield Finding(verdict="ok", subject="python", detail=f"{platform.python_version()} on {platform.platform()}")
    yield Finding(verdict="ok", subject=DISTRIBUTION, detail=metadata.version(DISTRIBUTION))
    yield Finding(verdict="ok", subject="protocol", detail=f"version {PROTOCOL_VERSION}")
    for name in ("openai", "httpx2", "pydantic"):
        yield Finding(verdict="ok", subject=name, detail=metadata.version(name))
    for extra, names in sorted(_extras().items()):
        missing = sorted({name for name in names if _version(name) is None})
        if missing:
            how = f"not installed ({', '.join(missing)} missing): pip install '{DISTRIBUTION}[{extra}]'"
            yield Finding(verdict="note", subject=f"extra {extra}", detail=how)
        else:
            yield Finding(verdict="ok", subject=f"extra {extra}", detail="installed")


def check_broker(http: httpx2.Client, broker_url: str) -> Iterator[Finding]:
    """Report whether the broker answers, is ready, and which engines it knows."""
    try:
        health = http.get(f"{broker_url}/healthz")
        ready = http.get(f"{broker_url}/readyz")
        fleet = FleetInfo.model_validate_json(http.get(f"{broker_url}/v1/fleet").raise_for_status().content)
    except (httpx2.HTTPError, httpx2.InvalidURL) as exc:
        how = f"no answer from {broker_url} ({_reason(exc)}): is it running, and is this its URL?"
        yield Finding(verdict="fail", subject="broker", detail=how)
        return
    except pydantic.ValidationError:
        yield Finding(verdict="fail", subject="broker", detail=f"what answers at {broker_url} is not a ConServe broker")
        return
    if health.is_success and ready.is_success:
        yield Finding(verdict="ok", subject="broker", detail=f"ready at {broker_url}, preset {fleet.preset}")
    else:
        status = f"/healthz {health.status_code}, /readyz {ready.status_code}"
        how = f"not ready at {broker_url} ({status}): see its log"
        yield Finding(verdict="fail", subject="broker", detail=how)
    yield from _check_protocol(fleet)
    if not fleet.engines:
        how = "the broker knows none: name them in its configuration"
        yield Finding(verdict="fail", subject="engines", detail=how)
    for engine in fleet.engines:
        found = _check_engine(http, engine)
        yield found
        if found.verdict == "ok":
            yield _check_guard(http, engine)


def _check_protocol(fleet: FleetInfo) -> Iterator[Finding]:
    if fleet.protocol_version != PROTOCOL_VERSION:
        older = "the broker" if fleet.protocol_version < PROTOCOL_VERSION else "this SDK"
        how = f"the broker speaks version {fleet.protocol_version}, this SDK {PROTOCOL_VERSION}: upgrade {older}"
        yield Finding(verdict="fail", subject="protocol", detail=how)


def _check_engine(http: httpx2.Client, engine: EngineInfo) -> Finding:
    subject = f"engine {engine.engine_id}"
    seen = f"{engine.role} of {engine.model}, {engine.state}"
    if engine.state not in ("ready", "draining"):
        how = engine.detail or "see the broker's log"
        return Finding(verdict="fail", subject=subject, detail=f"{seen}: {how}")
    try:
        http.get(f"{engine.url.rstrip('/')}/health").raise_for_status()
    except (httpx2.HTTPError, httpx2.InvalidURL) as exc:
        how = f"the broker reaches it, this machine does not ({_reason(exc)}): turns go there directly, open the way"
        return Finding(verdict="fail", subject=subject, detail=f"{seen}; {engine.url}: {how}")
    return Finding(verdict="ok", subject=subject, detail=f"{seen}; answers at {engine.url}")


def _check_guard(http: httpx2.Client, engine: EngineInfo) -> Finding:
    """Report what the engine's guard says of itself (`conserve_vllm.LeaseGuard`), or that there is none."""
    subject = f"guard of {engine.engine_id}"
    try:
        answer = http.get(f"{engine.url.rstrip('/')}/conserve/engine")
        told = answer.json() if answer.status_code == httpx2.codes.OK else None
    except (httpx2.HTTPError, ValueError):
        told = None
    if not isinstance(told, dict) or "incarnation" not in told:
        how = "none: any client that reaches this engine can end it or make it answer wrong text (docs/security.md)"
        return Finding(verdict="note", subject=subject, detail=how)
    if told.get("engine_id") != engine.engine_id:
        how = f"takes itself for {told.get('engine_id')!r}: correct CONSERVE_GUARD_ENGINE_ID, or it refuses every lease"
        return Finding(verdict="fail", subject=subject, detail=how)
    if engine.incarnation and told["incarnation"] not in ("", engine.incarnation):
        how = (
            f"lives as {told['incarnation']}, the broker knows {engine.incarnation}: it refuses leases until they agree"
        )
        return Finding(verdict="fail", subject=subject, detail=how)
    costs = {
        "kv_load_failure_policy is not recompute: a failed transfer is an HTTP 500": engine.role != "prefiller"
        and told.get("kv_load_failure_policy") not in (None, "recompute"),
        "no prefix cache: every turn is computed from its beginning": told.get("prefix_caching") is False,
        "no prompt token details: a lost cache goes unseen": told.get("prompt_tokens_details") is False,
    }
    found = [cost for cost, applies in costs.items() if applies]
    if found:
        return Finding(verdict="note", subject=subject, detail="; ".join(found))
    return Finding(verdict="ok", subject=subject, detail=f"lives as {told['incarnation']}")


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="conserve doctor", description="Check this installation, the broker and the engines."
    )
    parser.add_argument("--broker", metavar="URL", default="", help="default: CONSERVE_BROKER_URL")
    return parser


def _extras() -> dict[str, list[str]]:
    """Requirements of each extra, as the installed distribution declares them (PEP 508 markers)."""
    extras: dict[str, list[str]] = {}
    for line in metadata.requires(DISTRIBUTION) or []:
        found = _REQUIREMENT.match(line)
        if found and found["name"] != DISTRIBUTION:
            extras.setdefault(found["extra"], []).append(found["name"])
    return extras


def _version(name: str) -> str | None:
    try:
        return metadata.version(name)
    except metadata.PackageNotFoundError:
        return None


def _reason(exc: Exception) -> str:
    text = str(exc).splitlines()[0] if str(exc) else ""
    return f"{type(exc).__name__}: {text}" if text else type(exc).__name__
