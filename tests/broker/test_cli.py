"""The broker's commands: what they print, and their exit codes."""

import json
import logging
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import httpx2
import pytest

from conserve_broker.cli import advise_main, broker_main, drain_main, engines_main, explain_main, undrain_main
from conserve_broker.logbook import LOGGER_NAME
from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_lab.emulator import EmulatedFleet, default_fleet


@pytest.fixture(scope="module")
def url() -> Iterator[str]:
    with EmulatedFleet(default_fleet(prefillers=1, decoders=1, time_scale=0)) as fleet:
        tables = {
            "listen": {"port": 0},
            "placement": {"preset": "paper"},
            "scrape": {"interval_ms": 100},
            "engine": fleet.broker_engines(),
        }
        with BrokerServer(BrokerConfig.from_mapping(tables)) as server:
            server.wait_until_ready(engines=2, timeout_s=40)
            yield server.url


@pytest.fixture(autouse=True)
def no_broker_in_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CONSERVE_BROKER_URL", raising=False)


@pytest.fixture(autouse=True)
def logging_as_it_was() -> Iterator[None]:
    """`broker` logs to the standard error of its moment, which pytest closes after the test."""
    root, logger = logging.getLogger(), logging.getLogger(LOGGER_NAME)
    handlers, levels = root.handlers[:], (root.level, logger.level)
    yield
    root.handlers[:] = handlers
    root.setLevel(levels[0])
    logger.setLevel(levels[1])


def grant(url: str) -> str:
    body = {"conversation_id": "[c]", "lineage": "main", "model": "emulated", "first_turn_input_tokens": 4_000}
    return str(httpx2.post(f"{url}/v1/leases", json=body).json()["lease_id"])


def test_explain_prints_the_receipt(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    lease_id = grant(url)
    assert explain_main([lease_id, "--broker", url]) == 0
    printed = capsys.readouterr().out
    for expected in (lease_id, "[c] / main (emulated)", "migrate", "p0", "d0 (ready)", "most_free_kv", "4,000 tokens"):
        assert expected in printed
    assert explain_main([lease_id, "--broker", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["decision"]["preset"] == "paper"


def test_advice_is_printed(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    grant(url)
    assert advise_main(["--broker", url]) == 0
    printed = capsys.readouterr().out
    for expected in ("model emulated", "advice", "in force", "prefillers", "too little was seen", "- Only 1 grants"):
        assert expected in printed
    assert advise_main(["--broker", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["models"][0]["model"] == "emulated"


def test_engines_are_listed_drained_and_undrained(
    url: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    assert engines_main(["list", "--broker", url]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:4] == ["engine", "role", "state", "model"]
    assert [line.split()[:4] for line in lines[1:3]] == [
        ["d0", "decoder", "ready", "emulated"],
        ["p0", "prefiller", "ready", "emulated"],
    ]
    monkeypatch.setenv("CONSERVE_BROKER_URL", url)
    assert engines_main(["drain", "d0"]) == 0
    printed = capsys.readouterr().out
    assert "draining" in printed
    assert "d0: asked to drain" in printed
    assert engines_main(["undrain", "d0", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "ready"
    assert engines_main(["--json"]) == 0
    assert len(json.loads(capsys.readouterr().out)["engines"]) == 2


def test_a_drain_can_be_waited_for(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    body = {"conversation_id": "drained", "lineage": "main", "model": "emulated", "first_turn_input_tokens": 100}
    assert httpx2.post(f"{url}/v1/leases", json=body).is_success
    ends: list[int] = []
    waiting = threading.Thread(target=lambda: ends.append(drain_main(["d0", "--wait", "--broker", url])))
    waiting.start()
    deadline = time.monotonic() + 40
    printed = ""
    while "left" not in printed:
        assert time.monotonic() < deadline
        printed += capsys.readouterr().out
        time.sleep(0.02)
    assert ends == [], "it waits"
    # "[c]" may hold a lease from another test; asking for a live one finds it, even on an engine that drains.
    for conversation in ("[c]", "drained"):
        found = httpx2.post(f"{url}/v1/leases", json={**body, "conversation_id": conversation}).json()
        if "token" in found:
            holder = {"authorization": f"Lease {found['token']}"}
            assert httpx2.delete(f"{url}/v1/leases/{found['lease_id']}", headers=holder).status_code == 204
    waiting.join(40)
    assert ends == [0]
    assert "draining" in capsys.readouterr().out
    assert undrain_main(["d0", "--broker", url, "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["state"] == "ready"
    assert drain_main(["d0", "--broker", url, "--wait", "--json"]) == 0
    assert json.loads(capsys.readouterr().out)["leases"] == 0
    assert undrain_main(["d0", "--broker", url]) == 0


def test_failures_are_one_line_that_says_what_to_do(url: str, capsys: pytest.CaptureFixture[str]) -> None:
    cases = [
        (explain_main(["lease-x", "--broker", url]), "ask for a new one (lease_unknown)"),
        (engines_main(["drain", "nobody", "--broker", url]), "engines: d0, p0 (engine_unknown)"),
        (engines_main(["list", "--broker", "http://127.0.0.1:9"]), "start it, or correct --broker"),
        (engines_main(["list", "--broker", "no url"]), "start it, or correct --broker"),
    ]
    lines = capsys.readouterr().err.splitlines()
    assert [code for code, _ in cases] == [1] * len(cases)
    assert len(lines) == len(cases)
    for line, (_, expected) in zip(lines, cases, strict=True):
        assert line.startswith("error: ")
        assert expected in line


def test_what_is_no_broker_is_said_so(capsys: pytest.CaptureFixture[str]) -> None:
    with EmulatedFleet(default_fleet(prefillers=0, decoders=1, time_scale=0)) as fleet:
        assert engines_main(["list", "--broker", fleet.engines[0].url]) == 1
    assert "is no ConServe broker (status 404)" in capsys.readouterr().err


def test_wrong_usage_is_exit_code_2(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert broker_main([]) == 2
    assert "--config broker.toml" in capsys.readouterr().err
    assert broker_main(["--config", str(tmp_path / "none.toml")]) == 2
    assert "none.toml: cannot be read" in capsys.readouterr().err
    assert broker_main(["--log-level", "loud"]) == 2
    assert "choose one of debug" in capsys.readouterr().err
    assert explain_main([]) == 2
    assert engines_main(["paint"]) == 2


def test_a_broker_that_cannot_use_its_journal_says_so(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "journal.db").write_bytes(b"this is no journal" * 100)
    config = tmp_path / "broker.toml"
    engine = "id = 'd0'\nurl = 'http://127.0.0.1:9'\nrole = 'decoder'\nmodel = 'm'\nconnector = 'none'\n"
    config.write_text(f"[listen]\nport = 7070\n[journal]\npath = 'journal.db'\n[[engine]]\n{engine}")
    assert broker_main(["--config", str(config), "--host", "127.0.0.1", "--port", "0"]) == 1
    assert "error: journal" in capsys.readouterr().err


def test_check_config_reports(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    config = tmp_path / "broker.toml"
    config.write_text("[listen]\nprot = 1\n")
    assert broker_main(["check-config", str(config)]) == 2
    assert "prot" in capsys.readouterr().out


def test_help_lists_the_commands(capsys: pytest.CaptureFixture[str]) -> None:
    assert broker_main(["--help"]) == 0
    assert "check-config" in capsys.readouterr().out
    assert engines_main(["--help"]) == 0
    assert "undrain" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("main", "arguments", "said"),
    [
        (drain_main, [], "conserve drain: Missing argument 'engine'; `conserve drain --help` tells more"),
        (
            engines_main,
            ["--wait"],
            "conserve engines: No such option: --wait; `conserve engines --help` tells more",
        ),
        (engines_main, ["remove"], "conserve engines: No such command 'remove'; `conserve engines --help` tells more"),
    ],
    ids=["argument", "option", "command"],
)
def test_a_mistake_in_the_usage_is_one_line(
    main: Callable[[Sequence[str]], int], arguments: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert main(arguments) == 2
    assert capsys.readouterr().err == f"{said}\n"
