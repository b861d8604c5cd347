"""Long prompts in slices, on real vLLM: each finds the one before it in the cache, and the answer is the same."""

import pytest

from .leased import Conversation, Meter, within

SLICE_CHARS = 1_024


@pytest.mark.parametrize("api", ["chat/completions", "completions"])
def test_a_sliced_prompt_is_computed_once_and_moves_once(stage, api):
    """No engine of this fleet schedules by priority, and vLLM takes the rank of the turn all the same."""
    client = stage.client(stage.sdk(stage.broker(), slice_chars=SLICE_CHARS))
    talk = Conversation(stage, f"sliced {api}", api=api, words=700)
    meter = Meter(stage.fleet)
    with within(100.0):
        talk.ask(client)
        talk.ask(client)
    counted = meter.settled(requests=2, transfers=1)
    first, second = stage.turns.records
    slices = counted.prefiller.requests - 1
    assert slices >= 2
    assert first.hops == slices + 2
    assert first.migrated
    assert counted.decoders.transfers == 1
    assert counted.decoders.prompt_transferred_tokens == first.prompt_tokens
    # Lost of each slice: its last block, and what the chat template puts behind a message.
    lost_tokens = 3 * stage.fleet.engines["p0"].block_size_tokens
    assert counted.prefiller.prompt_computed_tokens <= first.prompt_tokens + slices * lost_tokens
    assert second.hops == 1, "a short question behind a long history is no long prompt"


def test_a_sliced_append_is_computed_once_on_its_decoder(stage):
    client = stage.client(stage.sdk(stage.broker(), slice_chars=SLICE_CHARS))
    talk = Conversation(stage, "sliced append")
    talk.ask(client)
    talk.add(stage.raw.prose("what the tool said", 600))
    meter = Meter(stage.fleet)
    talk.ask(client)
    turn = stage.last
    counted = meter.settled(requests=turn.hops)
    assert turn.hops > 2
    assert counted.prefiller.requests == counted.decoders.transfers == 0
    lost_tokens = 3 * stage.fleet.engines["d0"].block_size_tokens
    history_tokens = stage.turns.records[0].prompt_tokens
    new_tokens = turn.prompt_tokens - history_tokens
    assert counted.decoders.prompt_computed_tokens <= new_tokens + turn.hops * lost_tokens
