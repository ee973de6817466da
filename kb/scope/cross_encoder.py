"""The paper's own decider (section 3.2): a cross-encoder that reads the fact's question and the user's as one text.

Here it reads only the nearest candidates, not the whole knowledge base. Any model that sentence-transformers loads as a
CrossEncoder with one label will do; the paper fine-tuned XLM-RoBERTa base. `e5-small` is the embedded encoder's.
"""

from __future__ import annotations

import tempfile
import threading
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Final

import numpy as np

from kb.encoders.base import EncoderIdentity
from kb.scope import pretrained
from kb.scope.base import ScopeError, Text
from kb.scope.pairs import Situation

MAX_TOKENS: Final = 512
OTHERS: Final = 2
"""Near misses that are read beside each match."""
BLOCK: Final = 16
"""Batches that are put together at once, each of pairs about as long, as the short would be padded to the longest."""


class CrossEncoderDecider:
    """Reads texts only, so that it doesn't depend on the encoder. Raises ScopeError where the model can't be loaded.

    `short` keeps the weights in 16 bits where the CPU multiplies such, which is twice as fast: to serve, not to train.
    """

    name: Final = "cross_encoder"
    encoder: Final[EncoderIdentity | None] = None

    def __init__(self, model: str, *, short: bool = False) -> None:
        try:
            from sentence_transformers import CrossEncoder
        except ImportError as error:
            raise ScopeError("a cross-encoder needs sentence-transformers: install polyhelm[encoders]") from error

        def loaded(name: str) -> Any:
            # The fused attention for CPUs is slow in training: it takes as long as all else together.
            settings: dict[str, Any] = {"attn_implementation": "eager"}
            if short and _multiplies_short():
                import torch

                settings["dtype"] = torch.bfloat16
            return CrossEncoder(name, num_labels=1, max_length=MAX_TOKENS, model_kwargs=settings)

        try:
            if model == pretrained.NAME:
                with tempfile.TemporaryDirectory() as folder:
                    pretrained.write(Path(folder))
                    self._model: Any = loaded(folder)
            else:
                self._model = loaded(model)
        except (OSError, ValueError) as error:
            raise ScopeError(f"{model} can't be loaded as a cross-encoder: {error}") from error
        # transformers' fast tokenizers refuse to be used by two threads.
        self._lock = threading.Lock()

    def probabilities(self, question: Text, candidates: Sequence[Text]) -> np.ndarray:
        return np.asarray(1 / (1 + np.exp(-self.log_odds(question, candidates))))

    def log_odds(self, question: Text, candidates: Sequence[Text]) -> np.ndarray:
        import torch

        pairs = [(each.text, question.text) for each in candidates]
        with self._lock:
            judged = self._model.predict(pairs, activation_fn=torch.nn.Identity(), show_progress_bar=False)
        return np.asarray(judged, np.float64)

    def fit(
        self,
        asked: Sequence[Situation],
        *,
        epochs: int = 1,
        batch: int = 48,
        rate: float = 1e-4,
        seed: int = 0,
        report: Callable[[str], None] = lambda _: None,
    ) -> None:
        """Fine-tune on these questions, each beside near misses, with the paper's optimiser: AdamW, weight decay 0.01,
        gradients clipped at 1, the rate rising over the first tenth of the steps and falling to 0.

        The words' own embeddings stay: they are most of the weights, and no training has seen every name.
        """
        import torch

        random = np.random.default_rng(seed)
        torch.manual_seed(seed)
        network, tokenizer = self._model.model, self._model.tokenizer
        network.get_input_embeddings().requires_grad_(False)
        learned = [each for each in network.parameters() if each.requires_grad]
        optimiser = torch.optim.AdamW(learned, lr=rate, weight_decay=0.01)
        rows = _rows(asked, random)
        steps = epochs * -(-len(rows) // batch)
        schedule = torch.optim.lr_scheduler.OneCycleLR(
            optimiser, rate, total_steps=steps + 1, pct_start=0.1, anneal_strategy="linear"
        )
        lengths = [len(fact) + len(question) for fact, question, _ in rows]
        short = network.device.type == "cpu" and _multiplies_short()
        network.train()
        done, seen = 0, 0.0
        for numbers in (part for _ in range(epochs) for part in _batches(lengths, batch, random)):
            facts, questions, labels = zip(*(rows[n] for n in numbers), strict=True)
            read = tokenizer(
                list(facts), list(questions), padding=True, truncation=True, max_length=MAX_TOKENS, return_tensors="pt"
            ).to(network.device)
            with torch.autocast("cpu", torch.bfloat16, enabled=short):
                logits = network(**read).logits[:, 0].float()
            truth = torch.tensor(labels, device=logits.device)
            loss = torch.nn.functional.binary_cross_entropy_with_logits(logits, truth)
            optimiser.zero_grad()
            loss.backward()  # type: ignore[no-untyped-call]
            torch.nn.utils.clip_grad_norm_(learned, 1.0)
            optimiser.step()
            schedule.step()
            done, seen = done + 1, seen + loss.item()
            if done % 100 == 0:
                report(f"step {done} of {steps}: loss {seen / 100:.3f}")
                seen = 0.0
        network.eval()

    def save(self, folder: Path) -> None:
        self._model.save_pretrained(str(folder))


def _rows(asked: Sequence[Situation], random: np.random.Generator) -> list[tuple[str, str, float]]:
    """Fact, question and whether they match; of a question that matches none, only the nearest fact."""
    rows = []
    for each in asked:
        matches, others = np.flatnonzero(each.matches), np.flatnonzero(~each.matches)
        picked = [*matches, *random.permutation(others)[:OTHERS]] if len(matches) else others[:1]
        rows += [(each.candidates[n].text, each.question.text, float(each.matches[n])) for n in picked]
    return rows


def _batches(lengths: Sequence[int], batch: int, random: np.random.Generator) -> list[np.ndarray]:
    """Numbers of rows, all of them once."""
    order, batches = random.permutation(len(lengths)), []
    for start in range(0, len(order), batch * BLOCK):
        block = order[start : start + batch * BLOCK]
        alike = block[np.argsort([lengths[n] for n in block], kind="stable")]
        batches += np.split(alike, range(batch, len(alike), batch))
    return [batches[n] for n in random.permutation(len(batches))]


def _multiplies_short() -> bool:
    """Whether this CPU has instructions for products of bfloat16."""
    import torch

    able = torch.cpu.get_capabilities()
    return bool(able.get("avx512_bf16") or able.get("amx_bf16"))
