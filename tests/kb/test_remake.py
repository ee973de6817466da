"""ReMaKE's prompts, against the paper's templates written out."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Any

import pytest

from kb.facts import Fact
from kb.remake import Example, Pair, context_prompt, example, question_of, remake_prompt

NOW = datetime(2026, 1, 1, tzinfo=UTC)


def fact(question: str | None = "Who wrote Faust?", answer: str | None = "Goethe", **fields: Any) -> Fact:
    text = fields.pop("text", f"{question} {answer}")
    values = {"language": "en", "question": question, "answer": answer} | fields
    return Fact("f", text, "sha256:0", 1, 1, NOW, NOW, **values)


POOL = fact(
    "Who wrote Hamlet?",
    "Shakespeare",
    metadata={"translations": {"de": {"question": "Wer schrieb Hamlet?", "answer": "Shakespeare"}, "fr": "no"}},
)


def test_zero_shot_is_the_fact_and_the_question() -> None:
    assert remake_prompt("Wer schrieb Faust?", [fact()]) == (
        "Question: Who wrote Faust? Answer: Goethe\nQuestion: Wer schrieb Faust? Answer:"
    )


def test_examples_come_first_each_with_its_translation_and_a_blank_line() -> None:
    shots = [
        Example(Pair("q1", "a1"), Pair("Q1", "A1")),
        Example(Pair("q2", "a2"), Pair("Q2", "A2")),
    ]
    assert remake_prompt("Q", [fact()], shots) == (
        "Question: q1 Answer: a1\nQuestion: Q1 Answer: A1\n\n"
        "Question: q2 Answer: a2\nQuestion: Q2 Answer: A2\n\n"
        "Question: Who wrote Faust? Answer: Goethe\nQuestion: Q Answer:"
    )


def test_monolingual_examples_are_only_in_the_language_of_the_facts() -> None:
    shot = example(POOL, "monolingual", "de")
    assert shot is not None
    assert remake_prompt("Q", [fact()], [shot]).startswith(
        "Question: Who wrote Hamlet? Answer: Shakespeare\n\nQuestion: Who"
    )


def test_a_bilingual_example_has_the_translation_of_the_questions_language() -> None:
    assert example(POOL, "bilingual", "de") == Example(
        Pair("Who wrote Hamlet?", "Shakespeare"), Pair("Wer schrieb Hamlet?", "Shakespeare")
    )
    assert example(POOL, "bilingual", "en") == Example(Pair("Who wrote Hamlet?", "Shakespeare"))
    assert example(POOL, "bilingual", "fr") is None
    assert example(POOL, "bilingual", "cs") is None
    assert example(fact(None, None, text="only a text"), "monolingual", "de") is None


def test_the_best_of_several_facts_stands_next_to_the_question_and_a_text_stands_as_it_is() -> None:
    prompt = remake_prompt("Q", [fact(), fact(None, None, text="Faust is a play.")])
    assert prompt == "Faust is a play.\nQuestion: Who wrote Faust? Answer: Goethe\nQuestion: Q Answer:"


def test_context_leaves_the_prompt_whole_behind_the_facts() -> None:
    assert context_prompt(" as it is \n", [fact(text="A."), fact(text="B.")]) == "A.\nB.\n\n as it is \n"


@pytest.mark.parametrize(
    ("prompt", "question"),
    [
        ("Question: Who wrote Faust? Answer:", "Who wrote Faust?"),
        ("\nQuestion:Who wrote\nFaust?  Answer: ", "Who wrote\nFaust?"),
        ("  Who wrote Faust?\n", "Who wrote Faust?"),
        ("Question: a? Answer: b", "Question: a? Answer: b"),
        ("Question: a? Answer: b\nQuestion: c? Answer:", "Question: a? Answer: b\nQuestion: c? Answer:"),
        (" ", ""),
    ],
)
def test_the_question_is_what_the_papers_template_holds_or_all_of_the_prompt(prompt: str, question: str) -> None:
    assert question_of(prompt) == question
