"""Plain HTTP/1.1 to engines: over real sockets, in both colours, and held against h11."""

from __future__ import annotations

import asyncio
import socket
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import h11
import httpx2
import pytest
from hypothesis import given
from hypothesis import strategies as st

from conserve_sdk._http1 import AsyncHttp1Transport, Http1Transport, is_plain
from conserve_sdk._http1 import _looped as looped
from conserve_sdk._http1._answer import HEAD_BYTES_MAX, AnswerReader
from conserve_sdk._http1._blocking import _Connection
from conserve_sdk._http1._idle import IdleConnections
from conserve_sdk._http1._request import Origin, wire_form
from tests.support.loopback import aeventually

LIMITS = httpx2.Limits(max_connections=2, max_keepalive_connections=2, keepalive_expiry=None)
OK = b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\nok"
CHUNKED = b"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\n\r\n"

Serve = Callable[[socket.socket], object]


class Peer:
    """Answers each connection as the test says; `requests` holds what came, by connection."""

    def __init__(self, serve: Serve) -> None:
        peer = self
        self.requests: list[bytes] = []
        self.connections = 0

        class Handler(socketserver.BaseRequestHandler):
            def handle(self) -> None:
                peer.connections += 1
                serve(self.request)

        self.server = socketserver.ThreadingTCPServer(("127.0.0.1", 0), Handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_address[1]}/v1/x?y=1"


@contextmanager
def peer(serve: Serve) -> Iterator[Peer]:
    running = Peer(serve)
    thread = threading.Thread(target=running.server.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield running
    finally:
        running.server.shutdown()
        running.server.server_close()
        thread.join()


def read_request(link: socket.socket) -> bytes:
    """One whole request, or what came before the end of the connection."""
    server, got = h11.Connection(h11.SERVER), b""
    while True:
        event = server.next_event()
        if event is h11.NEED_DATA:
            data = link.recv(65_536)
            got += data
            server.receive_data(data)
        elif isinstance(event, h11.EndOfMessage | h11.ConnectionClosed):
            return got


def always(*answers: bytes) -> Serve:
    """Each request gets the answers' pieces, one after another."""

    def serve(link: socket.socket) -> None:
        while read_request(link):
            for piece in answers:
                link.sendall(piece)

    return serve


def once(*answers: bytes) -> Serve:
    """One request gets the answers' pieces, then the connection is closed."""

    def serve(link: socket.socket) -> None:
        read_request(link)
        for piece in answers:
            link.sendall(piece)

    return serve


def request_to(url: str, *, timeout: dict[str, float] | None = None, content: bytes = b"{}") -> httpx2.Request:
    return httpx2.Request("POST", url, content=content, extensions={"timeout": timeout or {}})


Talk = Callable[[list[httpx2.Request]], list[httpx2.Response]]


def blocking(requests: list[httpx2.Request]) -> list[httpx2.Response]:
    transport, answers = Http1Transport(limits=LIMITS), []
    try:
        for request in requests:
            answer = transport.handle_request(request)
            try:
                answer.read()
            finally:
                answer.close()
            answers.append(answer)
    finally:
        transport.close()
    return answers


def awaited(requests: list[httpx2.Request]) -> list[httpx2.Response]:
    async def go() -> list[httpx2.Response]:
        transport, answers = AsyncHttp1Transport(limits=LIMITS), []
        try:
            for request in requests:
                answer = await transport.handle_async_request(request)
                try:
                    await answer.aread()
                finally:
                    await answer.aclose()
                answers.append(answer)
        finally:
            await transport.aclose()
        return answers

    return asyncio.run(go())


both = pytest.mark.parametrize("talk", [blocking, awaited])


class TestAnswers:
    @both
    @pytest.mark.parametrize(
        ("pieces", "body"),
        [
            pytest.param([OK], b"ok", id="length"),
            pytest.param([CHUNKED, b"2\r\nok\r\n", b"0\r\n\r\n"], b"ok", id="chunked"),
            pytest.param([CHUNKED + b"1\r\no\r\n1;ext=1\r\nk\r\n0\r\nTrailer: x\r\n\r\n"], b"ok", id="trailer"),
            pytest.param([b"HTTP/1.1 100 Continue\r\n\r\n", OK], b"ok", id="interim"),
            pytest.param([b"HTTP/1.1 204 No Content\r\n\r\n"], b"", id="none"),
        ],
    )
    def test_a_connection_serves_one_request_after_another(self, talk: Talk, pieces, body) -> None:
        with peer(always(*pieces)) as engine:
            answers = talk([request_to(engine.url) for _ in range(3)])
        assert [answer.content for answer in answers] == [body] * 3
        assert {answer.http_version for answer in answers} == {"HTTP/1.1"}
        assert engine.connections == 1

    @both
    @pytest.mark.parametrize(
        "answer",
        [
            pytest.param(b"HTTP/1.1 200 OK\r\nConnection: close\r\nContent-Length: 2\r\n\r\nok", id="close"),
            pytest.param(b"HTTP/1.1 200 OK\r\n\r\nok", id="until-the-end"),
            pytest.param(b"HTTP/1.0 200 OK\r\nContent-Length: 2\r\n\r\nok", id="http-1.0"),
            pytest.param(OK + b"HTTP/1.1 200 OK\r\n", id="more-than-asked-for"),
            pytest.param(OK + b"nonsense", id="nonsense-behind"),
        ],
    )
    def test_one_that_ends_with_its_answer_is_not_used_again(self, talk: Talk, answer: bytes) -> None:
        with peer(once(answer)) as engine:
            answers = talk([request_to(engine.url) for _ in range(2)])
        assert [answer.content for answer in answers] == [b"ok"] * 2
        assert engine.connections == 2

    @both
    def test_head_and_body_say_what_the_engine_said(self, talk: Talk) -> None:
        with peer(
            once(b"HTTP/1.1 503 Too Busy\r\nRetry-After: 1\r\nX-A: 1\r\nx-a: 2\r\nContent-Length: 0\r\n\r\n")
        ) as engine:
            (answer,) = talk([request_to(engine.url)])
        assert (answer.status_code, answer.reason_phrase) == (503, "Too Busy")
        assert answer.headers.raw == [(b"Retry-After", b"1"), (b"X-A", b"1"), (b"x-a", b"2"), (b"Content-Length", b"0")]

    @both
    def test_the_whole_request_goes_over(self, talk: Talk) -> None:
        got: list[bytes] = []
        sent = b'{"long": "%s"}' % (b"x" * 3_000_000)

        def serve(link: socket.socket) -> None:
            got.append(read_request(link))
            link.sendall(OK)

        with peer(serve) as engine:
            talk([request_to(engine.url, content=sent)])
        head, _, body = got[0].partition(b"\r\n\r\n")
        assert head.startswith(b"POST /v1/x?y=1 HTTP/1.1\r\nHost: 127.0.0.1:")
        assert body == sent


class TestFailures:
    @both
    @pytest.mark.parametrize(
        ("pieces", "error"),
        [
            pytest.param([], httpx2.RemoteProtocolError, id="nothing"),
            pytest.param([b"HTTP/1.1 200 OK\r\n"], httpx2.RemoteProtocolError, id="half-a-head"),
            pytest.param([OK[:-1]], httpx2.RemoteProtocolError, id="half-a-body"),
            pytest.param([CHUNKED + b"2\r\nok\r\n"], httpx2.RemoteProtocolError, id="no-last-chunk"),
            pytest.param([CHUNKED + b"zz\r\nok\r\n"], httpx2.RemoteProtocolError, id="no-chunk"),
            pytest.param([b"SSH-2.0-OpenSSH_9.6\r\n"], httpx2.RemoteProtocolError, id="another-protocol"),
            pytest.param(
                [b"HTTP/1.1 200 OK\r\n", b"A: " + b"x" * HEAD_BYTES_MAX], httpx2.RemoteProtocolError, id="endless-head"
            ),
        ],
    )
    def test_an_answer_that_is_none(self, talk: Talk, pieces, error) -> None:
        with peer(once(*pieces)) as engine, pytest.raises(error):
            talk([request_to(engine.url)])

    @both
    def test_nobody_there(self, talk: Talk) -> None:
        with socket.socket() as unused:
            unused.bind(("127.0.0.1", 0))
            with pytest.raises(httpx2.ConnectError):
                talk([request_to(f"http://127.0.0.1:{unused.getsockname()[1]}/")])

    @both
    def test_a_name_that_leads_nowhere(self, talk: Talk) -> None:
        with pytest.raises(httpx2.ConnectError):
            talk([request_to("http://nowhere.invalid/")])

    @both
    @pytest.mark.parametrize("said", [b"", b"HTTP/1.1 200 OK\r\nContent-Length: 2\r\n\r\no"], ids=["head", "body"])
    def test_an_engine_that_says_no_more(self, talk: Talk, said: bytes) -> None:
        over = threading.Event()

        def serve(link: socket.socket) -> None:
            read_request(link)
            link.sendall(said)
            over.wait(30)

        with peer(serve) as engine:
            with pytest.raises(httpx2.ReadTimeout):
                talk([request_to(engine.url, timeout={"read": 0.05})])
            over.set()

    @both
    def test_an_engine_that_does_not_listen_to_the_end(self, talk: Talk) -> None:
        over = threading.Event()
        with peer(lambda _: over.wait(30)) as engine:
            with pytest.raises(httpx2.WriteTimeout):
                talk([request_to(engine.url, timeout={"write": 0.05}, content=b"x" * 50_000_000)])
            over.set()

    @both
    def test_a_refusal_of_a_request_that_is_not_read_to_its_end(self, talk: Talk) -> None:
        """The answer counts, as far as the connection brings it; a connection in between is never used again."""

        def serve(link: socket.socket) -> None:
            link.recv(1_000)
            link.sendall(b"HTTP/1.1 413 Too Long\r\nConnection: close\r\nContent-Length: 0\r\n\r\n")

        with peer(serve) as engine:
            try:
                (answer,) = talk([request_to(engine.url, content=b"x" * 5_000_000)])
                assert answer.status_code == 413
            except (httpx2.ReadError, httpx2.WriteError):
                pass  # the reset was faster than the answer

    @pytest.mark.parametrize(
        "header", [("X-A", "1\r\nX-B: 2"), ("X-A", "1\n"), ("X-A", "\x00"), ("X A", "1"), ("X-A:", "1")]
    )
    def test_a_header_that_would_be_two(self, header: tuple[str, str]) -> None:
        request = httpx2.Request("POST", "http://127.0.0.1:1/", headers=[header], content=b"")
        with pytest.raises(httpx2.LocalProtocolError):
            wire_form(request)


class TestConnections:
    def test_one_that_is_in_use_by_all_is_waited_for(self) -> None:
        with peer(always(OK)) as engine:
            transport = Http1Transport(limits=LIMITS)
            held = [transport.handle_request(request_to(engine.url)) for _ in range(2)]
            with pytest.raises(httpx2.PoolTimeout):
                transport.handle_request(request_to(engine.url, timeout={"pool": 0.01}))
            held[0].close()
            transport.handle_request(request_to(engine.url, timeout={"pool": 5.0})).close()
            held[1].close()
            transport.close()

    def test_one_that_is_in_use_by_all_is_waited_for_async(self) -> None:
        async def go(url: str) -> None:
            transport = AsyncHttp1Transport(limits=LIMITS)
            held = [await transport.handle_async_request(request_to(url)) for _ in range(2)]
            with pytest.raises(httpx2.PoolTimeout):
                await transport.handle_async_request(request_to(url, timeout={"pool": 0.01}))
            waiting = asyncio.create_task(transport.handle_async_request(request_to(url, timeout={"pool": 5.0})))
            await held[0].aclose()
            await (await waiting).aclose()
            await held[1].aclose()
            await transport.aclose()

        with peer(always(OK)) as engine:
            asyncio.run(go(engine.url))

    def test_one_that_was_closed_while_it_waited_is_seen(self) -> None:
        ours, theirs = socket.socketpair()
        connection = _Connection(ours)
        assert connection.is_quiet()
        theirs.close()
        assert not connection.is_quiet()
        connection.close()

    def test_one_that_was_closed_while_it_waited_is_seen_async(self) -> None:
        async def go(url: str) -> None:
            transport = AsyncHttp1Transport(limits=LIMITS)
            await (await transport.handle_async_request(request_to(url))).aclose()
            (link,) = transport._idle.take_all()
            transport._idle.put(Origin("127.0.0.1", httpx2.URL(url).port or 0), link, now_s=0)
            await aeventually(lambda: not link.is_quiet(), "the peer's end of the connection is seen")
            await (await transport.handle_async_request(request_to(url))).aclose()
            await transport.aclose()

        with peer(once(OK)) as engine:
            asyncio.run(go(engine.url))
        assert engine.connections == 2

    def test_a_reader_that_is_slow_holds_the_engine_back(self, monkeypatch) -> None:
        monkeypatch.setattr(looped, "WAITING_BYTES_MAX", 1_000)
        pieces = [b"%x\r\n%s\r\n" % (50_000, b"x" * 50_000)] * 20

        async def go(url: str) -> int:
            transport = AsyncHttp1Transport(limits=LIMITS)
            answer = await transport.handle_async_request(request_to(url))
            size = 0
            async for piece in answer.stream:
                size += len(piece)
                await asyncio.sleep(0)
            await answer.aclose()
            await transport.aclose()
            return size

        with peer(always(CHUNKED, *pieces, b"0\r\n\r\n")) as engine:
            assert asyncio.run(go(engine.url)) == 1_000_000

    def test_a_task_that_is_cancelled_anywhere_leaves_no_connection(self) -> None:
        async def go(url: str) -> None:
            transport = AsyncHttp1Transport(limits=LIMITS)

            async def turn() -> None:
                answer = await transport.handle_async_request(request_to(url))
                try:
                    await answer.aread()
                finally:
                    await answer.aclose()

            for steps in range(12):
                task = asyncio.create_task(turn())
                for _ in range(steps):
                    await asyncio.sleep(0)
                task.cancel()
                await asyncio.wait([task])
            for _ in range(5):
                await turn()  # every slot is free again
            await transport.aclose()

        with peer(always(OK)) as engine:
            asyncio.run(go(engine.url))

    def test_what_is_plain(self) -> None:
        assert is_plain(httpx2.Request("POST", "http://d0/v1"))
        assert not is_plain(httpx2.Request("POST", "https://d0/v1"))
        assert not is_plain(httpx2.Request("HEAD", "http://d0/v1"))


class Named:
    def __init__(self, *, quiet: bool = True) -> None:
        self.quiet = quiet

    def is_quiet(self) -> bool:
        return self.quiet


class TestIdle:
    HERE, THERE = Origin("here", 1), Origin("there", 1)

    def kept(self, at_most: int | None = None) -> IdleConnections[Named]:
        return IdleConnections(httpx2.Limits(max_keepalive_connections=at_most, keepalive_expiry=4.0))

    def test_the_last_one_used_goes_first(self) -> None:
        idle, first, second = self.kept(), Named(), Named()
        idle.put(self.HERE, first, now_s=0)
        idle.put(self.HERE, second, now_s=1)
        assert idle.take(self.THERE, now_s=1) is None
        assert [idle.take(self.HERE, now_s=1) for _ in range(3)] == [second, first, None]
        assert idle.gone == []

    def test_old_and_spoken_to_ones_are_given_up(self) -> None:
        idle, old, spoken = self.kept(), Named(), Named(quiet=False)
        idle.put(self.HERE, old, now_s=0)
        idle.put(self.HERE, spoken, now_s=3)
        assert idle.take(self.HERE, now_s=4) is None
        assert idle.gone == [spoken, old]

    def test_those_of_engines_that_are_asked_no_more_are_given_up_too(self) -> None:
        idle, forgotten, kept = self.kept(), Named(), Named()
        idle.put(self.THERE, forgotten, now_s=0)
        idle.put(self.HERE, kept, now_s=9)
        assert idle.gone == [forgotten]
        assert idle.take_all() == [forgotten, kept]
        assert idle.take_all() == []

    def test_the_oldest_ones_go_where_there_are_too_many(self) -> None:
        idle, every = self.kept(at_most=2), [Named() for _ in range(4)]
        for number, each in enumerate(every):
            idle.put((self.HERE, self.THERE)[number % 2], each, now_s=number / 10)
        assert idle.gone == every[:2]


bodies = st.lists(st.binary(min_size=1, max_size=40), max_size=6)


@given(bodies, st.booleans(), st.data())
def test_reads_what_h11_reads_however_it_is_cut(pieces: list[bytes], chunked: bool, data) -> None:
    if chunked:
        wire = CHUNKED + b"".join(b"%x\r\n%s\r\n" % (len(piece), piece) for piece in pieces) + b"0\r\n\r\n"
    else:
        body = b"".join(pieces)
        wire = b"HTTP/1.1 200 OK\r\nContent-Length: %d\r\n\r\n%s" % (len(body), body)
    cuts = sorted(data.draw(st.lists(st.integers(0, len(wire)), max_size=5)))
    reader, got = AnswerReader(), b""
    for start, stop in zip([0, *cuts], [*cuts, len(wire)], strict=True):
        reader.feed(wire[start:stop])
        got += b"".join(reader.take())
    client = h11.Connection(h11.CLIENT)
    client.send(h11.Request(method="POST", target="/", headers=[("Host", "x"), ("Content-Length", "0")]))
    client.send(h11.EndOfMessage())
    client.receive_data(wire)
    events = []
    while not events or not isinstance(events[-1], h11.EndOfMessage):
        events.append(client.next_event())
    assert got == b"".join(bytes(event.data) for event in events if isinstance(event, h11.Data)) == b"".join(pieces)
    assert reader.complete
    assert reader.reusable
    assert reader.status == events[0].status_code
