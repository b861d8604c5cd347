"""Hot reload: a changed configuration file changes the fleet of a running broker, and who may use it.

Engines and API keys are taken over at once. Everything else needs a restart, and what does is said. A file that is
wrong changes nothing: the broker goes on with what it has and says why.
"""

from __future__ import annotations

import asyncio
import hashlib
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from conserve_broker._access_tables import ApiKeyTable
from conserve_broker.settings import BrokerConfig, ConfigProblem, load_config
from conserve_sdk.core.events import EngineConfigured, EngineRemoved, EngineSpec
from conserve_sdk.core.units import Ms

__all__ = ["ConfigWatcher", "FleetEvent", "fleet_changes"]

FleetEvent = EngineConfigured | EngineRemoved
_log = logging.getLogger("conserve.broker")


def fleet_changes(old: Sequence[EngineSpec], new: Sequence[EngineSpec], *, now_ms: Ms) -> tuple[FleetEvent, ...]:
    """What turns one fleet into the other: removals first, then what is new or changed, in the order of the file."""
    before = {spec.engine_id: spec for spec in old}
    after = {spec.engine_id for spec in new}
    removed = tuple(
        EngineRemoved(now_ms=now_ms, engine_id=spec.engine_id) for spec in old if spec.engine_id not in after
    )
    changed = tuple(EngineConfigured(now_ms=now_ms, spec=spec) for spec in new if before.get(spec.engine_id) != spec)
    return removed + changed


class ConfigWatcher:
    """Looks at the file once a second and tells about a changed fleet.

    Args:
        path: the file that `config` was read from.
        config: the configuration in force.
        apply: called with the new configuration and the events that lead to it, removals first.
        now_ms: the broker's clock.
        apply_keys: called with the new configuration and all its API keys when they or their limits changed.
        overrides: the command line's share, which wins over the file again.
    """

    def __init__(
        self,
        path: str | Path,
        config: BrokerConfig,
        *,
        apply: Callable[[BrokerConfig, Sequence[FleetEvent]], None],
        now_ms: Callable[[], Ms],
        apply_keys: Callable[[BrokerConfig, Sequence[ApiKeyTable]], None] = lambda *_: None,
        overrides: Mapping[str, Any] | None = None,
    ) -> None:
        self._path = Path(path)
        self._config = config
        self._apply = apply
        self._now_ms = now_ms
        self._apply_keys = apply_keys
        self._keys: tuple[ApiKeyTable, ...] | None = None
        self._overrides = overrides
        self._problem = ""
        self._restart_keys: tuple[str, ...] = ()
        self._digest: bytes | None = None  # so that a change between reading `config` and now is seen

    @property
    def config(self) -> BrokerConfig:
        """The configuration in force, as far as the fleet goes."""
        return self._config

    @property
    def problem(self) -> str:
        """Why the file as it is now is not in force, in one line; empty when it is. For `/readyz`."""
        return self._problem

    @property
    def restart_keys(self) -> tuple[str, ...]:
        """Keys whose new value waits for a restart, such as `lease.ttl_ms`."""
        return self._restart_keys

    async def run(self, *, poll_s: float = 1.0) -> None:
        """Poll until cancelled."""
        while True:
            await asyncio.sleep(poll_s)
            self.poll()

    def poll(self) -> bool:
        """Look at the file once; True when its engines differ and were applied."""
        digest = self._digested()
        if digest is not None and digest == self._digest:  # as it is in force, perhaps again after a mistake
            self._report("")
            return False
        try:
            new = load_config(self._path, overrides=self._overrides)
            keys = new.api_keys()
            new.engine_keys()
        except ConfigProblem as problem:
            self._report("; ".join(problem.problems))
            return False
        self._digest = digest
        self._report("")
        self._take_keys(new, keys)
        return self._take_over(new)

    def _take_keys(self, new: BrokerConfig, keys: tuple[ApiKeyTable, ...]) -> None:
        first, before = self._keys is None, (self._keys, self._config.access)
        self._keys = keys
        self._config = self._config.model_copy(update={"access": new.access})
        if before == (keys, new.access):
            return
        if not first:
            _log.info("%s: %d API key(s) in force", self._path, len(keys))
        self._apply_keys(new, keys)

    def _take_over(self, new: BrokerConfig) -> bool:
        self._restart_keys = tuple(_differences(self._config, new))
        if self._restart_keys:
            _log.warning("%s: restart the broker for %s to apply", self._path, ", ".join(self._restart_keys))
        events = fleet_changes(self._config.engine_configs(), new.engine_configs(), now_ms=self._now_ms())
        self._config = self._config.model_copy(update={"engine": new.engine})
        if not events:
            return False
        _log.info("%s: %d engine(s) configured or removed", self._path, len(events))
        self._apply(self._config, events)
        return True

    def _report(self, problem: str) -> None:
        if problem and problem != self._problem:
            _log.error("%s: not taken over, the broker goes on as it was: %s", self._path, problem)
        self._problem = problem

    def _digested(self) -> bytes | None:
        key_file = self._config.access.key_file
        try:
            digest = hashlib.sha256(self._path.read_bytes())
            if key_file:  # its name, too: it may be another file from one look to the next
                digest.update(key_file.encode() + b"\0" + Path(key_file).read_bytes())
        except OSError:
            return None  # gone: `load_config` or `api_keys` says so
        return digest.digest()


def _differences(old: BrokerConfig, new: BrokerConfig) -> list[str]:
    """Keys outside the fleet whose values differ."""
    keys: list[str] = []
    for name in type(old).model_fields:
        if name in {"engine", "access"}:
            continue
        before, after = getattr(old, name), getattr(new, name)
        keys += [f"{name}.{key}" for key in type(before).model_fields if getattr(before, key) != getattr(after, key)]
    return keys
