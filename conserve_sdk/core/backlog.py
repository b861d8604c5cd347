"""Prefill work dispatched to one engine whose first token was not yet seen.

Work enters at the grant and leaves by whichever comes first: the report of the turn, the end of the lease, the
engine's own prefill counter moving past it, or old age (a client that died never reports).
"""

from __future__ import annotations

from collections import OrderedDict
from dataclasses import dataclass

from conserve_sdk.core.units import LeaseId, Ms, Tokens


@dataclass(slots=True)
class _Dispatch:
    tokens: int
    ahead_tokens: int
    at_ms: Ms


class Backlog:
    """First in, first out, as vLLM's scheduler serves prefills of equal priority."""

    def __init__(self) -> None:
        self._dispatched: OrderedDict[LeaseId, _Dispatch] = OrderedDict()
        self._tokens = 0

    @property
    def tokens(self) -> Tokens:
        """Uncached prompt tokens still ahead of a newcomer."""
        return Tokens(self._tokens)

    @property
    def oldest_at_ms(self) -> Ms | None:
        """When the oldest entry was dispatched; None when there is none."""
        return next((dispatch.at_ms for dispatch in self._dispatched.values()), None)

    def dispatch(self, lease_id: LeaseId, *, tokens: int, now_ms: Ms) -> None:
        """A lease was granted whose first turn will be prefilled here."""
        self._dispatched[lease_id] = _Dispatch(tokens=tokens, ahead_tokens=self._tokens, at_ms=now_ms)
        self._tokens += tokens

    def finish(self, lease_id: LeaseId) -> int:
        """The lease's prefill is over (or will never happen); returns the tokens that stood before it at dispatch."""
        done = self._dispatched.pop(lease_id, None)
        if done is None:
            return 0
        self._tokens -= done.tokens
        return done.ahead_tokens

    def drain(self, tokens: int) -> None:
        """The engine says that it prefilled this many tokens since it was last asked."""
        for dispatch in self._dispatched.values():
            if tokens <= 0:
                break
            done = min(tokens, dispatch.tokens)
            dispatch.tokens -= done
            self._tokens -= done
            tokens -= done

    def prune(self, *, until_ms: int) -> bool:
        """Forget what was dispatched at or before this instant; returns whether anything was."""
        pruned = False
        while (oldest_at_ms := self.oldest_at_ms) is not None and oldest_at_ms <= until_ms:
            self._tokens -= self._dispatched.popitem(last=False)[1].tokens
            pruned = True
        return pruned

    def clear(self) -> None:
        """The engine restarted: whatever it had to do is lost."""
        self._dispatched.clear()
        self._tokens = 0
