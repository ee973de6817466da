"""Questions made up here: 6 relations in three languages about people whose names are respelled in Cyrillic, and
questions about the same people that none of them answers."""

from __future__ import annotations

import random
from collections.abc import Sequence

from kb.scope.pairs import Group

CYRILLIC = str.maketrans("abdefgiklmnoprstuvz", "абдефгиклмнопрстувз")
RELATIONS = (
    ("Where was {} born?", "Wo wurde {} geboren?", "Где родился {}?"),
    ("When did {} die?", "Wann starb {}?", "Когда умер {}?"),
    ("Who is the father of {}?", "Wer ist der Vater von {}?", "Кто отец {}?"),
    ("What language does {} speak?", "Welche Sprache spricht {}?", "На каком языке говорит {}?"),
    ("Which team does {} play for?", "Für welches Team spielt {}?", "За какую команду играет {}?"),
    ("What is the religion of {}?", "Welcher Religion gehört {} an?", "Какую религию исповедует {}?"),
)
ASIDE = (
    ("How tall is the statue of {}?", "Wie hoch ist die Statue von {}?"),
    ("Where can I buy a poster of {}?", "Wo gibt es ein Poster von {}?"),
    ("Is there a street named after {}?", "Gibt es eine Straße, die nach {} heißt?"),
    ("Who plays {} in the film?", "Wer spielt {} im Film?"),
)
SYLLABLES = ("ba", "den", "fir", "gol", "kam", "lis", "mor", "nak", "pel", "rud", "sov", "tiz", "vun", "zer")


def groups(number: int, seed: int) -> list[Group]:
    pick = random.Random(seed)
    made = []
    for _ in range(number):
        name = " ".join("".join(pick.choices(SYLLABLES, k=pick.choice((2, 3)))).capitalize() for _ in range(2))
        english, german, russian = pick.choice(RELATIONS)
        respelled = name.lower().translate(CYRILLIC).title()
        made.append(
            Group(((english.format(name), "en"), (german.format(name), "de"), (russian.format(respelled), "ru")))
        )
    return made


def aside(known: Sequence[Group], seed: int) -> list[tuple[str, str]]:
    """About the subject of each group a question that isn't the group's, in one of two languages."""
    pick = random.Random(seed)
    made = []
    for group in known:
        words = group.questions[0][0].rstrip("?").split()
        name = " ".join([word for word in words if word[0].isupper()][1:])
        language = pick.randrange(2)
        made.append((pick.choice(ASIDE)[language].format(name), ("en", "de")[language]))
    return made
