"""The engines' own API keys, and where a registered name may lead the broker."""

import asyncio
import json
import socket
import threading
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from ipaddress import ip_address, ip_network
from pathlib import Path
from typing import Any

import pytest

from conserve_broker._dial import AddressForbiddenError, AddressGuard
from conserve_broker._engine_http import Door
from conserve_broker.scrape import Scraper
from conserve_broker.settings import BrokerConfig, ConfigProblem, ScrapeTable, load_config
from conserve_sdk.core.events import EngineObserved, EngineSpec, EngineUnreachable
from conserve_sdk.core.units import EngineId, ModelName
from conserve_sdk.core.vocabulary import Role

from .conftest import VLLM_PAGE

SECRET = "engine-key-0123456789"
ENGINE = {"id": "d0", "url": "http://10.0.0.1:8000", "role": "decoder", "model": "m"}


class KeyedEngine:
    """Wants a key for `/v1/models`, as vLLM does; remembers what came with each request."""

    def __init__(self) -> None:
        self.seen: list[tuple[str, str, str]] = []
        self.moved_to = ""
        engine = self

        class Handler(BaseHTTPRequestHandler):
            def do_GET(self) -> None:
                key, host = self.headers.get("authorization", ""), self.headers.get("host", "")
                engine.seen.append((self.path, key, host))
                if engine.moved_to:
                    self.send_response(307)
                    self.send_header("location", engine.moved_to + self.path)
                    self.end_headers()
                    return
                models = json.dumps({"data": [{"id": "conserve-tiny", "max_model_len": 2048}]}).encode()
                body = {"/metrics": VLLM_PAGE, "/v1/models": models}.get(self.path, b"")
                refused = self.path.startswith("/v1/") and key != f"Bearer {SECRET}"
                self.send_response(401 if refused else 200)
                self.send_header("content-length", str(len(body)))
                self.end_headers()
                self.wfile.write(body)

            def log_message(self, *_: object) -> None:
                pass

        self._server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self._thread = threading.Thread(target=self._server.serve_forever, daemon=True)
        self._thread.start()
        self.port = self._server.server_port

    def close(self) -> None:
        self._server.shutdown()
        self._server.server_close()
        self._thread.join()


@pytest.fixture
def engines() -> Iterator[Callable[[], KeyedEngine]]:
    made: list[KeyedEngine] = []

    def make() -> KeyedEngine:
        made.append(KeyedEngine())
        return made[-1]

    yield make
    for engine in made:
        engine.close()


async def look(url: str, door: Door) -> EngineObserved | EngineUnreachable:
    seen: list[EngineObserved | EngineUnreachable] = []
    spec = EngineSpec(engine_id=EngineId("d0"), url=url, role=Role.DECODER, model=ModelName("conserve-tiny"))
    async with Scraper(ScrapeTable(), emit=seen.append, now_ms=lambda: 7, door_of=lambda _: door) as scraper:  # type: ignore[arg-type, return-value]
        scraper.configure([spec])
        await scraper.poll_once()
    return seen[0]


# ---- the broker's own requests ----------------------------------------------------------------------------------


async def test_the_scraper_shows_the_engines_key(engines: Callable[[], KeyedEngine]) -> None:
    engine = engines()
    url = f"http://127.0.0.1:{engine.port}"
    assert isinstance(await look(url, Door(SECRET)), EngineObserved)
    assert {key for _, key, _ in engine.seen} == {f"Bearer {SECRET}"}
    without = await look(url, Door())
    assert isinstance(without, EngineUnreachable)
    assert without.detail == "/v1/models answered 401"
    assert SECRET not in repr(Door(SECRET))


async def test_a_redirect_is_not_followed_and_takes_no_key_along(engines: Callable[[], KeyedEngine]) -> None:
    engine, elsewhere = engines(), engines()
    engine.moved_to = f"http://127.0.0.1:{elsewhere.port}"
    found = await look(f"http://127.0.0.1:{engine.port}", Door(SECRET))
    assert isinstance(found, EngineUnreachable)
    assert found.detail == "/health answered 307"
    assert elsewhere.seen == []


# ---- where a registered name may lead ---------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("address", "allowed"),
    [
        ("10.1.2.3", True),
        ("fd00::7", True),
        ("8.8.8.8", True),
        ("127.0.0.1", False),
        ("127.9.9.9", False),
        ("::1", False),
        ("::ffff:127.0.0.1", False),
        ("0.0.0.0", False),
        ("::", False),
        ("169.254.169.254", False),
        ("::ffff:169.254.169.254", False),
        ("fe80::1", False),
        ("fd00:ec2::254", False),
        ("100.100.100.200", False),
        ("224.0.0.1", False),
        ("ff02::1", False),
        ("240.0.0.1", False),
        ("255.255.255.255", False),
    ],
)
def test_addresses_that_a_name_may_stand_for(address: str, allowed: bool) -> None:
    assert AddressGuard([]).allows(ip_address(address)) is allowed
    network = ip_network("::/0" if ":" in address and "ffff:1" not in address else "0.0.0.0/0")
    assert AddressGuard([network]).allows(ip_address(address)), "an operator's network says so"


async def test_a_name_that_leads_to_this_machine_is_not_called(engines: Callable[[], KeyedEngine]) -> None:
    engine = engines()
    url = f"http://localhost:{engine.port}"
    found = await look(url, Door(SECRET, AddressGuard([])))
    assert isinstance(found, EngineUnreachable)
    assert "which is no address for an engine" in found.detail
    assert engine.seen == [], "not even a connection"
    allowed = AddressGuard([ip_network("127.0.0.0/8"), ip_network("::1/128")])
    assert isinstance(await look(url, Door(SECRET, allowed)), EngineObserved | EngineUnreachable)


async def test_a_name_that_changes_its_meaning_is_seen_at_every_request(
    engines: Callable[[], KeyedEngine], monkeypatch: pytest.MonkeyPatch
) -> None:
    """DNS rebinding: good at the first look, somewhere else afterwards."""
    engine = engines()
    answers = iter(["127.0.0.1", "127.0.0.1", "169.254.169.254"])
    asked: list[str] = []
    loop = asyncio.get_running_loop()

    async def resolve(host: str, port: int, **_: Any) -> list[Any]:
        asked.append(host)
        return [(socket.AF_INET, socket.SOCK_STREAM, 6, "", (next(answers), port))]

    original = loop.getaddrinfo
    monkeypatch.setattr(
        loop, "getaddrinfo", lambda host, *a, **k: (resolve if "worker" in str(host) else original)(host, *a, **k)
    )
    guard = AddressGuard([ip_network("127.0.0.0/8")])
    found = await look(f"http://worker.example:{engine.port}", Door(SECRET, guard))
    assert asked == ["worker.example"] * 3
    assert [path for path, _, _ in engine.seen] == ["/health", "/metrics"]
    assert {host for _, _, host in engine.seen} == {f"worker.example:{engine.port}"}, "engines see the name"
    assert isinstance(found, EngineUnreachable)
    assert "worker.example stands for 169.254.169.254" in found.detail


async def test_a_name_without_an_address_is_said() -> None:
    with pytest.raises(AddressForbiddenError, match=r"nobody\.invalid cannot be resolved"):
        await AddressGuard([]).place("http://nobody.invalid:8000")


async def test_literal_addresses_were_judged_by_the_allow_list() -> None:
    place = await AddressGuard([]).place("https://[::1]")
    assert (place.base, place.host, place.sni) == ("https://[::1]:443", "[::1]", "::1")


# ---- configuration ----------------------------------------------------------------------------------------------


def test_keys_come_from_variables_and_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ENGINE_KEY", f" {SECRET}\n")
    (tmp_path / "key").write_text("of-the-file\n")
    path = tmp_path / "broker.toml"
    path.write_text(
        "[[engine]]\nid = 'd0'\nurl = 'http://d0'\nrole = 'decoder'\nmodel = 'm'\napi_key_env = 'ENGINE_KEY'\n"
        "[[engine]]\nid = 'd1'\nurl = 'http://d1'\nrole = 'decoder'\nmodel = 'm'\n"
        "[registration]\napi_key_file = 'key'\n"
        "[[discovery.dns]]\nname = 'pods'\nport = 8000\nrole = 'decoder'\nmodel = 'm'\napi_key_file = 'key'\n"
    )
    config = load_config(path)
    keys = config.engine_keys()
    assert keys.of_file == {"d0": SECRET, "d1": ""}
    assert (keys.of_dns, keys.of_registered) == ({"pods": "of-the-file"}, "of-the-file")
    for shown in (repr(keys), repr(config), json.dumps(config.printable()), repr(config.engine_configs())):
        assert SECRET not in shown
        assert "of-the-file" not in shown


@pytest.mark.parametrize(
    ("engine", "line"),
    [
        ({"api_key_env": "A", "api_key_file": "b"}, "engine.d0: set api_key_env or api_key_file, not both"),
        ({"api_key_env": "NOT_SET_ANYWHERE"}, "engine.d0.api_key_env: NOT_SET_ANYWHERE holds no key"),
        ({"api_key_file": "/nowhere/key"}, "engine.d0.api_key_file: cannot read /nowhere/key"),
        ({"api_key_file": "/bin/sh"}, "engine.d0.api_key_file: /bin/sh holds no key"),
        ({"api_key_env": "sk-the-key-itself"}, "engine.d0.api_key_env: string should match pattern"),
        ({"api_key": "sk-the-key-itself"}, "engine.d0.api_key: unknown key; did you mean"),
    ],
)
def test_what_is_wrong_is_named_and_no_secret_shown(engine: dict[str, str], line: str) -> None:
    with pytest.raises(ConfigProblem) as caught:
        BrokerConfig.from_mapping({"engine": [{**ENGINE, **engine}]}).engine_keys()
    assert str(caught.value).startswith(line)
    assert "sk-the-key-itself" not in str(caught.value)


def test_sharing_is_warned_about_where_it_does_not_help_or_is_read_on_the_way() -> None:
    shared = {"share_engine_credentials": "agent"}
    plain = BrokerConfig.from_mapping({"engine": [ENGINE], "access": shared}).warnings()
    assert any("has no effect without API keys" in line for line in plain)
    key = {"id": "a", "tenant": "t", "scopes": ["agent"], "sha256": "0" * 64}
    keyed = BrokerConfig.from_mapping({"engine": [ENGINE], "access": {**shared, "keys": [key]}}).warnings()
    assert any("over plain HTTP" in line for line in keyed)
