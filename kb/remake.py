"""ReMaKE's prompts: a fact in one language before a question in another (Wang et al. 2024, arXiv 2312.13040).

    Question: {q1} Answer: {a1}            example, in the language of the facts
    Question: {q1'} Answer: {a1'}          the same in the language of the question (bilingual examples)

    Question: {k} Answer: {v}              the fact that was retrieved
    Question: {q} Answer:

Examples come first, the most similar one first of all, so that what repeats from request to request is the prompt's
beginning, which the prefix cache shares. A question that is about no fact gets no prompt at all: the request stays as
it is, byte for byte.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, NamedTuple

from kb.facts import Fact

Form = Literal["bilingual", "monolingual"]

_ASKED = re.compile(r"\s*Question:\s*(?P<question>(?:(?!Answer:).)*?)\s*Answer:\s*", re.DOTALL)
_TRANSLATIONS = "translations"


class Pair(NamedTuple):
    """A question with its answer."""

    question: str
    answer: str

    def line(self) -> str:
        return f"Question: {self.question} Answer: {self.answer}"


class Example(NamedTuple):
    """A pair in the language of the facts and, for bilingual prompts, its translation."""

    pair: Pair
    translation: Pair | None = None

    def block(self) -> str:
        lines = [self.pair.line()] + ([self.translation.line()] if self.translation else [])
        return "\n".join(lines) + "\n\n"


def question_of(prompt: str) -> str:
    """The question in a prompt: what stands in the paper's own template where the prompt is one, else all of it."""
    match = _ASKED.fullmatch(prompt)
    return match["question"] if match else prompt.strip()


def remake_prompt(question: str, facts: Sequence[Fact], examples: Sequence[Example] = ()) -> str:
    """The paper's prompt. `facts` and `examples` are given best first; the best fact stands next to the question."""
    lines = [fact_line(fact) for fact in reversed(facts)]
    return "".join(example.block() for example in examples) + "\n".join([*lines, f"Question: {question} Answer:"])


def context_prompt(prompt: str, facts: Sequence[Fact]) -> str:
    """The facts, best first, then the prompt as it is."""
    return "".join(f"{fact.text}\n" for fact in facts) + f"\n{prompt}"


def fact_line(fact: Fact) -> str:
    """A question with its answer in the template, a fact that is only a text as it is."""
    if fact.question is None or fact.answer is None:
        return fact.text
    return Pair(fact.question, fact.answer).line()


def example(fact: Fact, form: Form, language: str) -> Example | None:
    """An entry of the pool of examples as an example for questions in `language`; None where it has no such form.

    Its translations are in `metadata`: {"translations": {"de": {"question": ..., "answer": ...}}}. For questions in the
    language of the facts the paper's translation is the pair itself, so that it is left out.
    """
    if fact.question is None or fact.answer is None:
        return None
    pair = Pair(fact.question, fact.answer)
    if form == "monolingual" or language == fact.language:
        return Example(pair)
    translation = translation_of(fact, language)
    return None if translation is None else Example(pair, translation)


def translation_of(fact: Fact, language: str) -> Pair | None:
    translations = fact.metadata.get(_TRANSLATIONS)
    found = translations.get(language) if isinstance(translations, dict) else None
    if not isinstance(found, dict):
        return None
    question, answer = found.get("question"), found.get("answer")
    return Pair(question, answer) if isinstance(question, str) and isinstance(answer, str) else None
