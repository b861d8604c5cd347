"""The dashboard in a real browser: Debian's chromium, driven by Playwright, against brokers on loopback."""

import json
import os
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from playwright.sync_api import Browser, Page, Playwright, Route, sync_playwright

from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_lab.emulator import EmulatedFleet, default_fleet
from conserve_sdk.protocol import LeaseGrant
from tests.broker.broker_process import BrokerProcess

BUDGET_MS = 40_000
CHROMIUM = shutil.which("chromium") or shutil.which("chromium-browser")


@pytest.fixture(scope="module")
def playwright() -> Iterator[Playwright]:
    """Its event loop counts as running in this thread while it is open, so no async test may run meanwhile."""
    if CHROMIUM is None:
        if os.environ.get("CI"):
            pytest.fail("install chromium: these tests may not be left out in CI")
        pytest.skip("chromium is not installed")
    with sync_playwright() as running:
        yield running


@pytest.fixture(scope="module")
def browser(playwright: Playwright) -> Iterator[Browser]:
    arguments = ["--no-sandbox", "--disable-dev-shm-usage", "--disable-gpu"]
    browser = playwright.chromium.launch(executable_path=CHROMIUM, args=arguments)
    yield browser
    browser.close()


class Visit:
    """One browser window, and what went wrong in it."""

    def __init__(self, browser: Browser, **options: Any) -> None:
        self.context = browser.new_context(**{"viewport": {"width": 1280, "height": 900}, **options})
        self.context.set_default_timeout(BUDGET_MS)
        self.page: Page = self.context.new_page()
        self.foreign: list[str] = []
        self.errors: list[str] = []
        self.page.on("request", self._sent)
        self.page.on("pageerror", lambda error: self.errors.append(str(error)))
        self.page.on("console", lambda line: self._said(line.type, line.text))
        self.origin = ""

    def open(self, url: str) -> Page:
        self.origin = url
        self.page.goto(url + "/")
        return self.page

    def _sent(self, request: Any) -> None:
        if not request.url.startswith((self.origin + "/", "data:")):
            self.foreign.append(request.url)

    def _said(self, kind: str, words: str) -> None:
        if kind in {"error", "warning"} and "Failed to load resource" not in words:
            self.errors.append(words)

    def close(self) -> None:
        self.context.close()
        assert self.foreign == [], "the page asked somebody else"
        assert self.errors == []


@pytest.fixture
def visit(browser: Browser) -> Iterator[Callable[..., Visit]]:
    """Opens windows; each must end without an error in its console and without a request to anybody but the broker."""
    visits: list[Visit] = []

    def opened(**options: Any) -> Visit:
        visits.append(Visit(browser, **options))
        return visits[-1]

    yield opened
    for each in visits:
        each.close()


class Agent:
    """Whoever asks for leases while somebody watches."""

    def __init__(self, url: str) -> None:
        self.http = httpx2.Client(base_url=url, timeout=BUDGET_MS / 1000)
        self.held: list[LeaseGrant] = []

    def grant(self, conversation: str, *, tokens: int = 1_000) -> LeaseGrant:
        body = {"conversation_id": conversation, "lineage": "main", "model": "emulated"}
        response = self.http.post("/v1/leases", json={**body, "first_turn_input_tokens": tokens})
        assert response.is_success, response.text
        self.held.append(LeaseGrant.model_validate_json(response.content))
        return self.held[-1]

    def wait(self, conversation: str, *, tokens: int) -> threading.Thread:
        """Ask and wait for room, in a thread of its own."""
        body = {"conversation_id": conversation, "lineage": "main", "model": "emulated", "wait_ms": 60_000}
        sent = {**body, "first_turn_input_tokens": tokens}

        def ask() -> None:
            answer = httpx2.post(f"{self.http.base_url}/v1/leases", json=sent, timeout=90)
            if answer.is_success:
                self.held.append(LeaseGrant.model_validate_json(answer.content))

        thread = threading.Thread(target=ask)
        thread.start()
        return thread

    def release_all(self) -> None:
        while self.held:
            lease = self.held.pop()
            self.http.delete(f"/v1/leases/{lease.lease_id}", headers={"authorization": f"Lease {lease.token}"})


def tables_of(fleet: EmulatedFleet) -> dict[str, Any]:
    engines = [{**engine, "kv_capacity_tokens": 40_000, "tier": "H200"} for engine in fleet.broker_engines()]
    return {
        "listen": {"port": 0},
        "placement": {"preset": "paper", "kv_watermark": 0.9},
        "scrape": {"interval_ms": 200},
        "lease": {"ttl_ms": 600_000},
        "engine": engines,
    }


@pytest.fixture(scope="module")
def fleet() -> Iterator[EmulatedFleet]:
    with EmulatedFleet(default_fleet(prefillers=1, decoders=2, time_scale=0)) as running:
        yield running


@pytest.fixture(scope="module")
def broker_url(fleet: EmulatedFleet) -> Iterator[str]:
    with BrokerServer(BrokerConfig.from_mapping(tables_of(fleet))) as server:
        server.wait_until_ready(engines=3, timeout_s=40)
        yield server.url


@pytest.fixture
def agent(broker_url: str) -> Iterator[Agent]:
    agent = Agent(broker_url)
    yield agent
    agent.release_all()
    agent.http.close()


@pytest.fixture
def broker_process(fleet: EmulatedFleet, tmp_path: Path) -> Iterator[BrokerProcess]:
    """A broker to be paused and killed."""
    journal = {"journal": {"path": str(tmp_path / "leases.db")}}
    with BrokerProcess(tmp_path / "broker.toml", {**tables_of(fleet), **journal}) as process:
        yield process


@pytest.fixture
def with_keys() -> Callable[[Page, str], None]:
    """Put in front of a page a broker's answer to calls without the right key."""

    def installed(page: Page, key: str) -> None:
        def checked(route: Route) -> None:
            given = route.request.headers.get("authorization", "")
            if given == f"Bearer {key}":
                route.continue_(headers={k: v for k, v in route.request.headers.items() if k != "authorization"})
                return
            status = 403 if given else 401
            problem = {"title": "No", "status": status, "detail": "the key lacks the scope admin", "code": "forbidden"}
            route.fulfill(status=status, content_type="application/problem+json", body=json.dumps(problem))

        page.route("**/v1/**", checked)

    return installed
