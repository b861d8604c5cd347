"""The registry of leases: their life, single flight of first turns, and which of them are renewed."""

import threading
from concurrent.futures import wait

import pytest

from conserve_sdk._registry import IN_USE_MAX_MS, LeaseRegistry, LeaseView, ServedTurn
from conserve_sdk.core.units import ConversationId, LeaseId
from conserve_sdk.protocol import LeaseStatus

from .grants import REF, grant, ref

L1 = LeaseId("L1")


@pytest.fixture
def registry() -> LeaseRegistry:
    return LeaseRegistry(jitter=lambda: 1.0)


def ok(lease_id: str = "L1", **fields) -> LeaseStatus:
    return LeaseStatus(**{"lease_id": lease_id, "verdict": "ok", "expires_in_ms": 60_000, **fields})


class TestLife:
    def test_an_unknown_entry_is_an_empty_view(self, registry) -> None:
        view = registry.view(REF, now_ms=0)
        assert view == LeaseView(ref=REF)
        assert view.hint_engine_id is None

    def test_lives_from_the_sending_of_its_request_to_the_last_millisecond(self, registry) -> None:
        assert registry.store(REF, grant(), sent_at_ms=1_000).live
        assert registry.view(REF, now_ms=60_999).live
        ended = registry.view(REF, now_ms=61_000)
        assert not ended.live
        assert ended.hint_engine_id == "d0"  # where a prefix may still be
        assert ended.grant.token == "token-L1"

    def test_a_verdict_extends_it_and_brings_a_fresh_token(self, registry) -> None:
        registry.store(REF, grant(), sent_at_ms=0)
        registry.apply_status(ok(token="fresh"), sent_at_ms=30_000)
        view = registry.view(REF, now_ms=89_999)
        assert view.live
        assert view.grant.token == "fresh"
        assert registry.lease_of_token("fresh") == "L1"
        assert registry.lease_of_token("token-L1") is None

    def test_a_verdict_may_shorten_it(self, registry) -> None:
        registry.store(REF, grant(), sent_at_ms=0)
        registry.apply_status(ok(expires_in_ms=10_000), sent_at_ms=5_000)
        assert not registry.view(REF, now_ms=15_000).live

    def test_an_overtaken_verdict_changes_nothing(self, registry) -> None:
        registry.store(REF, grant(), sent_at_ms=10_000)
        registry.apply_status(ok(expires_in_ms=1), sent_at_ms=9_999)
        assert registry.view(REF, now_ms=69_999).live

    @pytest.mark.parametrize("verdict", ["unknown", "superseded", "engine_lost", "bad_token"])
    def test_a_loss_ends_it_and_is_not_undone_by_a_late_yes(self, registry, verdict: str) -> None:
        registry.store(REF, grant(), sent_at_ms=0)
        registry.apply_status(LeaseStatus(lease_id="", verdict=verdict), sent_at_ms=1, lease_id=L1)
        registry.apply_status(ok(), sent_at_ms=2)
        view = registry.view(REF, now_ms=3)
        assert (view.live, view.lost) == (False, verdict)

    def test_the_first_reason_of_a_loss_is_kept(self, registry) -> None:
        registry.store(REF, grant(), sent_at_ms=0)
        registry.mark_lost(L1, "connect_failed")
        registry.apply_status(LeaseStatus(lease_id="L1", verdict="engine_lost"), sent_at_ms=1)
        assert registry.view(REF, now_ms=2).lost == "connect_failed"

    def test_a_new_grant_replaces_a_lost_one(self, registry) -> None:
        registry.store(REF, grant("L1"), sent_at_ms=0)
        registry.mark_lost(L1, "gone")
        view = registry.store(REF, grant("L2", epoch=2), sent_at_ms=5)
        assert (view.live, view.lost, view.grant.lease_id) == (True, "", "L2")
        registry.apply_status(LeaseStatus(lease_id="L1", verdict="superseded"), sent_at_ms=6)  # old news
        registry.mark_migrated(L1)
        view = registry.view(REF, now_ms=7)
        assert (view.live, view.migrated) == (True, False)

    def test_a_new_grant_may_end_earlier_than_the_old_one(self, registry) -> None:
        registry.store(REF, grant("L1"), sent_at_ms=100)
        registry.store(REF, grant("L2", expires_in_ms=1_000), sent_at_ms=50)  # asked earlier, answered later
        assert not registry.view(REF, now_ms=1_050).live

    def test_verdicts_on_unknown_leases_are_no_news(self, registry) -> None:
        registry.apply_status(ok("other"), sent_at_ms=0)
        registry.mark_lost(LeaseId("other"), "x")
        assert registry.view(REF, now_ms=0).grant is None


class TestDirectives:
    def told(self, registry, sent_at_ms: int, **fields) -> str:
        registry.apply_status(ok(**fields), sent_at_ms=sent_at_ms)
        return registry.view(REF, now_ms=sent_at_ms).directive

    def test_stands_until_it_is_withdrawn(self, registry) -> None:
        registry.store(REF, grant(), sent_at_ms=0)
        assert self.told(registry, 1, directive="re_lease", directive_reason="load") == "load"
        assert registry.view(REF, now_ms=50_000).directive == "load"
        assert self.told(registry, 2, directive="re_lease") == "re_lease"
        assert self.told(registry, 3) == ""

    def test_an_overtaken_word_changes_nothing(self, registry) -> None:
        registry.store(REF, grant(), sent_at_ms=0)
        self.told(registry, 10, directive="re_lease")
        assert self.told(registry, 9) == "re_lease"

    def test_what_was_said_before_it_was_followed_does_not_count_again(self, registry) -> None:
        registry.store(REF, grant(), sent_at_ms=0)
        self.told(registry, 10, directive="re_lease")
        registry.mark_followed(L1, now_ms=20)
        assert self.told(registry, 19, directive="re_lease") == ""
        assert self.told(registry, 20, directive="re_lease") == "re_lease"

    def test_ends_with_its_lease(self, registry) -> None:
        registry.store(REF, grant(), sent_at_ms=0)
        self.told(registry, 10, directive="re_lease")
        assert registry.store(REF, grant(reused=True), sent_at_ms=11).directive == "re_lease"
        assert registry.store(REF, grant("L2"), sent_at_ms=12).directive == ""
        registry.apply_status(ok("L1", directive="re_lease"), sent_at_ms=13)
        assert registry.view(REF, now_ms=13).directive == ""

    def test_a_loss_says_nothing_of_it(self, registry) -> None:
        registry.store(REF, grant(), sent_at_ms=0)
        registry.apply_status(LeaseStatus(lease_id="L1", verdict="unknown", directive="re_lease"), sent_at_ms=1)
        assert registry.view(REF, now_ms=1).directive == ""


class TestServed:
    def test_the_decoder_holds_prompt_and_answer_of_the_newest_turn(self, registry) -> None:
        lease = grant()
        registry.store(REF, lease, sent_at_ms=0)
        assert registry.view(REF, now_ms=0).held_tokens == 0
        registry.mark_served(REF, ServedTurn(lease.decoder, 100, 5, 400))
        assert registry.view(REF, now_ms=0).held_tokens == 105

    def test_another_decoder_or_incarnation_holds_nothing(self, registry) -> None:
        lease = grant()
        registry.store(REF, lease, sent_at_ms=0)
        restarted = lease.decoder.model_copy(update={"incarnation": "2"})
        registry.mark_served(REF, ServedTurn(restarted, 100, 5, 400))
        assert registry.view(REF, now_ms=0).held_tokens == 0

    def test_of_a_forgotten_lineage_is_no_news(self, registry) -> None:
        registry.mark_served(REF, ServedTurn(grant().decoder, 100, 5, 400))
        assert registry.view(REF, now_ms=0) == LeaseView(ref=REF)


class TestIdle:
    C = ConversationId("c")

    def test_a_lease_that_waits_for_a_tool_is_not_renewed_any_more(self, registry) -> None:
        registry.store(REF, grant(), sent_at_ms=0)
        registry.begin_turn(REF, arrived_at_ms=0)
        registry.end_turn(REF, now_ms=1_000, loop_goes_on=True)
        assert registry.idle(ConversationId("other"), now_ms=1_000) == 0
        assert len(registry.due_renewals(now_ms=30_000)) == 1
        assert registry.idle(self.C, now_ms=1_000) == 1
        assert registry.idle(self.C, now_ms=1_000) == 0
        assert registry.next_renewal_ms(now_ms=30_000) is None
        assert registry.view(REF, now_ms=30_000).live
        assert registry.begin_turn(REF, arrived_at_ms=40_000) == (2, 40_000)  # another tool loop
        assert registry.next_renewal_ms(now_ms=40_000) == 20_000

    def test_running_turns_and_dead_leases_do_not_count(self, registry) -> None:
        registry.store(REF, grant(), sent_at_ms=0)
        for _ in range(2):
            registry.begin_turn(REF, arrived_at_ms=0)
        registry.end_turn(REF, now_ms=1_000, loop_goes_on=True)
        assert registry.idle(self.C, now_ms=1_000) == 0
        assert registry.next_renewal_ms(now_ms=1_000) == 20_000
        registry.end_turn(REF, now_ms=2_000, loop_goes_on=True)
        assert registry.idle(self.C, now_ms=60_000) == 0  # it has expired, but no tool is waited for either
        assert registry.begin_turn(REF, arrived_at_ms=70_000) == (3, 70_000)


class TestMigrated:
    @pytest.mark.parametrize(
        ("changes", "migrated"),
        [
            ({}, False),
            ({"mode": "local", "prefiller": None}, True),
            ({"migrations": 1, "reused": True}, True),
            ({"turns": 3, "reused": True}, True),
            ({"reused": True}, True),
        ],
    )
    def test_as_the_grant_says(self, registry, changes: dict, migrated: bool) -> None:
        assert registry.store(REF, grant(**changes), sent_at_ms=0).migrated is migrated

    def test_asking_again_for_what_was_granted_here_does_not_take_the_migration_away(self, registry) -> None:
        registry.store(REF, grant(), sent_at_ms=0)
        assert not registry.store(REF, grant(reused=True), sent_at_ms=1).migrated

    def test_once_done_it_stays_done_for_that_lease_only(self, registry) -> None:
        registry.store(REF, grant(), sent_at_ms=0)
        registry.mark_migrated(L1)
        assert registry.store(REF, grant(reused=True), sent_at_ms=1).migrated
        assert not registry.store(REF, grant("L2"), sent_at_ms=2).migrated


class TestSingleFlight:
    def test_one_leads_and_all_others_follow(self, registry) -> None:
        claims = [registry.claim(REF) for _ in range(4)]
        assert [claim.leader for claim in claims] == [True, False, False, False]
        assert registry.claim(ref("other")).leader
        registry.settle(claims[0], grant())
        assert [claim.future.result(timeout=10).lease_id for claim in claims] == ["L1"] * 4
        assert registry.claim(REF).leader

    def test_a_leader_that_gives_up_lets_the_next_one_lead(self, registry) -> None:
        leader, follower = registry.claim(REF), registry.claim(REF)
        registry.settle(leader, None)
        assert follower.future.result(timeout=10) is None
        assert registry.claim(REF).leader

    def test_a_cancelled_follower_disturbs_nobody(self, registry) -> None:
        leader, first, second = (registry.claim(REF) for _ in range(3))
        assert first.future.cancel()
        registry.settle(leader, grant())
        assert second.future.result(timeout=10).lease_id == "L1"
        assert first.future.cancelled()

    def test_settling_again_or_by_a_follower_changes_nothing(self, registry) -> None:
        leader, follower = registry.claim(REF), registry.claim(REF)
        registry.settle(follower, None)
        assert not leader.future.done()
        registry.settle(leader, grant())
        registry.settle(leader, None)
        assert follower.future.result(timeout=10).lease_id == "L1"

    def test_an_old_leader_cannot_settle_the_next_flight(self, registry) -> None:
        old = registry.claim(REF)
        registry.settle(old, None)
        new, follower = registry.claim(REF), registry.claim(REF)
        registry.settle(old, grant("L9"))
        assert not follower.future.done()
        registry.settle(new, grant())
        assert follower.future.result(timeout=10).lease_id == "L1"

    def test_callbacks_may_use_the_registry(self, registry) -> None:
        leader, follower = registry.claim(REF), registry.claim(REF)
        seen = []
        follower.future.add_done_callback(lambda _: seen.append(registry.view(REF, now_ms=0)))
        registry.settle(leader, None)
        assert len(seen) == 1

    def test_exactly_one_of_many_threads_leads(self, registry) -> None:
        barrier, claims = threading.Barrier(16), []

        def run() -> None:
            barrier.wait(timeout=30)
            claims.append(registry.claim(REF))

        threads = [threading.Thread(target=run) for _ in range(16)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        (leader,) = [claim for claim in claims if claim.leader]
        registry.settle(leader, grant())
        assert not wait([claim.future for claim in claims], timeout=10).not_done


class TestTurns:
    def test_turns_count_per_lineage_and_a_tool_loop_keeps_its_arrival(self, registry) -> None:
        assert registry.begin_turn(REF, arrived_at_ms=100) == (1, 100)
        registry.end_turn(REF, now_ms=200, loop_goes_on=True)
        assert registry.begin_turn(REF, arrived_at_ms=300) == (2, 100)
        registry.end_turn(REF, now_ms=400, loop_goes_on=False)
        assert registry.begin_turn(REF, arrived_at_ms=500) == (3, 500)
        assert registry.begin_turn(ref(lineage="other"), arrived_at_ms=600) == (1, 600)
        assert registry.view(REF, now_ms=0).turns == 3

    def test_ending_a_turn_of_a_dropped_entry_is_quiet(self, registry) -> None:
        registry.begin_turn(REF, arrived_at_ms=0)
        assert registry.drop(REF) is None
        registry.end_turn(REF, now_ms=1, loop_goes_on=True)
        assert registry.next_renewal_ms(now_ms=1) is None


class TestRenewals:
    def test_only_leases_in_use_are_renewed(self, registry) -> None:
        registry.store(REF, grant(), sent_at_ms=0)
        assert registry.next_renewal_ms(now_ms=0) is None
        registry.begin_turn(REF, arrived_at_ms=0)
        assert registry.next_renewal_ms(now_ms=0) == 20_000
        assert registry.due_renewals(now_ms=19_999) == []
        assert [due.lease_id for due in registry.due_renewals(now_ms=20_000)] == ["L1"]

    def test_a_running_tool_keeps_it_but_a_human_does_not(self, registry) -> None:
        registry.store(REF, grant(), sent_at_ms=0)
        registry.begin_turn(REF, arrived_at_ms=0)
        registry.end_turn(REF, now_ms=1_000, loop_goes_on=True)
        assert len(registry.due_renewals(now_ms=30_000)) == 1
        registry.begin_turn(REF, arrived_at_ms=30_000)
        registry.end_turn(REF, now_ms=31_000, loop_goes_on=False)
        assert registry.due_renewals(now_ms=31_000) == []
        assert registry.next_renewal_ms(now_ms=31_000) is None

    def test_a_failed_turn_keeps_its_loop_but_is_not_renewed(self, registry) -> None:
        registry.store(REF, grant(), sent_at_ms=0)
        registry.begin_turn(REF, arrived_at_ms=100)
        registry.end_turn(REF, now_ms=200, loop_goes_on=True, waits_for_tools=False)
        assert registry.next_renewal_ms(now_ms=200) is None
        assert registry.begin_turn(REF, arrived_at_ms=300) == (2, 100)
        assert registry.next_renewal_ms(now_ms=300) == 20_000

    def test_two_turns_at_once_both_have_to_end(self, registry) -> None:
        registry.store(REF, grant(), sent_at_ms=0)
        for _ in range(2):
            registry.begin_turn(REF, arrived_at_ms=0)
        registry.end_turn(REF, now_ms=1, loop_goes_on=False)
        assert registry.next_renewal_ms(now_ms=1) == 20_000
        registry.end_turn(REF, now_ms=2, loop_goes_on=False)
        assert registry.next_renewal_ms(now_ms=2) is None

    def test_lost_expired_and_forgotten_leases_are_not_renewed(self, registry) -> None:
        registry.store(REF, grant(), sent_at_ms=0)
        registry.begin_turn(REF, arrived_at_ms=0)
        assert registry.due_renewals(now_ms=60_000) == []
        registry.mark_lost(L1, "gone")
        assert registry.due_renewals(now_ms=20_000) == []

    def test_a_stream_that_nobody_ended_is_not_renewed_for_ever(self, registry) -> None:
        registry.store(REF, grant(ttl_ms=10**8, expires_in_ms=10**8), sent_at_ms=0)
        registry.begin_turn(REF, arrived_at_ms=0)
        assert registry.due_renewals(now_ms=IN_USE_MAX_MS - 1)
        assert not registry.due_renewals(now_ms=IN_USE_MAX_MS)

    def test_every_yes_plans_the_next_one(self, registry) -> None:
        registry.store(REF, grant(), sent_at_ms=0)
        registry.begin_turn(REF, arrived_at_ms=0)
        registry.apply_status(ok(), sent_at_ms=20_000)
        assert registry.next_renewal_ms(now_ms=20_000) == 40_000

    def test_a_short_life_is_renewed_earlier_but_not_in_a_frenzy(self, registry) -> None:
        registry.begin_turn(REF, arrived_at_ms=0)
        registry.store(REF, grant(expires_in_ms=10_000), sent_at_ms=0)
        assert registry.next_renewal_ms(now_ms=0) == 5_000
        registry.apply_status(ok(expires_in_ms=150), sent_at_ms=1_000)
        assert registry.next_renewal_ms(now_ms=1_000) == 1_100

    def test_jitter_spreads_renewals(self) -> None:
        registry = LeaseRegistry(jitter=lambda: 0.0)
        registry.begin_turn(REF, arrived_at_ms=0)
        registry.store(REF, grant(), sent_at_ms=0)
        assert registry.next_renewal_ms(now_ms=0) == 16_000


class TestForgetting:
    def test_a_conversation_gives_back_its_live_leases(self, registry) -> None:
        registry.store(ref(lineage="a"), grant("L1"), sent_at_ms=0)
        registry.store(ref(lineage="b"), grant("L2"), sent_at_ms=0)
        registry.store(ref("other"), grant("L3"), sent_at_ms=0)
        registry.mark_lost(LeaseId("L2"), "gone")
        conversation = ConversationId("c")
        assert [view.grant.lease_id for view in registry.views(conversation, now_ms=1)] == ["L1", "L2"]
        assert [given.lease_id for given in registry.forget(conversation, now_ms=1)] == ["L1"]
        assert registry.views(conversation, now_ms=1) == ()
        assert [given.lease_id for given in registry.live_grants(now_ms=1)] == ["L3"]
        assert registry.live_grants(now_ms=60_000) == []
        assert registry.lease_of_token("token-L1") is None

    def test_drop_returns_the_grant(self, registry) -> None:
        registry.store(REF, grant(), sent_at_ms=0)
        assert registry.drop(REF).lease_id == "L1"
        assert registry.drop(REF) is None

    def test_bounded_and_never_at_the_cost_of_a_lease_in_use(self) -> None:
        registry = LeaseRegistry(entries_max=2)
        registry.begin_turn(ref("busy"), arrived_at_ms=0)
        for name in ("a", "b"):
            registry.store(ref(name), grant(name), sent_at_ms=0)
        assert registry.view(ref("busy"), now_ms=0).turns == 1
        assert registry.view(ref("a"), now_ms=0).grant is None
        assert registry.view(ref("b"), now_ms=0).live
        registry.begin_turn(ref("b"), arrived_at_ms=0)
        registry.begin_turn(ref("c"), arrived_at_ms=0)  # all are in use: the bound gives way
        assert [registry.view(ref(name), now_ms=0).turns for name in ("busy", "b", "c")] == [1, 1, 1]


def test_a_forked_child_starts_without_leases_even_if_the_lock_was_held(registry, fork_and_wait) -> None:
    registry.store(REF, grant(), sent_at_ms=0)

    def child() -> None:
        assert registry.view(REF, now_ms=1).grant is None
        assert registry.claim(REF).leader

    with registry._lock:
        assert fork_and_wait(child) == 0
    assert registry.view(REF, now_ms=1).live
