"""Ways to the engines that go through ConServe's own SDK, and what each costs beside the client."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Awaitable, Callable
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from typing import Any

from conserve_lab.baselines import PerTurnPlanner
from conserve_lab.live.broker_process import BrokerProcess
from conserve_lab.live.fleet import LiveFleet
from conserve_lab.live.policy import Policy
from conserve_lab.replay import Door
from conserve_sdk import ConServe, conversation


async def _settled() -> None:
    """Nothing is left in the background."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OpenDoor:
    """A door in use.

    Attributes:
        settle: ends what it still does in the background, so that it counts as its own.
        cpu_s: CPU seconds so far of processes that serve this door alone, by name.
    """

    door: Door
    settle: Callable[[], Awaitable[object]] = _settled
    cpu_s: Callable[[], dict[str, float]] = dict


@asynccontextmanager
async def conserve_door(
    fleet: LiveFleet, policy: Policy, *, preset: str = "default", broker_url: str = ""
) -> AsyncIterator[OpenDoor]:
    """Open the SDK's door to a fleet.

    Args:
        fleet: the engines.
        policy: `per-turn` and `affinity` bring their own preset.
        preset: of the broker under `conserve`.
        broker_url: a broker that runs already and has the preset that the policy needs; "": start one.

    Raises:
        DemoError: the broker did not start.
    """
    async with AsyncExitStack() as stack:
        broker: BrokerProcess | None = None
        if not broker_url:
            broker = BrokerProcess(_tables(fleet, policy, preset))
            await asyncio.to_thread(broker.__enter__)
            stack.push_async_callback(asyncio.to_thread, broker.__exit__)
            broker_url = broker.url
        planner: dict[str, Any] = {"planner": PerTurnPlanner()} if policy is Policy.PER_TURN else {}
        conserve = await stack.enter_async_context(ConServe(broker_url, on_turn=[], **planner))
        client = await stack.enter_async_context(conserve.async_http_client())
        yield OpenDoor(
            door=Door(
                client=client,
                model=fleet.model,
                inside=conversation,
                finish=conserve.arelease,
                token_ids=fleet.kind != "emulated",  # emulated tokens all show text
            ),
            settle=lambda: asyncio.to_thread(conserve.flush),
            cpu_s=lambda: {"broker": broker.cpu_s()} if broker else {},
        )


def _tables(fleet: LiveFleet, policy: Policy, preset: str) -> dict[str, Any]:
    chosen = {Policy.PER_TURN: "paper", Policy.AFFINITY: "affinity", Policy.CONSERVE: preset}[policy]
    entries = fleet.all_both().entries if policy is Policy.AFFINITY else fleet.entries
    return {
        "listen": {"port": 0},
        "placement": {"preset": chosen},
        "journal": {"path": ""},
        "engine": [dict(entry) for entry in entries],
    }
