"""What a model answers: teacher-forced, as ReMaKE's and EasyEdit's released code measures it, and freely generated."""

from __future__ import annotations

import os
from collections.abc import Sequence
from typing import Any

os.environ.setdefault("VLLM_CPU_KVCACHE_SPACE", "2")
NEW_TOKENS = 24


class Answers:
    """An engine without steering. `forced` and `free` take prompts in the paper's template, which end in `Answer:`."""

    def __init__(self, model: str, max_model_len: int = 4096) -> None:
        from vllm import LLM

        self._llm = LLM(
            model, enforce_eager=True, max_model_len=max_model_len, block_size=32, enable_prefix_caching=True, seed=0
        )
        self._tokenizer = self._llm.get_tokenizer()

    def forced(self, prompts: Sequence[str], golds: Sequence[str]) -> list[list[int]]:
        """For each prompt the likeliest token at every position of ` gold`, given what is before it in ` gold`."""
        from vllm import SamplingParams

        asked, lengths = [], []
        for prompt, gold in zip(prompts, golds, strict=True):
            answer = self.gold(gold)
            asked.append({"prompt_token_ids": [*self._ids(prompt), *answer]})
            lengths.append(len(answer))
        params = SamplingParams(max_tokens=1, temperature=0, prompt_logprobs=1, detokenize=False)
        outputs = self._llm.generate(asked, params, use_tqdm=False)
        return [_likeliest(output.prompt_logprobs[-n:]) for output, n in zip(outputs, lengths, strict=True)]

    def gold(self, answer: str) -> list[int]:
        """The tokens of an answer behind `Answer:`."""
        return list(self._tokenizer(f" {answer}", add_special_tokens=False)["input_ids"])

    def free(self, prompts: Sequence[str]) -> list[str]:
        """The first line of a greedy answer."""
        from vllm import SamplingParams

        params = SamplingParams(max_tokens=NEW_TOKENS, temperature=0, stop=["\n"])
        asked = [{"prompt_token_ids": self._ids(prompt)} for prompt in prompts]
        return [output.outputs[0].text.strip() for output in self._llm.generate(asked, params, use_tqdm=False)]

    def _ids(self, prompt: str) -> list[int]:
        return list(self._tokenizer(prompt)["input_ids"])


def _likeliest(positions: Sequence[dict[int, Any]]) -> list[int]:
    return [next(token for token, each in found.items() if each.rank == 1) for found in positions]
