"""Holds end with their leases: a real broker, the SDK, and guarded engines whose holds belong to leases."""

import asyncio
import contextlib
from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import httpx2
import pytest

from conserve_broker._engine_http import Door
from conserve_broker.hold_releases import OUTCOMES, WAITING_MAX, HoldReleases
from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_lab.emulator import EmulatedFleet, default_fleet
from conserve_sdk import ConServe, conversation
from conserve_sdk._desk import Outcome
from conserve_sdk.core.decisions import Granted, LeaseDropped
from conserve_sdk.core.events import TimerFired, TurnFinished
from conserve_sdk.core.lease import Activity, EngineBinding, Lease, LeaseKey, Mode
from conserve_sdk.core.receipt import Receipt
from conserve_sdk.core.units import EngineId, Incarnation, LeaseId, Ms, RequestId, Tokens
from conserve_sdk.core.vocabulary import DropReason
from conserve_sdk.tokens import SigningKey, TokenSigner
from conserve_vllm import GuardSettings, LeaseGuard
from conserve_vllm.identity import LEASED_MODULE
from tests.broker.broker_process import until

KEY = SigningKey(kid="main", secret=b"a secret of at least thirty-two bytes")
PROMPT = [{"role": "system", "content": "word " * 300}, {"role": "user", "content": "hello"}]
HOLD_MS = 300_000
RECEIPT = Receipt(preset="paper", rule="r", prefill_rule="p", need_tokens=Tokens(1), waited_ms=Ms(0), candidates=())
NOW_MS = 1_800_000_000_000


def guard(engine: Any, *, leased: bool) -> None:
    """Put a guard in front of an emulated engine, inside its app as vLLM's own hook does, and start it anew."""
    module = LEASED_MODULE if leased else None
    server = engine.engine_on_loop._server
    inner = server._app
    inner.state.vllm_config = SimpleNamespace(
        kv_transfer_config=SimpleNamespace(
            kv_connector_module_path=module, kv_connector_extra_config={"kv_lease_duration": HOLD_MS // 1000}
        )
    )
    inner.state.args = SimpleNamespace(served_model_name=[engine.model])
    front = LeaseGuard(
        inner,
        GuardSettings(engine_id=EngineId(engine.id), keys=(KEY,)),
        incarnation=lambda: Incarnation(f"started-{engine.engine_on_loop.live.started_at_s:.2f}"),
    )

    async def app(scope: Any, receive: Any, send: Any) -> None:
        await front({**scope, "app": inner}, receive, send)

    server._app = app
    engine.restart()


@dataclass
class Stage:
    fleet: EmulatedFleet
    broker: BrokerServer
    conserve: ConServe

    def held(self) -> dict[str, int]:
        return {engine.id: engine.held_requests for engine in self.fleet.engines if engine.role == "decoder"}

    def released(self) -> dict[str, int]:
        lines = httpx2.get(f"{self.broker.url}/metrics").text.splitlines()
        name = "conserve_hold_releases_total"
        return {
            outcome: int(float(line.rsplit(" ", 1)[1]))
            for outcome in OUTCOMES
            for line in lines
            if line.startswith(f'{name}{{outcome="{outcome}"}}')
        }

    def turn(self, name: str, more: int = 0) -> None:
        said = [{"role": "assistant", "content": "well"}, {"role": "user", "content": "go on"}] * more
        with conversation(name), self.conserve.openai_client(max_retries=0) as client:
            client.chat.completions.create(model="emulated", messages=PROMPT + said, max_tokens=12)
        assert self.conserve.flush(20)


@contextlib.contextmanager
def staged(*, leased: bool = True, guarded: bool = True, **lease: Any) -> Iterator[Stage]:
    fleet_of = default_fleet(prefillers=1, decoders=2, time_scale=0, leased_holds=leased, kv_lease_ms=HOLD_MS)
    with EmulatedFleet(fleet_of) as fleet, contextlib.ExitStack() as stack:
        for engine in fleet.engines if guarded else ():
            guard(engine, leased=leased)
        tables: dict[str, Any] = {
            "listen": {"port": 0},
            "placement": {"preset": "paper", "re_lease": True},
            "scrape": {"interval_ms": 100},
            "lease": {"hold_ms": HOLD_MS, **lease},
            "token": {"keys": [{"kid": KEY.kid, "secret": KEY.secret.decode()}]},
            "engine": [
                {**engine, "kv_capacity_tokens": 20_000, "max_hold_ms": HOLD_MS} for engine in fleet.broker_engines()
            ],
        }
        broker = stack.enter_context(BrokerServer(BrokerConfig.from_mapping(tables)))
        broker.wait_until_ready(engines=3, timeout_s=40)
        yield Stage(fleet, broker, stack.enter_context(ConServe(broker.url)))


@pytest.fixture
def stage() -> Iterator[Stage]:
    with staged() as opened:
        yield opened


def test_a_conversation_that_ends_frees_what_it_held(stage: Stage) -> None:
    stage.turn("a")
    stage.turn("a", more=1)
    assert sum(stage.held().values()) == 1, "one hold a conversation"
    stage.turn("b")
    stage.conserve.release("a")
    until(lambda: stage.released()["freed"] == 1, what="the release")
    assert sum(stage.held().values()) == 1, "and only its own"
    assert stage.released() == {"freed": 1, "not_offered": 0, "failed": 0, "dropped": 0}


def test_nothing_is_held_for_a_human(stage: Stage) -> None:
    stage.turn("a")
    assert sum(stage.held().values()) == 1
    stage.conserve.park("a")
    until(lambda: sum(stage.held().values()) == 0, what="the release")
    stage.turn("a", more=1)
    assert sum(stage.held().values()) == 1, "the next turn is held as ever"


def test_a_lease_that_expires_frees_what_it_held() -> None:
    with staged(ttl_ms=5_000, park_ttl_ms=5_000, grace_ms=0) as stage:
        stage.turn("a")
        stage.conserve.idle("a")
        until(lambda: stage.released()["freed"] == 1, what="the release")
        assert sum(stage.held().values()) == 0


def test_a_move_frees_the_old_decoder_once_its_history_was_read(stage: Stage) -> None:
    stage.turn("a")
    [old] = [engine_id for engine_id, held in stage.held().items() if held]
    httpx2.post(f"{stage.broker.url}/v1/engines/{old}/drain").raise_for_status()
    stage.turn("a", more=1)  # whose report is answered with the directive
    stage.turn("a", more=2)
    until(lambda: stage.released()["freed"] == 1, what="the release")
    [new] = {"d0", "d1"} - {old}
    assert stage.held() == {old: 0, new: 1}
    reading = [record for record in stage.fleet.engine(old).requests if record.kv == "hold"][-1]
    assert reading.cached_tokens > 250, "it was there to be read"


@pytest.mark.parametrize("guarded", [True, False])
def test_engines_without_such_holds_are_asked_once_in_a_life(guarded: bool) -> None:
    with staged(guarded=guarded, leased=False) as stage:
        for name in ("a", "b", "c", "d", "e"):
            stage.turn(name)
            stage.conserve.release(name)
            until(lambda: stage.released()["not_offered"] >= 1, what="the first answer")
        assert 1 <= stage.released()["not_offered"] <= 2, "at most once each of the two decoders"
        assert stage.released()["freed"] == 0
        assert sum(stage.held().values()) == 5, "they end by themselves"


# ---- the asking itself ---------------------------------------------------------------------------------------------


def lease(number: int = 1, **changes: Any) -> Lease:
    decoder = EngineBinding(engine_id=EngineId("d0"), url="http://d0.invalid", incarnation=Incarnation("life"))
    made = Lease(
        lease_id=LeaseId(f"lease-{number}"),
        key=LeaseKey(tenant="t", conversation_id="c", lineage="main", model="m"),
        epoch=1,
        mode=Mode.LOCAL,
        prefiller=None,
        decoder=decoder,
        granted_at_ms=Ms(NOW_MS),
        ttl_ms=Ms(60_000),
        expires_at_ms=Ms(NOW_MS + 60_000),
        ledger_tokens=Tokens(100),
        hold_ms=Ms(10_000),
        append_threshold_tokens=Tokens(0),
        supersedes=None,
        receipt=RECEIPT,
        activity=Activity.IDLE,
        activity_since_ms=Ms(NOW_MS),
    )
    return replace(made, **changes)


def ended(*leases: Lease, reason: DropReason = DropReason.RELEASED) -> Outcome:
    dropped = tuple(LeaseDropped(lease=each, reason=reason) for each in leases)
    event = TimerFired(now_ms=Ms(NOW_MS))
    return Outcome(reply=None, waiting=None, settled=(), events=(event,), decisions=dropped)


class Asked:
    """Releases over a network that a test answers for."""

    def __init__(self, answer: Any) -> None:
        self.outcomes: list[str] = []
        self.requests: list[httpx2.Request] = []
        self.now_ms = NOW_MS

        def handle(request: httpx2.Request) -> httpx2.Response:
            self.requests.append(request)
            return answer(request) if callable(answer) else httpx2.Response(*answer)

        self.releases = HoldReleases(
            TokenSigner([KEY]),
            now_ms=lambda: Ms(self.now_ms),
            new_transport=lambda: httpx2.MockTransport(handle),
            door_of=lambda _: Door("the engine's key"),
            counted=self.outcomes.append,
        )

    async def told(self, outcome: Outcome) -> list[str]:
        async with self.releases as releases:
            releases.decided(outcome)
            await asyncio.gather(*(line.task for line in releases._lines.values() if line.task is not None))
        return self.outcomes


async def test_the_broker_signs_for_a_lease_that_is_over_and_shows_the_engines_key() -> None:
    asked = Asked((204,))
    assert await asked.told(ended(lease(expires_at_ms=Ms(NOW_MS - 1)))) == ["freed"]
    [request] = asked.requests
    assert str(request.url) == "http://d0.invalid/conserve/release"
    assert request.headers["authorization"] == "Bearer the engine's key"
    claims = TokenSigner([KEY]).verify(request.headers["x-conserve-lease"], now_ms=Ms(NOW_MS))
    assert claims.lease_id == "lease-1"
    assert NOW_MS < claims.exp_ms <= NOW_MS + 15_000


@pytest.mark.parametrize(
    "nothing_held",
    [
        ended(lease(hold_ms=Ms(0))),
        ended(lease(activity_since_ms=Ms(NOW_MS - 10_000))),
        ended(lease(activity=Activity.PARKED)),
        ended(lease(), reason=DropReason.ENGINE_RESTARTED),
        ended(lease(), reason=DropReason.ENGINE_GONE),
    ],
    ids=["no hold", "over", "parked", "restarted", "gone"],
)
async def test_nobody_is_asked_where_nothing_is_held(nothing_held: Outcome) -> None:
    assert await Asked((204,)).told(nothing_held) == []


def problem(status: int, code: str) -> Any:
    return lambda _: httpx2.Response(status, json={"error": {"code": code}})


def refused(*_: Any) -> httpx2.Response:
    raise httpx2.ConnectError("refused")


@pytest.mark.parametrize(
    ("answer", "outcome"),
    [
        ((404,), "not_offered"),
        ((405,), "not_offered"),
        (problem(409, "holds_not_leased"), "not_offered"),
        (problem(409, "engine_restarted"), "failed"),
        ((502,), "failed"),
        (refused, "failed"),
    ],
    ids=["404", "405", "stock", "restarted", "502", "refused"],
)
async def test_what_becomes_of_a_release(answer: Any, outcome: str) -> None:
    assert await Asked(answer).told(ended(lease())) == [outcome]


@pytest.mark.parametrize("role", ["prefiller", "decoder"])
async def test_kv_that_the_next_lease_still_reads_is_kept_until_its_first_turn_is_over(role: str) -> None:
    asked, old = Asked((204,)), lease(1)
    elsewhere = replace(old.decoder, engine_id=EngineId("d1"))
    engines = {"decoder": elsewhere, "prefiller": old.decoder} if role == "prefiller" else {"decoder": old.decoder}
    new = lease(2, supersedes=old.lease_id, **engines)
    grant = Granted(request_id=RequestId("r"), lease=new, reused=False)
    moved = ended(old, reason=DropReason.SUPERSEDED)
    assert await asked.told(replace(moved, decisions=(*moved.decisions, grant))) == []
    turn = TurnFinished(
        now_ms=Ms(NOW_MS),
        lease_id=new.lease_id,
        context_tokens=Tokens(100),
        prompt_tokens=Tokens(90),
        prompt_bytes=400,
        cached_tokens=Tokens(0),
        prefill_ms=Ms(0),
        prefill_engine_id=None,
        migrated=True,
    )
    assert await asked.told(replace(moved, events=(turn,), decisions=())) == ["freed"]
    [request] = asked.requests
    assert str(request.url).startswith(old.decoder.url)


async def test_kv_of_a_move_that_never_came_about_is_let_go() -> None:
    asked, old = Asked((204,)), lease(1)
    new = lease(2, supersedes=old.lease_id, hold_ms=Ms(0))
    grant = Granted(request_id=RequestId("r"), lease=new, reused=False)
    moved = ended(old, reason=DropReason.SUPERSEDED)
    assert await asked.told(replace(moved, decisions=(grant, *moved.decisions))) == []
    assert await asked.told(ended(new, reason=DropReason.EXPIRED)) == ["freed"]


async def test_an_engine_that_cannot_is_asked_again_in_its_next_life() -> None:
    asked = Asked((404,))
    reborn = replace(lease(3).decoder, incarnation=Incarnation("next life"))
    assert await asked.told(ended(lease(1), lease(2), lease(3, decoder=reborn))) == ["not_offered", "not_offered"]
    assert await asked.told(ended(lease(4, decoder=reborn))) == ["not_offered", "not_offered"]


async def test_a_crowd_waits_in_bounds_and_what_is_over_meanwhile_is_not_asked() -> None:
    asked = Asked((204,))

    def answer(_: httpx2.Request) -> httpx2.Response:
        asked.now_ms += 20_000  # the first one takes so long that the others' time is over
        return httpx2.Response(204)

    asked = Asked(answer)
    await asked.told(ended(*(lease(number) for number in range(WAITING_MAX + 3))))
    assert asked.outcomes == ["dropped"] * 3 + ["freed"]


async def test_a_broker_that_leads_no_more_asks_nobody() -> None:
    asked = Asked((204,))
    async with asked.releases as releases:
        releases.decided(ended(lease(1), lease(2)))
        releases.forget()
    assert asked.requests == []
