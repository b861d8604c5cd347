"""Lease tokens: what is signed comes back, and nothing else is believed."""

import base64
import dataclasses
import hashlib
import hmac
import json

import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sdk.core.lease import EngineBinding, Mode
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
from conserve_sdk.tokens import (
    TOKEN_CHARS_MAX,
    LeaseClaims,
    SigningKey,
    TokenError,
    TokenExpired,
    TokenInvalid,
    TokenSigner,
    read_unverified,
)

OLD = SigningKey(kid="2026-10", secret=b"o" * 32)
NEW = SigningKey(kid="2026-11", secret=b"n" * 32)
SIGNER = TokenSigner([NEW])
CLAIMS = LeaseClaims(
    lease_id=LeaseId("l-1"),
    epoch=3,
    tenant=TenantId("default"),
    conversation_id=ConversationId("chat/42"),
    lineage=LineageId("main"),
    model=ModelName("qwen"),
    mode=Mode.MIGRATE,
    prefiller=EngineBinding(engine_id=EngineId("p0"), url="http://p0:8000", incarnation=Incarnation("a")),
    decoder=EngineBinding(engine_id=EngineId("d0"), url="http://d0:8000", incarnation=Incarnation("b")),
    ttl_ms=Ms(60_000),
    hold_ms=Ms(10_000),
    append_threshold_tokens=Tokens(0),
    ledger_tokens=Tokens(4096),
    granted_at_ms=Ms(1_000_000),
    exp_ms=Ms(1_120_001),
    migrations=1,
    turns=7,
)
BEFORE = Ms(CLAIMS.exp_ms - 1)


def _b64(data: bytes) -> str:
    return base64.urlsafe_b64encode(data).rstrip(b"=").decode()


def _forge(header: object, payload: object, *, secret: bytes = NEW.secret) -> str:
    signed = f"{_b64(json.dumps(header).encode())}.{_b64(json.dumps(payload).encode())}"
    return f"{signed}.{_b64(hmac.digest(secret, signed.encode(), hashlib.sha256))}"


def _payload(token: str) -> dict[str, object]:
    part = token.split(".")[1]
    fields = json.loads(base64.urlsafe_b64decode(part + "=" * (-len(part) % 4)))
    assert isinstance(fields, dict)
    return fields


def _good_header(**changes: object) -> dict[str, object]:
    return {"alg": "HS256", "kid": NEW.kid, "typ": "JWT", **changes}


names = st.text(st.characters(min_codepoint=0x21, max_codepoint=0x7E), min_size=1, max_size=40)
whole = st.integers(min_value=0, max_value=10**13)
bindings = st.builds(
    EngineBinding, engine_id=names.map(EngineId), url=st.text(max_size=60), incarnation=names.map(Incarnation)
)
any_claims = st.builds(
    LeaseClaims,
    lease_id=names.map(LeaseId),
    epoch=whole,
    tenant=names.map(TenantId),
    conversation_id=names.map(ConversationId),
    lineage=names.map(LineageId),
    model=names.map(ModelName),
    mode=st.sampled_from(Mode),
    prefiller=st.none() | bindings,
    decoder=bindings,
    ttl_ms=whole.map(Ms),
    hold_ms=whole.map(Ms),
    append_threshold_tokens=whole.map(Tokens),
    ledger_tokens=whole.map(Tokens),
    granted_at_ms=whole.map(Ms),
    exp_ms=st.integers(min_value=1, max_value=10**13).map(Ms),
    migrations=st.integers(0, 1),
    turns=whole,
)


@given(claims=any_claims)
def test_what_is_signed_comes_back(claims: LeaseClaims) -> None:
    token = SIGNER.sign(claims)
    assert SIGNER.verify(token, now_ms=Ms(claims.exp_ms - 1)) == claims
    assert read_unverified(token) == claims


def test_the_life_ends_exactly_at_exp_ms() -> None:
    token = SIGNER.sign(CLAIMS)
    assert SIGNER.verify(token, now_ms=BEFORE) == CLAIMS
    with pytest.raises(TokenExpired, match=r"lease l-1 ended 0 ms ago") as over:
        SIGNER.verify(token, now_ms=CLAIMS.exp_ms)
    assert over.value.claims == CLAIMS


@given(data=st.data())
def test_any_changed_character_is_noticed(data: st.DataObject) -> None:
    token = SIGNER.sign(CLAIMS)
    at = data.draw(st.integers(0, len(token) - 1))
    other = data.draw(st.sampled_from("AZaz09-_.=!~").filter(lambda char: char != token[at]))
    with pytest.raises(TokenInvalid):
        SIGNER.verify(token[:at] + other + token[at + 1 :], now_ms=BEFORE)


def test_a_signature_written_with_other_spare_bits_is_refused() -> None:
    """43 base64url characters hold 258 bits: two of the last character mean nothing and could be varied."""
    token = SIGNER.sign(CLAIMS)
    alphabet = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789-_"
    twin = token[:-1] + alphabet[alphabet.index(token[-1]) ^ 1]
    assert base64.urlsafe_b64decode(twin.split(".")[2] + "=") == base64.urlsafe_b64decode(token.split(".")[2] + "=")
    with pytest.raises(TokenInvalid, match="signature"):
        SIGNER.verify(twin, now_ms=BEFORE)


def test_rotation_signs_with_the_first_key_and_accepts_every_key() -> None:
    old = TokenSigner([OLD]).sign(CLAIMS)
    both = TokenSigner([NEW, OLD])
    assert both.verify(old, now_ms=BEFORE) == CLAIMS
    assert TokenSigner([NEW]).verify(both.sign(CLAIMS), now_ms=BEFORE) == CLAIMS
    with pytest.raises(TokenInvalid, match="'2026-10', which is not configured"):
        TokenSigner([NEW]).verify(old, now_ms=BEFORE)


def test_another_secret_under_the_same_kid_is_a_forgery() -> None:
    forged = TokenSigner([SigningKey(kid=NEW.kid, secret=b"x" * 32)]).sign(CLAIMS)
    with pytest.raises(TokenInvalid, match="signature"):
        SIGNER.verify(forged, now_ms=BEFORE)


@pytest.mark.parametrize(
    "header",
    [
        _good_header(alg="none"),
        _good_header(alg="None"),
        _good_header(alg="HS512"),
        _good_header(alg="RS256"),
        _good_header(crit=["exp"], exp=1),
        _good_header(typ="JWE"),
        {"kid": NEW.kid},
        {"alg": "HS256"},
        [],
        "HS256",
    ],
)
def test_the_token_does_not_choose_how_it_is_checked(header: object) -> None:
    with pytest.raises(TokenInvalid):
        SIGNER.verify(_forge(header, _payload(SIGNER.sign(CLAIMS))), now_ms=BEFORE)


def test_an_unsigned_token_is_refused() -> None:
    body = SIGNER.sign(CLAIMS).split(".")[1]
    none = _b64(json.dumps({"alg": "none", "kid": NEW.kid, "typ": "JWT"}).encode())
    with pytest.raises(TokenInvalid, match="HS256"):
        SIGNER.verify(f"{none}.{body}.", now_ms=BEFORE)


def test_a_header_in_another_order_is_the_same_header() -> None:
    token = _forge({"typ": "JWT", "kid": NEW.kid, "alg": "HS256"}, _payload(SIGNER.sign(CLAIMS)))
    assert SIGNER.verify(token, now_ms=BEFORE) == CLAIMS


@pytest.mark.parametrize(
    "change",
    [
        {"iss": "somebody"},
        {"ver": 2},
        {"epoch": "3"},
        {"epoch": True},
        {"epoch": -1},
        {"mode": "sideways"},
        {"decoder": None},
        {"decoder": ["d0", "http://d0"]},
        {"decoder": ["d0", "http://d0", 7]},
        {"prefiller": 5},
        {"sub": 5},
        {"exp_ms": 1.5},
    ],
)
def test_a_signed_payload_of_the_wrong_shape_is_refused(change: dict[str, object]) -> None:
    token = _forge(_good_header(), {**_payload(SIGNER.sign(CLAIMS)), **change})
    with pytest.raises(TokenInvalid):
        SIGNER.verify(token, now_ms=BEFORE)


def test_a_missing_claim_is_named() -> None:
    payload = _payload(SIGNER.sign(CLAIMS))
    del payload["ledger_tokens"]
    with pytest.raises(TokenInvalid, match="ledger_tokens"):
        SIGNER.verify(_forge(_good_header(), payload), now_ms=BEFORE)


@pytest.mark.parametrize(
    "text", ["", "a.b", "a.b.c.d", "....", "ü.ü.ü", "!!!.e30.e30", "e30.e30.e30", "bnVsbA.e30.e30"]
)
def test_what_is_no_token_is_refused(text: str) -> None:
    with pytest.raises(TokenInvalid):
        SIGNER.verify(text, now_ms=BEFORE)


def test_a_token_beyond_the_bound_is_not_even_read() -> None:
    with pytest.raises(TokenInvalid, match=f"over {TOKEN_CHARS_MAX}"):
        read_unverified("a" * (TOKEN_CHARS_MAX + 1))


def test_a_token_as_long_as_the_bound_is_signed_and_read() -> None:
    signer = TokenSigner([SigningKey(kid="kk", secret=b"k" * 32)])
    token = signer.sign(dataclasses.replace(CLAIMS, model=ModelName("m" * 2_625)))
    assert len(token) == TOKEN_CHARS_MAX
    assert signer.verify(token, now_ms=BEFORE).lease_id == CLAIMS.lease_id


def test_a_token_beyond_the_bound_is_not_signed() -> None:
    long = dataclasses.replace(CLAIMS, model=ModelName("m" * TOKEN_CHARS_MAX))
    with pytest.raises(TokenError, match="use shorter"):
        SIGNER.sign(long)


@pytest.mark.parametrize("stray", ["!", "+", "!!!!", "    "])
def test_a_character_that_is_not_base64url_is_not_passed_over(stray: str) -> None:
    header, payload, signature = SIGNER.sign(CLAIMS).split(".")
    with pytest.raises(TokenInvalid, match="not base64url"):
        read_unverified(f"{header}.{payload[:8]}{stray}{payload[8:]}.{signature}")


def test_the_longest_ids_of_the_protocol_fit() -> None:
    longest = dataclasses.replace(
        CLAIMS, conversation_id=ConversationId("c" * 256), lineage=LineageId("l" * 256), model=ModelName("m" * 256)
    )
    assert len(SIGNER.sign(longest)) < TOKEN_CHARS_MAX


def test_keys_are_checked_and_never_shown() -> None:
    with pytest.raises(ValueError, match="at least 32"):
        SigningKey(kid="short", secret=b"x" * 31)
    with pytest.raises(ValueError, match="needs a kid"):
        SigningKey(kid="", secret=b"x" * 32)
    with pytest.raises(ValueError, match="at least one"):
        TokenSigner([])
    with pytest.raises(ValueError, match="same kid"):
        TokenSigner([NEW, SigningKey(kid=NEW.kid, secret=b"y" * 32)])
    assert "nnn" not in repr(NEW)


def test_engines_that_the_lease_binds() -> None:
    assert CLAIMS.names_engine("p0")
    assert CLAIMS.names_engine("d0")
    assert not CLAIMS.names_engine("d1")
    assert not dataclasses.replace(CLAIMS, prefiller=None).names_engine("p0")


def test_tokens_are_recognised_without_another_check_and_not_for_ever(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("conserve_sdk.tokens._REMEMBERED_MAX", 4)
    signer = TokenSigner([NEW])
    tokens = [signer.sign(dataclasses.replace(CLAIMS, migrations=number)) for number in range(6)]
    checks: list[str] = []
    check = signer._check
    monkeypatch.setattr(signer, "_check", lambda token: checks.append(token) or check(token))
    for number, token in enumerate(tokens):
        assert [signer.recognise(token).migrations for _ in range(2)] == [number, number]
    assert checks == tokens
    assert len(signer._held) == 4
    assert signer.recognise(tokens[2]).migrations == 2  # of the older generation, now of the younger
    assert checks == tokens
    signer.recognise(tokens[0])
    assert checks == [*tokens, tokens[0]]
    held = signer.recognise(tokens[2])
    assert (held.lease_id, held.tenant, held.ledger_tokens) == (CLAIMS.lease_id, CLAIMS.tenant, CLAIMS.ledger_tokens)
    assert held.exp_ms == CLAIMS.exp_ms
    assert len(checks) == 7


@pytest.mark.parametrize(("kept", "added"), [(None, "A"), (-2, ""), (None, "é")])
def test_what_is_no_token_is_not_recognised_even_after_the_good_one(kept: int | None, added: str) -> None:
    token = SIGNER.sign(CLAIMS)
    SIGNER.recognise(token)
    for _ in range(2):
        with pytest.raises(TokenInvalid):
            SIGNER.recognise(token[:kept] + added)


def test_another_jwt_library_agrees() -> None:
    jwt = pytest.importorskip("jwt")
    options = {"verify_exp": False}
    read = jwt.decode(SIGNER.sign(CLAIMS), NEW.secret, algorithms=["HS256"], issuer="conserve", options=options)
    assert read["sub"] == "l-1"
    assert read["exp"] == 1_121  # 1 120 001 ms, rounded up
    assert jwt.get_unverified_header(SIGNER.sign(CLAIMS)) == _good_header()
    signed_elsewhere = jwt.encode(read, NEW.secret, algorithm="HS256", headers={"kid": NEW.kid})
    assert SIGNER.verify(signed_elsewhere, now_ms=BEFORE) == CLAIMS
    with pytest.raises(jwt.InvalidSignatureError):
        jwt.decode(SIGNER.sign(CLAIMS), OLD.secret, algorithms=["HS256"], options=options)
