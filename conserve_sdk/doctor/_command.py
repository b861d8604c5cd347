"""The command: what to ask whom, and how to print it."""

from __future__ import annotations

import argparse
import json
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from typing import Final, NoReturn, cast

import httpx2

from conserve_sdk._broker_access import API_KEY_ENV, AccessFaultError, BrokerAccess
from conserve_sdk._tls import verify_for
from conserve_sdk.doctor._broker import BrokerVisit
from conserve_sdk.doctor._engine import RestSample, check_engine, check_rest
from conserve_sdk.doctor._finding import Finding, fail, note, ok, reason
from conserve_sdk.doctor._group import check_groups, pairs_of
from conserve_sdk.doctor._installation import check_installation
from conserve_sdk.doctor._leased_turn import check_leased_turn
from conserve_sdk.doctor._look import EngineFacts, EngineHttp, NotAnEngineError, Role, Target
from conserve_sdk.doctor._probe import Prober
from conserve_sdk.doctor._processes import cpu_seconds_behind

__all__ = ["main"]

CALL_TIMEOUT_S: Final = 3.0
REST_S: Final = 1.0
ROLES: Final = ("prefiller", "decoder", "both")


def main(
    argv: Sequence[str] | None = None,
    *,
    transport: httpx2.BaseTransport | None = None,
    clock_s: Callable[[], float] = time.monotonic,
    sleep: Callable[[float], None] = time.sleep,
) -> int:
    """Print the report.

    Args:
        argv: arguments without the program's name; those of the process by default.
        transport: replaces the network (tests).
        clock_s: monotonic seconds (tests).
        sleep: waits so many seconds (tests).

    Returns:
        0 when nothing failed, else 1. Wrong usage ends the program with 2.
    """
    parser = _parser()
    options = parser.parse_args(argv)
    targets = [_target(parser, text) for text in options.engines]
    verify = verify_for(["https:"])  # engines may be https even when the broker is not
    findings: list[Finding] = []
    network = transport or httpx2.HTTPTransport(verify=verify)
    # The SDK goes to engines directly, whatever proxy the environment names; so does this.
    with httpx2.Client(transport=network, timeout=CALL_TIMEOUT_S, trust_env=False) as client:
        http = EngineHttp(client, api_key=options.engine_key)
        prober = None if options.no_requests else Prober(http, clock_s=clock_s, sleep=sleep)
        for finding in _report(http, prober, options, targets, transport=transport, clock_s=clock_s, sleep=sleep):
            findings.append(finding)
            if not options.json:
                sys.stdout.write(f"{finding}\n")
                sys.stdout.flush()
    good = all(finding.verdict != "fail" for finding in findings)
    if options.json:
        report = {"ok": good, "findings": [finding.as_json() for finding in findings]}
        sys.stdout.write(json.dumps(report, indent=2) + "\n")
    return int(not good)


def _report(
    http: EngineHttp,
    prober: Prober | None,
    options: argparse.Namespace,
    targets: list[Target],
    *,
    transport: httpx2.BaseTransport | None,
    clock_s: Callable[[], float],
    sleep: Callable[[float], None],
) -> Iterator[Finding]:
    yield from check_installation()
    broker_url = options.broker or os.environ.get("CONSERVE_BROKER_URL", "").split(",")[0].strip()
    if broker_url:
        try:
            access = BrokerAccess.resolve(api_key=options.broker_key or None)
            verify = access.verify([broker_url])
        except AccessFaultError as fault:
            yield fail("broker", "broker", "cannot be asked", fix=str(fault))
            return
        with httpx2.Client(
            transport=transport or httpx2.HTTPTransport(verify=verify), timeout=CALL_TIMEOUT_S, trust_env=False
        ) as broker_http:
            visit = BrokerVisit(broker_http, broker_url, access=access)
            yield from visit.findings()
        targets = [*visit.targets, *targets]
    elif not targets:
        yield note("broker", "broker", "not asked", fix="give --broker URL, or the URLs of engines")
    yield from _engines(http, prober, targets, clock_s=clock_s, sleep=sleep)
    if broker_url and prober is not None:
        models = sorted({target.model for target in targets if target.from_broker and target.role != "prefiller"})
        for model in models:
            yield check_leased_turn(
                broker_url, model, access=access, engine_key=options.engine_key, transport=transport
            )


def _engines(
    http: EngineHttp,
    prober: Prober | None,
    targets: Sequence[Target],
    *,
    clock_s: Callable[[], float],
    sleep: Callable[[float], None],
) -> Iterator[Finding]:
    engines: list[EngineFacts] = []
    for target in targets:
        try:
            facts = http.look(target)
        except (httpx2.HTTPError, httpx2.InvalidURL, NotAnEngineError) as exc:
            yield _unreachable(target, exc)
            continue
        engines.append(facts)
        yield ok(facts.name, "reachable", f"answers at {target.url}")
        yield from check_engine(facts)
    yield from _at_rest(http, engines, clock_s=clock_s, sleep=sleep)
    yield from check_groups(engines)
    if prober is not None:
        yield from _probes(prober, engines)


def _at_rest(
    http: EngineHttp,
    engines: Sequence[EngineFacts],
    *,
    clock_s: Callable[[], float],
    sleep: Callable[[float], None],
) -> Iterator[Finding]:
    """Look at each engine's CPU time twice, a second apart."""
    if not engines:
        return
    try:
        first = [_sample(http, facts, clock_s) for facts in engines]
        sleep(REST_S)
        for facts, before in zip(engines, first, strict=True):
            yield check_rest(facts.name, before, _sample(http, facts, clock_s))
    except (httpx2.HTTPError, NotAnEngineError) as exc:
        yield fail("engines", "cpu_at_rest", f"one went away meanwhile ({reason(exc)})", fix="see its log, and repeat")


def _sample(http: EngineHttp, facts: EngineFacts, clock_s: Callable[[], float]) -> RestSample:
    page, url = http.page(facts.target), httpx2.URL(facts.target.url)
    is_here = url.host in ("127.0.0.1", "localhost", "::1")
    tree_s = cpu_seconds_behind(url.port) if is_here and url.port else None
    return RestSample(page=page, at_s=clock_s(), tree_s=tree_s)


def _probes(prober: Prober, engines: Sequence[EngineFacts]) -> Iterator[Finding]:
    for facts in engines:
        if facts.role != "prefiller":
            yield prober.check_cache(facts)
    pairs = pairs_of(engines)
    for prefiller, decoder in pairs:
        yield from prober.check_transfer(prefiller, decoder)
    if not pairs and len(engines) > 1:
        detail = "not tried: no two engines here could move KV to each other"
        yield note(
            "transfer", "transfer", detail, fix="name roles as in prefiller=URL decoder=URL; see the lines above"
        )


def _unreachable(target: Target, exc: Exception) -> Finding:
    if isinstance(exc, NotAnEngineError):
        return fail(target.name, "reachable", f"{target.url} does not answer like vLLM", fix=str(exc))
    if target.from_broker:
        detail = f"the broker reaches it, this machine does not ({reason(exc)})"
        return fail(target.name, "reachable", detail, fix=f"turns go to {target.url} directly, open the way")
    return fail(target.name, "reachable", f"no answer from {target.url} ({reason(exc)})", fix="is it running?")


def _target(parser: argparse.ArgumentParser, text: str) -> Target:
    """An engine as named on the command line: its URL, perhaps with `role=` in front."""
    role, sign, rest = text.partition("=")
    role, address = (role, rest) if sign and role in ROLES else ("", text)
    try:
        url = httpx2.URL(address)
        good = url.scheme in ("http", "https") and bool(url.host)
    except httpx2.InvalidURL:
        good = False
    if not good:
        parser.error(f"{text!r} is no engine: give http://HOST:PORT, or ROLE=http://HOST:PORT with {', '.join(ROLES)}")
    plain = address.rstrip("/").removesuffix("/v1")
    return Target(
        name=f"engine {url.host}:{url.port or (443 if url.scheme == 'https' else 80)}",
        url=plain,
        role=cast("Role", role),
    )


class _Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, as the other commands do."""

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: {message} (`{self.prog} --help` tells more)\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="conserve doctor",
        description="Check this installation, the broker and the engines. Engines get a few short requests.",
        epilog="Exit code: 0 all well, 1 something to change, 2 wrong usage.",
    )
    parser.add_argument("engines", nargs="*", metavar="[ROLE=]URL", help="engines; ROLE: prefiller, decoder or both")
    parser.add_argument("--broker", metavar="URL", default="", help="default: CONSERVE_BROKER_URL")
    key, env = "KEY", os.environ.get
    parser.add_argument("--broker-key", metavar=key, default="", help=f"better: {API_KEY_ENV}, which no `ps` shows")
    parser.add_argument(
        "--engine-key", metavar=key, default=env("CONSERVE_ENGINE_KEY", ""), help="or CONSERVE_ENGINE_KEY"
    )
    parser.add_argument("--no-requests", action="store_true", help="look only: send nothing that takes computing")
    parser.add_argument("--json", action="store_true", help="one JSON document instead of lines")
    return parser
