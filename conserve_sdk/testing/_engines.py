"""Engines that exist only as what a broker would scrape from them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

from conserve_sdk.core.events import EngineConfigured, EngineObserved, EngineSpec, EngineUnreachable, Event
from conserve_sdk.core.units import EngineId, Incarnation, Ms, Tokens

SCRAPE_EVERY_MS = 1_000


@dataclass(frozen=True, slots=True, kw_only=True)
class ImaginedEngine:
    """One engine's state as its next scrape will show it.

    Attributes:
        up: whether it answers scrapes.
        restarts: how often it restarted; its incarnation counts them.
    """

    spec: EngineSpec
    up: bool = True
    restarts: int = 0
    kv_used_tokens: Tokens = Tokens(0)
    running: int = 0

    @property
    def incarnation(self) -> Incarnation:
        """Changes with every restart."""
        return Incarnation(f"{self.spec.engine_id}#{self.restarts}")

    def scraped(self, now_ms: Ms) -> Event:
        """What a scrape at `now_ms` tells the broker."""
        spec = self.spec
        if not self.up:
            return EngineUnreachable(now_ms=now_ms, engine_id=spec.engine_id, detail="connection refused")
        return EngineObserved(
            now_ms=now_ms,
            engine_id=spec.engine_id,
            incarnation=self.incarnation,
            models=(spec.model,),
            kv_capacity_tokens=spec.kv_capacity_tokens or Tokens(100_000),
            kv_used_tokens=self.kv_used_tokens,
            block_size_tokens=spec.block_size_tokens or Tokens(16),
            max_model_len_tokens=spec.max_model_len_tokens or Tokens(32_768),
            running=self.running,
            waiting=0,
        )


class ImaginedFleet:
    """The engines by id, in a fixed order, with the schedule of their scrapes."""

    def __init__(self, specs: Sequence[EngineSpec], *, now_ms: Ms) -> None:
        self._engines = {spec.engine_id: ImaginedEngine(spec=spec) for spec in specs}
        self.next_scrape_ms = now_ms

    def configured(self, now_ms: Ms) -> Iterator[Event]:
        """The events of a broker that reads its configuration."""
        for engine in self._engines.values():
            yield EngineConfigured(now_ms=now_ms, spec=engine.spec)

    def scraped(self, now_ms: Ms) -> Iterator[Event]:
        """One round of scrapes; the next is due a second later."""
        self.next_scrape_ms = Ms(now_ms + SCRAPE_EVERY_MS)
        for engine in self._engines.values():
            yield engine.scraped(now_ms)

    def change(
        self,
        engine_id: str,
        *,
        up: bool | None = None,
        restarted: bool = False,
        kv_used_tokens: int | None = None,
        running: int | None = None,
    ) -> ImaginedEngine:
        """Change what an engine's next scrape shows; None leaves a value as it is.

        Raises:
            KeyError: no engine of that id.
        """
        engine = self._engines[EngineId(engine_id)]
        changed = replace(
            engine,
            up=engine.up if up is None else up,
            restarts=engine.restarts + restarted,
            kv_used_tokens=engine.kv_used_tokens if kv_used_tokens is None else Tokens(kv_used_tokens),
            running=engine.running if running is None else running,
        )
        self._engines[changed.spec.engine_id] = changed
        return changed
