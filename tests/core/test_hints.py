"""Where a lease is better off: on engines that hold a shared preamble or its history, unless they lose caches."""

from __future__ import annotations

from dataclasses import replace

import pytest

from conserve_sdk.core import (
    AFFINITY,
    BrokerSettings,
    EngineId,
    Incarnation,
    Mode,
    PrefillerHosts,
    PrefixKey,
    Role,
    Tokens,
)
from conserve_sdk.core.prefixes import PREFIXES_MAX
from tests.core.world import SCORE_ALONE, World, granted, spec


class TestSharedPrefix:
    """Engines that hold a preamble need not prefill it."""

    KEY = PrefixKey("tools-and-system")

    def world(self) -> World:
        preset = replace(SCORE_ALONE, prefiller_hosts=PrefillerHosts.NEVER)
        return World(settings=BrokerSettings(placement=preset), fleet=[spec("d0"), spec("p0", Role.PREFILLER)])

    def learn(self, here: World, cached: int, conversation: str = "first") -> None:
        lease = here.grant(conversation, 5_000, prefix_key=self.KEY)
        assert lease.mode is Mode.LOCAL
        here.finish(lease, 5_000, prompt_tokens=Tokens(5_000), cached_tokens=Tokens(cached))
        here.release(lease)

    def uncached(self, here: World, key: str | None = None) -> int:
        lease = here.grant("next", 5_000, prefix_key=PrefixKey(self.KEY if key is None else key))
        here.release(lease)
        return next(each.uncached_tokens for each in lease.receipt.candidates if each.role == "decoder")

    def test_its_length_is_learned_from_first_turns(self) -> None:
        here = self.world()
        self.learn(here, 0)
        assert self.uncached(here) == 5_000
        self.learn(here, 4_000, "second")
        assert self.uncached(here) == 1_000
        self.learn(here, 4_400, "third")
        assert self.uncached(here) == 900

    def test_a_first_turn_that_is_all_preamble_is_tiny(self) -> None:
        here = self.world()
        self.learn(here, 4_745)
        here.observe("d0", running=500)
        lease = here.grant("next", 5_000, prefix_key=self.KEY)
        assert (lease.mode, lease.receipt.prefill_rule) == (Mode.LOCAL, "below_minimum")
        assert here.view("d0").backlog_tokens == 255

    def test_another_preamble_or_none_is_not_cached(self) -> None:
        here = self.world()
        self.learn(here, 4_000)
        assert self.uncached(here, "other") == 5_000
        assert self.uncached(here, "") == 5_000

    def test_a_restart_forgets_it(self) -> None:
        here = self.world()
        self.learn(here, 4_000)
        here.observe("d0", incarnation=Incarnation("i2"))
        assert self.uncached(here) == 5_000

    def test_after_a_migration_both_engines_hold_it_and_the_report_teaches_no_length(self) -> None:
        here = self.world()
        here.observe("d0", running=50)
        lease = here.grant("first", 5_000, prefix_key=self.KEY)
        assert lease.mode is Mode.MIGRATE
        here.finish(lease, 5_000, cached_tokens=Tokens(4_990))
        here.observe("d0")
        assert self.uncached(here) == 5_000

    def test_later_turns_teach_nothing(self) -> None:
        here = self.world()
        lease = here.grant("first", 5_000, prefix_key=self.KEY)
        here.finish(lease, 5_000, cached_tokens=Tokens(4_000))
        here.finish(lease, 9_000, cached_tokens=Tokens(5_000))
        assert self.uncached(here) == 1_000

    def test_a_successor_begins_with_the_same_preamble(self) -> None:
        here = self.world()
        self.learn(here, 4_000)
        lease = here.grant("c", 5_000, prefix_key=self.KEY)
        successor = granted(here.supersede(lease, 5_000)).lease
        here.finish(successor, 5_000, cached_tokens=Tokens(4_400))
        here.release(successor)
        assert self.uncached(here) == 900

    def test_the_oldest_is_forgotten_first(self) -> None:
        here = self.world()
        self.learn(here, 4_000)
        for index in range(PREFIXES_MAX):
            lease = here.grant("c", 300, prefix_key=PrefixKey(f"k{index}"))
            here.finish(lease, 300)
            here.release(lease)
        assert self.uncached(here) == 5_000


class TestHints:
    """The parent's decoder, then the previous one."""

    def test_a_sub_agent_goes_where_its_parent_is(self) -> None:
        here = World(settings=BrokerSettings(placement=AFFINITY))
        parent = here.grant("parent", 2_000, hint=EngineId("d1"))
        child = here.grant("child", 1_000, parent_lease_id=parent.lease_id, hint=EngineId("d0"))
        assert (child.decoder.engine_id, child.receipt.rule) == ("d1", "parent")

    def test_beyond_the_slack_the_hint_is_next(self) -> None:
        here = World(settings=BrokerSettings(placement=AFFINITY))
        parent = here.grant("parent", 2_000, hint=EngineId("d1"))
        here.observe("d1", kv_used_tokens=Tokens(60_000))
        child = here.grant("child", 1_000, parent_lease_id=parent.lease_id, hint=EngineId("d0"))
        assert (child.decoder.engine_id, child.receipt.rule) == ("d0", "hint")

    @pytest.mark.parametrize("kind", ["gone", "another tenant"])
    def test_a_parent_that_is_gone_or_foreign_is_none(self, kind: str) -> None:
        here = World(settings=BrokerSettings(placement=AFFINITY))
        parent = here.grant("parent", 2_000, hint=EngineId("d1"), tenant="t" if kind == "gone" else "u")
        if kind == "gone":
            here.release(parent)
        child = here.grant("child", 1_000, parent_lease_id=parent.lease_id)
        assert (child.decoder.engine_id, child.receipt.rule) == ("d0", "most_free_kv")

    def test_an_engine_that_loses_its_caches_is_no_hint(self) -> None:
        here = World(settings=BrokerSettings(placement=AFFINITY))
        for index in range(6):
            lease = here.grant(f"c{index}", 1_000, hint=EngineId("d1"))
            here.finish(lease, 1_000, prompt_tokens=Tokens(900), cached_tokens=Tokens(16))
            here.finish(lease, 1_200, prompt_tokens=Tokens(1_100), cached_tokens=Tokens(499))
            here.release(lease)
        view = here.view("d1")
        assert (view.lost_caches, here.broker.counters.lost_caches) == (6, 6)
        assert view.lost_share_ppm >= 500_000
        assert here.grant("next", 1_000, hint=EngineId("d1")).decoder.engine_id == "d0"
        here.observe("d1", incarnation=Incarnation("i2"))
        assert (here.view("d1").lost_caches, here.view("d1").lost_share_ppm) == (0, 0)


class TestLostCaches:
    """Follow-up turns that found far less of their KV than was left there."""

    def turns(self, *cached: int, context: int = 1_000) -> World:
        here = World(settings=BrokerSettings(placement=AFFINITY))
        lease = here.grant("c", context, hint=EngineId("d0"))
        for each in cached:
            here.finish(lease, context, prompt_tokens=Tokens(context), cached_tokens=Tokens(each))
        return here

    @pytest.mark.parametrize(("cached", "lost"), [(500, 0), (499, 1), (0, 1)])
    def test_less_than_half_is_lost(self, cached: int, lost: int) -> None:
        view = self.turns(16, cached).view("d0")
        assert (view.lost_caches, view.lost_share_ppm) == (lost, 125_000 * lost)

    def test_one_cached_token_shows_that_an_engine_says_it(self) -> None:
        assert self.turns(1, 0).view("d0").lost_caches == 1

    def test_an_engine_that_never_says_what_it_cached_is_not_judged(self) -> None:
        assert self.turns(0, 0, 0).view("d0").lost_caches == 0

    def test_first_turns_and_tiny_ones_say_nothing(self) -> None:
        assert self.turns(0, 900).view("d0").lost_caches == 0
        assert self.turns(16, 0, context=255).view("d0").lost_caches == 0

    def test_a_report_of_a_lease_whose_engine_left_counts_for_none(self) -> None:
        here = World(settings=BrokerSettings(placement=AFFINITY))
        lease = here.grant("c", 1_000, hint=EngineId("d0"))
        elsewhere = World(settings=here.settings, fleet=[])
        elsewhere.recover(lease)
        elsewhere.finish(lease, 1_000)
        elsewhere.finish(lease, 1_000)
        assert elsewhere.broker.counters.lost_caches == 0
