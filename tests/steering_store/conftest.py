from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import save

from steering_store import Store
from tests.steering_store.places import s3, s3_endpoint, url

__all__ = ["s3", "s3_endpoint", "url"]

HIDDEN = 8


@pytest.fixture
def store(tmp_path: Path) -> Store:
    return Store(tmp_path / "artifacts")


@pytest.fixture
def manifest() -> dict[str, Any]:
    """A whole manifest of one F32 vector at layer 2, as a client writes it."""
    return {
        "schema_version": 1,
        "kind": "steering_vector",
        "description": "happier",
        "model": {"architecture": "LlamaForCausalLM", "hidden_size": HIDDEN, "num_layers": 4},
        "sites": [
            {
                "point": "resid_post",
                "layer": 2,
                "file": "vectors.safetensors",
                "tensor": "layer.2",
                "shape": [HIDDEN],
                "dtype": "F32",
            }
        ],
        "default_strength": 4.0,
        "h_norm": {"2": 55.0},
        "provenance": {"method": "caa", "seed": 7, "created_at": "2025-01-01T00:00:00Z"},
    }


@pytest.fixture
def vectors() -> Callable[..., dict[str, bytes]]:
    """Files for that manifest; `fill` makes their bytes differ."""

    def make(fill: float = 1.0) -> dict[str, bytes]:
        return {"vectors.safetensors": save({"layer.2": np.full(HIDDEN, fill, np.float32)})}

    return make
