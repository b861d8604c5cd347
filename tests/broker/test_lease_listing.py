"""`GET /v1/leases`: filters, pages that miss nobody, bounds; and `conserve leases` on top of it."""

import json
from typing import Any

import httpx2
import pytest

from conserve_broker import lease_listing
from conserve_broker.admin import AdminError
from conserve_broker.cli import leases_main
from conserve_sdk._desk import listing
from conserve_sdk.protocol import LeaseList, LeaseQuery
from conserve_sdk.testing import FakeClock, InMemoryBroker


class World:
    """A broker in memory, asked over HTTP."""

    def __init__(self) -> None:
        self.clock = FakeClock()
        self.broker = InMemoryBroker(clock=self.clock)
        self.http = httpx2.Client(transport=self.broker, base_url=self.broker.url)

    def grant(self, conversation: str) -> dict[str, Any]:
        body = {"conversation_id": conversation, "lineage": "l", "model": "test-model", "first_turn_input_tokens": 10}
        answer = self.http.post("/v1/leases", json=body)
        assert answer.status_code == 201, answer.text
        return answer.json()

    def end(self, lease: dict[str, Any]) -> None:
        holder = {"authorization": f"Lease {lease['token']}"}
        assert self.http.delete(f"/v1/leases/{lease['lease_id']}", headers=holder).status_code == 204

    def page(self, **query: Any) -> LeaseList:
        answer = self.http.get("/v1/leases", params=query)
        assert answer.is_success, answer.text
        return LeaseList.model_validate_json(answer.content)

    def found(self, **query: Any) -> list[str]:
        return [lease.conversation_id for lease in self.page(**query).leases]


@pytest.fixture
def world() -> World:
    return World()


def test_what_a_line_says(world: World) -> None:
    grant = world.grant("c")
    world.clock.advance(1_500)
    (line,) = world.page().leases
    assert (line.lease_id, line.conversation_id, line.tenant) == (grant["lease_id"], "c", "default")
    assert (line.state, line.state_for_ms, line.granted_ago_ms) == ("busy", 1_500, 1_500)
    assert (line.decoder, line.rule, line.ledger_tokens) == (grant["decoder"]["engine_id"], "most_free_kv", 10)
    assert "token" not in line.model_dump()


def test_filters(world: World) -> None:
    grants = {name: world.grant(name) for name in ("a", "b", "c")}
    world.clock.advance(10_000)
    grants["d"] = world.grant("d")
    report = {"kind": "turn_finished", "token": grants["b"]["token"], "prompt_tokens": 50}
    world.http.post("/v1/reports", json={"reports": [report]})
    world.http.post(f"/v1/leases/{grants['c']['lease_id']}/park", json={"token": grants["c"]["token"]})
    assert world.found() == ["a", "b", "c", "d"]
    assert world.found(state="busy") == ["a", "d"]
    assert world.found(state="idle") == ["b"]
    assert world.found(state="parked") == ["c"]
    assert world.found(min_age_ms=10_000) == ["a", "b", "c"]
    assert world.found(max_age_ms=9_999) == ["d"]
    assert world.found(conversation_id="c") == ["c"]
    assert world.found(tenant="default", model="test-model") == ["a", "b", "c", "d"]
    assert world.found(tenant="other") == world.found(model="other") == []
    decoder = grants["a"]["decoder"]["engine_id"]
    there = [name for name, grant in grants.items() if grant["decoder"]["engine_id"] == decoder]
    assert world.found(engine_id=decoder) == there
    assert 0 < len(there) < 4


def test_a_prefiller_finds_its_leases() -> None:
    from conserve_sdk.core import PAPER, BrokerSettings

    broker = InMemoryBroker(settings=BrokerSettings(placement=PAPER))
    http = httpx2.Client(transport=broker, base_url=broker.url)
    body = {"conversation_id": "c", "lineage": "l", "model": "test-model", "first_turn_input_tokens": 500}
    http.post("/v1/leases", json=body)
    assert len(http.get("/v1/leases", params={"engine_id": "p0"}).json()["leases"]) == 1


def test_pages_miss_nobody_who_lives_all_along(world: World) -> None:
    grants = {f"c{number:02}": world.grant(f"c{number:02}") for number in range(20)}
    seen: list[str] = []
    cursor: str | None = ""
    gone = iter(["c00", "c03", "c05", "c11", "c19"])
    ended = []
    while cursor is not None:
        page = world.page(limit=3, cursor=cursor)
        seen += [lease.conversation_id for lease in page.leases]
        cursor = page.next_cursor
        name = next(gone, None)
        if name is not None:
            world.end(grants[name])
            ended.append(name)
            world.grant(f"new-{name}")
    assert set(grants) - set(ended) <= set(seen)
    assert {"new-c00", "new-c19"} <= set(seen)


def test_a_page_looks_at_a_bounded_number(world: World, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(listing, "LOOKED_AT_MAX", 4)
    for number in range(10):
        world.grant(f"c{number}")
    first = world.page(conversation_id="c9")
    assert (first.leases, first.live, first.next_cursor) == ((), 10, "4-0")
    second = world.page(conversation_id="c9", cursor="4-0")
    third = world.page(conversation_id="c9", cursor=second.next_cursor)
    assert [lease.conversation_id for lease in third.leases] == ["c9"]
    assert third.next_cursor is None


@pytest.mark.parametrize(
    "query",
    [
        {"limit": 0},
        {"limit": 501},
        {"limit": "x"},
        {"state": "asleep"},
        {"cursor": "9"},
        {"cursor": "1-1-1"},
        {"tenant": ""},
    ],
)
def test_a_bad_query_is_said_so(world: World, query: dict[str, Any]) -> None:
    answer = world.http.get("/v1/leases", params=query)
    assert (answer.status_code, answer.json()["code"]) == (422, "bad_request")
    assert next(iter(query)) in answer.json()["detail"]


def test_a_cursor_from_nowhere_ends_the_list(world: World) -> None:
    world.grant("c")
    assert world.page(cursor="999999999999-0").next_cursor is None
    assert world.found(cursor="5-999999") == []


# ---- conserve leases --------------------------------------------------------------------------------------------


@pytest.fixture
def through(world: World, monkeypatch: pytest.MonkeyPatch) -> World:
    """The command asks this broker."""

    def ask(method: str, url: str, path: str, answer: type[LeaseList]) -> LeaseList:
        assert url == "http://broker"
        response = world.http.request(method, path)
        if not response.is_success:
            raise AdminError(response.json()["detail"])
        return answer.model_validate_json(response.content)

    monkeypatch.setattr(lease_listing, "ask", ask)
    return world


def test_the_command_follows_the_pages(through: World, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(listing, "LOOKED_AT_MAX", 2)
    for number in range(7):
        through.grant(f"c{number}")
    assert leases_main(["--broker", "http://broker"]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert [line.split()[1] for line in printed[1:8]] == [f"c{number}" for number in range(7)]
    assert printed[-1] == "7 shown of 7 live"
    assert leases_main(["--broker", "http://broker", "--limit", "3", "--json"]) == 0
    listed = LeaseList.model_validate_json(capsys.readouterr().out)
    assert [lease.conversation_id for lease in listed.leases] == ["c0", "c1", "c2"]
    assert leases_main(["--broker", "http://broker", "--limit", "3"]) == 0
    assert "3 shown of 7 live; --limit 3 ends the list" in capsys.readouterr().out


def test_the_command_filters(through: World, capsys: Any) -> None:
    through.grant("old")
    through.clock.advance(30_000)
    through.grant("new")

    def found(*options: str) -> list[str]:
        assert leases_main([*options, "--json", "--broker", "http://broker"]) == 0
        return [lease["conversation_id"] for lease in json.loads(capsys.readouterr().out)["leases"]]

    assert found("--older-than", "20") == ["old"]
    assert found("--younger-than", "20") == ["new"]
    assert found("--younger-than", "0") == ["new"]
    assert found("--state", "idle") == []
    assert found("--conversation", "old", "--tenant", "default") == ["old"]


def test_wrong_usage(capsys: Any) -> None:
    for options in (["--state", "asleep"], ["--limit", "0"], ["--older-than", "x"], ["--engine", "a b"]):
        assert leases_main(options) == 2
        assert options[0] in capsys.readouterr().err
    assert leases_main(["--broker", "http://127.0.0.1:9"]) == 1
    assert "start it, or correct --broker" in capsys.readouterr().err


def test_query_defaults_are_not_sent() -> None:
    assert LeaseQuery().model_dump(exclude_none=True, exclude_defaults=True) == {}
