"""Processes under measurement: a broker, the bare server, engines; and what they spend."""

from __future__ import annotations

import contextlib
import json
import os
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx2

from conserve_lab.demo.errors import DemoError

START_BUDGET_S = 120.0
_SERVE = "import sys; from conserve_broker.cli import broker_main; sys.exit(broker_main(sys.argv[1:]))"


def cpu_us(pid: int) -> float:
    """CPU time that a process's threads have used, in microseconds (Linux: to the nanosecond).

    Threads that have ended do not count where the kernel tells of threads; servers keep theirs.
    """
    total_ns = 0
    for task in Path(f"/proc/{pid}/task").iterdir():
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            total_ns += int((task / "schedstat").read_text().split()[0])
    return total_ns / 1_000


def rss_bytes(pid: int) -> int:
    """Resident memory of a process."""
    pages = int(Path(f"/proc/{pid}/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE")


@contextmanager
def running(command: Sequence[str], *, ready: Callable[[], bool], what: str) -> Iterator[subprocess.Popen[str]]:
    """A process that is ready, terminated at the end.

    Raises:
        DemoError: it ended, or was not ready in time.
    """
    process = subprocess.Popen(command, stdout=subprocess.PIPE, text=True)  # noqa: S603  # arguments of ours
    try:
        until_s = time.monotonic() + START_BUDGET_S
        while not ready():
            if process.poll() is not None:
                raise DemoError(f"{what} ended with status {process.returncode}")
            if time.monotonic() > until_s:
                raise DemoError(f"{what} was not ready in time")
            time.sleep(0.05)
        yield process
    finally:
        process.terminate()
        process.communicate()


@contextmanager
def running_broker(path: Path, tables: Mapping[str, Any], *, port: int) -> Iterator[int]:
    """`conserve broker` on a configuration; gives its process id once all its engines are ready."""
    write_config(path, {"listen": {"port": port}, **tables})
    url, wanted = f"http://127.0.0.1:{port}", len(tables["engine"])

    def ready() -> bool:
        found = answer(f"{url}/v1/engines")
        return found is not None and sum(each["state"] == "ready" for each in found["engines"]) == wanted

    command = [sys.executable, "-c", _SERVE, "--config", str(path), "--log-level", "error"]
    with running(command, ready=ready, what="the broker") as process:
        yield process.pid


@contextmanager
def running_bare_server(port: int) -> Iterator[int]:
    """The bare server; gives its process id."""
    command = [sys.executable, "-m", "conserve_lab.bench.bare_server", str(port)]
    with running(command, ready=lambda: _listens(port), what="the bare server") as process:
        yield process.pid


@contextmanager
def running_engines(*, prefillers: int, decoders: int) -> Iterator[list[dict[str, Any]]]:
    """Emulated engines in a process of their own; gives their entries for a broker's configuration."""
    command = [
        sys.executable,
        "-c",
        "import sys; from conserve_lab.cli import emulate_main; emulate_main(sys.argv[1:])",
    ]
    command += ["--prefillers", str(prefillers), "--decoders", str(decoders), "--time-scale", "0", "--json"]
    with running(command, ready=lambda: True, what="the emulated engines") as process:
        assert process.stdout is not None, "asked for above"
        engines: list[dict[str, Any]] = json.loads(process.stdout.readline() or "{}").get("engines", [])
        if not engines:
            raise DemoError("the emulated engines did not start")
        yield engines


def answer(url: str) -> dict[str, Any] | None:
    """What a server answers to GET; None while it does not."""
    try:
        response = httpx2.get(url, timeout=5.0, trust_env=False)
    except httpx2.TransportError:
        return None
    found: dict[str, Any] | None = response.json() if response.is_success else None
    return found


def write_config(path: Path, tables: Mapping[str, Any]) -> None:
    """Tables as TOML; a list is an array of tables."""
    lines: list[str] = []
    for name, table in tables.items():
        for one in table if isinstance(table, list) else [table]:
            lines.append(f"[[{name}]]" if isinstance(table, list) else f"[{name}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in one.items()]
    path.write_text("\n".join(lines) + "\n")


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0
