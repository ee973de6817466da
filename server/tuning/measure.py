"""What one point of a sweep does: its effect on the items of a task, and how fluent the text is that it makes.

Effect, the mean over the items: with choices, accuracy (the right choice is the most probable one, by the sum of its
tokens' log-probabilities) and margin (its log-probability less that of the best wrong one); with a target, its
log-probability per token; with a label, whether the scorer gives it to the greedy answer.

Fluency: the perplexity of a greedy steered continuation under the unsteered model. A loop is not perplexing at all, so
that the share of different pairs of neighbouring tokens counts as well (distinct-2, Li et al. 2016).
"""

from __future__ import annotations

import asyncio
import math
import statistics
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from kb.languages import identified
from server.api.errors import ApiError
from server.api.prepared import Prepared, Site
from server.api.steering_schema import LAST_PROMPT_TOKEN
from server.engine.bank_directory import BankTooSmall
from server.engine.capture import CaptureSpec
from server.engine.edits import Program
from server.tuning.task import Item, Tune, TuneError
from steering_store.tuning import Scores

if TYPE_CHECKING:
    import numpy as np

    from server.engine.client import Engine

IN_FLIGHT = 64


@dataclass(frozen=True)
class Encoded:
    """An item as tokens: its prompt, and each of its endings (the right one first) with the prompt before it.

    `starts` are the places where the endings begin.
    """

    item: Item
    prompt: list[int]
    endings: list[list[int]]
    starts: list[int]


@dataclass
class Task:
    """The items on one engine."""

    engine: Engine
    tune: Tune
    items: list[Encoded]
    _clean: dict[tuple[int, tuple[Site, ...]], dict[Site, np.ndarray]] = field(default_factory=dict)
    _slots: asyncio.Semaphore = field(default_factory=lambda: asyncio.Semaphore(IN_FLIGHT))

    @classmethod
    def of(cls, engine: Engine, tune: Tune) -> Task:
        """TuneError naming the first item that the model can't take."""
        items = [_encoded(engine, item, f"tune.items.{number}", tune) for number, item in enumerate(tune.items)]
        return cls(engine, tune, items)

    async def measure(self, prepared: Prepared | None) -> Scores:
        """At one point, or without steering. All requests run in one batch, as far as the engine has room.

        ApiError 400 where the artifact is larger than the bank.
        """
        try:
            async with asyncio.TaskGroup() as group:
                effects = [group.create_task(self._limited(self._effect, each, prepared)) for each in self._scored]
                texts = [group.create_task(self._limited(self._continued, each, prepared)) for each in self._prompts]
        except ExceptionGroup as failed:
            first = failed.exceptions[0]
            if isinstance(first, BankTooSmall):
                raise ApiError(400, f"{first}; fit a smaller rank, or sweep fewer layers at once", "tune") from failed
            raise first from failed
        found, continued = [task.result() for task in effects], [task.result() for task in texts]
        return Scores(**self._summed(found, continued), **await self._fluency(continued))

    @property
    def _scored(self) -> range:
        return range(0 if self.tune.form == "label" else len(self.items))

    @property
    def _prompts(self) -> range:
        most = len(self.items)
        return range(most if self.tune.form == "label" else min(self.tune.fluency_prompts, most))

    async def _limited(self, what: Any, index: int, prepared: Prepared | None) -> Any:
        async with self._slots:
            if prepared is None:
                return await what(index, None)
            if prepared.frozen_sites:
                prepared = prepared.with_clean(await self._clean_rows(index, prepared.frozen_sites))
            # Each task has the loaders in a context of its own.
            await self.engine.ensure(prepared.program, prepared.operands)
            return await what(index, prepared.program)

    async def _effect(self, index: int, program: Program | None) -> list[float]:
        """Log-probabilities of the endings: the right choice first, or that of the target per token."""
        encoded = self.items[index]
        found = []
        for ids, start in zip(encoded.endings, encoded.starts, strict=True):
            each = await self.engine.log_probs(ids, start, program, len(encoded.prompt))
            found.append(sum(each) if self.tune.form == "choices" else statistics.fmean(each))
        return found

    async def _continued(self, index: int, program: Program | None) -> list[int]:
        return await self.engine.continuation(self.items[index].prompt, self.tune.tokens, program)

    async def _clean_rows(self, index: int, sites: tuple[Site, ...]) -> dict[Site, np.ndarray]:
        """What frozen mode puts back: it is the same at all points."""
        if (index, sites) not in self._clean:
            spec = CaptureSpec(sites, LAST_PROMPT_TOKEN)
            run = await self.engine.run_capture(self.items[index].prompt, spec, detokenize=False)
            self._clean[index, sites] = {
                (point, layer): run.tensors[f"{point}.{layer}"].numpy() for point, layer in sites
            }
        return self._clean[index, sites]

    def _summed(self, found: Sequence[list[float]], continued: Sequence[list[int]]) -> dict[str, float]:
        if self.tune.form == "target":
            return {"effect": statistics.fmean(each[0] for each in found)}
        if self.tune.form == "label":
            texts = [self.engine.tokenizer.decode(ids, skip_special_tokens=True) for ids in continued]
            return {"effect": statistics.fmean(map(_right, self.tune.items, texts))}
        margins = [right - max(wrong) for right, *wrong in found]
        accuracy, margin = statistics.fmean(each > 0 for each in margins), statistics.fmean(margins)
        effect = accuracy if self.tune.objective == "accuracy" else margin
        return {"effect": effect, "accuracy": accuracy, "margin": margin}

    async def _fluency(self, continued: Sequence[list[int]]) -> dict[str, float]:
        some = [(index, ids) for index, ids in enumerate(continued[: self.tune.fluency_prompts]) if ids]
        perplexities = await asyncio.gather(*(self._perplexity(index, ids) for index, ids in some))
        different = [each for _, ids in some if (each := distinct_2(ids)) is not None]
        fluency = {"perplexity": statistics.median(perplexities)} if perplexities else {}
        return fluency | ({"distinct_2": statistics.fmean(different)} if different else {})

    async def _perplexity(self, index: int, ids: list[int]) -> float:
        prompt = self.items[index].prompt
        async with self._slots:
            found = await self.engine.log_probs([*prompt, *ids], len(prompt))
        return math.exp(-statistics.fmean(found))


def distinct_2(ids: Sequence[int]) -> float | None:
    """Different pairs of neighbours as a share of all; None below two tokens."""
    pairs = list(zip(ids, ids[1:], strict=False))
    return len(set(pairs)) / len(pairs) if pairs else None


def _right(item: Item, text: str) -> bool:
    assert item.label is not None
    if item.scorer == "contains":
        return item.label.casefold() in text.casefold()
    return bool(text.strip()) and identified(text).language == item.label


def _encoded(engine: Engine, item: Item, where: str, tune: Tune) -> Encoded:
    wrong = [choice for number, choice in enumerate(item.choices or []) if number != item.answer]
    right = item.choices[item.answer] if item.choices is not None and item.answer is not None else item.target
    prompt, *endings = engine.tokenizer(
        [item.prompt, *(item.prompt + each for each in ([] if right is None else [right, *wrong]))]
    )["input_ids"]
    starts = [_shared(prompt, ids) for ids in endings]
    longest = max(len(prompt) + tune.tokens, *(len(ids) + 1 for ids in endings), 0)
    if longest > engine.max_model_len:
        raise TuneError(where, f"{longest} tokens with what follows; the model takes {engine.max_model_len}")
    if not prompt or any(start in (0, len(ids)) for start, ids in zip(starts, endings, strict=True)):
        raise TuneError(where, "the prompt and each of its endings must be at least one token")
    return Encoded(item, prompt, endings, starts)


def _shared(prompt: Sequence[int], whole: Sequence[int]) -> int:
    """How many tokens both begin with: the last ones of a prompt may melt into what follows."""
    same = 0
    while same < min(len(prompt), len(whole)) and prompt[same] == whole[same]:
        same += 1
    return same
