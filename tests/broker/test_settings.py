"""Configuration: order of sources, bounds, rules across tables, and errors that name key and remedy."""

import stat
from pathlib import Path
from typing import Any

import pytest

from conserve_broker.settings import BrokerConfig, ConfigProblem, EngineTable, load_config
from conserve_sdk.core.settings import AFFINITY, DEFAULT, PAPER, BrokerSettings
from conserve_sdk.core.vocabulary import Role

SECRET = "s3cret-" * 6


def engine(engine_id: str = "d0", **changes: Any) -> dict[str, Any]:
    return {"id": engine_id, "url": f"http://{engine_id}:8000", "role": "decoder", "model": "m"} | changes


def problems(data: dict[str, Any]) -> str:
    with pytest.raises(ConfigProblem) as raised:
        BrokerConfig.from_mapping(data)
    return str(raised.value)


@pytest.fixture
def toml(tmp_path: Path) -> Any:
    def write(text: str) -> Path:
        path = tmp_path / "broker.toml"
        path.write_text(text)
        return path

    return write


class TestSources:
    def test_defaults_are_those_of_the_core(self) -> None:
        config = BrokerConfig.model_validate({})
        assert config.core_settings() == BrokerSettings()
        assert (config.listen.host, config.listen.port, config.engine_configs()) == ("127.0.0.1", 7070, ())

    def test_overrides_beat_environment_beats_file_beats_default(
        self, toml: Any, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        path = toml("[listen]\nhost = 'file'\nport = 1\n[scrape]\ninterval_ms = 700\n")
        monkeypatch.setenv("CONSERVE_BROKER__LISTEN__PORT", "2")
        monkeypatch.setenv("CONSERVE_BROKER__LISTEN__HOST", "env")
        config = load_config(path, overrides={"listen": {"host": "flag"}})
        assert (config.listen.host, config.listen.port) == ("flag", 2)
        assert (config.scrape.interval_ms, config.scrape.timeout_ms) == (700, 2_000)

    def test_environment_alone_can_name_engines(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv(
            "CONSERVE_BROKER__ENGINE", '[{"id": "d0", "url": "http://d0", "role": "decoder", "model": "m"}]'
        )
        assert [spec.engine_id for spec in load_config(None).engine_configs()] == ["d0"]

    @pytest.mark.parametrize(
        ("name", "value", "message"),
        [
            ("CONSERVE_BROKER__LISTN__PORT", "1", "unknown table 'listn'; did you mean 'listen'?"),
            ("CONSERVE_BROKER__LISTEN__PROT", "1", "unknown key 'prot'; did you mean 'port'?"),
            ("CONSERVE_BROKER__ENGINE", "not json", "JSON"),
            ("CONSERVE_BROKER__LEASE__TTL_MS", "soon", "lease.ttl_ms: input should be a valid integer"),
        ],
    )
    def test_wrong_environment_is_an_error(
        self, name: str, value: str, message: str, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setenv(name, value)
        with pytest.raises(ConfigProblem) as raised:
            load_config(None)
        assert message in str(raised.value)

    def test_other_variables_of_the_project_are_not_its_own(self, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CONSERVE_BROKER_URL", "http://127.0.0.1:7070")
        load_config(None)

    def test_relative_paths_start_at_the_file(self, toml: Any, tmp_path: Path) -> None:
        path = toml("[journal]\npath = 'state/leases.db'\n[[token.keys]]\nkid = 'a'\nsecret_file = 'key'\n")
        config = load_config(path)
        assert config.journal.path == str(tmp_path / "state/leases.db")
        assert config.token.keys[0].secret_file == str(tmp_path / "key")

    def test_an_empty_path_stays_memory_only(self, toml: Any) -> None:
        assert load_config(toml("[journal]\npath = ''\n")).journal.path == ""

    def test_unreadable_file(self, tmp_path: Path) -> None:
        with pytest.raises(ConfigProblem, match=r"none\.toml: cannot be read .* correct the path given with --config"):
            load_config(tmp_path / "none.toml")

    def test_broken_toml(self, toml: Any) -> None:
        with pytest.raises(ConfigProblem, match=r"is not valid TOML: .*line 1"):
            load_config(toml("[listen\nport = 1"))


class TestMeaning:
    def test_every_setting_reaches_the_core(self) -> None:
        config = BrokerConfig.from_mapping(
            {
                "lease": {"ttl_ms": 9_000, "park_ttl_ms": 2_000, "hold_ms": 3_000, "hold_share": 0.25},
                "admission": {
                    "wait_max_ms": 1,
                    "retry_after_ms": 2,
                    "queue_max": 3,
                    "leases_max": 5,
                    "leases_per_tenant_max": 4,
                },
                "scrape": {
                    "interval_ms": 100,
                    "suspect_after_ms": 400,
                    "gone_after_ms": 900,
                    "observation_max_age_ms": 800,
                },
            }
        )
        settings = config.core_settings()
        assert settings == BrokerSettings(
            placement=DEFAULT,
            ttl_ms=9_000,
            park_ttl_ms=2_000,
            hold_ms=3_000,
            hold_share_ppm=250_000,
            wait_max_ms=1,
            retry_after_ms=2,
            queue_max=3,
            leases_max=5,
            leases_per_tenant_max=4,
            suspect_after_ms=400,
            gone_after_ms=900,
            observation_max_age_ms=800,
        )

    @pytest.mark.parametrize("preset", [PAPER, DEFAULT, AFFINITY])
    def test_presets_are_taken_whole(self, preset: Any) -> None:
        config = BrokerConfig.from_mapping({"placement": {"preset": preset.name}})
        assert config.core_settings().placement == preset

    def test_ratios_become_parts_per_million_and_the_rest_stays(self) -> None:
        placement = BrokerConfig.from_mapping(
            {
                "placement": {
                    "kv_watermark": 0.8,
                    "hint_slack": 0.00397,
                    "harm_weight": 1.5,
                    "local_below_tokens": 7,
                    "extra_work": 0.25,
                    "transfer_overhead_us": 8,
                    "transfer_tokens_per_s": 9,
                    "default_rate_tokens_per_s": 10,
                    "reserve_tokens": 11,
                }
            }
        ).core_settings()
        assert placement.placement.name == "default"
        changed = placement.placement
        assert (changed.kv_watermark_ppm, changed.hint_slack_ppm, changed.harm_weight_ppm) == (
            800_000,
            3_970,
            1_500_000,
        )
        assert changed.extra_work_ppm == 250_000
        assert (changed.local_below_tokens, changed.transfer_overhead_us, changed.transfer_tokens_per_s) == (7, 8, 9)
        assert (changed.default_rate_tokens_per_s, changed.reserve_tokens) == (10, 11)

    def test_grace_follows_the_ttl(self) -> None:
        assert BrokerConfig.from_mapping({"lease": {"ttl_ms": 100_000}}).lease.grace_ms == 50_000
        assert BrokerConfig.from_mapping({"lease": {"ttl_ms": 12_000}}).lease.grace_ms == 10_000
        assert BrokerConfig.from_mapping({"lease": {"grace_ms": 40_000}}).lease.grace_ms == 40_000

    def test_an_engine_becomes_a_spec(self) -> None:
        config = BrokerConfig.from_mapping(
            {
                "engine": [
                    engine(
                        "b0",
                        role="both",
                        transfer_group="g",
                        block_size_tokens=32,
                        kv_capacity_tokens=6144,
                        max_model_len_tokens=4096,
                        max_hold_ms=12_000,
                        tier="a100",
                    )
                ]
            }
        )
        (spec,) = config.engine_configs()
        assert (spec.engine_id, spec.url, spec.role, spec.model) == ("b0", "http://b0:8000", Role.BOTH, "m")
        assert (spec.transfer_group, spec.block_size_tokens, spec.kv_capacity_tokens) == ("g", 32, 6144)
        assert (spec.max_model_len_tokens, spec.max_hold_ms, spec.tier) == (4096, 12_000, "a100")

    @pytest.mark.parametrize(
        ("connector", "group", "hold_ms"),
        [("nixl", "default", 30_000), ("none", "", 0), ("NixlConnector", "default", 30_000), (None, "", 0)],
    )
    def test_the_connector_decides_what_is_left_out(self, connector: str | None, group: str, hold_ms: int) -> None:
        config = BrokerConfig.from_mapping({"engine": [engine(connector=connector)]})
        (spec,) = config.engine_configs()
        assert (spec.transfer_group, spec.max_hold_ms) == (group, hold_ms)

    @pytest.mark.parametrize(
        ("written", "meant"),
        [
            ("http://D0:80/", "http://d0"),
            ("https://d0:443", "https://d0"),
            ("https://d0:80", "https://d0:80"),
            (" http://[::1]:8000/vllm/ ", "http://[::1]:8000/vllm"),
        ],
    )
    def test_urls_have_one_spelling(self, written: str, meant: str) -> None:
        assert EngineTable.model_validate(engine(url=written)).url == meant


class TestProblems:
    @pytest.mark.parametrize(
        ("data", "line"),
        [
            ({"listn": {}}, "listn: unknown key; did you mean 'listen'?"),
            ({"qqq": 1}, "qqq: unknown key; known here: access, admission, discovery, engine, journal, lease, listen"),
            ({"lease": {"interval_ms": 5}}, "lease.interval_ms: unknown key; it belongs in [scrape]"),
            ({"lease": {"ttl": 5}}, "lease.ttl: unknown key; did you mean 'ttl_ms'?"),
            ({"lease": {"ttl_ms": 10}}, "lease.ttl_ms: must be at least 5000 (got 10)"),
            ({"lease": {"ttl_ms": 4_000_000}}, "lease.ttl_ms: must be at most 3600000 (got 4000000)"),
            ({"lease": {"hold_share": 1.5}}, "lease.hold_share: must be at most 1.0 (got 1.5)"),
            ({"lease": 5}, "lease: input should be a valid dictionary"),
            (
                {"placement": {"preset": "papr"}},
                "placement.preset: input should be 'paper', 'default' or 'affinity' (got",
            ),
            ({"engine": [{"id": "x"}]}, "engine.x.url: is missing; add it"),
            ({"engine": [{}]}, "engine[0].id: is missing; add it"),
            ({"engine": {"id": "x"}}, "engine: input should be a valid tuple"),
            ({"engine": [engine("a/b")]}, "engine.a/b.id: string should match pattern"),
            ({"engine": [engine(conector="nixl")]}, "engine.d0.conector: unknown key; did you mean 'connector'?"),
            ({"engine": [engine(url="d0:8000")]}, "engine.d0.url: must be an http or https URL such as"),
            ({"engine": [engine(url="http://d0:99999")]}, "engine.d0.url: is not a URL"),
            (
                {"engine": [engine(url="http://d0/v1/")]},
                "engine.d0.url: must be the engine's base URL: leave out '/v1'",
            ),
            ({"engine": [engine(url="http://u:p@d0")]}, "engine.d0.url: must not hold a user name or password"),
            ({"engine": [engine(url="http://d0?a=1")]}, "engine.d0.url: must end before '?' and '#'"),
        ],
    )
    def test_each_key(self, data: dict[str, Any], line: str) -> None:
        assert problems(data).splitlines()[0].startswith(line)

    @pytest.mark.parametrize(
        ("engines", "line"),
        [
            ([engine(), engine(url="http://other")], "engine.d0.id: used by more than one engine"),
            (
                [engine(), engine("d1", url="http://D0:8000/")],
                "engine.url: http://d0:8000 is named by d0, d1; one [[engine]]",
            ),
            (
                [engine(), engine("p", role="prefiller", connector="none")],
                "engine.p.connector: a prefiller without a KV",
            ),
            (
                [engine(connector="none", transfer_group="g")],
                "engine.d0.transfer_group: an engine without a KV connector",
            ),
            ([engine(transfer_group="")], "engine.d0.transfer_group: must not be empty with connector = 'nixl'"),
            (
                [engine(), engine("d1", model="n")],
                "engine.transfer_group: group 'default' mixes model (m: d0; n: d1); KV moves only between",
            ),
            (
                [engine(block_size_tokens=16), engine("d1", block_size_tokens=32), engine("d2")],
                "engine.transfer_group: group 'default' mixes block_size_tokens (16: d0; 32: d1); KV moves",
            ),
            ([engine("p", role="prefiller")], "engine.role: model 'm' has no decoder (p only prefill); add one"),
            (
                [engine(), engine("p", role="prefiller", transfer_group="far")],
                "engine.p.transfer_group: no decoder of model 'm' is in group 'far'; put both into one group",
            ),
        ],
    )
    def test_rules_about_the_fleet(self, engines: list[dict[str, Any]], line: str) -> None:
        assert line in problems({"engine": engines})

    def test_the_paper_needs_a_prefiller_for_every_model(self) -> None:
        fleet = [engine(), engine("p", role="prefiller"), engine("e0", model="n", transfer_group="n")]
        told = problems({"placement": {"preset": "paper"}, "engine": fleet})
        assert told.startswith("placement.preset: 'paper' needs a prefiller for model 'n'; add an engine with role")
        both = [engine(), engine("b", role="both")]
        BrokerConfig.from_mapping({"placement": {"preset": "paper"}, "engine": both})

    @pytest.mark.parametrize(
        ("data", "line"),
        [
            (
                {"lease": {"ttl_ms": 5_000}, "scrape": {"interval_ms": 2_000, "suspect_after_ms": 4_000}},
                "lease.ttl_ms: 5000",
            ),
            (
                {"lease": {"ttl_ms": 6_000, "park_ttl_ms": 7_000}},
                "lease.park_ttl_ms: 7000 is above lease.ttl_ms (6000)",
            ),
            ({"scrape": {"suspect_after_ms": 1_999}}, "scrape.suspect_after_ms: 1999 is under two scrapes (2000)"),
            (
                {"scrape": {"gone_after_ms": 3_000}},
                "scrape.gone_after_ms: 3000 must be above scrape.suspect_after_ms (3000)",
            ),
            ({"scrape": {"observation_max_age_ms": 1_999}}, "scrape.observation_max_age_ms: 1999 is under two scrapes"),
        ],
    )
    def test_rules_about_times(self, data: dict[str, Any], line: str) -> None:
        assert line in problems(data)

    def test_the_bounds_themselves_are_fine(self) -> None:
        BrokerConfig.from_mapping(
            {
                "lease": {"ttl_ms": 6_000, "park_ttl_ms": 6_000},
                "scrape": {
                    "interval_ms": 2_000,
                    "suspect_after_ms": 4_000,
                    "gone_after_ms": 4_001,
                    "observation_max_age_ms": 4_000,
                },
            }
        )

    def test_every_problem_of_a_file_is_told_at_once(self) -> None:
        told = problems({"lease": {"ttl_ms": 1, "hold_share": 2}, "engine": [{"id": "x"}], "oops": 1})
        assert len(told.splitlines()) == 6

    def test_a_problem_is_a_problem_through_model_validate_too(self) -> None:
        with pytest.raises(ValueError, match=r"engine\.d0\.id: used by more than one engine"):
            BrokerConfig.model_validate({"engine": [engine(), engine(url="http://other")]})


class TestWarnings:
    def test_a_whole_configuration_has_none(self) -> None:
        assert BrokerConfig.from_mapping({"journal": {"path": "x"}, "engine": [engine()]}).warnings() == ()

    @pytest.mark.parametrize(
        ("data", "start"),
        [
            ({"engine": []}, "engine: none is configured"),
            ({"journal": {"path": ""}}, "journal.path: empty, so a restart"),
            ({"lease": {"grace_ms": 1_000}}, "lease.grace_ms: 1000 is under half of lease.ttl_ms (60000)"),
            ({"admission": {"leases_max": 5}}, "admission.leases_per_tenant_max: above admission.leases_max"),
            ({"engine": [engine(max_hold_ms=5_000)]}, "lease.hold_ms: 10000 is above max_hold_ms of d0 (5000)"),
        ],
    )
    def test_what_works_but_is_hardly_meant(self, data: dict[str, Any], start: str) -> None:
        whole = {"journal": {"path": "x"}, "engine": [engine()]}
        (warning,) = BrokerConfig.from_mapping(whole | data).warnings()
        assert warning.startswith(start)

    def test_engines_that_cannot_hold_are_no_reason_to_warn(self) -> None:
        fleet = [engine(max_hold_ms=0), engine("d1", max_hold_ms=10_000), engine("p", role="prefiller", max_hold_ms=1)]
        assert BrokerConfig.from_mapping({"journal": {"path": "x"}, "engine": fleet}).warnings() == ()


class TestSigningKeys:
    def test_value_environment_and_file(self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
        (tmp_path / "key").write_text(f"{SECRET}c\n")
        monkeypatch.setenv("MY_KEY", f" {SECRET}b ")
        keys = [
            {"kid": "a", "secret": SECRET},
            {"kid": "b", "secret_env": "MY_KEY"},
            {"kid": "c", "secret_file": str(tmp_path / "key")},
        ]
        resolved = BrokerConfig.from_mapping({"token": {"keys": keys}}).token_keys()
        assert [(key.kid, key.secret.decode()) for key in resolved] == [
            ("a", SECRET),
            ("b", f"{SECRET}b"),
            ("c", f"{SECRET}c"),
        ]

    @pytest.mark.parametrize(
        ("keys", "line"),
        [
            ([{"kid": "a", "secret": "short"}], "token.keys.a.secret: shorter than 32 bytes; make one with `openssl"),
            ([{"kid": "a"}], "token.keys.a: set exactly one of secret, secret_file, secret_env"),
            ([{"kid": "a", "secret": SECRET, "secret_env": "X"}], "token.keys.a: set exactly one of"),
            (
                [{"kid": "a", "secret": SECRET}, {"kid": "a", "secret_env": "X"}],
                "token.keys.a.kid: used by more than one",
            ),
            ([{"kid": "a", "sekret": SECRET}], "token.keys.a.sekret: unknown key; did you mean 'secret'?"),
            ([{"kid": "a", "secret": [SECRET]}], "token.keys.a.secret: input should be a valid string"),
        ],
    )
    def test_wrong_keys_are_told_without_the_secret(self, keys: list[dict[str, Any]], line: str) -> None:
        told = problems({"token": {"keys": keys}})
        assert line in told
        assert SECRET not in told
        assert "short'" not in told

    @pytest.mark.parametrize(
        ("key", "line"),
        [
            ({"secret_env": "CONSERVE_TEST_UNSET"}, "token.keys.a.secret_env: CONSERVE_TEST_UNSET is not set"),
            ({"secret_env": "CONSERVE_TEST_SHORT"}, "token.keys.a: the secret has under 32 bytes; make one with"),
            ({"secret_file": "/nowhere/key"}, "token.keys.a.secret_file: cannot read /nowhere/key (No such file"),
        ],
    )
    def test_secrets_that_cannot_be_had(self, key: dict[str, str], line: str, monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setenv("CONSERVE_TEST_SHORT", "tiny")
        config = BrokerConfig.from_mapping({"token": {"keys": [{"kid": "a"} | key]}})
        with pytest.raises(ConfigProblem) as raised:
            config.token_keys()
        assert str(raised.value).startswith(line)

    def test_the_default_key_is_made_once_beside_the_journal(self, tmp_path: Path) -> None:
        config = BrokerConfig.from_mapping({"journal": {"path": str(tmp_path / "leases.db")}})
        path = tmp_path / "leases.db.key"
        config.token_keys(create=False)
        assert not path.exists()
        first = config.token_keys()
        assert first == config.token_keys()
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
        assert list(tmp_path.iterdir()) == [path], "no draft is left behind"

    def test_a_key_made_by_another_process_meanwhile_is_kept(
        self, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        config = BrokerConfig.from_mapping({"journal": {"path": str(tmp_path / "leases.db")}})
        theirs = config.token_keys()
        monkeypatch.setattr(Path, "exists", lambda _: False)  # as it looked before they made it
        assert config.token_keys() == theirs

    def test_without_a_journal_the_key_ends_with_the_process(self) -> None:
        config = BrokerConfig.from_mapping({})
        assert config.token_keys() != config.token_keys()

    def test_a_truncated_default_key_is_refused(self, tmp_path: Path) -> None:
        (tmp_path / "leases.db.key").write_bytes(b"x")
        config = BrokerConfig.from_mapping({"journal": {"path": str(tmp_path / "leases.db")}})
        with pytest.raises(ConfigProblem, match="holds no key; delete it"):
            config.token_keys()

    def test_a_folder_that_is_missing_is_told(self, tmp_path: Path) -> None:
        config = BrokerConfig.from_mapping({"journal": {"path": str(tmp_path / "none" / "leases.db")}})
        with pytest.raises(ConfigProblem, match=r"make its folder writable or set token\.keys"):
            config.token_keys()

    def test_secrets_are_never_shown(self) -> None:
        config = BrokerConfig.from_mapping({"token": {"keys": [{"kid": "a", "secret": SECRET}]}})
        shown = f"{config!r} {config} {config.printable()} {config.token_keys()!r}"
        assert SECRET not in shown
        assert config.printable()["token"]["keys"][0]["kid"] == "a"


def test_every_key_is_described() -> None:
    for name, table in BrokerConfig.model_fields.items():
        kind = EngineTable if name == "engine" else table.annotation
        for key, field in kind.model_fields.items():  # type: ignore[union-attr]
            assert field.description, f"{name}.{key}"
