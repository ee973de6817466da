from __future__ import annotations

from pathlib import Path

import pytest


@pytest.fixture(scope="session")
def smollm2(models: Path) -> Path:
    """The folder of the converted demo model."""
    return models / "smollm2"
