"""Rules across tables: what is wrong (errors) or unwise (warnings) although every key is fine by itself."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Protocol

from conserve_broker._access_tables import AccessTable, TlsTable
from conserve_broker._config_tables import (
    AdmissionTable,
    EngineTable,
    JournalTable,
    LeaseTable,
    PlacementTable,
    ScrapeTable,
    StoreTable,
    TokenTable,
)
from conserve_broker._discovery_tables import DiscoveryTable, RegistrationTable
from conserve_sdk.tokens import SECRET_BYTES_MIN


class Tables(Protocol):
    """The whole configuration as these rules read it."""

    @property
    def lease(self) -> LeaseTable: ...
    @property
    def placement(self) -> PlacementTable: ...
    @property
    def admission(self) -> AdmissionTable: ...
    @property
    def journal(self) -> JournalTable: ...
    @property
    def store(self) -> StoreTable: ...
    @property
    def discovery(self) -> DiscoveryTable: ...
    @property
    def registration(self) -> RegistrationTable: ...
    @property
    def token(self) -> TokenTable: ...
    @property
    def scrape(self) -> ScrapeTable: ...
    @property
    def access(self) -> AccessTable: ...
    @property
    def tls(self) -> TlsTable: ...
    @property
    def engine(self) -> tuple[EngineTable, ...]: ...


def errors(config: Tables) -> list[str]:
    """Everything that makes this configuration unusable."""
    rules: tuple[Callable[[Tables], Iterator[str]], ...] = (
        _duplicates,
        _tenants,
        _connectors,
        _transfer_groups,
        _models,
        _token_keys,
        _store,
        _times,
    )
    return [line for rule in rules for line in rule(config)]


def warnings(config: Tables) -> list[str]:
    """What works, but probably not as meant."""
    lines: list[str] = []
    if not config.engine and not _more_engines(config):
        lines.append(
            "engine: none is configured, so every request is refused; add [[engine]] tables (read while running)"
        )
    if config.store.kind == "sqlite" and not config.journal.path:
        lines.append("journal.path: empty, so a restart of the broker forgets every lease; set a file")
    lines += _hold_warnings(config)
    if config.lease.grace_ms < config.lease.ttl_ms // 2:
        lines.append(
            f"lease.grace_ms: {config.lease.grace_ms} is under half of lease.ttl_ms ({config.lease.ttl_ms}); clients "
            "renew at a third of the TTL, so leases in use may expire after a restart"
        )
    lines += _placement_warnings(config)
    lines += _access_warnings(config)
    if config.admission.leases_per_tenant_max > config.admission.leases_max:
        lines.append("admission.leases_per_tenant_max: above admission.leases_max, so it never applies")
    return lines


def _duplicates(config: Tables) -> Iterator[str]:
    for engine_id in _repeated(engine.id for engine in config.engine):
        yield f"engine.{engine_id}.id: used by more than one engine; give each its own id"
    for url in _repeated(engine.url for engine in config.engine):
        ids = ", ".join(engine.id for engine in config.engine if engine.url == url)
        yield f"engine.url: {url} is named by {ids}; one [[engine]] per server (role 'both' where it does both)"


def _tenants(config: Tables) -> Iterator[str]:
    for tenant in _repeated(table.tenant for table in config.admission.tenants):
        yield f"admission.tenants.{tenant}.tenant: named by more than one table; keep one"


def _connectors(config: Tables) -> Iterator[str]:
    for engine in config.engine:
        if engine.connector == "none" and engine.role == "prefiller":
            yield (
                f"engine.{engine.id}.connector: a prefiller without a KV connector cannot hand its KV on; start it "
                "with one and set connector = 'nixl', or set role = 'both'"
            )
        if engine.connector == "none" and engine.transfer_group:
            yield (
                f"engine.{engine.id}.transfer_group: an engine without a KV connector moves no KV; remove the key or "
                "set connector = 'nixl'"
            )
        if engine.connector == "nixl" and not engine.transfer_group:
            yield (
                f"engine.{engine.id}.transfer_group: must not be empty with connector = 'nixl'; name a group or set "
                "connector = 'none'"
            )


def _transfer_groups(config: Tables) -> Iterator[str]:
    groups: dict[str, list[EngineTable]] = defaultdict(list)
    for engine in config.engine:
        if engine.transfer_group:
            groups[engine.transfer_group].append(engine)
    for group, members in sorted(groups.items()):
        facts = {"model": _model, "block_size_tokens": _block_size}
        for key, read in facts.items():
            known = _distinct(read(engine) for engine in members)
            if len(known) > 1:
                sides = "; ".join(f"{side}: {', '.join(e.id for e in members if read(e) == side)}" for side in known)
                yield (
                    f"engine.transfer_group: group {group!r} mixes {key} ({sides}); KV moves only between equal "
                    "engines, so give each its own transfer_group"
                )


def _model(engine: EngineTable) -> str:
    return engine.model


def _block_size(engine: EngineTable) -> str:
    """Empty when the engine is to say it."""
    return str(engine.block_size_tokens or "")


def _more_engines(config: Tables) -> bool:
    """Whether engines may come from elsewhere, so that what the file lacks is no mistake."""
    return bool(config.discovery.dns or config.registration.allow)


def _models(config: Tables) -> Iterator[str]:
    if _more_engines(config):
        return
    models: dict[str, list[EngineTable]] = defaultdict(list)
    for engine in config.engine:
        models[engine.model].append(engine)
    for model, members in sorted(models.items()):
        hosts = [engine for engine in members if engine.role != "prefiller"]
        prefillers = [engine for engine in members if engine.role != "decoder" and engine.transfer_group]
        if not hosts:
            yield (
                f"engine.role: model {model!r} has no decoder ({', '.join(e.id for e in members)} only prefill); add "
                "one with role = 'decoder' or 'both'"
            )
            continue
        if config.placement.preset == "paper" and not prefillers:
            yield (
                f"placement.preset: 'paper' needs a prefiller for model {model!r}; add an engine with role = "
                "'prefiller' or set preset = 'affinity'"
            )
        reachable = {engine.transfer_group for engine in hosts}
        for engine in members:
            if engine.role == "prefiller" and engine.transfer_group and engine.transfer_group not in reachable:
                yield (
                    f"engine.{engine.id}.transfer_group: no decoder of model {model!r} is in group "
                    f"{engine.transfer_group!r}; put both into one group"
                )


def _token_keys(config: Tables) -> Iterator[str]:
    for kid in _repeated(key.kid for key in config.token.keys):
        yield f"token.keys.{kid}.kid: used by more than one key; give each its own kid"
    for key in config.token.keys:
        given = [key.secret, key.secret_file, key.secret_env, key.private_key_file]
        if sum(one is not None for one in given) != 1:
            yield f"token.keys.{key.kid}: set exactly one of secret, secret_file, secret_env, private_key_file"
        elif key.secret is not None and len(key.secret.get_secret_value().encode()) < SECRET_BYTES_MIN:
            yield (
                f"token.keys.{key.kid}.secret: shorter than {SECRET_BYTES_MIN} bytes; make one with "
                "`openssl rand -base64 48`"
            )


def _store(config: Tables) -> Iterator[str]:
    store = config.store
    if store.kind == "sqlite":
        if store.url:
            yield "store.url: is not used with kind = 'sqlite'; set kind = 'redis', or remove the key"
        return
    if not store.url:
        yield "store.url: is missing; with kind = 'redis' name the server, like 'redis://10.0.0.9:6379/0'"
    if config.journal.path:
        yield "journal.path: is not used with store.kind = 'redis'; remove the key"
    if not config.token.keys:
        yield (
            "token.keys: replicas must sign with the same key, or each would refuse the others' tokens; add one "
            "[[token.keys]] table with the same secret to all of them"
        )
    if 2 * store.timeout_ms > store.lock_ttl_ms:
        yield (
            f"store.timeout_ms: {store.timeout_ms} is above half of store.lock_ttl_ms ({store.lock_ttl_ms}), so one "
            "slow answer would cost the leadership; lower it or raise lock_ttl_ms"
        )


def _times(config: Tables) -> Iterator[str]:
    scrape, lease = config.scrape, config.lease
    if lease.ttl_ms < 3 * scrape.interval_ms:
        yield (
            f"lease.ttl_ms: {lease.ttl_ms} is under three scrapes ({3 * scrape.interval_ms}); raise it or lower "
            "scrape.interval_ms"
        )
    if lease.park_ttl_ms > lease.ttl_ms:
        yield f"lease.park_ttl_ms: {lease.park_ttl_ms} is above lease.ttl_ms ({lease.ttl_ms}); parking shortens a lease"
    if scrape.suspect_after_ms < 2 * scrape.interval_ms:
        yield (
            f"scrape.suspect_after_ms: {scrape.suspect_after_ms} is under two scrapes ({2 * scrape.interval_ms}); one "
            "late answer would make an engine suspect: raise it"
        )
    if scrape.gone_after_ms <= scrape.suspect_after_ms:
        yield (
            f"scrape.gone_after_ms: {scrape.gone_after_ms} must be above scrape.suspect_after_ms "
            f"({scrape.suspect_after_ms})"
        )
    if scrape.observation_max_age_ms < 2 * scrape.interval_ms:
        yield (
            f"scrape.observation_max_age_ms: {scrape.observation_max_age_ms} is under two scrapes "
            f"({2 * scrape.interval_ms}); raise it"
        )


def _hold_warnings(config: Tables) -> Iterator[str]:
    for engine in config.engine:
        if engine.role != "prefiller" and 0 < engine.max_hold_ms < config.lease.hold_ms:
            yield (
                f"lease.hold_ms: {config.lease.hold_ms} is above max_hold_ms of {engine.id} ({engine.max_hold_ms}), "
                "which therefore holds for its own time only"
            )


def _placement_warnings(config: Tables) -> Iterator[str]:
    rules = config.placement.settings()
    if rules.move_release_ppm > rules.move_threshold_ppm:
        yield (
            "placement.move_release: above placement.move_threshold, so directives are withdrawn as soon as they are "
            "announced; set half of it"
        )
    tiers = [engine.id for engine in config.engine if engine.host_tier_tokens]
    if tiers and not rules.idle_aware:
        yield (
            f"engine.host_tier_tokens: preset {config.placement.preset!r} does not use the host tier of "
            f"{', '.join(tiers)}; set placement.idle_aware = true"
        )


def _access_warnings(config: Tables) -> Iterator[str]:
    access = config.access
    if access.share_engine_credentials == "none":
        return
    if not access.keys and not access.key_file:
        yield "access.share_engine_credentials: has no effect without API keys; add [[access.keys]]"
    elif not config.tls.enabled:
        yield (
            "access.share_engine_credentials: the engines' keys travel to agents over plain HTTP; set [tls], or put "
            "something that speaks TLS in front"
        )


def _repeated(values: Iterable[str]) -> Sequence[str]:
    count: dict[str, int] = defaultdict(int)
    for value in values:
        count[value] += 1
    return [value for value, times in count.items() if times > 1]


def _distinct(values: Iterable[str]) -> Sequence[str]:
    return list(dict.fromkeys(value for value in values if value))
