"""The tables of `broker.toml`. Every key carries its unit in its name, its bounds and a one-line description."""

from __future__ import annotations

from dataclasses import fields, replace
from typing import Annotated, Any, Literal
from urllib.parse import urlsplit

from pydantic import BaseModel, ConfigDict, Field, SecretStr, field_serializer, field_validator

from conserve_sdk.core.events import EngineSpec
from conserve_sdk.core.settings import PRESETS, PlacementSettings, PrefillerHosts, TenantQuota
from conserve_sdk.core.units import MILLION, EngineId, ModelName, Ms, Ppm, TenantId, Tokens, TransferGroup
from conserve_sdk.core.vocabulary import Role

Ratio = Annotated[float, Field(ge=0.0, le=1.0)]
TokenCount = Annotated[int, Field(ge=0, le=1_000_000_000)]
Name = Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$")]
"""Ids that stand in URLs, metrics labels and log lines."""

EnvName = Annotated[str, Field(max_length=256, pattern=r"^([A-Za-z_][A-Za-z0-9_]*)?$")]
"""Name of an environment variable, or nothing."""

NIXL_HOLD_MS = 30_000
"""`kv_lease_duration` of vLLM's NIXL connector where its extra config does not say otherwise (vLLM 0.32)."""


class Table(BaseModel):
    """One table: immutable, unknown keys are errors, docstrings below the keys are their descriptions."""

    model_config = ConfigDict(frozen=True, extra="forbid", use_attribute_docstrings=True)


class ListenTable(Table):
    """`[listen]`: where the broker answers."""

    host: Annotated[str, Field(min_length=1, max_length=255)] = "127.0.0.1"
    """Address to bind; `0.0.0.0` for all interfaces (only on a network where every client is trusted)."""
    port: Annotated[int, Field(ge=0, le=65_535)] = 7070
    """TCP port; 0 lets the system choose one."""
    connections_max: Annotated[int, Field(ge=1, le=1_000_000)] = 20_000
    """Connections at once; those beyond are closed. Every client that waits for admission holds one."""
    connections_per_address_max: Annotated[int, Field(ge=1, le=1_000_000)] = Field(
        default_factory=lambda table: max(1, table["connections_max"] // 4)
    )
    """Connections at once from one IPv4 address or IPv6 /64; default: a quarter of `connections_max`."""
    request_timeout_ms: Annotated[int, Field(ge=100, le=600_000)] = 30_000
    """Time from the first byte of a request to its last, in milliseconds."""


class LeaseTable(Table):
    """`[lease]`: how long leases live and whether decoders hold KV between turns."""

    ttl_ms: Annotated[int, Field(ge=5_000, le=3_600_000)] = 60_000
    """Life of a lease without a sign of life, in milliseconds; clients renew at a third of it."""
    park_ttl_ms: Annotated[int, Field(ge=1_000, le=3_600_000)] = 10_000
    """Life left to a parked lease (human in the loop), in milliseconds."""
    grace_ms: Annotated[int, Field(ge=0, le=3_600_000)] = Field(
        default_factory=lambda table: max(10_000, table["ttl_ms"] // 2)
    )
    """No recovered lease expires within this time after a restart, in milliseconds; default: half of `ttl_ms`."""
    hold_ms: Annotated[int, Field(ge=0, le=600_000)] = 10_000
    """How long decoders are asked to hold a finished turn's KV, in milliseconds; 0: never."""
    hold_share: Ratio = 0.5
    """Share of a decoder's KV capacity that holding leases may fill, 0 to 1."""


class PlacementTable(Table):
    """`[placement]`: a preset, and the constants that differ from it."""

    preset: Literal["paper", "default", "affinity"] = "default"
    """`default` (score), `paper` (always a prefiller for the first turn) or `affinity` (no prefillers)."""
    kv_watermark: Ratio | None = None
    """Admission keeps leased and observed KV at or under this share of a decoder's capacity, 0 to 1."""
    hint_slack: Ratio | None = None
    """A hinted decoder wins while its load is at most this much above the best, 0 to 1."""
    harm_weight: Annotated[float, Field(ge=0.0, le=10.0)] | None = None
    """Weight of the own prefill time per stream decoding on the engine (W of the score)."""
    local_below_tokens: TokenCount | None = None
    """Prompts that bring fewer new tokens are prefilled on the decoder (MIN)."""
    extra_work: Annotated[float, Field(ge=0.0, le=1_000.0)] | None = None
    """A prefiller may compute at most this share more tokens than the decoder would (EXTRA)."""
    transfer_overhead_us: Annotated[int, Field(ge=0, le=60_000_000)] | None = None
    """Fixed cost of one KV move, in microseconds."""
    transfer_tokens_per_s: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """Speed of the KV link, in tokens per second."""
    default_rate_tokens_per_s: Annotated[int, Field(ge=1, le=1_000_000_000)] | None = None
    """Prefill rate assumed of an engine until one was observed, in tokens per second."""
    reserve_tokens: TokenCount | None = None
    """Growth reserve added to the need of every lease, in tokens."""
    idle_aware: bool | None = None
    """On decoders with a host KV tier, leases that are idle for `idle_after_ms` count only as leased."""
    idle_after_ms: Annotated[int, Field(ge=1, le=600_000)] | None = None
    """Age of a gap from which on a lease is not active, in milliseconds (TAU)."""
    oversubscription: Annotated[float, Field(ge=1.0, le=100.0)] | None = None
    """Leased KV of a decoder with a host tier, over its capacity, at most (HOVER)."""
    leased_weight: Annotated[float, Field(ge=0.0, le=10.0)] | None = None
    """Weight of leased KV beside active KV in a decoder's load."""
    prefiller_hosts: Literal["auto", "never"] | None = None
    """`auto`: a prefiller hosts leases while its prefill share is low; `never`."""
    host_gate: Ratio | None = None
    """A prefiller hosts while its prefill share is at most this, 0 to 1 (GATE)."""
    host_reserve: Ratio | None = None
    """Share of a prefiller's KV that leases leave free, 0 to 1 (PRES)."""
    host_base_load: Ratio | None = None
    """Load added to every prefiller, 0 to 1 (H0)."""
    host_share_weight: Annotated[float, Field(ge=0.0, le=10.0)] | None = None
    """Weight of the prefill share in an engine's load, where prefillers may host (BETA)."""
    prefill_share_window_ms: Annotated[int, Field(ge=100, le=3_600_000)] | None = None
    """Memory of the prefill share, in milliseconds."""
    move_appends: bool | None = None
    """Large appends may be prefilled on a prefiller and move to the decoder."""
    re_lease: bool | None = None
    """Leases may move to another decoder in a gap."""
    move_threshold: Ratio | None = None
    """Difference of loads above which they do, 0 to 1 (MOVE)."""
    move_release: Ratio | None = None
    """Difference at or under which a standing directive is withdrawn, 0 to 1."""
    move_idle_ms: Annotated[int, Field(ge=0, le=600_000)] | None = None
    """A gap must be longer than this for a move because of load, in milliseconds."""
    move_rest_ms: Annotated[int, Field(ge=0, le=3_600_000)] | None = None
    """A lease younger than this is not moved because of load, in milliseconds."""

    def settings(self) -> PlacementSettings:
        """The preset with this table's constants in place of its own."""
        preset = PRESETS[self.preset]
        names = {field.name for field in fields(preset)}
        changes: dict[str, Any] = {}
        for key, value in self.model_dump(exclude={"preset"}, exclude_none=True).items():
            if key == "prefiller_hosts":
                changes[key] = PrefillerHosts(value)
            elif key in names:
                changes[key] = value
            else:
                changes[f"{key}_ppm"] = to_ppm(value)
        return replace(preset, **changes)


class TenantTable(Table):
    """`[[admission.tenants]]`: bounds of one tenant in place of those for all."""

    tenant: Name
    """Which tenant, as its API keys name it."""
    leases_max: Annotated[int, Field(ge=0, le=10_000_000)] | None = None
    """Its live leases at once; default: `leases_per_tenant_max`."""
    leased_tokens_max: TokenCount | None = None
    """Tokens that its live leases may hold together, 0: no bound; default: `leased_tokens_per_tenant_max`."""


class AdmissionTable(Table):
    """`[admission]`: bounds on what may wait and live."""

    wait_max_ms: Annotated[int, Field(ge=0, le=3_600_000)] = 120_000
    """Longest time a request may wait for admission, in milliseconds."""
    retry_after_ms: Annotated[int, Field(ge=1, le=600_000)] = 1_000
    """What a refused client is told to wait at least, in milliseconds."""
    queue_max: Annotated[int, Field(ge=0, le=1_000_000)] = 10_000
    """Requests that may wait at once."""
    leases_max: Annotated[int, Field(ge=1, le=10_000_000)] = 100_000
    """Live leases at once."""
    leases_per_tenant_max: Annotated[int, Field(ge=1, le=10_000_000)] = 100_000
    """Live leases of one tenant at once."""
    leased_tokens_per_tenant_max: TokenCount = 0
    """Tokens that all live leases of one tenant may hold together; 0: no bound."""
    tenants: tuple[TenantTable, ...] = ()
    """Tenants with bounds of their own."""

    def quotas(self) -> dict[TenantId, TenantQuota]:
        """The bounds of `tenants`, completed by those for all."""
        leases, tokens = self.leases_per_tenant_max, self.leased_tokens_per_tenant_max
        return {
            TenantId(one.tenant): TenantQuota(
                leases_max=leases if one.leases_max is None else one.leases_max,
                leased_tokens_max=Tokens(tokens if one.leased_tokens_max is None else one.leased_tokens_max),
            )
            for one in self.tenants
        }


class JournalTable(Table):
    """`[journal]`: where leases survive a restart of the broker."""

    path: str = ""
    """SQLite file, relative to the configuration file; empty: memory only, a restart forgets every lease."""


class StoreTable(Table):
    """`[store]`: one broker with a file of its own, or several that share a Valkey or Redis server."""

    kind: Literal["sqlite", "redis"] = "sqlite"
    """`sqlite` (the file of `[journal]`, one broker) or `redis` (Valkey or Redis: one leads, the others stand by)."""
    url: str = ""
    """Where the store is: `redis://[:password@]host:port/db`, `rediss://` with TLS, or `unix:///path`."""
    prefix: Annotated[str, Field(min_length=1, max_length=64, pattern=r"^[A-Za-z0-9._-]+$")] = "conserve"
    """Begins every key; one for each fleet that shares the server."""
    lock_ttl_ms: Annotated[int, Field(ge=500, le=60_000)] = 3_000
    """A leader that does not answer the store for this long is replaced, in milliseconds."""
    timeout_ms: Annotated[int, Field(ge=100, le=30_000)] = Field(
        default_factory=lambda table: max(100, min(1_000, table["lock_ttl_ms"] // 3))
    )
    """How long one call to the store may take, in milliseconds; default: a third of `lock_ttl_ms`, at most 1000."""
    advertise_url: str = ""
    """Where clients reach this broker, as the other replicas tell them; default: from `[listen]` unless a wildcard."""

    @field_validator("url")
    @classmethod
    def _store_url(cls, url: str) -> str:
        if url and urlsplit(url).scheme not in {"redis", "rediss", "unix"}:
            raise ValueError("must look like 'redis://10.0.0.9:6379/0', 'rediss://...' or 'unix:///run/redis.sock'")
        return url

    @field_validator("advertise_url")
    @classmethod
    def _own_url(cls, url: str) -> str:
        return normalised_url(url) if url else url

    @field_serializer("url")
    def _hidden(self, url: str) -> str:
        return without_password(url)


class TokenKeyTable(Table):
    """`[[token.keys]]`: one key that signs lease tokens, given in exactly one of four ways."""

    kid: Name
    """Name of the key; it stands in every token signed with it."""
    secret: SecretStr | None = None
    """The secret itself, at least 32 bytes."""
    secret_file: str | None = None
    """File that holds the secret, relative to the configuration file; blanks at its ends are dropped."""
    secret_env: Annotated[str, Field(min_length=1)] | None = None
    """Environment variable that holds the secret."""
    private_key_file: str | None = None
    """PEM file with an Ed25519 key instead, relative to the configuration file: guards need only its public key."""


class TokenTable(Table):
    """`[token]`: the signing keys. The first signs, all verify, so that keys can be rotated."""

    keys: tuple[TokenKeyTable, ...] = ()
    """Default: one random key, made once and kept beside the journal (mode 0600)."""


class ScrapeTable(Table):
    """`[scrape]`: how the engines are observed."""

    interval_ms: Annotated[int, Field(ge=50, le=5_000)] = 1_000
    """Time between two scrapes of one engine, in milliseconds; placement suffers above one second."""
    timeout_ms: Annotated[int, Field(ge=50, le=60_000)] = 2_000
    """Time one scrape may take, in milliseconds."""
    models_interval_ms: Annotated[int, Field(ge=1_000, le=3_600_000)] = 30_000
    """Time between two readings of `/v1/models` of an engine that did not restart, in milliseconds."""
    suspect_after_ms: Annotated[int, Field(ge=100, le=600_000)] = 3_000
    """Age of the last good scrape at which an engine gets no new lease, in milliseconds."""
    gone_after_ms: Annotated[int, Field(ge=100, le=3_600_000)] = 15_000
    """Age of the last good scrape at which an engine's leases are dropped, in milliseconds."""
    observation_max_age_ms: Annotated[int, Field(ge=100, le=600_000)] = 10_000
    """An engine whose numbers are older gets no new lease, in milliseconds."""


class WatchTable(Table):
    """`[watch]`: what the broker tells those who operate it."""

    log_format: Literal["text", "json"] = "text"
    """`text` (one line for people) or `json` (one object a line, for collectors)."""
    tracing: Literal["off", "otel"] = "off"
    """`otel`: spans through OpenTelemetry's global tracer provider (extra `otel`), joined with the callers' traces."""
    event_listeners_max: Annotated[int, Field(ge=0, le=10_000)] = 64
    """Dashboards and `conserve top` that may listen at once; 0: none."""


class EngineTable(Table):
    """`[[engine]]`: one vLLM server."""

    id: Name
    """Name of the engine in leases, metrics and logs."""
    url: str
    """Base URL without `/v1`, as the agents reach it."""
    role: Literal["prefiller", "decoder", "both"]
    """`prefiller` hosts no conversation, `decoder` prefills only its own, `both` may do either."""
    model: Annotated[str, Field(min_length=1, max_length=256, pattern=r"^[\x21-\x7e]+$")]
    """Model name as `/v1/models` of the engine lists it and clients ask for it."""
    connector: Literal["nixl", "none"] = "nixl"
    """`nixl` (vLLM's `NixlConnector`), or `none` for an engine started without `--kv-transfer-config`."""
    transfer_group: Annotated[str, Field(max_length=64, pattern=r"^[A-Za-z0-9._-]*$")] = Field(
        default_factory=lambda engine: "default" if engine["connector"] == "nixl" else ""
    )
    """Engines of one group can move KV between each other; default: `default` with a connector."""
    block_size_tokens: Annotated[int, Field(ge=0, le=65_536)] = 0
    """Expected KV block size in tokens, checked against the engine; 0: take what it says."""
    kv_capacity_tokens: TokenCount = 0
    """KV capacity in tokens where the engine's own figure shall not count; 0: take what it says."""
    max_model_len_tokens: TokenCount = 0
    """Longest prompt plus output in tokens; 0: take what the engine says."""
    max_hold_ms: Annotated[int, Field(ge=0, le=3_600_000)] = Field(
        default_factory=lambda engine: NIXL_HOLD_MS if engine["connector"] == "nixl" else 0
    )
    """The engine's own `kv_lease_duration` in milliseconds; 0: it cannot hold a finished turn's KV."""
    host_tier_tokens: TokenCount = 0
    """KV that it can keep in host memory and load back (vLLM: OffloadingConnector), in tokens; 0: no host tier."""
    tier: Annotated[str, Field(max_length=64)] = ""
    """Free name of the hardware class, for reports."""
    api_key_env: EnvName = ""
    """Environment variable with the engine's own API key (vLLM's `--api-key`); for the broker's own requests."""
    api_key_file: Annotated[str, Field(max_length=4096)] = ""
    """File with it instead, relative to the configuration file."""

    @field_validator("connector", mode="before")
    @classmethod
    def _class_name(cls, connector: object) -> object:
        """Take the name that vLLM's own `kv_connector` flag has, too."""
        return "nixl" if connector == "NixlConnector" else "none" if connector is None else connector

    @field_validator("url")
    @classmethod
    def _base_url(cls, url: str) -> str:
        return normalised_url(url)

    def spec(self) -> EngineSpec:
        """The engine as the core knows it."""
        return EngineSpec(
            engine_id=EngineId(self.id),
            url=self.url,
            role=Role(self.role),
            model=ModelName(self.model),
            transfer_group=TransferGroup(self.transfer_group),
            kv_capacity_tokens=Tokens(self.kv_capacity_tokens),
            block_size_tokens=Tokens(self.block_size_tokens),
            max_model_len_tokens=Tokens(self.max_model_len_tokens),
            max_hold_ms=Ms(self.max_hold_ms),
            host_tier_tokens=Tokens(self.host_tier_tokens),
            tier=self.tier,
        )


def without_password(url: str) -> str:
    """The URL of a store as it may be shown."""
    parts = urlsplit(url)
    user, at, host = parts.netloc.rpartition("@")
    return parts._replace(netloc=f"{user.partition(':')[0]}:***@{host}").geturl() if at else url


def to_ppm(ratio: float) -> Ppm:
    """A ratio as the core writes it, in parts per million."""
    return Ppm(round(ratio * MILLION))


def normalised_url(url: str) -> str:
    """An engine's base URL in one spelling, so that duplicates are seen.

    Raises:
        ValueError: it is no plain http(s) URL; the message says what to write.
    """
    try:
        parts = urlsplit(url.strip())
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ValueError(f"is not a URL ({error}); write it like 'http://10.0.0.5:8000'") from None
    if parts.scheme not in {"http", "https"} or not host:
        raise ValueError("must be an http or https URL such as 'http://10.0.0.5:8000'")
    if parts.username or parts.password:
        raise ValueError("must not hold a user name or password: agents and lease tokens carry this URL")
    if parts.query or parts.fragment:
        raise ValueError("must end before '?' and '#'")
    path = parts.path.rstrip("/")
    if path.endswith("/v1"):
        raise ValueError("must be the engine's base URL: leave out '/v1'")
    name = f"[{host}]" if ":" in host else host
    default_port = {"http": 80, "https": 443}[parts.scheme]
    return f"{parts.scheme}://{name}{'' if port in {None, default_port} else f':{port}'}{path}"
