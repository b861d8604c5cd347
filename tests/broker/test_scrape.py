"""Watching engines over real HTTP."""

import asyncio
import itertools
import socket
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from typing import Any

import httpx2
import pytest

from conserve_broker import _engine_http
from conserve_broker.scrape import Scraper, next_due_s
from conserve_broker.settings import ScrapeTable
from conserve_sdk.core.events import EngineObserved, EngineSpec, EngineUnreachable
from conserve_sdk.core.vocabulary import Role

FAST = ScrapeTable(interval_ms=50, timeout_ms=20_000)
BUDGET_S = 30.0


class Seen:
    """Collects what the scraper tells, on a clock that counts its own readings."""

    def __init__(self) -> None:
        self.events: list[EngineObserved | EngineUnreachable] = []
        self.changed = asyncio.Event()
        self.ticks = itertools.count(1_000)
        self.jump_ms = 0

    def now_ms(self) -> Any:
        return next(self.ticks) + self.jump_ms

    def emit(self, event: EngineObserved | EngineUnreachable) -> None:
        self.events.append(event)
        self.changed.set()

    def of(self, engine_id: str) -> list[EngineObserved | EngineUnreachable]:
        return [event for event in self.events if event.engine_id == engine_id]

    async def until(self, condition: Callable[[], object]) -> None:
        async with asyncio.timeout(BUDGET_S):
            while not condition():
                self.changed.clear()
                await self.changed.wait()


def spec(engine_id: str, url: str, model: str = "conserve-tiny") -> EngineSpec:
    return EngineSpec(engine_id=engine_id, url=url, role=Role.DECODER, model=model)


@pytest.fixture
def seen() -> Seen:
    return Seen()


def scraper(seen: Seen, settings: ScrapeTable = FAST) -> Scraper:
    return Scraper(settings, emit=seen.emit, now_ms=seen.now_ms)


@asynccontextmanager
async def running(seen: Seen, *engines: EngineSpec) -> AsyncIterator[Scraper]:
    async with scraper(seen) as scrape:
        scrape.configure(engines)
        task = asyncio.create_task(scrape.run())
        yield scrape
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        scrape.configure([])  # harmless after the end


class TestOnePoll:
    async def test_everything_that_is_observed(self, page_engines: Any, seen: Seen) -> None:
        engine = page_engines()
        async with scraper(seen) as scrape:
            scrape.configure([spec("d0", engine.url)])
            await scrape.poll_once()
        (event,) = seen.events
        assert event == EngineObserved(
            now_ms=event.now_ms,
            engine_id="d0",
            incarnation="started-1795387446.44",
            models=("conserve-tiny",),
            kv_capacity_tokens=8192,
            kv_used_tokens=0,
            block_size_tokens=32,
            max_model_len_tokens=2048,
            running=0,
            waiting=0,
            prefill_tokens_total=101,
        )
        assert engine.asked == ["/health", "/metrics", "/v1/models"]

    async def test_the_length_of_its_own_model_counts(self, page_engines: Any, seen: Seen) -> None:
        engine = page_engines()
        engine.models = {"data": [{"id": "lora"}, {"id": "m", "max_model_len": 5}, {"id": "x", "max_model_len": 9}]}
        async with scraper(seen) as scrape:
            scrape.configure([spec("d0", engine.url, "m"), spec("d1", engine.url, "other")])
            await scrape.poll_once()
        assert {event.engine_id: event.max_model_len_tokens for event in seen.events} == {"d0": 5, "d1": 9}  # type: ignore[union-attr]
        assert seen.events[0].models == ("lora", "m", "x")  # type: ignore[union-attr]

    @pytest.mark.parametrize(
        "change",
        [
            {"models": b'{"data": [{"id": "m", "max_model_len": 1e400}]}'},
            {"models": b"[" * 100_000},
            {"page": b'vllm:num_requests_running{a="1"} 1e308\nvllm:num_requests_running{a="2"} 1e308\n'},
            {"page": b'vllm:num_requests_running 1\nvllm:cache_config_info{block_size="%s"} 1\n' % (b"9" * 5_000)},
        ],
    )
    async def test_an_absurd_answer_is_that_engines_trouble_alone(
        self, page_engines: Any, seen: Seen, change: dict[str, Any]
    ) -> None:
        """An exception that escaped here would end the whole broker."""
        engine = page_engines()
        vars(engine).update(change)
        async with scraper(seen) as scrape:
            scrape.configure([spec("d0", engine.url)])
            await scrape.poll_once()
        (event,) = seen.events
        assert isinstance(event, EngineUnreachable)

    async def test_a_fault_of_the_http_stack_is_that_engines_trouble_alone(self, seen: Seen) -> None:
        """As when an engine dies in the instant in which it is connected to."""

        def lost(request: httpx2.Request) -> httpx2.Response:
            raise AttributeError("'NoneType' object has no attribute\n'getpeername'")

        async with Scraper(FAST, emit=seen.emit, now_ms=seen.now_ms, transport=httpx2.MockTransport(lost)) as scrape:
            scrape.configure([spec("d0", "http://127.0.0.1:9")])
            await scrape.poll_once()
        (event,) = seen.events
        assert isinstance(event, EngineUnreachable)
        assert event.detail == "AttributeError: 'NoneType' object has no attribute 'getpeername'"

    @pytest.mark.parametrize(
        ("change", "detail"),
        [
            ({"status": {"/health": 503}}, "/health answered 503"),
            ({"status": {"/metrics": 404}}, "/metrics answered 404"),
            ({"status": {"/v1/models": 401}}, "/v1/models answered 401"),
            ({"page": b"<html>"}, "/metrics has no vllm:num_requests_running; is this a vLLM server with metrics on?"),
            ({"models": b"<html>"}, "/v1/models does not list models; is this an OpenAI-compatible vLLM server?"),
            ({"models": {"data": [{}]}}, "/v1/models does not list models; is this an OpenAI-compatible vLLM server?"),
        ],
    )
    async def test_failures_fit_into_one_line(
        self, change: dict[str, Any], detail: str, page_engines: Any, seen: Seen
    ) -> None:
        engine = page_engines()
        vars(engine).update(change)
        async with scraper(seen) as scrape:
            scrape.configure([spec("d0", engine.url)])
            await scrape.poll_once()
        (event,) = seen.events
        assert isinstance(event, EngineUnreachable)
        assert event.detail == detail

    async def test_nobody_listens(self, seen: Seen) -> None:
        with socket.create_server(("127.0.0.1", 0)) as listener:
            port = listener.getsockname()[1]
        async with scraper(seen) as scrape:
            scrape.configure([spec("d0", f"http://127.0.0.1:{port}")])
            await scrape.poll_once()
        (event,) = seen.events
        assert isinstance(event, EngineUnreachable)
        assert event.detail.startswith("/health: ")
        assert "\n" not in event.detail

    async def test_an_engine_that_never_answers(self, page_engines: Any, seen: Seen) -> None:
        engine = page_engines()
        engine.hang = True
        async with scraper(seen, ScrapeTable(interval_ms=50, timeout_ms=50)) as scrape:
            scrape.configure([spec("d0", engine.url)])
            await scrape.poll_once()
        (event,) = seen.events
        assert isinstance(event, EngineUnreachable)
        assert event.detail == "no answer within 50 ms"

    async def test_a_large_page_is_read_in_a_thread_and_a_huge_one_not_at_all(
        self, page_engines: Any, seen: Seen, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        engine = page_engines()
        engine.page = engine.page * 5  # five times the same series: their values add up
        assert len(engine.page) > _engine_http.PARSE_ELSEWHERE_BYTES
        async with scraper(seen) as scrape:
            scrape.configure([spec("d0", engine.url)])
            await scrape.poll_once()
            monkeypatch.setattr(_engine_http, "_BODY_BYTES_MAX", 300_000)
            await scrape.poll_once()
        observed, refused = seen.events
        assert isinstance(observed, EngineObserved)
        assert observed.prefill_tokens_total == 505
        assert isinstance(refused, EngineUnreachable)
        assert refused.detail == "/metrics sent over 300000 bytes"

    async def test_an_engine_removed_during_its_poll_is_not_told_about(self, page_engines: Any, seen: Seen) -> None:
        engine = page_engines()
        engine.hang = True
        async with scraper(seen) as scrape:
            scrape.configure([spec("d0", engine.url)])
            poll = asyncio.create_task(scrape.poll_once())
            assert await asyncio.to_thread(engine.reached.wait, BUDGET_S)
            scrape.configure([])
            engine.hang = False
            await poll
        assert seen.events == []


class TestModels:
    async def test_they_are_asked_rarely(self, page_engines: Any, seen: Seen) -> None:
        engine = page_engines()
        async with scraper(seen) as scrape:
            scrape.configure([spec("d0", engine.url)])
            for _ in range(3):
                await scrape.poll_once()
            assert engine.asked.count("/v1/models") == 1
            seen.jump_ms = FAST.models_interval_ms
            await scrape.poll_once()
        assert engine.asked.count("/v1/models") == 2

    async def test_and_again_after_a_restart_and_after_a_failure(self, page_engines: Any, seen: Seen) -> None:
        engine = page_engines()
        async with scraper(seen) as scrape:
            scrape.configure([spec("d0", engine.url)])
            await scrape.poll_once()
            engine.page = engine.page.replace(b"1.79538744644e+09", b"1.79538749999e+09")
            engine.models = {"data": [{"id": "another", "max_model_len": 7}]}
            await scrape.poll_once()
            engine.status = {"/health": 503}
            await scrape.poll_once()
            engine.status = {}
            await scrape.poll_once()
        assert engine.asked.count("/v1/models") == 3
        first, restarted, failed, back = seen.events
        assert isinstance(first, EngineObserved)
        assert isinstance(restarted, EngineObserved)
        assert isinstance(failed, EngineUnreachable)
        assert isinstance(back, EngineObserved)
        assert restarted.models == ("another",)
        assert first.incarnation != restarted.incarnation == back.incarnation


class TestRunning:
    async def test_each_engine_is_polled_again_and_again_one_poll_at_a_time(
        self, page_engines: Any, seen: Seen
    ) -> None:
        engines = [page_engines(), page_engines()]
        async with running(seen, *(spec(f"d{number}", engine.url) for number, engine in enumerate(engines))):
            await seen.until(lambda: all(len(seen.of(engine_id)) >= 4 for engine_id in ("d0", "d1")))
        assert [engine.in_flight_max for engine in engines] == [1, 1]
        instants = [event.now_ms for event in seen.events]
        assert instants == sorted(instants)

    async def test_a_hanging_engine_delays_nobody(self, page_engines: Any, seen: Seen) -> None:
        stuck, well = page_engines(), page_engines()
        stuck.hang = True
        async with running(seen, spec("stuck", stuck.url), spec("well", well.url)):
            await seen.until(lambda: len(seen.of("well")) >= 4)
            assert seen.of("stuck") == []
            assert stuck.in_flight_max == 1
            stuck.hang = False
            await seen.until(lambda: len(seen.of("stuck")) >= 2)

    async def test_the_fleet_changes_while_it_runs(self, page_engines: Any, seen: Seen) -> None:
        old, new = page_engines(), page_engines()
        async with running(seen) as scrape:
            await asyncio.sleep(0)
            scrape.configure([spec("a", old.url), spec("b", old.url)])
            await seen.until(lambda: len(seen.of("a")) >= 2 and len(seen.of("b")) >= 2)
            scrape.configure([spec("b", new.url), spec("c", new.url)])
            told_about_a = len(seen.of("a"))
            asked_of_old = len(old.asked)
            await seen.until(lambda: len(seen.of("c")) >= 3 and new.asked.count("/health") >= 6)
            assert len(seen.of("a")) == told_about_a
            assert new.asked.count("/v1/models") == 2, "b at its new place is another engine, whatever its name"
            assert len(old.asked) <= asked_of_old + 2, "at most what was on its way already"

    async def test_a_changed_engine_at_the_same_place_goes_on_undisturbed(self, page_engines: Any, seen: Seen) -> None:
        engine = page_engines()
        engine.models = {"data": [{"id": "m", "max_model_len": 5}, {"id": "n", "max_model_len": 9}]}
        async with running(seen, spec("d0", engine.url, "m")) as scrape:
            await seen.until(lambda: len(seen.events) >= 1)
            scrape.configure([spec("d0", engine.url, "n")])
            await seen.until(lambda: seen.events[-1].max_model_len_tokens == 9)  # type: ignore[union-attr]
        assert engine.asked.count("/v1/models") == 1

    async def test_what_the_callback_raises_ends_it(self, page_engines: Any, seen: Seen) -> None:
        engine = page_engines()

        def refuse(event: object) -> None:
            raise RuntimeError("the core has a bug")

        async with Scraper(FAST, emit=refuse, now_ms=seen.now_ms) as scrape:
            scrape.configure([spec("d0", engine.url)])
            with pytest.RaisesGroup(pytest.RaisesExc(RuntimeError, match="the core has a bug")):
                async with asyncio.timeout(BUDGET_S):
                    await scrape.run()


@pytest.mark.parametrize(("now_s", "due_s"), [(9.0, 10.25), (10.25, 10.25), (10.26, 10.75), (12.8, 13.25)])
def test_engines_keep_their_distance_whatever_held_them_up(now_s: float, due_s: float) -> None:
    assert next_due_s(10.25, now_s=now_s, interval_s=0.5) == due_s
