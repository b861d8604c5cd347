"""API keys: how they look, how they are made, and what is kept of them.

A key is ``csk.ID.SECRET``. The id is public: it finds the entry and stands in logs. The secret has 256 random bits, so
its plain SHA-256 is kept: a slow hash protects what people choose and others can guess, and here it would only let a
stranger burn the broker's time with every request.
"""

from __future__ import annotations

import hashlib
import secrets
import tomllib
from collections import Counter
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path

from pydantic import ValidationError

from conserve_broker._access_tables import AccessTable, ApiKeyTable, KeyFile
from conserve_broker._config_errors import ConfigProblem, explain
from conserve_sdk._desk import Scope

__all__ = ["NewKey", "digest_of", "id_in", "new_key", "resolve"]

PREFIX = "csk"
"""Lets scanners find keys that were put where they do not belong."""
KEY_CHARS_MAX = 256
_SECRET_BYTES = 32
_ID_BYTES = 4


@dataclass(frozen=True, slots=True)
class NewKey:
    """A key that was just made: the only time that its secret is known.

    Attributes:
        text: what the client sends.
        table: what the broker keeps.
    """

    text: str
    table: ApiKeyTable

    def __repr__(self) -> str:
        return f"NewKey({self.table.id!r})"

    def toml(self) -> str:
        """The lines to paste into the broker's configuration."""
        scopes = ", ".join(f'"{scope}"' for scope in self.table.scopes)
        lines = [
            "[[access.keys]]",
            f'id = "{self.table.id}"',
            f'tenant = "{self.table.tenant}"',
            f"scopes = [{scopes}]",
            f'sha256 = "{self.table.sha256}"',
        ]
        if self.table.expires_at is not None:
            lines.append(f"expires_at = {self.table.expires_at.isoformat()}")
        return "\n".join(lines)


def new_key(*, tenant: str, scopes: tuple[Scope, ...], key_id: str = "", expires_at: datetime | None = None) -> NewKey:
    """Make a key.

    Raises:
        ValueError: the tenant, the id or the scopes cannot be those of a key (pydantic's `ValidationError`).
    """
    name = key_id or f"{tenant[:40]}-{secrets.token_hex(_ID_BYTES)}"
    text = f"{PREFIX}.{name}.{secrets.token_urlsafe(_SECRET_BYTES)}"
    table = ApiKeyTable(id=name, tenant=tenant, scopes=scopes, sha256=digest_of(text), expires_at=expires_at)
    return NewKey(text, table)


def id_in(text: str) -> str:
    """The id that a key names; "" for what is no key."""
    prefix, _, rest = text.partition(".")
    name, _, secret = rest.rpartition(".")
    return name if prefix == PREFIX and secret and len(text) <= KEY_CHARS_MAX else ""


def digest_of(text: str) -> str:
    """SHA-256 of the whole key, in hexadecimal digits; of any text, as keys come from strangers."""
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def resolve(access: AccessTable) -> tuple[ApiKeyTable, ...]:
    """All keys: those of the configuration and those of its key file.

    Raises:
        ConfigProblem: the file cannot be read or is wrong, or two keys have one id.
    """
    keys = access.keys + (_read(Path(access.key_file)) if access.key_file else ())
    twice = sorted(name for name, times in Counter(key.id for key in keys).items() if times > 1)
    if twice:
        raise ConfigProblem([f"access.keys.{name}.id: used by more than one key; give each its own" for name in twice])
    return keys


def _read(path: Path) -> tuple[ApiKeyTable, ...]:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigProblem(
            [f"access.key_file: cannot read {path} ({error.strerror}); correct the path, or remove the key"]
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigProblem([f"access.key_file: {path} is not valid TOML: {error}"]) from error
    try:
        return KeyFile.model_validate(data).keys
    except ValidationError as error:
        known = {"": tuple(KeyFile.model_fields), "keys": tuple(ApiKeyTable.model_fields)}
        problems = explain(error, data, known).problems
        raise ConfigProblem([f"access.key_file: {path}: {line}" for line in problems]) from None
