"""Forks (gunicorn preload, celery, multiprocessing): nothing of the parent's is used, renewed or given back twice."""

from __future__ import annotations

import json
import os
import threading

import httpx2

from conserve_sdk import ConServe, conversation
from conserve_sdk.transport import _pools
from tests.support.loopback import MODEL, eventually

MESSAGES = [{"role": "user", "content": "hello " * 400}]
CHILDREN = 4


def ask(conserve: ConServe, name: str) -> None:
    with conversation(name):
        conserve.openai_client(max_retries=0).chat.completions.create(model=MODEL, messages=MESSAGES)


def test_children_and_parent_use_disjoint_connections(engine, front, fork_and_wait, monkeypatch) -> None:
    monkeypatch.setattr(_pools, "LIMITS", httpx2.Limits(keepalive_expiry=None))  # however long the children take
    server = engine()
    conserve = front(d0=server)
    ask(conserve, "warm")
    for number in range(CHILDREN):
        assert fork_and_wait(lambda name=f"child-{number}": ask(conserve, name)) == 0
    ask(conserve, "warm")
    ports = [request.port for request in server.requests]
    assert len(ports) == CHILDREN + 2
    assert len(set(ports[1:-1])) == CHILDREN
    assert ports[0] == ports[-1]
    assert ports[0] not in ports[1:-1]


def test_a_child_has_a_reporter_of_its_own_and_says_nothing_twice(stack, fork_and_wait, tmp_path) -> None:
    conserve = ConServe(stack.broker_url)
    client = conserve.openai_client(max_retries=0)

    def turn(name: str) -> str:
        with conversation(name):
            raw = client.chat.completions.with_raw_response.create(model=stack.model, messages=MESSAGES, max_tokens=4)
        return raw.headers["x-conserve-lease"]

    parents = turn("parent")
    assert [thread.name for thread in threading.enumerate()].count("conserve-reporter") == 1

    def child() -> None:
        assert not any(thread.name == "conserve-reporter" and thread.is_alive() for thread in threading.enumerate())
        mine = turn("child")
        assert conserve.flush()  # by its own thread: the parent's does not run here
        assert any(thread.name == "conserve-reporter" and thread.is_alive() for thread in threading.enumerate())
        again = turn("parent")  # the parent's conversation goes on in the child under the lease it has
        conserve.close()
        (tmp_path / "child.json").write_text(json.dumps({"pid": os.getpid(), "mine": mine, "again": again}))

    assert fork_and_wait(child) == 0
    told = json.loads((tmp_path / "child.json").read_text())
    assert told["pid"] != os.getpid()
    assert told["again"] == parents
    assert told["mine"] != parents
    assert turn("parent") == parents
    assert conserve.release("parent") == 1
    conserve.close()


def test_a_child_that_gives_everything_back_keeps_the_parents_leases_alive(engine, front, fork_and_wait) -> None:
    """`close(release=True)` in a child releases what the child leased, not what the parent did."""
    server = engine()
    conserve = front(d0=server)
    ask(conserve, "parent")
    assert conserve.flush()
    released = len(conserve.broker.exchanges)

    def child() -> None:
        conserve.close(release=True)
        deletes = [e for e in conserve.broker.exchanges[released:] if e.method == "DELETE"]
        assert deletes == []
        assert conserve.broker.core.lease_count() == 1

    assert fork_and_wait(child) == 0
    ask(conserve, "parent")
    assert conserve.release("parent") == 1
    assert conserve.release("parent") == 0


def test_a_fork_in_the_middle_of_a_stream_leaves_it_to_the_parent(engine, front, fork_and_wait) -> None:
    server = engine("hold_stream")
    conserve = front(d0=server)
    with conversation("streaming"):
        stream = conserve.openai_client(max_retries=0).chat.completions.create(
            model=MODEL, messages=MESSAGES, stream=True
        )
    next(iter(stream))
    assert fork_and_wait(lambda: ask(conserve, "child")) == 0
    assert server.aborted == 0  # the child's end has not closed it
    stream.close()
    eventually(lambda: server.aborted == 1)
