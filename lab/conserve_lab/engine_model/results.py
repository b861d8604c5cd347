"""What a step of the engine says about itself."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class PromptSources:
    """Where the KV of a prompt came from; the three add up to the prompt (vLLM: `prompt_tokens_by_source`)."""

    local_compute: int
    local_cache_hit: int
    external_kv_transfer: int


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """One token of one request."""

    request_id: str
    sources: PromptSources | None = None
    """Set with the request's first token."""
    finished: bool = False
    held_blocks: tuple[int, ...] = ()
    """With the last token of a request that asked for a hold: the blocks kept for a peer."""
    computed_tokens: int = 0
    """With the last token: tokens whose KV is in the blocks."""


@dataclass(frozen=True, slots=True)
class FetchStart:
    """A request now waits for KV; the driver moves the KV and calls `fetch_finished`."""

    request_id: str
    missing_tokens: int
    missing_blocks: int
    from_host: bool = False
    """The KV comes from this engine's own host memory, not from a peer."""


@dataclass(frozen=True, slots=True)
class StepResult:
    """Everything one step did. Tokens exist `duration_us` after the step's start."""

    duration_us: int
    progress: tuple[Progress, ...] = ()
    fetches: tuple[FetchStart, ...] = ()
    prefill_tokens: int = 0
    decodes: int = 0
    context_tokens: int = 0
    """KV tokens that the decodes read."""
    expired: tuple[str, ...] = ()
    """Requests whose hold ended at the step's start."""

    @property
    def idle(self) -> bool:
        """Whether nothing was computed and no fetch began."""
        return not self.prefill_tokens and not self.decodes and not self.fetches
