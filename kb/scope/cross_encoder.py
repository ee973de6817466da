"""The paper's own decider (section 3.2): a cross-encoder that reads the fact's question and the user's as one text.

Here it reads only the nearest candidates, not the whole knowledge base. Any model that sentence-transformers loads as a
CrossEncoder with one label will do; the paper fine-tuned XLM-RoBERTa base.
"""

from __future__ import annotations

import threading
from collections.abc import Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from kb.encoders.base import EncoderIdentity
from kb.scope.base import ScopeError, Text
from kb.scope.pairs import Situation

MAX_TOKENS: Final = 512


class CrossEncoderDecider:
    """Reads texts only, so that it doesn't depend on the encoder. Raises ScopeError where the model can't be loaded."""

    name: Final = "cross_encoder"
    encoder: Final[EncoderIdentity | None] = None

    def __init__(self, model: str) -> None:
        try:
            from sentence_transformers import CrossEncoder
        except ImportError as error:
            raise ScopeError("a cross-encoder needs sentence-transformers: install polyhelm[encoders]") from error
        try:
            self._model: Any = CrossEncoder(model, num_labels=1, max_length=MAX_TOKENS)
        except (OSError, ValueError) as error:
            raise ScopeError(f"{model} can't be loaded as a cross-encoder: {error}") from error
        # transformers' fast tokenizers refuse to be used by two threads.
        self._lock = threading.Lock()

    def probabilities(self, question: Text, candidates: Sequence[Text]) -> np.ndarray:
        import torch

        pairs = [(each.text, question.text) for each in candidates]
        with self._lock:
            judged = self._model.predict(pairs, activation_fn=torch.nn.Sigmoid(), show_progress_bar=False)
        return np.asarray(judged, np.float64)

    def fit(self, asked: Sequence[Situation], *, epochs: int = 1, batch: int = 32, rate: float = 5e-5) -> None:
        """Fine-tune on every pair, with the paper's optimiser: AdamW, weight decay 0.01, gradients clipped at 1, the
        rate rising over the first tenth of the steps and falling to 0.
        """
        import torch

        rows = [
            (candidate.text, each.question.text, float(match))
            for each in asked
            for candidate, match in zip(each.candidates, each.matches, strict=True)
        ]
        network, tokenizer = self._model.model, self._model.tokenizer
        optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=0.01)
        steps = epochs * -(-len(rows) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, rate, total_steps=max(steps, 2), pct_start=0.1, anneal_strategy="linear"
        )
        network.train()
        for _ in range(epochs):
            for numbers in torch.split(torch.randperm(len(rows)), batch):
                facts, questions, labels = zip(*(rows[n] for n in numbers.tolist()), strict=True)
                read = tokenizer(
                    list(facts),
                    list(questions),
                    padding=True,
                    truncation=True,
                    max_length=MAX_TOKENS,
                    return_tensors="pt",
                ).to(network.device)
                logits = network(**read).logits[:, 0]
                truth = torch.tensor(labels, device=logits.device)
                loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth)
                optimiser.zero_grad()
                loss.backward()  # type: ignore[no-untyped-call]
                torch.nn.utils.clip_grad_norm_(network.parameters(), 1.0)
                optimiser.step()
                schedule.step()
        network.eval()

    def save(self, folder: Path) -> None:
        self._model.save_pretrained(str(folder))
