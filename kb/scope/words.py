"""What two texts share on their surface, across scripts: names, numbers and rare words.

A near miss asks the same of another subject, and sentence vectors hardly tell subjects apart. Names mostly survive
translation, respelled: words are compared in Latin letters, and by their consonants, in classes that transliteration
confuses (`Christian`, `Кристиан` and `克里斯蒂安` are all `krstn`).
"""

from __future__ import annotations

import math
import re
import zlib
from collections.abc import Iterable, Sequence
from typing import Final, NamedTuple

import numpy as np
from anyascii import anyascii
from rapidfuzz import fuzz

BUCKETS: Final = 1 << 15
_RUNS: Final = "\u0e00-\u0eff\u1000-\u109f\u1780-\u17ff\u3040-\u30ff\u3400-\u9fff\uf900-\ufaff"
"""Scripts without spaces between words: Thai, Lao, Burmese, Khmer, kana, Han."""
_UNSPACED = re.compile(f"[{_RUNS}]")
# Python's \w leaves out the vowel signs of the scripts of India.
_WORD = re.compile(rf"[{_RUNS}]+|(?:[^\W{_RUNS}]|[\u0900-\u0dff])+")
_LATIN = re.compile("[A-Za-z\u00aa-\u024f\u1e00-\u1eff]")
_LETTERS = re.compile("[a-z]+")
_CLASSES = str.maketrans("cgqkhxlrdtbpfvwszjmny", "kkkkkkrrttppfffsssnn ", "aeiou")
_HAN = re.compile("[\u3400-\u9fff\uf900-\ufaff]")
_SPELLED: Final = (
    *(("chr", "kr"), ("chl", "kl"), ("ch", "s"), ("sh", "s"), ("zh", "s"), ("ph", "f"), ("th", "t"), ("kh", "k")),
    *(("gh", "g"), ("ce", "se"), ("ci", "si")),
)
_PINYIN: Final = (("q", "s"), ("x", "s"), ("zh", "s"), ("ch", "s"), ("sh", "s"))
FUZZY_LENGTH: Final = 4
MAX_WORDS: Final = 200
"""Of a text, what is compared: questions are short, and a prompt that isn't must not hold up the others."""


class Word(NamedTuple):
    """A word as written, in Latin letters, and as classes of consonants. An unspaced run has no word boundaries."""

    written: str
    latin: str
    consonants: str
    unspaced: bool
    capital: bool


class Words(NamedTuple):
    """The words of a text; `latin` and `consonants` are all of it, without spaces."""

    words: tuple[Word, ...]
    numbers: frozenset[str]
    latin: str
    consonants: str


class Rarity(NamedTuple):
    """How rare a word is: the logarithm of texts over texts with the word, from hashed counts [BUCKETS]."""

    texts: int
    counts: np.ndarray

    @classmethod
    def of(cls, texts: Iterable[str]) -> Rarity:
        counts, number = np.zeros(BUCKETS, np.int32), 0
        for text in texts:
            number += 1
            counts[sorted({bucket(word.lower()) for word in _WORD.findall(text)})] += 1
        return cls(number, counts)

    def __call__(self, written: str) -> float:
        """From 0 (in every text) to 1 (in none)."""
        return math.log((self.texts + 1) / (int(self.counts[bucket(written)]) + 1)) / math.log(self.texts + 1)


def bucket(written: str) -> int:
    return zlib.crc32(written.encode("utf-8", "replace")) % BUCKETS


def words_of(text: str) -> Words:
    words = []
    for written in _WORD.findall(text)[:MAX_WORDS]:
        latin = anyascii(written).lower()
        unspaced = _UNSPACED.search(written) is not None
        words.append(
            Word(
                written.lower(),
                latin,
                consonants(latin, _PINYIN if _HAN.search(written) else _SPELLED),
                unspaced,
                written[0].isupper(),
            )
        )
    numbers = frozenset(number.lstrip("0") or "0" for number in re.findall(r"\d+", anyascii(text)))
    return Words(
        tuple(words), numbers, "".join(word.latin for word in words), "".join(word.consonants for word in words)
    )


def consonants(latin: str, spelling: Sequence[tuple[str, str]] = _SPELLED) -> str:
    """Consonants in classes, repeated ones once: what is left of a name after it went through another script."""
    for letters, sound in spelling:
        latin = latin.replace(letters, sound)
    kept = "".join(_LETTERS.findall(latin)).translate(_CLASSES).replace(" ", "")
    return re.sub(r"(.)\1+", r"\1", kept)


OVERLAP: Final = ("exact", "fuzzy", "consonants", "rarest", "worst", "evidence")
NUMBERS: Final = ("numbers_shared", "numbers_differ")


def overlap(one: Words, other: Words, rarity: Rarity) -> list[float]:
    """How much of the first text's rare words the second one has, in the terms of OVERLAP.

    `exact`, `fuzzy`, `consonants`: mean over words, weighted by rarity; `rarest`, `worst`: the best match of the
    rarest word, and the worst of the three rarest; `evidence`: the weight of all words.
    """
    there = {word.written for word in other.words} | {word.latin for word in other.words}
    spaced = [word for word in other.words if not word.unspaced]
    weights, exact, fuzzy, sound = [], [], [], []
    for word in one.words:
        if word.unspaced:
            continue
        weight = rarity(word.written) ** 3 * (1.5 if word.capital else 1.0)
        same = float(word.written in there or word.latin in there)
        near = same if same else _near(word, spaced, other)
        weights.append(weight)
        exact.append(same)
        fuzzy.append(near)
        sound.append(max(same, _sound(word, other)))
    if not weights:
        return [0.0, 0.0, 0.0, 0.0, 0.0, 0.0]
    w = np.asarray(weights)
    best = np.maximum(fuzzy, sound)
    order = np.argsort(-w, kind="stable")[:3]
    total = float(w.sum()) + 1e-9
    means = [float(w @ np.asarray(each)) / total for each in (exact, fuzzy, sound)]
    return [*means, float(best[order[0]]), float(best[order].min()), total]


def _near(word: Word, spaced: Sequence[Word], other: Words) -> float:
    if len(word.latin) < FUZZY_LENGTH:
        return 0.0
    whole = max((fuzz.ratio(word.latin, each.latin) for each in spaced), default=0.0)
    return max(whole, 0.9 * fuzz.partial_ratio(word.latin, other.latin)) / 100


def _sound(word: Word, other: Words) -> float:
    if len(word.consonants) < 3 or not other.consonants:
        return 0.0
    return float(fuzz.partial_ratio(word.consonants, other.consonants)) / 100


def numbers(one: Words, other: Words) -> list[float]:
    """In the terms of NUMBERS: numbers that both have, and numbers that only one has."""
    return [float(len(one.numbers & other.numbers)), float(len(one.numbers ^ other.numbers))]


def scripts(words: Words) -> tuple[float, float]:
    """Shares of the letters: of scripts without spaces between words, and of other scripts that aren't Latin."""
    unspaced = sum(len(word.written) for word in words.words if word.unspaced)
    spaced = "".join(word.written for word in words.words if not word.unspaced)
    foreign = sum(letter.isalpha() for letter in _LATIN.sub("", spaced))
    total = max(unspaced + sum(letter.isalpha() for letter in spaced), 1)
    return unspaced / total, foreign / total
