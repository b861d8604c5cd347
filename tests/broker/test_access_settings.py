"""`[access]` in the configuration, and `conserve broker keygen`."""

import json
import tomllib
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import pytest

from conserve_broker.api_keys import digest_of, new_key
from conserve_broker.check import check_config
from conserve_broker.cli import broker_main
from conserve_broker.settings import BrokerConfig, ConfigProblem, load_config
from conserve_sdk.core import TenantId

SHA = "0" * 64


def key(**changes: Any) -> dict[str, Any]:
    return {"id": "red-1", "tenant": "red", "scopes": ["agent"], "sha256": SHA, **changes}


def problems(*keys: dict[str, Any], **access: Any) -> str:
    with pytest.raises(ConfigProblem) as caught:
        BrokerConfig.from_mapping({"access": {"keys": list(keys), **access}}).api_keys()
    return str(caught.value)


@pytest.mark.parametrize(
    ("keys", "line"),
    [
        ([key(id="a b")], "access.keys.a b.id: string should match pattern"),
        ([key(scopes=[])], "access.keys.red-1.scopes: tuple should have at least 1 item"),
        ([key(scopes=["root"])], "access.keys.red-1.scopes[0]: input should be 'agent', 'worker' or 'admin'"),
        ([key(sha256="csk.red-1.the-key-itself")], "access.keys.red-1.sha256: string should match pattern"),
        ([key(expires_at=datetime(2027, 1, 1))], "access.keys.red-1.expires_at: input should have timezone info"),  # noqa: DTZ001
        ([key(requests_per_s=-1)], "access.keys.red-1.requests_per_s: must be at least 0"),
        ([key(burst=0)], "access.keys.red-1.burst: must be at least 1"),
        ([key(tenants="x")], "access.keys.red-1.tenants: unknown key; did you mean 'tenant'?"),
        ([key(), key()], "access.keys.red-1.id: used by more than one key; give each its own"),
    ],
)
def test_what_is_wrong_is_named_and_no_secret_shown(keys: list[dict[str, Any]], line: str) -> None:
    found = problems(*keys)
    assert found.splitlines()[0].startswith(line)
    assert "the-key-itself" not in found


def test_one_key_in_file_and_configuration_is_one_too_many(tmp_path: Path) -> None:
    made = new_key(tenant="red", scopes=("agent",), key_id="red-1")
    (tmp_path / "keys.toml").write_text(made.toml().replace("access.keys", "keys"))
    path = tmp_path / "broker.toml"
    path.write_text(f'[access]\nkey_file = "keys.toml"\n{made.toml()}')
    report = check_config(path)
    assert report.exit_code == 2
    assert report.errors == ("access.keys.red-1.id: used by more than one key; give each its own",)


def test_keygen_prints_a_key_and_the_lines_that_let_it_in(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    wanted = ["keygen", "--tenant", "red", "--scope", "agent", "--scope", "worker", "--expires-days", "30"]
    assert broker_main(wanted) == 0
    printed = capsys.readouterr().out
    text = next(line for line in printed.splitlines() if line.startswith("csk."))
    path = tmp_path / "broker.toml"
    path.write_text(printed.partition("# For broker.toml")[2].partition("\n")[2])
    (entry,) = load_config(path).api_keys()
    assert (entry.tenant, entry.scopes, entry.sha256) == ("red", ("agent", "worker"), digest_of(text))
    assert entry.expires_at is not None
    assert timedelta(days=29) < entry.expires_at - datetime.now(UTC) <= timedelta(days=30)
    assert check_config(path).exit_code == 0
    assert text not in check_config(path).text()


def test_keygen_as_json(capsys: pytest.CaptureFixture[str]) -> None:
    assert broker_main(["keygen", "--tenant", "red", "--scope", "admin", "--id", "boss", "--json"]) == 0
    made = json.loads(capsys.readouterr().out)
    assert (made["id"], made["tenant"], made["scopes"], made["expires_at"]) == ("boss", "red", ["admin"], None)
    assert made["sha256"] == digest_of(made["key"])
    assert tomllib.loads(made["toml"])["access"]["keys"][0]["id"] == "boss"


@pytest.mark.parametrize(
    ("options", "says"),
    [
        (["--tenant", "a b", "--scope", "agent"], "error: tenant: string should match pattern"),
        (["--tenant", "red", "--scope", "root"], "error: scopes[0]: input should be 'agent', 'worker' or 'admin'"),
        (["--tenant", "red"], "Missing option '--scope'"),
    ],
)
def test_keygen_refuses_what_is_no_key(options: list[str], says: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert broker_main(["keygen", *options]) == 2
    assert says in capsys.readouterr().err


def test_tenants_have_bounds_of_their_own() -> None:
    tables = {
        "leases_per_tenant_max": 10,
        "leased_tokens_per_tenant_max": 1_000,
        "tenants": [{"tenant": "red", "leases_max": 3}, {"tenant": "blue", "leased_tokens_max": 0}],
    }
    settings = BrokerConfig.from_mapping({"admission": tables}).core_settings()
    bounds = {name: settings.quota_of(TenantId(name)) for name in ("red", "blue", "green")}
    assert {name: (quota.leases_max, quota.leased_tokens_max) for name, quota in bounds.items()} == {
        "red": (3, 1_000),
        "blue": (10, 0),
        "green": (10, 1_000),
    }
    with pytest.raises(ConfigProblem, match=r"admission\.tenants\.red\.tenant: named by more than one table"):
        BrokerConfig.from_mapping({"admission": {"tenants": [{"tenant": "red"}, {"tenant": "red"}]}})
