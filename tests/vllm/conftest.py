"""Real vLLM servers on this machine's CPU: the protocol spoken to them by hand (`raw`), and broker and SDK (`stage`).

Tests with `raw` say what vLLM itself does, which is what the SDK relies on; those with `stage` that it may.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from contextlib import closing
from pathlib import Path

import httpx2
import pytest

from conserve_lab.vllm import FleetOptions, VllmFleet, VllmMissingError, find_venv
from conserve_sdk.core.units import Ms, Tokens

from .guarded import Leased
from .leased import Stage
from .raw import REQUEST_BUDGET_S, RawProtocol

REQUIRE_VARIABLE = "CONSERVE_REQUIRE_VLLM"
GUARDED_VARIABLE = "CONSERVE_VLLM_GUARDED"
"""Set to run the tests of broker and SDK (those with `stage`) through guards."""

EMPTY_BUDGET_S = 90.0
"""A prefiller's blocks wait 30 s for a decoder that never comes."""

RECOVERY = "seconds to recovery"


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if item.path.parent.name == "vllm":
            item.add_marker(pytest.mark.vllm)
            # The fleet has its own start budget; a test has a minute once it runs, faults (restarts) two.
            item.add_marker(pytest.mark.timeout(120, func_only=True))


@pytest.fixture(scope="session")
def vllm_here() -> None:
    """Skips where there is no vLLM, unless there must be one."""
    try:
        find_venv()
    except VllmMissingError as missing:
        if os.environ.get(REQUIRE_VARIABLE):
            raise
        pytest.skip(str(missing))


@pytest.fixture(scope="session")
def fleet(vllm_here: None) -> Iterator[VllmFleet]:
    """One prefiller, two decoders and an aggregated reference; caches of 12,288 tokens, which tests can fill."""
    options = FleetOptions(
        references=1,
        max_model_tokens=Tokens(4_096),
        kv_cache_tokens=Tokens(12_288),
        hold_ms=Ms(30_000),
        leased_holds=frozenset({"d1"}),
        guarded=frozenset({"p0", "d0", "d1"} if os.environ.get(GUARDED_VARIABLE) else ()),
    )
    with VllmFleet(options) as running:
        yield running


def by_hand() -> httpx2.Client:
    """A client for plain HTTP. It keeps no connection: vLLM closes idle ones after 5 s, perhaps as a request leaves."""
    limits = httpx2.Limits(max_keepalive_connections=0)
    return httpx2.Client(timeout=REQUEST_BUDGET_S, limits=limits, trust_env=False)


@pytest.fixture
def raw(fleet: VllmFleet) -> Iterator[RawProtocol]:
    with by_hand() as http:
        yield RawProtocol(fleet, http)


@pytest.fixture
def stage(fleet: VllmFleet, raw: RawProtocol, tmp_path: Path) -> Iterator[Stage]:
    with closing(Stage(fleet, raw, tmp_path)) as opened:
        yield opened


Recovered = Callable[[str, float], None]


@pytest.fixture
def recovered(request: pytest.FixtureRequest) -> Recovered:
    """Notes how long a client waited after a fault: `recovered("what was lost", seconds)`.

    The seconds stand in the JUnit report and in the table at the end of a run. No test judges them.
    """

    def note(fault: str, seconds: float) -> None:
        request.node.user_properties.append((RECOVERY, f"{seconds:7.2f} s  {fault}"))

    return note


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    reports = [report for group in ("passed", "failed") for report in terminalreporter.getreports(group)]
    lines = [text for report in reports for name, text in report.user_properties if name == RECOVERY]
    if lines:
        terminalreporter.section(f"seconds to recovery (load {os.getloadavg()[0]:.1f})")
        terminalreporter.line("\n".join(map(str, lines)))


@pytest.fixture
def mended(fleet: VllmFleet) -> Iterator[None]:
    """Starts again what a test killed."""
    yield
    _mend(fleet)


@pytest.fixture
def emptied(fleet: VllmFleet, prefiller_emptied: None) -> Iterator[None]:
    """After the test, its clients and brokers closed, no decoder that lives keeps KV in use.

    Name it after `mended`, so that it looks before a restart would make all well.
    """
    yield
    _check_empty(fleet, "d0", "d1")


@pytest.fixture(scope="module")
def prefiller_emptied(fleet: VllmFleet) -> Iterator[None]:
    """The same of the prefiller, once for all of a file's tests: its blocks wait for a decoder that never comes."""
    yield
    _check_empty(fleet, "p0")


def _check_empty(fleet: VllmFleet, *engine_ids: str) -> None:
    with by_hand() as http:
        engines = RawProtocol(fleet, http)
        for engine_id in filter(fleet.is_alive, engine_ids):
            left = engines.settled(engine_id, lambda now: now.kv_used_tokens == 0, budget_s=EMPTY_BUDGET_S)
            assert left.running == left.waiting == 0


def _mend(fleet: VllmFleet) -> None:
    for engine_id in fleet.engines:
        if not fleet.is_alive(engine_id):
            fleet.restart(engine_id)


@pytest.fixture(scope="session")
def guarded_fleet(vllm_here: None) -> Iterator[VllmFleet]:
    """`d0` behind a guard, with holds by lease; `d1` without a guard, and with a host tier; and a stranger."""
    options = FleetOptions(
        references=1,
        strangers=1,
        max_model_tokens=Tokens(4_096),
        kv_cache_tokens=Tokens(12_288),
        guarded=frozenset({"p0", "d0"}),
        leased_holds=frozenset({"d0"}),
        host_tiers=frozenset({"d1"}),
    )
    with VllmFleet(options) as running:
        yield running


@pytest.fixture
def leased(guarded_fleet: VllmFleet) -> Iterator[Leased]:
    with by_hand() as http:
        yield Leased(guarded_fleet, http)
    _mend(guarded_fleet)
