"""The verdict on the memory of a soak: neither noise that keeps its level nor a slow leak is mistaken for the other."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from scipy import stats

MIB = 1 << 20
SECONDS = 2400


@pytest.fixture(scope="module")
def slope() -> Callable[[np.ndarray], Any]:
    file = Path(__file__).parents[2] / "benchmarks" / "growth.py"
    specification = importlib.util.spec_from_file_location("growth", file)
    assert specification is not None and specification.loader is not None
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    found: Callable[[np.ndarray], Any] = module.slope
    return found


def wandering(seed: int, mib_per_hour: float = 0) -> np.ndarray:
    """A gibibyte, once a second, that deviates by 5 MiB for about 50 seconds at a time."""
    random, level = np.random.default_rng(seed), 0.0
    deviations = []
    for step in random.standard_normal(SECONDS):
        level = 0.98 * level + step
        deviations.append(level)
    seconds = np.arange(SECONDS)
    return np.column_stack([seconds, (1024 + np.array(deviations) + mib_per_hour * seconds / 3600) * MIB])


def test_noise_with_a_memory_is_taken_for_growth_as_seldom_as_stated(slope: Callable[[np.ndarray], Any]) -> None:
    series = [wandering(seed) for seed in range(200)]
    mistaken = sum(not each.lowest <= 0 <= each.highest for each in map(slope, series))
    assert mistaken <= 24  # 5% of 200, and what is left of the memory between blocks
    fits = [stats.linregress(each[:, 0], each[:, 1]) for each in series]
    naive = sum(abs(fit.slope) > 1.96 * fit.stderr for fit in fits)
    assert naive > 100, "an ordinary fit would be fooled"


def test_slow_leak_is_found_and_measured(slope: Callable[[np.ndarray], Any]) -> None:
    found = [slope(wandering(seed, mib_per_hour=60)) for seed in range(50)]
    assert sum(each.lowest > 0 for each in found) >= 45
    assert np.mean([each.mib_per_hour for each in found]) == pytest.approx(60, abs=5)


def test_too_short_a_series_has_no_slope(slope: Callable[[np.ndarray], Any]) -> None:
    with pytest.raises(ValueError, match="too few"):
        slope(wandering(0)[:15])
