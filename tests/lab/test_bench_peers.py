"""`conserve bench peers`, small: what every arm is given and what is told of it, not how fast anything is."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import pytest

from conserve_lab.bench import router
from conserve_lab.bench.peer_arms import ARMS, fleet_config
from conserve_lab.bench.peer_table import markdown_table
from conserve_lab.cli import bench_main
from conserve_lab.live import trial

SMALL = ["--repetitions", "1", "--conversations", "3", "--turns", "2", "--answer-tokens", "4", "--time-scale", "0"]

STAND_IN = """#!{python}
import http.client, http.server, json, sys
from urllib.parse import urlsplit

def option(name):
    return sys.argv[sys.argv.index(name) + 1]

ENGINE = urlsplit(option("--decode" if "--decode" in sys.argv else "--worker-urls")).netloc

class Router(http.server.BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer(200, b"")

    def do_POST(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        with open({log!r}, "a") as log:
            print(json.dumps([self.path, self.headers.get("X-Session-ID"), sys.argv[1:]]), file=log, flush=True)
        if self.path.startswith("/finish_session"):
            return self.answer(200, b"")
        engine = http.client.HTTPConnection(ENGINE)
        engine.request("POST", self.path, body, {{"Content-Type": "application/json"}})
        answer = engine.getresponse()
        self.answer(answer.status, answer.read())

    def answer(self, status, data):
        self.send_response(status)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def log_message(self, *_):
        pass

http.server.ThreadingHTTPServer((option("--host"), int(option("--port"))), Router).serve_forever()
"""


@pytest.fixture(autouse=True)
def _no_idling(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(trial, "IDLE_S", 0.01)


def test_without_an_index_the_peer_is_skipped_and_the_rest_measured(tmp_path, monkeypatch, capsys) -> None:
    def offline(*_args: object, **_kwargs: object) -> None:
        raise subprocess.CalledProcessError(1, "pip")

    monkeypatch.setattr(router.subprocess, "run", offline)
    files = ["--json", str(tmp_path / "peers.json"), "--markdown", str(tmp_path / "peers.md")]
    arms = ["--arm", "router-pd-hash", "--arm", "conserve-paper", "--cache", str(tmp_path)]
    assert bench_main(["peers", *SMALL, "--per-s", "50", *files, *arms]) == 0
    skipped, ours = json.loads((tmp_path / "peers.json").read_text())
    assert "could not be installed" in skipped["skipped"]
    assert ours["arm"] == "conserve-paper"
    assert ours["prefill_requests"] == ours["transfers"] == 3  # one for each conversation, not for each turn
    assert (ours["turns"], ours["failed_turns"]) == (6, 0)
    assert ours.keys() >= {"ttft_ms", "ttfet_ms", "tbt_ms", "transferred_tokens", "cpu_us_per_turn", "spread"}
    assert ours["cpu_us_per_turn"].keys() == {"driver", "broker"}
    assert ours["kill"]["given_up_conversations"] == 0
    assert ours["kill"].keys() >= {"failed_turns", "recovery_s", "slowest_ttft_ms"}
    assert "vllm-router skipped" in capsys.readouterr().out
    assert "router-pd-hash skipped: " in (tmp_path / "peers.md").read_text()


def test_the_router_gets_flags_sessions_and_their_ends(tmp_path) -> None:
    log = tmp_path / "router.log"
    binary = tmp_path / "vllm-router" / "bin" / "vllm-router"
    binary.parent.mkdir(parents=True)
    binary.write_text(STAND_IN.format(python=sys.executable, log=str(log)))
    binary.chmod(0o755)
    arms = ["--arm", "router-pd-sticky", "--arm", "conserve-paper", "--cache", str(tmp_path), "--no-kill"]
    target = tmp_path / "peers.json"
    assert bench_main(["peers", *SMALL, "--per-s", "50", *arms, "--json", str(target)]) == 0
    peer, ours = json.loads(target.read_text())
    assert peer["turns"] == ours["turns"] == 6
    assert peer["cpu_us_per_turn"].keys() == {"driver", "router"}
    assert "sdk_share" in ours["cpu_us_per_turn"]
    seen = [json.loads(line) for line in Path(log).read_text().splitlines()]
    asked = [session for path, session, _ in seen if path == "/v1/chat/completions" and session != "warm-up"]
    assert sorted(asked) == sorted(2 * [f"coding-0000{number}" for number in range(3)])
    ended = {path.rpartition("=")[2] for path, _, _ in seen if path.startswith("/finish_session")}
    assert ended == {*asked, "warm-up"}
    flags = seen[0][2]
    assert flags.count("--prefill") == 1
    assert flags.count("--decode") == 3
    assert flags[flags.index("--decode-policy") + 1] == "sticky_least_loaded"


def test_every_arm_has_as_many_engines() -> None:
    configs = [fleet_config(arm, prefillers=1, decoders=3, time_scale=0) for arm in ARMS]
    assert {len(config.engine) for config in configs} == {4}
    assert {
        engine.role
        for arm, config in zip(ARMS, configs, strict=True)
        if not arm.disaggregated
        for engine in config.engine
    } == {"both"}


def test_the_table_shows_spread_and_what_was_skipped() -> None:
    arm = {"arm": "a", "prefill_requests": 3, "spread": {"prefill_requests": {"min": 2, "max": 4}}}
    table = markdown_table([arm, {"arm": "b", "skipped": "no index"}])
    assert "| prefill requests | 3 [2 .. 4] | skipped |" in table
    assert "b skipped: no index" in table


def test_an_arm_that_is_none_is_a_usage_error(capsys) -> None:
    assert bench_main(["peers", "--arm", "nobody"]) == 2
    assert "no arm 'nobody'" in capsys.readouterr().err
