"""The texts on which each feature of a sparse auto-encoder fires most: what a feature means is read off these.

Of every text only the token counts at which the feature is strongest, so that one text can't fill all places (Bills et
al. 2023, "Language models can explain neurons in language models", and Neuronpedia's top activations).
"""

from __future__ import annotations

import numpy as np
import numpy.typing as npt

from methods.sae import Array, Sae

Indices = npt.NDArray[np.int64]


class TopExamples:
    """The `count` strongest places of every feature, over texts that are added one by one.

    `activations` [features, count], falling, 0 where there are fewer; `texts` and `tokens` [features, count] say which
    text and which of its rows it was.
    """

    def __init__(self, sae: Sae, count: int) -> None:
        features = len(sae.encoder)
        self._sae, self._added = sae, 0
        self.activations: Array = np.zeros((features, count), np.float32)
        self.texts: Indices = np.zeros((features, count), np.int64)
        self.tokens: Indices = np.zeros((features, count), np.int64)

    def add(self, rows: Array) -> None:
        """The next text, as its rows [tokens, width]; one without rows counts, and fires nothing."""
        number, self._added = self._added, self._added + 1
        if not len(rows):
            return
        a = self._sae.encode(rows)
        tokens, most = a.argmax(axis=0), a.max(axis=0)
        stronger = np.flatnonzero(most > self.activations[:, -1])
        for values, new in (
            (self.activations, most),
            (self.texts, np.full_like(tokens, number)),
            (self.tokens, tokens),
        ):
            values[stronger, -1] = new[stronger]
        # Stable, so that of equals the earlier text stays first.
        order = np.argsort(-self.activations[stronger], axis=1, kind="stable")
        for values in (self.activations, self.texts, self.tokens):
            values[stronger] = np.take_along_axis(values[stronger], order, axis=1)

    def of(self, feature: int) -> list[tuple[int, int, float]]:
        """(text, token, activation), strongest first; none where it never fired."""
        each = zip(self.texts[feature], self.tokens[feature], self.activations[feature], strict=True)
        return [(int(text), int(token), float(activation)) for text, token, activation in each if activation > 0]
