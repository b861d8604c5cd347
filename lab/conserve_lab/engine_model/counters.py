"""What an engine has done since it started."""

from __future__ import annotations

from dataclasses import dataclass

from conserve_lab.engine_model.results import PromptSources
from conserve_lab.engine_model.sequence import Sequence


@dataclass(slots=True)
class EngineCounters:
    """Totals since the engine started; they only grow."""

    steps: int = 0
    generation_tokens: int = 0
    local_compute_tokens: int = 0
    local_cache_hit_tokens: int = 0
    external_tokens: int = 0
    prefix_queries: int = 0
    prefix_hits: int = 0
    external_queries: int = 0
    external_hits: int = 0
    host_hits: int = 0
    """The part of `external_hits` that came from the host tier."""
    prefill_pairs: int = 0
    """Pairs of a computed prompt token and one at or before it: what attention costs."""
    preemptions: int = 0
    holds_expired: int = 0

    @property
    def prompt_tokens(self) -> int:
        """Prompt tokens of all requests that reached their first token."""
        return self.local_compute_tokens + self.local_cache_hit_tokens + self.external_tokens

    def count_lookup(self, sequence: Sequence) -> None:
        """An admission has asked the prefix cache; not to be counted of a request that has emitted tokens before."""
        self.prefix_queries += sequence.request.prompt_tokens
        self.prefix_hits += sequence.local_hit_tokens
        if sequence.request.pull:
            self.external_queries += sequence.request.prompt_tokens - sequence.local_hit_tokens

    def count_prompt(self, sequence: Sequence) -> PromptSources:
        """A request has reached its first token; returned: where its prompt's KV came from."""
        prompt = sequence.request.prompt_tokens
        local, external = sequence.local_hit_tokens, sequence.external_tokens
        sources = PromptSources(prompt - local - external, local, external)
        self.local_compute_tokens += sources.local_compute
        self.local_cache_hit_tokens += local
        self.external_tokens += external
        return sources
