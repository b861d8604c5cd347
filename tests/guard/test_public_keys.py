"""Guards with public keys only: an engine checks leases that it cannot mint."""

import pytest
from cryptography.hazmat.primitives import serialization as pem
from cryptography.hazmat.primitives.asymmetric.ed25519 import Ed25519PrivateKey

from conserve_sdk._ed25519 import PrivateKey, PublicKey
from conserve_sdk.tokens import SigningKey, TokenError, TokenSigner
from conserve_vllm import GuardConfigError, GuardSettings

from .conftest import KEY, lease, token

SECRET = "s" * 40
RAW = Ed25519PrivateKey.generate()
PRIVATE = PrivateKey("new", RAW.private_bytes(pem.Encoding.PEM, pem.PrivateFormat.PKCS8, pem.NoEncryption()))
PUBLIC_PEM = RAW.public_key().public_bytes(pem.Encoding.PEM, pem.PublicFormat.SubjectPublicKeyInfo)
PUBLIC = PublicKey("new", PUBLIC_PEM)
STAMPS = SigningKey(kid="stamps", secret=SECRET.encode())


def signed() -> str:
    return TokenSigner([PRIVATE]).sign(lease())


def test_a_transfer_with_leases_that_no_engine_can_mint(guarded):
    guarded.guard(keys=(PUBLIC,), stamp_keys=(STAMPS,))
    answer = guarded.decode(guarded.prefill(lease_token=signed()), lease_token=signed())
    assert answer.status_code == 200
    old = guarded.post("d0", guarded.body(kv_transfer_params={"do_remote_prefill": True}), lease_token=token(KEY))
    assert old.status_code in (400, 403), "the shared secret of before is worth nothing"


def test_engines_that_do_not_share_the_stamp_secret_move_nothing(guarded):
    guarded.guard(keys=(PUBLIC,), stamp_keys=(STAMPS,))
    params = guarded.prefill(lease_token=signed())
    guarded.guard(keys=(PUBLIC,), stamp_keys=(SigningKey(kid="stamps", secret=b"another secret" * 4),))
    answer = guarded.decode(params, lease_token=signed())
    assert (answer.status_code, answer.json()["error"]["code"]) == (409, "transfer_unstamped")


def environment(tmp_path, **changes: str) -> dict[str, str]:
    (tmp_path / "new.pem").write_bytes(PUBLIC_PEM)
    base = {"CONSERVE_GUARD_ENGINE_ID": "d0", "CONSERVE_GUARD_KEYS": f"new=public:{tmp_path}/new.pem", "S": SECRET}
    return base | {f"CONSERVE_GUARD_{name}": value for name, value in changes.items()}


def test_settings_take_public_keys_and_the_secret_for_stamps(tmp_path):
    found = GuardSettings.from_env(environment(tmp_path, STAMP_KEYS="stamps=env:S"))
    assert ([key.kid for key in found.keys], found.secrets()) == (["new"], (STAMPS,))
    with pytest.raises(TokenError):
        TokenSigner(found.keys).sign(lease())
    both = GuardSettings.from_env(environment(tmp_path, KEYS=f"new=public:{tmp_path}/new.pem, old=env:S"))
    assert [key.kid for key in both.secrets()] == ["old"], "while keys are rotated the old secret stamps"


@pytest.mark.parametrize(
    ("changes", "says"),
    [
        ({}, "CONSERVE_GUARD_STAMP_KEYS is not set: with public token keys alone"),
        ({"STAMP_KEYS": "stamps=public:{}/new.pem"}, "CONSERVE_GUARD_STAMP_KEYS: a public key stamps nothing"),
        ({"STAMP_KEYS": "stamps=env:MISSING"}, "CONSERVE_GUARD_STAMP_KEYS: MISSING is not set"),
        ({"STAMP_KEYS": "a=env:S,a=env:S"}, "CONSERVE_GUARD_STAMP_KEYS names one kid twice"),
        ({"KEYS": "new=public:/nowhere.pem"}, "CONSERVE_GUARD_KEYS: cannot read /nowhere.pem"),
        ({"KEYS": "new=public:/dev/null"}, "no public key in PEM"),
    ],
)
def test_what_is_missing_is_named(tmp_path, changes, says):
    with pytest.raises(GuardConfigError) as caught:
        GuardSettings.from_env(
            environment(tmp_path, **{name: value.format(tmp_path) for name, value in changes.items()})
        )
    assert says in str(caught.value)
    assert SECRET not in str(caught.value)
