"""The lease token: a compact JWT (RFC 7515, RFC 7519) that the broker signs and whoever holds the lease carries.

The token is the capability for its lease, and it carries what a broker that lost its state needs to put the lease
back into its ledger. It ends at ``exp_ms``, the last instant to which any renewal answered without a fresh token can
have carried the lease; `TokenLife` in the desk keeps that true. HS256 needs nothing but the standard library and costs
a few microseconds per token; what signs and what checks meet only in `TokenKey`, so another algorithm is another key.
"""

from __future__ import annotations

import base64
import binascii
import hashlib
import hmac
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any, ClassVar, Protocol

from pydantic_core import from_json, to_json

from conserve_sdk.core._quick import quick_init
from conserve_sdk.core.lease import EngineBinding, Lease, Mode
from conserve_sdk.core.units import (
    ConversationId,
    EngineId,
    Incarnation,
    LeaseId,
    LineageId,
    ModelName,
    Ms,
    TenantId,
    Tokens,
)

__all__ = [
    "SECRET_BYTES_MIN",
    "TOKEN_CHARS_MAX",
    "HeldToken",
    "LeaseClaims",
    "SigningKey",
    "TokenError",
    "TokenExpired",
    "TokenInvalid",
    "TokenKey",
    "TokenSigner",
    "claims_of",
    "read_unverified",
]

TOKEN_CHARS_MAX = 4096
"""Longer tokens are refused unread; the wire models have the same bound."""
SECRET_BYTES_MIN = 32
"""HS256 wants a key at least as long as its digest (RFC 7518 section 3.2)."""

_REMEMBERED_MAX = 262_144
"""Tokens of more leases than one broker should have; about 300 bytes each."""
_ISSUER = "conserve"
_VERSION = 1


class TokenError(ValueError):
    """Base of what can be wrong with a token; the text says why in one line."""


class TokenInvalid(TokenError):  # noqa: N818 - says what the token is, like the protocol
    """Malformed, forged, signed by an unknown key or of another version."""


class TokenExpired(TokenError):  # noqa: N818
    """The signature is good, but the token's life is over.

    Attributes:
        claims: what the token says; for a broker that still knows the lease to be alive.
    """

    def __init__(self, claims: LeaseClaims, *, now_ms: Ms) -> None:
        super().__init__(f"the token of lease {claims.lease_id} ended {now_ms - claims.exp_ms} ms ago")
        self.claims = claims


class TokenKey(Protocol):
    """What signs tokens, or only checks them."""

    @property
    def kid(self) -> str:
        """Public name: it tells the checker which key to use while keys are rotated."""

    @property
    def alg(self) -> str:
        """The only algorithm that tokens of this key may name (RFC 7518)."""

    def signature(self, signed: str) -> str:
        """The signature of a token's first two parts, as its third.

        Raises:
            TokenError: it only checks.
        """

    def accepts(self, signed: str, signature: str) -> bool:
        """Whether the signature is this key's, spelled as it would spell it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SigningKey:
    """An HMAC key. ``kid`` is public: it tells the checker which key to use while keys are rotated.

    Raises:
        ValueError: the secret has fewer than `SECRET_BYTES_MIN` bytes, or the kid is empty.
    """

    kid: str
    secret: bytes = field(repr=False)
    alg: ClassVar[str] = "HS256"

    def __post_init__(self) -> None:
        if not self.kid:
            raise ValueError("a signing key needs a kid: any short name that changes when the secret does")
        if len(self.secret) < SECRET_BYTES_MIN:
            raise ValueError(
                f"signing key {self.kid!r} has {len(self.secret)} bytes; HS256 needs at least {SECRET_BYTES_MIN}"
            )

    def signature(self, signed: str) -> str:
        """See `TokenKey.signature`."""
        return _base64url(hmac.digest(self.secret, signed.encode("ascii"), hashlib.sha256))

    def accepts(self, signed: str, signature: str) -> bool:
        """See `TokenKey.accepts`; in constant time."""
        # Compared as text: base64 has spare bits, so several texts decode to one signature; only ours is accepted.
        return hmac.compare_digest(self.signature(signed), signature)


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class LeaseClaims:
    """What a token says about its lease, as of the moment it was signed.

    Attributes:
        ledger_tokens: KV tokens the lease held on its decoder.
        granted_at_ms: broker time of the grant (Unix epoch).
        exp_ms: first instant at which the token no longer counts (Unix epoch).
    """

    lease_id: LeaseId
    epoch: int
    tenant: TenantId
    conversation_id: ConversationId
    lineage: LineageId
    model: ModelName
    mode: Mode
    prefiller: EngineBinding | None
    decoder: EngineBinding
    ttl_ms: Ms
    hold_ms: Ms
    append_threshold_tokens: Tokens
    ledger_tokens: Tokens
    granted_at_ms: Ms
    exp_ms: Ms
    migrations: int = 0
    turns: int = 0

    def names_engine(self, engine_id: str) -> bool:
        """Whether the lease binds this engine, as prefiller or decoder."""
        return engine_id == self.decoder.engine_id or (
            self.prefiller is not None and engine_id == self.prefiller.engine_id
        )


@quick_init
@dataclass(frozen=True, slots=True, kw_only=True)
class HeldToken:
    """What a batch wants to know of a token whose signature was found good, now or before; see `LeaseClaims`."""

    lease_id: LeaseId
    tenant: TenantId
    ledger_tokens: Tokens
    exp_ms: Ms
    migrations: int


def claims_of(lease: Lease, *, exp_ms: Ms) -> LeaseClaims:
    """The claims of a live lease for a token that ends at `exp_ms`."""
    return LeaseClaims(
        lease_id=lease.lease_id,
        epoch=lease.epoch,
        tenant=lease.key.tenant,
        conversation_id=lease.key.conversation_id,
        lineage=lease.key.lineage,
        model=lease.key.model,
        mode=lease.mode,
        prefiller=lease.prefiller,
        decoder=lease.decoder,
        ttl_ms=lease.ttl_ms,
        hold_ms=lease.hold_ms,
        append_threshold_tokens=lease.append_threshold_tokens,
        ledger_tokens=lease.ledger_tokens,
        granted_at_ms=lease.granted_at_ms,
        exp_ms=exp_ms,
        migrations=lease.migrations,
        turns=lease.turns,
    )


class TokenSigner:
    """Signs with the first key, accepts every key: put a new key first, keep the old one for a token's life.

    Args:
        keys: at least one key, kids all different.

    Raises:
        ValueError: no key, or two keys with one kid.
    """

    def __init__(self, keys: Sequence[TokenKey]) -> None:
        if not keys:
            raise ValueError("a token signer needs at least one signing key")
        self._keys = {key.kid: key for key in keys}
        if len(self._keys) != len(keys):
            raise ValueError("two signing keys have the same kid; give each its own")
        self._current: TokenKey = keys[0]
        self._header = _encode({"alg": self._current.alg, "kid": self._current.kid, "typ": "JWT"})
        self._held = _Remembered()

    def sign(self, claims: LeaseClaims) -> str:
        """The token that says `claims`.

        Raises:
            TokenError: the ids and URLs in it are so long that the token would exceed `TOKEN_CHARS_MAX`, or the first
                key only checks.
        """
        signed = f"{self._header}.{_encode(_payload(claims))}"
        token = f"{signed}.{self._current.signature(signed)}"
        if len(token) > TOKEN_CHARS_MAX:
            raise TokenError(
                f"the token of lease {claims.lease_id} would have {len(token)} characters, over {TOKEN_CHARS_MAX}; "
                "use shorter conversation ids, model names or engine URLs"
            )
        return token

    def verify(self, token: str, *, now_ms: Ms) -> LeaseClaims:
        """The claims of `token`, once its signature and its life are checked.

        Raises:
            TokenInvalid: not a token of ours.
            TokenExpired: of ours, but over at `now_ms`; carries the claims.
        """
        claims = self._check(token)
        if now_ms >= claims.exp_ms:
            raise TokenExpired(claims, now_ms=now_ms)
        return claims

    def recognise(self, token: str) -> HeldToken:
        """The little that is remembered of tokens checked lately: every lease shows its token again and again.

        Whether its life is over is the caller's to compare. Remembered by SHA-256 digest, which takes a tenth of a
        check and a fifth of the room of a token.

        Raises:
            TokenInvalid: not a token of ours.
        """
        digest = _digest(token)
        held = self._held.get(digest)
        if held is None:
            claims = self._check(token)
            held = HeldToken(
                lease_id=claims.lease_id,
                tenant=claims.tenant,
                ledger_tokens=claims.ledger_tokens,
                exp_ms=claims.exp_ms,
                migrations=claims.migrations,
            )
            self._held.put(digest, held)
        return held

    def _check(self, token: str) -> LeaseClaims:
        header, payload, signature = _split(token)
        key = self._key_of(header)
        if not key.accepts(f"{header}.{payload}", signature):
            raise TokenInvalid("the token's signature does not match: it was forged, cut or changed")
        return _claims(_decode(payload))

    def _key_of(self, header: str) -> TokenKey:
        if header == self._header:
            return self._current
        fields = _decode(header)
        # Never let the token choose its own check ("alg": "none" and its kin, RFC 8725 section 3.1).
        algs = sorted({key.alg for key in self._keys.values()})
        if fields.get("alg") not in algs or fields.get("typ", "JWT") != "JWT" or "crit" in fields:
            raise TokenInvalid(f"the token is no JWT of {' or '.join(algs)}")
        key = self._keys.get(str(fields.get("kid")))
        if key is None:
            raise TokenInvalid(f"the token was signed by key {str(fields.get('kid'))[:64]!r}, which is not configured")
        if fields["alg"] != key.alg:  # a public key must never serve as the secret of an HMAC
            raise TokenInvalid(f"the token names {fields['alg']}, but its key {key.kid!r} is one of {key.alg}")
        return key


class _Remembered:
    """The tokens that were shown lately, in two generations: what the younger misses and the older has moves over.

    At most `_REMEMBERED_MAX`, without the links that an order of use would cost each of them.
    """

    def __init__(self) -> None:
        self._young: dict[bytes, HeldToken] = {}
        self._old: dict[bytes, HeldToken] = {}

    def __len__(self) -> int:
        return len(self._young) + len(self._old)

    def get(self, digest: bytes) -> HeldToken | None:
        held = self._young.get(digest)
        if held is None and (held := self._old.pop(digest, None)) is not None:
            self.put(digest, held)
        return held

    def put(self, digest: bytes, held: HeldToken) -> None:
        if len(self._young) >= _REMEMBERED_MAX // 2:
            self._young, self._old = {}, self._young
        self._young[digest] = held


def _digest(token: str) -> bytes:
    try:
        return hashlib.sha256(token.encode("ascii")).digest()
    except UnicodeEncodeError as problem:
        raise TokenInvalid("not a compact JWT: it has characters that are not ASCII") from problem


def read_unverified(token: str) -> LeaseClaims:
    """What `token` says, its signature unchecked: for the holder, who has no key and got it from the broker.

    Raises:
        TokenInvalid: it cannot be read.
    """
    _, payload, _ = _split(token)
    return _claims(_decode(payload))


def _split(token: str) -> tuple[str, str, str]:
    if len(token) > TOKEN_CHARS_MAX:
        raise TokenInvalid(f"the token has {len(token)} characters, over {TOKEN_CHARS_MAX}")
    parts = token.split(".")
    if len(parts) != 3 or not token.isascii():
        raise TokenInvalid("not a compact JWT: three base64url parts joined by dots are expected")
    return parts[0], parts[1], parts[2]


def _base64url(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode("ascii")


def _encode(fields: dict[str, Any]) -> str:
    return _base64url(to_json(fields))


def _decode(part: str) -> dict[str, Any]:
    try:
        fields = from_json(base64.b64decode(part + "=" * (-len(part) % 4), altchars=b"-_", validate=True))
    except (binascii.Error, ValueError) as problem:
        raise TokenInvalid("a part of the token is not base64url of JSON") from problem
    if not isinstance(fields, dict):
        raise TokenInvalid("a part of the token is not a JSON object")
    return fields


def _payload(claims: LeaseClaims) -> dict[str, Any]:
    return {
        "iss": _ISSUER,
        "ver": _VERSION,
        "sub": claims.lease_id,
        # RFC 7519 counts seconds; rounded up, so that a checker which reads only `exp` never ends it early.
        "exp": -(-claims.exp_ms // 1000),
        "exp_ms": claims.exp_ms,
        "epoch": claims.epoch,
        "tenant": claims.tenant,
        "conversation_id": claims.conversation_id,
        "lineage": claims.lineage,
        "model": claims.model,
        "mode": claims.mode.value,
        "prefiller": _packed(claims.prefiller),
        "decoder": _packed(claims.decoder),
        "ttl_ms": claims.ttl_ms,
        "hold_ms": claims.hold_ms,
        "append_threshold_tokens": claims.append_threshold_tokens,
        "ledger_tokens": claims.ledger_tokens,
        "granted_at_ms": claims.granted_at_ms,
        "migrations": claims.migrations,
        "turns": claims.turns,
    }


def _packed(binding: EngineBinding | None) -> list[str] | None:
    return None if binding is None else [binding.engine_id, binding.url, binding.incarnation]


def _claims(fields: dict[str, Any]) -> LeaseClaims:
    if fields.get("iss") != _ISSUER or fields.get("ver") != _VERSION:
        raise TokenInvalid(f"not a lease token of version {_VERSION}")
    try:
        decoder = _binding(*fields["decoder"])
        prefiller = None if fields["prefiller"] is None else _binding(*fields["prefiller"])
        return LeaseClaims(
            lease_id=LeaseId(_text(fields["sub"])),
            epoch=_whole(fields["epoch"]),
            tenant=TenantId(_text(fields["tenant"])),
            conversation_id=ConversationId(_text(fields["conversation_id"])),
            lineage=LineageId(_text(fields["lineage"])),
            model=ModelName(_text(fields["model"])),
            mode=Mode(fields["mode"]),
            prefiller=prefiller,
            decoder=decoder,
            ttl_ms=Ms(_whole(fields["ttl_ms"])),
            hold_ms=Ms(_whole(fields["hold_ms"])),
            append_threshold_tokens=Tokens(_whole(fields["append_threshold_tokens"])),
            ledger_tokens=Tokens(_whole(fields["ledger_tokens"])),
            granted_at_ms=Ms(_whole(fields["granted_at_ms"])),
            exp_ms=Ms(_whole(fields["exp_ms"])),
            migrations=_whole(fields["migrations"]),
            turns=_whole(fields["turns"]),
        )
    except (KeyError, TypeError, ValueError) as problem:
        raise TokenInvalid(f"the token lacks a claim or holds one of the wrong kind ({problem})") from problem


@lru_cache(maxsize=4096)
def _binding(engine_id: Any, url: Any, incarnation: Any) -> EngineBinding:
    """Few engines, many tokens."""
    return EngineBinding(
        engine_id=EngineId(_text(engine_id)), url=_text(url), incarnation=Incarnation(_text(incarnation))
    )


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError(f"{value!r} is not a text")
    return value


def _whole(value: Any) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise TypeError(f"{value!r} is not a whole number")
    return value
