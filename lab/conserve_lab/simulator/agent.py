"""A conversation in virtual time: what the SDK does with a lease, turn by turn."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

from conserve_lab.engine_model import EngineRequest, PromptSources
from conserve_lab.simulator.engine import Call, SimulatedEngine
from conserve_lab.simulator.fleet import Fleet
from conserve_lab.simulator.gaps import Gaps
from conserve_lab.simulator.keys import ConversationKeys
from conserve_lab.simulator.routing import Router
from conserve_lab.simulator.slices import one_by_one
from conserve_lab.workloads import Conversation
from conserve_sdk._slices import cuts
from conserve_sdk.core.events import TurnFinished
from conserve_sdk.core.lease import Lease, LeaseKey, Mode
from conserve_sdk.core.units import ConversationId, EngineId, LineageId, ModelName, Ms, TenantId, Tokens
from conserve_sdk.core.vocabulary import SupersedeCause

RENEW_US = 20_000_000
RETRY_US = 100_000
"""Until a router without a broker tries again; it knows of a death at once, which is kind to routers."""
MODEL = ModelName("simulated")


@dataclass(slots=True, kw_only=True)
class Story:
    """What happened to one conversation; instants in microseconds.

    Attributes:
        granted_us: when it was admitted.
        first_tokens_us: of each turn.
        prefill_queue_us: waits at prefillers between arrival there and the first step.
        last_gaps: times between the tokens of its last turn.
        reprefilled_tokens: prompt tokens of earlier turns that were computed again.
        migrations: KV moves from engine to engine.
        lost_calls: requests that an engine's death ended, each sent again.
    """

    arrived_us: int
    granted_us: int = 0
    turns_us: list[int] = field(default_factory=list)
    first_tokens_us: list[int] = field(default_factory=list)
    done_us: int = 0
    prefill_queue_us: int = 0
    last_gaps: Gaps = field(default_factory=Gaps)
    reprefilled_tokens: int = 0
    migrations: int = 0
    lost_calls: int = 0


class _Move:
    """KV on its way out of an engine, which holds it for this peer or has it in its cache."""

    def __init__(self, holder: SimulatedEngine, request_id: str, now_us: Callable[[], int]) -> None:
        self._holder, self._request_id, self._now_us = holder, request_id, now_us
        self._incarnation = holder.incarnation

    def move(self, tokens: int) -> int | None:
        if not self._holder.up or self._holder.incarnation != self._incarnation:
            return None
        return self._holder.link.reserve(tokens, now_us=self._now_us())

    def moved(self) -> None:
        self._holder.release_hold(self._request_id)


class Agent:
    """Plays one conversation against a fleet."""

    def __init__(
        self, fleet: Fleet, conversation: Conversation, *, number: int, gaps: Gaps, finished: Callable[[], None]
    ) -> None:
        self.story = Story(arrived_us=fleet.kernel.now_us)
        self._fleet = fleet
        self._conversation = conversation
        self._number = number
        self._gaps = gaps
        self._finished = finished
        self._router = Router(fleet, number=number)
        self._keys = ConversationKeys(conversation, number=number, block_size=fleet.block_size)
        self._prompts = [conversation.prompt_tokens(turn) for turn in range(len(conversation.turns))]
        self._turn = 0
        self._lease: Lease | None = None
        self._migrated = False
        self._hops = 0
        self._priority = 0
        self._report: tuple[PromptSources, SimulatedEngine | None] = (PromptSources(0, 0, 0), None)

    def start(self) -> None:
        """The conversation arrives."""
        self._turn_arrives()
        if self._fleet.broker is None:
            self._admitted()
            return
        self._keep_alive()
        self._ask(self._granted)

    def _ask(self, then: Callable[[Lease], None]) -> None:
        assert self._fleet.broker is not None
        key = LeaseKey(
            tenant=TenantId("simulated"),
            conversation_id=ConversationId(f"{self._conversation.conversation_id}#{self._number}"),
            lineage=LineageId("main"),
            model=MODEL,
        )
        self._fleet.broker.request(
            key,
            input_tokens=self._claimed(self._prompt_tokens),
            prefix_key="shared" if self._conversation.shared_tokens else "",
            then=then,
        )

    def _claimed(self, tokens: int) -> int:
        """What the broker is told that the conversation holds."""
        return self._conversation.final_tokens if self._fleet.policy.oracle else tokens

    # ---- lease ------------------------------------------------------------------------------------------------

    def _granted(self, lease: Lease) -> None:
        self._take(lease)
        self._admitted()

    def _admitted(self) -> None:
        self.story.granted_us = self._fleet.kernel.now_us
        self._dispatch()

    def _take(self, lease: Lease) -> None:
        if self._lease is None or self._lease.lease_id != lease.lease_id:
            self._migrated = lease.mode is Mode.LOCAL
        self._lease = lease

    def _keep_alive(self) -> None:
        if self._fleet.broker is not None and not self.story.done_us:
            if self._lease is not None:
                self._fleet.broker.renew(self._lease)
            self._fleet.kernel.after(RENEW_US, self._keep_alive)

    # ---- turn -------------------------------------------------------------------------------------------------

    @property
    def _prompt_tokens(self) -> int:
        return self._prompts[self._turn]

    def _turn_arrives(self) -> None:
        self.story.turns_us.append(self._fleet.kernel.now_us)

    def _next_turn(self) -> None:
        self._turn_arrives()
        lease, broker = self._lease, self._fleet.broker
        if lease is None or broker is None:
            self._dispatch()
            return
        append = self._conversation.turns[self._turn].append_tokens
        cached = self._prompt_tokens - append
        if not broker.lives(lease):
            self._fail_over(None)
            return
        if broker.wants_move(lease):
            cause = SupersedeCause.RE_LEASE
        elif 0 < lease.append_threshold_tokens < append:
            cause = SupersedeCause.APPEND
        else:
            self._dispatch()
            return
        broker.replace(lease, input_tokens=self._prompt_tokens, cached_tokens=cached, cause=cause, then=self._replaced)

    def _replaced(self, lease: Lease) -> None:
        self._take(lease)
        self._dispatch()

    def _lost(self, engine: SimulatedEngine) -> None:
        """An engine died under a request, or refused it: the turn starts again, elsewhere."""
        self.story.lost_calls += 1
        if len(self.story.first_tokens_us) > self._turn:
            self.story.first_tokens_us.pop()
        lease, broker = self._lease, self._fleet.broker
        if lease is None or broker is None:
            self._fleet.kernel.after(RETRY_US, self._dispatch)
        elif engine.name == lease.decoder.engine_id:
            broker.failure(lease.decoder)
            self._fail_over(lease.decoder.engine_id)
        else:
            assert lease.prefiller is not None
            broker.failure(lease.prefiller)
            self._migrated = True  # without its prefiller, a lease is a local one
            self._dispatch()

    def _fail_over(self, failed: EngineId | None) -> None:
        lease, broker = self._lease, self._fleet.broker
        assert lease is not None
        assert broker is not None
        broker.replace(
            lease,
            input_tokens=self._claimed(self._prompt_tokens),
            cached_tokens=0,
            cause=SupersedeCause.FAILURE,
            then=self._replaced,
            failed=failed,
            refused=lambda: self._ask(self._replaced),
        )

    def _dispatch(self) -> None:
        if self._lease is not None and self._fleet.broker is not None:
            self._fleet.broker.turn_started(self._lease, input_tokens=self._claimed(self._prompt_tokens))
        prefiller, decoder = self._router.engines(self._lease)
        if prefiller is None or not self._disaggregated(prefiller, decoder):
            held = self._prompt_tokens - self._conversation.turns[self._turn].append_tokens
            self._in_slices(decoder, held=held, then=lambda: self._send(decoder, source=None))
        else:
            self._in_slices(prefiller, held=0, then=lambda: self._prefill(prefiller, decoder))

    def _disaggregated(self, prefiller: SimulatedEngine, decoder: SimulatedEngine) -> bool:
        if not self._migrated:
            return True
        append = self._conversation.turns[self._turn].append_tokens
        held = self._prompt_tokens - append
        return self._router.through_prefiller(prefiller, decoder, turn=self._turn, append=append, held=held)

    def _in_slices(self, engine: SimulatedEngine, *, held: int, then: Callable[[], None]) -> None:
        """Compute a long prompt but for its rest, which `then` sends as ever."""
        size = self._fleet.policy.slice_tokens
        if not size:
            then()
            return
        steps = cuts(self._prompt_tokens, held=held, size=size)
        self._priority = self._fleet.kernel.now_us if steps else 0

        def send(tokens: int, done: Callable[[], None]) -> None:
            call = Call(
                request=self._request(tokens, output_tokens=1),
                on_first=self._count_slice,
                on_done=lambda _: done(),
                on_lost=lambda: self._lost(engine),
            )
            self._fleet.kernel.after(engine.kind.front_us, lambda: engine.submit(call))

        one_by_one(steps, send, then)

    def _prefill(self, prefiller: SimulatedEngine, decoder: SimulatedEngine) -> None:
        history = decoder.held_tokens(self._leading(self._prompt_tokens)) if self._fleet.policy.history_pull else 0
        request = self._request(self._prompt_tokens, output_tokens=1, hold=True, pull_tokens=history)
        sent_us = self._fleet.kernel.now_us + prefiller.kind.front_us

        def prefilled(_: int) -> None:
            assert call.started_us is not None
            self.story.prefill_queue_us += call.started_us - sent_us
            self._send(decoder, source=self._move_from(prefiller, request.request_id), by=prefiller)

        call = Call(
            request=request,
            on_first=self._count_prompt,
            on_done=prefilled,
            on_lost=lambda: self._lost(prefiller),
            source=self._move_from(decoder, request.request_id) if history else None,
        )
        self._fleet.kernel.at(sent_us, lambda: prefiller.submit(call))

    def _move_from(self, holder: SimulatedEngine, request_id: str) -> _Move:
        return _Move(holder, request_id, lambda: self._fleet.kernel.now_us)

    def _send(self, decoder: SimulatedEngine, *, source: _Move | None, by: SimulatedEngine | None = None) -> None:
        turn = self._conversation.turns[self._turn]
        last = self._turn == len(self._conversation.turns) - 1

        def first(at_us: int, sources: PromptSources) -> None:
            self.story.first_tokens_us.append(at_us)
            if source is None:
                self._count_prompt(at_us, sources)
            else:
                self.story.migrations += 1
            self._report = (sources, by)

        call = Call(
            request=self._request(
                self._prompt_tokens,
                output_tokens=turn.output_tokens,
                pull_tokens=self._prompt_tokens if source else 0,
            ),
            on_first=first,
            on_done=lambda _: self._turn_ends(decoder),
            on_lost=lambda: self._lost(decoder),
            source=source,
            gaps=self._gaps if last else None,
        )
        self._fleet.kernel.after(decoder.kind.front_us, lambda: decoder.submit(call))

    def _leading(self, tokens: int) -> Sequence[int]:
        return self._keys.leading(tokens // self._fleet.block_size)

    def _request(
        self, prompt_tokens: int, *, output_tokens: int, pull_tokens: int = 0, hold: bool = False
    ) -> EngineRequest:
        self._hops += 1
        return EngineRequest(
            request_id=f"{self._number}.{self._hops}",
            prompt_tokens=prompt_tokens,
            output_tokens=output_tokens,
            block_keys=self._leading(prompt_tokens + output_tokens),
            pull=pull_tokens > 0,
            pull_tokens=pull_tokens,
            hold=hold,
            priority=self._priority,
        )

    def _count_slice(self, _: int, sources: PromptSources) -> None:
        """A slice should compute no more than itself."""
        self.story.reprefilled_tokens += max(
            sources.local_compute - self._fleet.policy.slice_tokens - self._fleet.block_size, 0
        )

    def _count_prompt(self, _: int, sources: PromptSources) -> None:
        """What was computed although an earlier turn had computed it."""
        new = self._conversation.turns[self._turn].append_tokens + self._fleet.block_size
        self.story.reprefilled_tokens += max(sources.local_compute - new, 0)

    def _turn_ends(self, decoder: SimulatedEngine) -> None:
        now_us = self._fleet.kernel.now_us
        self._tell_finished(decoder, now_us)
        gap_us = self._conversation.turns[self._turn].gap_us
        self._turn += 1
        if self._turn < len(self._conversation.turns):
            self._fleet.kernel.after(gap_us, self._next_turn)
            return
        self.story.done_us = now_us
        self._router.leave()
        if self._lease is not None and self._fleet.broker is not None:
            self._fleet.broker.release(self._lease)
        self._finished()

    def _tell_finished(self, decoder: SimulatedEngine, now_us: int) -> None:
        lease, broker = self._lease, self._fleet.broker
        sources, by = self._report
        migrated = by is not None and not self._migrated
        self._migrated = True
        if lease is None or broker is None:
            return
        prompt = self._prompt_tokens
        started_us, first_us = self.story.turns_us[-1], self.story.first_tokens_us[-1]
        broker.turn_finished(
            TurnFinished(
                now_ms=Ms(now_us // 1000),
                lease_id=lease.lease_id,
                context_tokens=Tokens(self._claimed(prompt + self._conversation.turns[self._turn].output_tokens)),
                prompt_tokens=Tokens(prompt),
                prompt_bytes=0,
                cached_tokens=Tokens(sources.local_cache_hit),
                prefill_ms=Ms(max(first_us - max(started_us, self.story.granted_us), 0) // 1000),
                prefill_engine_id=EngineId(by.name if by is not None else decoder.name),
                migrated=migrated,
            )
        )
