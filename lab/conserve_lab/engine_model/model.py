"""The engine itself: admission, continuous batching, chunked prefill, preemption."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, replace

from conserve_lab.engine_model.batch import Batch
from conserve_lab.engine_model.blocks import BlockPool
from conserve_lab.engine_model.config import EngineModelConfig
from conserve_lab.engine_model.counters import EngineCounters
from conserve_lab.engine_model.holds import Hold, Holds
from conserve_lab.engine_model.host_tier import HostTier
from conserve_lab.engine_model.leap import Leap, block_events, steps_within_blocks, steps_without_end
from conserve_lab.engine_model.results import FetchStart, Progress, PromptSources, StepResult
from conserve_lab.engine_model.sequence import EngineRequest, Sequence, SequenceState
from conserve_lab.engine_model.waiting import Waiting


@dataclass(slots=True)
class _Work:
    """Tokens of one sequence in the step being planned."""

    sequence: Sequence
    tokens: int


class EngineModel:
    """One engine. Drive it with `submit`, `step`, `fetch_finished` and `cancel`.

    The scheduler follows vLLM V1 (vllm/v1/core/sched/scheduler.py): running decodes first, then running prefills,
    then waiting requests in order of arrival, all under `max_num_batched_tokens`; when blocks run out the youngest
    running request is preempted and later recomputed.

    Args:
        config: Sizes, limits and speeds.

    Attributes:
        counters: Totals since the start.
        pool: The KV cache (read it; only the model writes).
        holds: Finished requests whose blocks are still held.
    """

    def __init__(self, config: EngineModelConfig) -> None:
        self.config = config
        self.counters = EngineCounters()
        self.pool = BlockPool(config.kv_blocks)
        self.holds = Holds(self.pool, self.counters)
        self._host = HostTier(config.host_blocks)
        self._sequences: dict[str, Sequence] = {}
        self._waiting = Waiting(by_priority=config.priority_scheduling)
        self._fetched: deque[Sequence] = deque()
        self._fetching: dict[str, Sequence] = {}
        self._batch = Batch()
        self._arrivals = 0
        self._crowded = False

    # ---- reading -------------------------------------------------------------------------------------------

    @property
    def running(self) -> int:
        """Requests in the batch."""
        return len(self._batch.running)

    @property
    def waiting(self) -> int:
        """Requests not in the batch: queued, fetching, or fetched."""
        return len(self._waiting) + len(self._fetching) + len(self._fetched)

    @property
    def fetching(self) -> int:
        """Requests whose KV is on its way from a peer."""
        return len(self._fetching)

    @property
    def kv_usage_ppm(self) -> int:
        """Referenced blocks (running, fetching and held) per million blocks."""
        return self.pool.used * 1_000_000 // self.pool.total

    @property
    def has_work(self) -> bool:
        """Whether a step could compute something now or once blocks are free."""
        return bool(self._batch.running or self._waiting or self._fetched)

    @property
    def unprefilled_tokens(self) -> int:
        """Prompt tokens that are still to be computed here, of every request that has no token yet."""
        return sum(sequence.pending for sequence in self._sequences.values() if not sequence.emitted)

    def state_of(self, request_id: str) -> SequenceState | None:
        """Return where a request is, or None when the engine no longer runs it."""
        sequence = self._sequences.get(request_id)
        return None if sequence is None else sequence.state

    # ---- requests ------------------------------------------------------------------------------------------

    def submit(self, request: EngineRequest) -> None:
        """Queue a request.

        Raises:
            ValueError: The id is in use, or the request could never fit into the KV cache.
        """
        if request.request_id in self._sequences or request.request_id in self.holds:
            raise ValueError(f"request id {request.request_id!r} is in use; ids must be unique")
        needed = self.config.blocks_for(request.prompt_tokens + request.output_tokens)
        if needed > self.config.kv_blocks:
            raise ValueError(
                f"request {request.request_id!r} needs {needed} blocks but the KV cache has "
                f"{self.config.kv_blocks}; raise kv_blocks or shorten the request"
            )
        self._arrivals += 1
        sequence = Sequence(request=request, order=self._arrivals)
        self._sequences[request.request_id] = sequence
        self._waiting.add(sequence)

    def cancel(self, request_id: str) -> bool:
        """Drop a request in any state and free its blocks; its finished blocks stay in the prefix cache."""
        sequence = self._sequences.pop(request_id, None)
        if sequence is None:
            return False
        if sequence.state is SequenceState.RUNNING:
            self._batch.leave(sequence)
        elif sequence.state is SequenceState.FETCHING:
            del self._fetching[request_id]
        elif sequence.state is SequenceState.FETCHED:
            self._fetched.remove(sequence)
        else:
            self._waiting.remove(sequence)
        self.pool.release(sequence.blocks)
        return True

    def fetch_finished(self, request_id: str, *, ok: bool) -> bool:
        """Tell that the peer's KV has arrived, or will not; a failed fetch is recomputed locally.

        Returns:
            False when the request is gone (cancelled meanwhile).
        """
        sequence = self._fetching.pop(request_id, None)
        if sequence is None:
            return False
        if ok and sequence.host_blocks:
            self._loaded(sequence)
        elif ok:
            # The last prompt token is computed here again: the decoder makes its own first token.
            sequence.computed = min(sequence.pulled, sequence.request.prompt_tokens - 1)
            sequence.external_tokens = sequence.pulled - sequence.local_hit_tokens
            sequence.state = SequenceState.FETCHED
            self.counters.external_hits += sequence.external_tokens
            self._publish(sequence, full=sequence.pulled // self.config.block_size)
            self._fetched.append(sequence)
        else:
            self._reset(sequence)
            self._waiting.add(sequence, again=True)
        return True

    def _loaded(self, sequence: Sequence) -> None:
        """Blocks have come back from the host tier."""
        size, size_known = self.config.block_size, sequence.known
        sequence.computed = min(sequence.local_hit_tokens + sequence.host_blocks * size, size_known - 1)
        loaded = sequence.computed - sequence.local_hit_tokens
        if not sequence.emitted:
            sequence.external_tokens = min(loaded, sequence.request.prompt_tokens - sequence.local_hit_tokens)
            self.counters.external_hits += sequence.external_tokens
            self.counters.host_hits += sequence.external_tokens
        sequence.state = SequenceState.FETCHED
        self._publish(sequence, full=sequence.computed // size)
        self._fetched.append(sequence)

    # ---- the step ------------------------------------------------------------------------------------------

    def step(self, now_us: int) -> StepResult:
        """Plan and carry out one step that starts at `now_us`.

        The state is advanced at once; the tokens exist `duration_us` later, when the caller hands them on and
        calls again.
        """
        expired = self.holds.expire(now_us=now_us)
        # vLLM: a long prefill that is the only request starves nobody and takes the whole budget.
        self._crowded = self.running + self.waiting > 1
        plan: list[_Work] = []
        preemptions = self.counters.preemptions
        ticking = self._plan_decodes()
        budget = self._plan_running(plan, self.config.max_num_batched_tokens - len(ticking), planned=len(ticking))
        # As in vLLM, a step that had to preempt admits nobody: the freed blocks belong to who is running.
        # Unless nobody is: then a fetched request may go on with the blocks it owns.
        quiet = self.counters.preemptions == preemptions or not plan
        fetches = self._admit(plan, budget) if quiet else []
        decodes, context_tokens = len(ticking), sum([sequence.computed for sequence in ticking])
        prefill_tokens = pairs = 0
        for work in plan:
            if work.sequence.decoding:
                decodes += 1
                context_tokens += work.sequence.computed
            else:
                prefill_tokens += work.tokens
                pairs += work.tokens * (2 * work.sequence.computed + work.tokens) // 2
        duration_us = self.config.cost.step_us(
            decodes=decodes,
            context_tokens=context_tokens,
            prefill_tokens=prefill_tokens,
            prefill_pairs=pairs,
        )
        self.counters.steps += bool(ticking or plan)
        self.counters.prefill_pairs += pairs
        end_us = now_us + duration_us
        progress = [*self._tick(ticking, end_us=end_us), *self._commit(plan, end_us=end_us)]
        return StepResult(
            duration_us=duration_us,
            progress=tuple(progress),
            fetches=tuple(fetches),
            prefill_tokens=prefill_tokens,
            decodes=decodes,
            context_tokens=context_tokens,
            expired=tuple(expired),
        )

    def plan_leap(self, now_us: int, *, until_us: int) -> Leap | None:
        """Return the steps that begin before `until_us` and only decode, or None; changes nothing.

        Ends before the step in which a request finishes, a block is missing, or a hold runs out: those are `step`'s.
        """
        running = self._batch.decoding
        if not running or self._fetched or len(running) < len(self._batch.running):
            return None
        if len(running) > self.config.max_num_batched_tokens:
            return None
        if self._waiting and len(running) < self.config.max_num_seqs:
            return None
        expiry_us = self.holds.next_expiry_us()
        until_us = until_us if expiry_us is None else min(until_us, expiry_us)
        steps = steps_within_blocks(
            running, steps_without_end(running), free=self.pool.free, block_size=self.config.block_size
        )
        context = sum([sequence.computed for sequence in running])
        durations = self.config.cost.decode_steps_us(
            decodes=len(running), context_tokens=context, steps=steps, within_us=max(until_us - now_us, 0)
        )
        if not durations:
            return None
        names = tuple([sequence.request.request_id for sequence in running])
        return Leap(tuple(durations), names, context)

    def carry_out(self, leap: Leap) -> None:
        """Do the steps of a leap that was planned for the present state."""
        steps = len(leap.durations_us)
        ordered = [self._sequences[request_id] for request_id in leap.request_ids]
        for step, full, sequence in block_events(ordered, steps, block_size=self.config.block_size):
            if full:
                self._publish(sequence, full=(sequence.computed + step) // self.config.block_size)
            else:
                taken = self.pool.allocate(1)
                assert taken is not None, "a leap takes no more blocks than are free"
                sequence.blocks += taken
        for sequence in ordered:
            sequence.computed += steps
            sequence.emitted += steps
        self.counters.generation_tokens += steps * len(ordered)
        self.counters.steps += steps

    def _plan_decodes(self) -> list[Sequence]:
        """Give everyone who decodes a token and the block it needs; nobody, if a step might run out of either.

        Then it is for `_plan_running` to say who stays behind. Most steps have room for all, so they are what has to
        be fast.
        """
        running, decoding, config = self._batch.running, self._batch.decoding, self.config
        missing = [each for each in decoding if each.computed == len(each.blocks) * config.block_size]
        if len(decoding) >= config.max_num_batched_tokens:
            return []
        needed = len(missing)
        if len(decoding) < len(running):
            prefilling = [each for each in running if not each.decoding]
            needed += sum([max(config.blocks_for(each.known) - len(each.blocks), 0) for each in prefilling])
        if needed > self.pool.free:
            return []
        for sequence in missing:
            self._grow(sequence, 1)
        return decoding.copy()

    def _plan_running(self, plan: list[_Work], budget: int, *, planned: int) -> int:
        """Give running sequences their tokens, decodes first, preempting the youngest when blocks run out.

        Args:
            plan: takes them.
            budget: tokens that the step has left.
            planned: sequences that have theirs already: all that decode, or none.
        """
        if planned == len(self._batch.running):
            return budget
        left = [each for each in self._batch.running if not each.decoding] if planned else self._batch.running
        for sequence in sorted(left, key=lambda item: (not item.decoding, item.order)):
            if sequence.state is not SequenceState.RUNNING or budget <= 0:
                continue
            tokens, before = self._chunk(sequence, budget), len(plan)
            has_room = self._make_room(sequence, tokens, plan)
            if len(plan) < before:  # who was preempted for it gives back what it had of the budget
                budget = self.config.max_num_batched_tokens - sum(work.tokens for work in plan)
            if has_room:
                plan.append(_Work(sequence, tokens))
                budget -= tokens
        return budget

    def _make_room(self, sequence: Sequence, tokens: int, plan: list[_Work]) -> bool:
        """Allocate blocks for `tokens` more; False when the sequence itself had to be preempted."""
        while not self._grow(sequence, tokens):
            victim = max(self._batch.running, key=self._waiting.rank)
            self._preempt(victim)
            plan[:] = [work for work in plan if work.sequence is not victim]
            if victim is sequence:
                return False
        return True

    def _admit(self, plan: list[_Work], budget: int) -> list[FetchStart]:
        """Take waiting requests in order while tokens, places and blocks last.

        Fetched requests come first: they own their blocks already, so making them wait behind a request that
        needs blocks could block both for ever.
        """
        fetches: list[FetchStart] = []
        while budget > 0 and len(self._batch.running) < self.config.max_num_seqs:
            if self._fetched:
                sequence = self._fetched.popleft()
            elif self._waiting and self._place(self._waiting.first):
                sequence = self._waiting.take()
            else:
                break
            if sequence.state is SequenceState.WAITING and sequence.pulled > sequence.computed:
                fetches.append(self._start_fetch(sequence))
                continue
            if sequence.state is SequenceState.WAITING and sequence.host_blocks:
                fetches.append(self._start_load(sequence))
                continue
            tokens = self._chunk(sequence, budget)
            grown = self._grow(sequence, tokens)
            assert grown, "a placed or fetched request has room for its prompt"
            sequence.state = SequenceState.RUNNING
            self._batch.running.append(sequence)
            plan.append(_Work(sequence, tokens))
            budget -= tokens
        return fetches

    def _place(self, sequence: Sequence) -> bool:
        """Reference the cached prefix of a waiting request, if everything it knows would fit."""
        size = self.config.block_size
        limit = (sequence.known - 1) // size
        hits = self.pool.lookup(sequence.request.block_keys, most=limit)
        new = self.config.blocks_for(sequence.known) - len(hits)
        if not self.pool.affords(hits, new):
            return False
        self.pool.reference(hits)
        if not sequence.request.pull:
            sequence.host_blocks = self._host.leading(sequence.request.block_keys, start=len(hits), end=limit)
        sequence.blocks = hits
        sequence.computed = len(hits) * size
        sequence.published = len(hits)
        if not sequence.emitted:  # else it was preempted, and has been counted
            sequence.local_hit_tokens = min(sequence.computed, sequence.request.prompt_tokens)
            self.counters.count_lookup(sequence)
        return True

    def _start_fetch(self, sequence: Sequence) -> FetchStart:
        """Wait for what a peer has of the prompt."""
        missing, before = sequence.pulled - sequence.computed, len(sequence.blocks)
        self._await_kv(sequence, up_to=sequence.request.prompt_tokens)
        return FetchStart(sequence.request.request_id, missing, len(sequence.blocks) - before)

    def _start_load(self, sequence: Sequence) -> FetchStart:
        """Wait for what the host tier has of all that is known."""
        self._await_kv(sequence, up_to=sequence.known)
        tokens = sequence.host_blocks * self.config.block_size
        return FetchStart(sequence.request.request_id, tokens, sequence.host_blocks, from_host=True)

    def _await_kv(self, sequence: Sequence, *, up_to: int) -> None:
        """Allocate all of it and leave the queue until the KV is here."""
        grown = self._grow(sequence, up_to - sequence.computed)
        assert grown, "a placed request fits"
        sequence.state = SequenceState.FETCHING
        self._fetching[sequence.request.request_id] = sequence

    def _chunk(self, sequence: Sequence, budget: int) -> int:
        """Return how many of the sequence's pending tokens go into this step."""
        tokens = min(sequence.pending, budget)
        threshold = self.config.long_prefill_token_threshold
        return min(tokens, threshold) if threshold and self._crowded else tokens

    def _grow(self, sequence: Sequence, tokens: int) -> bool:
        """Allocate the blocks that `tokens` more computed tokens need."""
        missing = self.config.blocks_for(sequence.computed + tokens) - len(sequence.blocks)
        if missing <= 0:  # of most decodes
            return True
        taken = self.pool.allocate(missing)
        if taken is None:
            return False
        sequence.blocks += taken
        return True

    def _preempt(self, sequence: Sequence) -> None:
        """Free a running sequence's blocks and queue it first; its tokens so far are recomputed later."""
        self._batch.leave(sequence)
        sequence.preemptions += 1
        self._reset(sequence)
        self._waiting.add(sequence, again=True)
        self.counters.preemptions += 1

    def _reset(self, sequence: Sequence) -> None:
        """Give back everything a sequence has and let it wait to be computed from the start, locally."""
        self.pool.release(sequence.blocks)
        sequence.blocks = []
        sequence.computed = 0
        sequence.published = 0
        sequence.host_blocks = 0
        sequence.state = SequenceState.WAITING
        sequence.request = replace(sequence.request, pull=False)

    # ---- after the step ------------------------------------------------------------------------------------

    def _tick(self, ticking: SequenceOf[Sequence], *, end_us: int) -> list[Progress]:
        """Everyone who decodes has a token more."""
        size = self.config.block_size
        progress: list[Progress] = []
        for sequence in ticking:
            sequence.computed += 1
            sequence.emitted += 1
            if not sequence.computed % size:
                self._publish(sequence, full=sequence.computed // size)
            ends = sequence.emitted == sequence.request.output_tokens
            progress.append(self._finish(sequence, None, end_us=end_us) if ends else sequence.token)
        self.counters.generation_tokens += len(ticking)
        return progress

    def _commit(self, plan: SequenceOf[_Work], *, end_us: int) -> list[Progress]:
        progress: list[Progress] = []
        for work in plan:
            sequence = work.sequence
            sequence.computed += work.tokens
            self._publish(sequence, full=sequence.computed // self.config.block_size)
            if sequence.pending == 0:
                progress.append(self._emit(sequence, end_us=end_us))
            if sequence.decoding and sequence.emitted < sequence.request.output_tokens:
                self._batch.decodes_from_now_on(sequence)
        return progress

    def _emit(self, sequence: Sequence, *, end_us: int) -> Progress:
        """Add one token; finish the request when it was the last."""
        sequence.emitted += 1
        self.counters.generation_tokens += 1
        sources = self.counters.count_prompt(sequence) if sequence.emitted == 1 else None
        request = sequence.request
        if sequence.emitted < request.output_tokens:
            return sequence.token if sources is None else Progress(request_id=request.request_id, sources=sources)
        return self._finish(sequence, sources, end_us=end_us)

    def _finish(self, sequence: Sequence, sources: PromptSources | None, *, end_us: int) -> Progress:
        """The last token is there."""
        request = sequence.request
        self._batch.leave(sequence)
        del self._sequences[request.request_id]
        if request.hold:
            blocks = tuple(sequence.blocks)
            self.holds.add(Hold(request.request_id, blocks, end_us + self.config.kv_lease_us))
        else:
            blocks = ()
            self.pool.release(sequence.blocks)
        return Progress(
            request_id=request.request_id,
            sources=sources,
            finished=True,
            held_blocks=blocks,
            computed_tokens=sequence.computed,
        )

    def _publish(self, sequence: Sequence, *, full: int) -> None:
        """Offer newly filled blocks to the prefix cache."""
        start = sequence.published
        if full <= start:
            return
        end = min(full, len(sequence.request.block_keys))
        if start < end and self.config.enable_prefix_caching:
            keys = sequence.request.block_keys[start:end]
            behind = sequence.blocks[start - 1] if start else None
            self.pool.publish(sequence.blocks[start:end], keys, behind=behind)
            if self.config.host_blocks:
                self._host.put(keys)
        sequence.published = full

    def check(self) -> None:
        """Assert the model's invariants: every block owned exactly as often as it is referenced.

        For tests and for a simulator that checks itself while it runs.
        """
        owners: list[SequenceOf[int]] = [sequence.blocks for sequence in self._sequences.values()]
        self.pool.check([*owners, *self.holds.blocks()])
        assert len(self._sequences) == self.running + self.waiting
        self._batch.check()
        for sequence in self._sequences.values():
            assert sequence.computed <= len(sequence.blocks) * self.config.block_size
            assert sequence.local_hit_tokens < sequence.request.prompt_tokens
