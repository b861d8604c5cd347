"""Brokers as processes of their own, to be killed, paused and told to end; and load that remembers every answer."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Self

import httpx2

from conserve_sdk.protocol import RENEWALS_MAX, BatchAnswer, FleetInfo, LeaseGrant

BUDGET_S = 40.0
_CODE = "import sys; from conserve_broker.cli import broker_main; sys.exit(broker_main(sys.argv[1:]))"


def until(condition: Callable[[], bool], *, budget_s: float = BUDGET_S, what: str = "the condition") -> None:
    deadline = time.monotonic() + budget_s
    while not condition():
        assert time.monotonic() < deadline, f"{what} never came true"
        time.sleep(0.02)


def toml_of(tables: Mapping[str, Any]) -> str:
    """Tables of plain values, and lists of them, as TOML."""
    lines: list[str] = []
    for name, table in tables.items():
        for one in table if isinstance(table, list) else [table]:
            lines.append(f"[[{name}]]" if isinstance(table, list) else f"[{name}]")
            lines += [f"{key} = {json.dumps(value)}" for key, value in one.items()]
    return "\n".join(lines) + "\n"


class BrokerProcess:
    """`conserve broker` on a configuration file of its own."""

    def __init__(self, path: Path, tables: Mapping[str, Any]) -> None:
        self.path = path
        self.tables = dict(tables)
        self.url = ""
        self.log: list[str] = []
        self.process: subprocess.Popen[str] | None = None

    def start(self) -> Self:
        self.path.write_text(toml_of(self.tables))
        self.log.clear()
        self.process = subprocess.Popen(
            [sys.executable, "-c", _CODE, "--config", str(self.path)],
            stderr=subprocess.PIPE,
            text=True,
            env={**os.environ},
        )
        self._reader = threading.Thread(target=self._read_log, args=(self.process,), daemon=True)
        self._reader.start()
        until(lambda: any("broker_started" in line for line in self.log) or self.process.poll() is not None)
        started = [line for line in self.log if "broker_started" in line]
        assert started, "".join(self.log)
        found = re.search(r"http://[0-9.]+:[0-9]+", started[0])  # as text and as JSON
        assert found is not None, started[0]
        self.url = found[0]
        self.tables["listen"] = {"port": int(self.url.rsplit(":", 1)[1])}  # the same one after a restart
        return self

    def _read_log(self, process: subprocess.Popen[str]) -> None:
        assert process.stderr is not None
        with process.stderr as lines:
            for line in lines:
                self.log.append(line)

    def signal(self, number: int) -> None:
        assert self.process is not None
        self.process.send_signal(number)

    def kill(self) -> None:
        self.signal(signal.SIGKILL)
        self.wait()

    def wait(self) -> int:
        assert self.process is not None
        code = self.process.wait(BUDGET_S)
        self._reader.join(BUDGET_S)
        return code

    def readyz(self) -> dict[str, Any]:
        try:
            return httpx2.get(f"{self.url}/readyz", timeout=5).json()
        except httpx2.TransportError:
            return {"ready": False, "role": "unreachable", "reasons": [], "warnings": []}

    def fleet(self) -> FleetInfo:
        return FleetInfo.model_validate_json(httpx2.get(f"{self.url}/v1/fleet", timeout=BUDGET_S).content)

    def metric(self, name: str) -> float:
        page = httpx2.get(f"{self.url}/metrics", timeout=BUDGET_S).text
        values = [float(line.split()[-1]) for line in page.splitlines() if line.startswith(f"{name} ")]
        return values[0] if values else -1.0  # a standby exports nothing of the kind

    def ask(self, conversation: str, *, tokens: int = 100) -> httpx2.Response:
        body = {"conversation_id": conversation, "lineage": "main", "model": "emulated"}
        return httpx2.post(f"{self.url}/v1/leases", json={**body, "first_turn_input_tokens": tokens}, timeout=BUDGET_S)

    def grant(self, conversation: str) -> LeaseGrant:
        response = self.ask(conversation)
        assert response.is_success, response.text
        return LeaseGrant.model_validate_json(response.content)

    def renew(self, *grants: LeaseGrant) -> list[str]:
        verdicts: list[str] = []
        for start in range(0, len(grants), RENEWALS_MAX):
            body = {"tokens": [grant.token for grant in grants[start : start + RENEWALS_MAX]]}
            response = httpx2.post(f"{self.url}/v1/renewals", json=body, timeout=BUDGET_S)
            assert response.is_success, response.text
            results = BatchAnswer.model_validate_json(response.content).results
            verdicts += [status.verdict for status in results]
        return verdicts

    def end(self) -> None:
        if self.process is not None and self.process.poll() is None:
            self.process.send_signal(signal.SIGCONT)
            self.process.kill()
        if self.process is not None:
            self.wait()

    def __enter__(self) -> Self:
        return self.start()

    def __exit__(self, *_: object) -> None:
        self.end()


class Load:
    """Callers that ask for leases and release every third, trying the brokers in order; what they were told counts.

    Attributes:
        held: leases that were granted and not told to be released, by conversation.
        released: ids whose release was acknowledged.
        unsure: conversations with a request that was never answered.
    """

    def __init__(self, *urls: str, callers: int = 4, prefix: str = "c") -> None:
        self.urls = list(urls)
        self.held: dict[str, LeaseGrant] = {}
        self.released: set[str] = set()
        self.unsure: set[str] = set()
        self.grants = 0
        self._prefix = prefix
        self._stop = threading.Event()
        self._threads = [threading.Thread(target=self._call, args=(number,)) for number in range(callers)]

    def start(self) -> Self:
        for thread in self._threads:
            thread.start()
        return self

    def stop(self) -> None:
        self._stop.set()
        for thread in self._threads:
            thread.join(BUDGET_S)

    def _call(self, caller: int) -> None:
        number = 0
        with httpx2.Client(timeout=2.0) as http:
            while not self._stop.is_set():
                number += 1
                conversation = f"{self._prefix}-{caller}-{number}"
                self.unsure.add(conversation)
                grant = self._asked(http, conversation)
                if grant is None:
                    continue
                self.held[conversation] = grant
                self.unsure.discard(conversation)
                self.grants += 1
                if number % 3 == 0:
                    self._release(http, conversation, grant)

    def _asked(self, http: httpx2.Client, conversation: str) -> LeaseGrant | None:
        body = {"conversation_id": conversation, "lineage": "main", "model": "emulated", "first_turn_input_tokens": 10}
        while not self._stop.is_set():
            for url in list(self.urls):
                try:
                    response = http.post(f"{url}/v1/leases", json=body)
                except httpx2.TransportError:
                    continue
                if response.is_success:
                    return LeaseGrant.model_validate_json(response.content)
            time.sleep(0.01)
        return None

    def _release(self, http: httpx2.Client, conversation: str, grant: LeaseGrant) -> None:
        self.unsure.add(conversation)
        for url in list(self.urls):
            try:
                response = http.delete(
                    f"{url}/v1/leases/{grant.lease_id}", headers={"authorization": f"Lease {grant.token}"}
                )
            except httpx2.TransportError:
                continue
            if response.status_code == 204:
                self.released.add(grant.lease_id)
                del self.held[conversation]
                self.unsure.discard(conversation)
                return
