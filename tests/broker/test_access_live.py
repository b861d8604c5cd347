"""Keys at a broker that really runs: SDK, commands and a worker with theirs, and where no secret may turn up."""

import json
import logging
import pickle
import sqlite3
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import httpx2
import openai
import pytest

from conserve_broker.api_keys import NewKey, new_key
from conserve_broker.cli import drain_main, engines_main, explain_main, undrain_main
from conserve_broker.server import BrokerServer
from conserve_broker.settings import load_config
from conserve_lab.emulator import EmulatedFleet, default_fleet
from conserve_sdk import AccessDenied, ConServe, conversation
from conserve_sdk.doctor import main as doctor_main
from conserve_vllm.worker.registration import Registration

BUDGET_S = 40.0
TOKEN_SECRET = "token-secret-" + "s" * 40
ENGINE_SECRET = "engine-secret-0123456789"
AGENT = new_key(tenant="red", scopes=("agent",), key_id="red-1")
OTHER = new_key(tenant="blue", scopes=("agent",), key_id="blue-1")
WORKER = new_key(tenant="gpu", scopes=("worker",), key_id="gpu-1")
ADMIN = new_key(tenant="ops", scopes=("admin",), key_id="ops-1")
KEYS = (AGENT, OTHER, WORKER, ADMIN)


class House:
    """A broker of its own configuration file, over an emulated fleet."""

    def __init__(self, folder: Path, fleet: EmulatedFleet) -> None:
        self.folder = folder
        self.path = folder / "broker.toml"
        self.journal = folder / "leases.db"
        self.fleet = fleet
        self.write(*KEYS)
        self.server = BrokerServer(load_config(self.path), config_path=self.path)

    def write(self, *keys: NewKey) -> None:
        engines = "".join(
            "[[engine]]\n"
            + "".join(f"{name} = {json.dumps(value)}\n" for name, value in engine.items())
            + "api_key_env = 'CONSERVE_TEST_ENGINE_KEY'\n"
            for engine in self.fleet.broker_engines()
        )
        self.path.write_text(
            "[listen]\nport = 0\n[scrape]\ninterval_ms = 100\n[journal]\npath = 'leases.db'\n"
            f"[[token.keys]]\nkid = 'main'\nsecret = '{TOKEN_SECRET}'\n"
            "[registration]\nallow = ['127.0.0.0/8']\n"
            "[access]\nshare_engine_credentials = 'agent'\n" + "".join(key.toml() + "\n" for key in keys) + engines
        )


@pytest.fixture(scope="module")
def fleet() -> Iterator[EmulatedFleet]:
    with EmulatedFleet(default_fleet(prefillers=1, decoders=2, time_scale=0)) as running:
        yield running


@pytest.fixture
def house(fleet: EmulatedFleet, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[House]:
    for name in ("URL", "API_KEY", "API_KEY_FILE"):
        monkeypatch.delenv(f"CONSERVE_BROKER_{name}", raising=False)
    monkeypatch.setenv("CONSERVE_TEST_ENGINE_KEY", ENGINE_SECRET)
    made = House(tmp_path, fleet)
    with made.server:
        made.server.wait_until_ready(engines=3, timeout_s=BUDGET_S)
        yield made


def until(condition: Callable[[], bool]) -> None:
    deadline = time.monotonic() + BUDGET_S
    while not condition():
        assert time.monotonic() < deadline, "the condition never came true"
        time.sleep(0.02)


def turn(conserve: ConServe, name: str = "c") -> str:
    client = conserve.openai_client(max_retries=0)
    with conversation(name):
        answer = client.chat.completions.with_raw_response.create(
            model="emulated", messages=[{"role": "user", "content": "hello " * 500}], max_tokens=4
        )
    return answer.headers["x-conserve-lease"]


def bearer(key: NewKey) -> dict[str, str]:
    return {"authorization": f"Bearer {key.text}"}


def test_a_conversation_with_a_key_and_none_without(house: House) -> None:
    with ConServe(house.server.url, broker_api_key=AGENT.text) as conserve:
        assert turn(conserve)
        assert conserve.release("c") == 1
    with ConServe(house.server.url) as nobody, pytest.raises(AccessDenied) as missing:
        turn(nobody)
    assert missing.value.code == "key_missing"
    with ConServe(house.server.url, broker_api_key=WORKER.text) as worker, pytest.raises(openai.OpenAIError) as wrong:
        turn(worker)
    assert isinstance(wrong.value, AccessDenied)
    assert wrong.value.code == "scope_missing"


def test_a_rotation_in_the_file_interrupts_no_conversation(house: House) -> None:
    new = new_key(tenant="red", scopes=("agent",), key_id="red-2")
    with ConServe(house.server.url, broker_api_key=AGENT.text) as conserve:
        first = turn(conserve)
        house.write(*KEYS, new)
        with ConServe(house.server.url, broker_api_key=new.text) as renewed:
            until(lambda: _works(renewed))
            assert turn(conserve) == first, "the old key is good beside the new one"
            house.write(OTHER, WORKER, ADMIN, new)
            until(lambda: not _knows(house, AGENT))
            assert turn(conserve) == first, "a conversation that has its lease needs the broker no more"
            assert turn(renewed, "c") == first, "the lease is the tenant's, not the key's"


def _works(conserve: ConServe) -> bool:
    try:
        return bool(turn(conserve, "probe"))
    except AccessDenied:
        return False


def _knows(house: House, key: NewKey) -> bool:
    return httpx2.get(f"{house.server.url}/v1/fleet", headers=bearer(key)).status_code == 200


def test_commands_show_their_key_and_say_what_is_missing(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("CONSERVE_BROKER_URL", house.server.url)
    assert engines_main(["list"]) == 1
    assert "(key_missing): set CONSERVE_BROKER_API_KEY" in capsys.readouterr().err
    monkeypatch.setenv("CONSERVE_BROKER_API_KEY", AGENT.text)
    assert engines_main(["list", "--json"]) == 0
    assert drain_main(["d0"]) == 1
    assert "this needs admin (scope_missing)" in capsys.readouterr().err
    with ConServe() as conserve:
        lease_id = turn(conserve, "explained")
    assert explain_main([lease_id]) == 0
    monkeypatch.setenv("CONSERVE_BROKER_API_KEY", OTHER.text)
    assert explain_main([lease_id]) == 1
    assert "lease_unknown" in capsys.readouterr().err
    monkeypatch.setenv("CONSERVE_BROKER_API_KEY", ADMIN.text)
    assert explain_main([lease_id]) == 0
    assert drain_main(["d0", "--json"]) == 0
    assert undrain_main(["d0", "--json"]) == 0


def test_doctor_names_a_key_that_is_missing_and_is_content_with_a_good_one(
    house: House, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    doctor_main(["--broker", house.server.url, "--no-requests"])
    assert "refuses this key (HTTP 401)" in capsys.readouterr().out
    monkeypatch.setenv("CONSERVE_BROKER_API_KEY", AGENT.text)
    doctor_main(["--broker", house.server.url, "--no-requests", "--json"])
    printed = capsys.readouterr().out
    checks = {finding["check"] for finding in json.loads(printed)["findings"] if finding["subject"] == "broker"}
    assert checks == {"broker"}, "nothing about an open broker"
    assert AGENT.text not in printed


def test_a_workers_key_registers_sees_its_leases_and_leaves(house: House) -> None:
    entry = {"url": "http://127.0.0.1:9", "role": "decoder", "model": "emulated", "connector": "none"}
    with_agents_key = Registration(house.server.url, engine_id="w0", worker_key=AGENT.text)
    assert with_agents_key.beat(entry) is False
    registration = Registration(house.server.url, engine_id="w0", worker_key=WORKER.text)
    assert registration.beat(entry) is True
    assert registration.leases() == 0
    assert registration.drain() is False, "operators drain"
    assert registration.leave() is True
    until(lambda: registration.leases() == 0)
    for each in (registration, with_agents_key):
        each.close()
    leases = httpx2.post(f"{house.server.url}/v1/leases", headers=bearer(WORKER), json={})
    assert leases.status_code == 403


def test_no_secret_turns_up_anywhere(
    house: House, caplog: pytest.LogCaptureFixture, capsys: pytest.CaptureFixture[str]
) -> None:
    """Logs at DEBUG, problem bodies, metrics, receipts, reprs, pickles, errors, the journal's files."""
    url, told = house.server.url, []
    with caplog.at_level(logging.DEBUG), ConServe(url, broker_api_key=AGENT.text) as conserve:
        lease_id = turn(conserve)
        told += [
            repr(conserve),
            repr(conserve._runtime.settings),
            repr(pickle.dumps(conserve)),
            repr(conserve.stats("c")),
        ]
        for headers in (bearer(AGENT), bearer(OTHER), bearer(ADMIN), {"authorization": f"Bearer {AGENT.text}x"}, {}):
            for method, path in (
                ("GET", f"/v1/leases/{lease_id}/explain"),
                ("GET", f"/v1/leases/{lease_id}"),
                ("GET", "/v1/engines"),
                ("GET", "/v1/fleet"),
                ("POST", "/v1/engines/nobody/drain"),
                ("POST", "/v1/renewals"),
                ("GET", "/metrics"),
                ("GET", "/readyz"),
                ("GET", "/openapi.json"),
                ("GET", f"/nowhere/{lease_id}"),
            ):
                answer = httpx2.request(method, url + path, headers=headers)
                told.append(f"{answer.text} {dict(answer.headers)}")
        house.write(*KEYS[1:])
        until(lambda: not _knows(house, AGENT))
    with ConServe(url, broker_api_key=AGENT.text, on_broker_unavailable="raise") as denied:
        with pytest.raises(AccessDenied) as caught:
            turn(denied, "other")
        told += [repr(caught.value), str(caught.value), repr(pickle.dumps(caught.value)), repr(vars(caught.value))]
    live = [path.read_bytes() for path in house.folder.glob("leases.db*")]
    house.server.stop()  # it locks its file
    with sqlite3.connect(house.journal) as journal:
        rows = "".join(journal.iterdump())
    journal.close()
    assert lease_id in rows, "the journal was read"
    kept = [*live, house.journal.read_bytes()]
    told += [caplog.text, capsys.readouterr().out, capsys.readouterr().err, rows, *map(repr, kept)]
    told.append(json.dumps(load_config(house.path).printable()))
    secrets = [TOKEN_SECRET, ENGINE_SECRET, *(key.text.rpartition(".")[2] for key in KEYS)]
    assert len(told) > 60
    assert "access_denied" in caplog.text
    found = [(secret, text[:200]) for secret in secrets for text in told if secret in text]
    assert found == []
