"""Reading `/metrics`: a page of real vLLM 0.32, pages of several engines, and pages that are wrong."""

import re
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st
from prometheus_client.parser import text_string_to_metric_families

from conserve_broker._incarnation import IncarnationWatch
from conserve_broker.metrics_page import EngineMetrics, MetricsPageError, read_page

VLLM_PAGE = Path(__file__).with_name("data").joinpath("vllm-0.32.0-decoder.metrics").read_bytes()
"""Scraped from a decoder with the NIXL connector after one request of 101 prompt and 4 generated tokens."""


def config(engine: int, **labels: Any) -> str:
    known = {"block_size": 16, "num_gpu_blocks": 100, "kv_cache_size_tokens": "None", "enable_prefix_caching": True}
    pairs = ",".join(f'{key}="{value}"' for key, value in {"engine": engine, **known, **labels}.items())
    return f"vllm:cache_config_info{{{pairs}}} 1.0"


def page(*lines: str) -> bytes:
    return "\n".join([*lines, 'vllm:num_requests_running{engine="0"} 0.0', ""]).encode()


def test_a_real_page() -> None:
    assert read_page(VLLM_PAGE) == EngineMetrics(
        kv_capacity_tokens=8192,
        kv_used_tokens=0,
        block_size_tokens=32,
        running=0,
        waiting=0,
        prefill_tokens_total=101,
        transferred_tokens_total=0,
        work_tokens_total=105,
        started_at_s=1795387446.44,
        prefix_caching=True,
        nixl=True,
    )


def test_a_server_without_a_connector() -> None:
    lines = [line for line in VLLM_PAGE.split(b"\n") if b"nixl" not in line]
    assert read_page(b"\n".join(lines)).nixl is False


@given(
    st.lists(
        st.tuples(st.integers(0, 5), st.sampled_from(["local_compute", "external_kv_transfer"]), st.integers(0, 10**9)),
        unique_by=lambda sample: sample[:2],
    ),
    st.lists(st.tuples(st.integers(0, 5), st.integers(0, 500)), unique_by=lambda sample: sample[0], min_size=1),
    st.text(st.characters(codec="utf-8", exclude_characters="\n"), max_size=8),
)
def test_it_reads_what_a_general_parser_reads(
    tokens: list[tuple[int, str, int]], running: list[tuple[int, int]], model: str
) -> None:
    escaped = model.replace("\\", r"\\").replace('"', r"\"")
    text = "\n".join(
        [
            "# TYPE vllm:num_requests_running gauge",
            *(f'vllm:num_requests_running{{engine="{e}",model_name="{escaped}"}} {n}.0' for e, n in running),
            "# TYPE vllm:prompt_tokens_by_source counter",
            *(
                f'vllm:prompt_tokens_by_source_total{{model_name="{escaped}",engine="{e}",source="{s}"}} {n}'
                for e, s, n in tokens
            ),
            "",
        ]
    )
    expected = {"running": 0.0, "local_compute": 0.0, "external_kv_transfer": 0.0}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            expected[sample.labels.get("source", "running")] += sample.value
    metrics = read_page(text.encode())
    assert metrics.running == expected["running"]
    assert metrics.prefill_tokens_total == expected["local_compute"]
    assert metrics.transferred_tokens_total == expected["external_kv_transfer"]


class TestCapacity:
    def test_data_parallel_engines_are_summed_each_by_its_own_size(self) -> None:
        metrics = read_page(
            page(
                config(0, num_gpu_blocks=100),
                config(1, num_gpu_blocks=300),
                'vllm:kv_cache_usage_perc{engine="0"} 0.5',
                'vllm:kv_cache_usage_perc{engine="1"} 0.1',
                'vllm:num_requests_running{engine="1"} 3.0',
                'vllm:num_requests_waiting{engine="0"} 1.0',
                'vllm:num_requests_waiting{engine="1"} 1.0',
            )
        )
        assert metrics.kv_capacity_tokens == 1600 + 4800
        assert metrics.kv_used_tokens == 800 + 480
        assert (metrics.block_size_tokens, metrics.running, metrics.waiting) == (16, 3, 2)

    def test_the_engines_own_figure_wins(self) -> None:
        assert read_page(page(config(0, kv_cache_size_tokens=999))).kv_capacity_tokens == 999

    def test_what_is_not_known_yet_is_zero(self) -> None:
        metrics = read_page(page(config(0, num_gpu_blocks="None")))
        assert (metrics.kv_capacity_tokens, metrics.kv_used_tokens) == (0, 0)
        nothing = read_page(page())
        assert (nothing.kv_capacity_tokens, nothing.block_size_tokens, nothing.prefix_caching) == (0, 0, None)
        assert nothing.started_at_s is None

    def test_unlike_block_sizes_are_no_block_size(self) -> None:
        assert read_page(page(config(0, block_size=16), config(1, block_size=32))).block_size_tokens == 0

    def test_usage_without_a_matching_engine_label_counts_by_share(self) -> None:
        metrics = read_page(page(config(0), 'vllm:kv_cache_usage_perc{model_name="m"} 0.25'))
        assert metrics.kv_used_tokens == 400

    def test_the_older_name_of_usage(self) -> None:
        metrics = read_page(page(config(0), 'vllm:gpu_cache_usage_perc{engine="0"} 0.25'))
        assert metrics.kv_used_tokens == 400

    @pytest.mark.parametrize(
        ("flags", "on"), [(["True", "True"], True), (["True", "False"], False), (["False", "True"], False)]
    )
    def test_prefix_caching_is_on_when_every_engine_caches(self, flags: list[str], on: bool) -> None:
        configs = [config(number, enable_prefix_caching=flag) for number, flag in enumerate(flags)]
        assert read_page(page(*configs)).prefix_caching is on


class TestOddPages:
    @pytest.mark.parametrize("text", [b"", b"<html>not found</html>", b"# HELP x\nx 1\n", b"\x00\xff{\n"])
    def test_no_vllm_is_told(self, text: bytes) -> None:
        with pytest.raises(MetricsPageError, match="is this a vLLM server"):
            read_page(text)

    @pytest.mark.parametrize("tail", ["", " ", " many"])
    def test_a_series_without_a_number_is_told(self, tail: str) -> None:
        with pytest.raises(MetricsPageError, match="instead of a number"):
            read_page(f'vllm:num_requests_running{{engine="0"}}{tail}\n'.encode())

    @pytest.mark.parametrize("value", ["NaN", "+Inf", "-Inf"])
    def test_what_is_no_finite_number_counts_as_nothing(self, value: str) -> None:
        assert read_page(page(f"vllm:num_requests_waiting {value}")).waiting == 0

    def test_braces_and_quotes_inside_labels_and_timestamps_behind_values(self) -> None:
        line = (
            r'vllm:prompt_tokens_by_source_total{model_name="a}\"{,source=\"x\"",source="local_compute"} 7 1700000000'
        )
        assert read_page(page(line)).prefill_tokens_total == 7


class TestIncarnation:
    def with_(self, *, started: float | None, work: int) -> EngineMetrics:
        lines = [f"vllm:prompt_tokens_total {work}"]
        if started is not None:
            lines.append(f"process_start_time_seconds {started}")
        return read_page(page(*lines))

    def test_the_start_time_names_it(self) -> None:
        watch = IncarnationWatch()
        first = watch.observe(self.with_(started=1.79538744644e09, work=5))
        assert first == watch.observe(self.with_(started=1.79538744644e09, work=9))
        assert first != watch.observe(self.with_(started=1.79538744649e09, work=9))
        assert IncarnationWatch().observe(self.with_(started=1.79538744644e09, work=0)) == first, (
            "a restarted broker agrees"
        )

    def test_without_a_start_time_counters_that_go_backwards_tell(self) -> None:
        watch = IncarnationWatch()
        seen = [watch.observe(self.with_(started=None, work=work)) for work in (5, 5, 9, 0, 3, 2)]
        assert [incarnation == seen[0] for incarnation in seen] == [True, True, True, False, False, False]
        assert seen[3] == seen[4] != seen[5]

    def test_a_start_time_that_is_missing_once_is_no_restart(self) -> None:
        watch = IncarnationWatch()
        first = watch.observe(self.with_(started=7.0, work=5))
        assert watch.observe(self.with_(started=None, work=6)) == first
        assert watch.observe(self.with_(started=None, work=1)) != first


def test_the_page_in_the_test_data_is_whole() -> None:
    assert len(re.findall(rb"^# TYPE ", VLLM_PAGE, re.MULTILINE)) > 100
