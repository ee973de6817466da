"""Where vectors are compared across languages: each language's own centre taken away, then a learned projection."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import numpy as np

from kb.scope.base import Text


class Space(NamedTuple):
    """`centres` float32 [1 + languages, dimension] are means of vectors: of all, then of each of `languages`.
    `projection` float32 [dimension, smaller] keeps what tells facts apart.
    """

    languages: tuple[str, ...]
    centres: np.ndarray
    projection: np.ndarray

    def centred(self, texts: Sequence[Text]) -> np.ndarray:
        """float32 [texts, dimension]. A language that isn't known has the centre of all."""
        places = [self._place(each.language) for each in texts]
        return np.asarray(np.stack([each.vector for each in texts]) - self.centres[places], np.float32)

    def _place(self, language: str | None) -> int:
        return 1 + self.languages.index(language) if language in self.languages else 0
