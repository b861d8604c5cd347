"""One request inside the engine."""

from __future__ import annotations

from collections.abc import Sequence as SequenceOf
from dataclasses import dataclass, field
from enum import StrEnum

from conserve_lab.engine_model.results import Progress


class SequenceState(StrEnum):
    """Where a request is in its life."""

    WAITING = "waiting"
    FETCHING = "fetching"
    """Its blocks are allocated and the peer's KV is on its way (vLLM: WAITING_FOR_REMOTE_KVS)."""
    FETCHED = "fetched"
    """The KV has arrived; waits for a place in the batch."""
    RUNNING = "running"


@dataclass(frozen=True, slots=True, kw_only=True)
class EngineRequest:
    """What to compute. The output is known beforehand: the model spends time, the caller owns the words.

    Raises:
        ValueError: A prompt or output without tokens.
    """

    request_id: str
    prompt_tokens: int
    output_tokens: int
    block_keys: SequenceOf[int]
    """A key per full block of prompt plus output; equal keys mean equal content and equal history."""
    pull: bool = False
    """Fetch the prompt's KV from a peer instead of computing it."""
    pull_tokens: int = 0
    """So many of its leading tokens, which is what the peer has; 0: all of it."""
    hold: bool = False
    """Keep the blocks for a lease after the last token (`do_remote_decode`)."""
    priority: int = 0
    """Lower ones go first, on engines with priority scheduling."""

    def __post_init__(self) -> None:
        if self.prompt_tokens < 1 or self.output_tokens < 1:
            raise ValueError(
                f"request {self.request_id}: prompt and output need at least one token each, "
                f"got {self.prompt_tokens} and {self.output_tokens}"
            )


@dataclass(slots=True, eq=False)
class Sequence:
    """A request and what the engine has done for it."""

    request: EngineRequest
    order: int
    """Order of arrival; the youngest is preempted first."""
    state: SequenceState = SequenceState.WAITING
    blocks: list[int] = field(default_factory=list)
    computed: int = 0
    """Tokens whose KV is in the blocks."""
    emitted: int = 0
    published: int = 0
    """Leading blocks already offered to the prefix cache."""
    local_hit_tokens: int = 0
    """Prompt tokens found in the prefix cache when the request was admitted."""
    external_tokens: int = 0
    host_blocks: int = 0
    """Blocks after the locally cached ones that are being loaded from the host tier."""
    preemptions: int = 0
    token: Progress = field(init=False)
    """What there is to say of a token that is neither the first nor the last one: always the same."""

    def __post_init__(self) -> None:
        self.token = Progress(request_id=self.request.request_id)

    @property
    def pulled(self) -> int:
        """Leading tokens of the prompt that a peer has for this request."""
        request = self.request
        return (request.pull_tokens or request.prompt_tokens) if request.pull else 0

    @property
    def known(self) -> int:
        """Tokens that exist so far: the prompt and what has been generated."""
        return self.request.prompt_tokens + self.emitted

    @property
    def pending(self) -> int:
        """Tokens still to compute before the next one can be emitted."""
        return self.request.prompt_tokens + self.emitted - self.computed  # `known` in place: asked for at every token

    @property
    def decoding(self) -> bool:
        """Whether the next step only has the last token to compute and the prompt is done."""
        return self.emitted > 0 and self.request.prompt_tokens + self.emitted - self.computed == 1
