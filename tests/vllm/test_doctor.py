"""`conserve doctor` on real vLLM: what a healthy fleet looks like, and that looking at it hurts nothing."""

import json

from conserve_lab.vllm import find_venv
from conserve_lab.vllm.install import installed_version
from conserve_lab.vllm.pins import NEWEST
from conserve_sdk.doctor import main


def checks(capsys, *argv) -> tuple[int, dict[str, list[dict]]]:
    code = main([*argv, "--json"])
    found: dict[str, list[dict]] = {}
    for finding in json.loads(capsys.readouterr().out)["findings"]:
        found.setdefault(finding["check"], []).append(finding)
    return code, found


def verdicts(found, check) -> list[str]:
    return [finding["verdict"] for finding in found[check]]


def test_a_healthy_fleet_by_its_urls(fleet, raw, capsys, monkeypatch):
    monkeypatch.delenv("CONSERVE_BROKER_URL", raising=False)
    before = {engine_id: fleet.metrics(engine_id) for engine_id in ("p0", "d0", "d1")}
    argv = [f"{fleet.engines[engine_id].role}={fleet.engines[engine_id].url}" for engine_id in ("p0", "d0", "d1")]

    code, found = checks(capsys, *argv)

    assert code == 0, [finding for group in found.values() for finding in group if finding["verdict"] == "fail"]
    measured = "ok" if installed_version(find_venv()) == NEWEST else "note"
    assert set(verdicts(found, "version")) == {measured}, found["version"]
    for check in ("reachable", "connector", "prefix_caching"):
        assert set(verdicts(found, check)) == {"ok"}, found[check]
    for check in ("same_model", "same_version", "same_block_size"):
        assert verdicts(found, check) == ["ok"], found[check]
    assert verdicts(found, "cached_tokens") == ["ok", "ok"], found["cached_tokens"]
    assert verdicts(found, "transfer") == ["ok", "ok"], found["transfer"]
    assert verdicts(found, "transfer_answer") == ["ok", "ok"], found["transfer_answer"]
    assert set(verdicts(found, "cpu_at_rest")) <= {"ok", "note"}, found["cpu_at_rest"]
    assert all("cores at rest" in finding["detail"] for finding in found["cpu_at_rest"] if finding["verdict"] == "ok")
    for engine_id in ("d0", "d1"):
        moved = raw.settled(engine_id, lambda now, was=before[engine_id]: now.since(was).transfers >= 1)
        assert moved.since(before[engine_id]).transfers == 1
        assert moved.since(before[engine_id]).failed_transfers == 0
    assert all(fleet.is_alive(engine_id) for engine_id in fleet.engines)


def test_an_engine_without_a_connector_is_found_out(fleet, capsys, monkeypatch):
    monkeypatch.delenv("CONSERVE_BROKER_URL", raising=False)
    code, found = checks(capsys, f"prefiller={fleet.engines['p0'].url}", f"decoder={fleet.engines['a0'].url}")
    assert code == 1
    (finding,) = (finding for finding in found["connector"] if finding["verdict"] == "fail")
    assert '"kv_role":"kv_consumer"' in finding["fix"]
    assert verdicts(found, "transfer") == ["note"]
    assert all(fleet.is_alive(engine_id) for engine_id in fleet.engines)


def test_a_fleet_by_its_broker(stage, capsys):
    broker = stage.broker()
    code, found = checks(capsys, "--broker", broker.url)
    assert code == 0, [finding for group in found.values() for finding in group if finding["verdict"] == "fail"]
    assert verdicts(found, "broker") == verdicts(found, "leased_turn") == ["ok"]
    assert verdicts(found, "transfer") == ["ok", "ok"]
