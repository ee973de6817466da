"""What several folders of tests need."""

from __future__ import annotations

from pathlib import Path

import pytest

from server.models import resolve_model


@pytest.fixture(scope="session")
def models(pytestconfig: pytest.Config) -> Path:
    """A `models/` folder with the embedded model, converted once per checkout: `pytest --cache-clear` converts anew."""
    cache = pytestconfig.cache
    assert cache is not None, "run without -p no:cacheprovider: converting the model takes half a minute"
    data_dir = Path(cache.mkdir("polyhelm"))
    resolve_model("smollm2", data_dir, print)
    return data_dir / "models"
