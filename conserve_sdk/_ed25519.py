"""Lease tokens signed with Ed25519 (RFC 8037), for fleets whose engines shall not be able to mint leases.

The broker has the private key, guards only need the public one. `cryptography` does the arithmetic (extra `[eddsa]`);
without it tokens stay with HMAC. Signing costs about four times as much as HMAC, checking with a public key seven.
"""

from __future__ import annotations

import base64
import hmac
from typing import TYPE_CHECKING

from conserve_sdk.tokens import TokenError

if TYPE_CHECKING:
    from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey, Ed25519PublicKey

__all__ = ["PrivateKey", "PublicKey"]

ALG = "EdDSA"
_SIGNATURE_BYTES = 64
_MISSING = "Ed25519 keys need the package cryptography: pip install 'conserve-sdk[eddsa]'"


class PrivateKey:
    """Signs and checks.

    Args:
        kid: public name of the key.
        pem: PKCS 8, without a password, as `openssl genpkey -algorithm ed25519` writes it.

    Raises:
        ValueError: it is no such key, or `cryptography` is missing.
    """

    alg = ALG

    def __init__(self, kid: str, pem: bytes) -> None:
        self.kid = _named(kid)
        self._key = _private(kid, pem)

    def __repr__(self) -> str:
        return f"PrivateKey({self.kid!r})"

    def signature(self, signed: str) -> str:
        """The signature of a token's first two parts."""
        return _text(self._key.sign(signed.encode("ascii")))

    def accepts(self, signed: str, signature: str) -> bool:
        """Whether this key made the signature.

        Ed25519 signs the same text in the same way each time, so whoever can sign compares: a third of the cost.
        """
        return hmac.compare_digest(self.signature(signed), signature)


class PublicKey:
    """Checks only.

    Args:
        kid: public name of the key.
        pem: as `openssl pkey -pubout` writes it.

    Raises:
        ValueError: it is no such key, or `cryptography` is missing.
    """

    alg = ALG

    def __init__(self, kid: str, pem: bytes) -> None:
        self.kid = _named(kid)
        self._key = _public(kid, pem)

    def __repr__(self) -> str:
        return f"PublicKey({self.kid!r})"

    def signature(self, signed: str) -> str:  # noqa: ARG002  # the protocol's
        """Never.

        Raises:
            TokenError: a public key cannot sign.
        """
        raise TokenError(f"the key {self.kid!r} is a public one: it checks tokens and signs none")

    def accepts(self, signed: str, signature: str) -> bool:
        """Whether the private key made the signature."""
        from cryptography.exceptions import InvalidSignature

        try:
            raw = base64.b64decode(signature + "=" * (-len(signature) % 4), altchars=b"-_", validate=True)
            # Base64 has spare bits, so several texts decode to one signature; only the one that is written counts.
            if len(raw) != _SIGNATURE_BYTES or _text(raw) != signature:
                return False
            self._key.verify(raw, signed.encode("ascii"))
        except (InvalidSignature, ValueError):
            return False
        return True


def _named(kid: str) -> str:
    if not kid:
        raise ValueError("a signing key needs a kid: any short name that changes when the key does")
    return kid


def _private(kid: str, pem: bytes) -> Ed25519PrivateKey:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey
        from cryptography.hazmat.primitives.serialization import load_pem_private_key
    except ImportError as error:
        raise ValueError(_MISSING) from error
    try:
        key = load_pem_private_key(pem, password=None)
    except (ValueError, TypeError, UnsupportedAlgorithm) as error:
        raise ValueError(f"key {kid!r} is no private key in PEM without a password") from error
    if isinstance(key, Ed25519PrivateKey):
        return key
    raise ValueError(f"key {kid!r} is no Ed25519 key: make one with `openssl genpkey -algorithm ed25519`")


def _public(kid: str, pem: bytes) -> Ed25519PublicKey:
    try:
        from cryptography.exceptions import UnsupportedAlgorithm
        from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PublicKey
        from cryptography.hazmat.primitives.serialization import load_pem_public_key
    except ImportError as error:
        raise ValueError(_MISSING) from error
    try:
        key = load_pem_public_key(pem)
    except (ValueError, UnsupportedAlgorithm) as error:
        raise ValueError(
            f"key {kid!r} is no public key in PEM: `openssl pkey -in key.pem -pubout` writes one"
        ) from error
    if isinstance(key, Ed25519PublicKey):
        return key
    raise ValueError(f"key {kid!r} is no Ed25519 key: make one with `openssl genpkey -algorithm ed25519`")


def _text(raw: bytes) -> str:
    return base64.urlsafe_b64encode(raw).rstrip(b"=").decode("ascii")
