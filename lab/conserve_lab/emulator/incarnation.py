"""One life of an emulated engine: from start to kill, with its own cache, holds and counters."""

from __future__ import annotations

import asyncio
import logging
import secrets
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Final

from conserve_lab.emulator.config import EmulatorConfig
from conserve_lab.emulator.driver import Driver, DriverHooks, TokenStream
from conserve_lab.emulator.errors import ApiError, internal_error
from conserve_lab.emulator.fabric import Fabric
from conserve_lab.emulator.faults import Faults
from conserve_lab.emulator.generation import Choice, Generation, Run
from conserve_lab.emulator.kv_params import PullParams
from conserve_lab.emulator.language import Speaker, block_keys
from conserve_lab.emulator.ledger import HeldPrompt, HoldLedger, HoldState
from conserve_lab.emulator.metrics import EngineMetrics
from conserve_lab.engine_model import EngineModel, EngineRequest, FetchStart, TransferLink
from conserve_vllm.holds import HoldBook

_NEVER_US: Final = 1 << 60
_LOG = logging.getLogger("conserve_lab.emulator")


@dataclass(slots=True)
class _Pull:
    """A pull that has been accepted and not finished."""

    params: PullParams
    source: Incarnation | None
    """The live prefiller whose hold is claimed; None when the transfer is bound to fail."""


class TransferFailed(Exception):  # noqa: N818  (vLLM's word for it)
    """A peer's KV could not be read."""


class Incarnation:
    """A running engine.

    Args:
        config: The engine.
        kv_port: Its side channel port.
        fabric: The wires to its peers.
        clock_us: A monotonic clock in microseconds.
        started_at_s: Unix time of its start.
    """

    def __init__(
        self,
        config: EmulatorConfig,
        *,
        kv_port: int,
        fabric: Fabric,
        clock_us: Callable[[], int],
        started_at_s: float,
    ) -> None:
        self.config = config
        self.nixl_engine_id = f"{config.id}-{secrets.token_hex(8)}"
        self.started_at_s = started_at_s
        self.kv_address = (config.host, kv_port)
        self.clock_us = clock_us
        self.faults = Faults()
        self.metrics = EngineMetrics()
        self.model = EngineModel(config.engine_model())
        self.link = TransferLink(config.transfer_cost())
        self.ledger = HoldLedger(total_blocks=self.model.config.kv_blocks, block_size=config.block_size)
        self.speaker = Speaker(config.language())
        self.driver = Driver(
            self.model,
            clock_us,
            DriverHooks(self._begin_fetch, self._note_token, self._note_finish, self._note_expired),
        )
        self._fabric = fabric
        self._met: set[str] = set()
        self._pulls: dict[str, _Pull] = {}
        self._runs: dict[str, Run] = {}
        self._tasks: set[asyncio.Task[None]] = set()
        self._broken = False
        self._book = HoldBook()

    # ---- life ----------------------------------------------------------------------------------------------

    def start(self) -> None:
        """Begin to step; call it on the fleet's event loop."""
        self._fabric.join(self)
        self._spawn(self.driver.run())

    def stop(self) -> None:
        """Die: forget everything; peers' claimed blocks live on until their lease ends."""
        self._fabric.leave(self)
        lease_us = self.config.kv_lease_ms * 1000
        for pull in self._pulls.values():
            if pull.source is not None:
                pull.source.end_heartbeats(pull.params.request_id, until_us=self.clock_us() + lease_us * 2 // 3)
        self._pulls.clear()
        for task in self._tasks:
            task.cancel()

    # ---- requests ------------------------------------------------------------------------------------------

    def begin(self, generation: Generation) -> Run:
        """Accept a request and queue its first choice.

        Raises:
            ApiError: The decode leg is refused, or the request does not fit.
            SchemaUnsatisfiable: No answer satisfies the request's schemas.
        """
        answers = [
            self.speaker.answer(generation.prompt, replace(generation.wish, index=index))
            for index in range(generation.n)
        ]
        run = Run(
            generation=generation,
            internal_id=f"{generation.request_id}-{secrets.token_hex(4)}",
            choices=[Choice(index, answer) for index, answer in enumerate(answers)],
            arrived_us=self.clock_us(),
            block_size=self.config.block_size,
        )
        if self._broken:
            raise internal_error()
        pull = self._accept_pull(generation)
        try:
            self._submit(run, run.choices[0], pull=pull is not None)
        except ValueError as error:
            self._runs.pop(run.internal_id, None)
            self._give_back(pull)
            raise ApiError(str(error)) from error
        if pull is not None:
            self._pulls[run.internal_id] = pull
        return run

    def end(self, run: Run) -> None:
        """Forget a request; abort what still runs of it."""
        for choice in run.choices:
            sequence_id = _sequence_id(run, choice.index)
            self._runs.pop(sequence_id, None)
            self.driver.cancel(sequence_id)
            self._give_back(self._pulls.pop(sequence_id, None))

    def kv_answer(self, run: Run) -> dict[str, Any] | None:
        """Return the `kv_transfer_params` of a finished answer, and hold its blocks for whoever comes with them."""
        stream = run.choices[0].stream
        if not run.held or stream is None:
            return None
        return {
            "do_remote_prefill": True,
            "do_remote_decode": False,
            "remote_block_ids": [list(stream.held_blocks)],
            "remote_engine_id": self.nixl_engine_id,
            "remote_request_id": run.internal_id,
            "remote_host": self.kv_address[0],
            "remote_port": self.kv_address[1],
            "tp_size": 1,
            "dcp_size": 1,
            "pp_size": 1,
            "remote_num_tokens": stream.computed_tokens,
            "remote_blocks_expiry_time": None,
            "transfer_mode": "pull",
            "remote_prefill_cached_tokens": run.cached_tokens,
        }

    def _submit(self, run: Run, choice: Choice, *, pull: bool) -> None:
        generation = run.generation
        self._runs[_sequence_id(run, choice.index)] = run
        tokens = generation.prompt + choice.answer.token_ids
        choice.stream = self.driver.submit(
            EngineRequest(
                request_id=_sequence_id(run, choice.index),
                prompt_tokens=run.prompt_tokens,
                output_tokens=len(choice.answer.token_ids),
                block_keys=block_keys(tokens, block_size=self.config.block_size, salt=generation.cache_salt),
                pull=pull,
                hold=generation.kv.hold and choice.index == 0,
            ),
            changed=run.changed,
        )

    # ---- what the driver tells -----------------------------------------------------------------------------

    def _note_token(self, stream: TokenStream, now_us: int) -> None:
        if stream.produced:
            self.metrics.itl_s.observe((now_us - stream.last_token_us) / 1e6)
            return
        self.metrics.ttft_s.observe((now_us - stream.submitted_us) / 1e6)
        run = self._runs.get(stream.request.request_id)
        if run is not None and stream is run.choices[0].stream:
            for choice in run.choices[1:]:
                # Siblings find the prompt in the prefix cache; nothing is pulled or computed twice.
                self._submit(run, choice, pull=False)

    def _note_finish(self, stream: TokenStream) -> None:
        self.metrics.e2e_s.observe((self.clock_us() - stream.submitted_us) / 1e6)
        if stream.error is not None:
            self.metrics.finished["error"] += 1
            return
        run = self._runs.get(stream.request.request_id)
        self.metrics.finished[_finished_reason(run, stream)] += 1
        if run is not None and stream.held_blocks:
            run.held = True
            self.ledger.record(HeldPrompt(run.internal_id, run.generation.prompt, stream.held_blocks))
        if run is not None and stream is run.choices[0].stream and self.config.leased_holds:
            self._follow_order(run)

    def _follow_order(self, run: Run) -> None:
        """Hold for the lease's own time and end its hold before, as `conserve_vllm.leased_nixl` does."""
        order, now_us = run.generation.kv.order, self.clock_us()
        previous = None
        if order is not None and order.hold_s == 0:
            previous = self._book.end(order.lease_id)
        elif order is not None and run.held:
            hold_us = min(round(order.hold_s * 1e6), self.config.kv_lease_ms * 1000)
            self.model.holds.renew(run.internal_id, until_us=now_us + hold_us)
            until_s = (now_us + hold_us) / 1e6
            previous = self._book.begin(order.lease_id, run.internal_id, until_s=until_s, now_s=now_us / 1e6)
        if previous is not None and previous in self.model.holds:
            self.release(previous, state=HoldState.EXPIRED)

    def _note_expired(self, request_ids: tuple[str, ...]) -> None:
        for request_id in request_ids:
            self.ledger.end(request_id, HoldState.EXPIRED, now_us=self.clock_us())

    # ---- holds for peers -----------------------------------------------------------------------------------

    def release(self, request_id: str, *, state: HoldState) -> None:
        """Free a peer's blocks: it has read them, or will not."""
        if not self.model.holds.release(request_id):
            self.metrics.notifications_after_expiry += 1
        self.ledger.end(request_id, state, now_us=self.clock_us())
        self.driver.wake()

    def end_heartbeats(self, request_id: str, *, until_us: int) -> None:
        """The peer that claimed a hold is dead: its blocks go when the lease ends."""
        self.model.holds.renew(request_id, until_us=until_us)
        self.driver.wake()

    def expire_now(self) -> None:
        """End every lease that no decode leg has claimed (fault `expire_kv`)."""
        self.refresh_ledger(now_us=_NEVER_US - 1)

    def refresh_ledger(self, *, now_us: int | None = None) -> None:
        """End the holds whose lease is over and note in the ledger when."""
        at_us = self.clock_us() if now_us is None else now_us
        self._note_expired(tuple(self.model.holds.expire(now_us=at_us)))
        self.driver.wake()

    # ---- pulling from peers --------------------------------------------------------------------------------

    def _accept_pull(self, generation: Generation) -> _Pull | None:
        """Check a decode leg at the prefiller's ledger and claim its hold."""
        params = generation.kv.pull
        if params is None:
            return None
        source = self._fabric.at(params.host, params.port)
        if source is None or source.nixl_engine_id != params.engine_id or not self._compatible(source):
            return _Pull(params, None)
        source.refresh_ledger()
        held = source.ledger.claim(params, generation.prompt, now_us=self.clock_us())
        if held is None:
            return _Pull(params, None)
        # Heartbeats: from here on the blocks are safe however long the request queues.
        source.model.holds.renew(params.request_id, until_us=_NEVER_US)
        return _Pull(params, source)

    def _compatible(self, source: Incarnation) -> bool:
        """VLLM compares model names in the handshake and block sizes at run time; either difference fails."""
        return (source.config.model, source.config.block_size) == (self.config.model, self.config.block_size)

    def _give_back(self, pull: _Pull | None) -> None:
        """An aborted decode leg tells the prefiller to free the blocks."""
        if pull is not None and pull.source is not None:
            pull.source.release(pull.params.request_id, state=HoldState.PULLED)

    def _begin_fetch(self, fetch: FetchStart) -> None:
        self._spawn(self._fetch(fetch))

    async def _fetch(self, fetch: FetchStart) -> None:
        pull = self._pulls.get(fetch.request_id)
        if pull is None:
            return
        try:
            await self._transfer(pull, fetch)
        except TransferFailed:
            self.metrics.failed_transfers += 1
            self._pulls.pop(fetch.request_id, None)
            self._give_back(pull)
            if self.config.kv_load_failure_policy == "fail":
                self.driver.fail(fetch.request_id, internal_error())
                return
            self.model.fetch_finished(fetch.request_id, ok=False)
        else:
            self._pulls.pop(fetch.request_id, None)
            self.model.fetch_finished(fetch.request_id, ok=True)
        self.driver.wake()

    async def _transfer(self, pull: _Pull, fetch: FetchStart) -> None:
        """Wait as long as the transfer takes, then free the prefiller's blocks."""
        params = pull.params
        peer = self._fabric.at(params.host, params.port)
        if params.engine_id not in self._met:
            if peer is None or peer.faults.refuse_transfer:
                await asyncio.sleep(self.config.handshake_timeout_ms / 1000)
                raise TransferFailed
            self._met.add(params.engine_id)
        source = pull.source
        if source is None or peer is not source or source.faults.refuse_transfer:
            raise TransferFailed
        start_us = self.clock_us()
        moved_tokens = fetch.missing_blocks * self.config.block_size  # only whole blocks move
        done_us = source.link.reserve(moved_tokens, now_us=start_us)
        await asyncio.sleep(max(0, done_us - start_us) / 1e6)
        if self._fabric.at(params.host, params.port) is not source or source.faults.refuse_transfer:
            raise TransferFailed
        source.release(params.request_id, state=HoldState.PULLED)
        self.metrics.transfer_s.observe((self.clock_us() - start_us) / 1e6)
        self.metrics.post_s.observe(0.0)
        self.metrics.transfer_bytes.observe(source.link.cost.bytes_of(moved_tokens))
        self.metrics.transfer_descriptors.observe(fetch.missing_blocks)

    def _spawn(self, work: Any) -> None:
        task: asyncio.Task[None] = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._reap)

    def _reap(self, task: asyncio.Task[None]) -> None:
        """Forget an ended task; one that failed breaks the engine loudly, for its requests would hang."""
        self._tasks.discard(task)
        if not task.cancelled() and (problem := task.exception()) is not None:
            _LOG.error("engine %s is broken", self.config.id, exc_info=problem)
            self._broken = True
            self.driver.fail_all(internal_error())


def _sequence_id(run: Run, index: int) -> str:
    """Return the id of one choice inside the engine."""
    return run.internal_id if index == 0 else f"{run.internal_id}-{index}"


def _finished_reason(run: Run | None, stream: TokenStream) -> str:
    """Return vLLM's `finished_reason`: a tool call is a stop like any other."""
    choices = run.choices if run is not None else []
    cut_off = any(choice.stream is stream and choice.answer.finish_reason == "length" for choice in choices)
    return "length" if cut_off else "stop"
