from __future__ import annotations

import json
import sqlite3
from pathlib import Path

import pytest

from steering_store import Store
from tests.server.cli.artifact_cli import FILE, MANIFEST, assert_fails, run, run_json, vector

pytestmark = pytest.mark.usefixtures("data_dir")


@pytest.fixture
def inputs(tmp_path: Path) -> list[str]:
    """The arguments of `publish` behind the name."""
    (tmp_path / "m.json").write_text(json.dumps(MANIFEST))
    (tmp_path / FILE).write_bytes(vector())
    return ["--manifest", str(tmp_path / "m.json"), str(tmp_path / FILE)]


def test_published_artifact_is_listed_shown_and_verified(inputs: list[str], data_dir: Path) -> None:
    published = run_json("publish", "mood", *inputs)
    assert (published["ref"], published["created"]) == ("mood@1", True)
    assert not run_json("publish", "mood", *inputs)["created"]
    assert [row["ref"] for row in run_json("list")] == ["mood@1"]
    shown = run_json("show", "mood@1")
    assert shown["digest"] == published["digest"] == Store(data_dir / "artifacts").resolve("mood").digest
    assert shown["manifest"]["sites"][0]["layer"] == 2
    assert run_json("verify") == run_json("verify", "mood") == {"ok": True, "problems": []}


def test_output_without_json_is_for_people(inputs: list[str]) -> None:
    assert "mood@1" in run("publish", "mood", *inputs).stdout
    assert "published before" in run("publish", "mood", *inputs).stdout
    assert run("list").stdout.startswith("mood@1\tsteering_vector\t2\tLlamaForCausalLM\tsha256:")
    assert "description\t[bold]not markup[/bold]" in run("show", "mood").stdout
    assert "nothing is damaged" in run("verify").stdout


def test_terminal_gets_a_table(inputs: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("FORCE_COLOR", "1")
    run("publish", "mood", *inputs)
    assert "┃" in run("list").stdout
    assert "[bold]not markup[/bold]" in run("show", "mood").stdout


def test_list_goes_through_every_page_and_filters_by_kind(inputs: list[str], data_dir: Path) -> None:
    run("publish", "a000", *inputs)
    store = Store(data_dir / "artifacts")
    manifest, content = store.resolve("a000").manifest, (Path(inputs[-1])).read_bytes()
    for number in range(1, 102):
        store.publish(f"a{number:03}", manifest, {FILE: content})
    assert [row["name"] for row in run_json("list")] == [f"a{number:03}" for number in range(102)]
    assert run_json("list", "--kind", "other") == run_json("list", "--model", "other") == []
    assert [row["name"] for row in run_json("list", "--prefix", "a09", "--model", "LlamaForCausalLM")] == [
        f"a{number:03}" for number in range(90, 100)
    ]


def test_damaged_file_fails_verify_and_is_named(inputs: list[str], data_dir: Path) -> None:
    run("publish", "mood", *inputs)
    store = Store(data_dir / "artifacts")
    store.file_path(store.resolve("mood"), FILE).write_bytes(b"x")
    assert_fails(run("verify"), 1, FILE)
    result = run("verify", "mood@1", "--json")
    assert result.exit_code == 1
    assert json.loads(result.stdout)["problems"][0]["file"] == FILE


@pytest.mark.parametrize("arguments", [("list",), ("show", "mood"), ("verify",)])
def test_data_directory_without_artifacts_is_an_error_and_stays_as_it_was(
    arguments: tuple[str, ...], data_dir: Path
) -> None:
    assert_fails(run(*arguments), 1, "--data-dir")
    assert not data_dir.exists()


def test_store_errors_are_messages_with_exit_code_1(inputs: list[str], tmp_path: Path) -> None:
    assert_fails(run("publish", "../mood", *inputs), 1, "name '../mood'")
    run("publish", "mood", *inputs)
    assert_fails(run("show", "mood@7"), 1, "mood@7")
    assert_fails(run("show", "mood@"), 1, "reference")
    (tmp_path / "v.pt").write_bytes(b"")
    assert_fails(run("publish", "mood", *inputs[:2], str(tmp_path / "v.pt")), 1, "pickle")


def test_wrong_usage_is_exit_code_2(inputs: list[str], tmp_path: Path) -> None:
    assert_fails(run("show"), 2, "ref")
    assert_fails(run("publish", "mood", inputs[-1]), 2, "--manifest")
    assert_fails(run("publish", "mood", *inputs[:2], str(tmp_path / "missing.safetensors")), 2, "does not exist")
    assert_fails(run("publish", "mood", *inputs, inputs[-1]), 2, "same name")
    assert_fails(run("list", "--what"), 2, "--what")


def test_data_dir_flag_wins_over_the_environment(inputs: list[str], tmp_path: Path) -> None:
    run_json("publish", "mood", *inputs, "--data-dir", str(tmp_path / "elsewhere"))
    assert (tmp_path / "elsewhere" / "artifacts" / "store.sqlite").is_file()


def test_preset_is_published_without_files(inputs: list[str], tmp_path: Path) -> None:
    run("publish", "mood", *inputs)
    preset = {key: MANIFEST[key] for key in ("schema_version", "model", "default_strength", "provenance")}
    preset |= {"kind": "preset", "interventions": [{"artifact": "mood"}]}
    (tmp_path / "preset.json").write_text(json.dumps(preset))
    assert run_json("publish", "cheer", "--manifest", str(tmp_path / "preset.json"))["ref"] == "cheer@1"
    assert run("list").stdout.startswith("cheer@1\tpreset\t")


def test_damaged_version_is_named_beside_the_list(inputs: list[str], data_dir: Path) -> None:
    for name in ("mood", "other"):
        run("publish", name, *inputs)
    with sqlite3.connect(data_dir / "artifacts" / "store.sqlite") as db:
        db.execute("UPDATE versions SET manifest = '{}' WHERE name = 'mood'")
    listed = run("list", "--json")
    assert [row["ref"] for row in json.loads(listed.stdout)] == ["other@1"]
    assert "damaged: the manifest of mood@1" in listed.stderr


def test_schema_is_that_of_the_documentation() -> None:
    published = Path(__file__).parents[3] / "docs" / "manifest.schema.json"
    assert json.loads(run("schema").stdout) == json.loads(published.read_text("utf-8"))
