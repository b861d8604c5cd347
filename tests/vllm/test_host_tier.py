"""vLLM's host tier beside NIXL: an idle conversation that was evicted comes back from host memory.

vLLM refuses its own copy on a machine without a GPU; here another one takes its place, and all else is vLLM's
(`lab/conserve_lab/vllm/runtime/host_copy.py`). `d1` has it.
"""

import pytest

QUESTION = {"role": "user", "content": "and now"}
BLOCK = 32


@pytest.fixture
def tiered(leased, guarded_fleet):
    """Plain legs: `p0` needs a lease for a prefill leg, `d1` has no guard."""
    if not guarded_fleet.is_alive("d1"):
        guarded_fleet.restart("d1")
    return leased


def test_an_evicted_conversation_comes_back_from_host_memory(tiered, guarded_fleet):
    messages = tiered.task("evicted", words=600)
    answer = tiered.ask("d1", tiered.body(messages))
    history = answer["usage"]["prompt_tokens"] // BLOCK * BLOCK
    tiered.fill_cache("d1", tag="host")
    before = guarded_fleet.metrics("d1")
    messages = [*messages, {"role": "assistant", "content": tiered.said(answer)}, QUESTION]

    later = tiered.ask("d1", tiered.body(messages))

    assert tiered.said(later) == tiered.said(tiered.ask("a0", tiered.body(messages)))
    counted = tiered.settled("d1", lambda now: now.since(before).requests == 1).since(before)
    assert counted.prompt_cached_tokens < BLOCK, "the cache itself had lost it"
    assert counted.prompt_transferred_tokens >= history
    assert counted.prompt_computed_tokens <= later["usage"]["prompt_tokens"] - history
    assert tiered.cached(later) >= history, "and the client is told so"


def test_kv_that_came_by_nixl_comes_back_from_host_memory_too(tiered, guarded_fleet):
    tiered.lease_token = tiered.token(decoder="d1", life="")
    messages = tiered.task("moved, then evicted", words=600)
    before = guarded_fleet.metrics("d1")
    params = tiered.prefill(tiered.body(messages))
    params.pop("conserve_stamp", None)
    answer = tiered.ask("d1", tiered.body(messages) | {"kv_transfer_params": params})
    assert tiered.settled("d1", lambda now: now.since(before).transfers == 1)
    tiered.fill_cache("d1", tag="moved")
    evicted = guarded_fleet.metrics("d1")
    messages = [*messages, {"role": "assistant", "content": tiered.said(answer)}, QUESTION]

    later = tiered.ask("d1", tiered.body(messages))

    assert tiered.said(later) == tiered.said(tiered.ask("a0", tiered.body(messages)))
    counted = tiered.settled("d1", lambda now: now.since(evicted).requests == 1).since(evicted)
    assert counted.prompt_transferred_tokens >= answer["usage"]["prompt_tokens"] // BLOCK * BLOCK
    assert counted.transfers == 0
