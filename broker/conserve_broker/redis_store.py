"""Leases in Valkey or Redis: the rows, the leader's lock, and the log that standbys follow.

All keys of one fleet share a hash tag, so they live in one slot of a cluster. Nothing is ever retried by the client
library: its default of ten silent retries could repeat what had been done long ago. Whoever calls decides.
"""

from __future__ import annotations

import json
import secrets
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import chain
from typing import Any, cast

from conserve_broker import _store_scripts
from conserve_broker._config_errors import ConfigProblem
from conserve_broker._config_tables import StoreTable, without_password
from conserve_broker._journal_file import NONE, Fenced, JournalError

__all__ = ["Claim", "LeaderRows", "LogPosition", "RedisStore"]

_LOG_MAX = 10_000
"""Groups that a standby may be behind before it reads everything again."""
_SCAN_COUNT = 2_000
_FETCH_MAX = 5_000
_NONCE_BYTES = 8


@dataclass(frozen=True, slots=True)
class Claim:
    """What came of asking for the lock.

    Attributes:
        won: it is ours now.
        value: of the lock, ours or the holder's.
        left_ms: how long it is held without being renewed.
    """

    won: bool
    value: str
    left_ms: int

    @property
    def fence(self) -> int:
        """Which leadership it is, counted up."""
        head = self.value.partition(" ")[0]
        return int(head) if head.isdecimal() else 0

    @property
    def url(self) -> str:
        """Where the holder answers; empty when it does not say."""
        return self.value.split(" ", 2)[2] if self.value.count(" ") >= 2 else ""


@dataclass(frozen=True, slots=True)
class LogPosition:
    """How far a standby has read: id of the last entry, and its running number by which gaps are seen."""

    entry: str
    seq: int


class RedisStore:
    """One connection to the store; one thread at a time uses it.

    Raises:
        ConfigProblem: redis-py is not installed.
    """

    def __init__(self, settings: StoreTable) -> None:
        try:
            import redis
            from redis.backoff import NoBackoff
            from redis.retry import Retry
        except ImportError as error:
            raise ConfigProblem(
                ["store.kind: 'redis' needs the redis client; install it with `pip install 'conserve-sdk[redis]'`"]
            ) from error
        timeout_s = settings.timeout_ms / 1000
        self.settings = settings
        self._fault: type[Exception] = redis.RedisError
        self._redis = redis.Redis.from_url(
            settings.url,
            decode_responses=True,
            retry=Retry(NoBackoff(), 0),
            socket_timeout=timeout_s,
            socket_connect_timeout=timeout_s,
            max_connections=1,
        )
        tag = f"{{{settings.prefix}}}:"
        names = ("lock", "fence", "leases", "candidates", "drains", "engines", "log", "seq")
        self._keys = {name: tag + name for name in names}
        # redis-py sends a script's hash, and its text when the server does not know it (after a restart, say).
        self._scripts = {
            name: cast("Any", self._redis.register_script(text))
            for name, text in (
                ("claim", _store_scripts.CLAIM),
                ("renew", _store_scripts.RENEW),
                ("release", _store_scripts.RELEASE),
                ("write", _store_scripts.WRITE),
            )
        }

    def close(self) -> None:
        """Close the connection."""
        self._redis.close()

    # ---- the lock -----------------------------------------------------------------------------------------------

    def claim(self, *, url: str, fence_floor: int) -> Claim:
        """Take the lock if it is free.

        Args:
            url: where this broker answers, for the problem documents of the others.
            fence_floor: the highest fence seen; the new one is above it, whatever the store remembers.

        Raises:
            JournalError: the store does not answer as it should.
        """
        arguments = [fence_floor, secrets.token_hex(_NONCE_BYTES), url, self.settings.lock_ttl_ms]
        won, value, left_ms = self._run("claim", ["lock", "fence"], arguments)
        return Claim(bool(won), str(value), int(left_ms))

    def renew(self, claim: Claim) -> bool:
        """Keep the lock for another TTL; False: it is lost.

        Raises:
            JournalError: the store does not answer as it should.
        """
        return bool(self._run("renew", ["lock"], [claim.value, self.settings.lock_ttl_ms]))

    def release(self, claim: Claim) -> None:
        """Give the lock back, so that a standby takes over at once.

        Raises:
            JournalError: the store does not answer as it should.
        """
        self._run("release", ["lock", "log", "seq"], [claim.value, _LOG_MAX])

    # ---- reading ------------------------------------------------------------------------------------------------

    def lease_rows(self) -> dict[str, str]:
        """Every lease's row by id. Not one instant: what changes meanwhile is in the log."""
        with self._explained():
            found = self._redis.hscan_iter(self._keys["leases"], count=_SCAN_COUNT)
            return dict(cast("Iterable[tuple[str, str]]", found))

    def fetch(self, lease_ids: Sequence[str]) -> dict[str, str | None]:
        """These leases' rows as they are now; None: there is none."""
        rows: dict[str, str | None] = {}
        with self._explained():
            for start in range(0, len(lease_ids), _FETCH_MAX):
                part = list(lease_ids[start : start + _FETCH_MAX])
                rows |= zip(part, cast("Any", self._redis.hmget(self._keys["leases"], part)), strict=True)
        return rows

    def candidates(self, lease_id: str) -> str | None:
        """What was stored of a lease's candidates, if anything."""
        with self._explained():
            return cast("str | None", self._redis.hget(self._keys["candidates"], lease_id))

    def draining(self) -> Sequence[str]:
        """Ids of the engines that were draining, ordered."""
        with self._explained():
            return sorted(cast("set[str]", self._redis.smembers(self._keys["drains"])))

    def engines(self) -> Sequence[str]:
        """Rows of the engines that no configuration file names, ordered by id."""
        with self._explained():
            found = cast("dict[str, str]", self._redis.hgetall(self._keys["engines"]))
        return [found[engine_id] for engine_id in sorted(found)]

    def position(self) -> LogPosition:
        """The end of the log."""
        with self._explained():
            pipeline = cast("Any", self._redis.pipeline(transaction=True))
            pipeline.xrevrange(self._keys["log"], count=1)
            pipeline.get(self._keys["seq"])
            last, seq = pipeline.execute()
        return LogPosition(last[0][0] if last else "0-0", int(seq or 0))

    def changed_after(self, position: LogPosition, *, block_ms: int) -> tuple[LogPosition, list[str]] | None:
        """Ids of leases that changed after `position`, and how far that reads; None: there is a gap, read all again.

        Waits up to `block_ms` for something to change (0: does not wait).
        """
        with self._explained():
            answer = self._redis.xread({self._keys["log"]: position.entry}, count=_LOG_MAX, block=block_ms or None)
        entries = _entries(answer, self._keys["log"])
        changed: dict[str, None] = {}
        for entry, fields in entries:
            if int(fields["seq"]) != position.seq + 1:
                return None
            position = LogPosition(entry, position.seq + 1)
            changed |= dict.fromkeys(json.loads(fields["ids"]))
        return position, list(changed)

    def doubts(self) -> tuple[str, ...]:
        """What in the server's own configuration may lose leases; nothing where it does not show it.

        Raises:
            JournalError: the store does not answer as it should.
        """
        self.position()
        try:
            found = cast("dict[str, str]", self._redis.config_get("*"))
        except self._fault:
            return ()  # managed servers keep their configuration to themselves
        doubts = []
        if found.get("appendonly") == "no":
            doubts.append("store: has no append-only file, so its restart forgets every lease; set appendonly yes")
        if found.get("maxmemory", "0") != "0" and found.get("maxmemory-policy") != "noeviction":
            doubts.append("store: may throw leases away when memory is short; set maxmemory-policy noeviction")
        return tuple(doubts)

    # ---- writing ------------------------------------------------------------------------------------------------

    def write(
        self,
        claim: Claim,
        leases: Mapping[str, str | None],
        drains: Mapping[str, bool],
        engines: Mapping[str, str | None],
        candidates: Mapping[str, str] = NONE,
    ) -> None:
        """One fenced group.

        Raises:
            Fenced: `claim` is not the lock any more; nothing was written.
            JournalError: the store does not answer as it should; whether it was written is unknown.
        """
        dropped = _counted([name for name, row in leases.items() if row is None])
        arguments = [
            claim.value,
            _LOG_MAX,
            json.dumps(list(leases)),
            *_stored(leases),
            *dropped,
            *_stored(engines),
            *_counted([name for name, row in engines.items() if row is None]),
            *_counted([name for name, on in drains.items() if on]),
            *_counted([name for name, on in drains.items() if not on]),
            *_stored(candidates),
            *dropped,
        ]
        self._run("write", ["lock", "leases", "drains", "engines", "log", "seq", "candidates"], arguments)

    # ---- inside -------------------------------------------------------------------------------------------------

    def _run(self, script: str, keys: Sequence[str], arguments: Sequence[Any]) -> Any:
        with self._explained():
            return self._scripts[script](keys=[self._keys[name] for name in keys], args=arguments)

    @contextmanager
    def _explained(self) -> Iterator[None]:
        try:
            yield
        except self._fault as error:
            text = str(error) or type(error).__name__
            if text.startswith("FENCED"):
                raise Fenced(f"store {self._place()}: this broker does not lead any more") from error
            raise JournalError(f"store {self._place()}: {_remedy(error, text)} ({text})") from error

    def _place(self) -> str:
        return without_password(self.settings.url)


class LeaderRows:
    """The rows as the leader of one claim writes them; a `RowStore` for `Journal`.

    Args:
        store: a connection of its own.
        claim: the lock under which it writes.
        fenced: called, in the writer's thread, when the store refuses the claim.
    """

    def __init__(self, store: RedisStore, claim: Claim, *, fenced: Callable[[], None]) -> None:
        self._store = store
        self._claim = claim
        self._fenced = fenced

    def rows(self) -> Iterable[str]:
        """Every lease's row."""
        return self._store.lease_rows().values()

    def candidates(self, lease_id: str) -> str | None:
        """What was stored of a lease's candidates, if anything."""
        return self._store.candidates(lease_id)

    def draining(self) -> Sequence[str]:
        """Ids of the engines that were draining, ordered."""
        return self._store.draining()

    def engines(self) -> Sequence[str]:
        """Rows of the engines that no configuration file names, ordered by id."""
        return self._store.engines()

    def write(
        self,
        leases: Mapping[str, str | None],
        drains: Mapping[str, bool],
        engines: Mapping[str, str | None],
        candidates: Mapping[str, str] = NONE,
    ) -> None:
        """One fenced group; see `RedisStore.write`."""
        try:
            self._store.write(self._claim, leases, drains, engines, candidates)
        except Fenced:
            self._fenced()
            raise

    def prove(self) -> None:
        """Nothing to show: a store without memory refuses deletions, too, because each writes to the log."""

    def close(self) -> None:
        """Close the connection."""
        self._store.close()


def _stored(rows: Mapping[str, str | None]) -> list[Any]:
    kept = [(name, row) for name, row in rows.items() if row is not None]
    return [len(kept), *chain.from_iterable(kept)]


def _counted(names: Sequence[str]) -> list[Any]:
    return [len(names), *names]


def _entries(answer: Any, log: str) -> list[tuple[str, dict[str, str]]]:
    """The entries of an XREAD, whose shape differs between the versions of the wire protocol."""
    if not answer:
        return []
    if isinstance(answer, dict):
        entries = answer[log]
        return list(entries[0]) if entries and isinstance(entries[0], list) else list(entries)
    return list(answer[0][1])


_REMEDIES = {
    "OutOfMemoryError": "has no memory left; raise its maxmemory (with policy noeviction) or remove other data",
    "ReadOnlyError": "is a read-only replica; name the primary in store.url",
    "AuthenticationError": "refuses the password of store.url, or wants one; correct it",
    "AuthenticationWrongNumberOfArgsError": "refuses the password of store.url, or wants one; correct it",
    "NoPermissionError": "does not allow what the broker needs; grant the user of store.url every command on its keys",
    "BusyLoadingError": "is still loading its data; it will answer soon",
    "ConnectionError": "does not answer; is it running, and is store.url right?",
    "TimeoutError": "does not answer; is it running, and is store.url right?",
}
"""By the name of redis-py's exception."""


def _remedy(error: Exception, text: str) -> str:
    if "MISCONF" in text:
        return "cannot write to its disk; free some space there"
    kinds = (kind.__name__ for kind in type(error).__mro__)
    return next((_REMEDIES[kind] for kind in kinds if kind in _REMEDIES), "failed; look into its log")
