"""The secrets that sign lease tokens: from the configuration, or one random key made once beside the journal."""

from __future__ import annotations

import os
import secrets
from pathlib import Path

from conserve_broker._config_errors import ConfigProblem
from conserve_broker._config_tables import TokenKeyTable
from conserve_sdk._ed25519 import PrivateKey
from conserve_sdk.tokens import SECRET_BYTES_MIN, SigningKey, TokenKey

HOW_TO_MAKE_ONE = "make one with `openssl rand -base64 48`"
_OWN_KID = "journal"
_OWN_BYTES = 48


def resolve(keys: tuple[TokenKeyTable, ...], *, journal_path: str, create: bool = True) -> tuple[TokenKey, ...]:
    """The keys to sign (the first) and to verify (all) with.

    Without configured keys: the key file beside the journal, which is made when `create` is set and it is missing; a
    random key for this process where there is no journal, so that its tokens end with it.

    Raises:
        ConfigProblem: a secret is missing, too short or unreadable.
    """
    if keys:
        return tuple(_key(key) for key in keys)
    if not journal_path:
        return (SigningKey(kid="memory", secret=secrets.token_bytes(_OWN_BYTES)),)
    return (SigningKey(kid=_OWN_KID, secret=_own_secret(Path(f"{journal_path}.key"), create=create)),)


def _key(key: TokenKeyTable) -> TokenKey:
    if key.private_key_file is None:
        return SigningKey(kid=key.kid, secret=_long_enough(key, _read(key)))
    try:
        return PrivateKey(key.kid, _content(key, "private_key_file", key.private_key_file))
    except ValueError as error:
        raise ConfigProblem([f"token.keys.{key.kid}.private_key_file: {error}"]) from error


def _read(key: TokenKeyTable) -> bytes:
    if key.secret is not None:
        return key.secret.get_secret_value().encode()
    if key.secret_env is not None:
        value = os.environ.get(key.secret_env)
        if value is None:
            raise ConfigProblem([f"token.keys.{key.kid}.secret_env: {key.secret_env} is not set in the environment"])
        return value.strip().encode()
    return _content(key, "secret_file", str(key.secret_file)).strip()


def _content(key: TokenKeyTable, name: str, path: str) -> bytes:
    try:
        return Path(path).read_bytes()
    except OSError as error:
        raise ConfigProblem(
            [f"token.keys.{key.kid}.{name}: cannot read {path} ({error.strerror}); correct the path"]
        ) from error


def _long_enough(key: TokenKeyTable, secret: bytes) -> bytes:
    if len(secret) < SECRET_BYTES_MIN:
        raise ConfigProblem([f"token.keys.{key.kid}: the secret has under {SECRET_BYTES_MIN} bytes; {HOW_TO_MAKE_ONE}"])
    return secret


def _own_secret(path: Path, *, create: bool) -> bytes:
    try:
        if not path.exists():
            if not create:
                return secrets.token_bytes(_OWN_BYTES)
            _write_once(path)
        secret = path.read_bytes()
    except OSError as error:
        raise ConfigProblem(
            [f"token.keys: cannot keep a key in {path} ({error.strerror}); make its folder writable or set token.keys"]
        ) from error
    if len(secret) < SECRET_BYTES_MIN:
        raise ConfigProblem(
            [f"token.keys: {path} holds no key; delete it (leases in use are granted anew) and restart"]
        )
    return secret


def _write_once(path: Path) -> None:
    """Write the file whole or not at all, so that a crash leaves no short key."""
    draft = path.with_name(f"{path.name}.{os.getpid()}.new")
    handle = os.open(draft, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600)
    try:
        os.write(handle, secrets.token_bytes(_OWN_BYTES))
        os.fsync(handle)
    finally:
        os.close(handle)
    try:
        os.link(draft, path)  # unlike rename it never replaces a key that another process made meanwhile
    except FileExistsError:
        pass
    finally:
        draft.unlink()
