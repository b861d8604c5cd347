"""`check-config`: the merged configuration, and engines that do not fit it."""

import re
from pathlib import Path
from typing import Any

import pytest

from conserve_broker.check import EngineFinding, Report, check_config

EXAMPLE = Path(__file__).parents[2] / "broker/broker.example.toml"
SECRET = "s3cret-" * 6


def engine(engine_id: str, url: str, **changes: Any) -> str:
    table = {"id": engine_id, "url": url, "role": "decoder", "model": "conserve-tiny"} | changes
    return "[[engine]]\n" + "".join(f"{key} = {value!r}\n" for key, value in table.items())


@pytest.fixture
def check(tmp_path: Path) -> Any:
    def run(text: str, **options: Any) -> Report:
        path = tmp_path / "broker.toml"
        path.write_text(f"[journal]\npath = 'leases.db'\n{text}")
        return check_config(path, **options)

    return run


class TestExample:
    def test_the_example_is_right(self) -> None:
        report = check_config(EXAMPLE)
        assert (report.errors, report.warnings, report.exit_code) == ((), (), 0)
        assert report.text().endswith("broker.example.toml: ok")
        assert not list(EXAMPLE.parent.glob("leases.db*")), "checking writes nothing"

    def test_the_example_shows_the_defaults(self, tmp_path: Path) -> None:
        """Every `key = value` of the example is the default, so that what is left out takes the values shown."""
        fleet = EXAMPLE.read_text().partition("\n[[engine]]\n")
        bare = tmp_path / "broker.toml"
        bare.write_text(f"[journal]\npath = {str(EXAMPLE.parent / 'leases.db')!r}\n[[engine]]\n{fleet[2]}")
        shown, default = check_config(EXAMPLE).config, check_config(bare).config
        assert shown == default

    def test_what_is_commented_out_is_right_too(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        text = re.sub(r"^# (?=\[\[|[a-z_0-9]+ = )", "", EXAMPLE.read_text(), flags=re.MULTILINE)
        key = tmp_path / "key"
        key.write_text(SECRET)
        path = tmp_path / "broker.toml"
        path.write_text(text.replace("/run/secrets/conserve-token-key", str(key)))
        report = check_config(path)
        assert (report.errors, report.warnings) == ((), ())
        assert report.config is not None
        assert len(report.config.token.keys) == 1
        assert len(report.config.engine) == 4


class TestText:
    def test_the_merged_result_reads_back_as_toml(self, check: Any, tmp_path: Path) -> None:
        fleet = engine("d0", "http://d0:8000", tier='the "big" one') + engine("d1", "http://d1:8000")
        report = check(fleet, overrides={"listen": {"port": 9}})
        again = tmp_path / "again.toml"
        again.write_text(report.text().rpartition("\n")[0])
        assert check_config(again).config == report.config
        assert report.config.listen.port == 9

    def test_secrets_are_hidden(self, check: Any) -> None:
        report = check(f"[[token.keys]]\nkid = 'a'\nsecret = '{SECRET}'\n{engine('d0', 'http://d0')}")
        assert report.exit_code == 0
        assert SECRET not in report.text()
        assert 'keys = [{ kid = "a", secret = "**********" }]' in report.text()

    def test_errors_and_exit_code(self, check: Any) -> None:
        report = check("[lease]\nttl_ms = 1\n", probe=True)
        assert (report.config, report.exit_code, report.engines) == (None, 2, ())
        error, last = report.text().splitlines()
        assert error == "error: lease.ttl_ms: must be at least 5000 (got 1)"
        assert last.endswith("broker.toml: not usable as it is")

    def test_a_secret_that_cannot_be_had_is_an_error(self, check: Any) -> None:
        report = check("[[token.keys]]\nkid = 'a'\nsecret_env = 'CONSERVE_TEST_UNSET'\n")
        assert report.errors == ("token.keys.a.secret_env: CONSERVE_TEST_UNSET is not set in the environment",)

    def test_warnings_do_not_fail(self, check: Any) -> None:
        report = check("")
        assert report.exit_code == 0
        assert "warning: engine: none is configured" in report.text()


class TestProbe:
    def finding(self, report: Report, engine_id: str) -> EngineFinding:
        return next(finding for finding in report.engines if finding.engine_id == engine_id)

    def test_an_engine_that_fits(self, check: Any, page_engines: Any) -> None:
        report = check(engine("d0", page_engines().url, block_size_tokens=32, max_model_len_tokens=2048), probe=True)
        assert report.exit_code == 0
        assert "ok     d0: conserve-tiny; KV 8192 tokens in blocks of 32; 0 running, 0 waiting" in report.text()

    @pytest.mark.parametrize(
        ("keys", "pages", "misfit"),
        [
            ({"model": "other"}, {}, "does not serve 'other'; set model to one of: conserve-tiny"),
            ({}, {"models": {"data": []}}, "does not serve 'conserve-tiny'; set model to one of: (it lists none)"),
            ({"max_model_len_tokens": 4096}, {}, "max_model_len_tokens: 4096 is above what it serves (2048)"),
            ({"block_size_tokens": 16}, {}, "block_size_tokens: 16 is configured, 32 is served"),
            ({}, {"without": b"cache_config_info"}, "its metrics have no vllm:cache_config_info with a capacity; set"),
            (
                {},
                {"without": b"nixl"},
                "has no NIXL connector (no vllm:nixl_ series), so it moves no KV; start it with",
            ),
            ({}, {"off": True}, "prefix caching is off, so every turn computes the whole history; start it with"),
            ({}, {"status": {"/health": 500}}, "/health answered 500; start it or correct url"),
            ({}, {"hang": True}, "no answer within 0.2 s; start it or correct url"),
        ],
    )
    def test_what_does_not_fit(
        self, keys: dict[str, Any], pages: dict[str, Any], misfit: str, check: Any, page_engines: Any
    ) -> None:
        served = page_engines()
        if "without" in pages:
            served.page = b"\n".join(line for line in served.page.split(b"\n") if pages["without"] not in line)
        if "off" in pages:
            served.page = served.page.replace(b'enable_prefix_caching="True"', b'enable_prefix_caching="False"')
        vars(served).update(pages)
        timeout = {"scrape": {"timeout_ms": 200 if served.hang else 20_000}}
        report = check(engine("d0", served.url, **keys), probe=True, overrides=timeout)
        assert report.exit_code == 2
        assert f"MISFIT d0: {report.engines[0].summary}" in report.text()
        assert f"       d0: {misfit}" in report.text()

    def test_a_configured_capacity_makes_up_for_a_missing_one(self, check: Any, page_engines: Any) -> None:
        served = page_engines()
        served.page = b"\n".join(line for line in served.page.split(b"\n") if b"cache_config_info" not in line)
        assert check(engine("d0", served.url, kv_capacity_tokens=8192), probe=True).exit_code == 0

    def test_a_transfer_group_of_unlike_engines(self, check: Any, page_engines: Any) -> None:
        here, there, alone = page_engines(), page_engines(), page_engines()
        there.page = there.page.replace(b',block_size="32"', b',block_size="16"')
        fleet = engine("d0", here.url) + engine("d1", there.url) + engine("x", alone.url, transfer_group="alone")
        report = check(fleet, probe=True)
        told = "transfer_group 'default' mixes block sizes (16, 32); start its engines with one --block-size"
        assert self.finding(report, "d0").misfits == (told,)
        assert self.finding(report, "d1").misfits == (told,)
        assert self.finding(report, "x").misfits == ()

    def test_notes_are_no_misfits(self, check: Any, page_engines: Any) -> None:
        served = page_engines()
        served.page = b"\n".join(line for line in served.page.split(b"\n") if b"process_start_time" not in line)
        report = check(engine("d0", served.url, connector="none"), probe=True)
        assert report.exit_code == 0
        assert "d0: note: has a NIXL connector that the configuration leaves unused" in report.text()
        assert "d0: note: its metrics have no process_start_time_seconds" in report.text()
