"""What a question and each of its nearest facts have in common, as numbers for a classifier."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Final

import numpy as np

from kb.scope.base import Text
from kb.scope.space import Space
from kb.scope.words import NUMBERS, OVERLAP, Rarity, numbers, overlap, scripts, words_of

_VIEW: Final = ("cosine", "ahead", "crowded", "side")
VECTOR: Final = tuple(f"{view}_{name}" for view in ("whole", "centred", "projected") for name in _VIEW)
WORDS: Final = (
    *(f"fact_{name}" for name in OVERLAP),
    *(f"question_{name}" for name in OVERLAP),
    *NUMBERS,
    *("fuzzy_ahead", "consonants_ahead"),
)
SCRIPTS: Final = ("question_unspaced", "question_foreign", "fact_unspaced", "fact_foreign", "same_script")
NAMES: Final = (*VECTOR, *WORDS, *SCRIPTS)


def features(question: Text, candidates: Sequence[Text], rarity: Rarity, space: Space) -> np.ndarray:
    """float32 [candidates, len(NAMES)]."""
    whole = np.stack([question.vector, *(each.vector for each in candidates)])
    centred = space.centred([question, *candidates])
    views = [_view(rows[0], rows[1:]) for rows in (whole, _units(centred), _units(centred @ space.projection))]
    asked = words_of(question.text)
    rows, written = [], []
    for each in candidates:
        told = words_of(each.text)
        rows.append([*overlap(told, asked, rarity), *overlap(asked, told, rarity), *numbers(told, asked)])
        written.append([*scripts(asked), *scripts(told)])
    shared, kinds = np.array(rows), np.array(written)
    fuzzy, sound = shared[:, OVERLAP.index("fuzzy")], shared[:, OVERLAP.index("consonants")]
    ahead = np.stack([fuzzy - _best_other(fuzzy), sound - _best_other(sound)], axis=1)
    same = 1 - np.abs(kinds[:, :2] - kinds[:, 2:]).max(axis=1, keepdims=True)
    return np.asarray(np.concatenate([*views, shared, ahead, kinds, same], axis=1), np.float32)


def _view(question: np.ndarray, facts: np.ndarray) -> np.ndarray:
    """[facts, len(_VIEW)]: the cosine; how far it is ahead of the nearest other fact's; that one's cosine to this fact;
    and where the question lies between the two, 1 being this fact and 0 the other.
    """
    cosines = facts @ question
    if len(facts) == 1:
        return np.array([[cosines[0], cosines[0], 0.0, 1.0]])
    order = np.argsort(-cosines, kind="stable")
    other = np.full(len(facts), order[0])
    other[order[0]] = order[1]
    between = facts - facts[other]
    side = ((question - facts[other]) * between).sum(axis=1) / ((between**2).sum(axis=1) + 1e-6)
    return np.stack([cosines, cosines - cosines[other], (facts * facts[other]).sum(axis=1), side], axis=1)


def _best_other(values: np.ndarray) -> np.ndarray:
    """For each value the largest of the others, 0 where there are none."""
    if len(values) == 1:
        return np.zeros(1)
    order = np.argsort(-values, kind="stable")
    best = np.full(len(values), values[order[0]])
    best[order[0]] = values[order[1]]
    return best


def _units(rows: np.ndarray) -> np.ndarray:
    return np.asarray(rows / np.maximum(np.linalg.norm(rows, axis=-1, keepdims=True), 1e-12))
