"""One simulated engine: the engine model driven in virtual time, with its link, its power and its clock of tokens."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Protocol

from conserve_lab.engine_model import (
    EngineModel,
    EngineModelConfig,
    EngineRequest,
    FetchStart,
    Leap,
    Progress,
    PromptSources,
    SequenceState,
    StepResult,
    TransferLink,
)
from conserve_lab.hardware import EngineKind
from conserve_lab.simulator.gaps import Gaps
from conserve_lab.simulator.kernel import Kernel, Timer

LEAP_US = 1_000_000
"""As long as a leap may be: scrapes and arrivals cut longer ones anyway, so planning them would be in vain."""


class KvSource(Protocol):
    """Where a pulled prompt's KV lies."""

    def move(self, tokens: int) -> int | None:
        """Book the move of `tokens` and return the instant at which they are there; None when the KV is lost."""
        ...

    def moved(self) -> None:
        """They are there: the source may free them."""
        ...


@dataclass(slots=True, kw_only=True)
class Call:
    """A request to an engine, and what its caller wants to know.

    Attributes:
        source: of its KV, for a request that pulls.
        gaps: where its times between tokens are counted.
        on_first: called with the instant of the first token and where the prompt's KV came from.
        on_done: called with the instant of the last token.
        on_lost: called when the engine dies, or is dead already.
        started_us: when it first was in a batch.
    """

    request: EngineRequest
    on_first: Callable[[int, PromptSources], None]
    on_done: Callable[[int], None]
    on_lost: Callable[[], None]
    source: KvSource | None = None
    gaps: Gaps | None = None
    started_us: int | None = None
    last_us: int | None = None


@dataclass(slots=True)
class Energy:
    """Work done, in nanojoules above idle."""

    work_nj: int = 0
    prefill_us: int = 0


class SimulatedEngine:
    """Runs whenever it has work; one step, or one leap over decodes, at a time.

    A leap is planned as far as it may go and carried out as far as it got: whatever reaches the engine meanwhile
    (a request, KV, a scrape) cuts it at the end of the step that is running then.
    """

    def __init__(self, kernel: Kernel, name: str, kind: EngineKind, config: EngineModelConfig) -> None:
        self.name = name
        self.kind = kind
        self.model = EngineModel(config)
        self.link = TransferLink(kind.transfer)
        self.host_link = TransferLink(kind.transfer)
        self.energy = Energy()
        self.moved_tokens = 0
        self.incarnation = 1
        self.up = True
        self.draining = False
        self._kernel = kernel
        self._calls: dict[str, Call] = {}
        self._watched: dict[str, Call] = {}
        """Those of them whose times between tokens are counted."""
        self._unstarted: dict[str, Call] = {}
        self._wake: Timer | None = None
        self._leap: tuple[int, Leap] | None = None

    # ---- what reaches it --------------------------------------------------------------------------------------

    def submit(self, call: Call) -> None:
        """Take a request; it has passed the front end already."""
        if not self.up:
            call.on_lost()
            return
        self.settle()
        request_id = call.request.request_id
        self._calls[request_id] = self._unstarted[request_id] = call
        if call.gaps is not None:
            self._watched[request_id] = call
        self.model.submit(call.request)
        self._ensure_awake()

    def release_hold(self, request_id: str) -> None:
        """A peer has read the blocks of a finished request."""
        self.settle()
        self.model.holds.release(request_id)
        self._ensure_awake()

    def settle(self) -> None:
        """Carry out what has happened by now of a leap that is under way."""
        if self._leap is None:
            return
        (started_us, planned), self._leap = self._leap, None
        if self._wake is not None:
            self._wake.cancel()
        leap = planned.before(max(self._kernel.now_us - started_us, 1))
        end_us = started_us + self._carry_out(leap, started_us)
        self._wake = self._kernel.at(max(end_us, self._kernel.now_us), self._run)

    @property
    def takes_new(self) -> bool:
        """Whether a router that knows its state would send it something new."""
        return self.up and not self.draining

    def held_tokens(self, keys: Sequence[int]) -> int:
        """Leading tokens of a prompt with these block keys that lie in its KV cache."""
        return len(self.model.pool.lookup(keys)) * self.model.config.block_size

    def fail(self, *, back_after_us: int) -> None:
        """Die with everything in it; come back empty."""
        self.settle()
        if self._wake is not None:
            self._wake.cancel()
            self._wake = None
        lost = list(self._calls.values())
        for calls in (self._calls, self._watched, self._unstarted):
            calls.clear()
        self.model = EngineModel(self.model.config)
        self.energy.prefill_us = 0
        self.incarnation += 1
        self.up = False
        self._kernel.after(back_after_us, self._come_back)
        for call in lost:
            call.on_lost()

    def _come_back(self) -> None:
        self.up = True

    # ---- its own clock ----------------------------------------------------------------------------------------

    def _ensure_awake(self) -> None:
        if self._wake is None and self.model.has_work:
            self._wake = self._kernel.at(self._kernel.now_us, self._run)

    def _run(self) -> None:
        self._wake = None
        now_us = self._kernel.now_us
        if self._leap is not None:
            (started_us, planned), self._leap = self._leap, None
            self._carry_out(planned, started_us)
        leap = self.model.plan_leap(now_us, until_us=now_us + LEAP_US)
        if leap is not None:
            self._leap = now_us, leap
            self._wake = self._kernel.at(now_us + leap.duration_us, self._run)
            return
        self._step(now_us)

    def _step(self, now_us: int) -> None:
        pairs_before = self.model.counters.prefill_pairs
        result = self.model.step(now_us)
        for fetch in result.fetches:
            self._fetch(fetch)
        if result.prefill_tokens:
            self._note_starts(result, now_us)
        end_us = now_us + result.duration_us
        self._account(result, pairs=self.model.counters.prefill_pairs - pairs_before)
        if result.duration_us:
            self._wake = self._kernel.at(end_us, lambda: self._tokens(result, end_us))
        elif self.model.has_work:
            expiry_us = self.model.holds.next_expiry_us()
            if expiry_us is not None:  # full of held blocks: nothing moves before one is freed
                self._wake = self._kernel.at(max(expiry_us, now_us), self._run)

    def _tokens(self, result: StepResult, end_us: int) -> None:
        """The step is over: hand its tokens on, then go on."""
        self._wake = None
        watched = self._watched
        for item in result.progress:
            if watched and item.request_id in watched:
                self._gap(watched[item.request_id], end_us)
            if item.finished or item.sources is not None:
                self._milestone(item, end_us)
        self._go_on()

    def _milestone(self, item: Progress, end_us: int) -> None:
        """A first or last token."""
        call = self._calls[item.request_id]
        if item.finished:
            del self._calls[item.request_id]
            self._watched.pop(item.request_id, None)
        if item.sources is not None:
            call.on_first(end_us, item.sources)
        if item.finished:
            call.on_done(end_us)

    def _go_on(self) -> None:
        if self._wake is None and self.model.has_work:  # else a caller's next request has set it already
            self._run()

    def _carry_out(self, leap: Leap, started_us: int) -> int:
        self.model.carry_out(leap)
        first_us, rest = started_us + leap.durations_us[0], leap.durations_us[1:]
        duration_us = leap.duration_us
        last_us = started_us + duration_us
        watched: dict[int, tuple[Gaps, int]] = {}
        for call in (
            [self._watched[name] for name in leap.request_ids if name in self._watched] if self._watched else ()
        ):
            self._gap(call, first_us)
            call.last_us = last_us
            assert call.gaps is not None
            gaps, times = watched.get(id(call.gaps), (call.gaps, 0))
            watched[id(call.gaps)] = (gaps, times + 1)
        for gaps, times in watched.values():
            for gap_us in rest:
                gaps.add(gap_us, times)
        steps, width = len(leap.durations_us), len(leap.request_ids)
        context = leap.context_tokens * steps + width * steps * (steps - 1) // 2
        self._spend(duration_us, steps=steps, context_tokens=context, prefill_tokens=0, pairs=0)
        return duration_us

    # ---- pieces -----------------------------------------------------------------------------------------------

    def _gap(self, call: Call, now_us: int) -> None:
        if call.last_us is not None and call.gaps is not None:
            call.gaps.add(now_us - call.last_us)
        call.last_us = now_us

    def _note_starts(self, result: StepResult, now_us: int) -> None:
        ended = {item.request_id for item in result.progress if item.finished}
        for request_id, call in list(self._unstarted.items()):
            if request_id in ended or self.model.state_of(request_id) is SequenceState.RUNNING:
                call.started_us = now_us
                del self._unstarted[request_id]

    def _fetch(self, fetch: FetchStart) -> None:
        source = self._calls[fetch.request_id].source
        at_us: int | None
        if fetch.from_host:
            at_us = self.host_link.reserve(fetch.missing_tokens, now_us=self._kernel.now_us)
        else:
            assert source is not None, "a request that pulls has a source"
            at_us = source.move(fetch.missing_tokens)
            self.moved_tokens += 0 if at_us is None else fetch.missing_tokens
        due_us = self._kernel.now_us if at_us is None else at_us
        self._kernel.at(due_us, lambda: self._fetched(fetch, source, ok=at_us is not None))

    def _fetched(self, fetch: FetchStart, source: KvSource | None, *, ok: bool) -> None:
        self.settle()
        self.model.fetch_finished(fetch.request_id, ok=ok)
        if source is not None and not fetch.from_host:
            source.moved()
        self._ensure_awake()

    def _account(self, result: StepResult, *, pairs: int) -> None:
        if not result.duration_us:
            return
        self._spend(
            result.duration_us,
            steps=1,
            context_tokens=result.context_tokens,
            prefill_tokens=result.prefill_tokens,
            pairs=pairs,
        )
        if result.prefill_tokens:
            self.energy.prefill_us += result.duration_us

    def _spend(self, duration_us: int, *, steps: int, context_tokens: int, prefill_tokens: int, pairs: int) -> None:
        self.energy.work_nj += self.kind.power.step_nj(
            self.kind.cost,
            duration_us=duration_us,
            steps=steps,
            context_tokens=context_tokens,
            prefill_tokens=prefill_tokens,
            pairs=pairs,
        )

    def state_of(self, request_id: str) -> SequenceState | None:
        """Where a request is."""
        return self.model.state_of(request_id)
