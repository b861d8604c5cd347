"""Fits the engine model's speeds to measured cells, by a deterministic pattern search on relative errors.

The form is that of `StepCost`. Decode cells fix the floor, the base, the cost of context and of a sequence; prefill
cells then fix the rate, the cost of attention and what a request costs before its first step (`front_us`: HTTP,
tokenisation, scheduling). Relative errors, because a cell of 12 ms matters as much as one of 7 s.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from conserve_lab.calibration.cells import Cells, DecodeCell, PrefillCell
from conserve_lab.calibration.errors import CalibrationError
from conserve_lab.engine_model import StepCost

CELLS_MIN = 4
WORST_WEIGHT = 4.0
"""The worst cell counts like this many average ones: a fit must not buy its average with one bad cell."""

_FIRST_STRIDE, _LAST_STRIDE, _SHRINK = 0.5, 0.0005, 0.6


@dataclass(frozen=True, slots=True, kw_only=True)
class FittedEngine:
    """The speeds of one engine.

    Attributes:
        front_us: from a request's arrival to its first step on an idle engine.
    """

    cost: StepCost
    front_us: int

    def decode_us(self, cell: DecodeCell) -> int:
        """Predict a decode cell."""
        return self.cost.step_us(decodes=cell.sequences, context_tokens=cell.context_tokens, prefill_tokens=0)

    def prefill_us(self, cell: PrefillCell, *, chunk_tokens: int) -> int:
        """Predict a prefill cell: its chunks one after the other."""
        total_us, done = self.front_us, 0
        while done < cell.prompt_tokens:
            tokens = min(chunk_tokens, cell.prompt_tokens - done)
            pairs = tokens * (2 * done + tokens) // 2
            total_us += self.cost.step_us(decodes=0, context_tokens=0, prefill_tokens=tokens, prefill_pairs=pairs)
            done += tokens
        return total_us


def fit(cells: Cells) -> FittedEngine:
    """Fit the model to the cells.

    Raises:
        CalibrationError: there are too few cells to fix the parameters.
    """
    if len(cells.decode) < CELLS_MIN or len(cells.prefill) < CELLS_MIN:
        raise CalibrationError(
            f"{len(cells.decode)} decode and {len(cells.prefill)} prefill cells fix nothing: measure {CELLS_MIN} each"
        )
    decode = _search(lambda values: _loss(_decode_errors(cells.decode, _decode_cost(values))), _decode_start(cells))
    base = _decode_cost(decode)

    def with_prefill(values: Sequence[float]) -> FittedEngine:
        rate, attention, front = values
        cost = StepCost(
            base_us=base.base_us,
            floor_us=base.floor_us,
            decode_us_per_sequence=base.decode_us_per_sequence,
            decode_ns_per_context_token=base.decode_ns_per_context_token,
            prefill_tokens_per_s=max(round(rate), 1),
            prefill_attention_ps_per_pair=round(attention),
        )
        return FittedEngine(cost=cost, front_us=round(front))

    chunk = cells.max_num_batched_tokens
    found = _search(
        lambda values: _loss(_prefill_errors(cells.prefill, with_prefill(values), chunk)), _prefill_start(cells)
    )
    return with_prefill(found)


def cell_errors(engine: FittedEngine, cells: Cells) -> list[tuple[str, int, int, float]]:
    """Return (cell, measured, predicted, relative error) of every cell; times in microseconds."""
    rows = [(str(cell), cell.step_us, engine.decode_us(cell)) for cell in cells.decode]
    chunk = cells.max_num_batched_tokens
    rows += [(str(cell), cell.first_token_us, engine.prefill_us(cell, chunk_tokens=chunk)) for cell in cells.prefill]
    return [(name, measured, predicted, predicted / measured - 1) for name, measured, predicted in rows]


def _decode_cost(values: Sequence[float]) -> StepCost:
    floor, base, context, sequence = values
    return StepCost(
        floor_us=round(floor),
        base_us=round(base),
        decode_ns_per_context_token=round(context),
        decode_us_per_sequence=round(sequence),
    )


def _decode_start(cells: Cells) -> list[float]:
    quickest = min(cell.step_us for cell in cells.decode)
    largest = max(cells.decode, key=lambda cell: cell.context_tokens)
    slope_ns = max((largest.step_us - quickest) * 1000 / largest.context_tokens, 1.0)
    return [quickest, quickest / 2, slope_ns, max(quickest / 500, 1.0)]


def _prefill_start(cells: Cells) -> list[float]:
    longest = max(cells.prefill, key=lambda cell: cell.prompt_tokens)
    quickest = min(cell.first_token_us for cell in cells.prefill)
    rate = 2 * longest.prompt_tokens * 1_000_000 / longest.first_token_us
    pairs = longest.prompt_tokens**2 / 2
    return [rate, longest.first_token_us * 1_000_000 / pairs / 2, quickest / 2]


def _decode_errors(cells: Sequence[DecodeCell], cost: StepCost) -> list[float]:
    engine = FittedEngine(cost=cost, front_us=0)
    return [engine.decode_us(cell) / cell.step_us - 1 for cell in cells]


def _prefill_errors(cells: Sequence[PrefillCell], engine: FittedEngine, chunk_tokens: int) -> list[float]:
    return [engine.prefill_us(cell, chunk_tokens=chunk_tokens) / cell.first_token_us - 1 for cell in cells]


def _loss(errors: Sequence[float]) -> float:
    squares = [error * error for error in errors]
    return sum(squares) / len(squares) + WORST_WEIGHT * max(squares) / len(squares)


def _search(loss: Callable[[Sequence[float]], float], start: Sequence[float]) -> list[float]:
    """Compass search with shrinking strides, each relative to its value; deterministic, no gradient needed."""
    best, best_loss = list(start), loss(start)
    stride = _FIRST_STRIDE
    while stride > _LAST_STRIDE:
        moved = False
        for index in range(len(best)):
            for factor in (1 + stride, 1 / (1 + stride)):
                tried = [*best[:index], best[index] * factor, *best[index + 1 :]]
                tried_loss = loss(tried)
                if tried_loss < best_loss:
                    best, best_loss, moved = tried, tried_loss, True
        if not moved:
            stride *= _SHRINK
    return best
