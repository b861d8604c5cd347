"""Letting go of a hold: `POST /conserve/release`, made into the one request through which vLLM's scheduler hears of it.

The guard runs in the API server's process and the connector's scheduler in the engine core's; what goes from one to
the other is a request. So a release is a completion of one token whose params carry the order, and costs as much.
"""

from __future__ import annotations

import json
from typing import Any

from conserve_vllm.holds import hold_params
from conserve_vllm.http import Message, Scope, with_body
from conserve_vllm.prompt import TRANSFER_KEY

__all__ = ["RELEASE_PATH", "StatusOnly", "release_body", "release_scope"]

RELEASE_PATH = "/conserve/release"
COMPLETIONS_PATH = "/v1/completions"


class StatusOnly:
    """A `send` that keeps the status and drops the answer."""

    status = 0

    async def __call__(self, message: Message) -> None:
        """Take one message of the answer."""
        if message["type"] == "http.response.start":
            self.status = int(message["status"])


def release_body(lease_id: str, *, model: str) -> bytes:
    """The request that ends a lease's hold."""
    body: dict[str, Any] = {"model": model, "prompt": ".", "max_tokens": 1, "temperature": 0}
    return json.dumps(body | {TRANSFER_KEY: hold_params(lease_id, hold_ms=0)}).encode("ascii")


def release_scope(scope: Scope, body: bytes) -> Scope:
    """The scope of that request, in place of the one that asked for it."""
    headers = [(key, value) for key, value in scope["headers"] if key.lower() != b"content-type"]
    path = {"path": COMPLETIONS_PATH, "raw_path": COMPLETIONS_PATH.encode(), "query_string": b""}
    return with_body({**scope, **path, "headers": [*headers, (b"content-type", b"application/json")]}, body)
