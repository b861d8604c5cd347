"""Engines that are up, as a trial sees them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveFleet:
    """Engines that are up.

    Attributes:
        kind: what they are, for the report.
        entries: the engines as a broker's configuration lists them.
        context_tokens_max: longest prompt plus answer; 0: not known.
    """

    kind: str
    model: str
    entries: tuple[Mapping[str, Any], ...]
    context_tokens_max: int = 0

    @property
    def urls(self) -> dict[str, str]:
        """Base URL by engine id."""
        return {str(entry["id"]): str(entry["url"]) for entry in self.entries}

    @property
    def prefiller_ids(self) -> frozenset[str]:
        """Engines that only prefill."""
        return frozenset(str(entry["id"]) for entry in self.entries if entry["role"] == "prefiller")

    @property
    def prefiller_urls(self) -> list[str]:
        """Their URLs."""
        return [str(entry["url"]) for entry in self.entries if entry["role"] == "prefiller"]

    @property
    def decoder_urls(self) -> list[str]:
        """URLs of all others."""
        return [str(entry["url"]) for entry in self.entries if entry["role"] != "prefiller"]

    def all_both(self) -> LiveFleet:
        """The same engines, all of which prefill and decode."""
        entries = tuple({**entry, "role": "both"} for entry in self.entries)
        return LiveFleet(kind=self.kind, model=self.model, entries=entries, context_tokens_max=self.context_tokens_max)

    @property
    def description(self) -> str:
        """How many engines of which role."""
        prefillers = len(self.prefiller_ids)
        others = len(self.entries) - prefillers
        return f"{self.kind}: {prefillers} prefill, {others} decode" if prefillers else f"{self.kind}: {others} do both"
