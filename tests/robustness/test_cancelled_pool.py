"""Five hundred cancellations at random instants, many of them twice, and the pool is as good as new."""

from __future__ import annotations

import asyncio
import random

import httpx2

from conserve_sdk import conversation
from conserve_sdk.transport import _pools
from tests.support.loopback import MODEL

CONNECTIONS, CANCELLED, AT_ONCE = 10, 500, 25
STEPS_MAX = 40


def test_cancellations_do_not_poison_the_pool(engine, front, at_rest, monkeypatch) -> None:
    """More requests than connections run at once, so that requests are cancelled while they queue for one, too."""
    monkeypatch.setattr(_pools, "LIMITS", httpx2.Limits(max_connections=CONNECTIONS, keepalive_expiry=4.0))
    server = engine(*["answer", "hold_stream", "hold"] * CANCELLED)
    conserve = front(p0=server, d0=server)
    dice = random.Random(7)
    ends: list[object] = []
    served: list[int] = []

    async def once(number: int) -> str:
        client = conserve.async_openai_client(max_retries=0, timeout=60.0)
        with conversation(f"c{number % 40}"):
            stream = await client.chat.completions.create(
                model=MODEL, messages=[{"role": "user", "content": f"c{number % 40} " * 300}], stream=True
            )
            return "".join([chunk.choices[0].delta.content or "" async for chunk in stream if chunk.choices])

    async def cancelled(number: int) -> None:
        task = asyncio.ensure_future(once(number))
        for _ in range(dice.randrange(2) + 1):
            for _ in range(dice.randrange(STEPS_MAX)):
                await asyncio.sleep(0)
            task.cancel()
        ends.extend(await asyncio.gather(task, return_exceptions=True))

    async def go() -> list[str]:
        for start in range(0, CANCELLED, AT_ONCE):
            await asyncio.gather(*(cancelled(number) for number in range(start, start + AT_ONCE)))
        served.append(len(server.requests))
        server.script.clear()
        good = await asyncio.gather(*(once(number) for number in range(CONNECTIONS)))
        await conserve._runtime.async_engines.aclose()
        return good

    assert asyncio.run(go()) == ["ok"] * CONNECTIONS
    assert len(ends) == CANCELLED
    answered = -(-served[0] // 3)  # the other requests were held still: nothing but the cancellation ended them
    assert sum(isinstance(end, asyncio.CancelledError) for end in ends) >= CANCELLED - answered
    assert [end for end in ends if not isinstance(end, str | asyncio.CancelledError)] == []
    at_rest(conserve)
