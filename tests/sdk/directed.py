"""A broker that tells its clients to move, and answers as a test says: the real core behind scripted words."""

from __future__ import annotations

import json

import httpx2

from conserve_sdk._desk import Reply
from conserve_sdk.core import PAPER, BrokerSettings
from conserve_sdk.protocol import BatchAnswer, Binding, LeaseGrant, Problem
from conserve_sdk.testing import FakeClock, InMemoryBroker

REFUSAL = Reply(
    status=503, body=Problem(title="Full", status=503, detail="no room", code="no_capacity", retry_after_ms=1_000)
)


def problem(status: int, code: str) -> Reply:
    return Reply(status=status, body=Problem(title="No", status=status, detail="no", code=code))


class DirectedBroker(InMemoryBroker):
    """Attributes:
    directive, reason: what every status says from now on.
    append_threshold_tokens: what every grant says.
    answer: to a request to move: "move" (another decoder, the old one is its prefiller), "local" (another decoder,
        nothing moves), "append" (a prefiller for the same decoder), "stay" (the live lease as it is), a reply, bytes
        of an answer, or an exception to raise.
    asked: bodies of the requests to move.
    """

    def __init__(self, engines=None, **options) -> None:
        options.setdefault("settings", BrokerSettings(placement=PAPER))
        super().__init__(engines, clock=FakeClock(), **options)
        self.directive, self.reason = "none", ""
        self.append_threshold_tokens = 0
        self.answer = "move"
        self.asked: list[dict] = []
        self.timeouts: list[dict] = []

    def _serve(self, request: httpx2.Request):
        body = json.loads(request.content) if request.content else {}
        if request.url.path.endswith("/supersede") and body["cause"] != "failure":
            self.asked.append(body)
            self.timeouts.append(request.extensions["timeout"])
            return self._moved(request, body)
        reply = super()._serve(request)
        if isinstance(reply, Reply) and isinstance(reply.body, LeaseGrant):
            threshold = {"append_threshold_tokens": self.append_threshold_tokens}
            return Reply(status=reply.status, body=reply.body.model_copy(update=threshold))
        if isinstance(reply, Reply) and isinstance(reply.body, BatchAnswer):
            word = {"directive": self.directive, "directive_reason": self.reason}
            results = tuple(status.model_copy(update=word) for status in reply.body.results)
            return Reply(status=reply.status, body=BatchAnswer(results=results))
        return reply

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        request.read()
        answer = self._serve(request)
        if isinstance(answer, bytes):
            return httpx2.Response(200, content=answer, request=request)
        assert isinstance(answer, Reply), "no request has to wait here"
        return self._response(request, answer)

    async def handle_async_request(self, request: httpx2.Request) -> httpx2.Response:
        await request.aread()
        return self.handle_request(request)

    def _moved(self, request: httpx2.Request, body: dict):
        if isinstance(self.answer, Exception):
            raise self.answer
        if not isinstance(self.answer, str):
            return self.answer
        if not self._running:
            raise httpx2.ConnectError("stopped")
        lease_id = request.url.path.split("/")[3]
        (lease,) = [lease for lease in self.core.leases() if lease.lease_id == lease_id]
        old = Binding(engine_id=lease.decoder.engine_id, url=lease.decoder.url, incarnation=lease.decoder.incarnation)
        if self.answer == "stay":
            asked_again = {"conversation_id": lease.key.conversation_id, "lineage": lease.key.lineage}
            return self._plain("/v1/leases", {**asked_again, "model": lease.key.model})
        moved = self._plain(request.url.path, {**body, "cause": "failure", "failed_engine_id": old.engine_id})
        changes = {
            "move": {"mode": "migrate", "prefiller": old},
            "local": {"mode": "local", "prefiller": None},
            "append": {"mode": "migrate", "decoder": old},
        }
        return Reply(status=moved.status, body=moved.body.model_copy(update=changes[self.answer]))

    def _plain(self, path: str, body: dict) -> Reply:
        reply = super()._serve(httpx2.Request("POST", self.url + path, content=json.dumps(body).encode()))
        assert isinstance(reply, Reply)
        return reply
