"""The blocking transport."""

from __future__ import annotations

import select
import socket
import threading
import time
from collections.abc import Iterator

import httpx2

from conserve_sdk._http1._answer import AnswerReader
from conserve_sdk._http1._idle import IdleConnections
from conserve_sdk._http1._request import Limits, Origin, limits_of, origin_of, wire_form

__all__ = ["Http1Transport"]

_UNBOUNDED = 1_000_000
RECEIVE_BYTES = 65_536


class Http1Transport(httpx2.BaseTransport):
    """Thread-safe. Requests must be plain (`is_plain`), with their body in memory. Not for use after a fork.

    Args:
        limits: `max_connections` bounds those in use, `max_keepalive_connections` those that wait.
    """

    def __init__(self, *, limits: httpx2.Limits) -> None:
        self._slots = threading.Semaphore(limits.max_connections or _UNBOUNDED)
        self._idle: IdleConnections[_Connection] = IdleConnections(limits)
        # Kept here, so that one whose stream is dropped in a cycle is closed by its stream and not by the collector.
        self._busy: set[_Connection] = set()
        self._lock = threading.Lock()
        self._keeps = True

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        """Send one request and wait for the head of its answer.

        Raises:
            httpx2.TransportError: it could not be sent or was not answered.
        """
        wire, origin, limits = wire_form(request), origin_of(request), limits_of(request)
        self._wait_for_slot(limits.pool_s)
        try:
            connection = self._connection(origin, limits)
        except BaseException:
            self._slots.release()
            raise
        self._busy.add(connection)
        try:
            answer = connection.ask(wire, limits)
        except BaseException:
            self.done_with(origin, connection)
            raise
        return httpx2.Response(
            answer.status,
            headers=answer.headers,
            stream=_Body(self, origin, connection, limits.read_s),
            extensions={"http_version": answer.http_version, "reason_phrase": answer.reason},
        )

    def done_with(self, origin: Origin, connection: _Connection) -> None:
        """Keep a connection whose answer is through, close any other."""
        self._busy.discard(connection)
        try:
            with self._lock:
                if self._keeps and connection.answer.reusable:
                    self._idle.put(origin, connection, now_s=time.monotonic())
                    gone, self._idle.gone = self._idle.gone, []
                else:
                    gone = [connection]
            for each in gone:
                each.close()
        finally:
            self._slots.release()

    def close(self) -> None:
        """Close the connections that wait, and keep none any more: those in use are closed when they are done with."""
        with self._lock:
            self._keeps = False
            every = self._idle.take_all()
        for connection in every:
            connection.close()

    def _wait_for_slot(self, pool_s: float | None) -> None:
        if not self._slots.acquire(blocking=False) and not self._slots.acquire(timeout=pool_s):
            raise httpx2.PoolTimeout("all connections are in use")

    def _connection(self, origin: Origin, limits: Limits) -> _Connection:
        with self._lock:
            connection = self._idle.take(origin, now_s=time.monotonic())
            gone, self._idle.gone = self._idle.gone, []
        for each in gone:
            each.close()
        return connection or _Connection.to(origin, limits.connect_s)


class _Connection:
    """One socket. Used by one thread at a time."""

    def __init__(self, connected: socket.socket) -> None:
        self._socket = connected
        self._timeout_s = connected.gettimeout()
        self.answer = AnswerReader()

    @classmethod
    def to(cls, origin: Origin, connect_s: float | None) -> _Connection:
        try:
            connected = socket.create_connection(origin, timeout=connect_s)
            connected.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        except TimeoutError as error:
            raise httpx2.ConnectTimeout(str(error)) from error
        except OSError as error:
            raise httpx2.ConnectError(str(error)) from error
        return cls(connected)

    def ask(self, wire: bytes, limits: Limits) -> AnswerReader:
        """Send a request and read the head of its answer."""
        answer = self.answer
        answer.start()
        try:
            self._within(limits.write_s)
            self._socket.sendall(wire)
        except TimeoutError as error:
            raise httpx2.WriteTimeout(str(error)) from error
        except OSError:
            pass  # a peer that hangs up on a request may have said why: reading tells
        while not answer.head_complete:
            self.receive(limits.read_s)
        return answer

    def receive(self, read_s: float | None) -> None:
        """Read what comes next."""
        try:
            self._within(read_s)
            data = self._socket.recv(RECEIVE_BYTES)
        except TimeoutError as error:
            raise httpx2.ReadTimeout(str(error)) from error
        except OSError as error:
            raise httpx2.ReadError(str(error)) from error
        if data:
            self.answer.feed(data)
        else:
            self.answer.end()

    def is_quiet(self) -> bool:
        """Whether the peer has said nothing since its last answer, not even goodbye."""
        if not hasattr(select, "poll"):  # Windows, where `select` takes sockets of any number
            return not select.select([self._socket], [], [], 0)[0]
        watch = select.poll()
        watch.register(self._socket, select.POLLIN)
        return not watch.poll(0)

    def close(self) -> None:
        # Not shut down: a forked child that lets go of its parent's sockets must not end them.
        self._socket.close()

    def _within(self, timeout_s: float | None) -> None:
        if timeout_s != self._timeout_s:  # each setting is a system call
            self._socket.settimeout(timeout_s)
            self._timeout_s = timeout_s


class _Body(httpx2.SyncByteStream):
    """The body of an answer."""

    def __init__(
        self, transport: Http1Transport, origin: Origin, connection: _Connection, read_s: float | None
    ) -> None:
        self._transport, self._origin = transport, origin
        self._connection, self._read_s = connection, read_s
        self._closed = False

    def __iter__(self) -> Iterator[bytes]:
        connection, answer, read_s = self._connection, self._connection.answer, self._read_s
        try:
            while True:
                yield from answer.take()
                if answer.complete:
                    return
                connection.receive(read_s)
        except BaseException:
            self.close()
            raise

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._transport.done_with(self._origin, self._connection)
