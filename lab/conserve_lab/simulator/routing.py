"""Which engines a turn takes, by the policy: what a client, a router or a lease decides."""

from __future__ import annotations

import math
import random

from conserve_lab.simulator.engine import SimulatedEngine
from conserve_lab.simulator.fleet import Fleet
from conserve_lab.simulator.policies import Dispatch, FollowUp
from conserve_sdk.core.lease import Lease

_MILLION = 1_000_000


class Router:
    """The way of one conversation's turns.

    Args:
        fleet: where they go.
        number: of the conversation.
    """

    def __init__(self, fleet: Fleet, *, number: int) -> None:
        self._fleet = fleet
        self._number = number
        self._stuck: tuple[SimulatedEngine | None, SimulatedEngine] | None = None

    def engines(self, lease: Lease | None) -> tuple[SimulatedEngine | None, SimulatedEngine]:
        """The prefiller (if there is one) and the decoder that are the conversation's in this turn."""
        fleet = self._fleet
        if lease is not None:
            prefiller = None if lease.prefiller is None else fleet.engine(lease.prefiller.engine_id)
            return prefiller, fleet.engine(lease.decoder.engine_id)
        if fleet.policy.dispatch is Dispatch.ROUND_ROBIN:
            return fleet.next_prefiller(), fleet.next_decoder()
        if self._stuck is None or not all(engine.up for engine in self._stuck if engine is not None):
            self.leave()
            self._stuck = fleet.least_sessions(self._number)
        return self._stuck

    def leave(self) -> None:
        """The conversation is over, or its engines are."""
        if self._stuck is not None:
            self._fleet.sessions[self._stuck[1].name] -= 1
            self._stuck = None

    def through_prefiller(
        self, prefiller: SimulatedEngine, decoder: SimulatedEngine, *, turn: int, append: int, held: int
    ) -> bool:
        """Whether a follow-up turn is prefilled on the prefiller.

        Args:
            prefiller: the conversation's.
            decoder: the conversation's.
            turn: its number, from 0.
            append: new tokens.
            held: tokens of the prompt that the decoder has.
        """
        policy = self._fleet.policy
        match policy.follow_up:
            case FollowUp.PREFILLER:
                return True
            case FollowUp.SUFFIX:
                return append > policy.suffix_tokens
            case FollowUp.ESTIMATE:
                there, here = _estimates(prefiller, decoder, append=append, held=held)
                return there * self._error(turn, "there") < here * self._error(turn, "here")
        # A predictor that is wrong: a matter of the turn's place, so that runs can be compared.
        return (self._number * 37 + turn * 61) % 100 < policy.flip_percent

    def _error(self, turn: int, name: str) -> float:
        spread = self._fleet.policy.estimate_spread
        if not spread:
            return 1.0
        draw = random.Random(f"{name} {self._number} {turn}")  # noqa: S311 -- a workload, not a secret
        return math.exp(draw.gauss(0.0, spread))


def _estimates(prefiller: SimulatedEngine, decoder: SimulatedEngine, *, append: int, held: int) -> tuple[int, int]:
    """Microseconds to the first token through the prefiller (history and new blocks move), and on the decoder."""

    def work_us(engine: SimulatedEngine) -> int:
        cost = engine.kind.cost
        queue = engine.model.unprefilled_tokens
        pairs = append * (2 * held + append) // 2
        attention_us = cost.prefill_attention_ps_per_pair * pairs // _MILLION
        return (queue + append) * _MILLION // cost.prefill_tokens_per_s + attention_us

    move_us = decoder.kind.transfer.transfer_us(held) + prefiller.kind.transfer.transfer_us(append)
    return work_us(prefiller) + move_us, work_us(decoder)
