"""Clients of the broker in both colours, and brokers that play a script."""

import asyncio

import httpx2

from conserve_sdk._broker_client import AsyncBrokerClient, SyncBrokerClient
from conserve_sdk.protocol import (
    LeaseRequest,
)
from conserve_sdk.testing import FakeClock

from .grants import grant

REQUEST = LeaseRequest(conversation_id="c", lineage="l", model="test-model", first_turn_input_tokens=1_000)


class Colour:
    """One client, called the same way whichever colour it has; time is the fake clock's."""

    def __init__(self, name: str) -> None:
        self.name = name
        self.clock = FakeClock()
        self.jitter = 1.0
        self.sleeps: list[float] = []

    def client(self, transport, urls=("http://broker.invalid",), **options):
        kind = SyncBrokerClient if self.name == "sync" else AsyncBrokerClient
        return kind(
            urls,
            transport=transport,
            sleep=self.sleep if self.name == "sync" else self.asleep,
            clock=self.clock.monotonic_s,
            jitter=lambda: self.jitter,
            **options,
        )

    def sleep(self, seconds: float) -> None:
        self.sleeps.append(round(seconds, 3))
        self.clock.advance(round(seconds * 1000))

    async def asleep(self, seconds: float) -> None:
        self.sleep(seconds)

    def run(self, answer):
        return answer if self.name == "sync" else asyncio.run(answer)


class Script:
    """A broker that plays a list of answers; a number is a status, an exception is raised."""

    def __init__(self, *answers, clock: FakeClock | None = None, takes_ms: int = 0) -> None:
        self.answers = list(answers)
        self.requests: list[httpx2.Request] = []
        self.clock, self.takes_ms = clock, takes_ms

    def __call__(self, request: httpx2.Request) -> httpx2.Response:
        self.requests.append(request)
        if self.clock:
            self.clock.advance(self.takes_ms)
        answer = self.answers.pop(0) if len(self.answers) > 1 else self.answers[0]
        if isinstance(answer, Exception):
            raise answer
        if isinstance(answer, int):
            return httpx2.Response(answer, text="not a problem document")
        return httpx2.Response(answer.status_code, headers=answer.headers, content=answer.content)  # one per request

    @property
    def hosts(self) -> list[str]:
        return [request.url.host for request in self.requests]


def problem(status: int, code: str, *, retry_after_ms: int | None = None, headers=None) -> httpx2.Response:
    body = {"title": "t", "status": status, "detail": "the detail", "code": code, "retry_after_ms": retry_after_ms}
    return httpx2.Response(status, json=body, headers=headers)


def granted(**changes) -> httpx2.Response:
    return httpx2.Response(201, content=grant(**changes).model_dump_json())
