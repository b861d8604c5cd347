"""Configuration by environment, the memory of used transfers, and who the engine says it is."""

from types import SimpleNamespace

import prometheus_client
import pytest

from conserve_sdk._turn.wire import HEADER_LEASE
from conserve_vllm import GuardConfigError, GuardSettings
from conserve_vllm import guard as guard_module
from conserve_vllm.identity import describe, process_incarnation
from conserve_vllm.refusal import Refusal
from conserve_vllm.spent import SpentTransfers

from .conftest import settings

SECRET = "x" * 40
ENV = {"CONSERVE_GUARD_ENGINE_ID": "d0", "CONSERVE_GUARD_KEYS": "main=env:TOKEN_KEY", "TOKEN_KEY": SECRET}


def test_the_guard_reads_the_header_that_the_sdk_sends():
    assert HEADER_LEASE.lower().encode() == guard_module._LEASE


def test_defaults_keep_well_under_vllms_own_lease():
    found = GuardSettings.from_env(ENV)
    assert (found.engine_id, found.keys[0].kid, found.keys[0].secret) == ("d0", "main", SECRET.encode())
    assert found.transfer_deadline_ms + found.clock_leeway_ms < 30_000
    assert not found.require_lease


def test_everything_can_be_set(tmp_path):
    (tmp_path / "key").write_text(SECRET + "\n")
    found = GuardSettings.from_env(
        ENV
        | {
            "CONSERVE_GUARD_KEYS": f"new=file:{tmp_path / 'key'}, old=env:TOKEN_KEY",
            "CONSERVE_GUARD_REQUIRE_LEASE": "yes",
            "CONSERVE_GUARD_TRANSFER_DEADLINE_MS": "9000",
            "CONSERVE_GUARD_CLOCK_LEEWAY_MS": "0",
            "CONSERVE_GUARD_BODY_BYTES_MAX": "1000",
            "CONSERVE_GUARD_INCARNATION": "fixed",
            "CONSERVE_GUARD_ROLE": "both",
            "CONSERVE_GUARD_TIER": "fast",
        }
    )
    assert [key.kid for key in found.keys] == ["new", "old"]
    assert found.keys[0].secret == SECRET.encode()
    assert (found.require_lease, found.transfer_deadline_ms, found.clock_leeway_ms) == (True, 9_000, 0)
    assert (found.body_bytes_max, found.incarnation, found.role, found.tier) == (1_000, "fixed", "both", "fast")


WRONG = {
    "ENGINE_ID": ("", "ENGINE_ID is not set: set it to the id"),
    "KEYS": ("", "KEYS is not set: list the broker's token keys"),
    "REQUIRE_LEASE": ("maybe", "neither on nor off"),
    "TRANSFER_DEADLINE_MS": ("0", "at least 1"),
    "CLOCK_LEEWAY_MS": ("-1", "at least 0"),
    "BODY_BYTES_MAX": ("64M", "must be a whole number"),
    "ROLE": ("prefil", "must be one of prefiller, decoder, both"),
    "REQUIRE_LEASES": ("1", "is no setting of the guard; known: CONSERVE_GUARD_ENGINE_ID"),
}


@pytest.mark.parametrize(("name", "wrong"), WRONG.items(), ids=WRONG)
def test_a_wrong_variable_is_named_with_its_remedy(name, wrong):
    value, text = wrong
    with pytest.raises(GuardConfigError, match=text) as caught:
        GuardSettings.from_env(ENV | {f"CONSERVE_GUARD_{name}": value})
    assert f"CONSERVE_GUARD_{name}" in str(caught.value)


@pytest.mark.parametrize(
    ("keys", "text"),
    [
        ("a-secret-put-here-by-mistake-0123456789", "kid=file:/path or kid=env:NAME"),
        ("main=base64==", "kid=file:/path or kid=env:NAME"),
        ("main=env:ABSENT", "ABSENT is not set"),
        ("main=file:/nowhere/at/all", "cannot read /nowhere/at/all"),
        ("main=env:SHORT", "at least 32"),
        ("main=env:TOKEN_KEY,main=env:TOKEN_KEY", "one kid twice"),
    ],
)
def test_a_wrong_key_is_explained(keys, text):
    with pytest.raises(GuardConfigError, match=text):
        GuardSettings.from_env(ENV | {"CONSERVE_GUARD_KEYS": keys, "SHORT": "x"})


def test_secrets_are_never_shown():
    assert SECRET not in repr(GuardSettings.from_env(ENV))


# ---- used transfers -------------------------------------------------------------------------------------------


def test_a_transfer_is_remembered_until_its_age_refuses_it():
    spent = SpentTransfers()
    spent.spend(("p", "r"), until_ms=100, now_ms=0)
    with pytest.raises(Refusal, match="used before"):
        spent.spend(("p", "r"), until_ms=100, now_ms=99)
    spent.spend(("p", "r"), until_ms=300, now_ms=100)
    assert len(spent) == 1


def test_a_full_memory_refuses_what_is_new_and_forgets_nothing_early():
    spent = SpentTransfers(at_most=2)
    for name in ("a", "b"):
        spent.spend(("p", name), until_ms=100, now_ms=0)
    with pytest.raises(Refusal) as caught:
        spent.spend(("p", "c"), until_ms=100, now_ms=50)
    assert caught.value.code == "too_many_transfers"
    with pytest.raises(Refusal, match="used before"):
        spent.spend(("p", "a"), until_ms=100, now_ms=50)
    spent.spend(("p", "c"), until_ms=200, now_ms=100)
    assert len(spent) == 1


# ---- identity -------------------------------------------------------------------------------------------------


def test_the_incarnation_is_the_one_a_brokers_scrape_derives():
    started_s = prometheus_client.REGISTRY.get_sample_value("process_start_time_seconds")
    assert process_incarnation() == f"started-{started_s:.2f}"


def test_where_nothing_tells_the_start_time_there_is_no_incarnation(tmp_path):
    assert process_incarnation(proc=tmp_path) == ""


def test_an_engine_describes_itself_from_vllms_own_objects(monkeypatch):
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_HOST", "10.0.0.7")
    monkeypatch.setenv("VLLM_NIXL_SIDE_CHANNEL_PORT", "5611")
    transfer = SimpleNamespace(
        kv_connector="NixlConnector",
        kv_role="kv_consumer",
        engine_id="d0-1234",
        kv_load_failure_policy="recompute",
        kv_connector_extra_config={"kv_lease_duration": 12},
    )
    state = SimpleNamespace(
        args=SimpleNamespace(served_model_name=["m"], enable_prompt_tokens_details=True),
        vllm_config=SimpleNamespace(
            kv_transfer_config=transfer,
            cache_config=SimpleNamespace(block_size=16, enable_prefix_caching=True),
            model_config=SimpleNamespace(model="/models/m", max_model_len=4096),
        ),
    )
    told = describe(state, settings("d0", tier="fast"), incarnation="life")
    assert told["role"] == "decoder"
    assert told["side_channel"] == {"host": "10.0.0.7", "port": 5611}
    assert (told["kv_engine_id"], told["kv_lease_duration_ms"]) == ("d0-1234", 12_000)
    assert (told["block_size_tokens"], told["max_model_len_tokens"], told["models"]) == (16, 4096, ["m"])


def test_another_server_describes_what_it_knows():
    told = describe(None, settings("d0", role="prefiller"), incarnation="")
    assert (told["engine_id"], told["role"], told["models"], told["connector"]) == ("d0", "prefiller", [], None)
    assert told["side_channel"] is None
