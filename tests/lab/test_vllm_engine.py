"""What each kind of server is told."""

import json

import pytest

from conserve_lab.vllm._engine import EngineSpec, engine_argv, engine_env


def spec(role, *, side_channel_port=5601):
    return EngineSpec(
        engine_id="e0",
        role=role,
        port=5600,
        side_channel_port=side_channel_port,
        model_path="/models/tiny",
        max_model_tokens=4096,
        kv_cache_bytes=8_388_608,
        max_sequences=16,
        hold_ms=12_000,
    )


def flag(argv, name):
    return argv[argv.index(name) + 1]


@pytest.mark.parametrize(
    ("role", "kv_role"), [("prefiller", "kv_producer"), ("decoder", "kv_consumer"), ("both", "kv_both")]
)
def test_the_role_becomes_the_connectors_role(role, kv_role):
    config = json.loads(flag(engine_argv(spec(role)), "--kv-transfer-config"))
    assert config["kv_role"] == kv_role
    assert (config["kv_connector"], config["kv_connector_module_path"]) == ("NixlConnector", "conserve_vllm.quiet_nixl")


@pytest.mark.parametrize("role", ["decoder", "both"])
def test_who_decodes_recomputes_after_a_failed_transfer_and_holds(role):
    config = json.loads(flag(engine_argv(spec(role)), "--kv-transfer-config"))
    assert config["kv_load_failure_policy"] == "recompute"
    assert config["kv_connector_extra_config"] == {"kv_lease_duration": 12}


def test_a_prefiller_keeps_vllms_own_lease():
    config = json.loads(flag(engine_argv(spec("prefiller")), "--kv-transfer-config"))
    assert config.keys() == {"kv_connector", "kv_connector_module_path", "kv_role"}


def test_an_engine_without_a_side_channel_has_no_connector():
    plain = spec("both", side_channel_port=None)
    assert "--kv-transfer-config" not in engine_argv(plain)
    assert engine_env(plain) == {}


def test_everything_stays_on_loopback():
    argv, env = engine_argv(spec("decoder")), engine_env(spec("decoder"))
    assert (flag(argv, "--host"), flag(argv, "--port")) == ("127.0.0.1", "5600")
    assert env == {"VLLM_NIXL_SIDE_CHANNEL_HOST": "127.0.0.1", "VLLM_NIXL_SIDE_CHANNEL_PORT": "5601"}


def test_sizes_and_precision_are_passed_on():
    argv = engine_argv(spec("decoder"))
    sizes = ["--max-model-len", "--kv-cache-memory-bytes", "--max-num-seqs", "--block-size", "--dtype"]
    assert [flag(argv, name) for name in sizes] == ["4096", "8388608", "16", "32", "float32"]
    assert json.loads(flag(argv, "--structured-outputs-config"))["disable_any_whitespace"] is True
