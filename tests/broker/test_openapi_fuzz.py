"""Schemathesis over the broker's own OpenAPI document: no 5xx, no status, type or shape that it does not tell of.

The gate runs a few seeded examples of each kind. More of them:

    CONSERVE_FUZZ_EXAMPLES=1000 pytest tests/broker/test_openapi_fuzz.py
"""

import os
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from conserve_broker.api_keys import new_key
from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_lab.emulator import EmulatedFleet, default_fleet

EXAMPLES = int(os.environ.get("CONSERVE_FUZZ_EXAMPLES", "4"))
BUDGET_S = 60 + 2 * EXAMPLES
CHECKS = (
    "not_a_server_error",
    "status_code_conformance",
    "content_type_conformance",
    "response_headers_conformance",
    "response_schema_conformance",
    "unsupported_method",
)
ADMIN = new_key(tenant="ops", scopes=("admin",), key_id="ops-1")
DRAIN = ("drain_engine", "undrain_engine")
"""Apart: a run that drains the last engine gets what it asked for, a 503 that is documented."""
ENDLESS = "read_events"
"""Answers for as long as somebody listens."""


@pytest.fixture(scope="module")
def broker() -> Iterator[BrokerServer]:
    # Room and short leases: a thousand made-up grants must not fill the fleet, or they are refused, as is documented.
    with EmulatedFleet(default_fleet(prefillers=1, decoders=1, time_scale=0, kv_cache_tokens=4_000_000)) as fleet:
        tables = {
            "listen": {"port": 0},
            "engine": fleet.broker_engines(),
            "lease": {"ttl_ms": 5_000, "park_ttl_ms": 5_000, "grace_ms": 0},
            "registration": {"allow": ["10.0.0.0/8"]},
            "access": {"keys": [ADMIN.table.model_dump()]},
        }
        with BrokerServer(BrokerConfig.from_mapping(tables)) as server:
            server.wait_until_ready(engines=2, timeout_s=40)
            yield server


@pytest.mark.timeout(BUDGET_S * 2)
@pytest.mark.parametrize(
    ("option", "operations"),
    [("--exclude-operation-id", (*DRAIN, ENDLESS)), ("--include-operation-id", DRAIN)],
    ids=["all but drain", "drain"],
)
def test_the_broker_keeps_to_its_document(
    broker: BrokerServer, tmp_path: Path, option: str, operations: tuple[str, ...]
) -> None:
    command = [
        str(Path(sys.executable).with_name("schemathesis")),
        "run",
        f"{broker.url}/openapi.json",
        *(word for name in operations for word in (option, name)),
        *("--header", f"Authorization: Bearer {ADMIN.text}"),
        *("--checks", ",".join(CHECKS)),
        *("--phases", "examples,coverage,fuzzing" if EXAMPLES < 100 else "examples,coverage,fuzzing,stateful"),
        *("--max-examples", str(EXAMPLES), "--seed", "1", "--generation-deterministic"),
        *("--suppress-health-check", "all", "--no-color", "--request-timeout", "30"),
    ]
    ran = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, timeout=BUDGET_S, check=False)
    assert ran.returncode == 0, ran.stdout[-6_000:] + ran.stderr[-2_000:]
    tested = re.search(r"Tested: (\d+)", ran.stdout)
    assert tested is not None
    assert int(tested[1]) >= (2 if option.startswith("--include") else 17)
    assert ADMIN.text not in ran.stdout
