"""The life of a worker: start, wait until healthy, register, beat, drain, end."""

from __future__ import annotations

import logging
import signal
import time
from collections.abc import Mapping
from typing import Any

import httpx2

from conserve_sdk._tls import verify_for
from conserve_vllm.worker.child import SIGNALS, Child
from conserve_vllm.worker.options import WorkerOptions
from conserve_vllm.worker.plan import Plan
from conserve_vllm.worker.registration import Registration

__all__ = ["Worker"]

log = logging.getLogger("conserve_vllm.worker")

HEALTH_INTERVAL_S = 0.5
DRAIN_INTERVAL_S = 1.0
GET_TIMEOUT_S = 5.0
EXIT_UNHEALTHY = 1
_ENDING = (signal.SIGTERM, signal.SIGINT)
_KNOWN_BY_THE_ENGINE = ("incarnation", "block_size_tokens", "max_model_len_tokens", "host_tier_tokens")


class Worker:
    """Runs one engine. Signals are waited for, never handled in between, so there is one place where each acts.

    Args:
        plan: what to run.
        options: how.
    """

    def __init__(self, plan: Plan, options: WorkerOptions) -> None:
        self._plan = plan
        self._options = options
        self._broker: Registration | None = None
        self._entry: Mapping[str, Any] = plan.entry
        self._ending = 0

    def run(self) -> int:
        """Run to the end; returns the exit code of the engine.

        Raises:
            Clash: the command cannot be started.
        """
        before = signal.pthread_sigmask(signal.SIG_BLOCK, SIGNALS)
        try:
            return self._run()
        finally:
            signal.pthread_sigmask(signal.SIG_SETMASK, before)

    def _run(self) -> int:
        child = Child(self._plan.argv, self._plan.env)
        if self._options.broker_url:
            self._broker = Registration(
                self._options.broker_url, engine_id=self._options.engine_id, worker_key=self._options.worker_key
            )
        try:
            return self._attend(child)
        finally:
            child.kill()
            if self._broker is not None:
                self._broker.close()

    def _attend(self, child: Child) -> int:
        if not self._wait_healthy(child):
            code = child.exit_code
            if code is None and not self._ending:
                log.error("the engine is not healthy after %.0f s: it is ended", self._options.start_timeout_s)
                child.kill()
                return EXIT_UNHEALTHY
            return self._end(child) if code is None else code
        log.warning("%s is healthy at %s", self._options.engine_id, self._plan.url)
        self._serve(child)
        if child.exit_code is None:
            self._drain(child)
        if self._broker is not None:
            self._broker.leave()
        return self._end(child)

    def _wait_healthy(self, child: Child) -> bool:
        deadline_s = time.monotonic() + self._options.start_timeout_s
        with httpx2.Client(timeout=GET_TIMEOUT_S, trust_env=False, verify=verify_for([self._plan.url])) as http:
            while child.exit_code is None and not self._ending and time.monotonic() < deadline_s:
                if _is_healthy(http, self._plan.url):
                    self._entry = self._entry_of(http)
                    return True
                self._await_signal(child, HEALTH_INTERVAL_S)
        return False

    def _entry_of(self, http: httpx2.Client) -> Mapping[str, Any]:
        """The registration, completed by what the engine's guard tells of itself."""
        try:
            told = http.get(f"{self._plan.url}/conserve/engine").raise_for_status().json()
        except (httpx2.HTTPError, ValueError):
            return self._plan.entry  # no guard: the broker's own scrape has to do
        return {**self._plan.entry, **{name: told[name] for name in _KNOWN_BY_THE_ENGINE if told.get(name)}}

    def _serve(self, child: Child) -> None:
        """Beat until the engine ends or somebody asks us to."""
        while child.exit_code is None and not self._ending:
            if self._broker is not None:
                self._broker.beat(self._entry)
            self._await_signal(child, self._options.heartbeat_s)

    def _drain(self, child: Child) -> None:
        """Wait for the engine's leases to go, or for the time to be over, or for a second signal.

        With a key that may not drain it takes its leave at once, which drains as well; a heartbeat would call it back.
        """
        if self._broker is None:
            return
        stays = self._broker.drain()
        if not stays and not self._broker.leave():
            return
        deadline_s = time.monotonic() + self._options.drain_timeout_s
        beat_s = time.monotonic()
        while child.exit_code is None and self._ending < 2 and time.monotonic() < deadline_s:
            left = self._broker.leases()
            if not left:
                break
            log.warning("draining: %d leases left (a second signal ends it at once)", left)
            if stays and time.monotonic() - beat_s >= self._options.heartbeat_s:
                beat_s = time.monotonic()
                self._broker.beat(self._entry)
            self._await_signal(child, DRAIN_INTERVAL_S)

    def _end(self, child: Child) -> int:
        """Ask the engine to end, and wait for it; further signals go to it."""
        child.send(signal.SIGTERM)
        while (code := child.exit_code) is None:
            seen = self._ending
            self._await_signal(child, DRAIN_INTERVAL_S)
            if self._ending > max(seen, 1):
                child.send(signal.SIGTERM)
        return code

    def _await_signal(self, child: Child, timeout_s: float) -> None:
        info = signal.sigtimedwait(SIGNALS, timeout_s)
        if info is None or info.si_signo == signal.SIGCHLD:
            return
        if info.si_signo in _ENDING:
            self._ending += 1
        else:
            child.send(info.si_signo)


def _is_healthy(http: httpx2.Client, url: str) -> bool:
    try:
        return http.get(f"{url}/health").status_code == httpx2.codes.OK
    except httpx2.TransportError:
        return False  # not listening yet
