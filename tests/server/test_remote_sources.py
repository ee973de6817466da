from __future__ import annotations

import pytest

from server.remote_sources import check_allowed
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
