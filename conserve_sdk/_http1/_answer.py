"""Reads the answers of one connection, one after the other; llhttp does the parsing. No I/O."""

from __future__ import annotations

import httptools
import httpx2

__all__ = ["HEAD_BYTES_MAX", "AnswerReader"]

HEAD_BYTES_MAX = 262_144
"""More than this before the body is no answer."""

_FRAMES = frozenset({b"content-length", b"transfer-encoding"})


class AnswerReader:
    """Fed with what arrives; `status` and `headers` are there once `head_complete`, the body piece by piece.

    Attributes:
        status, reason, headers: of the answer being read.
        http_version: such as `HTTP/1.1`.
        head_complete, complete: how far it is.
        reusable: once `complete`: whether another request may follow on the connection.
        waiting_bytes: of the pieces that were not taken yet.
    """

    def __init__(self) -> None:
        self._parser = httptools.HttpResponseParser(self)
        self.start()

    def start(self) -> None:
        """A request is being sent: what follows is its answer."""
        self.status = 0
        self.reason = b""
        self.http_version = b"HTTP/1.1"
        self.headers: list[tuple[bytes, bytes]] = []
        self.head_complete = self.complete = self.reusable = False
        self.waiting_bytes = 0
        self._pieces: list[bytes] = []
        self._head_bytes = 0

    def feed(self, data: bytes) -> None:
        """Read what arrived.

        Raises:
            httpx2.RemoteProtocolError: that is no HTTP.
        """
        try:
            self._parser.feed_data(data)
        except (httptools.HttpParserError, httptools.HttpParserUpgrade) as error:
            if self.complete:  # behind the answer: the connection is of no more use, the answer is
                self.reusable = False
                return
            raise httpx2.RemoteProtocolError(f"the answer is not HTTP/1.1: {error}") from error
        if not self.head_complete:
            self._head_bytes += len(data)
            if self._head_bytes > HEAD_BYTES_MAX:
                raise httpx2.RemoteProtocolError(f"the answer's head is longer than {HEAD_BYTES_MAX} bytes")

    def end(self) -> None:
        """The peer has closed the connection.

        Raises:
            httpx2.RemoteProtocolError: before the end of the answer.
        """
        self.reusable = False
        if self.complete:
            return
        if not self.head_complete:
            raise httpx2.RemoteProtocolError("Server disconnected without sending a response.")
        if any(name.lower() in _FRAMES for name, _ in self.headers):
            raise httpx2.RemoteProtocolError("the connection was closed before the end of the answer's body")
        self.complete = True

    def take(self) -> list[bytes]:
        """The pieces of the body that have come since the last call."""
        pieces, self._pieces, self.waiting_bytes = self._pieces, [], 0
        return pieces

    # ---- called by the parser ---------------------------------------------------------------------------------

    def on_message_begin(self) -> None:
        """Another answer: that of before was an interim one, or this one was not asked for."""
        if self.complete:
            self.reusable = False

    def on_status(self, reason: bytes) -> None:
        """The reason phrase, or a part of it."""
        if not self.head_complete:
            self.reason += reason

    def on_header(self, name: bytes, value: bytes) -> None:
        """A header; one that follows the body says nothing to anybody here."""
        if not self.head_complete:
            self.headers.append((name, value))

    def on_headers_complete(self) -> None:
        """The head is through."""
        if self.complete:
            return
        status = self._parser.get_status_code()
        if 100 <= status < 200 and status != 101:
            self.reason, self.headers = b"", []  # an interim answer: the other one follows
            return
        self.status, self.head_complete = status, True
        self.http_version = b"HTTP/" + self._parser.get_http_version().encode("ascii")

    def on_body(self, piece: bytes) -> None:
        """A part of the body."""
        if not self.complete:
            self._pieces.append(piece)
            self.waiting_bytes += len(piece)

    def on_message_complete(self) -> None:
        """The answer is through, unless it was an interim one."""
        if self.head_complete and not self.complete:
            self.complete, self.reusable = True, self._parser.should_keep_alive()
