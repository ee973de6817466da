"""Whether a series grows: the slope of a straight line through it, and an interval that its own memory doesn't fool.

A server's memory moves in steps and keeps its level for minutes, so that seconds are no independent samples, and the
standard error of an ordinary fit is far too small. So the time is cut into `BLOCKS` equal blocks, the line is fitted
through their means, and the interval is Student's for what is left over between them (batch means, as for simulations:
Law and Carson, 1979).
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from scipy import stats

BLOCKS = 8
CONFIDENCE = 0.95


class Slope(NamedTuple):
    """In MiB and hours. The true slope lies between `lowest` and `highest` with a probability of 95%."""

    mib_per_hour: float
    lowest: float
    highest: float
    mib: float
    """The mean."""
    block_means: list[float]


def slope(samples: np.ndarray) -> Slope:
    """Of rows [seconds, bytes], evenly in time. Raises ValueError for fewer than two a block."""
    if len(samples) < 2 * BLOCKS:
        raise ValueError(f"{len(samples)} samples are too few for a slope")
    means = np.array([block.mean(axis=0) for block in np.array_split(samples, BLOCKS)])
    hours, mib = means[:, 0] / 3600, means[:, 1] / 2**20
    fit = stats.linregress(hours, mib)
    reach = stats.t.ppf((1 + CONFIDENCE) / 2, BLOCKS - 2) * fit.stderr
    found = [float(each) for each in (fit.slope, fit.slope - reach, fit.slope + reach, mib.mean())]
    return Slope(*(round(each, 2) for each in found), [round(float(each), 1) for each in mib])
