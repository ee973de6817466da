from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture
def data_dir(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """What the commands use without --data-dir."""
    monkeypatch.setenv("POLYHELM_DATA_DIR", str(tmp_path / "data"))
    monkeypatch.setenv("COLUMNS", "300")
    monkeypatch.delenv("POLYHELM_STORE", raising=False)
    return tmp_path / "data"
