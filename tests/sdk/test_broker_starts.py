"""Many calls to a broker in the same instant are begun a few at a time, and those that wait do not grow old."""

import asyncio

import httpx2
import pytest

from conserve_sdk import BrokerUnavailable
from conserve_sdk._broker_client import AsyncBrokerClient
from conserve_sdk._broker_starts import AT_ONCE, Starts
from conserve_sdk.protocol import EngineList

MANY = 3 * AT_ONCE
BUDGET_S = 30.0
ENGINES = EngineList(engines=()).model_dump_json().encode()


class Gate(httpx2.AsyncBaseTransport):
    """A broker that answers when it is told to."""

    def __init__(self) -> None:
        self.inside = self.most = self.seen = 0
        self.open = asyncio.Event()
        self.timeouts: list[float] = []

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        self.seen += 1
        self.inside += 1
        self.most = max(self.most, self.inside)
        self.timeouts.append(request.extensions["timeout"]["read"])
        try:
            await self.open.wait()
        finally:
            self.inside -= 1
        return httpx2.Response(200, content=ENGINES)


async def until(condition) -> None:
    async with asyncio.timeout(BUDGET_S):
        while not condition():  # noqa: ASYNC110  what is waited for has no event
            await asyncio.sleep(0.001)


@pytest.fixture
def anyio_backend() -> str:
    return "asyncio"


async def test_a_few_at_a_time_and_all_in_the_end() -> None:
    gate = Gate()
    client = AsyncBrokerClient(["http://broker.invalid"], transport=gate)
    async with asyncio.TaskGroup() as group:
        calls = [group.create_task(client.engines(budget_ms=60_000)) for _ in range(MANY)]
        await until(lambda: gate.inside == AT_ONCE)
        gate.open.set()
    assert [call.result().engines for call in calls] == [()] * MANY
    assert (gate.seen, gate.most) == (MANY, AT_ONCE)


async def test_a_calls_timeout_runs_from_its_own_start() -> None:
    clock_s = 0.0
    gate = Gate()
    client = AsyncBrokerClient(["http://broker.invalid"], transport=gate, clock=lambda: clock_s)
    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE + 1):
            group.create_task(client.engines(budget_ms=8_000))
        await until(lambda: gate.inside == AT_ONCE)
        clock_s = 4.0  # of the 5 s that one attempt may take, and of the 8 that all may
        gate.open.set()
    assert gate.timeouts == [5.0] * AT_ONCE + [4.0]


async def test_whoever_may_wait_for_admission_keeps_nobody_else_waiting() -> None:
    starts, let_in, done = Starts(), [], asyncio.Event()

    async def waits_long() -> None:
        async with starts.one(within_s=BUDGET_S, may_wait=True):
            let_in.append(1)
            await done.wait()

    async with asyncio.TaskGroup() as group:
        for _ in range(MANY):
            group.create_task(waits_long())
        await until(lambda: len(let_in) == MANY)  # though none has been answered
        done.set()
    assert not starts._free.locked()
    assert starts._free._value == AT_ONCE, "each place was left once"


async def test_a_call_whose_turn_never_comes_says_why() -> None:
    gate = Gate()
    client = AsyncBrokerClient(["http://broker.invalid"], transport=gate)
    async with asyncio.TaskGroup() as group:
        for _ in range(AT_ONCE):
            group.create_task(client.engines(budget_ms=60_000))
        await until(lambda: gate.inside == AT_ONCE)
        with pytest.raises(BrokerUnavailable, match="other calls of this process came first"):
            await client.engines(budget_ms=50)
        gate.open.set()


async def test_a_call_that_is_cancelled_leaves_its_place() -> None:
    gate = Gate()
    client = AsyncBrokerClient(["http://broker.invalid"], transport=gate)
    calls = [asyncio.create_task(client.engines(budget_ms=60_000)) for _ in range(MANY)]
    await until(lambda: gate.inside == AT_ONCE)
    for call in calls:
        call.cancel()
    await asyncio.gather(*calls, return_exceptions=True)
    gate.open.set()
    assert (await client.engines()).engines == ()
    assert gate.inside == 0
