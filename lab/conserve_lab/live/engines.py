"""Which engines a live run uses: named on the command line, known to a broker, or started here."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2
from pydantic import ValidationError

from conserve_lab.demo.errors import DemoError
from conserve_lab.live.fleet import LiveFleet
from conserve_lab.vllm import FleetOptions, VllmError, VllmFleet
from conserve_sdk.core.units import Tokens
from conserve_sdk.protocol import FleetInfo

ROLES = ("prefiller", "decoder", "both")
ASK_BUDGET_S = 10.0


class NoEngines(Exception):  # noqa: N818 -- says what is missing
    """The engines asked for cannot be used; the message says why and what to do."""


def named_engines(named: Sequence[str]) -> LiveFleet:
    """Return engines given as `ROLE=URL`, or `URL` for one that does both.

    Raises:
        NoEngines: a role is unknown, or an engine does not answer.
    """
    entries: list[dict[str, Any]] = []
    models: list[dict[str, Any]] = []
    with httpx2.Client(timeout=ASK_BUDGET_S, trust_env=False) as http:
        for number, text in enumerate(named):
            role, found, url = text.partition("=")
            role, url = (role, url) if found else ("both", text)
            if role not in ROLES:
                raise NoEngines(f"{text!r}: the role before = is one of {', '.join(ROLES)}")
            models.append(_model_of(http, url.rstrip("/")))
            entries.append(
                {
                    "id": f"{role[0]}{number}",
                    "url": url.rstrip("/"),
                    "role": role,
                    "model": str(models[-1]["id"]),
                    "connector": "NixlConnector" if role != "both" or len(named) > 1 else "none",
                    "transfer_group": "replay",
                }
            )
    if len({entry["model"] for entry in entries}) > 1:
        raise NoEngines(f"the engines serve different models: {', '.join(entry['model'] for entry in entries)}")
    limit = min(int(model.get("max_model_len") or 0) for model in models)
    return LiveFleet(kind="live", model=entries[0]["model"], entries=tuple(entries), context_tokens_max=limit)


def engines_of_broker(url: str) -> LiveFleet:
    """Return the engines that a running broker has.

    Raises:
        NoEngines: it does not answer, or has none that are ready.
    """
    try:
        answer = httpx2.get(f"{url}/v1/fleet", timeout=ASK_BUDGET_S, trust_env=False).raise_for_status()
        fleet = FleetInfo.model_validate_json(answer.content)
    except (httpx2.HTTPError, ValidationError) as error:
        raise NoEngines(f"no broker's fleet at {url}: {error}") from error
    ready = [engine for engine in fleet.engines if engine.state == "ready"]
    if not ready:
        raise NoEngines(f"the broker at {url} has no engine that is ready; see {url}/v1/fleet")
    entries = tuple({"id": e.engine_id, "url": e.url, "role": e.role, "model": e.model} for e in ready)
    limits = [engine.max_model_len_tokens for engine in ready if engine.max_model_len_tokens]
    return LiveFleet(kind="live", model=ready[0].model, entries=entries, context_tokens_max=min(limits, default=0))


@contextmanager
def local_vllm(
    venv: Path | None, *, say: Callable[[str], None], prefillers: int = 1, decoders: int = 2, references: int = 0
) -> Iterator[tuple[VllmFleet, LiveFleet]]:
    """Start vLLM servers of a tiny model on this machine's CPU.

    Args:
        venv: environment that holds vLLM; None: the usual places.
        say: gets lines of progress.
        prefillers: how many of them.
        decoders: how many of them.
        references: how many without a connector.

    Raises:
        DemoError: they cannot be started.
    """
    options = FleetOptions(
        prefillers=prefillers, decoders=decoders, references=references, max_model_tokens=Tokens(8_192)
    )
    try:
        with VllmFleet(options, venv=venv, say=say) as fleet:
            entries = tuple(fleet.broker_engines(references=references > 0))
            yield (
                fleet,
                LiveFleet(
                    kind="vLLM on CPU",
                    model=fleet.model,
                    entries=entries,
                    context_tokens_max=options.max_model_tokens,
                ),
            )
    except VllmError as error:
        raise DemoError(str(error)) from error


def _model_of(http: httpx2.Client, url: str) -> dict[str, Any]:
    try:
        found: list[dict[str, Any]] = http.get(f"{url}/v1/models").raise_for_status().json()["data"]
        return found[0]
    except (httpx2.HTTPError, httpx2.InvalidURL, ValueError, LookupError, TypeError) as error:
        raise NoEngines(f"no engine answers at {url}: {type(error).__name__}: {error}") from error
