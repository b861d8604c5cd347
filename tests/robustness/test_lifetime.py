"""The end: closing twice, closing in any order, and nothing left running or open when a program is over."""

from __future__ import annotations

import asyncio
import gc
import subprocess
import sys
import threading
import warnings

import pytest

from conserve_sdk import ConServe, conversation
from tests.support.loopback import MODEL, eventually

MESSAGES = [{"role": "user", "content": "hello " * 300}]

PROGRAMS = {
    "closed": """
with ConServe(url) as conserve:
    client = conserve.openai_client(max_retries=0)
    turn(client)
    conserve.close()
    conserve.close(release=True)
client.close()
""",
    "never_closed": """
conserve = ConServe(url)
turn(conserve.openai_client(max_retries=0))
asyncio.run(aturn(conserve.async_openai_client(max_retries=0)))
""",
    "shared_and_never_closed": """
turn(conserve_sdk.openai_client(url, max_retries=0))
asyncio.run(aturn(conserve_sdk.async_openai_client(url, max_retries=0)))
""",
    "async_and_closed": """
async def main():
    async with ConServe(url) as conserve:
        await aturn(conserve.async_openai_client(max_retries=0))
        await conserve.aclose()
        await conserve.aclose(release=True)
    left = asyncio.all_tasks() - {asyncio.current_task()}
    assert not left, left
asyncio.run(main())
""",
    "in_threads": """
conserve = ConServe(url)
threads = [threading.Thread(target=turn, args=(conserve.openai_client(max_retries=0),)) for _ in range(4)]
for thread in threads: thread.start()
for thread in threads: thread.join()
conserve.close()
""",
}

HEAD = """
import asyncio, atexit, sys, threading
def nothing_runs():
    left = [t.name for t in threading.enumerate() if t is not threading.main_thread() and t.name.startswith("conserve")]
    assert not left, left
    print("over")
atexit.register(nothing_runs)  # the first to be registered is the last to run
import conserve_sdk
from conserve_sdk import ConServe, conversation
url, model = sys.argv[1:]
ask = dict(model=model, messages=[{"role": "user", "content": "hello " * 300}], max_tokens=4)

def turn(client):
    with conversation("c"):
        client.chat.completions.create(**ask)
        list(client.chat.completions.create(stream=True, **ask))

async def aturn(client):
    with conversation("c"):
        await client.chat.completions.create(**ask)
        stream = await client.chat.completions.create(stream=True, **ask)
        assert [chunk async for chunk in stream]
"""


@pytest.mark.parametrize("program", PROGRAMS.values(), ids=PROGRAMS)
def test_a_program_ends_clean(stack, program) -> None:
    """No warning of a socket, loop or file left open, no thread that outlives the program, no wait at its end."""
    ran = subprocess.run(
        [
            sys.executable,
            "-W",
            "error::ResourceWarning",
            "-W",
            "error::RuntimeWarning",
            "-c",
            HEAD + program,
            stack.broker_url,
            stack.model,
        ],
        capture_output=True,
        text=True,
        check=False,
        timeout=150,
    )
    # An error in a finaliser cannot fail a program; it is printed.
    assert (ran.returncode, ran.stdout.split(), ran.stderr) == (0, ["over"], "")


def test_closing_in_any_order_and_any_number_of_times(engine, front) -> None:
    conserve = front(d0=engine())
    client = conserve.openai_client(max_retries=0)
    with conversation("c"):
        client.chat.completions.create(model=MODEL, messages=MESSAGES)
    threads = [threading.Thread(target=conserve.close) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    client.close()
    client.close()
    conserve.close(release=True)
    asyncio.run(conserve.aclose())
    asyncio.run(conserve.aclose(release=True))
    assert conserve.closed
    assert conserve.broker.core.lease_count() == 1  # a lease belongs to its conversation, not to this object
    assert not [thread for thread in threading.enumerate() if thread.name == "conserve-reporter"]


def test_a_loop_that_ends_leaves_no_task_and_no_socket(engine, front) -> None:
    server = engine()
    conserve = front(p0=server, d0=server)
    left: set[asyncio.Task] = set()

    async def go() -> None:
        with conversation("c"):
            await conserve.async_openai_client().chat.completions.create(model=MODEL, messages=MESSAGES)
        left.update(asyncio.all_tasks() - {asyncio.current_task()})

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        asyncio.run(go())
        gc.collect()
    assert not left
    eventually(lambda: not server.open)


def test_an_object_that_is_dropped_ends_its_thread_with_the_program_only(stack) -> None:
    """Renewals stop with the leases' use, not with the application's last reference to the client."""
    conserve = ConServe(stack.broker_url)
    with conversation("dropped"):
        conserve.openai_client().chat.completions.create(model=stack.model, messages=MESSAGES, max_tokens=4)
    assert conserve.flush()
    registry = conserve._runtime.kit.registry
    assert registry.due_renewals(now_ms=10**15) == []  # the turn is over: nothing is in use, nothing is renewed
    assert registry.next_renewal_ms(now_ms=0) is None
    conserve.close()
