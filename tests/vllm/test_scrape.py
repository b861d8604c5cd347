"""The broker's reading of a real page: what placement and restarts of engines are judged by."""

from conserve_broker.metrics_page import read_page


def page_of(raw, engine_id):
    return read_page(raw.http.get(f"{raw.fleet.engines[engine_id].url}/metrics").raise_for_status().content)


def test_capacity_blocks_and_connector_are_read_from_the_page(raw, fleet):
    for engine_id in ("p0", "d0"):
        page = page_of(raw, engine_id)
        assert page.kv_capacity_tokens == fleet.options.kv_cache_tokens
        assert page.block_size_tokens == 32
        assert page.prefix_caching
        assert page.nixl
    assert not page_of(raw, "a0").nixl


def test_held_kv_shows_as_used(raw):
    messages = raw.task("seen", words=500)
    answer = raw.ask("d0", raw.body(messages) | {"kv_transfer_params": {"do_remote_decode": True}})
    raw.settled("d0", lambda now: now.running == 0)
    assert page_of(raw, "d0").kv_used_tokens >= answer["usage"]["prompt_tokens"] // 32 * 32


def test_transferred_tokens_are_told_from_computed_ones(raw):
    before = page_of(raw, "d1"), raw.fleet.metrics("d1")
    tokens = raw.migrate(raw.body(raw.task("moved")), decoder="d1")["usage"]["prompt_tokens"]
    raw.settled("d1", lambda now: now.since(before[1]).transfers >= 1)
    after = page_of(raw, "d1")
    assert after.transferred_tokens_total - before[0].transferred_tokens_total == tokens
    assert after.prefill_tokens_total == before[0].prefill_tokens_total


def test_a_restart_changes_the_start_time_and_nothing_else_does(raw, fleet):
    first, again = page_of(raw, "d1").started_at_s, page_of(raw, "d1").started_at_s
    assert first is not None
    assert first == again
    fleet.restart("d1")
    assert page_of(raw, "d1").started_at_s > first
