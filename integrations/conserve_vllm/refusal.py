"""What the guard says no with: an error body as OpenAI's clients know it, and a stable code."""

from __future__ import annotations

import json
from typing import Any

__all__ = ["Refusal"]


class Refusal(Exception):  # noqa: N818 -- says what happened
    """The request goes no further.

    Attributes:
        status: HTTP status. 403 only where another token is needed; a transfer that is stale or foreign is 409, so that
            a client may ask again without it.
        code: stable name, for programs.
        message: what is wrong and what to do, for people.
    """

    def __init__(self, status: int, code: str, message: str) -> None:
        super().__init__(message)
        self.status = status
        self.code = code
        self.message = message

    def body(self) -> bytes:
        """The JSON body."""
        error: dict[str, Any] = {
            "message": f"ConServe guard: {self.message}",
            "type": "conserve_guard_refusal",
            "param": None,
            "code": self.code,
        }
        return json.dumps({"error": error}, separators=(",", ":")).encode("ascii")
