"""`[store]`: what is demanded of replicas, how passwords stay hidden, and what a missing extra is called."""

import sys
from pathlib import Path
from typing import Any

import pytest

from conserve_broker._config_tables import StoreTable
from conserve_broker._discovery_tables import DiscoveryTable
from conserve_broker.check import check_config
from conserve_broker.clock import ResponsiveLoop
from conserve_broker.dns_discovery import DnsWatcher
from conserve_broker.redis_store import RedisStore
from conserve_broker.settings import BrokerConfig, ConfigProblem, load_config

KEYS = [{"kid": "shared", "secret": "0123456789abcdef0123456789abcdef"}]
URL = "redis://user:hunter2@10.0.0.9:6379/0"


def config(*, token: Any = None, **store: Any) -> BrokerConfig:
    tables = {"store": {"kind": "redis", "url": URL, **store}, "token": {"keys": KEYS if token is None else token}}
    return BrokerConfig.from_mapping(tables)


@pytest.mark.parametrize(
    ("tables", "line"),
    [
        ({"store": {"url": URL}}, "store.url: is not used with kind = 'sqlite'; set kind = 'redis'"),
        ({"store": {"kind": "redis"}, "token": {"keys": KEYS}}, "store.url: is missing; with kind = 'redis' name"),
        ({"store": {"kind": "redis", "url": "http://x"}}, "store.url: must look like 'redis://10.0.0.9:6379/0'"),
        ({"store": {"kind": "redis", "url": URL}}, "token.keys: replicas must sign with the same key"),
        (
            {"store": {"kind": "redis", "url": URL}, "token": {"keys": KEYS}, "journal": {"path": "x.db"}},
            "journal.path: is not used with store.kind = 'redis'; remove the key",
        ),
        (
            {"store": {"kind": "redis", "url": URL, "timeout_ms": 900, "lock_ttl_ms": 1500}, "token": {"keys": KEYS}},
            "store.timeout_ms: 900 is above half of store.lock_ttl_ms (1500)",
        ),
        ({"store": {"kind": "valkey"}}, "store.kind: input should be 'sqlite' or 'redis'"),
        ({"store": {"lock_ttl": 1}}, "store.lock_ttl: unknown key; did you mean 'lock_ttl_ms'?"),
    ],
)
def test_mistakes_name_the_key_and_the_remedy(tables: dict[str, Any], line: str) -> None:
    with pytest.raises(ConfigProblem) as found:
        BrokerConfig.from_mapping(tables)
    assert str(found.value).splitlines()[0].startswith(line)
    assert "hunter2" not in str(found.value)


def test_a_good_one_warns_of_nothing_but_missing_engines() -> None:
    assert [line.split(":")[0] for line in config().warnings()] == ["engine"]


def test_the_password_is_never_printed(tmp_path: Path) -> None:
    path = tmp_path / "broker.toml"
    path.write_text(f'[store]\nkind = "redis"\nurl = "{URL}"\n[[token.keys]]\nkid = "k"\nsecret = "{"s" * 32}"\n')
    report = check_config(path)
    assert report.exit_code == 0, report.errors
    assert "redis://user:***@10.0.0.9:6379/0" in report.text()
    assert "hunter2" not in report.text()
    assert load_config(path).store.url == URL, "but it is used"


def test_a_url_without_a_password_is_shown_as_it_is() -> None:
    assert config(url="unix:///run/redis.sock").printable()["store"]["url"] == "unix:///run/redis.sock"


def test_where_clients_reach_a_broker() -> None:
    plain = BrokerConfig.from_mapping({"listen": {"host": "10.0.0.1"}})
    assert plain.advertised_url(port=7070) == "http://10.0.0.1:7070"
    assert BrokerConfig.from_mapping({"listen": {"host": "::1"}}).advertised_url(port=1) == "http://[::1]:1"
    assert BrokerConfig.from_mapping({"listen": {"host": "0.0.0.0"}}).advertised_url(port=1) == ""
    assert config(advertise_url="https://broker-a.internal/").advertised_url(port=1) == "https://broker-a.internal"


def test_missing_extras_are_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "redis", None)
    with pytest.raises(ConfigProblem, match=r"conserve-sdk\[redis\]"):
        RedisStore(StoreTable(kind="redis", url=URL))
    monkeypatch.setitem(sys.modules, "dns.asyncresolver", None)
    with pytest.raises(ConfigProblem, match=r"conserve-sdk\[dns\]"):
        DnsWatcher(DiscoveryTable(), found=lambda *_: None)


def test_a_loop_that_hangs_is_noticed() -> None:
    asked: list[Any] = []
    patient, hurried = ResponsiveLoop(asked.append), ResponsiveLoop(asked.append, patience_s=0)
    assert patient.responds()
    assert patient.responds(), "it still has time"
    asked[0]()
    assert patient.responds()
    assert len(asked) == 2
    assert hurried.responds()
    assert not hurried.responds()

    def closed(_: Any) -> None:
        raise RuntimeError("the loop is closed")

    assert not ResponsiveLoop(closed).responds()
