"""The broker's configuration: command line over environment over TOML file over defaults.

`CONSERVE_BROKER__SCRAPE__INTERVAL_MS=500` in the environment sets `interval_ms` of `[scrape]`. Unknown keys are
errors, in the file and in the environment; every error names the key and the remedy; secrets are never printed.
"""

from __future__ import annotations

import os
import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Self

from pydantic import Field, ValidationError, model_validator
from pydantic_settings import BaseSettings, EnvSettingsSource, SettingsConfigDict, SettingsError

from conserve_broker import _config_rules, api_keys, engine_keys, signing_keys
from conserve_broker._access_tables import AccessTable, ApiKeyTable, TlsTable
from conserve_broker._config_errors import ConfigProblem, explain, suggestion
from conserve_broker._config_tables import (
    AdmissionTable,
    EngineTable,
    JournalTable,
    LeaseTable,
    ListenTable,
    PlacementTable,
    ScrapeTable,
    StoreTable,
    Table,
    TenantTable,
    TokenKeyTable,
    TokenTable,
    WatchTable,
    to_ppm,
)
from conserve_broker._discovery_tables import DiscoveryTable, DnsTable, RegistrationTable
from conserve_broker.engine_keys import EngineKeys
from conserve_sdk.core.events import EngineSpec
from conserve_sdk.core.settings import BrokerSettings
from conserve_sdk.core.units import Ms, Tokens
from conserve_sdk.tokens import TokenKey

__all__ = [
    "AccessTable",
    "AdmissionTable",
    "BrokerConfig",
    "ConfigProblem",
    "DiscoveryTable",
    "EngineTable",
    "JournalTable",
    "LeaseTable",
    "ListenTable",
    "PlacementTable",
    "RegistrationTable",
    "ScrapeTable",
    "StoreTable",
    "TlsTable",
    "TokenTable",
    "WatchTable",
    "load_config",
]

ENV_PREFIX = "CONSERVE_BROKER__"


class BrokerConfig(Table):
    """The whole configuration. `model_validate` takes plain dicts; `load_config` reads file and environment."""

    listen: ListenTable = Field(default_factory=ListenTable)
    lease: LeaseTable = Field(default_factory=LeaseTable)
    placement: PlacementTable = PlacementTable()
    admission: AdmissionTable = AdmissionTable()
    journal: JournalTable = JournalTable()
    store: StoreTable = Field(default_factory=StoreTable)
    token: TokenTable = TokenTable()
    scrape: ScrapeTable = ScrapeTable()
    watch: WatchTable = WatchTable()
    discovery: DiscoveryTable = DiscoveryTable()
    registration: RegistrationTable = RegistrationTable()
    access: AccessTable = AccessTable()
    tls: TlsTable = TlsTable()
    engine: tuple[EngineTable, ...] = ()

    @model_validator(mode="after")
    def _rules_across_tables(self) -> Self:
        problems = _config_rules.errors(self)
        if problems:
            raise ValueError("\n".join(problems))
        return self

    @classmethod
    def from_mapping(cls, data: Mapping[str, Any]) -> Self:
        """Validate plain data.

        Raises:
            ConfigProblem: one line per problem, with key and remedy.
        """
        try:
            return cls.model_validate(dict(data))
        except ValidationError as error:
            raise explain(error, data, _known_keys()) from None

    def warnings(self) -> tuple[str, ...]:
        """What works, but probably not as meant: one line each."""
        return tuple(_config_rules.warnings(self))

    def core_settings(self) -> BrokerSettings:
        """What `conserve_sdk.core.Broker` is constructed with."""
        lease, admission, scrape = self.lease, self.admission, self.scrape
        return BrokerSettings(
            placement=self.placement.settings(),
            ttl_ms=Ms(lease.ttl_ms),
            park_ttl_ms=Ms(lease.park_ttl_ms),
            hold_ms=Ms(lease.hold_ms),
            hold_share_ppm=to_ppm(lease.hold_share),
            suspect_after_ms=Ms(scrape.suspect_after_ms),
            gone_after_ms=Ms(scrape.gone_after_ms),
            observation_max_age_ms=Ms(scrape.observation_max_age_ms),
            leases_max=admission.leases_max,
            leases_per_tenant_max=admission.leases_per_tenant_max,
            leased_tokens_per_tenant_max=Tokens(admission.leased_tokens_per_tenant_max),
            tenant_quotas=admission.quotas(),
            queue_max=admission.queue_max,
            wait_max_ms=Ms(admission.wait_max_ms),
            retry_after_ms=Ms(admission.retry_after_ms),
        )

    def engine_configs(self) -> tuple[EngineSpec, ...]:
        """The engines as the core knows them, in the order of the file."""
        return tuple(engine.spec() for engine in self.engine)

    def token_keys(self, *, create: bool = True) -> tuple[TokenKey, ...]:
        """Keys for lease tokens: the first signs, all verify; see `signing_keys.resolve`.

        Raises:
            ConfigProblem: a secret is missing, too short or unreadable.
        """
        return signing_keys.resolve(self.token.keys, journal_path=self.journal.path, create=create)

    def api_keys(self) -> tuple[ApiKeyTable, ...]:
        """The API keys; none: the broker is open. See `api_keys.resolve`.

        Raises:
            ConfigProblem: the key file cannot be read or is wrong, or two keys have one id.
        """
        return api_keys.resolve(self.access)

    def engine_keys(self) -> EngineKeys:
        """The engines' own API keys.

        Raises:
            ConfigProblem: one cannot be read, or is none.
        """
        return engine_keys.resolve(self.engine, self.discovery.dns, self.registration)

    def advertised_url(self, *, port: int) -> str:
        """Where clients reach this broker on that port as far as its configuration tells; empty when it does not."""
        if self.store.advertise_url:
            return self.store.advertise_url
        host = self.listen.host
        if host in {"0.0.0.0", "::"}:  # noqa: S104  # asked about, not bound
            return ""
        return self.url_of(host, port)

    def url_of(self, host: str, port: int) -> str:
        """The URL of a broker with this configuration that listens there."""
        scheme = "https" if self.tls.enabled else "http"
        return f"{scheme}://[{host}]:{port}" if ":" in host else f"{scheme}://{host}:{port}"

    def printable(self) -> dict[str, Any]:
        """The merged configuration as plain data with secrets hidden."""
        return self.model_dump(mode="json", exclude_none=True)


def load_config(path: str | Path | None, *, overrides: Mapping[str, Any] | None = None) -> BrokerConfig:
    """Read a configuration.

    Args:
        path: TOML file; None for environment and defaults alone. Relative paths inside it start at its folder.
        overrides: nested tables from the command line; they win over everything.

    Raises:
        ConfigProblem: the file is missing or wrong; one line per problem, with key and remedy.
    """
    data: dict[str, Any] = {} if path is None else _read_toml(Path(path))
    _merge(data, _environment())
    _merge(data, overrides or {})
    return BrokerConfig.from_mapping(data)


def _read_toml(path: Path) -> dict[str, Any]:
    try:
        data = tomllib.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConfigProblem(
            [f"{path}: cannot be read ({error.strerror}); correct the path given with --config"]
        ) from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise ConfigProblem([f"{path}: is not valid TOML: {error}"]) from error
    _anchor(data.get("journal"), "path", path.parent)
    _anchor(data.get("access"), "key_file", path.parent)
    for name in TlsTable.model_fields:
        _anchor(data.get("tls"), name, path.parent)
    discovery = data.get("discovery")
    names = discovery.get("dns") if isinstance(discovery, dict) else None
    _anchor(data.get("registration"), "api_key_file", path.parent)
    for tables in (data.get("engine"), names):
        for table in tables if isinstance(tables, list) else ():
            _anchor(table, "api_key_file", path.parent)
    token = data.get("token")
    keys = token.get("keys") if isinstance(token, dict) else None
    for key in keys if isinstance(keys, list) else ():
        _anchor(key, "secret_file", path.parent)
        _anchor(key, "private_key_file", path.parent)
    return data


def _anchor(table: object, key: str, folder: Path) -> None:
    """Make a relative path of the file start at the file's folder, so that the working directory does not matter."""
    if isinstance(table, dict) and isinstance(table.get(key), str) and table[key]:
        table[key] = str(folder.absolute() / table[key])


class _Environment(BrokerConfig, BaseSettings):
    """The same shape once more, for pydantic-settings to look its variables up by."""

    model_config = SettingsConfigDict(env_prefix=ENV_PREFIX, env_nested_delimiter="__")


def _environment() -> dict[str, Any]:
    keys = _known_keys()
    for name in sorted(os.environ):
        if not name.upper().startswith(ENV_PREFIX):
            continue
        table, _, key = name[len(ENV_PREFIX) :].lower().partition("__")
        if table not in keys[""]:
            raise ConfigProblem([f"{name}: unknown table {table!r}; {suggestion(table, keys[''])}"])
        if key and key not in keys[table]:
            raise ConfigProblem([f"{name}: unknown key {key!r}; {suggestion(key, keys[table])}"])
    try:
        return EnvSettingsSource(_Environment)()
    except SettingsError as error:
        raise ConfigProblem([f"environment: {error}; lists and tables are written as JSON there"]) from error


def _merge(into: dict[str, Any], other: Mapping[str, Any]) -> None:
    for key, value in other.items():
        if isinstance(value, Mapping) and isinstance(into.get(key), dict):
            _merge(into[key], value)
        else:
            into[key] = dict(value) if isinstance(value, Mapping) else value


def _known_keys() -> dict[str, tuple[str, ...]]:
    """Keys by table; `""` lists the tables."""
    tables: dict[str, type[Table]] = {
        "listen": ListenTable,
        "lease": LeaseTable,
        "placement": PlacementTable,
        "admission": AdmissionTable,
        "admission.tenants": TenantTable,
        "journal": JournalTable,
        "store": StoreTable,
        "token": TokenTable,
        "token.keys": TokenKeyTable,
        "scrape": ScrapeTable,
        "watch": WatchTable,
        "discovery": DiscoveryTable,
        "discovery.dns": DnsTable,
        "registration": RegistrationTable,
        "access": AccessTable,
        "tls": TlsTable,
        "access.keys": ApiKeyTable,
        "engine": EngineTable,
    }
    known = {name: tuple(table.model_fields) for name, table in tables.items()}
    return {"": tuple(BrokerConfig.model_fields), **known}
