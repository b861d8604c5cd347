"""docs/observability.md lists every metric of the broker with its labels, and no other; so with spans and log lines."""

import re
from collections.abc import Iterator
from pathlib import Path

import httpx2
import pytest
from prometheus_client.parser import text_string_to_metric_families

from conserve_broker import tracing
from conserve_broker.api_keys import new_key
from conserve_broker.metrics import ROLES
from conserve_broker.server import BrokerServer
from conserve_broker.settings import BrokerConfig
from conserve_lab.emulator import EmulatedFleet, default_fleet

DOCUMENT = (Path(__file__).resolve().parents[2] / "docs" / "observability.md").read_text()
SECTION = DOCUMENT.partition("## The broker's metrics")[2].partition("\n## ")[0]
ROW = re.compile(r"^\| `(conserve_[a-z_]+)` \| (\w+)[^|]*\| ([^|]*)\|", re.MULTILINE)


@pytest.fixture(scope="module")
def page() -> Iterator[str]:
    """What a broker that has granted, refused and lost exports."""
    with EmulatedFleet(default_fleet(prefillers=1, decoders=1, time_scale=0)) as fleet:
        key = new_key(tenant="ops", scopes=("admin",), key_id="ops-1")
        tables = {
            "listen": {"port": 0},
            "scrape": {"interval_ms": 100},
            "engine": fleet.broker_engines(),
            "access": {"keys": [key.table.model_dump()]},
        }
        with BrokerServer(BrokerConfig.from_mapping(tables)) as server:
            server.wait_until_ready(engines=2, timeout_s=40)
            body = {"conversation_id": "c", "lineage": "l", "first_turn_input_tokens": 100}
            bearer = {"authorization": f"Bearer {key.text}"}
            for model in ("emulated", "unknown"):
                httpx2.post(f"{server.url}/v1/leases", json={**body, "model": model}, headers=bearer)
            yield httpx2.get(f"{server.url}/metrics").text


def exported(page: str) -> dict[str, tuple[str, set[str]]]:
    found = {}
    for family in text_string_to_metric_families(page):
        if family.name.endswith("_created"):  # when a histogram began
            continue
        name = f"{family.name}_total" if family.type == "counter" else family.name
        labels = {label for sample in family.samples for label in sample.labels} - {"le"}
        found[name] = (family.type, labels)
    return found


def test_every_metric_is_listed_and_every_listed_one_is_there(page: str) -> None:
    listed = {name: (kind, set(re.findall(r"`(\w+)`", labels))) for name, kind, labels in ROW.findall(SECTION)}
    assert len(listed) > 30
    assert exported(page) == listed


def test_names_say_their_units(page: str) -> None:
    for name, (kind, _) in exported(page).items():
        assert name.endswith("_total") == (kind == "counter"), name
        if kind == "histogram":
            assert name.endswith("_seconds"), name
    assert all(f'conserve_broker_role{{role="{role}"}}' in page for role in ROLES)
    assert 'conserve_broker_role{role="alone"} 1.0' in page


def test_every_span_is_listed() -> None:
    section = DOCUMENT.partition("## The broker's traces")[2].partition("\n## ")[0]
    source = Path(tracing.__file__).read_text()
    names = set(re.findall(r'"(conserve(?:\.[a-z_.]+| [a-z]+)|gen_ai\.[a-z.]+|http\.[a-z_.]+|error\.type)"', source))
    assert len(names) > 15
    assert {name for name in names if f"`{name}`" not in section} == set()


def test_every_field_of_the_log_is_listed() -> None:
    from conserve_broker import logbook

    section = DOCUMENT.partition("## The broker's log")[2].partition("\n## ")[0]
    source = Path(logbook.__file__).read_text().partition("class Logbook")[2]
    told = set(re.findall(r'"((?:lease|engine)_[a-z_]+)"', source)) | set(
        re.findall(r"^ {12}(\w+)=", source, re.MULTILINE)
    )
    assert {"lease_granted", "need_tokens", "waited_ms"} <= told
    assert {name for name in told if f"`{name}`" not in section} == set()
