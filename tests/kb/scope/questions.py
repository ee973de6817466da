"""Questions made up here: 12 relations in three languages about people whose names are respelled in Cyrillic."""

from __future__ import annotations

import random

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
