"""What the engine model says of requests whose instants are known: one engine, virtual time."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field

from conserve_lab.engine_model import EngineModel, EngineModelConfig, EngineRequest, PromptSources


@dataclass(slots=True)
class Foreseen:
    """What the model says of one request.

    Attributes:
        tokens_us: when each of its tokens exists.
        sources: where its prompt's KV came from.
    """

    at_us: int
    tokens_us: list[int] = field(default_factory=list)
    sources: PromptSources | None = None

    @property
    def ttft_us(self) -> int:
        """From the request's instant to its first token."""
        return self.tokens_us[0] - self.at_us

    @property
    def duration_us(self) -> int:
        """From the request's instant to its last token."""
        return self.tokens_us[-1] - self.at_us

    @property
    def mean_tbt_us(self) -> float:
        """Mean time between tokens."""
        return (self.tokens_us[-1] - self.tokens_us[0]) / max(len(self.tokens_us) - 1, 1)


def foresee(config: EngineModelConfig, requests: Sequence[tuple[int, EngineRequest]]) -> list[Foreseen]:
    """Run requests that arrive at given instants through one engine.

    Args:
        config: the engine.
        requests: instant in microseconds, and request; ids must differ.

    Returns:
        One entry a request, in their order.

    Raises:
        ValueError: a request could never fit into the KV cache.
    """
    model = EngineModel(config)
    found = {request.request_id: Foreseen(at_us) for at_us, request in requests}
    coming = sorted(requests, key=lambda item: item[0])
    now_us = position = 0
    while position < len(coming) or model.has_work:
        if not model.has_work:
            now_us = max(now_us, coming[position][0])
        while position < len(coming) and coming[position][0] <= now_us:
            model.submit(coming[position][1])
            position += 1
        result = model.step(now_us)
        now_us += result.duration_us
        for progress in result.progress:
            seen = found[progress.request_id]
            seen.tokens_us.append(now_us)
            seen.sources = progress.sources or seen.sources
    return [found[request.request_id] for _, request in requests]
