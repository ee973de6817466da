"""How a measurement is published: repeated ones with quartiles, differences with bootstrap intervals."""

from __future__ import annotations

import statistics
from collections.abc import Sequence

import numpy as np

RESAMPLES = 10_000


def spread(values: list[float]) -> dict[str, float]:
    first, median, third = statistics.quantiles(values, n=4) if len(values) > 1 else (values * 3)
    return {"median": median, "quartile_1": first, "quartile_3": third, "runs": len(values)}


def paired(first: Sequence[float], second: Sequence[float]) -> dict[str, float]:
    """The mean difference of two scores of the same items, with its 95% bootstrap interval over items."""
    differences = np.asarray(first, float) - np.asarray(second, float)
    draws = np.random.default_rng(0).integers(0, len(differences), (RESAMPLES, len(differences)))
    low, high = np.quantile(differences[draws].mean(1), [0.025, 0.975])
    return {"difference": float(differences.mean()), "low": float(low), "high": float(high)}


def verdict(against: dict[str, dict[str, float]]) -> str:
    """Which of the arms something is better and worse than beyond the interval of `paired`."""
    better = [arm for arm, minus in against.items() if minus["low"] > 0]
    worse = [arm for arm, minus in against.items() if minus["high"] < 0]
    return f"better than {', '.join(better) or 'none of them'} and worse than {', '.join(worse) or 'none of them'}"
