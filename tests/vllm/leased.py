"""The application's side of the path on real vLLM: a broker, the SDK, conversations, and a hand in the network."""

from __future__ import annotations

import json
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import anyio
import httpx2
import openai

from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_lab.vllm import EngineCounters, VllmFleet
from conserve_sdk import ConServe, conversation
from conserve_sdk.telemetry import TurnCollector, TurnRecord

if TYPE_CHECKING:
    from .raw import RawProtocol

READY_BUDGET_S = 60.0
SETTLE_BUDGET_S = 30.0
DECODERS = ("d0", "d1")
HOLD_OFF = {"lease": {"hold_ms": 0}}

Json = dict[str, Any]


@contextmanager
def within(budget_s: float) -> Iterator[None]:
    """The block must not hang: its budget is for a loaded machine and says nothing about speed."""
    started_s = time.monotonic()
    yield
    took_s = time.monotonic() - started_s
    assert took_s < budget_s, f"took {took_s:.1f} s of {budget_s:.0f} s"


class Stage:
    """Brokers and SDKs over the fleet, closed in the end; every turn is noted in `turns`."""

    def __init__(self, fleet: VllmFleet, raw: RawProtocol, folder: Path) -> None:
        self.fleet = fleet
        self.raw = raw
        self.turns = TurnCollector()
        self._folder = folder
        self._exit = ExitStack()

    def broker(
        self,
        *,
        preset: str = "paper",
        engines: list[Json] | None = None,
        journal: bool = False,
        ready: int | None = None,
        **tables: Any,
    ) -> BrokerServer:
        """Start a broker that sees the engines, or `ready` of them; `paper` migrates every first turn."""
        entries = self.fleet.broker_engines() if engines is None else engines
        config = BrokerConfig.from_mapping(
            {
                "listen": {"port": 0},
                "placement": {"preset": preset},
                "scrape": {"interval_ms": 200},
                "journal": {"path": str(self._folder / "leases.sqlite") if journal else ""},
                "token": {"keys": [self.fleet.token_key]},
                "engine": entries,
                **tables,
            }
        )
        broker = self._exit.enter_context(BrokerServer(config))
        broker.wait_until_ready(timeout_s=READY_BUDGET_S, engines=len(entries) if ready is None else ready)
        return broker

    def sdk(self, broker: BrokerServer | str, **options: Any) -> ConServe:
        """An SDK of its own for the test; async tests also leave it with `async with`."""
        url = broker if isinstance(broker, str) else broker.url
        return self._exit.enter_context(ConServe(url, on_turn=self.turns, **options))

    def client(self, conserve: ConServe, **options: Any) -> openai.OpenAI:
        """A blocking client that leaves failures to ConServe, unless told otherwise."""
        return self._exit.enter_context(conserve.openai_client(**{"max_retries": 0, **options}))

    def network(self, **hands: Any) -> Network:
        """A network between SDK and engines with hands in it."""
        return self._exit.enter_context(Network(self.fleet, **hands))

    @property
    def last(self) -> TurnRecord:
        """The turn that ended last."""
        return self.turns.records[-1]

    @property
    def last_s(self) -> float:
        """How long that turn took: from its arrival in the SDK to its last byte."""
        return self.last.duration_ms / 1000

    def close(self) -> None:
        """Close everything, the newest first."""
        self._exit.close()


class Conversation:
    """A greedy conversation over one of OpenAI's APIs. `body` is the next request, `hear` takes its answer."""

    def __init__(
        self, stage: Stage, name: str, *, api: str = "chat/completions", words: int = 120, **extra: Any
    ) -> None:
        self.name = name
        self.api = api
        self.said: list[str] = []
        self.limit = 16
        self._stage = stage
        self._extra = extra
        self._prompt = stage.raw.prose(name, words)
        self._messages: list[Json] = stage.raw.task(name, words=words)

    @property
    def body(self) -> Json:
        """The next request, as any client would send it."""
        common = {"model": self._stage.fleet.model, "temperature": 0, **self._extra}
        if self.api == "completions":
            return {**common, "prompt": self._prompt, "max_tokens": self.limit}
        if self.api == "responses":
            return {**common, "input": list(self._messages), "max_output_tokens": self.limit}
        return {**common, "messages": list(self._messages), "max_tokens": self.limit}

    def hear(self, text: str) -> None:
        """Go on after an answer; it must be the one that an aggregated server gives."""
        turn = len(self.said) + 1
        expected = self._stage.raw.said(self._stage.raw.ask("a0", self.body, path=self.api))
        assert text == expected, f"{self.name}: turn {turn} differs from the aggregated server"
        self.said.append(text)
        question = f" go on {turn}"
        self._prompt += text + question
        self._messages += [{"role": "assistant", "content": text}, {"role": "user", "content": question}]

    def add(self, text: str) -> None:
        """Say more before the next turn."""
        self._prompt += text
        self._messages[-1] = {**self._messages[-1], "content": self._messages[-1]["content"] + text}

    def ask(self, client: openai.OpenAI, *, stream: bool = False, **extra: Any) -> str:
        """One turn by a blocking client; returns the answer, which was compared with the reference."""
        with conversation(self.name):
            answer = _call(client, self.api)(**self.body, **extra, stream=stream)
            text = "".join(map(text_of_event, answer)) if stream else text_of(answer)
        self.hear(text)
        return text

    async def aask(self, client: openai.AsyncOpenAI, *, stream: bool = False, **extra: Any) -> str:
        """One turn by an async client."""
        with conversation(self.name):
            answer = await _call(client, self.api)(**self.body, **extra, stream=stream)
            text = "".join([text_of_event(event) async for event in answer]) if stream else text_of(answer)
        await anyio.to_thread.run_sync(self.hear, text)
        return text


def _call(client: Any, api: str) -> Callable[..., Any]:
    routes = {"chat/completions": client.chat.completions, "completions": client.completions}
    return routes.get(api, client.responses).create


def text_of(answer: Any) -> str:
    """The text of a whole answer, whichever API gave it."""
    if hasattr(answer, "output_text"):
        return str(answer.output_text)
    choice = answer.choices[0]
    return str(choice.text if hasattr(choice, "text") else choice.message.content)


def text_of_event(event: Any) -> str:
    """The text that an event of a stream adds."""
    if hasattr(event, "type"):
        return str(event.delta) if event.type == "response.output_text.delta" else ""
    if not event.choices:
        return ""
    choice = event.choices[0]
    return str((choice.text if hasattr(choice, "text") else choice.delta.content) or "")


@dataclass(frozen=True)
class Counted:
    """What vLLM counted since some moment: on the prefiller, and on both decoders together."""

    prefiller: EngineCounters
    decoders: EngineCounters


class Meter:
    """Reads vLLM's own counters over a stretch of a test. No engine may restart meanwhile."""

    def __init__(self, fleet: VllmFleet) -> None:
        self._fleet = fleet
        self._before = self._read()

    def settled(self, *, requests: int, transfers: int = 0) -> Counted:
        """The counters once the decoders have counted so many requests and transfers (perhaps more), and are idle."""
        deadline_s = time.monotonic() + SETTLE_BUDGET_S
        while True:
            now = self._read()
            counted = {engine_id: now[engine_id].since(self._before[engine_id]) for engine_id in now}
            result = Counted(counted["p0"], counted["d0"] + counted["d1"])
            if result.decoders.requests >= requests and result.decoders.transfers >= transfers and not _busy(now):
                return result
            assert time.monotonic() < deadline_s, f"never counted {requests} requests, {transfers} transfers: {result}"
            time.sleep(0.05)

    def _read(self) -> dict[str, EngineCounters]:
        return {engine_id: self._fleet.metrics(engine_id) for engine_id in ("p0", *DECODERS)}


def _busy(counters: Mapping[str, EngineCounters]) -> bool:
    return any(engine.running or engine.waiting for engine in counters.values())


@dataclass(frozen=True)
class Call:
    """A request on its way to an engine."""

    engine_id: str
    body: Json

    @property
    def params(self) -> Json:
        """Its transfer params."""
        return dict(self.body.get("kv_transfer_params") or {})

    @property
    def pulls(self) -> bool:
        """Whether it makes the engine pull KV from a prefiller."""
        return self.params.get("do_remote_prefill") is True


class Network(httpx2.BaseTransport):
    """The way from the SDK to the engines. Notes every call, and lets a test act in between.

    Args:
        before: called with each request; a response it returns is given instead of the engine's.
        after: called with each request once the engine has answered and before the SDK knows.
    """

    def __init__(
        self,
        fleet: VllmFleet,
        *,
        before: Callable[[Call], httpx2.Response | None] = lambda _call: None,
        after: Callable[[Call], None] = lambda _call: None,
    ) -> None:
        self.calls: list[Call] = []
        self._ids = {engine.url: engine_id for engine_id, engine in fleet.engines.items()}
        self._before = before
        self._after = after
        self._inner = httpx2.HTTPTransport()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Pass a request on, and the whole of its answer back."""
        engine_id = self._ids[f"{request.url.scheme}://{request.url.netloc.decode('ascii')}"]
        call = Call(engine_id, json.loads(request.read()))
        self.calls.append(call)
        instead = self._before(call)
        if instead is not None:
            return instead
        answer = self._inner.handle_request(request)
        content = answer.read()
        answer.close()
        self._after(call)
        return httpx2.Response(answer.status_code, headers=answer.headers, content=content)

    def close(self) -> None:
        """Close the connections."""
        self._inner.close()
