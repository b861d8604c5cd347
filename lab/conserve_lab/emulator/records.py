"""What an engine remembers about the requests it served, for tests and for eyes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class RequestRecord:
    """One generation request, noted when it ended."""

    path: str
    request_id: str
    session_id: str | None
    """The `X-Session-ID` header, or the body's `session_id`."""
    status: int
    """HTTP status; 499 when the client went away."""
    stream: bool = False
    kv: str = "none"
    """`none`, `prefill` (params held for a peer, one token), `pull`, `hold`, or `pull+hold`."""
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cached_tokens: int = 0
    """Prompt tokens found in the engine's own prefix cache."""
    external_tokens: int = 0
    """Prompt tokens read from a peer."""
    refusal: str = ""
    """Reason code of a refusal."""
    error: str = ""
    incarnation: str = ""
