"""What a model answers: teacher-forced, as ReMaKE's and EasyEdit's released code measures it, and freely generated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import NamedTuple

from local_model import LocalModel, Request

BLOCK = 32
"""Tokens in a block of the prefix cache: small ones share more of two prompts."""


NEW_TOKENS = 24
BEYOND = 6
"""Tokens that a free answer may be longer than the gold one: what is longer isn't it, however it goes on."""


class Asked(NamedTuple):
    """A prompt in the paper's template, which ends in `Answer:`, and the gold answer.

    The free answer is made only as long as it takes to tell whether it is the gold one, unless it is wanted `whole`.
    """

    prompt: str
    gold: str
    whole: bool


class Answers:
    """A model without steering. Prompts that begin alike are cheap where they are neighbours."""

    def __init__(self, folder: Path, max_model_len: int = 4096) -> None:
        self._model = LocalModel(folder, max_model_len=max_model_len, kv_cache_mib=2048, block_size=BLOCK)

    def answer(self, asked: Sequence[Asked]) -> list[tuple[list[int], str]]:
        """For each prompt the likeliest token at every position of ` gold`, given what is before it in ` gold`; and the
        first line of a greedy answer."""
        prompts = [self._model.encode(each.prompt) for each in asked]
        golds = [self.gold(each.gold) for each in asked]
        requests = [Request(prompt + gold, len(gold)) for prompt, gold in zip(prompts, golds, strict=True)]
        # In this order: a forced answer needs states, which the cache hasn't; a free one reads what forcing left there.
        forced = self._model.likeliest(requests, cached=True)
        short = [min(NEW_TOKENS, len(gold) + BEYOND) for gold in golds]
        most = [NEW_TOKENS if each.whole else tokens for each, tokens in zip(asked, short, strict=True)]
        free = self._model.greedy(prompts, most, ["\n"])
        return [(tokens, text.strip()) for tokens, text in zip(forced, free, strict=True)]

    def gold(self, answer: str) -> list[int]:
        """The tokens of an answer behind `Answer:`."""
        return self._model.encode(f" {answer}", special=False)
