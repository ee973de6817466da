from __future__ import annotations

from pathlib import Path

from steering_store import Store
from tests.server.api.test_saes import publish_labelled
from tests.server.cli.artifact_cli import assert_fails, publish_versions, run, run_json


def test_features_are_found_by_label(data_dir: Path) -> None:
    store = Store(data_dir / "artifacts")
    publish_labelled(store)
    found = run_json("features", "weather", "rain snow")
    assert [each["index"] for each in found["features"]] == [4] and not found["has_more"]
    page = run("features", "weather", "--limit", "2")
    assert page.stdout == "1\tabout rain\t2.5\ta rain b\n4\tabout snow and rain\t2.5\ta snow and rain b\n"
    assert "--after 4" in page.stderr
    assert run_json("features", "weather", "--after", "4")["features"][0]["index"] == 7
    publish_versions(store, 1)
    assert_fails(run("features", "mood"), 1, "has no labels")
    assert_fails(run("features", "none"), 1, "none")
