"""Lease tokens signed with Ed25519: the public key checks all that the private one signed, and nothing else."""

import base64
import dataclasses
import json
import sys

import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric import ec, ed25519, x25519

from conserve_sdk._ed25519 import PrivateKey, PublicKey
from conserve_sdk.tokens import SigningKey, TokenError, TokenInvalid, TokenSigner, read_unverified

from .test_tokens import BEFORE, CLAIMS, NEW


def private_pem(key=None, password: bytes | None = None) -> bytes:
    how = pem.BestAvailableEncryption(password) if password else pem.NoEncryption()
    return (key or ed25519.Ed25519PrivateKey.generate()).private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, how)


def public_pem(private: bytes) -> bytes:
    key = pem.load_pem_private_key(private, None).public_key()
    return key.public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)


PEM = private_pem()
PRIVATE, PUBLIC = PrivateKey("2026-12", PEM), PublicKey("2026-12", public_pem(PEM))
BROKER, GUARD = TokenSigner([PRIVATE]), TokenSigner([PUBLIC])


def part(fields: dict) -> str:
    return base64.urlsafe_b64encode(json.dumps(fields, separators=(",", ":")).encode()).rstrip(b"=").decode()


@pytest.mark.parametrize("checker", [BROKER, GUARD], ids=["private", "public"])
def test_what_was_signed_is_believed(checker: TokenSigner) -> None:
    token = BROKER.sign(CLAIMS)
    assert checker.verify(token, now_ms=BEFORE) == CLAIMS == read_unverified(token)
    assert json.loads(base64.urlsafe_b64decode(token.split(".")[0] + "==")) == {
        "alg": "EdDSA",
        "kid": "2026-12",
        "typ": "JWT",
    }


@pytest.mark.parametrize("checker", [PRIVATE, PUBLIC], ids=["private", "public"])
def test_nothing_else_is_believed(checker: PrivateKey | PublicKey) -> None:
    header, payload, signature = BROKER.sign(CLAIMS).split(".")
    other = TokenSigner([PrivateKey("2026-12", private_pem())]).sign(CLAIMS)
    changed = BROKER.sign(dataclasses.replace(CLAIMS, epoch=9)).split(".")[1]
    last = signature[-1]
    respelled = signature[:-1] + chr(ord(last) + 1)  # the last character has four spare bits
    for token in (
        other,
        f"{header}.{changed}.{signature}",
        f"{header}.{payload}.",
        f"{header}.{payload}.{signature[:-2]}",
        f"{header}.{payload}.{signature}AA",
        f"{header}.{payload}.{respelled}",
        f"{header}.{payload}.not!base64",
        f"{header}.{payload}.{'A' * 86}",
    ):
        with pytest.raises(TokenInvalid):
            TokenSigner([checker]).verify(token, now_ms=BEFORE)


def test_a_public_key_is_never_the_secret_of_an_hmac() -> None:
    """The classic confusion of algorithms: what everybody knows must not sign."""
    forger = TokenSigner([SigningKey(kid="2026-12", secret=public_pem(PEM))])
    both = TokenSigner([PUBLIC, NEW])
    with pytest.raises(TokenInvalid, match="no JWT of EdDSA"):
        GUARD.verify(forger.sign(CLAIMS), now_ms=BEFORE)
    with pytest.raises(TokenInvalid, match="names HS256, but its key '2026-12' is one of EdDSA"):
        both.verify(forger.sign(CLAIMS), now_ms=BEFORE)
    payload, signature = BROKER.sign(CLAIMS).split(".")[1:]
    with pytest.raises(TokenInvalid, match=r"names EdDSA, but its key .* is one of HS256"):
        both.verify(f"{part({'alg': 'EdDSA', 'kid': NEW.kid})}.{payload}.{signature}", now_ms=BEFORE)


def test_keys_of_both_kinds_are_rotated_into_each_other() -> None:
    before, during, after = TokenSigner([NEW]), TokenSigner([PRIVATE, NEW]), TokenSigner([PRIVATE])
    guard = TokenSigner([PUBLIC, NEW])
    for token in (before.sign(CLAIMS), during.sign(CLAIMS)):
        assert during.verify(token, now_ms=BEFORE) == guard.verify(token, now_ms=BEFORE) == CLAIMS
    assert after.verify(during.sign(CLAIMS), now_ms=BEFORE) == CLAIMS
    with pytest.raises(TokenInvalid):
        after.verify(before.sign(CLAIMS), now_ms=BEFORE)


def test_a_public_key_signs_nothing() -> None:
    with pytest.raises(TokenError, match="is a public one"):
        GUARD.sign(CLAIMS)


@pytest.mark.parametrize(
    ("kind", "content", "says"),
    [
        (PrivateKey, b"", "no private key in PEM"),
        (PrivateKey, public_pem(PEM), "no private key in PEM"),
        (PrivateKey, private_pem(password=b"password"), "without a password"),
        (PrivateKey, private_pem(x25519.X25519PrivateKey.generate()), "no Ed25519 key"),
        (PrivateKey, private_pem(ec.generate_private_key(ec.SECP256R1())), "no Ed25519 key"),
        (PublicKey, b"rubbish", "no public key in PEM"),
        (PublicKey, PEM, "no public key in PEM"),
        (PublicKey, public_pem(private_pem(ec.generate_private_key(ec.SECP256R1()))), "no Ed25519 key"),
    ],
)
def test_what_is_no_key_is_named(kind: type, content: bytes, says: str) -> None:
    with pytest.raises(ValueError, match=says) as caught:
        kind("k", content)
    assert "PRIVATE" not in str(caught.value)
    with pytest.raises(ValueError, match="needs a kid"):
        kind("", PEM)


def test_keys_show_no_secret() -> None:
    assert (repr(PRIVATE), repr(PUBLIC)) == ("PrivateKey('2026-12')", "PublicKey('2026-12')")


@pytest.mark.parametrize("kind", [PrivateKey, PublicKey])
def test_without_the_library_the_extra_is_named(kind: type, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "cryptography.hazmat.primitives.asymmetric.ed25519", None)
    with pytest.raises(ValueError, match=r"pip install 'conserve-sdk\[eddsa\]'"):
        kind("k", PEM)


def test_another_jwt_library_agrees() -> None:
    jwt = pytest.importorskip("jwt")
    options = {"verify_exp": False}
    read = jwt.decode(BROKER.sign(CLAIMS), public_pem(PEM), algorithms=["EdDSA"], issuer="conserve", options=options)
    assert read["sub"] == "l-1"
    signed_elsewhere = jwt.encode(read, PEM, algorithm="EdDSA", headers={"kid": "2026-12"})
    assert GUARD.verify(signed_elsewhere, now_ms=BEFORE) == CLAIMS
