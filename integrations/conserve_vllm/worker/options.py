"""What `conserve worker` is told."""

from __future__ import annotations

from dataclasses import dataclass, field

__all__ = ["Clash", "WorkerOptions"]


class Clash(ValueError):  # noqa: N818 -- says what happened
    """Options and command contradict each other, or something is missing; the text says what to change."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WorkerOptions:
    """Options before `--`.

    Attributes:
        engine_id: the engine's id in the fleet.
        role: prefiller, decoder or both.
        url: where clients and broker reach the engine; "" derives it from the command.
        model: the name it serves; "" derives it from the command.
        broker_url: where to register; "" registers nowhere.
        worker_key: bearer key of the broker's `worker` scope; "" sends none.
        transfer_group: engines of one group can move KV between each other.
        tier: host tier.
        token_keys: `CONSERVE_GUARD_KEYS`; "" takes the environment's.
        guard: put a `LeaseGuard` in front.
        require_lease: the guard refuses requests without a lease.
        hold_s: how long a decoder keeps a turn's blocks when asked to.
        side_channel_host: where NIXL's handshake listens; "" takes the host of the URL.
        side_channel_port: its port.
        quiet_nixl: let NIXL's progress thread rest between two looks.
        leased_holds: take ConServe's connector, which holds each lease's KV for its own time.
        host_tier_gib: host memory for KV beside the cache; 0: none.
        start_timeout_s: how long the engine may take to be healthy.
        heartbeat_s: time between two heartbeats; the broker forgets the engine after three.
        drain_timeout_s: how long to wait for leases to go after SIGTERM.
    """

    engine_id: str
    role: str
    url: str = ""
    model: str = ""
    broker_url: str = ""
    worker_key: str = field(default="", repr=False)
    transfer_group: str = "nixl"
    tier: str = ""
    token_keys: str = ""
    guard: bool = True
    require_lease: bool = False
    hold_s: int = 30
    side_channel_host: str = ""
    side_channel_port: int = 5600
    quiet_nixl: bool = False
    leased_holds: bool = False
    host_tier_gib: float = 0.0
    start_timeout_s: float = 900.0
    heartbeat_s: float = 5.0
    drain_timeout_s: float = 120.0
