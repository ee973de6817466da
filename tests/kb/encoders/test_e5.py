"""The embedded encoder, with its real weights."""

from __future__ import annotations

from concurrent.futures import ThreadPoolExecutor

import numpy as np
import pytest

from kb.encoders import InvalidText, UnknownEncoder, load
from kb.encoders.e5 import BATCH, MAX_CHARACTERS

ENGLISH = "Who designed the cathedral of Évry?"
OTHERS = {
    "ru": "Кто спроектировал собор в Эври?",
    "zh": "埃夫里大教堂是谁设计的？",
    "th": "ใครเป็นผู้ออกแบบมหาวิหารเอวรี",
}
UNRELATED = "What is the boiling point of water?"


@pytest.mark.parametrize("language", OTHERS)
def test_a_translation_is_nearer_than_another_question(language: str) -> None:
    encoder = load("e5-small")
    english, translated, unrelated = encoder.encode_queries([ENGLISH, OTHERS[language], UNRELATED])
    assert english @ translated > english @ unrelated + 0.03


def test_rows_are_unit_float32_and_do_not_depend_on_the_batch() -> None:
    encoder = load("e5-small")
    texts = [f"{ENGLISH} {number}" for number in range(BATCH + 3)]
    rows = encoder.encode_queries(texts)
    assert rows.dtype == np.float32 and rows.shape == (len(texts), encoder.identity.dimension)
    np.testing.assert_allclose(np.linalg.norm(rows, axis=1), 1, atol=1e-5)
    np.testing.assert_allclose(rows[-1], encoder.encode_queries(texts[-1:])[0], atol=1e-5)


def test_questions_are_encoded_alike_on_both_sides_and_passages_are_not() -> None:
    questions, passages = load("e5-small"), load("e5-small-passages")
    np.testing.assert_array_equal(questions.encode_queries([ENGLISH]), questions.encode_documents([ENGLISH]))
    assert not np.allclose(passages.encode_queries([ENGLISH]), passages.encode_documents([ENGLISH]), atol=1e-3)
    assert questions.identity.digest != passages.identity.digest
    assert questions.identity == load("e5-small").identity
    assert questions.identity.digest.startswith("sha256:")


def test_threads_get_what_one_thread_gets() -> None:
    encoder = load("e5-small")
    texts = [f"{ENGLISH} {number}" for number in range(8)]
    alone = [encoder.encode_queries([text])[0] for text in texts]
    with ThreadPoolExecutor(8) as pool:
        together = list(pool.map(lambda text: encoder.encode_queries([text])[0], texts))
    np.testing.assert_array_equal(alone, together)


def test_no_texts_an_empty_one_a_nul_and_a_long_one() -> None:
    encoder = load("e5-small")
    assert encoder.encode_queries([]).shape == (0, 384)
    empty, cut, whole = encoder.encode_queries(["", "capital\0of France", "capital of France"])
    assert np.isfinite(empty).all()
    np.testing.assert_allclose(cut, whole, atol=1e-5)
    long = "a " * MAX_CHARACTERS
    np.testing.assert_array_equal(*encoder.encode_queries([long, long[:MAX_CHARACTERS]]))


@pytest.mark.parametrize("texts", ["one string", [b"bytes"], [None], ["half \ud83d"]])
def test_what_is_no_list_of_unicode_texts_is_refused(texts: list[str]) -> None:
    with pytest.raises(InvalidText):
        load("e5-small").encode_queries(texts)


@pytest.mark.parametrize("spec", ["", "e5-large", "st:", "tei:host", "openai:http://host/v1", "http://host"])
def test_a_name_of_no_encoder_is_refused_with_those_that_are(spec: str) -> None:
    with pytest.raises(UnknownEncoder, match="e5-small, e5-small-passages, st:FOLDER_OR_HUB_ID"):
        load(spec)
