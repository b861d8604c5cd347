"""The Helm chart: what it renders is what Kubernetes takes, with one broker and with replicas, and the broker, too."""

from __future__ import annotations

import copy
import json
import re
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

from conserve_broker.settings import load_config
from tests.deploy.go_templates import Chart

CHART = Path(__file__).parents[2] / "broker" / "chart"
VALUES: dict[str, Any] = yaml.safe_load((CHART / "values.yaml").read_text())
SCHEMA: dict[str, Any] = json.loads((CHART / "values.schema.json").read_text())
TEMPLATES = {path.name: path.read_text() for path in (CHART / "templates").iterdir()}
KUBERNETES = "1.31"

REPLICAS = {"replicas": 3, "store": {"existingSecret": "conserve-store"}}
EVERYTHING = {
    **REPLICAS,
    "imagePullSecrets": [{"name": "registry"}],
    "extraEnv": [{"name": "A", "value": "b"}],
    "nodeSelector": {"kubernetes.io/os": "linux"},
    "tolerations": [{"key": "broker", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "podAnnotations": {"a/b": "c"},
    "networkPolicy": {"enabled": True, "from": [{"podSelector": {"matchLabels": {"agent": "yes"}}}]},
    "serviceMonitor": {"enabled": True, "labels": {"team": "agents"}},
    "journal": {"storageClassName": "fast"},
}


def values(**changes: Any) -> dict[str, Any]:
    merged = copy.deepcopy(VALUES)
    for key, value in changes.items():
        merged[key] = {**merged[key], **value} if isinstance(value, dict) else value
    jsonschema.validate(merged, SCHEMA)
    return merged


def rendered(**changes: Any) -> dict[str, dict[str, Any]]:
    """The objects by kind."""
    files = Chart(TEMPLATES).render(values(**changes))
    documents = [yaml.safe_load(text) for name, text in files.items() if name != "NOTES.txt"]
    return {document["kind"]: document for document in documents if document is not None}


def container(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    (only,) = objects["StatefulSet"]["spec"]["template"]["spec"]["containers"]
    return dict(only)


def environment(objects: dict[str, dict[str, Any]]) -> dict[str, Any]:
    return {entry["name"]: entry.get("value", entry.get("valueFrom")) for entry in container(objects)["env"]}


@pytest.mark.parametrize("changes", [{}, REPLICAS, EVERYTHING])
def test_kubernetes_takes_what_it_renders(changes: dict[str, Any]) -> None:
    for kind, document in rendered(**changes).items():
        if kind != "ServiceMonitor":  # the Prometheus operator's own
            kubernetes_validate.validate(document, KUBERNETES, strict=True)
        assert document["metadata"]["name"] == "demo-conserve"


def test_the_checker_sees_mistakes() -> None:
    broken = rendered()["StatefulSet"]
    broken["spec"]["replica"] = 1
    with pytest.raises(Exception, match="replica"):
        kubernetes_validate.validate(broken, KUBERNETES, strict=True)


def test_one_broker_keeps_its_journal_on_a_volume() -> None:
    objects = rendered()
    assert objects.keys() == {"ConfigMap", "Service", "StatefulSet"}, "one broker that must go cannot be budgeted for"
    (claim,) = objects["StatefulSet"]["spec"]["volumeClaimTemplates"]
    assert claim["metadata"]["name"] in {mount["name"] for mount in container(objects)["volumeMounts"]}
    assert "CONSERVE_BROKER__STORE__URL" not in environment(objects)


def test_replicas_share_a_store_and_have_names_of_their_own() -> None:
    objects = rendered(**REPLICAS)
    assert objects.keys() == {"ConfigMap", "Service", "StatefulSet", "PodDisruptionBudget"}
    assert "volumeClaimTemplates" not in objects["StatefulSet"]["spec"]
    env = environment(objects)
    assert env["CONSERVE_BROKER__STORE__URL"] == {"secretKeyRef": {"name": "conserve-store", "key": "url"}}
    own = "http://$(POD_NAME).demo-conserve.agents.svc:7070"
    assert (env["CONSERVE_BROKER__STORE__ADVERTISE_URL"], env["CONSERVE_BROKER__JOURNAL__PATH"]) == (own, "")
    names = list(env)
    assert names.index("POD_NAME") < names.index("CONSERVE_BROKER__STORE__ADVERTISE_URL"), "only earlier names expand"
    assert (
        "CONSERVE_BROKER_URL="
        + ",".join(f"http://demo-conserve-{number}.demo-conserve.agents.svc:7070" for number in range(3))
        in Chart(TEMPLATES).render(values(**REPLICAS))["NOTES.txt"]
    )


@pytest.mark.parametrize("changes", [{}, REPLICAS, EVERYTHING])
def test_the_broker_takes_the_configuration(
    changes: dict[str, Any], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    objects = rendered(**changes)
    for name, value in environment(objects).items():
        if name.startswith("CONSERVE_BROKER__"):
            given = "redis://store:6379/0" if isinstance(value, dict) else value.replace("$(POD_NAME)", "pod-0")
            monkeypatch.setenv(name, given)
    monkeypatch.setenv("CONSERVE_TOKEN_KEY", "x" * 32)
    path = tmp_path / "broker.toml"
    path.write_text(objects["ConfigMap"]["data"]["broker.toml"])
    config = load_config(path)
    assert config.store.kind == ("redis" if changes else "sqlite")
    assert config.token.keys[0].kid == "1"
    assert config.discovery.dns[0].name == "vllm.default.svc.cluster.local"


def test_everything_selects_the_same_pods() -> None:
    objects = rendered(**EVERYTHING)
    labels = objects["StatefulSet"]["spec"]["template"]["metadata"]["labels"]
    selectors = [
        objects["StatefulSet"]["spec"]["selector"]["matchLabels"],
        objects["Service"]["spec"]["selector"],
        objects["PodDisruptionBudget"]["spec"]["selector"]["matchLabels"],
        objects["NetworkPolicy"]["spec"]["podSelector"]["matchLabels"],
        objects["ServiceMonitor"]["spec"]["selector"]["matchLabels"],
    ]
    assert all(selector.items() <= labels.items() for selector in selectors)
    assert objects["StatefulSet"]["spec"]["serviceName"] == objects["Service"]["metadata"]["name"]
    ports = {port["name"] for port in container(objects)["ports"]}
    assert objects["ServiceMonitor"]["spec"]["endpoints"][0]["port"] in ports
    assert objects["NetworkPolicy"]["spec"]["ingress"][0]["from"] == EVERYTHING["networkPolicy"]["from"]


def test_the_container_may_do_little() -> None:
    objects = rendered(**REPLICAS)
    pod = objects["StatefulSet"]["spec"]["template"]["spec"]
    assert (pod["automountServiceAccountToken"], pod["securityContext"]["runAsNonRoot"]) == (False, True)
    assert container(objects)["securityContext"] == {
        "allowPrivilegeEscalation": False,
        "readOnlyRootFilesystem": True,
        "capabilities": {"drop": ["ALL"]},
    }


def test_a_change_of_the_configuration_rolls_the_brokers() -> None:
    def annotation(**changes: Any) -> str:
        return str(rendered(**changes)["StatefulSet"]["spec"]["template"]["metadata"]["annotations"]["conserve/config"])

    assert annotation() == annotation() != annotation(config="[scrape]\n")
    assert re.fullmatch("[0-9a-f]{64}", annotation())


WRONG: list[dict[str, Any]] = [
    {"replicas": 0},
    {"replicas": 2},  # without a store
    {"replicaCount": 1},
    {"token": {"existingSecret": ""}},
    {"image": {"digest": "x"}},
]


@pytest.mark.parametrize("changes", WRONG)
def test_wrong_values_are_refused(changes: dict[str, Any]) -> None:
    merged = copy.deepcopy(VALUES)
    for key, value in changes.items():
        merged[key] = {**merged.get(key, {}), **value} if isinstance(value, dict) else value
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate(merged, SCHEMA)


def test_every_value_is_used_and_in_the_schema() -> None:
    text = "".join(TEMPLATES.values())
    for key, value in VALUES.items():
        assert key in SCHEMA["properties"]
        assert f".Values.{key}" in text, f"{key} is used nowhere"
        if isinstance(value, dict) and key not in ("resources", "nodeSelector", "affinity", "podAnnotations"):
            assert all(f".Values.{key}.{name}" in text for name in value), key
