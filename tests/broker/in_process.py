"""A broker's service inside the test's own event loop: no socket, no file, engines that have just been looked at."""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

import httpx2

from conserve_broker.journal import MemoryJournal
from conserve_broker.service import BrokerService
from conserve_sdk.core import BrokerSettings, EngineObserved, Incarnation, Tokens
from conserve_sdk.protocol import Problem
from conserve_sdk.testing import small_fleet
from conserve_sdk.tokens import SigningKey, TokenSigner

__all__ = ["BODY", "SIGNER", "observe", "problem", "running_service"]

BODY = {"conversation_id": "c", "lineage": "main", "model": "test-model", "first_turn_input_tokens": 4_000}
"""A request for a lease."""

SIGNER = TokenSigner([SigningKey(kid="test", secret=b"s" * 32)])


def observe(service: BrokerService, *, incarnation: str = "one", running: int = 0) -> None:
    """Let the service see every engine of its fleet, empty."""
    for view in service.core.engines():
        service.feed(
            EngineObserved(
                now_ms=service.clock.now_ms(),
                engine_id=view.engine_id,
                incarnation=Incarnation(incarnation),
                models=(view.spec.model,),
                kv_capacity_tokens=Tokens(100_000),
                kv_used_tokens=Tokens(0),
                block_size_tokens=Tokens(16),
                max_model_len_tokens=Tokens(32_768),
                running=running,
                waiting=0,
            )
        )


@asynccontextmanager
async def running_service(
    settings: BrokerSettings, *, signer: TokenSigner = SIGNER, **options: Any
) -> AsyncIterator[BrokerService]:
    """A service over the small fleet, which it has seen."""
    service = BrokerService(settings, engines=small_fleet(), signer=signer, journal=MemoryJournal(), **options)
    async with service:
        observe(service)
        yield service


def problem(response: httpx2.Response) -> Problem:
    """The problem document that an answer is."""
    assert response.headers["content-type"] == "application/problem+json"
    found = Problem.model_validate_json(response.content)
    assert found.status == response.status_code
    return found
