"""The turn itself: find its place, prefill and migrate if it is due, open the decoder's answer, fail over once."""

from __future__ import annotations

from dataclasses import dataclass

import httpx2

from conserve_sdk._bodies import TurnBody, wire_path
from conserve_sdk._lineage import LineageMatch, PromptDigest
from conserve_sdk._registry import LeaseRef
from conserve_sdk._turn.budget import Budget
from conserve_sdk._turn.effects import Discard, Flow, Opened
from conserve_sdk._turn.kit import TurnKit
from conserve_sdk._turn.ledger import ActiveTurn
from conserve_sdk._turn.legs import DecoderDown, Legs
from conserve_sdk._turn.placing import Place, Placing
from conserve_sdk._turn.wire import read_headers
from conserve_sdk.core._quick import quick_init
from conserve_sdk.core.units import ConversationId, ModelName

__all__ = ["Answer", "TurnFlow"]


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class Answer:
    """What the application gets.

    Attributes:
        headers: to be added to the response's own.
    """

    opened: Opened
    turn: ActiveTurn
    headers: dict[str, str]


class TurnFlow:
    """One request of the application that is a turn.

    Args:
        kit: what all turns share.
        original: the application's request.
        body: its parsed body.
        match: its place among the conversation's lineages.
        digest: of its prompt.
        budget: its time.
        parent: the conversation that this one is a part of, where the application says so.
    """

    def __init__(
        self,
        kit: TurnKit,
        *,
        original: httpx2.Request,
        body: TurnBody,
        match: LineageMatch,
        digest: PromptDigest,
        budget: Budget,
        parent: ConversationId | None = None,
    ) -> None:
        path = wire_path(original.url.path)
        ref = LeaseRef(match.conversation_id, match.lineage, ModelName(body.model))
        self._kit = kit
        incoming = read_headers(original.headers)
        self._turn = ActiveTurn(
            kit, ref=ref, match=match, digest=digest, path=path, streams=body.stream, trace=incoming.trace
        )
        self._placing = Placing(kit, turn=self._turn, budget=budget, may_move=not body.local_because, parent=parent)
        self._legs = Legs(
            kit, turn=self._turn, original=original, kept=incoming.kept, body=body, budget=budget, path=path
        )

    def run(self) -> Flow[Answer]:
        """Up to the first bytes of the answer; whoever reads the rest calls `turn.finish`."""
        try:
            opened = yield from self._run()
        except BaseException as error:
            self._turn.finish(error)
            raise
        self._turn.answered()
        return Answer(opened=opened, turn=self._turn, headers=self._headers())

    def _run(self) -> Flow[Opened]:
        while True:
            place = yield from self._placing.find()
            try:
                return (yield from self._legs.answer(place))
            except DecoderDown as down:
                if not (yield from self._fails_over(place, down)):
                    return down.give_up()
            finally:
                self._placing.settle(place)

    def _fails_over(self, place: Place, down: DecoderDown) -> Flow[bool]:
        """Arrange for another decoder, at most once per turn and only before the first byte."""
        turn = self._turn
        turn.engine_failed(place.plan.decoder, phase="decode", detail=down.detail)
        if turn.failovers:
            return False
        turn.failovers += 1
        turn.lost("decoder_failed")
        try:
            yield from self._placing.replace(place, down.detail)
        except Exception as error:
            # The engine's own failure is what the application should see; why no other decoder came is its cause.
            if down.error is not None:
                raise down.error from error
            return False
        except BaseException:  # cancelled meanwhile: nobody else knows of that response
            if down.opened is not None:
                yield Discard(opened=down.opened)
            raise
        if down.opened is not None:
            yield Discard(opened=down.opened)
        return True

    def _headers(self) -> dict[str, str]:
        turn = self._turn
        shown = {
            "x-conserve-lease": turn.lease.lease_id if turn.lease else "",
            "x-conserve-decoder": turn.decoder.engine_id if turn.decoder else "",
            "x-conserve-prefiller": turn.prefiller.engine_id if turn.prefiller and turn.migrated else "",
            "x-conserve-mode": turn.lease.mode if turn.lease else "",
            "x-conserve-turn": str(turn.turn),
            "x-conserve-loss": turn.loss,
        }
        return {name: value for name, value in shown.items() if value}
