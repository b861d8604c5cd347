"""What a stranger may send: every input is answered as documented or the connection is closed, and the broker lives on.

Bytes go over a real socket: what matters here happens before any client library would let it out.
"""

import contextlib
import json
import socket
import ssl
import time
from collections.abc import Iterator
from typing import Any, Self

import httpx2
import pytest

from conserve_broker._connections import client_of
from conserve_broker._http_protocol import HEAD_BYTES_MAX
from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_sdk.protocol import BODY_BYTES_MAX, Problem

BUDGET_S = 30.0
CLOSED = 0
"""The connection was closed without an answer."""
TIMEOUT_MS = 500
LEASE = {"conversation_id": "c", "lineage": "main", "model": "unknown"}
DEEP = 200_000
HUGE = 10**400
ENGINE = {"id": "d0", "url": "http://127.0.0.1:9", "role": "decoder", "model": "m"}


def config(**listen: Any) -> BrokerConfig:
    return BrokerConfig.from_mapping(
        {
            "listen": {"port": 0, "request_timeout_ms": TIMEOUT_MS, **listen},
            "registration": {"allow": ["10.0.0.0/8", "http://*.workers.internal:8000"]},
            "engine": [ENGINE],
        }
    )


@pytest.fixture(scope="module")
def server() -> Iterator[BrokerServer]:
    with BrokerServer(config()) as running:
        yield running


class Wire:
    """One connection."""

    def __init__(self, server: BrokerServer) -> None:
        host, port = server.url.removeprefix("http://").split(":")
        self.socket = socket.create_connection((host, int(port)), timeout=BUDGET_S)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.socket.close()

    def send(self, data: bytes) -> None:
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # refused meanwhile: the answer counts
            self.socket.sendall(data)

    def everything(self) -> bytes:
        """All bytes until the other side closes."""
        parts = []
        with contextlib.suppress(ConnectionResetError):
            while part := self.socket.recv(65_536):
                parts.append(part)
        return b"".join(parts)

    def answer(self) -> tuple[int, dict[str, str], bytes]:
        """One answer; status `CLOSED` when there is none."""
        data = b""
        try:
            while b"\r\n\r\n" not in data:
                part = self.socket.recv(65_536)
                if not part:
                    return CLOSED, {}, data
                data += part
            head, _, body = data.partition(b"\r\n\r\n")
            lines = head.decode("latin-1").split("\r\n")
            headers = {name.lower(): value for name, _, value in (line.partition(": ") for line in lines[1:])}
            while len(body) < int(headers.get("content-length", 0)):
                body += self.socket.recv(65_536)
        except ConnectionResetError:
            return CLOSED, {}, b""
        return int(lines[0].split()[1]), headers, body


def request(method: str, path: str, body: bytes = b"", **headers: str) -> bytes:
    lines = [f"{method} {path} HTTP/1.1", "host: broker"]
    lines += [f"{name.replace('_', '-')}: {value}" for name, value in headers.items()]
    if body:
        lines.append(f"content-length: {len(body)}")
    return "\r\n".join(lines).encode("latin-1") + b"\r\n\r\n" + body


def lease(**changes: Any) -> bytes:
    return json.dumps({**LEASE, **changes}).encode()


def raw(field: str) -> bytes:
    """A lease request with one field spelled by the test."""
    return (
        b'{"conversation_id": "c", "lineage": "main", "model": "unknown", '
        + field.encode("utf-8", "surrogatepass")
        + b"}"
    )


def problem(headers: dict[str, str], body: bytes) -> Problem:
    assert headers["content-type"] == "application/problem+json", body[:200]
    return Problem.model_validate_json(body)


# ---- bodies -----------------------------------------------------------------------------------------------------

POST, REPORTS, RENEWALS = "/v1/leases", "/v1/reports", "/v1/renewals"
PARK, SUPERSEDE = "/v1/leases/x/park", "/v1/leases/x/supersede"
REFUSED = {400, 422}

BODIES: dict[str, tuple[str, bytes, set[int]]] = {
    # huge
    "body over the limit": (REPORTS, b" " * (BODY_BYTES_MAX + 1), {413}),
    "body at the limit": (REPORTS, b" " * BODY_BYTES_MAX, {400}),
    "a string of a megabyte": (POST, lease(conversation_id="c" * 1_000_000), {422}),
    "ten thousand unknown keys": (POST, lease(**{f"k{n}": n for n in range(10_000)}), {404}),
    "a key of a megabyte": (POST, lease(**{"k" * 1_000_000: 1}), {404}),
    "501 renewals": (RENEWALS, json.dumps({"tokens": ["t"] * 501}).encode(), {422}),
    "501 reports": (REPORTS, json.dumps({"reports": [{"kind": "turn_started", "token": "t"}] * 501}).encode(), {422}),
    "a token of a megabyte": (RENEWALS, json.dumps({"tokens": ["t" * 1_000_000]}).encode(), {422}),
    "500 tokens of rubbish": (RENEWALS, json.dumps({"tokens": ["a.b.c"] * 500}).encode(), {200}),
    "65 tool names": (
        REPORTS,
        json.dumps({"reports": [{"kind": "turn_finished", "token": "t", "tool_names": ["n"] * 65}]}).encode(),
        {422},
    ),
    # deep
    "deep lists": (POST, b"[" * DEEP + b"]" * DEEP, {400}),
    "deep objects": (POST, b'{"a":' * DEEP + b"1" + b"}" * DEEP, {400}),
    "deep in an unknown key": (POST, raw('"x": ' + "[" * DEEP + "]" * DEEP), {400}),
    "deep and unfinished": (POST, b"[" * DEEP, {400}),
    # unicode and NUL
    "NUL in an id": (POST, lease(conversation_id="a\0b"), {422}),
    "NUL byte in a string": (POST, raw('"client": "\0"'), {400}),
    "NUL escaped in free text": (POST, lease(client="\0"), {404}),
    "NUL around the body": (POST, b"\0" + lease() + b"\0", {400}),
    "an id of emoji": (POST, lease(conversation_id="\U0001f600"), {422}),
    "an id with a line break": (POST, lease(lineage="a\r\nx: y"), {422}),
    "right-to-left and combining marks": (POST, lease(client="\u202e\u0301" * 50), {404}),
    "a lone surrogate escape": (POST, raw(r'"client": "\ud800"'), {400}),
    "a lone trailing surrogate escape": (POST, raw(r'"client": "\udc00"'), {400}),
    "a surrogate in UTF-8": (POST, raw('"client": "\ud800"'), REFUSED),
    "overlong UTF-8": (POST, raw('"client": "X"').replace(b"X", b"\xc0\xaf"), REFUSED),
    "bytes that are no UTF-8": (POST, b"\xff\xfe" + lease(), {400}),
    "UTF-16": (POST, lease().decode().encode("utf-16"), {400}),
    "a byte order mark": (POST, b"\xef\xbb\xbf" + lease(), {400}),
    # wrong types
    "null": (POST, b"null", {422}),
    "a list": (POST, b"[]", {422}),
    "a number": (POST, b"7", {422}),
    "a string": (POST, b'"x"', {422}),
    "nothing": (POST, b" ", {400}),
    "an unfinished object": (POST, b'{"conversation_id": "c"', {400}),
    "an id that is a number": (POST, lease(conversation_id=7), {422}),
    "an id that is an object": (POST, lease(conversation_id={}), {422}),
    "an id that is null": (POST, lease(conversation_id=None), {422}),
    "tokens that are words": (POST, lease(first_turn_input_tokens="many"), {422}),
    "tokens that are a list": (POST, lease(first_turn_input_tokens=[1]), {422}),
    "tokens that are half": (POST, lease(first_turn_input_tokens=0.5), {422}),
    "negative tokens": (POST, lease(first_turn_input_tokens=-1), {422}),
    "a renewal of a string": (RENEWALS, b'{"tokens": "abc"}', {422}),
    "a renewal of nothing": (RENEWALS, b'{"tokens": []}', {422}),
    "a report of an unknown kind": (REPORTS, b'{"reports": [{"kind": "x", "token": "t"}]}', {422}),
    "a report without a kind": (REPORTS, b'{"reports": [{"token": "t"}]}', {422}),
    "a supersede of epoch 0": (SUPERSEDE, b'{"token": "t", "epoch": 0, "reason": ""}', {422}),
    "a supersede with a forged token": (SUPERSEDE, b'{"token": "a.b.c", "epoch": 1, "reason": ""}', {401}),
    "a park with a forged token": (PARK, b'{"token": "a.b.c"}', {401}),
    # numbers
    "NaN": (POST, raw('"first_turn_input_tokens": NaN'), REFUSED),
    "Infinity": (POST, raw('"first_turn_input_tokens": Infinity'), REFUSED),
    "1e400": (POST, raw('"first_turn_input_tokens": 1e400'), REFUSED),
    "2^63": (POST, lease(first_turn_input_tokens=2**63), {422}),
    "-2^63-1": (POST, lease(first_turn_input_tokens=-(2**63) - 1), {422}),
    "ten to the 400": (POST, lease(wait_ms=HUGE), REFUSED),
    "a number of 100 000 digits": (POST, raw('"wait_ms": ' + "9" * 100_000), REFUSED),
    "an epoch of 2^200": (
        SUPERSEDE,
        json.dumps({"token": "a.b.c", "epoch": 2**200, "reason": ""}).encode(),
        {401, 422},
    ),
    "leading zeros": (POST, raw('"wait_ms": 007'), {400}),
    # duplicate keys: the last one counts, as for every reader of this body
    "duplicate keys": (POST, raw('"model": "n"'), {404}),
    "a duplicate key of another type": (POST, raw('"model": 7'), {422}),
}


@pytest.mark.parametrize("name", BODIES)
def test_bodies(server: BrokerServer, name: str) -> None:
    path, body, statuses = BODIES[name]
    with Wire(server) as wire:
        wire.send(request("POST", path, body, content_type="application/json"))
        status, headers, content = wire.answer()
    assert status in statuses, content[:300]
    if status != 200:
        found = problem(headers, content)
        assert found.status == status
        assert len(content) < 4_096, "no echo of what was sent"


# ---- tokens, paths, headers -------------------------------------------------------------------------------------

REQUESTS: dict[str, tuple[bytes, set[int]]] = {
    "a path of 20 KB": (request("GET", "/v1/leases/" + "a" * 20_000 + "/explain"), {404}),
    "a path with NUL": (request("GET", "/v1/leases/a%00b/explain"), {404}),
    "a path of broken UTF-8": (request("GET", "/v1/leases/%ff%fe/explain"), {404}),
    "a path with an encoded slash": (request("GET", "/v1/leases/..%2f..%2fetc/explain"), {404}),
    "a path that climbs": (request("GET", "/v1/../../etc/passwd"), {404}),
    "a path of raw bytes": (b"GET /v1/\xff\xfe HTTP/1.1\r\nhost: b\r\n\r\n", {400, 404}),
    "a surrogate in a path": (request("GET", "/v1/engines/%ed%a0%80"), {404}),
    "the asterisk": (request("OPTIONS", "*"), {400, 404, 405}),
    "an absolute URL": (request("GET", "http://elsewhere.example/healthz"), {200, 404}),
    "an unknown method": (b"BREW /v1/leases HTTP/1.1\r\nhost: b\r\n\r\n", {400}),
    "a method in small letters": (b"get /healthz HTTP/1.1\r\nhost: b\r\n\r\n", {400}),
    "HTTP/9.9": (b"GET /healthz HTTP/9.9\r\nhost: b\r\n\r\n", {400}),
    "HTTP/0.9": (b"GET /healthz\r\n\r\n", {200, 400}),
    "no HTTP at all": (b"\x16\x03\x01\x02\x00\x01\x00\x01\xfc\x03\x03" + b"\0" * 64, {400}),
    "HTTP/2 preface": (b"PRI * HTTP/2.0\r\n\r\nSM\r\n\r\n", {400, 404, 405}),
    "one header over the limit": (request("GET", "/healthz", x=("a" * HEAD_BYTES_MAX)), {431}),
    "a hundred thousand headers": (
        b"GET /healthz HTTP/1.1\r\n" + b"".join(b"x%d: y\r\n" % n for n in range(100_000)) + b"\r\n",
        {431},
    ),
    "a header that never ends": (b"GET /healthz HTTP/1.1\r\nx: " + b"a" * 4_000_000, {431}),
    "a path that never ends": (b"GET /" + b"a" * 4_000_000, {431, 400}),
    "two lengths that differ": (
        b"POST /v1/leases HTTP/1.1\r\nhost: b\r\ncontent-length: 2\r\ncontent-length: 3\r\n\r\n{}",
        {400},
    ),
    "a negative length": (b"POST /v1/leases HTTP/1.1\r\nhost: b\r\ncontent-length: -1\r\n\r\n", {400}),
    "a length of 2^70": (b"POST /v1/leases HTTP/1.1\r\nhost: b\r\ncontent-length: %d\r\n\r\n" % 2**70, {400}),
    "length and chunks together": (
        b"POST /v1/leases HTTP/1.1\r\nhost: b\r\ncontent-length: 5\r\ntransfer-encoding: chunked\r\n\r\n0\r\n\r\n",
        {400},
    ),
    "a chunk size that is no number": (
        b"POST /v1/leases HTTP/1.1\r\nhost: b\r\ntransfer-encoding: chunked\r\n\r\nxyz\r\n",
        {400},
    ),
    "a header name with a blank": (b"GET /healthz HTTP/1.1\r\nho st: b\r\n\r\n", {400}),
    "a lease token of rubbish": (request("GET", "/v1/leases/x", x_conserve_lease="\xff" * 5_000), {401}),
    "a lease token of three rubbish parts": (request("GET", "/v1/leases/x", x_conserve_lease="é.è.à"), {401}),
    "an algorithm of none": (
        request("GET", "/v1/leases/x", x_conserve_lease="eyJhbGciOiJub25lIn0.eyJzdWIiOiJ4In0."),
        {401},
    ),
    "an upgrade to a websocket": (
        request("GET", "/v1/fleet", connection="upgrade", upgrade="websocket", sec_websocket_version="13"),
        {200},
    ),
    "a registration of a foreign URL": (
        request("PUT", "/v1/engines/x", b'{"url": "http://169.254.169.254", "role": "decoder", "model": "m"}'),
        {403},
    ),
    "a registration of a file": (
        request("PUT", "/v1/engines/x", b'{"url": "file:///etc/passwd", "role": "decoder", "model": "m"}'),
        {422},
    ),
    "a registration that hides its host": (
        request(
            "PUT", "/v1/engines/x", b'{"url": "http://a.workers.internal:8000@evil", "role": "decoder", "model": "m"}'
        ),
        {422},
    ),
    "a registration of decimal 127.0.0.1": (
        request("PUT", "/v1/engines/x", b'{"url": "http://2130706433", "role": "decoder", "model": "m"}'),
        {403},
    ),
    "a registration under an id with a slash": (
        request("PUT", "/v1/engines/a%2fb", b'{"url": "http://10.0.0.1", "role": "decoder", "model": "m"}'),
        {404, 422},
    ),
}


@pytest.mark.parametrize("name", REQUESTS)
def test_requests(server: BrokerServer, name: str) -> None:
    sent, statuses = REQUESTS[name]
    with Wire(server) as wire:
        wire.send(sent)
        status, headers, content = wire.answer()
    assert status in statuses, content[:300]
    if status >= 400:
        assert problem(headers, content).status == status
        assert len(content) < 4_096


# ---- slowness and pipelines -------------------------------------------------------------------------------------


def trickle(wire: Wire, data: bytes, *, until_s: float) -> bool:
    """Send byte after byte; False as soon as the other side has had enough."""
    end = time.monotonic() + until_s
    for byte in data:
        if time.monotonic() > end:
            return True
        try:
            wire.socket.sendall(bytes([byte]))
        except (BrokenPipeError, ConnectionResetError):
            return False
        time.sleep(0.02)
    return True


@pytest.mark.parametrize(
    "sent",
    [
        b"GET /healthz HTTP/1.1\r\nx: " + b"a" * 10_000,
        b"POST /v1/leases HTTP/1.1\r\nhost: b\r\ncontent-length: 100000\r\n\r\n" + b" " * 100_000,
        b"POST /v1/leases HTTP/1.1\r\nhost: b\r\ntransfer-encoding: chunked\r\n\r\n" + b"1\r\n \r\n" * 10_000,
    ],
    ids=["head", "body", "chunks"],
)
def test_a_request_that_trickles_in_is_given_up(server: BrokerServer, sent: bytes) -> None:
    with Wire(server) as wire:
        assert trickle(wire, sent, until_s=BUDGET_S) is False
        status, headers, content = wire.answer()
    assert status in {408, CLOSED}, "what was answered may be lost when bytes go on coming"
    if status == 408:
        assert problem(headers, content).code == "request_timeout"


def test_a_request_that_stops_half_way_is_told_so(server: BrokerServer) -> None:
    for sent in (b"GET /healthz HT", b"POST /v1/leases HTTP/1.1\r\nhost: b\r\ncontent-length: 9\r\n\r\n{"):
        with Wire(server) as wire:
            wire.send(sent)
            status, headers, content = wire.answer()
            assert (status, problem(headers, content).code) == (408, "request_timeout")
            assert wire.everything() == b"", "and closed"


@pytest.mark.parametrize("sent", [b"", b"\r\n" * 3], ids=["silence", "blank lines"])
def test_a_connection_without_a_request_is_closed(server: BrokerServer, sent: bytes) -> None:
    with Wire(server) as wire:
        wire.send(sent)
        assert wire.everything() == b""


def test_blank_lines_keep_no_idle_connection_alive(server: BrokerServer) -> None:
    with Wire(server) as wire:
        wire.send(request("GET", "/healthz"))
        assert wire.answer()[0] == 200
        assert trickle(wire, b"\r\n" * 10_000, until_s=BUDGET_S) is False


def test_a_patient_client_is_not_mistaken_for_a_slow_one(server: BrokerServer) -> None:
    """It waits for admission far beyond the time a request may take to arrive, and pipelines another meanwhile."""
    body = json.dumps({**LEASE, "model": "m", "wait_ms": 4 * TIMEOUT_MS}).encode()
    with Wire(server) as wire:
        started = time.monotonic()
        wire.send(request("POST", "/v1/leases", body) + b"GET /heal")
        status, _, _ = wire.answer()
        assert status == 503
        assert time.monotonic() - started >= 3 * TIMEOUT_MS / 1000


def test_pipelined_requests_are_answered_in_order(server: BrokerServer) -> None:
    count = 200
    sent = b"".join(request("GET", f"/v1/engines/nobody-{n}") for n in range(count))
    with Wire(server) as wire:
        wire.send(sent + request("GET", "/healthz", connection="close"))
        answers = wire.everything()
    order = [int(part.partition(b"'")[0]) for part in answers.split(b"no engine 'nobody-")[1:]]
    assert order == list(range(count))
    assert answers.endswith(b'{"status":"ok"}')


def test_a_request_smuggled_into_a_body_is_no_request(server: BrokerServer) -> None:
    inner = request("POST", "/v1/engines/d0/drain")
    with Wire(server) as wire:
        wire.send(request("POST", "/v1/leases", inner, connection="close"))
        answers = wire.everything()
    assert answers.count(b"HTTP/1.1 ") == 1
    engines = httpx2.get(f"{server.url}/v1/engines").json()["engines"]
    assert engines[0]["draining"] is False


def test_an_early_refusal_does_not_wait_for_the_body(server: BrokerServer) -> None:
    head = b"POST /nowhere HTTP/1.1\r\nhost: b\r\ncontent-length: 4000000\r\n\r\n"
    with Wire(server) as wire:
        wire.send(head)
        assert wire.answer()[0] == 404
        assert trickle(wire, b" " * 10_000, until_s=BUDGET_S) is False, "nor does it read on for ever"


def test_connections_beyond_the_limit_are_closed_and_the_others_go_on() -> None:
    with BrokerServer(config(connections_max=3, connections_per_address_max=3, request_timeout_ms=60_000)) as small:
        wires = [Wire(small) for _ in range(3)]
        for wire in wires:
            wire.send(request("GET", "/healthz"))
            assert wire.answer()[0] == 200
        with Wire(small) as late:
            late.send(request("GET", "/healthz"))
            assert late.answer()[0] == CLOSED
        wires.pop().socket.close()
        deadline = time.monotonic() + BUDGET_S
        while True:  # the broker hears of the closed one in its own time
            with Wire(small) as again:
                again.send(request("GET", "/healthz"))
                if again.answer()[0] == 200:
                    break
            assert time.monotonic() < deadline
        for wire in wires:
            wire.send(request("GET", "/healthz"))
            assert wire.answer()[0] == 200
            wire.socket.close()


def test_one_address_cannot_take_every_connection() -> None:
    with BrokerServer(config(connections_max=12, request_timeout_ms=60_000)) as small, contextlib.ExitStack() as stack:
        greedy = [stack.enter_context(Wire(small)) for _ in range(20)]
        for wire in greedy:
            wire.send(request("GET", "/healthz"))
        assert sorted(wire.answer()[0] for wire in greedy) == [CLOSED] * 17 + [200] * 3, "a quarter of all"
        elsewhere = httpx2.HTTPTransport(local_address="127.0.0.2")
        with httpx2.Client(transport=elsewhere, base_url=small.url) as other:
            page = other.get("/metrics").text
        assert "conserve_connections 4.0" in page
        assert 'conserve_connections_refused_total{bound="address"} 17.0' in page
        assert 'conserve_connections_refused_total{bound="all"} 0.0' in page


def test_neighbours_in_one_ipv6_network_are_one_address() -> None:
    hosts = ["2001:db8:0:1::1", "2001:db8:0:1:ffff::2", "2001:db8:0:2::1", "fe80::1%lo"]
    assert [client_of((host, 7070, 0, 0)).hex() for host in hosts] == [
        "20010db800000001", "20010db800000001", "20010db800000002", "fe80000000000000"
    ]  # fmt: skip


def test_an_ipv4_address_is_the_same_on_every_kind_of_socket() -> None:
    assert client_of(("10.0.0.7", 1)) == client_of(("::ffff:10.0.0.7", 1, 0, 0))
    assert client_of(("10.0.0.7", 1)) != client_of(("::ffff:10.0.0.8", 1, 0, 0))


@pytest.mark.parametrize("peer", [None, "", "/run/conserve.sock"])
def test_a_peer_without_an_address_is_counted_too(peer: object) -> None:
    assert client_of(peer) == b""


def test_after_all_of_it_the_broker_is_well(server: BrokerServer) -> None:
    assert httpx2.get(f"{server.url}/healthz").json() == {"status": "ok"}
    fleet = httpx2.get(f"{server.url}/v1/fleet").json()
    assert (fleet["leases"], fleet["waiting_requests"]) == (0, 0)
    with (
        pytest.raises((ssl.SSLError, OSError)),
        socket.create_connection(("127.0.0.1", int(server.url.rsplit(":", 1)[1]))) as bare,
    ):
        ssl.create_default_context().wrap_socket(bare, server_hostname="localhost")
    assert len(BODIES) + len(REQUESTS) >= 85, "the table that the threat model speaks of"
