"""Cells of an engine whose costs are known, as a fit should find them again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from conserve_lab.calibration import Cells, DecodeCell, FittedEngine, PrefillCell

__all__ = ["CHUNK", "cells_of"]

CHUNK = 2_048


def cells_of(
    engine: FittedEngine, *, sequences: Sequence[int], context_tokens: Sequence[int], prompt_tokens: Sequence[int]
) -> Cells:
    """One decode cell per pair of batch size and context of each sequence, one prefill cell per prompt."""
    decode = [
        DecodeCell(sequences=count, context_tokens=count * tokens, step_us=1)
        for count in sequences
        for tokens in context_tokens
    ]
    prefill = [PrefillCell(prompt_tokens=tokens, first_token_us=1) for tokens in prompt_tokens]
    return Cells(
        source="made up",
        engine="known",
        max_num_batched_tokens=CHUNK,
        decode=tuple(replace(cell, step_us=engine.decode_us(cell)) for cell in decode),
        prefill=tuple(replace(cell, first_token_us=engine.prefill_us(cell, chunk_tokens=CHUNK)) for cell in prefill),
    )
