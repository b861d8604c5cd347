"""Bodies: how params can be hidden, what is too large, and what goes on untouched."""

import gzip
import json

import pytest

from conserve_vllm import LeaseGuard

from .conftest import code, settings, token

MADE_UP = {"do_remote_prefill": True}


class Inner:
    """An application that keeps what reaches it."""

    def __init__(self, *, headers=(), body=b"{}", parts=1):
        self.seen = None
        self.scope = None
        self._headers = [(b"content-type", b"application/json"), *headers]
        self._body = body
        self._parts = parts

    async def __call__(self, scope, receive, send):
        self.scope = scope
        if scope["type"] == "lifespan":
            await receive()
            await send({"type": "lifespan.startup.complete"})
            return
        self.seen = (await receive())["body"]
        await send({"type": "http.response.start", "status": 200, "headers": self._headers})
        size = -(-len(self._body) // self._parts)
        for at in range(self._parts):
            part = self._body[at * size : (at + 1) * size]
            await send({"type": "http.response.body", "body": part, "more_body": at < self._parts - 1})


class Call:
    """One request through a guard, by bare ASGI."""

    def __init__(self, guard):
        self.guard = guard
        self.sent = []

    async def post(self, chunks, *, headers=(), path="/v1/chat/completions", method="POST", kind="http"):
        waiting = [
            {"type": "http.request", "body": chunk, "more_body": at < len(chunks) - 1}
            for at, chunk in enumerate(chunks)
        ] + [{"type": "http.disconnect"}]

        async def receive():
            return waiting.pop(0)

        async def send(message):
            self.sent.append(message)

        scope = {"type": kind, "method": method, "path": path, "headers": list(headers)}
        await self.guard(scope, receive, send)
        self.unread = len(waiting)
        return self

    @property
    def status(self):
        return self.sent[0]["status"]

    @property
    def body(self):
        return b"".join(message.get("body", b"") for message in self.sent[1:])

    @property
    def code(self):
        return json.loads(self.body)["error"]["code"]


def guard_of(inner, **changes):
    return LeaseGuard(inner, settings("d0", **changes))


JSON = (b"content-type", b"application/json")


@pytest.mark.parametrize(
    "raw",
    [b'{"model": "m"}', b"not json", b"", b"[1]", b'{"prompt": "\\u00e9\\u4e2d"}', b"\x89PNG\r\n" * 50],
    ids=["object", "no json", "empty", "list", "escapes", "binary"],
)
async def test_bodies_without_params_go_on_byte_for_byte(raw):
    inner = Inner()
    call = await Call(guard_of(inner)).post([raw[:3], raw[3:]], headers=[JSON])
    assert call.status == 200
    assert inner.seen == raw


HIDDEN = {
    "twice, the good one last": b'{"kv_transfer_params": {"do_remote_prefill": true}, "kv_transfer_params": {}}',
    "escaped": b'{"kv\\u005ftransfer\\u005fparams": {}, "a": 1}',
    "only in a text": b'{"messages": [{"role": "user", "content": "what are kv_transfer_params?"}]}',
    "a tool's argument": b'{"tools": [{"function": {"parameters": {"properties": {"kv_transfer_params": {}}}}}]}',
    "utf-16": json.dumps({"kv_transfer_params": {}, "a": 1}).encode("utf-16"),
    "utf-16 without a mark": json.dumps({"kv_transfer_params": {}, "a": 1}).encode("utf-16-le"),
    "utf-32": json.dumps({"kv_transfer_params": {}, "a": 1}).encode("utf-32"),
}


@pytest.mark.parametrize("raw", HIDDEN.values(), ids=HIDDEN)
async def test_what_was_looked_into_goes_on_as_it_was_read(raw):
    inner = Inner()
    call = await Call(guard_of(inner)).post([raw], headers=[JSON, (b"content-length", b"%d" % len(raw))])
    assert call.status == 200
    expected = json.loads(raw)
    expected.pop("kv_transfer_params", None)
    assert json.loads(inner.seen) == expected
    assert inner.seen.isascii()
    assert dict(inner.scope["headers"])[b"content-length"] == b"%d" % len(inner.seen)


async def test_lone_surrogates_and_other_odd_values_survive():
    raw = b'{"kv_transfer_params": {}, "prompt": "\\ud800", "x": 1e400, "y": NaN, "z": 123456789012345678901234567890}'
    inner = Inner()
    await Call(guard_of(inner)).post([raw], headers=[JSON])
    assert inner.seen == b'{"prompt":"\\ud800","x":Infinity,"y":NaN,"z":123456789012345678901234567890}'


MISPLACED = {
    "extra args": {"vllm_xargs": {"kv_transfer_params": MADE_UP}},
    "sampling params": {"sampling_params": {"extra_args": {"kv_transfer_params": MADE_UP}}},
    "a list": [{"kv_transfer_params": MADE_UP}],
    "a list in a list": {"requests": [[{"kv_transfer_params": MADE_UP}]]},
}


@pytest.mark.parametrize("body", MISPLACED.values(), ids=MISPLACED)
@pytest.mark.parametrize("path", ["/v1/chat/completions", "/inference/v1/generate", "/v1/messages"])
async def test_params_elsewhere_are_refused(body, path):
    inner = Inner()
    call = await Call(guard_of(inner)).post([json.dumps(body).encode()], headers=[JSON], path=path)
    assert (call.status, call.code) == (400, "misplaced_transfer_params")
    assert inner.seen is None


FORMS = {
    "multipart": (b"multipart/form-data; boundary=x", b'--x\r\n\r\n{"kv_transfer_params": {}}\r\n--x--'),
    "url-encoded": (b"application/x-www-form-urlencoded", b"vllm_xargs=%7B%22kv%5Ftransfer_params%22%3A1%7D"),
}


@pytest.mark.parametrize(("kind", "raw"), FORMS.values(), ids=FORMS)
async def test_forms_hold_none(kind, raw):
    call = await Call(guard_of(Inner())).post([raw], headers=[(b"content-type", kind)], path="/v1/audio/transcriptions")
    assert (call.status, call.code) == (400, "misplaced_transfer_params")


@pytest.mark.parametrize(
    "raw",
    [b'{"kv_transfer_params": ', b"kv_transfer_params", b"\xff\xfe\x00", b'{"kv_transfer_params":' + b"[" * 100_000],
    ids=["cut", "bare", "garbled", "deep"],
)
async def test_what_cannot_be_read_goes_nowhere(raw):
    inner = Inner()
    call = await Call(guard_of(inner)).post([raw], headers=[JSON])
    assert (call.status, call.code) == (400, "unreadable_body")
    assert inner.seen is None


async def test_encoded_bodies_are_refused():
    raw = gzip.compress(b'{"kv_transfer_params": {"do_remote_prefill": true}}')
    call = await Call(guard_of(Inner())).post([raw], headers=[JSON, (b"content-encoding", b"gzip")])
    assert (call.status, call.code) == (415, "content_encoding")


async def test_a_declared_size_over_the_limit_is_refused_unread():
    call = await Call(guard_of(Inner(), body_bytes_max=10)).post(
        [b"x" * 11], headers=[JSON, (b"content-length", b"11")]
    )
    assert (call.status, call.code) == (413, "body_too_large")
    assert call.unread == 2


async def test_an_undeclared_size_over_the_limit_is_read_up_to_it():
    call = await Call(guard_of(Inner(), body_bytes_max=10)).post([b"xxxx"] * 9, headers=[JSON])
    assert (call.status, call.code) == (413, "body_too_large")
    assert call.unread == 7


async def test_a_header_given_twice_is_refused():
    twice = [(b"x-conserve-lease", b"a"), (b"X-ConServe-Lease", b"b")]
    call = await Call(guard_of(Inner())).post([b"{}"], headers=twice)
    assert (call.status, call.code) == (400, "repeated_header")


async def test_a_client_that_leaves_while_sending_gets_nothing():
    inner = Inner()
    call = Call(guard_of(inner))

    async def receive():
        return {"type": "http.disconnect"}

    async def send(message):
        call.sent.append(message)

    await call.guard({"type": "http", "method": "POST", "path": "/v1/completions", "headers": []}, receive, send)
    assert call.sent == []
    assert inner.seen is None


async def test_after_its_body_the_application_hears_the_client_leave():
    heard = []

    async def app(scope, receive, send):
        heard.extend([await receive(), await receive()])

    await Call(LeaseGuard(app, settings("d0"))).post([b"{}"])
    assert [message["type"] for message in heard] == ["http.request", "http.disconnect"]


# ---- answers --------------------------------------------------------------------------------------------------


PREFILL_LEG = json.dumps({"prompt": "p", "kv_transfer_params": {"do_remote_decode": True}}).encode()
ANSWERED = {"kv_transfer_params": {"do_remote_prefill": True, "remote_block_ids": [[1]]}, "x": "é"}


async def prefilled(inner, **changes):
    guard = LeaseGuard(inner, settings("p0", **changes), now_ms=lambda: 1_800_000_000_000, incarnation=lambda: "life-1")
    headers = [JSON, (b"x-conserve-lease", token().encode())]
    return await Call(guard).post([PREFILL_LEG], headers=headers, path="/v1/completions")


@pytest.mark.parametrize("parts", [1, 3])
async def test_a_prefill_answer_is_stamped_whole(parts):
    raw = json.dumps(ANSWERED).encode()
    call = await prefilled(Inner(body=raw, parts=parts, headers=[(b"content-length", b"%d" % len(raw))]))
    answer = json.loads(call.body)
    assert answer["kv_transfer_params"].pop("conserve_stamp")
    assert answer == ANSWERED
    assert dict(call.sent[0]["headers"])[b"content-length"] == b"%d" % len(call.body)


@pytest.mark.parametrize(
    "raw", [b'{"kv_transfer_params": null}', b"[1]", b"nonsense", b'{"kv_transfer_params": {"do_remote_prefill": 1}}']
)
async def test_an_answer_without_params_stays_as_it_is(raw):
    assert (await prefilled(Inner(body=raw, parts=2))).body == raw


async def test_an_answer_over_the_limit_passes_unstamped():
    raw = json.dumps(ANSWERED | {"pad": "x" * 500}).encode()
    call = await prefilled(Inner(body=raw, parts=8), body_bytes_max=200)
    assert call.body == raw


async def test_a_stream_is_never_held_back():
    inner = Inner(body=b"data: 1\n\ndata: 2\n\n", parts=2)
    inner._headers = [(b"content-type", b"text/event-stream")]
    assert len((await prefilled(inner)).sent) == 3


# ---- leases for everything ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("path", "method", "status"),
    [
        ("/v1/chat/completions", "POST", 403),
        ("/collective_rpc", "POST", 403),
        ("/v1/responses/1", "DELETE", 403),
        ("/tokenize", "POST", 200),
        ("/metrics", "GET", 200),
        ("/health", "GET", 200),
    ],
)
async def test_where_leases_are_required_nothing_but_looking_is_free(path, method, status):
    call = await Call(guard_of(Inner(), require_lease=True)).post([b"{}"], path=path, method=method)
    assert call.status == status


def test_with_a_lease_a_plain_request_passes(guarded):
    guarded.guard(require_lease=True)
    assert guarded.post("d0", guarded.body(), lease_token=token()).status_code == 200
    refused = guarded.post("d0", guarded.body())
    assert (refused.status_code, code(refused)) == (403, "lease_required")


@pytest.mark.parametrize(("required", "closed"), [(True, True), (False, False)])
async def test_a_websocket_needs_a_lease_where_requests_do(required, closed):
    inner = Inner()
    call = await Call(guard_of(inner, require_lease=required)).post([b""], kind="websocket", path="/v1/realtime")
    assert (call.sent[0]["type"] == "websocket.close") == closed


# ---- start ----------------------------------------------------------------------------------------------------


async def test_a_good_configuration_lets_the_application_start():
    call = await Call(guard_of(Inner())).post([b""], kind="lifespan")
    assert call.sent == [{"type": "lifespan.startup.complete"}]


async def test_a_bad_configuration_ends_the_server_as_it_starts(monkeypatch):
    monkeypatch.delenv("CONSERVE_GUARD_KEYS", raising=False)
    guard = LeaseGuard(Inner())
    call = await Call(guard).post([b""], kind="lifespan")
    assert call.sent[0]["type"] == "lifespan.startup.failed"
    assert "CONSERVE_GUARD_KEYS is not set" in call.sent[0]["message"]
    assert (await Call(guard).post([b"{}"])).code == "guard_misconfigured"


async def test_several_api_servers_cannot_share_a_guard():
    class State:
        class args:  # noqa: N801
            api_server_count = 4

    class Application:
        state = State

    sent = []

    async def receive():
        return {"type": "lifespan.startup"}

    async def send(message):
        sent.append(message)

    await guard_of(Inner())({"type": "lifespan", "app": Application}, receive, send)
    assert "--api-server-count 1" in sent[0]["message"]
