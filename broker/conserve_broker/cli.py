"""The broker's commands: `conserve broker`, `explain`, `engines`, `leases`, `top`, `advise`, `drain` and `undrain`.

Exit codes: 0 fine, 1 something failed (unreachable broker, unknown lease), 2 wrong usage or configuration.
"""

from __future__ import annotations

import json
import logging
import sys
from collections.abc import Sequence
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Annotated, Any, NoReturn, cast

import typer
from pydantic import ValidationError

from conserve_broker import _config_errors, admin
from conserve_broker.api_keys import new_key
from conserve_broker.check import check_config
from conserve_broker.journal import JournalError
from conserve_broker.lease_listing import list_leases
from conserve_broker.logbook import LOGGER_NAME, JsonFormatter
from conserve_broker.server import BrokerServer
from conserve_broker.settings import ConfigProblem, load_config
from conserve_broker.top import top
from conserve_sdk._desk import Scope
from conserve_sdk.protocol import LeaseQuery

__all__ = [
    "advise_main",
    "broker_main",
    "drain_main",
    "engines_main",
    "explain_main",
    "leases_main",
    "top_main",
    "undrain_main",
]

_FAILED = 1
_WRONG_USAGE = 2
_LEVELS = ("debug", "info", "warning", "error")
_FORMATS = ("text", "json")
_LEASE_STATES = ("busy", "idle", "parked")

BrokerUrl = Annotated[
    str, typer.Option("--broker", envvar="CONSERVE_BROKER_URL", help="Where the broker answers, e.g. http://host:7070.")
]
AsJson = Annotated[bool, typer.Option("--json", help="Print the broker's answer as it is.")]


def _application(text: str) -> typer.Typer:
    return typer.Typer(
        help=text, add_completion=False, rich_markup_mode=None, pretty_exceptions_enable=False, no_args_is_help=False
    )


broker_app = _application("Run the broker that hands out conversation leases.")
explain_app = _application("Explain why a lease stands where it does.")
engines_app = _application("List, drain and undrain engines; without a command: list.")
drain_app = _application("Give an engine no new leases; those it has live on.")
undrain_app = _application("Let a drained engine take leases again.")
leases_app = _application("List live leases.")
top_app = _application("Watch a broker and its fleet in the terminal.")
advise_app = _application("Say which placement a running fleet's figures call for.")


def broker_main(argv: Sequence[str]) -> int:
    """`conserve broker --config broker.toml` and `conserve broker check-config broker.toml`."""
    return _run(broker_app, argv, name="conserve broker")


def explain_main(argv: Sequence[str]) -> int:
    """`conserve explain LEASE`."""
    return _run(explain_app, argv, name="conserve explain")


def engines_main(argv: Sequence[str]) -> int:
    """`conserve engines [list|drain|undrain] [ENGINE]`; alone it lists."""
    alone = not argv or (argv[0].startswith("-") and argv[0] != "--help")
    return _run(engines_app, ["list", *argv] if alone else argv, name="conserve engines")


def drain_main(argv: Sequence[str]) -> int:
    """`conserve drain ENGINE [--wait]`, short for `conserve engines drain`."""
    return _run(drain_app, argv, name="conserve drain")


def undrain_main(argv: Sequence[str]) -> int:
    """`conserve undrain ENGINE`, short for `conserve engines undrain`."""
    return _run(undrain_app, argv, name="conserve undrain")


def leases_main(argv: Sequence[str]) -> int:
    """`conserve leases [--state STATE] [--engine ENGINE] ...`."""
    return _run(leases_app, argv, name="conserve leases")


def top_main(argv: Sequence[str]) -> int:
    """`conserve top [--once] [--json] [--plain]`."""
    return _run(top_app, argv, name="conserve top")


def advise_main(argv: Sequence[str]) -> int:
    """`conserve advise`."""
    return _run(advise_app, argv, name="conserve advise")


def _run(app: typer.Typer, argv: Sequence[str], *, name: str) -> int:
    try:
        return int(app(args=list(argv), prog_name=name, standalone_mode=False) or 0)
    except (typer.Abort, KeyboardInterrupt):
        return 0
    except typer.TyperException as error:
        named = getattr(error, "format_message", None)  # a usage error knows which option it is about
        text = (named() if named else str(error)).rstrip(".")
        typer.echo(f"{name}: {text}; `{name} --help` tells more", err=True)
        return _WRONG_USAGE


def _fail(code: int, *lines: str) -> NoReturn:
    for line in lines:
        typer.echo(f"error: {line}", err=True)
    raise typer.Exit(code)


# ---- conserve broker --------------------------------------------------------------------------------------------


@broker_app.callback(invoke_without_command=True)
def serve(
    context: typer.Context,
    *,
    config: Annotated[Path | None, typer.Option("--config", help="Configuration file (TOML).")] = None,
    host: Annotated[str | None, typer.Option(help="Address to bind instead of listen.host.")] = None,
    port: Annotated[int | None, typer.Option(help="Port to bind instead of listen.port; 0: any free one.")] = None,
    log_level: Annotated[str, typer.Option(help=f"One of {', '.join(_LEVELS)}.")] = "info",
    log_format: Annotated[
        str | None, typer.Option(help=f"Instead of watch.log_format: {' or '.join(_FORMATS)}.")
    ] = None,
) -> None:
    """Serve until SIGINT or SIGTERM."""
    if context.invoked_subcommand is not None:
        return
    if log_level not in _LEVELS:
        _fail(_WRONG_USAGE, f"--log-level {log_level}: choose one of {', '.join(_LEVELS)}")
    if config is None:
        _fail(_WRONG_USAGE, "which configuration? give --config broker.toml (broker/broker.example.toml is a start)")
    if log_format not in {None, *_FORMATS}:
        _fail(_WRONG_USAGE, f"--log-format {log_format}: choose one of {', '.join(_FORMATS)}")
    _log_to_stderr(log_level, log_format or "text")
    listen = {key: value for key, value in (("host", host), ("port", port)) if value is not None}
    overrides: dict[str, Any] = {"listen": listen} if listen else {}
    if log_format is not None:
        overrides["watch"] = {"log_format": log_format}
    try:
        settings = load_config(config, overrides=overrides)
        _log_to_stderr(log_level, settings.watch.log_format)
        for warning in settings.warnings():
            _warn(warning, settings.watch.log_format)
        BrokerServer(settings, config_path=config, overrides=overrides).serve_forever()
    except ConfigProblem as problem:
        _fail(_WRONG_USAGE, *problem.problems)
    except JournalError as problem:
        _fail(_FAILED, str(problem))


@broker_app.command("check-config")
def check(
    config: Annotated[Path, typer.Argument(help="Configuration file (TOML).")],
    probe: Annotated[bool, typer.Option("--probe", help="Ask every engine whether it fits.")] = False,
) -> None:
    """Print the merged configuration and what is wrong with it."""
    report = check_config(config, probe=probe)
    typer.echo(report.text())
    raise typer.Exit(report.exit_code)


@broker_app.command("keygen")
def keygen(
    tenant: Annotated[str, typer.Option(help="Whose key it is; leases belong to the tenant.")],
    scope: Annotated[
        list[str], typer.Option(help="agent (leases), worker (be an engine) or admin (everything); may be repeated.")
    ],
    key_id: Annotated[str, typer.Option("--id", help="Name of the key in logs; default: one that is made up.")] = "",
    expires_days: Annotated[int | None, typer.Option(min=1, max=36_500, help="Days until it is refused.")] = None,
    as_json: Annotated[bool, typer.Option("--json", help="One JSON document.")] = False,
) -> None:
    """Make an API key: the key itself, shown this once, and the lines for the broker's configuration."""
    end = None if expires_days is None else datetime.now(UTC).replace(microsecond=0) + timedelta(days=expires_days)
    try:
        # What is no scope is refused by the table's own check.
        key = new_key(tenant=tenant, scopes=cast("tuple[Scope, ...]", tuple(scope)), key_id=key_id, expires_at=end)
    except ValidationError as error:
        _fail(_WRONG_USAGE, *_config_errors.explain(error, {}, {}).problems)
    if as_json:
        typer.echo(json.dumps({"key": key.text, **key.table.model_dump(mode="json"), "toml": key.toml()}, indent=2))
        return
    typer.echo(
        f"# The key, for the client (CONSERVE_BROKER_API_KEY). It is shown this once and kept nowhere:\n{key.text}\n"
    )
    typer.echo(f"# For broker.toml; a running broker takes it over within a second:\n{key.toml()}")


def _warn(warning: str, log_format: str) -> None:
    if log_format == "json":
        logging.getLogger(LOGGER_NAME).warning("%s", warning)
    else:
        typer.echo(f"warning: {warning}", err=True)


def _log_to_stderr(level: str, log_format: str) -> None:
    logging.basicConfig(
        stream=sys.stderr, level=logging.WARNING, format="%(asctime)s %(levelname)-7s %(message)s", force=True
    )
    if log_format == "json":
        logging.getLogger().handlers[0].setFormatter(JsonFormatter())
    logging.getLogger(LOGGER_NAME).setLevel(level.upper())


# ---- conserve explain -------------------------------------------------------------------------------------------


@explain_app.command()
def explain(
    lease: Annotated[str, typer.Argument(help="Id of a live lease (response header x-conserve-lease).")],
    broker: BrokerUrl = admin.DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """Print a lease's receipt: candidates, the numbers that were read, the rule that fired, and how it is now."""
    _show(lambda: admin.explain(broker, lease, as_json=as_json))


# ---- conserve engines -------------------------------------------------------------------------------------------

EngineArgument = Annotated[str, typer.Argument(help="Id of a configured engine.")]


@engines_app.command("list")
def list_engines(broker: BrokerUrl = admin.DEFAULT_URL, as_json: AsJson = False) -> None:
    """List the engines as the broker sees them."""
    _show(lambda: admin.list_engines(broker, as_json=as_json))


Wait = Annotated[bool, typer.Option("--wait", help="Come back when its last lease has ended.")]


@drain_app.command("drain")
@engines_app.command()
def drain(
    engine: EngineArgument, broker: BrokerUrl = admin.DEFAULT_URL, wait: Wait = False, as_json: AsJson = False
) -> None:
    """Give an engine no new leases; those it has live on."""
    _show(lambda: admin.set_draining(broker, engine, draining=True, wait=wait, as_json=as_json))


@undrain_app.command("undrain")
@engines_app.command()
def undrain(engine: EngineArgument, broker: BrokerUrl = admin.DEFAULT_URL, as_json: AsJson = False) -> None:
    """Let a drained engine take leases again."""
    _show(lambda: admin.set_draining(broker, engine, draining=False, as_json=as_json))


# ---- conserve leases and top ------------------------------------------------------------------------------------


@leases_app.command()
def leases(
    *,
    state: Annotated[str | None, typer.Option(help=f"One of {', '.join(_LEASE_STATES)}.")] = None,
    engine: Annotated[str | None, typer.Option(help="Engine that is its decoder or prefiller.")] = None,
    tenant: Annotated[str | None, typer.Option(help="Tenant.")] = None,
    conversation: Annotated[str | None, typer.Option(help="Conversation id.")] = None,
    older_than_s: Annotated[float, typer.Option("--older-than", min=0, help="Age in seconds at least.")] = 0,
    younger_than_s: Annotated[
        float | None, typer.Option("--younger-than", min=0, help="Age in seconds at most.")
    ] = None,
    limit: Annotated[int, typer.Option(min=1, max=1_000_000, help="How many at most.")] = 100,
    broker: BrokerUrl = admin.DEFAULT_URL,
    as_json: AsJson = False,
) -> None:
    """List live leases, oldest first."""
    given = {"state": state, "engine_id": engine, "tenant": tenant, "conversation_id": conversation}
    ages = {"min_age_ms": round(older_than_s * 1000)}
    if younger_than_s is not None:
        ages["max_age_ms"] = round(younger_than_s * 1000)
    try:
        query = LeaseQuery.model_validate({**given, **ages})
    except ValidationError as fault:
        wrong = fault.errors()[0]
        _fail(_WRONG_USAGE, f"--{str(wrong['loc'][0]).removesuffix('_id')} {wrong['input']}: {wrong['msg']}")
    _show(lambda: list_leases(broker, query, as_json=as_json, limit=limit))


@top_app.command()
def watch(
    broker: BrokerUrl = admin.DEFAULT_URL,
    once: Annotated[bool, typer.Option("--once", help="End after the first snapshot.")] = False,
    plain: Annotated[bool, typer.Option("--plain", help="Print snapshots one below the other.")] = False,
    as_json: Annotated[bool, typer.Option("--json", help="Print one JSON object a line.")] = False,
) -> None:
    """Show fleet, leases, queue and totals, a snapshot a second, until interrupted."""
    _show(lambda: top(broker, once=once, as_json=as_json, plain=plain))


# ---- conserve advise --------------------------------------------------------------------------------------------


@advise_app.command()
def advise(broker: BrokerUrl = admin.DEFAULT_URL, as_json: AsJson = False) -> None:
    """Print which preset and how many prefillers the fleet's figures call for, whether to disaggregate, and why."""
    _show(lambda: admin.advise(broker, as_json=as_json))


def _show(command: admin.Command) -> None:
    try:
        command()
    except admin.AdminError as problem:
        _fail(_FAILED, str(problem))
