"""Pairs to learn from: questions in several languages that ask for the same thing, their near misses, and questions
that no fact answers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import NamedTuple

import numpy as np

from kb.encoders.base import Encoder
from kb.scope.base import ScopeError, Text

CANDIDATES = 4
MIN_GROUPS = 50
OWN_LANGUAGE = 0.2
"""Share of the collections that a question out of scope is asked of which are in its own language."""


class Group(NamedTuple):
    """Questions for one fact, each with its language."""

    questions: tuple[tuple[str, str], ...]


class Situation(NamedTuple):
    """A question, the nearest facts of a collection, and which of these, bool [facts], it is about: one or none."""

    question: Text
    candidates: tuple[Text, ...]
    matches: np.ndarray


class Questions(NamedTuple):
    """What a file gives to learn from: groups, and questions that no fact answers, each with its language."""

    groups: Sequence[Group]
    out_of_scope: Sequence[tuple[str, str]] = ()


def read_questions(path: Path) -> Questions:
    """From JSON lines: {"questions": {"en": "...", "de": ["...", "..."]}} asks for one thing, {"out_of_scope": {...}}
    for anything else. Raises ScopeError, which names the line.
    """
    groups: list[Group] = []
    out_of_scope: list[tuple[str, str]] = []
    for number, line in enumerate(path.read_text("utf-8").splitlines(), 1):
        try:
            ((kind, texts),) = json.loads(line).items()
            found = [(text, language) for language in texts for text in _texts(texts[language])]
            if kind not in ("questions", "out_of_scope"):
                raise ValueError(f"{kind!r} is neither")
            if not found:
                raise ValueError("there is no question in it")
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ScopeError(
                f'line {number} is neither {{"questions": {{"en": "...", "de": ["...", "..."]}}}} nor'
                f' {{"out_of_scope": {{"en": "..."}}}}: {error}'
            ) from None
        if kind == "out_of_scope":
            out_of_scope += found
            continue
        if len(found) < 2:
            raise ScopeError(f"line {number} asks in one way only: give at least two questions for the same thing")
        groups.append(Group(tuple(found)))
    if len(groups) < MIN_GROUPS:
        raise ScopeError(
            f'{len(groups)} lines with "questions": give at least {MIN_GROUPS}, so that there are near misses to learn'
            " from"
        )
    return Questions(groups, out_of_scope)


def _texts(value: object) -> list[str]:
    texts = [value] if isinstance(value, str) else value
    if not isinstance(texts, list) or not all(isinstance(text, str) and text.strip() for text in texts):
        raise ValueError("a question must be a text, or a list of texts")
    return texts


class Encoded(NamedTuple):
    """Groups with the vectors [questions, dimension] of each, and questions that none of them answers."""

    groups: Sequence[Group]
    vectors: Sequence[np.ndarray]
    out_of_scope: Sequence[Text] = ()

    def part(self, numbers: Sequence[int] | np.ndarray, out_of_scope: Sequence[Text] = ()) -> Encoded:
        """Groups by number, with these questions beside them."""
        return Encoded([self.groups[n] for n in numbers], [self.vectors[n] for n in numbers], out_of_scope)


def encode(questions: Questions, encoder: Encoder) -> Encoded:
    groups = questions.groups
    asked = [text for group in groups for text, _ in group.questions]
    rows = encoder.encode_queries([*asked, *(text for text, _ in questions.out_of_scope)])
    ends = np.cumsum([len(group.questions) for group in groups])
    *vectors, others = np.split(rows, ends)
    out_of_scope = [
        Text(text, language, row) for (text, language), row in zip(questions.out_of_scope, others, strict=True)
    ]
    return Encoded(groups, vectors, out_of_scope)


def situations(
    encoded: Encoded, *, per_group: int, seed: int, small: float = 0.0, first: float = 0.0
) -> Iterator[Situation]:
    """For each group some of its questions, asked of a collection that has another question of every group as fact.

    The collection is in one language, and every second time without the fact that the question is about. A question
    isn't asked of its own wording. A share `small` of the collections are samples of 1 fact or more: there the nearest
    fact may be about something else altogether. In a share `first` one of the two is the group's first question.
    """
    random = np.random.default_rng(seed)
    collections = _collections(encoded)
    for number, group in enumerate(encoded.groups):
        for turn in range(per_group):
            # Near misses come in the question's own language as well, and are nearest there.
            asked, told = random.choice(len(group.questions), 2, replace=turn % 2 == 1)
            if first and random.random() < first and 0 not in (asked, told):
                asked, told = (0, told) if random.random() < 0.5 else (asked, 0)
            language = group.questions[told][1]
            facts, owners, vectors = collections[language]
            text, vector = group.questions[asked], encoded.vectors[number][asked]
            scores = vectors @ vector
            own = owners == number
            scores[own] = -2
            if turn % 2 == 0:
                position = int(np.flatnonzero(own)[0])
                scores[position] = vectors[position] @ vector if group.questions[asked] != facts[position] else -2
            if small and random.random() < small:
                scores[~_sample(len(scores), random) & ~own] = -2
            nearest = _nearest(scores)
            if not len(nearest):
                continue
            # Two groups may ask for the same thing in this language.
            wording = {question for question, _ in group.questions}
            matches = np.array([owners[n] == number or facts[n][0] in wording for n in nearest])
            candidates = tuple(Text(facts[n][0], facts[n][1], vectors[n]) for n in nearest)
            yield Situation(Text(text[0], text[1], vector), candidates, matches)


def out_of_scope(encoded: Encoded, *, per_question: int, seed: int, small: float = 0.0) -> Iterator[Situation]:
    """The questions that no group answers, asked of the same collections, often of one in another language."""
    random = np.random.default_rng(seed)
    collections = _collections(encoded)
    languages = sorted(collections)
    for question in encoded.out_of_scope:
        for _ in range(per_question):
            language = str(random.choice(languages))
            if question.language in collections and random.random() < OWN_LANGUAGE:
                language = question.language
            facts, _, vectors = collections[language]
            scores = vectors @ question.vector
            if small and random.random() < small:
                scores[~_sample(len(scores), random)] = -2
            nearest = _nearest(scores)
            if len(nearest):
                candidates = tuple(Text(facts[n][0], facts[n][1], vectors[n]) for n in nearest)
                yield Situation(question, candidates, np.zeros(len(nearest), bool))


def _sample(number: int, random: np.random.Generator) -> np.ndarray:
    """bool [number], which of that many facts are there: from about one to all."""
    return np.asarray(random.random(number) < number ** -random.random())


def _nearest(scores: np.ndarray) -> np.ndarray:
    """Numbers of facts by falling score, CANDIDATES at most; -2 stands for one that isn't there."""
    nearest = np.argsort(-scores)[:CANDIDATES]
    return np.asarray(nearest[scores[nearest] > -2])


def _collections(encoded: Encoded) -> dict[str, tuple[list[tuple[str, str]], np.ndarray, np.ndarray]]:
    """By language: the facts, the numbers of their groups [facts], and their vectors [facts, dimension]."""
    found: dict[str, list[tuple[tuple[str, str], int, np.ndarray]]] = {}
    for number, (group, vectors) in enumerate(zip(encoded.groups, encoded.vectors, strict=True)):
        for question, vector in zip(group.questions, vectors, strict=True):
            found.setdefault(question[1], []).append((question, number, vector))
    return {
        language: ([row[0] for row in rows], np.array([row[1] for row in rows]), np.stack([row[2] for row in rows]))
        for language, rows in found.items()
    }
