"""The account of one turn: counted while it runs, told once when it ends."""

from __future__ import annotations

import logging
import threading
from collections.abc import Mapping

import httpx2

from conserve_sdk._kind import Kind
from conserve_sdk._lineage import LineageMatch, PromptDigest, Rewrite
from conserve_sdk._registry import LeaseRef, ServedTurn
from conserve_sdk._tracker import TurnFacts, TurnTracker
from conserve_sdk._turn.kit import TurnKit
from conserve_sdk.core.units import EngineId, LeaseId, LineageId
from conserve_sdk.errors import LeaseClosed
from conserve_sdk.protocol import (
    Binding,
    EngineFailureReport,
    LeaseGrant,
    Report,
    TurnFinishedReport,
    TurnStartedReport,
)
from conserve_sdk.telemetry import TurnRecord, TurnStart

__all__ = ["ActiveTurn", "error_name"]

log = logging.getLogger("conserve_sdk.turn")

MILLIS_MAX = 86_400_000
BLOCK_TOKENS_MAX = 256
"""Whole blocks are cached, and a client does not know how long they are: so much may always be missing."""
CANCELLED = "client_cancelled"
STREAM_DROPPED = "stream_dropped"


def error_name(error: BaseException) -> str:
    """The class of failure, as records and reports name it."""
    if isinstance(error, httpx2.TimeoutException):
        return "timeout"
    if isinstance(error, httpx2.TransportError):
        broke = isinstance(error, httpx2.ReadError | httpx2.RemoteProtocolError)
        return STREAM_DROPPED if broke else "unreachable"
    if isinstance(error, Exception):
        return type(error).__name__
    return CANCELLED  # CancelledError, GeneratorExit, KeyboardInterrupt: the application went away


class ActiveTurn:
    """One turn while it runs. `finish` may be called from any thread, more than once; the first call counts."""

    def __init__(
        self,
        kit: TurnKit,
        *,
        ref: LeaseRef,
        match: LineageMatch,
        digest: PromptDigest,
        path: str,
        streams: bool = False,
        trace: Mapping[str, str] | None = None,
    ) -> None:
        self.ref = ref
        self.match = match
        self.digest = digest
        self.path = path
        self.lease: LeaseGrant | None = None
        self.decoder: Binding | None = None
        self.prefiller: Binding | None = None
        self.tracker: TurnTracker | None = None
        self.status = 0
        self.streamed = False
        self.first_turn = not match.extends
        self.migrated = False
        self.spent: set[str] = set()
        """Leases whose single KV transfer this turn has used up or given up."""
        self.held = False
        self.hops = 0
        self.failovers = 0
        self.loss = ""
        self.lease_wait_us = 0
        self.prefill_us: int | None = None
        self._kit = kit
        self._arrived_us = kit.clock_us()
        self._slot = kit.registry.begin_turn(ref, arrived_at_ms=self._arrived_us // 1000)
        kit.turn_begins(ref)
        self._sent = False
        start = TurnStart(
            conversation_id=ref.conversation_id,
            lineage=ref.lineage,
            model=ref.model,
            path=path,
            turn=self.turn,
            streams=streams,
            at_us=self._arrived_us,
            trace=trace or {},
        )
        self.watch = kit.watch(start)
        self._finished = False
        self._lock = threading.Lock()

    @property
    def turn(self) -> int:
        """Position in the lineage, from 1."""
        return self._slot.turn

    def lost(self, loss: str) -> None:
        """Note why something was lost; the first reason stands."""
        self.loss = self.loss or loss

    def sent(self) -> None:
        """The turn is on its way to the engines."""
        if not self._sent:
            self._sent = True
            self._kit.turn_sent(self.ref)
        if self.lease is not None:
            self._submit(TurnStartedReport(token=self._token()))

    def engine_failed(self, engine: Binding, *, phase: str, detail: str) -> None:
        """Tell the broker that an engine of the lease could not be used."""
        if self.lease is None:
            return
        self._submit(
            EngineFailureReport.model_validate(
                {
                    "token": self._token(),
                    "engine_id": engine.engine_id,
                    "incarnation": engine.incarnation,
                    "phase": phase,
                    "detail": detail[:500],
                }
            )
        )

    def answered(self) -> None:
        """The decoder's first bytes are there: its cache now holds the prompt."""
        if self.status < 400:
            rewrite = self._kit.book.commit(self.match, self.digest)
            if rewrite is not None:
                self._kit.warn_once("rewrites", _advice(self.ref, rewrite))
            if self.match.replaces is not None and self.lease is not None:
                self._retire(self.match.replaces)

    def _retire(self, lineage: LineageId) -> None:
        """This turn's history has taken the place of another: give that one's lease back."""
        grant = self._kit.registry.retire(self.ref._replace(lineage=lineage), now_ms=self._kit.now_ms())
        if grant is not None:
            self._kit.reporter.give_back(grant)

    def feed(self, chunk: bytes) -> None:
        """Bytes pass to the application."""
        if self.tracker is not None:
            self.tracker.feed(chunk, now_us=self._kit.clock_us())

    @property
    def saw_end(self) -> bool:
        """Whether a stream's end marker has passed."""
        return self.tracker is not None and self.tracker.saw_end

    def finish(self, error: BaseException | None = None) -> None:
        """The turn is over: report it, and tell the hooks."""
        with self._lock:
            if self._finished:
                return
            self._finished = True
        now_us = self._kit.clock_us()
        facts = self._facts()
        failure = self._failure(error, facts)
        if self.migrated and facts.computed_tokens > 1:
            # The decoder answered, but the transfer failed under it (`kv_load_failure_policy=recompute`). One token
            # may be its own: the last one of a prompt that fills its blocks.
            self.migrated = False
            self.lost("transfer_failed")
        if not failure:
            self._account_for_cache(facts)
        goes_on = bool(failure) or facts.calls_tools
        self._kit.registry.end_turn(
            self.ref, now_ms=now_us // 1000, loop_goes_on=goes_on, waits_for_tools=facts.calls_tools
        )
        if facts.response_id and not failure and self.digest.kind is Kind.RESPONSES:  # nobody names another's
            self._kit.book.commit(self.match, self.digest, response_id=facts.response_id)
        report = None if self.lease is None else self._report(facts, failure, now_us=now_us)
        self._kit.turn_ends(self.ref, sent=self._sent, tell=lambda idle: self._tell_end(report, idle=idle))
        if failure == STREAM_DROPPED and self.status and self.decoder is not None:
            self.engine_failed(self.decoder, phase="decode", detail=f"{type(error).__name__}: {error}")
        self.watch.end(self._record(facts, failure, now_us=now_us))

    def _account_for_cache(self, facts: TurnFacts) -> None:
        """Notice a cache that was lost, and note what the decoder holds now."""
        if self.decoder is None or not facts.prompt_tokens:
            return
        before = self._kit.registry.served_of(self.ref)
        stayed = self.lease is not None and not self.first_turn and not self.migrated
        if stayed and before is not None and before.decoder == self.decoder and self._misses_cache(facts, before):
            self.lost("cache_lost")
        served = ServedTurn(self.decoder, facts.prompt_tokens, facts.completion_tokens, self.digest.text_bytes)
        self._kit.registry.mark_served(self.ref, served)

    def _misses_cache(self, facts: TurnFacts, before: ServedTurn) -> bool:
        """Whether less than half of what the turn before left there was found."""
        known_bytes = self.digest.text_bytes - self.match.uncached_bytes
        shared_tokens = facts.prompt_tokens * known_bytes // max(self.digest.text_bytes, 1)
        left_tokens = before.prompt_tokens if self.match.continued else min(before.prompt_tokens, shared_tokens)
        return facts.says_cached and 2 * facts.cached_tokens < left_tokens - BLOCK_TOKENS_MAX

    def _tell_end(self, report: TurnFinishedReport | None, *, idle: bool) -> None:
        if report is not None:
            self._submit(report if idle else report.model_copy(update={"idle": False}))

    # ---- what is told -----------------------------------------------------------------------------------------

    def _submit(self, report: Report) -> None:
        try:
            self._kit.reporter.submit(report)
        except LeaseClosed:
            # The ConServe object was closed under a turn that was still running; the application gets its answer.
            log.info("report_lost lease_id=%s kind=%s: closed", self.lease.lease_id if self.lease else "", report.kind)

    def _facts(self) -> TurnFacts:
        if self.tracker is None:
            return TurnFacts()
        self.tracker.end()
        return self.tracker.facts()

    def _failure(self, error: BaseException | None, facts: TurnFacts) -> str:
        if self.status >= 400:
            return f"http_{self.status}"
        if facts.error:
            return "engine_error"
        if error is None or (facts.complete and error_name(error) == CANCELLED):
            return ""  # leaving after the end marker is how clients end a stream
        return error_name(error)

    def _token(self) -> str:
        """The newest token of the lease: the broker may have sent a fresh one."""
        assert self.lease is not None
        newest = self._kit.registry.grant_of(self.ref)
        return newest.token if newest is not None and newest.lease_id == self.lease.lease_id else self.lease.token

    def _report(self, facts: TurnFacts, failure: str, *, now_us: int) -> TurnFinishedReport:
        ttft_ms = self._ttft_ms(facts) or 0
        # An answer that comes at once says nothing about the time to its first token, and one that a prefill was
        # tried for in vain nothing about the decoder's share of it.
        local_ms = ttft_ms if self.streamed and self.prefill_us is None else 0
        prefill_ms = self._span_ms(self.prefill_us) if self.migrated and self.prefill_us is not None else local_ms
        prefilled_by = self.prefiller if self.migrated else self.decoder
        return TurnFinishedReport(
            token=self._token(),
            prompt_tokens=facts.prompt_tokens,
            completion_tokens=facts.completion_tokens,
            cached_tokens=facts.cached_tokens,
            prompt_bytes=self.digest.text_bytes if facts.prompt_tokens or not failure else 0,
            prefill_ms=0 if failure else prefill_ms,
            prefill_engine_id=prefilled_by.engine_id if prefilled_by else None,
            migrated=self.migrated,
            ttft_ms=ttft_ms,
            duration_ms=self._span_ms(now_us - self._arrived_us),
            finish_reason=facts.finish_reason[:64],
            tool_names=tuple(name[:128] for name in facts.tool_names),
            error=failure[:200],
        )

    def _record(self, facts: TurnFacts, failure: str, *, now_us: int) -> TurnRecord:
        lease = self.lease
        return TurnRecord(
            conversation_id=self.ref.conversation_id,
            lineage=self.ref.lineage,
            lease_id=LeaseId(lease.lease_id) if lease else None,
            epoch=lease.epoch if lease else 0,
            turn=self.turn,
            first_turn=self.first_turn,
            mode=lease.mode if lease else None,
            model=self.ref.model,
            path=self.path,
            decoder_id=EngineId(self.decoder.engine_id) if self.decoder else None,
            prefill_engine_id=EngineId(self.prefiller.engine_id) if self.prefiller else None,
            migrated=self.migrated,
            hops=self.hops,
            failovers=self.failovers,
            loss=self.loss,
            held=self.held,
            ttft_ms=self._ttft_ms(facts),
            ttfet_ms=None if failure or facts.calls_tools else self._ttfet_ms(facts),
            tbt_us=facts.gaps_us,
            lease_wait_ms=self._span_ms(self.lease_wait_us),
            prefill_ms=None if self.prefill_us is None else self._span_ms(self.prefill_us),
            duration_ms=self._span_ms(now_us - self._arrived_us),
            prompt_tokens=facts.prompt_tokens,
            completion_tokens=facts.completion_tokens,
            cached_tokens=facts.cached_tokens,
            streamed=self.streamed,
            response_id=facts.response_id,
            response_model=facts.model,
            finish_reason=facts.finish_reason,
            error=failure,
        )

    def _ttft_ms(self, facts: TurnFacts) -> int | None:
        return None if facts.first_token_us is None else self._span_ms(facts.first_token_us - self._arrived_us)

    def _ttfet_ms(self, facts: TurnFacts) -> int | None:
        if facts.first_token_us is None:
            return None
        return max(facts.first_token_us // 1000 - self._slot.loop_arrived_at_ms, 0)

    @staticmethod
    def _span_ms(span_us: int) -> int:
        return min(max(span_us // 1000, 0), MILLIS_MAX)


def _advice(ref: LeaseRef, rewrite: Rewrite) -> str:
    system = rewrite.role in ("system", "developer")
    what = "your system prompt changes each turn" if system else "what was said before changes from turn to turn"
    return (
        f"conversation {ref.conversation_id} starts over again and again: {what}, first at message {rewrite.message} "
        f"(role {rewrite.role!r}). Nothing after it can be served from cache: put what changes at the end of the prompt"
    )
