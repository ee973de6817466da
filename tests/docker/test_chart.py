"""The Helm chart, rendered by Helm's own library and checked against Kubernetes' schemas."""

from __future__ import annotations

import json
import subprocess
import sys
from functools import cache
from pathlib import Path
from typing import Any

import jsonschema
import kubernetes_validate
import pytest
import yaml

CHART = Path(__file__).parents[2] / "docker" / "helm" / "polyhelm"
SCHEMA = json.loads((CHART / "values.schema.json").read_text("utf-8"))
VALUES = yaml.safe_load((CHART / "values.yaml").read_text("utf-8"))
KUBERNETES = ("1.27", kubernetes_validate.latest_version())
OPERATOR = {"ServiceMonitor", "PrometheusRule"}
"""Of the Prometheus operator: Kubernetes has no schema for them."""
# In a process of its own: the library brings Go's runtime along.
HELM = """
import json, sys
from helm_python.chart import Chart, lint
path, values = sys.argv[1], json.loads(sys.argv[2])
try:
    found = lint(path, values, strict=True)
    with Chart.load(path) as chart:
        files = chart.render(values, name="demo", namespace="models")
    print(json.dumps({"lint": found, "files": files}))
except Exception as error:
    print(json.dumps({"refused": str(error)}))
"""
ALL: dict[str, Any] = {
    "replicas": 3,
    "gpus": 2,
    "demo": True,
    "args": ["--max-model-len", "8192"],
    "env": [{"name": "POLYHELM_MAX_RELATIVE_DOSE", "value": "1"}],
    "envFromSecrets": ["bucket"],
    "adminKey": {"secret": "admin"},
    "store": {"url": "s3://bucket/prefix"},
    "imagePullSecrets": [{"name": "registry"}],
    "nodeSelector": {"gpu": "h200"},
    "tolerations": [{"key": "nvidia.com/gpu", "operator": "Exists"}],
    "affinity": {"nodeAffinity": {}},
    "topologySpreadConstraints": [
        {"maxSkew": 1, "topologyKey": "kubernetes.io/hostname", "whenUnsatisfiable": "ScheduleAnyway"}
    ],
    "data": {"size": "10Gi", "storageClass": "fast"},
    "podAnnotations": {"a": "b"},
    "podLabels": {"team": "x"},
    "ingress": {"enabled": True, "host": "models.example.org", "tlsSecret": "tls", "className": "nginx"},
    "autoscaling": {"enabled": True},
    "monitoring": {"serviceMonitor": True, "alerts": True, "dashboard": True, "labels": {"release": "prometheus"}},
}


@cache
def helm(values: str) -> dict[str, Any]:
    done = subprocess.run([sys.executable, "-c", HELM, str(CHART), values], capture_output=True, text=True, check=True)
    answer: dict[str, Any] = json.loads(done.stdout)
    return answer


def rendered(values: dict[str, Any]) -> list[dict[str, Any]]:
    """The objects that the chart makes of these values."""
    answer = helm(json.dumps(values))
    assert "refused" not in answer, answer
    texts = [text for path, text in answer["files"].items() if path.endswith(".yaml")]
    return [each for text in texts for each in yaml.safe_load_all(text) if each]


def one(values: dict[str, Any], kind: str) -> dict[str, Any]:
    (found,) = [each for each in rendered(values) if each["kind"] == kind]
    return found


def container(values: dict[str, Any]) -> dict[str, Any]:
    (only,) = one(values, "StatefulSet")["spec"]["template"]["spec"]["containers"]
    return dict(only)


@pytest.mark.parametrize("values", [{}, ALL], ids=["defaults", "everything"])
def test_helm_lint_finds_nothing(values: dict[str, Any]) -> None:
    found = helm(json.dumps(values))["lint"]
    assert found["errors"] == []
    # 1 is advice; Helm's only one is an icon.
    assert [each for each in found["messages"] if each["severity"] > 1] == []


@pytest.mark.parametrize("version", KUBERNETES)
@pytest.mark.parametrize("values", [{}, ALL], ids=["defaults", "everything"])
def test_every_object_is_valid(values: dict[str, Any], version: str) -> None:
    objects = rendered(values)
    for each in objects:
        if each["kind"] not in OPERATOR:
            kubernetes_validate.validate(each, version, strict=True)
    names = [(each["kind"], each["metadata"]["name"]) for each in objects]
    assert len(set(names)) == len(names)


def test_everything_makes_every_kind() -> None:
    kinds = {each["kind"] for each in rendered(ALL)} - {each["kind"] for each in rendered({})}
    assert kinds == {"HorizontalPodAutoscaler", "Ingress", "ServiceMonitor", "PrometheusRule", "ConfigMap"}


def test_values_yaml_names_every_value_and_passes_the_schema() -> None:
    jsonschema.Draft7Validator.check_schema(SCHEMA)
    jsonschema.validate(VALUES, SCHEMA)
    assert SCHEMA["properties"].keys() - VALUES.keys() == {"global"}
    for name, each in SCHEMA["properties"].items():
        if "properties" in each and each["additionalProperties"] is False:
            assert each["properties"].keys() == VALUES[name].keys(), name


@pytest.mark.parametrize(
    ("values", "word"),
    [
        ({"replica": 2}, "replica"),
        ({"replicas": "two"}, "replicas"),
        ({"image": {"tag": ""}}, "tag"),
        ({"store": {"url": "bucket"}}, "url"),
        ({"data": {"size": "20 GB"}}, "size"),
        ({"ingress": {"enabled": True}}, "host"),
        ({"service": {"port": 0}}, "port"),
        ({"env": [{"name": "A-B", "value": "c"}]}, "name"),
        ({"replicas": 2}, "store.url"),
        ({"autoscaling": {"enabled": True}}, "store.url"),
    ],
)
def test_wrong_values_are_refused_by_name(values: dict[str, Any], word: str) -> None:
    assert word in helm(json.dumps(values)).get("refused", "")


@pytest.mark.parametrize("values", [{}, ALL], ids=["defaults", "everything"])
def test_pods_meet_the_restricted_standard(values: dict[str, Any]) -> None:
    """Of Kubernetes' Pod Security Standards; and a read-only root, with what is written in volumes."""
    pods = [one(values, "StatefulSet")["spec"]["template"]["spec"], one(values, "Pod")["spec"]]
    for pod in pods:
        assert pod["securityContext"]["runAsNonRoot"] is True
        assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        assert pod["automountServiceAccountToken"] is False
        # A service called polyhelm would set POLYHELM_PORT to an address.
        assert pod["enableServiceLinks"] is False
        for each in pod["containers"]:
            assert each["securityContext"] == {
                "allowPrivilegeEscalation": False,
                "readOnlyRootFilesystem": True,
                "capabilities": {"drop": ["ALL"]},
            }
    stateful = one(values, "StatefulSet")["spec"]
    volumes = {each["name"] for each in pods[0]["volumes"]}
    volumes |= {each["metadata"]["name"] for each in stateful["volumeClaimTemplates"]}
    mounts = {each["name"]: each["mountPath"] for each in pods[0]["containers"][0]["volumeMounts"]}
    assert mounts.keys() == volumes
    assert {"/data", "/cache", "/tmp"} <= set(mounts.values())


def test_a_pod_may_take_as_long_to_end_as_its_answers() -> None:
    shutdown = {"delaySeconds": 20, "drainSeconds": 300}
    pod = one({"shutdown": shutdown}, "StatefulSet")["spec"]["template"]["spec"]
    (server,) = pod["containers"]
    assert server["lifecycle"]["preStop"]["exec"]["command"] == ["sleep", "20"]
    assert server["args"][server["args"].index("--shutdown-timeout") + 1] == "300"
    assert pod["terminationGracePeriodSeconds"] > 320


def test_probes_ask_the_right_paths_at_the_served_port() -> None:
    server = container({"probes": {"startupSeconds": 95}})
    paths = {name: server[name]["httpGet"]["path"] for name in ("startupProbe", "livenessProbe", "readinessProbe")}
    assert paths == {"startupProbe": "/livez", "livenessProbe": "/livez", "readinessProbe": "/readyz"}
    assert server["startupProbe"]["periodSeconds"] * server["startupProbe"]["failureThreshold"] >= 95
    assert server["ports"] == [{"name": "http", "containerPort": 8000}]


def test_gpus_are_asked_for_and_the_model_is_split_over_them() -> None:
    server = container(ALL)
    assert server["resources"]["limits"]["nvidia.com/gpu"] == 2
    assert server["resources"]["limits"]["memory"] == VALUES["resources"]["limits"]["memory"]
    assert server["args"][server["args"].index("--tensor-parallel-size") + 1] == "2"
    assert "--tensor-parallel-size" not in container({"gpus": 1})["args"]


def test_the_admin_key_comes_from_the_secret_only() -> None:
    variables = {each["name"]: each for each in container(ALL)["env"]}
    reference = variables["POLYHELM_ADMIN_API_KEY"]["valueFrom"]["secretKeyRef"]
    assert reference == {"name": "admin", "key": "admin-api-key"}
    assert "POLYHELM_ADMIN_API_KEY" not in {each["name"] for each in container({})["env"]}


def test_selectors_find_the_pods_and_each_replica_is_scraped_once() -> None:
    labels = one(ALL, "StatefulSet")["spec"]["template"]["metadata"]["labels"]
    for kind in ("PodDisruptionBudget", "StatefulSet"):
        assert one(ALL, kind)["spec"]["selector"]["matchLabels"].items() <= labels.items()
    services = [each for each in rendered(ALL) if each["kind"] == "Service"]
    assert all(each["spec"]["selector"].items() <= labels.items() for each in services)
    # The pod of `helm test` serves nothing.
    assert not services[0]["spec"]["selector"].items() <= one(ALL, "Pod")["metadata"]["labels"].items()
    (endpoint,) = one(ALL, "ServiceMonitor")["spec"]["endpoints"]
    ports = [port["name"] for each in services for port in each["spec"]["ports"]]
    assert ports.count(endpoint["port"]) == 1
    scaled = one(ALL, "HorizontalPodAutoscaler")["spec"]["scaleTargetRef"]
    assert scaled == {
        "apiVersion": "apps/v1",
        "kind": "StatefulSet",
        "name": one(ALL, "StatefulSet")["metadata"]["name"],
    }
    assert "replicas" not in one(ALL, "StatefulSet")["spec"]


def test_alerts_and_dashboard_arrive_whole() -> None:
    alerts = yaml.safe_load((CHART / "monitoring" / "alerts.yaml").read_text("utf-8"))
    assert one(ALL, "PrometheusRule")["spec"] == alerts
    dashboard = json.loads((CHART / "monitoring" / "dashboard.json").read_text("utf-8"))
    assert json.loads(one(ALL, "ConfigMap")["data"]["polyhelm.json"]) == dashboard
