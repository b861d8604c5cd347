"""Hot reload of the fleet: what changes, what does not, and what a wrong file does."""

import asyncio
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from conserve_broker.api_keys import new_key
from conserve_broker.reload import ConfigWatcher, FleetEvent, fleet_changes
from conserve_broker.settings import BrokerConfig, load_config
from conserve_sdk.core.events import EngineConfigured, EngineRemoved, EngineSpec
from conserve_sdk.core.vocabulary import Role

BUDGET_S = 30.0


def spec(engine_id: str, port: int = 1) -> EngineSpec:
    return EngineSpec(engine_id=engine_id, url=f"http://{engine_id}:{port}", role=Role.DECODER, model="m")


def table(engine_id: str, port: int = 8000) -> str:
    return f"[[engine]]\nid = '{engine_id}'\nurl = 'http://{engine_id}:{port}'\nrole = 'decoder'\nmodel = 'm'\n"


class TestChanges:
    def test_nothing_changes_nothing(self) -> None:
        assert fleet_changes([spec("a"), spec("b")], [spec("b"), spec("a")], now_ms=5) == ()

    def test_removals_come_first_then_what_is_new_or_other_in_file_order(self) -> None:
        events = fleet_changes([spec("a"), spec("b"), spec("c")], [spec("z"), spec("b", 2), spec("c")], now_ms=5)
        assert events == (
            EngineRemoved(now_ms=5, engine_id="a"),
            EngineConfigured(now_ms=5, spec=spec("z")),
            EngineConfigured(now_ms=5, spec=spec("b", 2)),
        )


class Fleet:
    """A watched file, and what its watcher said."""

    def __init__(self, path: Path, **options: Any) -> None:
        self.path = path
        self.write(table("d0"))
        self.applied: list[tuple[BrokerConfig, Sequence[FleetEvent]]] = []
        self.changed = asyncio.Event()
        config = load_config(path, **options)
        self.watcher = ConfigWatcher(path, config, apply=self._apply, now_ms=lambda: 7, **options)  # type: ignore[arg-type, return-value]

    def write(self, text: str) -> None:
        self.path.write_text(text)

    def _apply(self, config: BrokerConfig, events: Sequence[FleetEvent]) -> None:
        self.applied.append((config, events))
        self.changed.set()


@pytest.fixture
def fleet(tmp_path: Path) -> Fleet:
    return Fleet(tmp_path / "broker.toml")


class TestWatcher:
    def test_an_unchanged_file_changes_nothing(self, fleet: Fleet) -> None:
        assert not fleet.watcher.poll()
        assert not fleet.watcher.poll()
        fleet.write(f"# a comment\n{table('d0')}")
        assert not fleet.watcher.poll()
        assert (fleet.applied, fleet.watcher.problem) == ([], "")

    def test_a_file_is_read_again_only_when_its_content_changed(
        self, fleet: Fleet, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        fleet.watcher.poll()
        monkeypatch.setattr("conserve_broker.reload.load_config", None)  # calling it would fail
        fleet.path.touch()
        assert not fleet.watcher.poll()

    def test_a_changed_fleet_is_applied(self, fleet: Fleet) -> None:
        fleet.write(table("d1") + table("d2"))
        assert fleet.watcher.poll()
        ((config, events),) = fleet.applied
        assert [type(event).__name__ for event in events] == ["EngineRemoved", "EngineConfigured", "EngineConfigured"]
        assert all(event.now_ms == 7 for event in events)
        assert [engine.id for engine in config.engine] == ["d1", "d2"]
        assert fleet.watcher.config is config
        assert not fleet.watcher.poll()

    def test_a_change_between_reading_and_watching_is_seen(self, fleet: Fleet) -> None:
        fleet.write(table("d1"))  # the watcher has not looked yet
        assert fleet.watcher.poll()

    def test_a_change_of_the_same_size_in_the_same_instant_is_seen(self, fleet: Fleet) -> None:
        fleet.watcher.poll()
        fleet.write(table("d0", 8001))
        assert fleet.watcher.poll()

    def test_a_wrong_file_changes_nothing_and_is_told(self, fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
        fleet.write(f"{table('d1')}rol = 'x'\n[lease]\nttl_ms = 1\n")
        with caplog.at_level(logging.ERROR):
            assert not fleet.watcher.poll()
            assert not fleet.watcher.poll()
        assert "engine.d1.rol: unknown key; did you mean 'role'?" in fleet.watcher.problem
        assert "lease.ttl_ms: must be at least 5000" in fleet.watcher.problem
        assert "\n" not in fleet.watcher.problem
        assert len(caplog.records) == 1, "told once, not every second"
        assert [engine.id for engine in fleet.watcher.config.engine] == ["d0"]
        fleet.write(table("d1"))
        assert fleet.watcher.poll()
        assert fleet.watcher.problem == ""

    def test_a_mistake_that_is_taken_back_is_forgotten(self, fleet: Fleet) -> None:
        fleet.watcher.poll()
        fleet.write("[listen")
        fleet.watcher.poll()
        assert "is not valid TOML" in fleet.watcher.problem
        fleet.write(table("d0"))
        assert not fleet.watcher.poll()
        assert fleet.watcher.problem == ""

    def test_a_file_that_is_gone_for_a_moment(self, fleet: Fleet) -> None:
        fleet.path.unlink()
        assert not fleet.watcher.poll()
        assert "cannot be read" in fleet.watcher.problem
        fleet.write(table("d0"))
        assert not fleet.watcher.poll()
        assert (fleet.watcher.problem, fleet.applied) == ("", [])

    def test_other_tables_wait_for_a_restart(self, fleet: Fleet, caplog: pytest.LogCaptureFixture) -> None:
        fleet.write(f"[lease]\nttl_ms = 20_000\n[listen]\nport = 1\n{table('d1')}")
        assert fleet.watcher.poll()
        assert fleet.watcher.restart_keys == ("listen.port", "lease.ttl_ms", "lease.grace_ms")
        assert fleet.watcher.config.lease.ttl_ms == 60_000
        assert "restart the broker for listen.port, lease.ttl_ms, lease.grace_ms to apply" in caplog.text
        fleet.write(table("d1"))
        assert not fleet.watcher.poll()
        assert fleet.watcher.restart_keys == ()

    def test_the_command_line_still_wins(self, tmp_path: Path) -> None:
        fleet = Fleet(tmp_path / "broker.toml", overrides={"listen": {"port": 9}})
        fleet.write(f"[listen]\nport = 8\n{table('d0')}")
        fleet.watcher.poll()
        assert fleet.watcher.restart_keys == ()

    async def test_it_looks_by_itself(self, fleet: Fleet) -> None:
        task = asyncio.create_task(fleet.watcher.run(poll_s=0.01))
        fleet.write(table("d1"))
        async with asyncio.timeout(BUDGET_S):
            await fleet.changed.wait()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert len(fleet.applied) == 1


class TestKeys:
    """API keys are taken over from the configuration and from the key file."""

    def test_keys_come_and_go_while_the_broker_runs(self, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
        one, two = (new_key(tenant="red", scopes=("agent",), key_id=f"red-{number}") for number in (1, 2))
        path, key_file = tmp_path / "broker.toml", tmp_path / "keys.toml"
        key_file.write_text(two.toml().replace("access.keys", "keys"))
        path.write_text(one.toml())
        told: list[list[str]] = []
        watcher = ConfigWatcher(
            path,
            load_config(path),
            apply=lambda *_: None,
            apply_keys=lambda _, keys: told.append([key.id for key in keys]),
            now_ms=lambda: 7,  # type: ignore[arg-type, return-value]
        )
        watcher.poll()
        assert told == [["red-1"]]
        watcher.poll()
        assert told == [["red-1"]], "nothing new is told again"
        path.write_text(f'[access]\nkey_file = "keys.toml"\n{one.toml()}')
        watcher.poll()
        assert told[-1] == ["red-1", "red-2"]
        key_file.write_text("")
        with caplog.at_level(logging.INFO):
            watcher.poll()
        assert told[-1] == ["red-1"]
        assert "1 API key(s) in force" in caplog.text
        assert watcher.restart_keys == ()

    @pytest.mark.parametrize(
        ("text", "says"),
        [
            ("keys = 3", "keys: input should be a valid tuple"),
            ("[[keys]]\nid = 'a'", "keys.a.tenant: is missing; add it"),
            ("[[keys]]\nid = 'a'\nsha = 'csk.a.secret'", "unknown key; did you mean 'sha256'?"),
            ("[[keys]\n", "is not valid TOML"),
            (None, "cannot read"),
        ],
    )
    def test_a_wrong_key_file_changes_nothing_and_shows_no_secret(
        self, tmp_path: Path, text: str | None, says: str
    ) -> None:
        path, key_file = tmp_path / "broker.toml", tmp_path / "keys.toml"
        key_file.write_text("")
        path.write_text('[access]\nkey_file = "keys.toml"')
        told: list[int] = []
        watcher = ConfigWatcher(
            path,
            load_config(path),
            apply=lambda *_: None,
            apply_keys=lambda _, keys: told.append(len(keys)),
            now_ms=lambda: 7,  # type: ignore[arg-type, return-value]
        )
        watcher.poll()
        if text is None:
            key_file.unlink()
        else:
            key_file.write_text(text)
        watcher.poll()
        assert told == [0]
        assert says in watcher.problem
        assert "csk.a.secret" not in watcher.problem
