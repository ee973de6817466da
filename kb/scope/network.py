"""A network with one hidden layer beside a linear one, small enough for numpy."""

from __future__ import annotations

from typing import Final, NamedTuple

import numpy as np

LIMIT: Final = 6.0
"""Standard deviations: what is further out than anything that was learned from says no more than this."""


class Network(NamedTuple):
    """`mean`, `scale`, `linear` float32 [features]; `hidden` [features, units]; `offsets`, `out` [units]."""

    mean: np.ndarray
    scale: np.ndarray
    linear: np.ndarray
    hidden: np.ndarray
    offsets: np.ndarray
    out: np.ndarray

    def __call__(self, rows: np.ndarray) -> np.ndarray:
        """[rows, features] to log-odds [rows], up to a constant."""
        x = np.clip((rows - self.mean) / self.scale, -LIMIT, LIMIT)
        return np.asarray(x @ self.linear + np.tanh(x @ self.hidden + self.offsets) @ self.out)

    def fits(self, features: int) -> bool:
        """Whether the shapes belong together and to this many features."""
        units = len(self.out)
        shapes = ((features,), (features,), (features,), (features, units), (units,), (units,))
        return tuple(each.shape for each in self) == shapes
