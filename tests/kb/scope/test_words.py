"""What texts share on the surface."""

from __future__ import annotations

import pytest

from kb.scope.words import MAX_WORDS, NUMBERS, OVERLAP, Rarity, numbers, overlap, scripts, words_of

RARITY = Rarity.of(["Who wrote this book?", "Who wrote that song?", "Who was born here?", "Кто написал эту книгу?"])


def measures(one: str, other: str) -> dict[str, float]:
    return dict(zip(OVERLAP, overlap(words_of(one), words_of(other), RARITY), strict=True))


@pytest.mark.parametrize("respelled", ["Кристиан Берг", "克里斯蒂安", "คริสเตียน"])
def test_a_name_keeps_its_consonants_in_other_scripts(respelled: str) -> None:
    same, other = measures("Who was Christian?", respelled), measures("Who was Valdemar?", respelled)
    assert same["consonants"] > 0.8 > other["consonants"]


def test_another_subject_of_the_same_question_shares_only_common_words() -> None:
    same = measures("Who wrote Faust?", "Wer schrieb Faust?")
    near_miss = measures("Who wrote Faust?", "Who wrote Hamlet?")
    assert same["rarest"] == 1 > near_miss["rarest"]
    assert same["exact"] > 0.5 > near_miss["exact"]


def test_rare_words_weigh_more_than_common_ones() -> None:
    assert RARITY("who") < RARITY("song") < RARITY("faust") == 1


def test_numbers_are_compared_by_value() -> None:
    found = numbers(words_of("In 2006, number 7 of 12"), words_of("في ٢٠٠٦ 007"))
    assert dict(zip(NUMBERS, found, strict=True)) == {"numbers_shared": 2, "numbers_differ": 1}


@pytest.mark.parametrize("text", ["", "?!", "…", "\ud800", "a" * 100_000])
def test_any_text_has_words_or_none(text: str) -> None:
    assert len(overlap(words_of(text), words_of("Who wrote Faust?"), RARITY)) == len(OVERLAP)
    assert len(overlap(words_of("Who wrote Faust?"), words_of(text), RARITY)) == len(OVERLAP)


def test_a_long_text_is_compared_by_its_beginning() -> None:
    many = " ".join(f"word{number}" for number in range(MAX_WORDS))
    assert words_of(f"{many} Faust").words == words_of(many).words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("Carolina Rodríguez来自哪里？", ["carolina", "rodríguez", "来自哪里"]),
        ("Michael เกิดเมื่อไหร่?", ["michael", "เกิดเมื่อไหร่"]),
        ("भारत की राजधानी", ["भारत", "की", "राजधानी"]),
    ],
)
def test_a_name_in_latin_letters_is_a_word_of_its_own_among_others(text: str, words: list[str]) -> None:
    assert [word.written for word in words_of(text).words] == words


@pytest.mark.parametrize(
    ("text", "shares"),
    [
        ("Ai đã thiết kế Nhà thờ Évry?", (0, 0)),
        ("谁设计了埃夫里大教堂？", (1, 0)),
        ("Кто?", (0, 1)),
        ("Evry 埃夫里大", (0.5, 0)),
        ("Evry Эври", (0, 0.5)),
        ("", (0, 0)),
        ("2006?", (0, 0)),
    ],
)
def test_the_scripts_of_a_text_are_told_apart(text: str, shares: tuple[float, float]) -> None:
    assert scripts(words_of(text)) == shares
