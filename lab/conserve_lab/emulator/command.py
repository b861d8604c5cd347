"""`conserve emulate`: a fleet for other processes."""

from __future__ import annotations

import argparse
import contextlib
import json
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from pathlib import Path
from types import FrameType
from typing import TextIO

from conserve_lab.emulator.config import FleetConfig, FleetConfigError, default_fleet, load_fleet_config
from conserve_lab.emulator.fleet import EmulatedFleet

_EXIT_USAGE = 2


def emulate_main(argv: Sequence[str], *, out: TextIO | None = None, until: threading.Event | None = None) -> int:
    """Run a fleet until interrupted and return the exit status.

    Args:
        argv: Arguments after `conserve emulate`.
        out: Where to print; standard output by default.
        until: Ends the run when set; by default SIGINT and SIGTERM do.
    """
    options = _parser().parse_args(argv)
    stream = out or sys.stdout
    try:
        config = _config(options)
    except FleetConfigError as error:
        print(f"conserve emulate: {error}", file=sys.stderr)  # noqa: T201  (a command talks to its user)
        return _EXIT_USAGE
    if options.check:
        print(f"ok: {len(config.engine)} engines", file=stream)
        return 0
    fleet = EmulatedFleet(config)
    try:
        fleet.start()
    except OSError as error:
        print(  # noqa: T201
            f"conserve emulate: {error.strerror or error}; choose other ports or 0", file=sys.stderr
        )
        return 1
    try:
        stop = until or threading.Event()
        with contextlib.nullcontext() if until else _signals_set(stop):
            _announce(fleet, stream, as_json=options.json)
            stop.wait()
    finally:
        fleet.stop()
    return 0


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="conserve emulate", description="Serve emulated vLLM engines on this machine."
    )
    parser.add_argument("--config", type=Path, help="TOML with [[engine]] tables and optional [defaults]")
    parser.add_argument("--prefillers", type=int, default=2, help="without --config (default 2)")
    parser.add_argument("--decoders", type=int, default=3, help="without --config (default 3)")
    parser.add_argument("--time-scale", type=float, help="multiply all durations; 0 is instant")
    parser.add_argument("--json", action="store_true", help="print the engines as one JSON document")
    parser.add_argument("--check", action="store_true", help="only check the configuration")
    return parser


def _config(options: argparse.Namespace) -> FleetConfig:
    if options.config is not None:
        config = load_fleet_config(options.config)
    else:
        config = default_fleet(prefillers=options.prefillers, decoders=options.decoders)
    return config if options.time_scale is None else config.with_all(time_scale=options.time_scale)


def _announce(fleet: EmulatedFleet, stream: TextIO, *, as_json: bool) -> None:
    engines = fleet.broker_engines()
    if as_json:
        lines = [json.dumps({"engines": engines})]
    else:
        lines = [f"{engine['id']:<8} {engine['role']:<10} {engine['model']:<16} {engine['url']}" for engine in engines]
        lines.append("Press Ctrl-C to stop.")
    print("\n".join(lines), file=stream, flush=True)


@contextlib.contextmanager
def _signals_set(stop: threading.Event) -> Iterator[None]:
    """Let SIGINT and SIGTERM set an event, and put the old handlers back afterwards."""

    def handle(_number: int, _frame: FrameType | None) -> None:
        stop.set()

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
