from __future__ import annotations

from pathlib import Path

import pytest

from server import __version__
from server.version import code_version, commit_of

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.mark.parametrize("where", ["detached", "loose", "packed"])
def test_commit_is_read_from_a_repository(tmp_path: Path, where: str) -> None:
    (tmp_path / "HEAD").write_text(f"{COMMIT}\n" if where == "detached" else "ref: refs/heads/main\n")
    (tmp_path / "packed-refs").write_text(f"# pack-refs\n{'f' * 40} refs/heads/other\n{COMMIT} refs/heads/main\n")
    if where == "loose":
        (tmp_path / "refs" / "heads").mkdir(parents=True)
        (tmp_path / "refs" / "heads" / "main").write_text(f"{COMMIT}\n")
        (tmp_path / "packed-refs").unlink()
    assert commit_of(tmp_path) == COMMIT


def test_no_repository_is_no_commit(tmp_path: Path) -> None:
    assert commit_of(tmp_path / ".git") is None
    (tmp_path / "HEAD").write_text("ref: refs/heads/new\n")
    assert commit_of(tmp_path) is None


@pytest.mark.parametrize(("said", "expected"), [(COMMIT, f"{__version__}+{COMMIT}"), ("no commit", __version__)])
def test_image_says_its_commit(monkeypatch: pytest.MonkeyPatch, said: str, expected: str) -> None:
    monkeypatch.setenv("POLYHELM_COMMIT", said)
    assert code_version.__wrapped__() == expected
