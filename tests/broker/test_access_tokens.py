"""Lease tokens as capabilities: what is forged, over, foreign or replayed changes nothing, on any route."""

import json
from collections.abc import AsyncIterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from conserve_broker.service import BrokerService
from conserve_broker.settings import ConfigProblem, load_config
from conserve_sdk._ed25519 import PublicKey
from conserve_sdk.core import PAPER, BrokerSettings, Ms
from conserve_sdk.protocol import LeaseGrant
from conserve_sdk.tokens import SigningKey, TokenSigner, read_unverified

from .in_process import SIGNER, running_service
from .keyed import BLUE, EVERYBODY, RED, Clock, House

FORGER = TokenSigner([SigningKey(kid="test", secret=b"x" * 32)])
STRANGER = TokenSigner([SigningKey(kid="nobody's", secret=b"s" * 32)])
BAD, UNKNOWN = "bad_token", "unknown"


@pytest.fixture
async def service() -> AsyncIterator[BrokerService]:
    async with running_service(BrokerSettings(placement=PAPER)) as service:
        yield service


@pytest.fixture
def house(service: BrokerService) -> House:
    return House(service, Clock(), *EVERYBODY)


def forged(kind: str, good: str) -> str:
    claims = read_unverified(good)
    head, payload, signature = good.split(".")
    match kind:
        case "signed by another secret":
            return FORGER.sign(claims)
        case "signed by an unknown key":
            return STRANGER.sign(claims)
        case "without a signature":
            return f"{head}.{payload}."
        case "with half a signature":
            return f"{head}.{payload}.{signature[:20]}"
        case "with a signature of something else":
            return ".".join((*SIGNER.sign(replace(claims, epoch=7)).split(".")[:2], signature))
        case "of another tenant":
            return SIGNER.sign(replace(claims, tenant=BLUE.table.tenant))  # type: ignore[arg-type]
        case "of a lease that nobody granted, and over":
            return SIGNER.sign(replace(claims, lease_id="lease-0", exp_ms=Ms(1)))  # type: ignore[arg-type]
        case _:
            return "" if kind == "empty" else "a.b.c"


async def tried(house: House, lease: LeaseGrant, token: str) -> tuple[list[int], list[str]]:
    """Statuses of the routes of one lease, and verdicts of the batches."""
    path = f"/v1/leases/{lease.lease_id}"
    statuses = []
    for method, where, body, header in (
        ("GET", path, None, token),
        ("POST", f"{path}/park", {"token": token}, ""),
        ("POST", f"{path}/supersede", {"token": token, "epoch": 1, "reason": "theft"}, ""),
        ("DELETE", path, None, token),
    ):
        statuses.append((await house.ask(method, where, RED, body, lease=header)).status_code)
    reports: list[dict[str, Any]] = [
        {"kind": "turn_started", "token": token, "input_tokens": 9},
        {"kind": "turn_finished", "token": token, "prompt_tokens": 90_000},
        {"kind": "engine_failure", "token": token, "engine_id": "d0", "incarnation": "one", "phase": "decode"},
    ]
    answers = [
        await house.ask("POST", "/v1/reports", RED, {"reports": reports}),
        await house.ask("POST", "/v1/renewals", RED, {"tokens": [token]}),
    ]
    return statuses, [result["verdict"] for answer in answers for result in answer.json()["results"]]


@pytest.mark.parametrize(
    ("kind", "verdict"),
    [
        ("signed by another secret", BAD),
        ("signed by an unknown key", BAD),
        ("without a signature", BAD),
        ("with half a signature", BAD),
        ("with a signature of something else", BAD),
        ("of another tenant", BAD),
        ("of a lease that nobody granted, and over", UNKNOWN),
        ("rubbish", BAD),
        ("empty", BAD),
    ],
)
async def test_a_token_that_is_not_good_has_no_effect(
    house: House, service: BrokerService, kind: str, verdict: str
) -> None:
    lease = await house.grant(RED)
    before = tuple(service.core.leases())
    statuses, verdicts = await tried(house, lease, forged(kind, lease.token))
    assert set(statuses) == ({401} if verdict == BAD else {404})
    assert verdicts == [verdict] * 4
    assert tuple(service.core.leases()) == before
    assert all(view.state.value == "ready" for view in service.core.engines()), "no engine was accused"


async def test_a_token_of_one_lease_opens_no_other(house: House, service: BrokerService) -> None:
    mine, other = await house.grant(RED, "mine"), await house.grant(RED, "other")
    path = f"/v1/leases/{other.lease_id}"
    assert (await house.ask("GET", path, RED, lease=mine.token)).status_code == 401
    assert (await house.ask("DELETE", path, RED, lease=mine.token)).status_code == 401
    assert (await house.ask("POST", f"{path}/park", RED, {"token": mine.token})).status_code == 401
    assert service.core.lease(other.lease_id) is not None  # type: ignore[arg-type]


async def test_a_replay_after_the_release_brings_nothing_back(house: House, service: BrokerService) -> None:
    lease = await house.grant(RED)
    path = f"/v1/leases/{lease.lease_id}"
    assert (await house.ask("DELETE", path, RED, lease=lease.token)).status_code == 204
    assert (await house.ask("DELETE", path, RED, lease=lease.token)).status_code == 204, "idempotent"
    renewed = await house.ask("POST", "/v1/renewals", RED, {"tokens": [lease.token]})
    assert renewed.json()["results"][0]["verdict"] == UNKNOWN
    assert service.core.lease_count() == 0


async def test_a_replayed_supersede_makes_one_lease(house: House, service: BrokerService) -> None:
    lease = await house.grant(RED)
    path, body = f"/v1/leases/{lease.lease_id}/supersede", {"token": lease.token, "epoch": 1, "reason": "test"}
    first, again = [(await house.ask("POST", path, RED, body)).json() for _ in range(2)]
    assert (first["epoch"], again["lease_id"], again["reused"]) == (2, first["lease_id"], True)
    assert service.core.lease_count() == 1
    old = await house.ask("POST", "/v1/renewals", RED, {"tokens": [lease.token]})
    assert old.json()["results"][0]["verdict"] == "superseded"
    assert json.dumps(first).count(lease.token) == 0


# ---- a key pair in place of a shared secret ---------------------------------------------------------------------


async def test_a_broker_with_a_key_pair_readopts_by_tokens_that_a_public_key_checks(tmp_path: Path) -> None:
    raw = Ed25519PrivateKey.generate()
    (tmp_path / "key.pem").write_bytes(raw.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()))
    path = tmp_path / "broker.toml"
    path.write_text(
        "[[token.keys]]\nkid = 'new'\nprivate_key_file = 'key.pem'\n"
        f"[[token.keys]]\nkid = 'test'\nsecret = '{'s' * 32}'\n"
    )
    keys = load_config(path).token_keys()
    public = PublicKey("new", raw.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo))
    async with running_service(BrokerSettings(placement=PAPER), signer=TokenSigner(keys)) as first:
        lease = await House(first, Clock(), RED).grant(RED)
    assert TokenSigner([public]).verify(lease.token, now_ms=Ms(0)).lease_id == lease.lease_id
    old = SIGNER.sign(replace(read_unverified(lease.token), lease_id="lease-of-before", conversation_id="b"))  # type: ignore[arg-type]
    async with running_service(BrokerSettings(placement=PAPER), signer=TokenSigner(keys)) as empty:
        renewed = await House(empty, Clock(), RED).ask("POST", "/v1/renewals", RED, {"tokens": [lease.token, old]})
        assert [result["verdict"] for result in renewed.json()["results"]] == ["ok", "ok"], "both keys are good"
        assert empty.core.lease_count() == 2


@pytest.mark.parametrize(
    ("content", "says"),
    [(None, "cannot read"), (b"rubbish", "no private key in PEM without a password")],
)
def test_a_key_pair_that_cannot_be_used_is_named(tmp_path: Path, content: bytes | None, says: str) -> None:
    if content is not None:
        (tmp_path / "key.pem").write_bytes(content)
    path = tmp_path / "broker.toml"
    path.write_text("[[token.keys]]\nkid = 'new'\nprivate_key_file = 'key.pem'\n")
    with pytest.raises(ConfigProblem, match=rf"token\.keys\.new\.private_key_file: .*{says}"):
        load_config(path).token_keys()
