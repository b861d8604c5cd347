"""Watching the embedded engine: a kill, a restart and its capacity as the broker sees them, and the probe."""

import asyncio
import json
from pathlib import Path

from conserve_broker.check import check_config
from conserve_broker.scrape import Scraper
from conserve_broker.settings import BrokerConfig, ScrapeTable
from conserve_lab.emulator import EmulatedFleet, default_fleet
from conserve_sdk.core.events import EngineObserved, EngineUnreachable


async def test_a_killed_and_restarted_engine() -> None:
    events: list[EngineObserved | EngineUnreachable] = []
    with EmulatedFleet(default_fleet(prefillers=1, decoders=1, time_scale=0, kv_cache_tokens=40_000)) as fleet:
        config = BrokerConfig.from_mapping({"engine": fleet.broker_engines()})
        table = ScrapeTable(timeout_ms=20_000)
        async with Scraper(table, emit=events.append, now_ms=lambda: len(events)) as scraper:  # type: ignore[arg-type, return-value]
            scraper.configure([spec for spec in config.engine_configs() if spec.engine_id == "d0"])
            await scraper.poll_once()
            await asyncio.to_thread(fleet.kill, "d0")
            await scraper.poll_once()
            await asyncio.to_thread(fleet.restart, "d0")
            await scraper.poll_once()
    first, killed, restarted = events
    assert isinstance(first, EngineObserved)
    assert isinstance(killed, EngineUnreachable)
    assert isinstance(restarted, EngineObserved)
    assert (first.models, first.kv_capacity_tokens, first.block_size_tokens) == (("emulated",), 40_000, 16)
    assert first.max_model_len_tokens > 0
    assert first.incarnation != restarted.incarnation


def test_the_probe_finds_the_default_fleet_in_order(tmp_path: Path) -> None:
    with EmulatedFleet(default_fleet(time_scale=0)) as fleet:
        path = tmp_path / "broker.toml"
        tables = [
            "[[engine]]\n" + "".join(f"{key} = {json.dumps(value)}\n" for key, value in engine.items())
            for engine in fleet.broker_engines()
        ]
        path.write_text("\n".join(tables))
        report = check_config(path, probe=True, overrides={"scrape": {"timeout_ms": 20_000}})
    assert report.errors == ()
    assert [(engine.engine_id, engine.misfits, engine.notes) for engine in report.engines] == [
        (engine_id, (), ()) for engine_id in ("p0", "p1", "d0", "d1", "d2")
    ]
