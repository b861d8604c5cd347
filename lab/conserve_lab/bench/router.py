"""vllm-router (PyPI `vllm-router`) in front of the same engines, in its prefill/decode mode with sticky decoders."""

from __future__ import annotations

import subprocess
import sys
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path

import httpx2

from conserve_lab.bench.stack_process import Addresses
from conserve_lab.demo.cpu import process_cpu_s
from conserve_lab.ports import free_ports

__all__ = [
    "NoRouter",
    "RouterProcess",
    "aggregated",
    "disaggregated",
    "router_binary",
    "router_with",
    "running_router",
]

PACKAGE = "vllm-router>=0.1.17"
INSTALL_BUDGET_S = 300.0
START_BUDGET_S = 60.0


class NoRouter(Exception):  # noqa: N818 -- says what happened
    """The router cannot be run here; the message says why."""


class RouterProcess:
    """A running router."""

    def __init__(self, url: str, process: subprocess.Popen[bytes]) -> None:
        self.url = url
        self._process = process

    def cpu_s(self) -> float:
        """CPU seconds of the router so far; 0 where the system does not tell (not Linux)."""
        return process_cpu_s(self._process.pid) or 0.0


def router_binary(cache: Path) -> Path:
    """The router of the cache directory; installed there, in an environment of its own, when it is missing.

    Raises:
        NoRouter: it cannot be installed.
    """
    home = cache / "vllm-router"
    binary = home / "bin" / "vllm-router"
    if binary.exists():
        return binary
    for command in (
        [sys.executable, "-m", "venv", str(home)],
        [str(home / "bin" / "python"), "-m", "pip", "install", "--quiet", "--disable-pip-version-check", PACKAGE],
    ):
        try:
            subprocess.run(command, check=True, capture_output=True, timeout=INSTALL_BUDGET_S)  # noqa: S603
        except (OSError, subprocess.SubprocessError) as error:
            raise NoRouter(f"{PACKAGE} could not be installed: {error}") from error
    return binary


def disaggregated(
    prefillers: Sequence[str], decoders: Sequence[str], *, prefill_policy: str, decode_policy: str
) -> list[str]:
    """Return the flags of its prefill/decode mode in front of these URLs."""
    return [
        "--vllm-pd-disaggregation",
        *(part for url in prefillers for part in ("--prefill", url)),
        *(part for url in decoders for part in ("--decode", url)),
        *["--policy", "consistent_hash", "--prefill-policy", prefill_policy, "--decode-policy", decode_policy],
    ]


def aggregated(urls: Sequence[str], *, policy: str) -> list[str]:
    """Return the flags of its regular mode in front of these URLs."""
    return ["--worker-urls", *urls, "--policy", policy]


@contextmanager
def running_router(binary: Path, engines: Addresses) -> Iterator[RouterProcess]:
    """Run the router in front of the engines, with the policies that keep a session on its decoder.

    Raises:
        NoRouter: it does not come up.
    """
    flags = disaggregated(
        [engines.prefiller], [engines.decoder], prefill_policy="cache_aware", decode_policy="sticky_least_loaded"
    )
    with router_with(binary, flags) as router:
        yield router


@contextmanager
def router_with(binary: Path, flags: Sequence[str]) -> Iterator[RouterProcess]:
    """Run the router with these flags, on ports of its own.

    Raises:
        NoRouter: it does not come up.
    """
    port, metrics_port = free_ports(2)
    command = [
        *[str(binary), "--host", "127.0.0.1", "--port", str(port)],
        *["--prometheus-host", "127.0.0.1", "--prometheus-port", str(metrics_port)],
        *["--worker-startup-timeout-secs", "20", "--worker-startup-check-interval", "1"],
        *flags,
    ]
    try:
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)  # noqa: S603
    except OSError as error:
        raise NoRouter(f"{binary} does not start: {error}") from error
    url = f"http://127.0.0.1:{port}"
    try:
        _wait_until_ready(url, process)
        yield RouterProcess(url, process)
    finally:
        process.terminate()
        try:
            process.wait(10)
        except subprocess.TimeoutExpired:
            process.kill()
            process.wait()


def _wait_until_ready(url: str, process: subprocess.Popen[bytes]) -> None:
    deadline_s = time.monotonic() + START_BUDGET_S
    with httpx2.Client(trust_env=False, timeout=5.0) as http:
        while time.monotonic() < deadline_s:
            if process.poll() is not None:
                raise NoRouter(f"vllm-router ended at once with status {process.returncode}")
            try:
                if http.get(f"{url}/health").status_code == 200:
                    return
            except httpx2.TransportError:
                pass
            time.sleep(0.2)
    raise NoRouter(f"vllm-router was not ready within {START_BUDGET_S:.0f} s")
