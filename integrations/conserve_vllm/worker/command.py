"""`conserve worker [options] -- COMMAND`: argparse, because a GPU worker has no need of Typer."""

from __future__ import annotations

import argparse
import logging
import os
import secrets
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Final

from conserve_sdk._broker_access import API_KEY_ENV
from conserve_vllm.worker.options import Clash, WorkerOptions
from conserve_vllm.worker.plan import make_plan
from conserve_vllm.worker.run import Worker

__all__ = ["worker_main"]

EXIT_USAGE: Final = 2
KEY_VARIABLE: Final = "CONSERVE_WORKER_KEY"


def worker_main(argv: Sequence[str] | None = None) -> int:
    """Run an engine as a member of a fleet.

    Args:
        argv: arguments without the program's name; those of the process by default.

    Returns:
        The engine's own exit code; 2 for wrong usage.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    own, command = _split(arguments)
    given = _parser().parse_args(own)
    try:
        options = _options(given)
        plan = make_plan(options, command, os.environ, life=secrets.token_hex(4))
        if given.dry_run:
            sys.stdout.write(f"{plan.shown()}\n")
            return 0
        logging.basicConfig(format="conserve worker: %(message)s", stream=sys.stderr)
        return Worker(plan, options).run()
    except Clash as clash:
        sys.stderr.write(f"conserve worker: {clash}\n")
        return EXIT_USAGE


def _split(arguments: list[str]) -> tuple[list[str], list[str]]:
    if "--" not in arguments:
        return arguments, []
    at = arguments.index("--")
    return arguments[:at], arguments[at + 1 :]


def _options(given: argparse.Namespace) -> WorkerOptions:
    return WorkerOptions(
        engine_id=given.id,
        role=given.role,
        url=given.url.rstrip("/"),
        model=given.model,
        broker_url=given.broker,
        worker_key=_worker_key(given.worker_key_file),
        transfer_group=given.transfer_group,
        tier=given.tier,
        token_keys=given.token_keys,
        guard=given.guard,
        require_lease=given.require_lease,
        hold_s=given.hold_s,
        side_channel_host=given.side_channel_host,
        side_channel_port=given.side_channel_port,
        quiet_nixl=given.quiet_nixl,
        leased_holds=given.leased_holds,
        host_tier_gib=given.host_tier_gib,
        start_timeout_s=given.start_timeout_s,
        heartbeat_s=given.heartbeat_s,
        drain_timeout_s=given.drain_timeout_s,
    )


def _worker_key(path: str) -> str:
    if not path:
        return os.environ.get(KEY_VARIABLE, "").strip()
    try:
        return Path(path).read_text().strip()
    except OSError as error:
        raise Clash(f"--worker-key-file: cannot read {path} ({error.strerror})") from error


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="conserve worker",
        usage="conserve worker --id ID --role ROLE [options] -- vllm serve MODEL [flags]",
        description="Start an engine as a member of a fleet: connector, roles, ports and guard set; registered with "
        "the broker while it is healthy; drained before it ends. Flags after -- win where they do not contradict.",
    )
    add = parser.add_argument
    add("--id", required=True, help="the engine's id in the fleet")
    add("--role", required=True, choices=("prefiller", "decoder", "both"), help="what it is for")
    add("--url", default="", help="where clients and broker reach it (default: --host and --port of the command)")
    add("--model", default="", help="the name it serves (default: from the command)")
    add("--broker", default=os.environ.get("CONSERVE_BROKER_URL", ""), help="where to register (CONSERVE_BROKER_URL)")
    add(
        "--worker-key-file", default="", help=f"file with the broker's worker key (or {KEY_VARIABLE}, or {API_KEY_ENV})"
    )
    add("--token-keys", default="", help="the broker's token keys: kid=file:/path or kid=public:/path.pem, ...")
    add("--no-guard", dest="guard", action="store_false", help="start without LeaseGuard: trusted networks only")
    add("--require-lease", action="store_true", help="the guard refuses requests that carry no lease")
    add("--transfer-group", default="nixl", help="engines of one group can move KV between each other")
    add("--tier", default="", help="host tier, for placement")
    add("--hold-s", type=int, default=30, help="how long a decoder keeps a turn's KV when asked to (kv_lease_duration)")
    add("--side-channel-host", default="", help="where NIXL's handshake listens (default: the host of the URL)")
    add("--side-channel-port", type=int, default=5600, help="its port; one per engine on a host")
    add("--quiet-nixl", action="store_true", help="let NIXL's progress thread rest 1 ms between two looks")
    add("--leased-holds", action="store_true", help="hold each lease's KV for its own time, and let go of it early")
    add("--host-tier-gib", type=float, default=0.0, help="host memory for KV of idle conversations (needs a GPU)")
    add("--start-timeout-s", type=float, default=900.0, help="how long the engine may take to be healthy")
    add("--heartbeat-s", type=float, default=5.0, help="time between heartbeats; the broker waits for three")
    add("--drain-timeout-s", type=float, default=120.0, help="how long to wait for leases to go after SIGTERM")
    add("--dry-run", action="store_true", help="show what would be run, and end")
    return parser
