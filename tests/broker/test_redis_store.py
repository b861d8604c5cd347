"""The store itself on a real server: the lock and its fence, groups, the log, and what its refusals say."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from conserve_broker._config_tables import StoreTable
from conserve_broker._journal_file import Fenced, JournalError
from conserve_broker.check import Report, check_config
from conserve_broker.redis_store import Claim, LeaderRows, RedisStore

from .broker_process import until
from .redis_server import NEEDS_SERVER, RedisServer, free_port

pytestmark = NEEDS_SERVER


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory) -> Iterator[RedisServer]:
    with RedisServer(tmp_path_factory.mktemp("redis")) as running:
        yield running


@pytest.fixture
def store(server: RedisServer, request: pytest.FixtureRequest) -> Iterator[RedisStore]:
    """A fleet of its own for each test; the server is shared."""
    prefix = request.node.name.replace("[", ".").replace("]", "")[:60]
    store = RedisStore(StoreTable(kind="redis", url=server.url, prefix=prefix, lock_ttl_ms=60_000))
    yield store
    store.close()


def claimed(store: RedisStore, url: str = "http://a", *, fence_floor: int = 0) -> Claim:
    claim = store.claim(url=url, fence_floor=fence_floor)
    assert claim.won
    return claim


class TestLock:
    def test_one_holds_it_and_the_others_hear_who(self, store: RedisStore) -> None:
        mine = claimed(store, "http://a:7070")
        other = store.claim(url="http://b:7070", fence_floor=0)
        assert (other.won, other.url, other.fence) == (False, "http://a:7070", mine.fence)
        assert 0 < other.left_ms <= 60_000
        assert store.renew(mine)

    def test_a_broker_without_an_address_can_hold_it(self, store: RedisStore) -> None:
        assert claimed(store, "").url == ""

    def test_released_it_is_free_and_the_fence_goes_up(self, store: RedisStore) -> None:
        first = claimed(store)
        store.release(first)
        second = claimed(store)
        assert second.fence == first.fence + 1
        assert not store.renew(first)
        store.release(first)  # not its to give
        assert store.renew(second)

    def test_a_store_without_memory_does_not_turn_the_fence_back(self, store: RedisStore) -> None:
        assert claimed(store, fence_floor=41).fence == 42

    def test_it_runs_out(self, server: RedisServer) -> None:
        quick = RedisStore(StoreTable(kind="redis", url=server.url, prefix="runs-out", lock_ttl_ms=500))
        first = claimed(quick)
        until(lambda: quick.claim(url="http://b", fence_floor=0).won)
        assert not quick.renew(first)
        quick.close()


class TestGroups:
    def test_a_group_is_there_as_a_whole(self, store: RedisStore) -> None:
        claim = claimed(store)
        store.write(claim, {"l1": "r1", "l2": "r2", "l3": None}, {"d0": True, "d1": False}, {"e1": "x", "e2": "y"})
        store.write(claim, {"l1": None, "l2": "r2b"}, {"d0": False, "d2": True}, {"e1": None})
        assert store.lease_rows() == {"l2": "r2b"}
        assert (store.draining(), store.engines()) == (["d2"], ["y"])
        assert store.fetch(["l1", "l2"]) == {"l1": None, "l2": "r2b"}
        assert store.fetch([]) == {}

    def test_candidates_stay_with_the_row_and_go_with_it(self, store: RedisStore) -> None:
        claim = claimed(store)
        store.write(claim, {"l1": "r1", "l2": "r2"}, {}, {}, {"l1": "c1"})
        store.write(claim, {"l1": "r1b"}, {}, {})
        rows = LeaderRows(store, claim, fenced=lambda: None)
        assert (rows.candidates("l1"), rows.candidates("l2")) == ("c1", None)
        rows.write({"l1": None, "l2": "r2b"}, {}, {}, {"l2": "c2"})
        assert (rows.candidates("l1"), rows.candidates("l2")) == (None, "c2")
        assert store.lease_rows() == {"l2": "r2b"}

    def test_the_same_group_twice_changes_nothing(self, store: RedisStore) -> None:
        claim = claimed(store)
        for _ in range(2):
            store.write(claim, {"l1": "r1"}, {}, {})
        assert store.lease_rows() == {"l1": "r1"}

    def test_a_big_group(self, store: RedisStore) -> None:
        rows = {f"l{number}": "r" * 300 for number in range(12_000)}
        store.write(claimed(store), rows, {}, {})
        assert store.lease_rows() == rows
        assert store.fetch(list(rows)) == rows

    def test_whoever_lost_the_lock_writes_nothing(self, store: RedisStore) -> None:
        old = claimed(store)
        store.release(old)
        told: list[bool] = []
        rows = LeaderRows(store, old, fenced=lambda: told.append(True))
        with pytest.raises(Fenced, match="does not lead any more"):  # nobody leads
            rows.write({"l1": "r1"}, {}, {})
        new = claimed(store)
        with pytest.raises(Fenced):  # another one leads
            rows.write({"l1": "r1"}, {"d0": True}, {"e": "x"})
        assert told == [True, True]
        store.write(new, {"l2": "r2"}, {}, {})
        assert (store.lease_rows(), store.draining(), store.engines()) == ({"l2": "r2"}, [], [])
        assert list(rows.rows()) == ["r2"]
        assert (rows.draining(), rows.engines()) == ([], [])


class TestLog:
    def test_it_names_what_changed_since(self, store: RedisStore) -> None:
        claim = claimed(store)
        start = store.position()
        store.write(claim, {"l1": "a", "l2": "b"}, {}, {})
        store.write(claim, {"l2": None}, {}, {})
        found = store.changed_after(start, block_ms=0)
        assert found is not None
        end, lease_ids = found
        assert (lease_ids, end) == (["l1", "l2"], store.position())
        assert store.changed_after(end, block_ms=10) == (end, [])

    def test_a_gap_is_seen(self, store: RedisStore, server: RedisServer) -> None:
        claim = claimed(store)
        store.write(claim, {"l1": "a"}, {}, {})
        start = store.position()
        for number in range(3):
            store.write(claim, {f"l{number}": "a"}, {}, {})
        store._redis.xtrim(store._keys["log"], maxlen=1, approximate=False)
        assert store.changed_after(start, block_ms=0) is None

    def test_a_release_wakes_who_follows(self, store: RedisStore) -> None:
        claim = claimed(store)
        start = store.position()
        store.release(claim)
        found = store.changed_after(start, block_ms=5_000)
        assert found is not None
        assert (found[0].seq, found[1]) == (start.seq + 1, [])


class TestFailures:
    def expect(self, url: str, message: str) -> None:
        store = RedisStore(StoreTable(kind="redis", url=url))
        with pytest.raises(JournalError, match=message) as raised:
            store.claim(url="", fence_floor=0)
        assert "hunter2" not in str(raised.value)
        store.close()

    def test_nobody_answers(self) -> None:
        self.expect(f"redis://:hunter2@127.0.0.1:{free_port()}/0", "does not answer; is it running, and is store.url")

    def test_a_password_is_wanted_or_wrong(self, tmp_path: Path) -> None:
        with RedisServer(tmp_path) as guarded:
            admin = RedisStore(StoreTable(kind="redis", url=guarded.url))
            admin._redis.config_set("requirepass", "sesame")
            self.expect(guarded.url, "refuses the password of store.url, or wants one")
            self.expect(guarded.url.replace("//", "//:hunter2@"), "refuses the password of store.url, or wants one")
            admin.close()

    def test_no_memory_is_left_and_comes_back(self, tmp_path: Path) -> None:
        with RedisServer(tmp_path) as small:
            store = RedisStore(StoreTable(kind="redis", url=small.url))
            claim = claimed(store)
            store._redis.config_set("maxmemory", 1)
            with pytest.raises(JournalError, match="has no memory left; raise its maxmemory"):
                store.write(claim, {"l1": "r1"}, {}, {})
            store._redis.config_set("maxmemory", 0)
            assert store.lease_rows() == {}
            store.write(claim, {"l1": "r1"}, {}, {})
            store.close()

    def test_a_replica_of_a_store_takes_no_writes(self, tmp_path: Path) -> None:
        with RedisServer(tmp_path) as small:
            store = RedisStore(StoreTable(kind="redis", url=small.url))
            store._redis.replicaof("127.0.0.1", "1")
            with pytest.raises(JournalError, match="is a read-only replica; name the primary"):
                store.claim(url="", fence_floor=0)
            store.close()


class TestProbe:
    """`conserve broker check-config --probe`."""

    def check(self, folder: Path, url: str) -> Report:
        path = folder / "broker.toml"
        key = f'[[token.keys]]\nkid = "k"\nsecret = "{"s" * 32}"\n'
        path.write_text(f'[store]\nkind = "redis"\nurl = "{url}"\n{key}')
        return check_config(path, probe=True)

    def test_a_good_store(self, tmp_path: Path, server: RedisServer) -> None:
        report = self.check(tmp_path, server.url)
        assert (report.exit_code, report.errors) == (0, ())
        assert not [line for line in report.warnings if line.startswith("store")]

    def test_one_that_forgets(self, tmp_path: Path) -> None:
        with RedisServer(
            tmp_path, "--appendonly", "no", "--maxmemory", "100mb", "--maxmemory-policy", "allkeys-lru"
        ) as it:
            report = self.check(tmp_path, it.url)
        assert report.exit_code == 0
        lines = [line for line in report.warnings if line.startswith("store")]
        assert [line.split(";")[1].strip() for line in lines] == [
            "set appendonly yes",
            "set maxmemory-policy noeviction",
        ]

    def test_nobody_there(self, tmp_path: Path) -> None:
        report = self.check(tmp_path, f"redis://127.0.0.1:{free_port()}/0")
        assert report.exit_code == 2
        assert "does not answer; is it running" in report.text()
