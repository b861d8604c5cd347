"""Two hundred clients cost what one costs: no descriptor, TLS context, pool or thread more."""

from __future__ import annotations

import ssl
import sys
import threading
from collections import Counter
from pathlib import Path

import httpx2
import pytest

import conserve_sdk
from conserve_langgraph import ConServeChat
from conserve_sdk import conversation
from conserve_sdk._http1 import AsyncHttp1Transport, Http1Transport
from tests.support.loopback import MODEL

CLIENTS = 200
MESSAGES = [{"role": "user", "content": "hello"}]


@pytest.fixture
def built(monkeypatch):
    """Counts what is expensive to build."""
    counts: Counter[str] = Counter()

    def count(owner: type, name: str, method: str = "__init__") -> None:
        real = getattr(owner, method)

        def counted(self, *args, **kwargs):
            counts[name] += 1
            return real(self, *args, **kwargs)

        monkeypatch.setattr(owner, method, counted)

    for transport in (httpx2.HTTPTransport, httpx2.AsyncHTTPTransport, Http1Transport, AsyncHttp1Transport):
        count(transport, "pool")
    count(ssl.SSLContext, "trusted certificates", "load_default_certs")
    count(ssl.SSLContext, "trusted certificates", "load_verify_locations")
    monkeypatch.setattr(httpx2, "create_ssl_context", lambda *_a, **_k: pytest.fail("a TLS context for plain HTTP"))
    return counts


def descriptors() -> int:
    return len(list(Path("/proc/self/fd").iterdir()))


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts descriptors in /proc")
def test_openai_clients_cost_nothing_more(engine, front, built) -> None:
    server = engine()
    conserve = front(d0=server)

    def use_one() -> None:
        with conversation("c"):
            conserve.openai_client().chat.completions.create(model=MODEL, messages=MESSAGES)
        conserve.async_openai_client()

    use_one()
    before, pools, threads = descriptors(), dict(built), threading.active_count()
    kept = [use_one() for _ in range(CLIENTS)]
    assert len(kept) == CLIENTS
    assert descriptors() == before
    assert dict(built) == pools
    assert pools == {"pool": 1}
    assert threading.active_count() == threads
    assert len(server.ports) == 1


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="counts descriptors in /proc")
def test_chat_models_cost_nothing_more(stack, built) -> None:
    def make() -> ConServeChat:
        return ConServeChat(model=stack.model, broker_url=stack.broker_url)

    first = make()
    try:
        first.invoke("hello")
        conserve_sdk.connect(stack.broker_url).flush()
        before, pools, threads = descriptors(), dict(built), threading.active_count()
        models = [make() for _ in range(CLIENTS)]
        assert dict(built) == pools
        assert descriptors() == before
        assert threading.active_count() == threads
        assert {id(model.conserve) for model in models} == {id(first.conserve)}
        models[-1].invoke("hello")
        assert dict(built) == pools
    finally:
        first.conserve.close()
