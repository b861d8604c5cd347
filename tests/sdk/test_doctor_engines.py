"""`conserve doctor URL...` on emulated engines that really transfer, some of them wrong in one way each."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable

import httpx2
import pytest

from conserve_lab.emulator import EmulatedFleet, default_fleet, fleet_of
from conserve_sdk.doctor import _command, main
from conserve_sdk.doctor._engine import RestSample, check_rest
from conserve_sdk.doctor._page import MetricsPage
from conserve_sdk.doctor._processes import cpu_seconds_behind

Change = Callable[[httpx2.Response], httpx2.Response]

GUARD = {
    "role": "decoder",
    "connector": "NixlConnector",
    "engine_id": "d0",
    "block_size_tokens": 16,
    "kv_load_failure_policy": "recompute",
    "kv_lease_duration_ms": 30_000,
}


class Meddling(httpx2.BaseTransport):
    """The way to the engines, with a hand in some of their answers. Notes every request."""

    def __init__(self) -> None:
        self.changes: dict[tuple[str, str], Change] = {}
        self.requests: list[httpx2.Request] = []
        self._inner = httpx2.HTTPTransport()

    def change(self, url: str, path: str, change: Change) -> None:
        self.changes[url, path] = change

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        request.read()
        self.requests.append(request)
        answer = self._inner.handle_request(request)
        answer.read()
        change = self.changes.get((f"http://{request.url.netloc.decode()}", request.url.path))
        return change(answer) if change else answer

    def close(self) -> None:
        self._inner.close()


@pytest.fixture(autouse=True)
def no_broker_in_the_environment(monkeypatch) -> None:
    for name in ("CONSERVE_BROKER_URL", "CONSERVE_BROKER_API_KEY", "CONSERVE_ENGINE_KEY"):
        monkeypatch.delenv(name, raising=False)


@pytest.fixture(autouse=True)
def engines_in_this_process_are_elsewhere(monkeypatch) -> None:
    """What the emulated engines burn is the tests' own CPU time, and says nothing about an engine at rest."""
    monkeypatch.setattr(_command, "cpu_seconds_behind", lambda port: None)


@pytest.fixture(scope="module")
def fleet():
    with EmulatedFleet(default_fleet(prefillers=1, decoders=2, time_scale=0)) as fleet:
        yield fleet


@pytest.fixture
def urls(fleet) -> dict[str, str]:
    return {engine.id: engine.url for engine in fleet.engines}


@pytest.fixture
def network():
    network = Meddling()
    yield network
    network.close()


class Report:
    def __init__(self, code, text) -> None:
        self.code = code
        self.findings = json.loads(text)["findings"]

    def of(self, check) -> list[dict]:
        return [finding for finding in self.findings if finding["check"] == check]

    def verdicts(self, check) -> list[str]:
        return [finding["verdict"] for finding in self.of(check)]

    @property
    def failed(self) -> dict:
        """The one thing that is wrong."""
        (failed,) = (finding for finding in self.findings if finding["verdict"] == "fail")
        return failed


@pytest.fixture
def examine(capsys, network):
    def run(*argv: str) -> Report:
        code = main([*argv, "--json"], transport=network, sleep=lambda s: time.sleep(min(s, 0.01)))
        return Report(code, capsys.readouterr().out)

    return run


def page_with(old: str, new: str) -> Change:
    return lambda answer: httpx2.Response(200, text=answer.text.replace(old, new))


def json_with(**changes) -> Change:
    return lambda answer: httpx2.Response(answer.status_code, json=answer.json() | changes)


def guard(**changes) -> Change:
    return lambda _: httpx2.Response(200, json=GUARD | changes)


# ---- a healthy fleet ------------------------------------------------------------------------------------------


def test_named_roles(urls, examine, network) -> None:
    report = examine(f"prefiller={urls['p0']}/v1/", f"decoder={urls['d0']}", f"decoder={urls['d1']}")
    assert report.code == 0
    assert report.verdicts("transfer") == report.verdicts("transfer_answer") == ["ok", "ok"]
    assert report.verdicts("cached_tokens") == ["ok", "ok"]
    assert report.verdicts("same_block_size") == ["ok"]
    assert report.verdicts("role") == ["note"] * 3
    bodies = [json.loads(request.content) for request in network.requests if request.method == "POST"]
    pulls = [body["kv_transfer_params"] for body in bodies if "kv_transfer_params" in body]
    assert [params.get("do_remote_prefill") for params in pulls] == [False, True] * 2
    assert all(
        params["prompt_token_ids"] for params in pulls[1::2]
    )  # as the SDK sends them: what was prefilled, exactly


def test_without_roles_the_first_is_the_prefiller(urls, examine) -> None:
    report = examine(urls["d0"], urls["p0"])
    assert report.code == 0
    (moved,) = report.of("transfer")
    assert moved["subject"] == f"transfer {urls['d0'].removeprefix('http://')} to {urls['p0'].removeprefix('http://')}"
    assert moved["detail"].split(",")[0].endswith("tokens came over")


def test_looking_only(urls, examine, network) -> None:
    report = examine(urls["p0"], urls["d0"], "--no-requests")
    assert report.code == 0
    assert {request.method for request in network.requests} == {"GET"}
    assert not report.of("transfer")


def test_one_engine_alone_has_nobody_to_move_to(urls, examine) -> None:
    report = examine(f"decoder={urls['d0']}")
    assert report.code == 0
    assert not report.of("transfer")
    assert report.verdicts("cached_tokens") == ["ok"]


@pytest.mark.parametrize("word", ["nowhere", "master=http://a:1", "ftp://a", "http://host:port"])
def test_wrong_usage(word, capsys) -> None:
    with pytest.raises(SystemExit) as ended:
        main([word])
    assert ended.value.code == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith(f"conserve doctor: {word!r} is no engine: give http://HOST:PORT")


def test_lines_for_people(urls, network, capsys) -> None:
    assert main([urls["d0"], "--no-requests"], transport=network, sleep=lambda _: None) == 0
    lines = capsys.readouterr().out.splitlines()
    assert f"ok    engine {urls['d0'].removeprefix('http://')}: answers at {urls['d0']}" in lines


# ---- one thing wrong ------------------------------------------------------------------------------------------


def test_nobody_there(examine) -> None:
    report = examine("http://127.0.0.1:9")
    assert (report.code, report.failed["check"]) == (1, "reachable")


@pytest.mark.parametrize(
    ("path", "answer", "told"),
    [
        ("/metrics", httpx2.Response(200, text="up 1"), "is this a vLLM server"),
        ("/v1/models", httpx2.Response(200, json={"data": []}), "is this the address of an OpenAI server"),
        ("/v1/models", httpx2.Response(200, text="<html>"), "is this the address of an OpenAI server"),
        ("/v1/models", httpx2.Response(401), "--engine-key"),
    ],
)
def test_something_else_there(urls, examine, network, path, answer, told) -> None:
    network.change(urls["d0"], path, lambda _: answer)
    report = examine(urls["d0"])
    assert (report.code, report.failed["check"]) == (1, "reachable")
    assert told in report.failed["fix"]


def test_the_engines_key_is_sent(urls, examine, network) -> None:
    examine(urls["d0"], "--engine-key", "sesame")
    assert {request.headers["authorization"] for request in network.requests} == {"Bearer sesame"}


@pytest.mark.parametrize(
    ("path", "change", "check", "fix"),
    [
        ("/version", json_with(version="0.10.2"), "version", "upgrade"),
        (
            "/metrics",
            page_with('enable_prefix_caching="True"', 'enable_prefix_caching="False"'),
            "prefix_caching",
            "start",
        ),
        ("/metrics", page_with("vllm:nixl_", "vllm:other_"), "connector", '"kv_role":"kv_consumer"'),
        ("/conserve/engine", guard(role="prefiller"), "role", "kv_role"),
        ("/conserve/engine", guard(kv_load_failure_policy="fail"), "kv_load_failure_policy", "recompute"),
        ("/v1/chat/completions", lambda _: httpx2.Response(400, text="no chat template"), "cached_tokens", "template"),
        ("/v1/chat/completions", lambda _: httpx2.Response(401), "cached_tokens", "--engine-key"),
        (
            "/v1/chat/completions",
            json_with(usage={"prompt_tokens": 80}),
            "cached_tokens",
            "--enable-prompt-tokens-details",
        ),
        (
            "/v1/chat/completions",
            json_with(usage={"prompt_tokens": 80, "prompt_tokens_details": {"cached_tokens": 0}}),
            *("cached_tokens", "is prefix caching on"),
        ),
    ],
)
def test_one_thing_wrong_with_a_decoder(urls, examine, network, path, change, check, fix) -> None:
    network.change(urls["d0"], path, change)
    report = examine(f"decoder={urls['d0']}")
    assert (report.code, report.failed["check"]) == (1, check)
    assert fix in report.failed["fix"]


def test_a_guard_tells_what_vllm_does_not(urls, examine, network) -> None:
    network.change(urls["d0"], "/conserve/engine", guard())
    report = examine(f"decoder={urls['d0']}")
    assert report.code == 0
    for check in ("role", "connector", "kv_load_failure_policy", "kv_lease_duration", "guard"):
        assert report.verdicts(check) == ["ok"], report.of(check)
    assert report.of("connector")[0]["detail"] == "KV connector: NixlConnector"


def test_a_short_lease_matters_on_prefillers(urls, examine, network) -> None:
    network.change(urls["p0"], "/conserve/engine", guard(role="prefiller", kv_lease_duration_ms=10_000))
    report = examine(urls["p0"], "--no-requests")
    assert (report.code, report.failed["check"]) == (1, "kv_lease_duration")
    network.change(urls["p0"], "/conserve/engine", guard(kv_lease_duration_ms="long"))
    assert examine(urls["p0"], "--no-requests").verdicts("kv_lease_duration") == ["note"]


@pytest.mark.parametrize(
    ("path", "change", "check"),
    [
        ("/version", json_with(version="0.31.0"), "same_version"),
        ("/metrics", page_with('block_size="16"', 'block_size="32"'), "same_block_size"),
        ("/v1/models", json_with(data=[{"id": "emulated", "root": "/another/path"}]), "same_model"),
    ],
)
def test_engines_that_differ_are_not_made_to_move_kv(urls, examine, network, path, change, check) -> None:
    network.change(urls["d0"], path, change)
    report = examine(f"prefiller={urls['p0']}", f"decoder={urls['d0']}")
    assert (report.code, report.failed["check"]) == (1, check)
    assert report.verdicts("transfer") == ["note"]
    assert all(b"kv_transfer_params" not in request.content for request in network.requests)


def test_what_is_not_told_is_no_failure(urls, examine, network) -> None:
    network.change(urls["d0"], "/version", lambda _: httpx2.Response(404))
    network.change(urls["d0"], "/metrics", page_with("vllm:cache_config_info", "vllm:something"))
    report = examine(f"decoder={urls['d0']}", urls["p0"])
    assert report.code == 0
    assert report.verdicts("version") == ["note", "ok"]
    assert report.verdicts("prefix_caching") == ["note", "ok"]
    assert report.verdicts("same_version") == report.verdicts("same_block_size") == ["note"]


# ---- transfers that fail --------------------------------------------------------------------------------------


def from_another_life(answer: httpx2.Response) -> httpx2.Response:
    data = answer.json()
    params = data.get("kv_transfer_params")
    if params:
        data["kv_transfer_params"] = params | {"remote_engine_id": "another-engine"}
    return httpx2.Response(200, json=data)


@pytest.mark.parametrize(
    ("policy", "told"),
    [("recompute", "the transfer failed, and the decoder computed the prompt itself"), ("fail", "HTTP 500")],
)
def test_a_decoder_that_cannot_pull(examine, network, policy, told) -> None:
    config = default_fleet(prefillers=1, decoders=1, time_scale=0, kv_load_failure_policy=policy)
    with EmulatedFleet(config) as fleet:
        prefiller, decoder = fleet.engine("p0").url, fleet.engine("d0").url
        network.change(prefiller, "/v1/chat/completions", from_another_life)
        report = examine(f"prefiller={prefiller}", f"decoder={decoder}")
    assert (report.code, report.failed["check"]) == (1, "transfer")
    assert told in report.failed["detail"]


def test_engines_without_a_connector(examine, network) -> None:
    config = fleet_of(
        [
            {"id": "p0", "role": "prefiller"},
            {"id": "d0", "role": "decoder", "connector": "none"},
            {"id": "p1", "role": "prefiller", "connector": "none"},
        ],
        defaults={"time_scale": 0},
    )
    with EmulatedFleet(config) as fleet:
        urls = {engine.id: engine.url for engine in fleet.engines}
        deaf = examine(f"prefiller={urls['p0']}", f"decoder={urls['d0']}")
        mute = examine(f"prefiller={urls['p1']}", f"decoder={urls['d0']}")
    # The emulated page has NIXL's series either way, so only the transfer itself shows it.
    assert (deaf.code, deaf.failed["check"]) == (1, "transfer")
    assert "no KV came over" in deaf.failed["detail"]
    assert "kv_consumer" in deaf.failed["fix"]
    assert (mute.code, mute.failed["check"]) == (1, "transfer")
    assert "gave no KV away" in mute.failed["detail"]


def test_wrong_text_after_a_transfer(urls, examine, network) -> None:
    def garbled(answer: httpx2.Response) -> httpx2.Response:
        pulled = b"do_remote_prefill" in network.requests[-1].content
        return json_with(choices=[{"message": {"content": "?"}}])(answer) if pulled else answer

    network.change(urls["d0"], "/v1/chat/completions", garbled)
    report = examine(f"prefiller={urls['p0']}", f"decoder={urls['d0']}")
    assert (report.code, report.failed["check"]) == (1, "transfer_answer")


def test_a_guard_that_refuses_is_not_to_blame(urls, examine, network) -> None:
    def refuse(answer: httpx2.Response) -> httpx2.Response:
        return httpx2.Response(403) if b"kv_transfer_params" in network.requests[-1].content else answer

    network.change(urls["p0"], "/v1/chat/completions", refuse)
    report = examine(f"prefiller={urls['p0']}", f"decoder={urls['d0']}")
    assert (report.code, report.verdicts("transfer")) == (0, ["note"])


def test_a_comparison_that_cannot_be_made(urls, examine, network) -> None:
    def refuse(answer: httpx2.Response) -> httpx2.Response:
        return httpx2.Response(400) if b"cache_salt" in network.requests[-1].content else answer

    network.change(urls["d0"], "/v1/chat/completions", refuse)
    report = examine(f"prefiller={urls['p0']}", f"decoder={urls['d0']}")
    assert (report.code, report.verdicts("transfer_answer")) == (0, ["note"])


# ---- CPU at rest ----------------------------------------------------------------------------------------------


def at(at_s: float, *, cpu_s: float | None = None, tree_s: float | None = None, running: int = 0) -> RestSample:
    cpu = "" if cpu_s is None else f"process_cpu_seconds_total {cpu_s}\n"
    page = MetricsPage(f"{cpu}vllm:num_requests_running {running}\nvllm:kv_cache_usage_perc 0\n")
    return RestSample(page=page, at_s=at_s, tree_s=tree_s)


@pytest.mark.parametrize(
    ("first", "later", "verdict", "told"),
    [
        (at(0, cpu_s=10), at(2, cpu_s=10.1), "ok", "its API server takes 0.05 cores at rest (its engine core shows"),
        (at(0, cpu_s=10), at(2, cpu_s=11.9), "fail", "its API server takes 0.95 cores at rest"),
        (at(0, cpu_s=1, tree_s=50), at(2, cpu_s=1, tree_s=52.2), "fail", "all its processes together take 1.10 cores"),
        (at(0, cpu_s=1, tree_s=50), at(2, cpu_s=3, tree_s=50), "ok", "all its processes together take 0.00 cores"),
        (at(0, cpu_s=10), at(2, cpu_s=11.9, running=1), "note", "not judged"),
        (at(0, cpu_s=10, running=1), at(2, cpu_s=11.9), "note", "not judged"),
        (at(0), at(2, cpu_s=1), "note", "not told"),
    ],
)
def test_cpu_at_rest(first, later, verdict, told) -> None:
    finding = check_rest("engine d0", first, later)
    assert finding.verdict == verdict
    assert told in finding.detail


SPINNER = """
import os, socket
server = socket.create_server(("127.0.0.1", 0))
print(server.getsockname()[1], flush=True)
if os.fork() == 0:  # the one that computes, as vLLM's engine core does
    server.close()
    while os.getppid() != 1:
        pass
    os._exit(0)
os.wait()
"""


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_cpu_time_of_a_server_on_this_machine_counts_its_children() -> None:
    with subprocess.Popen([sys.executable, "-c", SPINNER], stdout=subprocess.PIPE, text=True) as server:
        try:
            port = int(server.stdout.readline())
            before_s = cpu_seconds_behind(port)
            deadline_s = time.monotonic() + 60
            while cpu_seconds_behind(port) < before_s + 0.2:
                assert time.monotonic() < deadline_s, "a spinning child must show"
                time.sleep(0.05)
        finally:
            server.kill()
    assert cpu_seconds_behind(port) is None


def test_processes_of_others_are_not_told(tmp_path) -> None:
    assert cpu_seconds_behind(8000, proc=tmp_path) is None
    (tmp_path / "net").mkdir()
    line = " 0: 0100007F:1F40 00000000:0000 0A 00000000:00000000 00:00000000 00000000 0 0 4711 1"
    (tmp_path / "net" / "tcp").write_text(f"header\n{line}\n")
    assert cpu_seconds_behind(8000, proc=tmp_path) is None
    (tmp_path / "17" / "fd").mkdir(parents=True)
    (tmp_path / "17" / "stat").write_text("17 (vllm (api) 1) S 1 17 17 0 -1 0 0 0 0 0 300 100 0 0 20 0 9")
    (tmp_path / "17" / "fd" / "3").symlink_to("socket:[4711]")
    (tmp_path / "18").mkdir()
    (tmp_path / "18" / "stat").write_text("18 (core) R 17 17 17 0 -1 0 0 0 0 0 600 0 0 0 20 0 9")
    assert cpu_seconds_behind(8000, proc=tmp_path) == 1000 / os.sysconf("SC_CLK_TCK")
    assert cpu_seconds_behind(8001, proc=tmp_path) is None


def test_an_engine_that_goes_away_meanwhile(examine, network, urls) -> None:
    seen = []

    def once(answer: httpx2.Response) -> httpx2.Response:
        seen.append(answer)
        return answer if len(seen) < 2 else httpx2.Response(503)

    network.change(urls["d0"], "/metrics", once)
    report = examine(urls["d0"], "--no-requests")
    assert (report.code, report.failed["check"]) == (1, "cpu_at_rest")


def test_a_page_in_pieces() -> None:
    page = MetricsPage('# HELP x\nx{a="1",b="2"} 3\nx{a="2"} 4e0\ny NaN\nz broken\n')
    assert (page.total("x"), page.total("x", a="1"), page.total("x", a="3"), page.total("z")) == (7.0, 3.0, None, 0.0)
    assert page.labels("x") == {"a": "1", "b": "2"}
    assert page.labels("nothing") == {}
    assert page.has_prefix("y")
