"""The dashboard of a broker that stands by: it says so, names the leader, and shows the fleet once it leads itself."""

import contextlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from playwright.sync_api import expect

from conserve_lab.emulator import EmulatedFleet
from tests.broker.broker_process import BrokerProcess, until
from tests.broker.redis_server import NEEDS_SERVER, RedisServer
from tests.dashboard.conftest import BUDGET_MS, Visit, tables_of

pytestmark = [NEEDS_SERVER, pytest.mark.timeout(150)]
expect.set_options(timeout=BUDGET_MS)


def test_a_standby_points_at_the_leader_until_it_leads(
    visit: Callable[..., Visit], fleet: EmulatedFleet, tmp_path: Path
) -> None:
    with contextlib.ExitStack() as stack:
        redis = stack.enter_context(RedisServer(tmp_path))
        shared: dict[str, Any] = {
            "store": {"kind": "redis", "url": redis.url, "lock_ttl_ms": 3_000},
            "token.keys": [{"kid": "shared", "secret": "the same secret for every replica of this fleet"}],
        }
        engines = tables_of(fleet)
        first = stack.enter_context(BrokerProcess(tmp_path / "a.toml", {**shared, **engines}))
        until(lambda: first.readyz()["role"] == "leader")
        second = stack.enter_context(BrokerProcess(tmp_path / "b.toml", {**shared, **engines}))
        until(lambda: second.readyz()["role"] == "standby")

        page = visit().open(second.url)
        expect(page.locator("#role")).to_have_text("standby")
        expect(page.locator("#strip")).to_contain_text(f"standby: {first.url} leads")
        link = page.get_by_role("link", name="Open the leader's dashboard")
        expect(link).to_have_attribute("href", first.url)
        expect(page.locator("#main")).to_be_hidden()

        first.kill()
        expect(page.locator("#role")).to_have_text("leader")
        expect(page.locator("[data-engine]")).to_have_count(3)
        expect(page.locator("#strip")).to_have_text("All well: new conversations are served.")
