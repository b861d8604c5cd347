"""Many conversations at once: the emulator under the load a demo puts on it."""

from __future__ import annotations

import asyncio
import json
from typing import Any

import httpx2

from conserve_lab.emulator import EmulatedFleet, default_fleet
from conserve_lab.emulator.metrics import Histogram

TOOL = {
    "type": "function",
    "function": {"name": "look", "parameters": {"type": "object", "properties": {"x": {"type": "integer"}}}},
}


async def converse(client: httpx2.AsyncClient, fleet: EmulatedFleet, number: int) -> tuple[int, list[Any]]:
    """Play one whole conversation: prefill leg, decode leg, then follow-up turns on the same decoder."""
    prefiller = fleet.prefillers[number % len(fleet.prefillers)].url
    decoder = fleet.decoders[number % len(fleet.decoders)].url
    messages: list[Any] = [
        {"role": "system", "content": f"conversation {number} " * 40},
        {"role": "user", "content": f"task {number}"},
    ]
    body = {"model": "emulated", "tools": [TOOL]}
    turns = 0
    while True:
        params: dict[str, Any] = {"do_remote_decode": True}
        if not turns:
            first = await client.post(
                prefiller + "/v1/chat/completions",
                json={**body, "messages": messages, "max_tokens": 1, "kv_transfer_params": params},
            )
            params = first.json()["kv_transfer_params"] | params
        answer = await client.post(
            decoder + "/v1/chat/completions", json={**body, "messages": messages, "kv_transfer_params": params}
        )
        assert answer.status_code == 200, answer.text
        turns += 1
        message = answer.json()["choices"][0]["message"]
        messages.append(message)
        if not message["tool_calls"]:
            return turns, messages
        for call in message["tool_calls"]:
            result = json.dumps(json.loads(call["function"]["arguments"]))
            messages.append({"role": "tool", "tool_call_id": call["id"], "content": result})


async def test_many_conversations_move_once_and_hit_the_cache_afterwards() -> None:
    async with (
        EmulatedFleet(default_fleet(time_scale=0.02)) as fleet,
        httpx2.AsyncClient(timeout=50, limits=httpx2.Limits(max_connections=100)) as client,
    ):
        done = await asyncio.gather(*(converse(client, fleet, number) for number in range(24)))
        again = await converse(client, fleet, 5)
        assert again[1] == done[5][1]
        turns = [count for count, _ in done]
        assert min(turns) >= 3
        assert max(turns) <= 12
        records = [record for engine in fleet.decoders for record in engine.requests]
        pulls = [record for record in records if record.kv == "pull+hold"]
        assert len(pulls) == 25
        assert sum(len(engine.requests) for engine in fleet.prefillers) == 25
        follow_ups = [record for record in records if record.kv == "hold"]
        assert len(follow_ups) == sum(turns) + again[0] - 25
        cached = sum(record.cached_tokens for record in follow_ups)
        assert cached / sum(record.prompt_tokens for record in follow_ups) > 0.7


def test_histogram_buckets_are_cumulative_and_inclusive() -> None:
    histogram = Histogram((1.0, 2.0))
    for value in (0.5, 1.0, 1.5, 3.0):
        histogram.observe(value)
    assert histogram.buckets() == [("1.0", 2), ("2.0", 3), ("+Inf", 4)]
    assert (histogram.sum, histogram.count) == (6.0, 4)
