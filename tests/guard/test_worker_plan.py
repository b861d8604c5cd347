"""What `conserve worker` makes of a command: shown by `--dry-run`, without starting anything."""

import json
import shlex

import pytest

from conserve_vllm.worker import worker_main
from conserve_vllm.worker.options import Clash, WorkerOptions
from conserve_vllm.worker.plan import make_plan

KEYS = "main=env:TOKEN_KEY"
VLLM = ("vllm", "serve", "/models/m", "--host", "10.0.0.7", "--port", "8100", "--served-model-name", "m")


def plan(*command, env=None, **options):
    given = WorkerOptions(**{"engine_id": "d0", "role": "decoder", "token_keys": KEYS, **options})
    return make_plan(given, command or VLLM, env or {}, life="abcd")


def flag(made, name):
    return made.argv[made.argv.index(name) + 1]


def transfer(made):
    return json.loads(flag(made, "--kv-transfer-config"))


def test_a_decoder_recomputes_holds_tells_its_cache_and_is_guarded():
    made = plan(hold_s=12)
    assert made.argv[: len(VLLM)] == VLLM
    assert transfer(made) == {
        "kv_connector": "NixlConnector",
        "kv_role": "kv_consumer",
        "engine_id": "d0-abcd",
        "kv_load_failure_policy": "recompute",
        "kv_connector_extra_config": {"kv_lease_duration": 12},
    }
    assert "--enable-prompt-tokens-details" in made.argv
    assert flag(made, "--middleware") == "conserve_vllm.LeaseGuard"
    assert made.env == {
        "VLLM_NIXL_SIDE_CHANNEL_HOST": "10.0.0.7",
        "VLLM_NIXL_SIDE_CHANNEL_PORT": "5600",
        "CONSERVE_GUARD_ENGINE_ID": "d0",
        "CONSERVE_GUARD_KEYS": KEYS,
        "CONSERVE_GUARD_ROLE": "decoder",
    }
    assert made.entry == {
        "url": "http://10.0.0.7:8100",
        "role": "decoder",
        "model": "m",
        "transfer_group": "nixl",
        "max_hold_ms": 12_000,
        "ttl_ms": 15_000,
    }


def test_a_prefiller_keeps_vllms_own_lease():
    made = plan(role="prefiller", engine_id="p0")
    assert transfer(made) == {"kv_connector": "NixlConnector", "kv_role": "kv_producer", "engine_id": "p0-abcd"}
    assert made.entry["max_hold_ms"] == 30_000


def test_options_reach_guard_side_channel_and_broker():
    made = plan(require_lease=True, tier="fast", side_channel_port=5611, side_channel_host="10.1.0.7", role="both")
    assert transfer(made)["kv_role"] == "kv_both"
    assert made.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "5611"
    assert made.env["VLLM_NIXL_SIDE_CHANNEL_HOST"] == "10.1.0.7"
    assert made.env["CONSERVE_GUARD_REQUIRE_LEASE"] == "1"
    assert made.env["CONSERVE_GUARD_TIER"] == made.entry["tier"] == "fast"


def test_the_environments_own_side_channel_wins():
    made = plan(env={"VLLM_NIXL_SIDE_CHANNEL_PORT": "7777"})
    assert made.env["VLLM_NIXL_SIDE_CHANNEL_PORT"] == "7777"


def test_the_quiet_connector_is_an_option():
    assert transfer(plan(quiet_nixl=True))["kv_connector_module_path"] == "conserve_vllm.quiet_nixl"
    assert "kv_connector_module_path" not in transfer(plan())


def test_leased_holds_are_an_option_of_engines_that_hold():
    found = transfer(plan(leased_holds=True, quiet_nixl=True, role="decoder", hold_s=12))
    assert found["kv_connector_module_path"] == "conserve_vllm.leased_nixl"
    assert found["kv_connector_extra_config"] == {"kv_lease_duration": 12, "conserve_quiet": True}
    prefiller = transfer(plan(leased_holds=True, quiet_nixl=True, role="prefiller"))
    assert prefiller["kv_connector_module_path"] == "conserve_vllm.quiet_nixl"


def test_a_host_tier_stands_beside_nixl_which_comes_first():
    made = plan(host_tier_gib=1.5, role="decoder", hold_s=12, leased_holds=True)
    found = transfer(made)
    nixl, tier = found["kv_connector_extra_config"]["connectors"]
    assert (found["kv_connector"], found["kv_role"]) == ("MultiConnector", "kv_consumer")
    assert found["kv_load_failure_policy"] == "recompute"
    assert (nixl["kv_connector"], nixl["kv_connector_module_path"]) == ("NixlConnector", "conserve_vllm.leased_nixl")
    assert (tier["kv_connector"], tier["kv_connector_extra_config"]) == (
        "OffloadingConnector",
        {"cpu_bytes_to_use": 3 << 29},
    )
    assert nixl["engine_id"] == found["engine_id"]
    assert made.entry["max_hold_ms"] == 12_000
    with pytest.raises(Clash, match="decoders, or role both"):
        plan(host_tier_gib=1.5, role="prefiller")


def test_what_the_command_says_wins_where_it_does_not_contradict():
    own = {"engine_id": "mine", "kv_connector_extra_config": {"kv_lease_duration": 7, "backends": ["UCX"]}}
    made = plan(*VLLM, f"--kv_transfer_config={json.dumps(own)}", "--no-enable-prompt-tokens-details")
    assert made.argv.count("--kv-transfer-config") == 1
    assert not any(word.startswith("--kv_transfer") for word in made.argv)
    assert transfer(made)["engine_id"] == "mine"
    assert transfer(made)["kv_connector_extra_config"] == {"kv_lease_duration": 7, "backends": ["UCX"]}
    assert made.entry["max_hold_ms"] == 7_000
    assert "--enable-prompt-tokens-details" not in made.argv
    assert "prompt token details" in made.notes[0]


def test_another_middleware_stays_and_ours_is_not_doubled():
    made = plan(*VLLM, "--middleware", "my.Other")
    assert made.argv.count("--middleware") == 2
    again = plan(*VLLM, "--middleware=conserve_vllm.LeaseGuard")
    assert "--middleware" not in again.argv


def test_without_the_guard_nothing_of_it_is_set_and_that_is_said():
    made = plan(guard=False, token_keys="")
    assert "--middleware" not in made.argv
    assert not any(name.startswith("CONSERVE_GUARD") for name in made.env)
    assert "any client" in made.notes[-1]


def test_the_model_may_come_by_flag_from_the_python_entry_point():
    command = (
        "python",
        "-m",
        "vllm.entrypoints.openai.api_server",
        "--model",
        "/m",
        "--host",
        "h",
        "--ssl-keyfile",
        "k",
    )
    made = plan(*command)
    assert (made.entry["model"], made.url) == ("/m", "https://h:8000")


def test_an_address_that_means_any_must_be_told():
    made = plan("vllm", "serve", "m", url="http://gpu-7:8000")
    assert (made.url, made.env["VLLM_NIXL_SIDE_CHANNEL_HOST"]) == ("http://gpu-7:8000", "gpu-7")
    assert plan("vllm", "serve", "m", "--host", "::1").url == "http://[::1]:8000"


def test_any_other_command_is_started_as_it_is():
    made = plan("conserve", "emulate", "--port", "1", url="http://127.0.0.1:1", model="emulated")
    assert made.argv == ("conserve", "emulate", "--port", "1")
    assert made.env["CONSERVE_GUARD_ENGINE_ID"] == "d0"
    assert made.entry["model"] == "emulated"


CLASHES = {
    "role": (("--kv-transfer-config", '{"kv_role": "kv_producer"}'), {}, "kv_role='kv_producer'.*'kv_consumer'"),
    "push": (("--kv-transfer-config", '{"kv_connector": "NixlPushConnector"}'), {}, "NixlPushConnector"),
    "json": (("--kv-transfer-config", "kv_both"), {}, "must be a JSON object"),
    "cut": (("--kv-transfer-config", "[1]"), {}, "must be a JSON object"),
    "dotted": (("--kv-transfer-config.kv_role", "kv_both"), {}, "as one JSON object"),
    "servers": (("--api-server-count", "4"), {}, "--api-server-count 4 and the guard"),
    "no cache": (("--no-enable-prefix-caching",), {}, "--no-enable-prefix-caching on a decoder"),
    "no keys": ((), {"token_keys": ""}, "--token-keys kid=file"),
    "environment": ((), {"env": {"CONSERVE_GUARD_ENGINE_ID": "d9"}}, "CONSERVE_GUARD_ENGINE_ID='d9'"),
}


@pytest.mark.parametrize(("extra", "options", "text"), CLASHES.values(), ids=CLASHES)
def test_contradictions_are_explained(extra, options, text):
    with pytest.raises(Clash, match=text):
        plan(*VLLM, *extra, **options)


@pytest.mark.parametrize(
    ("command", "text"),
    [
        (("vllm", "serve", "m"), "give --url"),
        (("vllm", "serve", "m", "--host", "0.0.0.0"), "give --url"),
        (("vllm", "serve", "--host", "h"), "names no model"),
        (("sleep", "1"), "is not vLLM, so --url and --model"),
    ],
)
def test_what_is_missing_is_asked_for(command, text):
    with pytest.raises(Clash, match=text):
        plan(*command)


def test_dry_run_shows_a_script_and_starts_nothing(capsys, monkeypatch):
    monkeypatch.setenv("CONSERVE_GUARD_KEYS", KEYS)
    done = worker_main(["--id", "d0", "--role", "decoder", "--no-guard", "--dry-run", "--", *VLLM])
    lines = capsys.readouterr().out.splitlines()
    assert done == 0
    assert lines[0].startswith("# without the guard")
    assert shlex.split(lines[-2])[:3] == ["vllm", "serve", "/models/m"]
    assert "registers as" in lines[-1]


@pytest.mark.parametrize(
    ("arguments", "text"),
    [
        (["--id", "d0", "--role", "decoder"], "nothing to run"),
        (["--id", "d0", "--role", "decoder", "--worker-key-file", "/nowhere", "--", "vllm"], "cannot read /nowhere"),
        (
            ["--id", "d0", "--role", "decoder", "--no-guard", "--url", "http://x", "--model", "m", "--", "/no/such"],
            "cannot start",
        ),
    ],
)
def test_wrong_usage_is_one_line_and_exit_code_2(arguments, text, capsys):
    assert worker_main(arguments) == 2
    assert text in capsys.readouterr().err
