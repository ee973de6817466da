"""The dashboard and the alerts ask for metrics that the real server has, with labels that it gives."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pytest
import yaml
from prometheus_client.parser import text_string_to_metric_families

if TYPE_CHECKING:
    from tests.e2e.conftest import Server

MONITORING = Path(__file__).parents[2] / "docker" / "helm" / "polyhelm" / "monitoring"
DASHBOARD = json.loads((MONITORING / "dashboard.json").read_text("utf-8"))
ALERTS = yaml.safe_load((MONITORING / "alerts.yaml").read_text("utf-8"))["groups"][0]["rules"]
OF_PROMETHEUS = {"up"}
LABELS_OF_PROMETHEUS = {"job", "instance"}
OUTCOMES = {"polyhelm_rejected", "polyhelm_fits"}
"""Have labels, and no samples before something happened."""


def expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    yield from (variable["definition"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query")
    yield from (rule["expr"] for rule in ALERTS)


def selectors(expression: str) -> Iterator[tuple[str, set[str]]]:
    """Names of metrics, each with the labels that its braces name."""
    for match in re.finditer(r"\b([a-z][a-z0-9_:]*)(?:\{([^}]*)\})?(?=[\[ ),]|$)", re.sub(r'"[^"]*"', '""', expression)):
        name, braces = match[1], match[2]
        if ":" in name or "_" in name and name not in {"histogram_quantile", "avg_over_time", "label_values"} or name == "up":
            yield name, set(re.findall(r"(\w+)\s*=", braces or ""))


@pytest.mark.engine
def test_every_metric_that_is_asked_for_is_served(server: Server) -> None:
    server.complete({"artifact": "one"})
    samples: dict[str, set[str]] = {}
    for family in text_string_to_metric_families(server.client.get("/metrics").text):
        names = {family.name, f"{family.name}_total"} if family.type == "counter" else {family.name}
        for name in names:
            samples.setdefault(name, set())
        for sample in family.samples:
            samples.setdefault(sample.name, set()).update(sample.labels)
    asked = [selector for expression in expressions() for selector in selectors(expression)]
    assert len(asked) > 40
    missing = {name for name, _ in asked if name not in samples} - OF_PROMETHEUS
    assert missing == set()
    unknown = {
        (name, label)
        for name, labels in asked
        for label in labels - samples.get(name, set()) - LABELS_OF_PROMETHEUS
        if name.removesuffix("_total") not in OUTCOMES
    }
    assert unknown == set()


def test_panels_do_not_overlap_and_have_queries() -> None:
    taken: dict[tuple[int, int], Any] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        for cell in ((x, y) for x in range(place["x"], place["x"] + place["w"]) for y in range(place["y"], place["y"] + place["h"])):
            assert cell[0] < 24 and cell not in taken, (panel["title"], taken.get(cell))
            taken[cell] = panel["title"]
        assert panel["type"] == "row" or panel["targets"]
    ids = [panel["id"] for panel in DASHBOARD["panels"]]
    assert len(ids) == len(set(ids))


def test_every_alert_says_what_happened_and_what_to_do() -> None:
    assert len({rule["alert"] for rule in ALERTS}) == len(ALERTS)
    for rule in ALERTS:
        assert rule["labels"]["severity"] in {"critical", "warning"}
        assert rule["annotations"].keys() == {"summary", "description"}
