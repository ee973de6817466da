from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from server.app import open_store, serve
from server.progress import Reporter
from server.remote_sources import check_allowed, check_places
from server.settings import Settings
from steering_store.errors import StoreError

ALLOWED = ["s3://team/prod", "hf://our-org", "https://files.example.com/"]


@pytest.mark.parametrize(
    "url",
    [
        None,
        "s3://team/prod",
        "s3://team/prod/",
        "S3://team/prod/a/b",
        "hf://our-org/repo@main/x",
        "hf://our-org",
        "https://files.example.com/any/thing",
        "https://FILES.example.com",
    ],
)
def test_allowed_places_and_all_below_them_pass(url: str | None) -> None:
    check_allowed(url, ALLOWED)


@pytest.mark.parametrize(
    "url",
    [
        "s3://team/production",
        "s3://team",
        "s3://teams/prod",
        "s3://team/prod/../secret",
        "s3://team/prod/%2e%2e/secret",
        "hf://our-organisation/repo",
        "hf://other/repo",
        "http://files.example.com/x",
        "https://files.example.com.evil.org/x",
        "https://files.example.com@evil.org/x",
        "https://user@files.example.com/x",
        "https://files.example.com:8443/x",
        "https://evil.org/https://files.example.com/",
        "http://169.254.169.254/latest",
        "simplecache::https://files.example.com/x",
        "file:///etc",
        "/etc",
        "",
    ],
)
def test_other_places_are_refused(url: str) -> None:
    with pytest.raises(StoreError, match="POLYHELM_ALLOWED_REMOTES"):
        check_allowed(url, ALLOWED)


def test_setting_is_a_list_and_an_empty_one_allows_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    assert Settings().allowed_remotes is None
    monkeypatch.setenv("POLYHELM_ALLOWED_REMOTES", ",".join(ALLOWED))
    assert Settings().allowed_remotes == ALLOWED
    monkeypatch.setenv("POLYHELM_ALLOWED_REMOTES", "")
    with pytest.raises(StoreError, match="none"):
        check_allowed("s3://team/prod", Settings().allowed_remotes)


NAMED: list[dict[str, Any]] = [
    {"store": "s3://team/prod"},
    {"model": "our-org/model"},
    {"expert_models": ["smollm2", "our-org/expert"]},
    {"kb_encoder": "st:our-org/encoder"},
    {"kb_encoder": "tei:https://encoder.example.com/embed"},
    {"kb_encoder": "openai:https://encoder.example.com/v1#small"},
    {"kb_url": "postgresql://user:pass@db.example.com:5432/facts?sslmode=require"},
    {"kb_url": "qdrant+https://qdrant.example.com"},
]


@pytest.mark.parametrize("named", NAMED, ids=str)
def test_every_place_that_the_settings_name_must_be_allowed(named: dict[str, Any], tmp_path: Path) -> None:
    allowed = ["s3://team", "hf://our-org", "https://encoder.example.com", "postgresql://db.example.com:5432"]
    check_places(Settings(**named, allowed_remotes=[*allowed, "qdrant+https://qdrant.example.com"]))
    check_places(Settings(**named))
    settings = Settings(**named, data_dir=tmp_path, allowed_remotes=["hf://others", "https://example.com"])
    for start in (lambda: serve(settings, [], Reporter()), lambda: open_store(settings)):
        with pytest.raises(StoreError, match="POLYHELM_ALLOWED_REMOTES"):
            start()


def test_what_is_on_this_machine_needs_no_permission(tmp_path: Path) -> None:
    (tmp_path / "model").mkdir()
    for model in ("smollm2", str(tmp_path / "model")):
        settings = Settings(model=model, expert_models=[model], kb_url=str(tmp_path / "kb"), allowed_remotes=[])
        check_places(settings)
    check_places(Settings(kb_url=f"qdrant+file:{tmp_path}", kb_encoder=f"st:{tmp_path}", allowed_remotes=[]))
