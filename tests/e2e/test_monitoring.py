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
OUTCOMES = {"polyhelm_rejected", "polyhelm_fits", "polyhelm_kb_lookups"}
"""Have labels, and no samples before something happened."""


def expressions() -> Iterator[str]:
    for panel in DASHBOARD["panels"]:
        yield from (target["expr"] for target in panel.get("targets", []))
    yield from (variable["definition"] for variable in DASHBOARD["templating"]["list"] if variable["type"] == "query")
    yield from (rule["expr"] for rule in ALERTS)


def metrics(expression: str) -> set[str]:
    """The names of metrics in an expression of PromQL."""
    bare = re.sub(r"\{[^}]*\}|\[[^]]*\]|\b(?:by|label_values) \([^)]*\)|\"[^\"]*\"", "", expression)
    words = set(re.findall(r"[a-z][a-z0-9_:]*(?![a-z0-9_:]*\()", re.sub(r"label_values\((.*?),.*", r"\1", bare)))
    return {word for word in words if word == "up" or "_" in word}


def labels(expression: str) -> set[str]:
    """The labels that it selects and groups by."""
    braces, groups = re.findall(r"\{([^}]*)\}", expression), re.findall(r"\bby \(([^)]*)\)", expression)
    selected = {name for each in braces for name in re.findall(r"(\w+)\s*=", each)}
    return selected | {name.strip() for each in groups for name in each.split(",")}


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
    asked = list(expressions())
    assert {name for each in asked for name in metrics(each)} - samples.keys() == OF_PROMETHEUS
    for each in asked:
        given = set().union(*(samples.get(name, set()) for name in metrics(each)))
        if not any(name.removesuffix("_total") in OUTCOMES for name in metrics(each)):
            assert labels(each) - given <= LABELS_OF_PROMETHEUS, each


def test_panels_do_not_overlap_and_have_queries() -> None:
    taken: dict[tuple[int, int], Any] = {}
    for panel in DASHBOARD["panels"]:
        place = panel["gridPos"]
        for cell in (
            (x, y)
            for x in range(place["x"], place["x"] + place["w"])
            for y in range(place["y"], place["y"] + place["h"])
        ):
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
