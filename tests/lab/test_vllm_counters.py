"""Counters off a page as vLLM 0.32 prints it (an excerpt of a real one, from a decoder after one migrated turn)."""

import dataclasses

import pytest

from conserve_lab.vllm import EngineCounters, parse_counters

PAGE = """\
# HELP vllm:num_requests_running Number of requests in model execution batches.
# TYPE vllm:num_requests_running gauge
vllm:num_requests_running{engine="0",model_name="conserve-tiny"} 1.0
vllm:num_requests_waiting{engine="0",model_name="conserve-tiny"} 2.0
vllm:num_requests_waiting_by_reason{engine="0",model_name="conserve-tiny",reason="capacity"} 7.0
vllm:kv_cache_usage_perc{engine="0",model_name="conserve-tiny"} 0.05221932114882508
vllm:cache_config_info{block_size="32",cache_dtype="auto",engine="0",num_gpu_blocks="384",sliding_window="None"} 1.0
vllm:prefix_cache_queries_total{engine="0",model_name="conserve-tiny"} 700.0
vllm:prefix_cache_hits_total{engine="0",model_name="conserve-tiny"} 320.0
vllm:external_prefix_cache_queries_total{engine="0",model_name="conserve-tiny"} 380.0
vllm:external_prefix_cache_hits_total{engine="0",model_name="conserve-tiny"} 334.0
vllm:prompt_tokens_total{engine="0",model_name="conserve-tiny"} 700.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="conserve-tiny",source="local_compute"} 46.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="conserve-tiny",source="local_cache_hit"} 320.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="conserve-tiny",source="external_kv_transfer"} 334.0
vllm:prompt_tokens_by_source_total{engine="0",model_name="conserve-tiny",source="of_a_later_version"} 5.0
vllm:generation_tokens_total{engine="0",model_name="conserve-tiny"} 32.0
vllm:num_preemptions_total{engine="0",model_name="conserve-tiny"} 3.0
vllm:request_success_total{engine="0",finished_reason="length",model_name="conserve-tiny"} 1.0
vllm:request_success_total{engine="0",finished_reason="stop",model_name="conserve-tiny"} 1.0
vllm:nixl_xfer_time_seconds_bucket{engine="0",le="0.005",model_name="conserve-tiny"} 1.0
vllm:nixl_xfer_time_seconds_count{engine="0",model_name="conserve-tiny"} 1.0
vllm:nixl_xfer_time_seconds_sum{engine="0",model_name="conserve-tiny"} 0.00210
vllm:nixl_bytes_transferred_count{engine="0",model_name="conserve-tiny"} 1.0
vllm:nixl_bytes_transferred_sum{engine="0",model_name="conserve-tiny"} 180224.0
vllm:nixl_num_failed_transfers_total{engine="0",model_name="conserve-tiny"} 4.0
vllm:nixl_num_kv_expired_reqs_total{engine="0",model_name="conserve-tiny"} 5.0
process_resident_memory_bytes 1.2e+09
vllm:iteration_tokens_total_bucket{engine="0",le="1.0",model_name="conserve-tiny"} not-a-number
"""


def test_a_page_becomes_counters():
    assert parse_counters(PAGE) == EngineCounters(
        prompt_tokens=700,
        prompt_computed_tokens=46,
        prompt_cached_tokens=320,
        prompt_transferred_tokens=334,
        generation_tokens=32,
        prefix_query_tokens=700,
        prefix_hit_tokens=320,
        external_query_tokens=380,
        external_hit_tokens=334,
        requests=2,
        preemptions=3,
        transfers=1,
        transferred_bytes=180_224,
        failed_transfers=4,
        expired_holds=5,
        kv_used_tokens=640,
        running=1,
        waiting=2,
        kv_capacity_tokens=12_288,
        block_size_tokens=32,
    )


def test_an_engine_without_a_connector_has_no_transfers():
    assert parse_counters("# nothing\n\n") == EngineCounters()


def test_differences_keep_what_is_no_count():
    before, after = parse_counters(PAGE), parse_counters(PAGE.replace("700.0", "900.0"))
    change = after.since(before)
    assert (change.prompt_tokens, change.prefix_query_tokens, change.transfers) == (200, 200, 0)
    kept = ("running", "waiting", "kv_used_tokens", "kv_capacity_tokens", "block_size_tokens")
    assert [getattr(change, name) for name in kept] == [getattr(after, name) for name in kept]


def test_counters_of_two_engines_add_up():
    one = parse_counters(PAGE)
    total = one + one
    assert total.block_size_tokens == 32
    for field in dataclasses.fields(EngineCounters):
        if field.name != "block_size_tokens":
            assert getattr(total, field.name) == 2 * getattr(one, field.name)


@pytest.mark.parametrize("usage", ["0.0", "1.0"])
def test_usage_counts_all_blocks_but_the_null_block(usage):
    page = PAGE.replace("0.05221932114882508", usage)
    assert parse_counters(page).kv_used_tokens == int(float(usage)) * 383 * 32
