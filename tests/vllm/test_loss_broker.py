"""A broker that restarts, dies or was never there, under conversations on real vLLM."""

import time

import pytest

from conserve_sdk import BrokerUnavailable

from .leased import HOLD_OFF, Conversation, Meter, within

pytestmark = pytest.mark.usefixtures("emptied")

GONE_BUDGET_S = 60.0
"""For a conversation without a broker: the turns themselves, and at the end a goodbye that nobody hears."""


@pytest.mark.parametrize("end", ["stop", "kill"])
def test_a_broker_that_restarts_knows_its_leases_again(stage, end, recovered):
    broker = stage.broker(journal=True, **HOLD_OFF)
    conserve = stage.sdk(broker)
    client = stage.client(conserve)
    talk, later = Conversation(stage, f"before {end}"), Conversation(stage, f"after {end}")
    meter = Meter(stage.fleet)
    talk.ask(client)
    lease_id = stage.last.lease_id
    assert conserve.flush(GONE_BUDGET_S)

    getattr(broker, end)()
    with within(GONE_BUDGET_S):
        talk.ask(client)
    recovered(f"a broker is gone ({end}): a follow-up meanwhile", stage.last_s)
    started_s = time.monotonic()
    broker.start()
    broker.wait_until_ready(timeout_s=GONE_BUDGET_S, engines=3)
    recovered("from its start anew until it has all engines and leases again", time.monotonic() - started_s)
    with within(GONE_BUDGET_S):
        talk.ask(client)
        later.ask(client)

    assert conserve.flush(GONE_BUDGET_S)
    assert conserve.reports_dropped == 0
    records = stage.turns.records
    assert {record.lease_id for record in records[:3]} == {lease_id}
    assert not any(record.error or record.loss for record in records)
    assert [record.migrated for record in records] == [True, False, False, True]
    assert meter.settled(requests=4, transfers=2).decoders.transfers == 2
    shown = stage.raw.http.get(f"{broker.url}/v1/fleet").raise_for_status().json()
    assert shown["leases"] == 2


def test_live_leases_go_on_when_the_broker_is_gone_for_good(stage):
    broker = stage.broker(**HOLD_OFF)
    conserve = stage.sdk(broker, on_broker_unavailable="raise")
    client = stage.client(conserve)
    talk = Conversation(stage, "orphaned lease")
    meter = Meter(stage.fleet)
    talk.ask(client)
    broker.kill()
    with within(GONE_BUDGET_S):
        for _ in range(3):
            talk.ask(client)
        with pytest.raises(BrokerUnavailable):
            Conversation(stage, "too late").ask(client)
        assert conserve.release("orphaned lease") == 0
        conserve.close()
    records = stage.turns.records[:4]
    assert len({(record.lease_id, record.decoder_id) for record in records}) == 1
    assert not any(record.error or record.loss for record in records)
    assert meter.settled(requests=4, transfers=1).decoders.transfers == 1


def test_without_any_broker_new_conversations_fall_back_and_are_counted(stage, fleet, recovered):
    decoders = [fleet.engines["d0"].url, fleet.engines["d1"].api]
    with within(GONE_BUDGET_S):
        conserve = stage.sdk("http://127.0.0.1:9", fallback_engines=decoders)
        client = stage.client(conserve)
        talk = Conversation(stage, "no broker")
        meter = Meter(fleet)
        for _ in range(3):
            talk.ask(client)
        conserve.close()
    records = stage.turns.records
    recovered("there is no broker: a first turn on a fallback engine", records[0].duration_ms / 1000)
    assert {(record.loss, record.error, record.lease_id) for record in records} == {("broker_unavailable", "", None)}
    assert len({record.decoder_id for record in records}) == 1, "a conversation stays where its cache is"
    assert all(record.cached_tokens > 0 for record in records[1:])
    counted = meter.settled(requests=3)
    assert (counted.decoders.transfers, counted.prefiller.requests) == (0, 0)


def test_without_any_broker_and_fallback_the_error_says_so(stage):
    client = stage.client(stage.sdk("http://127.0.0.1:9"))
    with within(GONE_BUDGET_S), pytest.raises(BrokerUnavailable) as caught:
        Conversation(stage, "nobody").ask(client)
    assert "127.0.0.1:9" in str(caught.value)
    assert "\n" not in str(caught.value)
