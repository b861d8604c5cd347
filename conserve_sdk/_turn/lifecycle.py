"""The end of a conversation, and its pauses."""

from __future__ import annotations

import logging

from conserve_sdk._turn.effects import Flow, Park, Release
from conserve_sdk._turn.kit import TurnKit
from conserve_sdk.core.units import ConversationId
from conserve_sdk.errors import BrokerError, LeaseError
from conserve_sdk.protocol import LeaseGrant, LeaseStatus

__all__ = ["park_flow", "release_all_flow", "release_flow"]

log = logging.getLogger("conserve_sdk.turn")


def release_flow(kit: TurnKit, *, conversation: ConversationId) -> Flow[int]:
    """Give back every lease of a conversation and forget it; returns how many were given back."""
    grants = kit.registry.forget(conversation, now_ms=kit.now_ms())
    kit.book.forget(conversation)
    kit.prompts.forget(conversation)
    return (yield from _release(grants))


def release_all_flow(kit: TurnKit) -> Flow[int]:
    """Give back every live lease; returns how many were given back."""
    return (yield from _release(kit.registry.live_grants(now_ms=kit.now_ms())))


def park_flow(kit: TurnKit, *, conversation: ConversationId) -> Flow[int]:
    """Tell the broker that a conversation waits for a human; returns how many leases were parked."""
    parked = 0
    for view in kit.registry.views(conversation, now_ms=kit.now_ms()):
        if not view.live or view.grant is None:
            continue
        sent_at_ms = kit.now_ms()
        try:
            status = yield Park(lease_id=view.grant.lease_id, token=view.grant.token)
            assert isinstance(status, LeaseStatus)
            kit.registry.apply_status(status, sent_at_ms=sent_at_ms)
            parked += status.verdict == "ok"
        except (BrokerError, LeaseError) as error:
            log.info("park_failed lease_id=%s error=%s", view.grant.lease_id, error)
    return parked


def _release(grants: list[LeaseGrant]) -> Flow[int]:
    released = 0
    for grant in grants:
        try:
            yield Release(lease_id=grant.lease_id, token=grant.token)
            released += 1
        except (BrokerError, LeaseError) as error:
            # It will expire by itself.
            log.info("release_failed lease_id=%s error=%s", grant.lease_id, error)
    return released
