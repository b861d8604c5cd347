"""The admission queue by itself: order, fairness, deadlines."""

from __future__ import annotations

from hypothesis import given
from hypothesis import strategies as st

from conserve_sdk.core import LeaseId, Ms, RequestId, Tokens
from conserve_sdk.core.admission import AdmissionQueue, Pending
from tests.core.world import key


def pending(name: str, *, tenant: str = "t", model: str = "m", deadline_at_ms: int = 100, tokens: int = 1) -> Pending:
    return Pending(
        request_id=RequestId(name),
        lease_id=LeaseId(name),
        key=key(name, tenant=tenant, model=model),
        input_tokens=Tokens(tokens),
        exact=True,
        asked_at_ms=Ms(0),
        deadline_at_ms=Ms(deadline_at_ms),
    )


def served(queue: AdmissionQueue, *, room: int) -> list[str]:
    """Answer heads while there is room for them."""
    order: list[str] = []

    def answered(head: Pending) -> bool:
        nonlocal room
        if head.input_tokens > room:
            return False
        room -= head.input_tokens
        queue.remove(head.request_id)
        order.append(head.request_id)
        return True

    queue.serve(answered)
    return order


def queue_of(*requests: Pending) -> AdmissionQueue:
    queue = AdmissionQueue()
    for each in requests:
        queue.add(each)
    return queue


def test_one_tenant_is_served_first_in_first_out() -> None:
    queue = queue_of(pending("a"), pending("b"), pending("c"))
    assert served(queue, room=2) == ["a", "b"]
    assert served(queue, room=2) == ["c"]
    assert len(queue) == 0


def test_tenants_are_served_in_turn() -> None:
    queue = queue_of(*(pending(f"t{i}") for i in range(3)), pending("u0", tenant="u"), pending("v0", tenant="v"))
    assert served(queue, room=9) == ["t0", "u0", "v0", "t1", "t2"]


def test_whose_turn_it_is_survives_between_rounds() -> None:
    queue = queue_of(*(pending(f"t{i}") for i in range(3)), *(pending(f"u{i}", tenant="u") for i in range(3)))
    assert [served(queue, room=1) for _ in range(6)] == [["t0"], ["u0"], ["t1"], ["u1"], ["t2"], ["u2"]]


def test_a_large_head_waits_alone() -> None:
    queue = queue_of(pending("big", tokens=9), pending("small"), pending("other", tenant="u"))
    assert served(queue, room=5) == ["other"]
    assert served(queue, room=9) == ["big"]


def test_models_do_not_wait_for_each_other() -> None:
    queue = queue_of(pending("big", tokens=9), pending("n", model="n"))
    assert served(queue, room=5) == ["n"]


def test_who_waits_for_a_key_can_be_found() -> None:
    first, second = pending("a"), pending("b")
    second.key = first.key
    queue = queue_of(first, second)
    assert queue.of_key(first.key) == (first, second)
    queue.remove(first.request_id)
    assert queue.of_key(first.key) == (second,)
    queue.remove(second.request_id)
    assert queue.of_key(first.key) == ()


def test_an_answer_may_empty_other_lines() -> None:
    """One grant answers everyone who waits for the same key, also heads that were about to be offered."""
    queue = queue_of(pending("a"), pending("b", tenant="u"), pending("c", model="n"))
    offered = []

    def answered(head: Pending) -> bool:
        offered.append(head.request_id)
        for name in ("a", "b", "c"):
            queue.remove(RequestId(name))
        return True

    queue.serve(answered)
    assert (offered, len(queue)) == (["a"], 0)


def test_deadlines_come_in_order_and_skip_who_left() -> None:
    queue = queue_of(pending("a", deadline_at_ms=5), pending("b", deadline_at_ms=3), pending("c", deadline_at_ms=3))
    assert queue.next_deadline_ms() == 3
    assert queue.first_overdue(Ms(2)) is None
    overdue = queue.first_overdue(Ms(3))
    assert overdue is not None
    assert overdue.request_id == "b"
    queue.remove(RequestId("b"))
    queue.remove(RequestId("c"))
    assert (queue.next_deadline_ms(), queue.first_overdue(Ms(4))) == (5, None)
    queue.remove(RequestId("a"))
    assert (queue.next_deadline_ms(), queue.remove(RequestId("a"))) == (None, None)


def test_a_request_that_comes_back_has_its_new_deadline() -> None:
    queue = queue_of(pending("a", deadline_at_ms=3))
    queue.remove(RequestId("a"))
    queue.add(pending("a", deadline_at_ms=7))
    assert queue.next_deadline_ms() == 7


@given(st.lists(st.tuples(st.sampled_from("tuv"), st.booleans()), max_size=30))
def test_no_tenant_gets_two_turns_while_another_waits(steps: list[tuple[str, bool]]) -> None:
    queue = AdmissionQueue()
    lines: dict[str, list[str]] = {}
    since: dict[str, int] = {}
    """When each tenant was last served, or began to wait."""
    for number, (tenant, serve) in enumerate(steps):
        name = f"{tenant}{number}"
        if not lines.get(tenant):
            since[tenant] = number
        queue.add(pending(name, tenant=tenant))
        lines.setdefault(tenant, []).append(name)
        if serve:
            (got,) = served(queue, room=1)
            assert lines[got[0]].pop(0) == got, "first in, first out within a tenant"
            assert since[got[0]] == min(since[each] for each in lines if lines[each] or each == got[0])
            since[got[0]] = number
    assert len(queue) == sum(map(len, lines.values()))
    rest = served(queue, room=99)
    for tenant, line in lines.items():
        assert [name for name in rest if name[0] == tenant] == line
