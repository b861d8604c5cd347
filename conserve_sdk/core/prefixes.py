"""Which engines hold the preamble that conversations share, and how long it is: learned from reports of first turns.

A preamble is named by the client (a hash over system prompt and tools). An engine holds it once a first turn that
begins with it has run there, until it restarts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Iterable
from dataclasses import dataclass, field

from conserve_sdk.core.lease import Lease, Mode
from conserve_sdk.core.units import EngineId, Incarnation, LeaseId, ModelName, PrefixKey, Tokens
from conserve_sdk.core.views import EngineView

PREFIXES_MAX = 1_024
"""Preambles remembered at once; the one not used for longest goes first."""

_Name = tuple[ModelName, PrefixKey]


@dataclass(slots=True)
class _Prefix:
    tokens: int = 0
    holders: dict[EngineId, Incarnation] = field(default_factory=dict)


class SharedPrefixes:
    """Preambles by model and key, and which of them the prompts of live leases begin with."""

    def __init__(self) -> None:
        self._known: OrderedDict[_Name, _Prefix] = OrderedDict()
        self._of_lease: dict[LeaseId, _Name] = {}

    def cached_by(self, lease_id: LeaseId, engines: Iterable[EngineView]) -> dict[EngineId, Tokens]:
        """Tokens of a live lease's preamble that engines are known to hold."""
        name = self._of_lease.get(lease_id)
        return {} if name is None else self.cached(*name, engines)

    def cached(self, model: ModelName, prefix_key: PrefixKey, engines: Iterable[EngineView]) -> dict[EngineId, Tokens]:
        """Tokens of a preamble that engines are known to hold; without those that hold nothing."""
        prefix = self._known.get((model, prefix_key))
        if prefix is None or not prefix.tokens:
            return {}
        holders = prefix.holders
        return {
            view.engine_id: Tokens(prefix.tokens)
            for view in engines
            if view.incarnation is not None and holders.get(view.engine_id) == view.incarnation
        }

    def enter(self, lease_id: LeaseId, model: ModelName, prefix_key: PrefixKey) -> None:
        """A lease was granted whose prompts begin with this preamble."""
        if prefix_key:
            self._of_lease[lease_id] = (model, prefix_key)

    def succeed(self, lease_id: LeaseId, successor: LeaseId) -> None:
        """A lease is about to be superseded by another one of the same lineage."""
        name = self._of_lease.get(lease_id)
        if name is not None:
            self._of_lease[successor] = name

    def forget(self, lease_id: LeaseId) -> None:
        """The lease ended."""
        self._of_lease.pop(lease_id, None)

    def learn(self, lease: Lease, *, cached_tokens: Tokens) -> None:
        """The first turn of a lease ended: its engines hold the preamble.

        Args:
            lease: the lease.
            cached_tokens: of the prompt, what its decoder had cached; 0 for nothing or unknown. After a migration it
                includes what was moved, so it says nothing about the preamble.
        """
        name = self._of_lease.get(lease.lease_id)
        if name is None:
            return
        prefix = self._known.setdefault(name, _Prefix())
        self._known.move_to_end(name)
        if cached_tokens and lease.mode is Mode.LOCAL:
            # Two prompts may share more than the preamble by chance: the average forgets it.
            prefix.tokens = (3 * prefix.tokens + cached_tokens) // 4 if prefix.tokens else cached_tokens
        for binding in (lease.prefiller, lease.decoder):
            if binding is not None:
                prefix.holders[binding.engine_id] = binding.incarnation
        if len(self._known) > PREFIXES_MAX:
            self._known.popitem(last=False)
