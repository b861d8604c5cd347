"""The guard's configuration: `CONSERVE_GUARD_*`, because vLLM gives a middleware no arguments."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from conserve_sdk._ed25519 import PublicKey
from conserve_sdk.core.units import EngineId, Ms
from conserve_sdk.tokens import SigningKey, TokenKey

__all__ = ["GuardConfigError", "GuardSettings"]

PREFIX = "CONSERVE_GUARD_"
VARIABLES = {
    "ENGINE_ID": "this engine's id in the broker's list",
    "KEYS": "the broker's token keys, first one current, joined by commas: kid=file:/path, kid=env:NAME, or "
    "kid=public:/path.pem",
    "STAMP_KEYS": "secrets that all guards share, where KEYS names public keys only: kid=file:/path or kid=env:NAME",
    "REQUIRE_LEASE": "1 refuses every request to a model that carries no valid lease token",
    "TRANSFER_DEADLINE_MS": "how old transfer params may be",
    "CLOCK_LEEWAY_MS": "how far the clocks of broker, prefiller and decoder may differ",
    "BODY_BYTES_MAX": "the largest request body",
    "TIER": "host tier, shown at /conserve/engine",
    "ROLE": "prefiller, decoder or both, shown at /conserve/engine; default: from kv_role",
    "INCARNATION": "replaces the incarnation derived from the process's start time",
}
"""Every variable with its meaning; any other that begins with `PREFIX` is a mistake."""
ROLES = ("prefiller", "decoder", "both")
_TRUE, _FALSE = ("1", "true", "yes", "on"), ("", "0", "false", "no", "off")


class GuardConfigError(ValueError):
    """A variable is missing or wrong; the text names it and says what to do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GuardSettings:
    """What a guard needs to know.

    Attributes:
        engine_id: this engine's id, as lease tokens name it.
        keys: the broker's token keys, current first; public keys suffice.
        stamp_keys: secrets that the guards share to stamp transfers; empty: the secrets among `keys`.
        require_lease: refuse requests to the model without a lease.
        transfer_deadline_ms: transfer params older than this are refused; must stay well under the prefiller's
            `kv_lease_duration` (30 s unless configured), after which vLLM may hand their blocks to another prompt.
        clock_leeway_ms: how far clocks may differ.
        body_bytes_max: larger request bodies are refused.
        incarnation: fixed incarnation, or "" to derive it.
        role: shown to others, or "" to derive it.
        tier: shown to others.
    """

    engine_id: EngineId
    keys: tuple[TokenKey, ...]
    stamp_keys: tuple[SigningKey, ...] = ()
    require_lease: bool = False
    transfer_deadline_ms: Ms = Ms(20_000)
    clock_leeway_ms: Ms = Ms(5_000)
    body_bytes_max: int = 64 * 1024 * 1024
    incarnation: str = ""
    role: str = ""
    tier: str = ""

    @classmethod
    def from_env(cls, env: Mapping[str, str] | None = None) -> GuardSettings:
        """Read the environment.

        Raises:
            GuardConfigError: a variable is missing, unknown or wrong.
        """
        read = _Reader(os.environ if env is None else env)
        keys = read.keys()
        return cls(
            engine_id=EngineId(read.needed("ENGINE_ID", "set it to the id that the broker's configuration lists")),
            keys=keys,
            stamp_keys=read.stamp_keys(keys),
            require_lease=read.flag("REQUIRE_LEASE"),
            transfer_deadline_ms=Ms(read.whole("TRANSFER_DEADLINE_MS", 20_000, at_least=1)),
            clock_leeway_ms=Ms(read.whole("CLOCK_LEEWAY_MS", 5_000, at_least=0)),
            body_bytes_max=read.whole("BODY_BYTES_MAX", 64 * 1024 * 1024, at_least=1),
            incarnation=read.text("INCARNATION"),
            role=read.one_of("ROLE", ROLES),
            tier=read.text("TIER"),
        )

    def secrets(self) -> tuple[SigningKey, ...]:
        """What transfers are stamped with."""
        return self.stamp_keys or _secrets_among(self.keys)


def _secrets_among(keys: tuple[TokenKey, ...]) -> tuple[SigningKey, ...]:
    return tuple(key for key in keys if isinstance(key, SigningKey))


class _Reader:
    def __init__(self, env: Mapping[str, str]) -> None:
        self._env = env
        unknown = sorted(name for name in env if name.startswith(PREFIX) and name[len(PREFIX) :] not in VARIABLES)
        if unknown:
            known = ", ".join(PREFIX + name for name in VARIABLES)
            raise GuardConfigError(f"{unknown[0]} is no setting of the guard; known: {known}")

    def text(self, name: str) -> str:
        return self._env.get(PREFIX + name, "").strip()

    def needed(self, name: str, remedy: str) -> str:
        value = self.text(name)
        if not value:
            raise GuardConfigError(f"{PREFIX}{name} is not set: {remedy}")
        return value

    def flag(self, name: str) -> bool:
        value = self.text(name).lower()
        if value not in _TRUE + _FALSE:
            raise GuardConfigError(f"{PREFIX}{name}={value!r} is neither on nor off: use 1 or 0")
        return value in _TRUE

    def whole(self, name: str, default: int, *, at_least: int) -> int:
        value = self.text(name) or str(default)
        if not (value.isascii() and value.isdecimal()) or int(value) < at_least:
            raise GuardConfigError(f"{PREFIX}{name}={value!r} must be a whole number of at least {at_least}")
        return int(value)

    def one_of(self, name: str, choices: tuple[str, ...]) -> str:
        value = self.text(name)
        if value and value not in choices:
            raise GuardConfigError(f"{PREFIX}{name}={value!r} must be one of {', '.join(choices)}")
        return value

    def keys(self) -> tuple[TokenKey, ...]:
        listed = self.needed(
            "KEYS", "list the broker's token keys, such as main=file:/run/secrets/conserve-token-key (kid=where)"
        )
        return self._listed("KEYS", listed)

    def stamp_keys(self, keys: tuple[TokenKey, ...]) -> tuple[SigningKey, ...]:
        given = self._listed("STAMP_KEYS", self.text("STAMP_KEYS"))
        found = _secrets_among(given)
        if len(found) != len(given):
            raise GuardConfigError(f"{PREFIX}STAMP_KEYS: a public key stamps nothing; name secrets")
        if not found and not _secrets_among(keys):
            raise GuardConfigError(
                f"{PREFIX}STAMP_KEYS is not set: with public token keys alone the guards need a secret of their own, "
                "the same on all engines; make one with `openssl rand -base64 48`"
            )
        return found

    def _listed(self, name: str, listed: str) -> tuple[TokenKey, ...]:
        keys = tuple(self._key(name, item.strip()) for item in listed.split(",") if item.strip())
        if len({key.kid for key in keys}) != len(keys):
            raise GuardConfigError(f"{PREFIX}{name} names one kid twice; give each key its own")
        return keys

    def _key(self, name: str, item: str) -> TokenKey:
        kid, _, place = item.partition("=")
        how, _, where = place.partition(":")
        if not kid or how not in ("file", "env", "public") or not where:
            # The item itself is not shown: it may be a secret that was put here by mistake.
            raise GuardConfigError(
                f"{PREFIX}{name}: each entry is kid=file:/path or kid=env:NAME; correct the one of {kid[:32]!r}"
            )
        content = self._content(name, how, where)
        try:
            return PublicKey(kid, content) if how == "public" else SigningKey(kid=kid, secret=content)
        except ValueError as error:
            raise GuardConfigError(f"{PREFIX}{name}: {error}; use the broker's own secret") from error

    def _content(self, name: str, how: str, where: str) -> bytes:
        if how == "env":
            if where not in self._env:
                raise GuardConfigError(f"{PREFIX}{name}: {where} is not set in the environment")
            return self._env[where].strip().encode()
        try:
            return Path(where).read_bytes().strip()
        except OSError as error:
            raise GuardConfigError(
                f"{PREFIX}{name}: cannot read {where} ({error.strerror}); correct the path"
            ) from error
