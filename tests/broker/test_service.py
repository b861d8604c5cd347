"""The shell: durable before answered, waiting, recovery, shutting down. Without HTTP and without engines."""

import asyncio
import contextlib
import gc
import json
import logging
import sqlite3
from collections.abc import AsyncIterator, Sequence
from concurrent.futures import Future
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from conserve_broker.clock import BrokerClock
from conserve_broker.journal import Journal, JournalError, MemoryJournal
from conserve_broker.logbook import LOGGER_NAME
from conserve_broker.service import BrokerService, Waiter
from conserve_sdk._desk import Reply, find_route
from conserve_sdk.core import (
    PAPER,
    BrokerSettings,
    EngineConfigured,
    EngineId,
    EngineSpec,
    Lease,
    Ms,
    TenantId,
    Tokens,
)
from conserve_sdk.protocol import BatchAnswer, LeaseExplanation, LeaseGrant, Problem
from conserve_sdk.testing import FakeClock, small_fleet

from .in_process import SIGNER, observe

SETTINGS = BrokerSettings(placement=PAPER)
BIG = 32_000
BUDGET_S = 30.0
# Two big conversations fill the decoder.
FLEET = tuple(
    replace(spec, kv_capacity_tokens=Tokens(2 * BIG + 5_000)) for spec in small_fleet(prefillers=1, decoders=1)
)


class HeldJournal(MemoryJournal):
    """Commits when told to, or fails."""

    def __init__(self) -> None:
        super().__init__()
        self.hold = False
        self.failure = ""
        self.held: list[tuple[Sequence[Any], Future[None]]] = []
        self.holds = asyncio.Event()

    def submit(self, changes: Sequence[Any]) -> Future[None]:
        if not self.hold and not self.failure:
            return super().submit(changes)
        done: Future[None] = Future()
        done.set_running_or_notify_cancel()
        if self.failure:
            done.set_exception(JournalError(self.failure))
        else:
            self.held.append((changes, done))
            self.holds.set()
        return done

    def commit(self) -> None:
        self.hold = False
        held, self.held = self.held, []
        for changes, done in held:
            super().submit(changes)
            done.set_result(None)


def service_of(journal: MemoryJournal, *, engines: Sequence[EngineSpec] = FLEET, **options: Any) -> BrokerService:
    return BrokerService(options.pop("settings", SETTINGS), engines=engines, signer=SIGNER, journal=journal, **options)


async def send(service: BrokerService, method: str, path: str, body: Any = None, **options: Any) -> Reply | Waiter:
    route, target = find_route(method, path)
    raw = b"" if body is None else json.dumps(body).encode()
    return await service.handle(route, tenant=TenantId("default"), target=target, raw=raw, **options)


def request(conversation: str, *, tokens: int = BIG, wait_ms: int = 0) -> dict[str, Any]:
    return {
        "conversation_id": conversation,
        "lineage": "main",
        "model": "test-model",
        "first_turn_input_tokens": tokens,
        "wait_ms": wait_ms,
    }


async def ask(service: BrokerService, conversation: str, **changes: Any) -> Reply:
    answer = await send(service, "POST", "/v1/leases", request(conversation, **changes))
    return await answer.reply() if isinstance(answer, Waiter) else answer


async def granted(service: BrokerService, conversation: str, **changes: Any) -> LeaseGrant:
    reply = await ask(service, conversation, **changes)
    assert isinstance(reply.body, LeaseGrant), reply
    return reply.body


async def turn(service: BrokerService, grant: LeaseGrant, *, tokens: int = 500) -> BatchAnswer:
    report = {"kind": "turn_finished", "token": grant.token, "prompt_tokens": tokens, "completion_tokens": 12}
    reply = await send(service, "POST", "/v1/reports", {"reports": [report]})
    assert isinstance(reply, Reply)
    assert isinstance(reply.body, BatchAnswer)
    return reply.body


def code(reply: Reply) -> str:
    assert isinstance(reply.body, Problem)
    return reply.body.code


async def settle() -> None:
    """Let everything that can run now run."""
    for _ in range(20):
        await asyncio.sleep(0)


@pytest.fixture
async def journal() -> HeldJournal:
    return HeldJournal()


@pytest.fixture
async def service(journal: HeldJournal) -> AsyncIterator[BrokerService]:
    async with service_of(journal) as running:
        observe(running)
        yield running
        journal.failure, journal.hold = "", False


# ---- durable before answered ------------------------------------------------------------------------------------


async def test_a_grant_leaves_only_when_it_is_durable(service: BrokerService, journal: HeldJournal) -> None:
    journal.hold = True
    first = asyncio.create_task(ask(service, "c"))
    await settle()
    again = asyncio.create_task(ask(service, "c"))
    await settle()
    assert service.core.lease_count() == 1
    assert not first.done()
    assert not again.done(), "a reused lease waits for the commit that makes it durable, too"
    assert journal.load().leases == ()
    journal.commit()
    answers = [await first, await again]
    assert [answer.status for answer in answers] == [201, 200]
    [stored] = journal.load().leases
    assert isinstance(answers[0].body, LeaseGrant)
    assert stored.lease_id == answers[0].body.lease_id


async def test_a_renewal_waits_for_nobodys_commit(service: BrokerService, journal: HeldJournal) -> None:
    grant = await granted(service, "c")
    journal.hold = True
    pending = asyncio.create_task(ask(service, "other"))
    await settle()
    reply = await send(service, "POST", "/v1/renewals", {"tokens": [grant.token]})
    assert isinstance(reply, Reply)
    assert not pending.done()
    journal.commit()
    assert (await pending).status == 201


async def test_a_waiting_request_is_answered_once_its_grant_is_durable(
    service: BrokerService, journal: HeldJournal
) -> None:
    first, second = await granted(service, "a"), await granted(service, "b")
    waiter = await send(service, "POST", "/v1/leases", request("late", wait_ms=60_000))
    assert isinstance(waiter, Waiter)
    late = asyncio.create_task(waiter.reply())
    journal.hold = True
    release = asyncio.create_task(send(service, "DELETE", f"/v1/leases/{first.lease_id}", lease_token=first.token))
    await settle()
    assert service.core.lease_count() == 2
    assert not late.done()
    journal.commit()
    released = await release
    assert isinstance(released, Reply)
    assert released.status == 204
    assert (await late).status == 201
    assert {lease.key.conversation_id for lease in journal.load().leases} == {"b", "late"}
    assert second.lease_id in {lease.lease_id for lease in journal.load().leases}


# ---- a journal that fails ---------------------------------------------------------------------------------------


async def test_without_a_journal_running_conversations_go_on_and_no_new_one_starts(
    service: BrokerService, journal: HeldJournal
) -> None:
    running = await granted(service, "running", tokens=500)
    journal.failure = "journal: disk full; make room"
    refused = await ask(service, "new", tokens=500)
    assert (refused.status, code(refused)) == (503, "journal_failed")
    assert isinstance(refused.body, Problem)
    assert "disk full; make room" in refused.body.detail
    assert refused.headers["retry-after"] == "1"
    assert [lease.lease_id for lease in service.core.leases()] == [running.lease_id], "what was not durable is undone"
    assert (await turn(service, running)).results[0].verdict == "ok"
    superseded = await send(
        service,
        "POST",
        f"/v1/leases/{running.lease_id}/supersede",
        {"token": running.token, "epoch": 1, "reason": "decoder failed"},
    )
    assert isinstance(superseded, Reply)
    assert superseded.status == 201
    assert not service.readiness().ready
    assert "disk full" in service.readiness().reasons[0]
    journal.failure = ""
    assert (await ask(service, "new", tokens=500)).status == 201
    assert service.readiness().ready


async def test_a_reused_lease_that_never_got_durable_is_not_answered_either(
    service: BrokerService, journal: HeldJournal
) -> None:
    journal.hold = True
    first = asyncio.create_task(ask(service, "c"))
    await settle()
    again = asyncio.create_task(ask(service, "c"))
    async with asyncio.timeout(BUDGET_S):
        await journal.holds.wait()
    [(_, commit)] = journal.held
    commit.set_exception(JournalError("journal: disk full"))
    assert [code(await first), code(await again)] == ["journal_failed"] * 2
    journal.hold = False
    assert service.core.lease_count() == 0


# ---- waiting and timers -----------------------------------------------------------------------------------------


async def test_the_timer_refuses_at_the_deadline(service: BrokerService) -> None:
    await granted(service, "a")
    await granted(service, "b")
    refused = await ask(service, "late", wait_ms=30)
    assert code(refused) == "no_capacity"
    assert service.core.waiting() == 0


async def test_the_timer_expires_leases(journal: HeldJournal) -> None:
    async with service_of(journal, settings=BrokerSettings(ttl_ms=Ms(40)), grace_ms=0) as service:
        observe(service)
        await granted(service, "a")
        async with asyncio.timeout(30):
            while service.core.lease_count():  # noqa: ASYNC110  # expiry has no event to wait for
                await asyncio.sleep(0.005)
    assert journal.load().leases == ()


async def test_who_goes_away_leaves_the_queue(service: BrokerService) -> None:
    await granted(service, "a")
    await granted(service, "b")
    waiter = await send(service, "POST", "/v1/leases", request("late", wait_ms=60_000))
    assert isinstance(waiter, Waiter)
    assert service.core.waiting() == 1
    waiter.cancel()
    assert service.core.waiting() == 0
    waiter.cancel()
    with pytest.raises(asyncio.CancelledError):
        await waiter.reply()


# ---- recovery ---------------------------------------------------------------------------------------------------


async def test_a_restart_finds_every_lease_again(journal: HeldJournal) -> None:
    async with service_of(journal) as before:
        observe(before)
        grants = [await granted(before, name, tokens=1_000) for name in ("a", "b", "c")]
        await turn(before, grants[0], tokens=7_000)
        live = {lease.lease_id: lease for lease in before.core.leases()}
        leased = [view.kv_leased_tokens for view in before.core.engines()]
    async with service_of(journal, grace_ms=30_000) as after:
        observe(after)
        recovered = {lease.lease_id: lease for lease in after.core.leases()}
        assert recovered.keys() == live.keys()
        assert [_identity(lease) for lease in recovered.values()] == [_identity(live[key]) for key in recovered]
        assert [view.kv_leased_tokens for view in after.core.engines()] == leased == [9_012, 0]
        assert (await turn(after, grants[0])).results[0].verdict == "ok"


async def test_after_a_restart_a_receipt_is_whole_when_somebody_asks(tmp_path: Path) -> None:
    """For leases that changed since and those that did not, and when an older broker wrote them."""
    path = tmp_path / "leases.db"
    async with service_of(Journal.open(path)) as before:
        observe(before)
        grant, other = await granted(before, "a", tokens=1_000), await granted(before, "b", tokens=1_000)
        await turn(before, grant)
        told = [await explained(before, each) for each in (grant, other)]
    assert [len(each.decision.candidates) for each in told] == [2, 2]
    for older in (False, True, False):
        if older:
            _as_format_3(path)
        async with service_of(Journal.open(path)) as after:
            observe(after)
            await turn(after, grant)
            assert [(await explained(after, each)).decision for each in (grant, other)] == [
                each.decision for each in told
            ]
            assert {lease.receipt.rule for lease in after.core.leases()} == {"most_free_kv"}
    async with service_of(Journal.open(path)) as again:
        again._journal._file._db.execute("ALTER TABLE lease RENAME TO away")  # type: ignore[attr-defined]
        alone = await explained(again, grant)
    assert (alone.decision.rule, alone.decision.candidates) == ("most_free_kv", ())


def _as_format_3(path: Path) -> None:
    """Turn the journal into one whose rows have the whole receipt as a second line."""
    with contextlib.closing(sqlite3.connect(path, isolation_level=None)) as older:
        for lease_id, row, candidates in older.execute("SELECT * FROM lease").fetchall():
            *head, summary = json.loads(row)
            lines = json.dumps(head) + "\n" + json.dumps([*summary, json.loads(candidates)])
            older.execute("UPDATE lease SET row = ? WHERE lease_id = ?", (lines, lease_id))
        older.execute("ALTER TABLE lease DROP COLUMN candidates")
        older.execute("PRAGMA user_version = 3")


async def explained(service: BrokerService, grant: LeaseGrant) -> LeaseExplanation:
    reply = await send(service, "GET", f"/v1/leases/{grant.lease_id}/explain")
    assert isinstance(reply, Reply)
    assert isinstance(reply.body, LeaseExplanation)
    return reply.body


def _identity(lease: Lease) -> tuple[Any, ...]:
    return (lease.key, lease.epoch, lease.mode, lease.decoder, lease.prefiller, lease.ledger_tokens, lease.receipt)


async def test_draining_outlives_a_restart(journal: HeldJournal) -> None:
    async with service_of(journal) as before:
        await send(before, "POST", "/v1/engines/d0/drain")
    assert journal.load().draining == (EngineId("d0"),)
    async with service_of(journal) as after:
        observe(after)
        assert {view.engine_id: view.draining for view in after.core.engines()} == {"d0": True, "p0": False}
        await send(after, "POST", "/v1/engines/d0/undrain")
    assert journal.load().draining == ()


async def test_leases_on_engines_that_left_the_configuration_end(journal: HeldJournal) -> None:
    async with service_of(journal) as before:
        observe(before)
        grant = await granted(before, "a")
    async with service_of(journal, engines=small_fleet(prefillers=1, decoders=0)) as after:
        assert after.core.lease_count() == 0
        reply = await send(after, "POST", "/v1/renewals", {"tokens": [grant.token]})
        assert isinstance(reply, Reply)
        assert isinstance(reply.body, BatchAnswer)
        assert reply.body.results[0].verdict == "engine_lost"
    assert journal.load().leases == ()


async def test_the_clock_is_not_before_what_the_journal_knows(journal: HeldJournal) -> None:
    ahead = FakeClock()
    async with service_of(journal, clock=BrokerClock(lambda: ahead.now_ms() * 1_000_000)) as before:
        observe(before)
        await granted(before, "a")
    behind = BrokerClock(lambda: (ahead.now_ms() - 60_000) * 1_000_000)
    async with service_of(journal, clock=behind) as after:
        assert after.clock.now_ms() == ahead.now_ms()


async def test_garbage_collection_is_frozen_when_asked(journal: HeldJournal) -> None:
    frozen = gc.get_freeze_count()
    async with service_of(journal, freeze_gc=True):
        assert gc.get_freeze_count() > frozen
    gc.unfreeze()


# ---- the end ----------------------------------------------------------------------------------------------------


async def test_shutting_down_answers_who_waits(journal: HeldJournal) -> None:
    service = service_of(journal)
    await service.start()
    observe(service)
    await granted(service, "a")
    await granted(service, "b")
    waiter = await send(service, "POST", "/v1/leases", request("late", wait_ms=60_000))
    assert isinstance(waiter, Waiter)
    await service.stop()
    assert code(await waiter.reply()) == "shutting_down"
    assert code(await ask(service, "another")) == "shutting_down"
    assert "shutting down" in service.readiness().reasons[0]
    assert len(journal.load().leases) == 2


async def test_shutting_down_as_somebody_leaves_harms_nobody(journal: HeldJournal) -> None:
    service = service_of(journal)
    await service.start()
    observe(service)
    await granted(service, "a")
    await granted(service, "b")
    leaving = await send(service, "POST", "/v1/leases", request("late", wait_ms=60_000))
    staying = await send(service, "POST", "/v1/leases", request("later", wait_ms=60_000))
    assert isinstance(leaving, Waiter)
    assert isinstance(staying, Waiter)
    task = asyncio.create_task(leaving.reply())
    await settle()
    task.cancel()
    await service.stop()
    assert code(await staying.reply()) == "shutting_down"
    with pytest.raises(asyncio.CancelledError):
        await task


async def test_events_after_the_end_change_nothing(journal: HeldJournal) -> None:
    service = service_of(journal)
    await service.start()
    service.abandon()
    service.feed(EngineConfigured(now_ms=service.clock.now_ms(), spec=small_fleet(decoders=3)[-1]))
    assert len(service.core.engines()) == 2


async def test_readiness_names_what_is_missing(journal: HeldJournal) -> None:
    async with service_of(journal) as service:
        assert service.readiness().reasons == ("no engine is ready: see /v1/engines",)
        observe(service)
        assert service.readiness().ready


async def test_decisions_are_logged_without_what_was_said(
    journal: HeldJournal, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level(logging.INFO, logger=LOGGER_NAME)
    async with service_of(journal) as service:
        observe(service)
        grant = await granted(service, "secret-conversation")
        await ask(service, "too-much", tokens=BIG)
        await ask(service, "waits", wait_ms=1)
        await send(service, "DELETE", f"/v1/leases/{grant.lease_id}", lease_token=grant.token)
        await granted(service, "lost")
        observe(service, incarnation="two")
    events = [record.getMessage().split()[0] for record in caplog.records]
    assert "event='lease_granted'" in events
    assert "event='lease_refused'" in events
    assert "event='lease_waiting'" in events
    assert "event='engine_state'" in events
    dropped = [record for record in caplog.records if "lease_dropped" in record.getMessage()]
    assert "reason='released'" in dropped[0].getMessage()
    assert (dropped[-1].levelname, "engine_restarted" in dropped[-1].getMessage()) == ("WARNING", True)
    assert grant.lease_id in caplog.text
    assert grant.token not in caplog.text


# ---- the clock --------------------------------------------------------------------------------------------------


def test_the_clock_stands_still_while_the_system_clock_is_behind() -> None:
    times = iter([5_000_000_000, 3_000_000_000, 5_000_000_001, 6_000_000_000])
    clock = BrokerClock(lambda: next(times))
    assert [clock.now_ms() for _ in range(4)] == [5_000, 5_000, 5_000, 6_000]
    clock.not_before(Ms(9_000))
    times = iter([7_000_000_000])
    assert clock.now_ms() == 9_000
