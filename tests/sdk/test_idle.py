"""A run has returned: its leases are left to their time."""

from conserve_sdk._registry import LeaseRegistry

from .grants import REF, grant, ref


def test_nobody_waits_for_the_tools_of_an_idle_conversation() -> None:
    registry = LeaseRegistry(jitter=lambda: 1.0)
    for place, lease in ((REF, "L1"), (ref(lineage="busy"), "L2"), (ref(conversation="other"), "L3")):
        registry.store(place, grant(lease), sent_at_ms=0)
        registry.begin_turn(place, arrived_at_ms=0)
        if place.lineage != "busy":
            registry.end_turn(place, now_ms=1_000, loop_goes_on=True)
    assert registry.idle(REF.conversation_id, now_ms=2_000) == 1
    assert [due.lease_id for due in registry.due_renewals(now_ms=30_000)] == ["L2", "L3"]
    assert registry.begin_turn(REF, arrived_at_ms=40_000) == (2, 40_000), "another tool loop begins"
    assert registry.idle(ref(conversation="unknown").conversation_id, now_ms=2_000) == 0
