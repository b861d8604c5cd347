"""The requests of one attempt: the prefill leg where a migration is due, then the decode leg."""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from typing import Any

import httpx2

from conserve_sdk._bodies import TurnBody, decode_leg, prefill_leg
from conserve_sdk._kind import Kind
from conserve_sdk._kv_params import HOLD, PREFILL, TransferRefused, TransferTicket, read_ticket
from conserve_sdk._slices import slice_legs
from conserve_sdk._tracker import TurnTracker
from conserve_sdk._turn.budget import REACH_PHASES, Budget
from conserve_sdk._turn.effects import Discard, Flow, Opened
from conserve_sdk._turn.hops import REQUEST_ID, EngineRequest, fetch_watched, open_watched
from conserve_sdk._turn.kit import TurnKit
from conserve_sdk._turn.ledger import ActiveTurn
from conserve_sdk._turn.placing import Place
from conserve_sdk._turn.wire import HEADER_LEASE, SESSION_CHARS_MAX, engine_request, engine_target, key_header
from conserve_sdk.identity import HEADER_SESSION
from conserve_sdk.protocol import Binding

__all__ = ["DecoderDown", "Legs"]

log = logging.getLogger("conserve_sdk.turn")

ENGINE_FAULTS = frozenset({500, 502, 503, 504})
"""Answers that speak of the engine, not of the request."""
APPLICATIONS_OWN = frozenset({401, 403, 429})
"""Refusals that another body would not change."""
BROKEN = (httpx2.ReadError, httpx2.WriteError, httpx2.CloseError, httpx2.RemoteProtocolError)
"""The connection broke before the first byte: the engine died, or had closed an idle connection just then."""
UNREACHABLE = (httpx2.ConnectError, httpx2.ConnectTimeout)
REACHING = {httpx2.PoolTimeout: "pool", httpx2.ConnectTimeout: "connect", httpx2.WriteTimeout: "write"}
"""Too late before the engine had the whole request, and which limit says so."""

HEADER_PRIORITY = "X-Vllm-Priority"
"""Lower goes first where the engine schedules by priority, 0 by default; vLLM 0.32 takes it from anybody and elsewhere
ignores it (`entrypoints/generate/base/serving.py`)."""

_SESSION, _REQUEST_ID, _LEASE, _PRIORITY = (
    name.encode("ascii") for name in (HEADER_SESSION, REQUEST_ID, HEADER_LEASE, HEADER_PRIORITY)
)


class DecoderDown(Exception):  # noqa: N818 -- says what happened
    """The decoder could not answer, and no byte of an answer has reached the application.

    Attributes:
        error: what the transport raised, or None.
        opened: the answer that blamed the engine, or None.
    """

    def __init__(
        self, detail: str, *, error: httpx2.TransportError | None = None, opened: Opened | None = None
    ) -> None:
        super().__init__(detail)
        self.detail = detail
        self.error = error
        self.opened = opened

    def give_up(self) -> Opened:
        """What the application gets when nothing else can be done: the engine's own words.

        Raises:
            httpx2.TransportError: there were none.
        """
        if self.opened is not None:
            return self.opened
        assert self.error is not None
        raise self.error


class Legs:
    """Sends the requests of one turn."""

    def __init__(
        self,
        kit: TurnKit,
        *,
        turn: ActiveTurn,
        original: httpx2.Request,
        kept: Sequence[tuple[bytes, bytes]],
        body: TurnBody,
        budget: Budget,
        path: str,
    ) -> None:
        self._kept = kept
        self._kit = kit
        self._turn = turn
        self._original = original
        self._body = body
        self._budget = budget
        self._path = path
        self._priority = b""

    def answer(self, place: Place) -> Flow[Opened]:
        """Send one attempt and return the opened answer, good or bad.

        Raises:
            DecoderDown: the decoder failed before its first byte.
            httpx2.TimeoutException: out of time; the lease is kept, because the engine may be busy and well.
        """
        turn = self._turn
        turn.lease, turn.decoder, turn.migrated = place.lease, place.plan.decoder, False
        turn.prefiller, turn.prefill_us = None, None
        turn.sent()
        ticket = yield from self._prefill(place)
        if ticket is not None:
            opened = yield from self._pull(place, ticket)
            if opened is not None:
                return opened
        return (yield from self._compute(place))

    # ---- first leg --------------------------------------------------------------------------------------------

    def _prefill(self, place: Place) -> Flow[TransferTicket | None]:
        """Have the prompt computed elsewhere; None: the decoder computes it."""
        prefiller = place.plan.prefiller
        if prefiller is None or place.lease is None:
            return None
        if self._body.local_because:
            self._spend(place)
            self._turn.lost(self._body.local_because)
            return None
        started_us = self._kit.clock_us()
        self._turn.prefiller = prefiller
        try:
            ticket = yield from self._fetch_ticket(prefiller, place.lease.lease_id)
        except TransferRefused as refused:
            log.info("prefill_lost engine_id=%s loss=%s detail=%s", prefiller.engine_id, refused.loss, refused)
            self._spend(place)
            self._turn.lost(refused.loss)
            return None
        finally:
            self._turn.prefill_us = self._kit.clock_us() - started_us
        return ticket

    def _fetch_ticket(self, prefiller: Binding, lease_id: str) -> Flow[TransferTicket]:
        timeouts = self._kit.options.timeouts
        yield from self._in_slices(prefiller)
        request = self._request(prefiller, prefill_leg(self._body, PREFILL), at_most_ms=self._prefill_ms())
        try:
            answer = yield from fetch_watched(self._turn, prefiller, request)
        except httpx2.TransportError as error:
            detail = f"{type(error).__name__}: {error}"
            self._turn.engine_failed(prefiller, phase="prefill", detail=detail)
            raise TransferRefused("prefill_failed", detail) from error
        if answer.status != 200:
            if answer.status in ENGINE_FAULTS:
                self._turn.engine_failed(prefiller, phase="prefill", detail=f"HTTP {answer.status}")
            raise TransferRefused("prefill_failed", f"HTTP {answer.status}")
        return read_ticket(
            _json(answer.body),
            lease_id=lease_id,
            now_ms=answer.arrived_us // 1000,
            deadline_ms=int(timeouts.transfer_s * 1000),
            send_ids=self._body.kind is Kind.CHAT,  # the other routes do not read them
        )

    def _prefill_ms(self) -> int:
        timeouts = self._kit.options.timeouts
        share_ms = int(self._budget.left_ms() * timeouts.prefill_share)
        return max(min(share_ms, int(timeouts.prefill_s * 1000)), 1)

    def _in_slices(self, engine: Binding) -> Flow[None]:
        """Have a long prompt computed but for its rest. What goes wrong here is left to the turn itself to find."""
        turn, size = self._turn, self._kit.options.slice_chars
        if not size:
            return
        match, again = turn.match, turn.match.extends and not (turn.first_turn or turn.failovers)
        new_bytes = match.uncached_bytes if again else turn.digest.text_bytes
        if 2 * new_bytes <= 3 * size:
            return
        for leg in slice_legs(self._body, held_items=match.shared_items if again else 0, slice_chars=size):
            self._take_rank()
            request = self._request(engine, leg, at_most_ms=self._prefill_ms())
            try:
                answer = yield from fetch_watched(turn, engine, request)
            except httpx2.TransportError as error:
                log.info("slice_lost engine_id=%s detail=%s", engine.engine_id, type(error).__name__)
                return
            if answer.status != 200:
                log.info("slice_lost engine_id=%s detail=HTTP %s", engine.engine_id, answer.status)
                return

    def _take_rank(self) -> None:
        """By arrival, behind all that are not ranked; once, so that what must be done again does not lose its place."""
        if not any(name.lower() == _PRIORITY.lower() for name, _ in self._kept):  # else the application ranks itself
            self._priority = self._priority or b"%d" % self._kit.wall_ms()

    # ---- second leg -------------------------------------------------------------------------------------------

    def _pull(self, place: Place, ticket: TransferTicket) -> Flow[Opened | None]:
        """Let the decoder pull the prefilled KV; None: it could not, and has to compute the prompt itself."""
        assert place.lease is not None
        turn = self._turn
        self._spend(place)
        try:
            params = ticket.redeem(lease_id=place.lease.lease_id, now_ms=self._kit.now_ms(), hold=place.plan.hold)
        except TransferRefused as refused:
            turn.lost(refused.loss)
            return None
        # The deadline is one for arriving there: waiting for a connection must not carry the params past it.
        reach_ms = max((ticket.deadline_ms - self._kit.now_ms()) // len(REACH_PHASES), 1)
        try:
            opened = yield from self._open(place, params, reach_ms=reach_ms)
        except tuple(REACHING) as error:
            self._not_reached(error, reach_ms)
            return None
        except httpx2.ConnectError as error:
            raise DecoderDown(f"{type(error).__name__}: {error}", error=error) from error
        except BROKEN as error:
            self._transfer_failed(place, f"{type(error).__name__}: {error}")
            return None
        status = self._status(opened)
        if status < 400:
            turn.migrated = True
            return opened
        if status in APPLICATIONS_OWN:
            return opened
        if status in ENGINE_FAULTS and status != 500:
            raise DecoderDown(f"HTTP {status}", opened=opened)
        # 500 is how vLLM reports a transfer that failed (kv_load_failure_policy=fail). Any other refusal may speak of
        # the request or of the transfer: asked again without it, the request gets the answer that is its own. The
        # prefiller is not to blame for that one.
        yield Discard(opened=opened)
        if status == 500:
            self._transfer_failed(place, f"HTTP {status}")
        else:
            turn.lost("transfer_failed")
        return None

    def _not_reached(self, error: httpx2.TimeoutException, reach_ms: int) -> None:
        """Give the transfer up if it was its time that ran out; raise what it means if it was the application's own."""
        own_s = self._budget.hop()[REACHING[type(error)]]
        if own_s is None or own_s * 1000 > reach_ms:
            self._turn.lost("transfer_expired")
        elif isinstance(error, httpx2.ConnectTimeout):
            raise DecoderDown(f"{type(error).__name__}: {error}", error=error) from error
        else:
            raise error

    def _transfer_failed(self, place: Place, detail: str) -> None:
        assert place.plan.prefiller is not None
        self._turn.lost("transfer_failed")
        self._turn.engine_failed(place.plan.prefiller, phase="transfer", detail=detail)

    def _compute(self, place: Place) -> Flow[Opened]:
        """Let the decoder answer with what it has: its own cache, and the rest computed."""
        params = HOLD if place.plan.hold and not self._body.local_because else None
        yield from self._in_slices(place.plan.decoder)
        try:
            opened = yield from self._open_again_if_broken(place, params)
        except (*UNREACHABLE, *BROKEN) as error:
            raise DecoderDown(f"{type(error).__name__}: {error}", error=error) from error
        status = self._status(opened)
        if status in ENGINE_FAULTS:
            raise DecoderDown(f"HTTP {status}", opened=opened)
        return opened

    def _open_again_if_broken(self, place: Place, params: Mapping[str, Any] | None) -> Flow[Opened]:
        """An engine may close an idle connection at the very moment it is used again: that alone proves nothing."""
        try:
            return (yield from self._open(place, params))
        except BROKEN:
            return (yield from self._open(place, params))

    def _open(self, place: Place, params: Mapping[str, Any] | None, *, reach_ms: int | None = None) -> Flow[Opened]:
        turn = self._turn
        turn.held = bool(params and params.get("do_remote_decode"))
        request = self._request(place.plan.decoder, decode_leg(self._body, params), reach_ms=reach_ms)
        opened = yield from open_watched(turn, place.plan.decoder, request)
        streamed = _is_event_stream(opened.response)
        turn.tracker = TurnTracker(self._body.kind, streamed=streamed)
        turn.streamed = streamed
        turn.status = opened.response.status_code
        turn.feed(opened.first)
        turn.watch.answered(self._status(opened))
        return opened

    # ---- pieces -----------------------------------------------------------------------------------------------

    def _request(
        self, engine: Binding, content: bytes, *, at_most_ms: int | None = None, reach_ms: int | None = None
    ) -> EngineRequest:
        turn = self._turn
        turn.hops += 1
        session = f"{turn.ref.conversation_id}/{turn.ref.lineage}"[:SESSION_CHARS_MAX]
        request_id = self._kit.new_request_id()
        headers = [
            (_SESSION, session.encode("ascii")),
            (_REQUEST_ID, request_id.encode("ascii")),
            *key_header(engine),
        ]
        if turn.lease is not None:
            headers.append((_LEASE, turn.lease.token.encode("ascii")))
        if self._priority:
            headers.append((_PRIORITY, self._priority))
        target = engine_target(engine.url, self._path, query=self._original.url.query)
        request = engine_request(
            self._original,
            target=target,
            content=content,
            timeout=self._budget.hop(at_most_ms=at_most_ms, reach_ms=reach_ms),
            kept=self._kept,
            headers=headers,
        )
        return EngineRequest(request, target.text, request_id)

    def _status(self, opened: Opened) -> int:
        """The answer's status; an error that opens a stream counts as the status it names."""
        tracker = self._turn.tracker
        in_stream = tracker.error_status if tracker is not None else 0
        return max(opened.response.status_code, in_stream)

    def _spend(self, place: Place) -> None:
        assert place.lease is not None
        self._turn.spent.add(place.lease.lease_id)


def _is_event_stream(response: httpx2.Response) -> bool:
    types = (value for name, value in response.headers.raw if name.lower() == b"content-type")
    return next(types, b"").startswith(b"text/event-stream")


def _json(body: bytes) -> object:
    try:
        return json.loads(body)
    except ValueError:
        return None
