"""A lease that moves on real vLLM: the old decoder's cache is what the new one pulls, and nothing is computed twice.

First by a word put into a broker's mouth, so that every number is known beforehand; then by a broker's own drain.
"""

from __future__ import annotations

import json
from contextlib import closing

import httpx2
import pytest

from .leased import HOLD_OFF, Conversation, Meter, within

BUDGET_S = 100.0


class Directing(httpx2.BaseTransport):
    """The way to a real broker, which gets a word in: `told` makes every status say `re_lease`, and the answer to it
    names the old decoder as the prefiller."""

    def __init__(self) -> None:
        self.told = False
        self.asked: list[dict] = []
        self._decoder: dict = {}
        self._inner = httpx2.HTTPTransport()

    def handle_request(self, request: httpx2.Request) -> httpx2.Response:
        body = json.loads(request.read() or b"{}")
        if not request.url.path.endswith("/supersede"):
            return self._status(self._inner.handle_request(request))
        self.asked.append(body)
        old = self._decoder
        as_failure = json.dumps({**body, "cause": "failure", "failed_engine_id": old["engine_id"]}).encode()
        kept = [(name, value) for name, value in request.headers.raw if name.lower() != b"content-length"]
        moved = httpx2.Request("POST", request.url, headers=kept, content=as_failure, extensions=request.extensions)
        answer = self._inner.handle_request(moved)
        grant = json.loads(answer.read())
        assert answer.status_code < 300, grant
        return httpx2.Response(answer.status_code, json={**grant, "mode": "migrate", "prefiller": old})

    def _status(self, answer: httpx2.Response) -> httpx2.Response:
        data = answer.read()
        if self.told and b'"verdict"' in data:
            found = json.loads(data)
            found["results"] = [{**status, "directive": "re_lease"} for status in found.get("results", [])]
            data = json.dumps(found).encode()
        if b'"decoder"' in data:
            self._decoder = json.loads(data)["decoder"]
        return httpx2.Response(answer.status_code, headers={"content-type": "application/json"}, content=data)

    def close(self) -> None:
        self._inner.close()


@pytest.fixture
def directing():
    with closing(Directing()) as transport:
        yield transport


@pytest.mark.parametrize("stream", [False, True], ids=["whole", "streamed"])
def test_a_lease_moves_from_decoder_to_decoder(directing, stage, stream):
    conserve = stage.sdk(stage.broker(), broker_transport=directing)
    client = stage.client(conserve)
    talk = Conversation(stage, f"moves {stream}", words=600)
    meter = Meter(stage.fleet)
    with within(BUDGET_S):
        directing.told = True  # by every answer to the first turn's reports, whenever they are sent
        talk.ask(client, stream=stream)
        assert conserve.flush(30)
        directing.told = False
        talk.ask(client, stream=stream)
        talk.ask(client, stream=stream)
    before, moved, after = stage.turns.records
    assert [body["cause"] for body in directing.asked] == ["re_lease"]
    assert (moved.prefill_engine_id, moved.migrated, moved.loss) == (before.decoder_id, True, "")
    assert moved.decoder_id != before.decoder_id
    assert (after.decoder_id, after.migrated, after.loss, after.hops) == (moved.decoder_id, False, "", 1)
    counted = meter.settled(requests=4, transfers=2)
    assert counted.decoders.transfers == 2  # prefiller to decoder, decoder to decoder
    assert counted.decoders.failed_transfers == 0
    assert counted.prefiller.requests == 1
    size = stage.fleet.engines["d0"].block_size_tokens
    # The old decoder computed what the turn before had not left there, and the new one pulled it all.
    assert counted.decoders.prompt_transferred_tokens >= before.prompt_tokens + moved.prompt_tokens - 4 * size
    assert counted.decoders.prompt_computed_tokens < 8 * size


def test_whoever_is_on_a_drained_decoder_takes_its_kv_along(stage):
    broker = stage.broker(placement={"preset": "paper", "re_lease": True}, **HOLD_OFF)
    conserve = stage.sdk(broker)
    client = stage.client(conserve)
    talk = Conversation(stage, "drained", words=600)
    meter = Meter(stage.fleet)
    with within(BUDGET_S):
        talk.ask(client)
        old = stage.last.decoder_id
        httpx2.post(f"{broker.url}/v1/engines/{old}/drain", trust_env=False).raise_for_status()
        talk.ask(client)  # may have been told already, or is told by the answer to the report about it
        assert conserve.flush(30)
        talk.ask(client)
        talk.ask(client)
    first, *later = stage.turns.records
    assert not any(record.error or record.loss for record in stage.turns.records)
    (moved,) = [record for record in later if record.migrated]
    assert moved.prefill_engine_id == old
    assert moved.decoder_id != old
    assert {record.decoder_id for record in later[later.index(moved) :]} == {moved.decoder_id}
    assert later[-1] is not moved
    assert moved.epoch > first.epoch or moved.lease_id != first.lease_id
    counted = meter.settled(requests=5, transfers=2)
    assert (counted.decoders.transfers, counted.decoders.failed_transfers) == (2, 0)
    assert counted.prefiller.requests == 1, "nothing was prefilled twice"
    assert conserve.flush(30)
    left = httpx2.get(f"{broker.url}/v1/engines/{old}", trust_env=False).raise_for_status().json()
    assert (left["state"], left["leases"]) == ("draining", 0)
