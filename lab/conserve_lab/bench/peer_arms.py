"""The arms of `conserve bench peers`: the same engines behind vllm-router and behind ConServe."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Mapping
from contextlib import AsyncExitStack, asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from conserve_lab.bench.router import aggregated, disaggregated, router_with
from conserve_lab.demo.fleets import BOTH, DECODER, FINE, PREFILLER
from conserve_lab.emulator import FleetConfig, fleet_of
from conserve_lab.live.doors import OpenDoor, conserve_door
from conserve_lab.live.fleet import LiveFleet
from conserve_lab.live.policy import Policy
from conserve_lab.replay import Door

_ANSWER_BUDGET_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class PeerArm:
    """One arm.

    Attributes:
        about: for the report.
        disaggregated: one prefiller in front of the decoders; else as many engines that do both.
        preset: of ConServe's broker; "": the arm is vllm-router.
        decode_policy: how the router chooses where to decode.
    """

    name: str
    about: str
    disaggregated: bool
    preset: str = ""
    decode_policy: str = ""

    @property
    def is_peer(self) -> bool:
        """Whether it needs vllm-router."""
        return not self.preset


ARMS: tuple[PeerArm, ...] = (
    PeerArm(
        name="router-pd-hash",
        about="vllm-router, prefill/decode, consistent_hash by session",
        disaggregated=True,
        decode_policy="consistent_hash",
    ),
    PeerArm(
        name="router-pd-sticky",
        about="vllm-router, prefill/decode, sticky_least_loaded",
        disaggregated=True,
        decode_policy="sticky_least_loaded",
    ),
    PeerArm(
        name="router-aggregated",
        about="vllm-router, regular mode, sticky_least_loaded over engines that do both",
        disaggregated=False,
        decode_policy="sticky_least_loaded",
    ),
    PeerArm(name="conserve-default", about="ConServe, preset default", disaggregated=True, preset="default"),
    PeerArm(name="conserve-paper", about="ConServe, preset paper", disaggregated=True, preset="paper"),
    PeerArm(
        name="conserve-affinity",
        about="ConServe, preset affinity over engines that do both",
        disaggregated=False,
        preset="affinity",
    ),
)


def fleet_config(arm: PeerArm, *, prefillers: int, decoders: int, time_scale: float) -> FleetConfig:
    """Return an arm's emulated engines: the same number for every arm, with the flags that suit what it does."""
    if arm.disaggregated:
        flags = FINE if arm.preset == "default" else {}  # its prefillers host, its decoders prefill
        engines = [{"id": f"p{index}", **PREFILLER, **flags} for index in range(prefillers)]
        engines += [{"id": f"d{index}", **DECODER, **flags} for index in range(decoders)]
    else:
        engines = [{"id": f"b{index}", **BOTH} for index in range(prefillers + decoders)]
    return fleet_of(engines, defaults={"time_scale": time_scale, "tool_calls_min": 0, "tool_calls_max": 0})


@asynccontextmanager
async def open_arm(arm: PeerArm, fleet: LiveFleet, *, binary: Path | None, health_s: int) -> AsyncIterator[OpenDoor]:
    """Start what an arm needs in front of its engines.

    Args:
        arm: the arm.
        fleet: its engines.
        binary: of vllm-router, where the arm is one of its.
        health_s: how often it looks whether an engine lives.

    Raises:
        NoRouter: the router does not come up.
        DemoError: the broker does not.
    """
    if arm.preset:
        policy = Policy.CONSERVE if arm.disaggregated else Policy.AFFINITY
        async with conserve_door(fleet, policy, preset=arm.preset) as opened:
            yield opened
        return
    assert binary is not None, "an arm of the router is run where there is one"
    async with AsyncExitStack() as stack:
        running = router_with(binary, [*_flags(arm, fleet), "--health-check-interval-secs", str(health_s)])
        router = await asyncio.to_thread(running.__enter__)
        stack.push_async_callback(asyncio.to_thread, running.__exit__, None, None, None)
        http = await stack.enter_async_context(httpx2.AsyncClient(timeout=10.0, trust_env=False))
        client = await stack.enter_async_context(
            httpx2.AsyncClient(base_url=f"{router.url}/v1", timeout=_ANSWER_BUDGET_S, trust_env=False)
        )

        async def finish(name: str) -> None:
            await http.post(f"{router.url}/finish_session", params={"session_id": name})

        yield OpenDoor(
            door=Door(client=client, model=fleet.model, headers=_session, finish=finish),
            cpu_s=lambda: {"router": router.cpu_s()},
        )


def _session(name: str) -> Mapping[str, str]:
    return {"X-Session-ID": name}


def _flags(arm: PeerArm, fleet: LiveFleet) -> list[Any]:
    if not arm.disaggregated:
        return aggregated(fleet.decoder_urls, policy=arm.decode_policy)
    prefill_policy = "consistent_hash" if arm.decode_policy == "consistent_hash" else "cache_aware"
    return disaggregated(
        fleet.prefiller_urls, fleet.decoder_urls, prefill_policy=prefill_policy, decode_policy=arm.decode_policy
    )
