"""Waiting for room: in whose order, for how long, and who is let in when."""

from dataclasses import replace

import pytest

from conserve_sdk.core import (
    Granted,
    ModelName,
    Ms,
    RefusalReason,
    RequestCancelled,
    RequestId,
    Tokens,
    Waiting,
)
from tests.core.world import CAPACITY, World, answers, engines, full_world, granted, key, only, refused, spec

# ---- waiting ----


def test_without_patience_there_is_a_refusal_with_a_reason() -> None:
    refusal = refused(full_world().request("c"))
    assert (refusal.reason, refusal.retry_after_ms) == (RefusalReason.NO_CAPACITY, 1_000)
    assert "1000 tokens" in refusal.detail
    assert [each.verdict for each in refusal.receipt.candidates] == ["over_watermark"]
    assert refusal.receipt.rule == "no_capacity"


def test_a_request_waits_and_is_granted_when_room_appears() -> None:
    world = full_world()
    first = next(world.broker.leases())
    world.wait(50)
    assert only(Waiting, world.request("c", wait_ms=5_000)).position == 1
    world.wait(100)
    decisions = world.release(first)
    lease = granted(decisions).lease
    assert (lease.key, lease.receipt.waited_ms, lease.granted_at_ms) == (key("c"), 100, 150)
    assert [type(each).__name__ for each in decisions] == ["LeaseDropped", "LeaseAnswered", "LeaseStored", "Granted"]
    assert world.broker.waiting() == 0


def test_room_appears_when_a_report_shrinks_a_ledger() -> None:
    world = full_world()
    first = next(world.broker.leases())
    world.request("c", wait_ms=5_000)
    assert granted(world.finish(first, CAPACITY - 1_000)).lease.key == key("c")


def test_room_appears_when_a_lease_expires() -> None:
    world = full_world()
    world.request("c", wait_ms=100_000)
    assert world.broker.next_deadline_ms() == 60_000
    world.now_ms = 59_999
    world.observe("d0")
    assert granted(world.at(60_000)).lease.key == key("c")


def test_room_appears_when_an_engine_is_seen_undrained_or_added() -> None:
    world = World(fleet=[])
    world.configure(spec("d0"))
    world.request("a", wait_ms=5_000)
    assert granted(world.observe("d0")).lease.key == key("a")
    world.drain("d0")
    world.request("b", wait_ms=5_000)
    assert granted(world.drain("d0", draining=False)).lease.key == key("b")
    world.configure(replace(spec("d0"), kv_capacity_tokens=Tokens(2_000)))
    world.request("c", wait_ms=5_000)
    assert granted(world.configure(replace(spec("d0"), kv_capacity_tokens=Tokens(9_000)))).lease.key == key("c")


@pytest.mark.parametrize(("late", "left"), [(-1, 1), (0, 0), (1, 0)])
def test_a_request_waits_until_exactly_its_deadline(late: int, left: int) -> None:
    world = full_world()
    world.request("c", wait_ms=5_000)
    assert world.broker.next_deadline_ms() == 5_000
    decisions = world.at(5_000 + late)
    assert world.broker.waiting() == left
    assert [each.reason for each in decisions] == [RefusalReason.NO_CAPACITY] * (1 - left)  # type: ignore[union-attr]


def test_patience_is_bounded_by_the_broker() -> None:
    world = full_world(wait_max_ms=Ms(700))
    world.request("c", wait_ms=5_000)
    assert world.broker.next_deadline_ms() == 700


def test_room_at_the_deadline_is_still_given() -> None:
    world = full_world(ttl_ms=Ms(5_000))
    world.request("c", wait_ms=5_000)
    assert granted(world.at(5_000)).lease.key == key("c")


def test_the_next_in_line_gets_a_look_when_the_head_runs_out_of_time() -> None:
    world = World(fleet=engines(decoders=1))
    world.observe("d0", max_model_len_tokens=Tokens(0))
    world.grant("first", CAPACITY - 1_000)
    world.request("big", CAPACITY, wait_ms=5_000)
    world.request("small", 1_000, wait_ms=5_000)
    outcome = answers(world.at(5_000))
    assert isinstance(outcome[RequestId("r2")], type(refused(list(outcome.values()))))
    assert granted(list(outcome.values())).lease.key == key("small")


def test_nobody_overtakes_in_a_tenants_line() -> None:
    world = World(fleet=engines(decoders=1))
    world.observe("d0", max_model_len_tokens=Tokens(0))
    world.grant("first", CAPACITY - 1_000)
    world.request("big", CAPACITY, wait_ms=5_000)
    assert only(Waiting, world.request("small", 1_000, wait_ms=5_000)).position == 2
    impatient = refused(world.request("impatient", 1_000))
    assert (impatient.reason, impatient.receipt.candidates) == (RefusalReason.NO_CAPACITY, ())
    assert "earlier requests" in impatient.detail


def test_a_head_that_does_not_fit_never_holds_up_another_tenant_or_model() -> None:
    world = World(fleet=[*engines(decoders=1), spec("e0", model=ModelName("n"))])
    world.observe("d0", max_model_len_tokens=Tokens(0))
    world.grant("first", CAPACITY - 1_000)
    world.request("big", CAPACITY, wait_ms=5_000)
    granted(world.request("small", 1_000, tenant="u"))
    granted(world.request("small", 1_000, model="n"))


def test_a_cancelled_request_is_never_answered_and_lets_the_next_in() -> None:
    world = World(fleet=engines(decoders=1))
    world.observe("d0", max_model_len_tokens=Tokens(0))
    world.grant("first", CAPACITY - 1_000)
    world.request("big", CAPACITY, wait_ms=5_000)
    world.request("small", 1_000, wait_ms=5_000)
    decisions = world.apply(RequestCancelled(now_ms=Ms(0), request_id=RequestId("r2")))
    assert answers(decisions).keys() == {"r3"}
    assert world.apply(RequestCancelled(now_ms=Ms(0), request_id=RequestId("r2"))) == []
    assert world.at(5_000) == []


def test_all_who_wait_for_one_key_get_the_same_lease() -> None:
    world = full_world()
    first = next(world.broker.leases())
    for _ in range(3):
        world.request("c", wait_ms=5_000)
    outcome = answers(world.release(first))
    assert {each.lease.lease_id for each in outcome.values() if isinstance(each, Granted)} == {"l2"}
    assert [each.reused for each in outcome.values() if isinstance(each, Granted)] == [False, True, True]
    assert world.broker.waiting() == 0


@pytest.mark.parametrize("conversation", ["d", "first"], ids=["must wait", "is answered at once"])
def test_a_request_id_waits_once(conversation: str) -> None:
    world = full_world()
    world.request("c", wait_ms=5_000)
    with pytest.raises(AssertionError, match="already waits"):
        world.request(conversation, wait_ms=5_000, request_id=RequestId("r2"))
