"""What a model answers: teacher-forced, as ReMaKE's and EasyEdit's released code measures it, and freely generated."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from local_model import LocalModel, Request

NEW_TOKENS = 24


class Answers:
    """A model without steering. `forced` and `free` take prompts in the paper's template, which end in `Answer:`."""

    def __init__(self, folder: Path, max_model_len: int = 4096) -> None:
        self._model = LocalModel(folder, max_model_len=max_model_len, kv_cache_mib=2048)

    def forced(self, prompts: Sequence[str], golds: Sequence[str]) -> list[list[int]]:
        """For each prompt the likeliest token at every position of ` gold`, given what is before it in ` gold`."""
        requests = []
        for prompt, gold in zip(prompts, golds, strict=True):
            answer = self.gold(gold)
            requests.append(Request([*self._model.encode(prompt), *answer], len(answer)))
        return self._model.likeliest(requests)

    def gold(self, answer: str) -> list[int]:
        """The tokens of an answer behind `Answer:`."""
        return self._model.encode(f" {answer}", special=False)

    def free(self, prompts: Sequence[str]) -> list[str]:
        """The first line of a greedy answer."""
        asked = [self._model.encode(prompt) for prompt in prompts]
        return [text.strip() for text in self._model.greedy(asked, NEW_TOKENS, ["\n"])]
