"""A broker with a small fleet, and short ways to say what happens to it."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, TypeVar

from conserve_sdk.core import (
    DEFAULT,
    PAPER,
    Broker,
    BrokerSettings,
    ConversationId,
    Decision,
    EngineConfigured,
    EngineDrained,
    EngineFailureReported,
    EngineId,
    EngineObserved,
    EngineSpec,
    EngineUnreachable,
    EngineView,
    Event,
    Granted,
    Incarnation,
    Lease,
    LeaseAnswered,
    LeaseId,
    LeaseKey,
    LeaseParked,
    LeaseReadopted,
    LeaseReleased,
    LeaseRenewed,
    LeaseRequested,
    LineageId,
    ModelName,
    Ms,
    Ppm,
    Recovered,
    Refused,
    RequestId,
    Role,
    SupersedeRequested,
    TenantId,
    TimerFired,
    Tokens,
    TransferGroup,
    TurnFinished,
    TurnStarted,
)

M = ModelName("m")
T = TypeVar("T")
CAPACITY = 100_000


SCORE_ALONE = replace(DEFAULT, local_below_tokens=Tokens(256), extra_work_ppm=Ppm(1_000_000_000))
"""The score decides of all but tiny prompts, however much a prefiller would compute again."""


def settings(**changes: Any) -> BrokerSettings:
    """The paper's rule, and what a test changes beside it."""
    return BrokerSettings(**{"placement": PAPER, **changes})


def key(conversation: str, *, tenant: str = "t", model: str = "m") -> LeaseKey:
    return LeaseKey(
        tenant=TenantId(tenant),
        conversation_id=ConversationId(conversation),
        lineage=LineageId("main"),
        model=ModelName(model),
    )


def spec(engine_id: str, role: Role = Role.DECODER, **changes: Any) -> EngineSpec:
    values: dict[str, Any] = {
        "engine_id": EngineId(engine_id),
        "url": f"http://{engine_id}",
        "role": role,
        "model": M,
        "transfer_group": TransferGroup("g"),
        "max_hold_ms": Ms(30_000),
    }
    return EngineSpec(**{**values, **changes})


def observed(engine_id: str, now_ms: int = 0, **changes: Any) -> EngineObserved:
    values: dict[str, Any] = {
        "now_ms": Ms(now_ms),
        "engine_id": EngineId(engine_id),
        "incarnation": Incarnation("i1"),
        "models": (M,),
        "kv_capacity_tokens": Tokens(CAPACITY),
        "kv_used_tokens": Tokens(0),
        "block_size_tokens": Tokens(16),
        "max_model_len_tokens": Tokens(32_768),
        "running": 0,
        "waiting": 0,
    }
    return EngineObserved(**{**values, **changes})


def engines(decoders: int = 2, prefillers: int = 1) -> list[EngineSpec]:
    return [
        *(spec(f"d{index}") for index in range(decoders)),
        *(spec(f"p{index}", Role.PREFILLER) for index in range(prefillers)),
    ]


def superseding(
    lease: Lease, tokens: int, *, serial: int, now_ms: int, wait_ms: int = 0, **changes: Any
) -> SupersedeRequested:
    """A holder's wish for another lease, the `serial`-th thing that was asked for."""
    values: dict[str, Any] = {
        "now_ms": Ms(now_ms),
        "request_id": RequestId(f"r{serial}"),
        "lease_id": lease.lease_id,
        "new_lease_id": LeaseId(f"l{serial}"),
        "key": lease.key,
        "epoch": lease.epoch,
        "reason": "test",
        "first_turn_input_tokens": Tokens(tokens),
        "first_turn_input_bytes": 0,
        "deadline_at_ms": Ms(now_ms + wait_ms),
    }
    return SupersedeRequested(**{**values, **changes})


@dataclass
class World:
    """Every method applies one event at `now_ms` and returns its decisions, or the one decision that matters."""

    settings: BrokerSettings = field(default_factory=settings)
    fleet: list[EngineSpec] = field(default_factory=engines)
    now_ms: int = 0
    broker: Broker = field(init=False)
    serial: int = 0

    def __post_init__(self) -> None:
        self.broker = Broker(self.settings)
        for each in self.fleet:
            self.configure(each)
            self.observe(each.engine_id, models=(each.model,))

    # ---- time ----

    def apply(self, event: Event) -> list[Decision]:
        return self.broker.apply(event)

    def at(self, now_ms: int) -> list[Decision]:
        """Let time pass in one jump."""
        self.now_ms = now_ms
        return self.apply(TimerFired(now_ms=Ms(now_ms)))

    def wait(self, span_ms: int) -> list[Decision]:
        return self.at(self.now_ms + span_ms)

    # ---- engines ----

    def configure(self, changed: EngineSpec, *, draining: bool = False) -> list[Decision]:
        return self.apply(EngineConfigured(now_ms=Ms(self.now_ms), spec=changed, draining=draining))

    def observe(self, engine_id: str, **changes: Any) -> list[Decision]:
        return self.apply(observed(engine_id, self.now_ms, **changes))

    def fail(self, engine_id: str, detail: str = "refused") -> list[Decision]:
        return self.apply(EngineUnreachable(now_ms=Ms(self.now_ms), engine_id=EngineId(engine_id), detail=detail))

    def drain(self, engine_id: str, *, draining: bool = True) -> list[Decision]:
        return self.apply(EngineDrained(now_ms=Ms(self.now_ms), engine_id=EngineId(engine_id), draining=draining))

    def blame(self, engine_id: str, incarnation: str = "i1") -> list[Decision]:
        return self.apply(
            EngineFailureReported(
                now_ms=Ms(self.now_ms),
                engine_id=EngineId(engine_id),
                incarnation=Incarnation(incarnation),
                detail="connection refused",
            )
        )

    def view(self, engine_id: str) -> EngineView:
        return next(view for view in self.broker.engines() if view.engine_id == engine_id)

    # ---- leases ----

    def request(self, conversation: str, tokens: int = 1_000, **changes: Any) -> list[Decision]:
        """Ask for a lease; `wait_ms` (default 0), `tenant` and `model` besides the event's own fields."""
        self.serial += 1
        wait_ms = changes.pop("wait_ms", 0)
        names = {name: changes.pop(name) for name in ("tenant", "model") if name in changes}
        values: dict[str, Any] = {
            "now_ms": Ms(self.now_ms),
            "request_id": RequestId(f"r{self.serial}"),
            "lease_id": LeaseId(f"l{self.serial}"),
            "key": key(conversation, **names),
            "first_turn_input_tokens": Tokens(tokens),
            "first_turn_input_bytes": 0,
            "deadline_at_ms": Ms(self.now_ms + wait_ms),
        }
        return self.apply(LeaseRequested(**{**values, **changes}))

    def grant(self, conversation: str, tokens: int = 1_000, **changes: Any) -> Lease:
        return granted(self.request(conversation, tokens, **changes)).lease

    def supersede(self, lease: Lease, tokens: int = 1_000, **changes: Any) -> list[Decision]:
        self.serial += 1
        return self.apply(superseding(lease, tokens, serial=self.serial, now_ms=self.now_ms, **changes))

    def renew(self, lease: Lease) -> LeaseAnswered:
        return answer(self.apply_renewal(lease))

    def apply_renewal(self, lease: Lease) -> list[Decision]:
        return self.apply(LeaseRenewed(now_ms=Ms(self.now_ms), lease_id=lease.lease_id))

    def start(self, lease: Lease, tokens: int = 0) -> list[Decision]:
        return self.apply(TurnStarted(now_ms=Ms(self.now_ms), lease_id=lease.lease_id, input_tokens=Tokens(tokens)))

    def finish(self, lease: Lease, context: int = 0, **changes: Any) -> list[Decision]:
        values: dict[str, Any] = {
            "now_ms": Ms(self.now_ms),
            "lease_id": lease.lease_id,
            "context_tokens": Tokens(context),
            "prompt_tokens": Tokens(0),
            "prompt_bytes": 0,
            "cached_tokens": Tokens(0),
            "prefill_ms": Ms(0),
            "prefill_engine_id": None,
            "migrated": False,
        }
        return self.apply(TurnFinished(**{**values, **changes}))

    def park(self, lease: Lease) -> list[Decision]:
        return self.apply(LeaseParked(now_ms=Ms(self.now_ms), lease_id=lease.lease_id))

    def release(self, lease: Lease) -> list[Decision]:
        return self.apply(LeaseReleased(now_ms=Ms(self.now_ms), lease_id=lease.lease_id))

    def recover(self, *leases: Lease, grace_ms: int = 1_000) -> list[Decision]:
        return self.apply(Recovered(now_ms=Ms(self.now_ms), leases=leases, grace_ms=Ms(grace_ms)))

    def readopt(self, lease: Lease) -> list[Decision]:
        return self.apply(LeaseReadopted(now_ms=Ms(self.now_ms), lease=lease))


def only(kind: type[T], decisions: list[Decision]) -> T:
    found = [decision for decision in decisions if isinstance(decision, kind)]
    assert len(found) == 1, f"expected one {kind.__name__} in {decisions}"
    return found[0]


def granted(decisions: list[Decision]) -> Granted:
    return only(Granted, decisions)


def refused(decisions: list[Decision]) -> Refused:
    return only(Refused, decisions)


def answer(decisions: list[Decision]) -> LeaseAnswered:
    return only(LeaseAnswered, decisions)


def answers(decisions: list[Decision]) -> dict[RequestId, Granted | Refused]:
    return {each.request_id: each for each in decisions if isinstance(each, Granted | Refused)}


def full_world(**changes: Any) -> World:
    """One decoder, all of whose KV is leased to conversation `first`."""
    world = World(fleet=engines(decoders=1), settings=settings(**changes))
    world.observe("d0", max_model_len_tokens=Tokens(0))
    world.grant("first", CAPACITY)
    return world
