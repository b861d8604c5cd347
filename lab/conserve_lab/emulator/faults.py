"""Faults on demand."""

from __future__ import annotations

import asyncio
from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field


class FaultOrder(BaseModel):
    """The body of `POST /emulator/faults`; keys that are absent change nothing."""

    model_config = ConfigDict(extra="forbid")

    fail_next: Annotated[int, Field(ge=0)] | None = None
    """How many of the next generation requests answer with an error."""
    fail_status: Annotated[int, Field(ge=400, le=599)] | None = None
    """The status of those errors (default 500)."""
    slow_ms: Annotated[int, Field(ge=0)] | None = None
    """Extra time before every generation request is looked at."""
    drop_next: Annotated[int, Field(ge=0)] | None = None
    """How many of the next streams lose their connection."""
    drop_after_chunks: Annotated[int, Field(ge=0)] | None = None
    """After how many chunks they do (default 1)."""
    refuse_transfer: bool | None = None
    """Peers cannot read this engine's KV."""
    pause: bool | None = None
    """Accept everything, answer nothing."""
    expire_kv: bool = False
    """End the lease of everything held, now."""
    kill: bool = False
    """Refuse connections, as a dead process does."""
    reset: bool = False
    """Clear all lasting faults first."""


class Faults:
    """The faults of one engine. Change it only on the fleet's event loop."""

    def __init__(self) -> None:
        self.fail_next = 0
        self.fail_status = 500
        self.slow_ms = 0
        self.drop_next = 0
        self.drop_after_chunks = 1
        self.refuse_transfer = False
        self._open = asyncio.Event()
        self._open.set()

    @property
    def paused(self) -> bool:
        """Whether the engine accepts requests without answering."""
        return not self._open.is_set()

    def apply(self, order: FaultOrder) -> None:
        """Set what an order says; `expire_kv` and `kill` are the engine's own to carry out."""
        if order.reset:
            self.reset()
        for name in ("fail_next", "fail_status", "slow_ms", "drop_next", "drop_after_chunks", "refuse_transfer"):
            value = getattr(order, name)
            if value is not None:
                setattr(self, name, value)
        if order.pause is not None:
            if order.pause:
                self._open.clear()
            else:
                self._open.set()

    def reset(self) -> None:
        """End all lasting faults; requests that a pause has caught go on."""
        self.fail_next = self.slow_ms = self.drop_next = 0
        self.fail_status, self.drop_after_chunks = 500, 1
        self.refuse_transfer = False
        self._open.set()

    async def until_open(self) -> None:
        """Wait while the engine is paused."""
        await self._open.wait()

    def take_failure(self) -> int:
        """Return the status this request fails with, or 0."""
        if not self.fail_next:
            return 0
        self.fail_next -= 1
        return self.fail_status

    def take_drop(self) -> int | None:
        """Return after how many chunks this stream loses its connection, or None."""
        if not self.drop_next:
            return None
        self.drop_next -= 1
        return self.drop_after_chunks

    def state(self) -> dict[str, int | bool]:
        """Return the faults in force."""
        return {
            "fail_next": self.fail_next,
            "fail_status": self.fail_status,
            "slow_ms": self.slow_ms,
            "drop_next": self.drop_next,
            "drop_after_chunks": self.drop_after_chunks,
            "refuse_transfer": self.refuse_transfer,
            "pause": self.paused,
        }
