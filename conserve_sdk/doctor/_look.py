"""What one engine tells about itself when asked politely: health, version, models, metrics, and its guard's page."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, Literal

import httpx2

from conserve_sdk.doctor._page import MetricsPage

__all__ = ["EngineFacts", "EngineHttp", "NotAnEngineError", "Target", "json_object"]

GUARD_PATH = "/conserve/engine"

Role = Literal["prefiller", "decoder", "both", ""]


@dataclass(frozen=True, slots=True, kw_only=True)
class Target:
    """An engine to look at.

    Attributes:
        name: how the report names it.
        role: what it is for; empty where nobody said so.
        group: engines of one group move KV between each other.
        model: what it should serve; empty where nobody said so.
        from_broker: whether the broker named it.
        engine_id: as the broker names it; empty where none did.
        host_tier_tokens: the host tier that the broker counts on.
    """

    name: str
    url: str
    role: Role = ""
    group: str = ""
    model: str = ""
    from_broker: bool = False
    engine_id: str = ""
    host_tier_tokens: int = 0


class NotAnEngineError(Exception):
    """What answers there is no vLLM server; the text says why."""


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineFacts:
    """What the engine told.

    Attributes:
        models: served name to the path or repository it was loaded from.
        guard: answer of the guard's page; None without a guard.
    """

    target: Target
    version: str
    models: Mapping[str, str]
    max_model_len: int
    page: MetricsPage
    guard: Mapping[str, Any] | None = None

    @property
    def name(self) -> str:
        """How the report names it."""
        return self.target.name

    @property
    def model(self) -> str:
        """The model to ask for."""
        wanted = self.target.model
        return wanted if wanted in self.models else next(iter(self.models), "")

    @property
    def role(self) -> str:
        """What it is for: as its guard says, else as it was given; empty where nobody said so."""
        told = (self.guard or {}).get("role")
        return told if told in ("prefiller", "decoder", "both") else self.target.role

    @property
    def block_size(self) -> int:
        """Tokens per KV block, 0 when not told."""
        told = self.page.labels("vllm:cache_config_info").get("block_size") or self.told("block_size_tokens")
        text = str(told)
        return int(text) if text.isdigit() else 0

    @property
    def has_connector(self) -> bool:
        """Whether a KV connector is loaded: NIXL's series exist from the start."""
        return bool((self.guard or {}).get("connector")) or self.page.has_prefix("vllm:nixl_")

    def told(self, name: str) -> Any:
        """What the guard tells under this name (`conserve_vllm`, `GET /conserve/engine`), None when it does not."""
        return (self.guard or {}).get(name)


class EngineHttp:
    """Talks to engines.

    Args:
        client: with the timeout for questions that need no computing.
        api_key: the engines' own, if they want one.
    """

    ANSWER_TIMEOUT_S = 60.0

    def __init__(self, client: httpx2.Client, *, api_key: str = "") -> None:
        self._client = client
        self._headers = {"Authorization": f"Bearer {api_key}"} if api_key else {}

    def look(self, target: Target) -> EngineFacts:
        """Ask everything that needs no computing.

        Raises:
            httpx2.HTTPError: it does not answer.
            NotAnEngineError: it answers, but not like vLLM.
        """
        self._get(target, "/health").raise_for_status()
        models, longest = self._models(target)
        guard = self._guard(target)
        return EngineFacts(
            target=target,
            version=self._version(target),
            models=models,
            max_model_len=longest,
            page=self.page(target),
            guard=guard,
        )

    def page(self, target: Target) -> MetricsPage:
        """Its metrics now.

        Raises:
            httpx2.HTTPError: it does not answer.
            NotAnEngineError: no page of a vLLM server.
        """
        page = MetricsPage(self._get(target, "/metrics").raise_for_status().text)
        if page.total("vllm:num_requests_running") is None:
            raise NotAnEngineError(
                "/metrics has no vllm:num_requests_running: is this a vLLM server with its log stats on?"
            )
        return page

    def post(self, target: Target, path: str, content: bytes, *, request_id: str) -> httpx2.Response:
        """Send a request that takes computing."""
        headers = {**self._headers, "Content-Type": "application/json", "X-Request-Id": request_id}
        return self._client.post(f"{target.url}{path}", content=content, headers=headers, timeout=self.ANSWER_TIMEOUT_S)

    def _get(self, target: Target, path: str) -> httpx2.Response:
        return self._client.get(f"{target.url}{path}", headers=self._headers)

    def _models(self, target: Target) -> tuple[dict[str, str], int]:
        answer = self._get(target, "/v1/models")
        if answer.status_code == 401:
            raise NotAnEngineError("it wants an API key: give --engine-key, or CONSERVE_ENGINE_KEY")
        cards = _objects(json_object(answer.raise_for_status()).get("data"))
        if not cards:
            raise NotAnEngineError("/v1/models lists nothing: is this the address of an OpenAI server?")
        longest = max(int(card.get("max_model_len") or 0) for card in cards)
        return {str(card.get("id")): str(card.get("root") or "") for card in cards}, longest

    def _version(self, target: Target) -> str:
        answer = self._get(target, "/version")
        return str(json_object(answer).get("version") or "") if answer.is_success else ""

    def _guard(self, target: Target) -> dict[str, Any] | None:
        answer = self._get(target, GUARD_PATH)
        return (json_object(answer) or None) if answer.status_code == 200 else None


def json_object(answer: httpx2.Response) -> dict[str, Any]:
    """The answer's JSON object; empty when it is none."""
    try:
        data = answer.json()
    except ValueError:
        return {}
    return data if isinstance(data, dict) else {}


def _objects(value: object) -> list[dict[str, Any]]:
    return [item for item in value if isinstance(item, dict)] if isinstance(value, list) else []
