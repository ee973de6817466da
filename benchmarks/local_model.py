"""A model in this process: vLLM with polyhelm's op, for scripts that capture, steer and score thousands of texts.

Scores are read from the last layer's captured states, through the model's own final norm and unembedding: vLLM's
prompt log-probabilities would take the logits of every prompt token, most of the time with a vocabulary of 262,144.
They are compared with vLLM's own when a model is loaded. Import it before vllm, which it imports only then.
"""

from __future__ import annotations

import os
import uuid
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

os.environ |= {"POLYHELM_ENGINE": "1", "VLLM_ENABLE_V1_MULTIPROCESSING": "0", "VLLM_LOGGING_LEVEL": "ERROR"}

import numpy as np
import torch

from server.engine.capture import CaptureSpec
from server.engine.edits import Edit, Point, Program, layers_at
from server.engine.operands import pack
from server.engine.seams import CAPTURE, PROGRAM, RECEIPT
from server.engine.spans import Span
from server.engine.spool import joined

BATCH = 128
LOGIT_ROWS = 128
AGREEMENT = 0.1
"""Nats between vLLM's log-probabilities and these, in bfloat16, on average over PROOF's tokens."""
PROOF = "The tower was built in 1889, and it still stands by the river that crosses the city."


class Request(NamedTuple):
    """A prompt, and what is done to it. The last `scored` tokens' log-probabilities are wanted."""

    ids: list[int]
    scored: int
    edits: tuple[Edit, ...] = ()


class LocalModel:
    """With a prefix cache only where the last token's state is all that is read, or where a call is told to use it."""

    def __init__(
        self,
        folder: Path,
        points: Sequence[Point] = ("resid_post",),
        max_model_len: int = 512,
        kv_cache_mib: int = 256,
        block_size: int | None = None,
    ) -> None:
        os.environ["POLYHELM_POINTS"] = ",".join(dict.fromkeys(("resid_post", *points)))
        from vllm import LLM, SamplingParams

        self._params = SamplingParams
        self.llm: Any = LLM(
            str(folder),
            enforce_eager=True,
            max_model_len=max_model_len,
            max_num_seqs=32,
            max_num_batched_tokens=2048,
            kv_cache_memory_bytes=kv_cache_mib << 20,
            block_size=block_size,
            enable_prefix_caching=True,
            disable_log_stats=True,
            seed=0,
        )
        (self._described,) = self.llm.collective_rpc("polyhelm_describe")
        (self._model,) = self.llm.apply_model(lambda model: model)
        self.layers = int(self._described["layers"])
        self.name = folder.name
        self._prove()

    def width(self, point: Point) -> int:
        return int(self._described["points"][point]["width"])

    def encode(self, text: str, special: bool = True) -> list[int]:
        ids: list[int] = self.llm.get_tokenizer()(text, add_special_tokens=special)["input_ids"]
        return ids

    def last_states(self, texts: Sequence[str | list[int]], point: Point = "resid_post") -> np.ndarray:
        """float32 [texts, layers, width], at the last token."""
        return self.last_states_at(texts, (point,))[point]

    def last_states_at(self, texts: Sequence[str | list[int]], points: Sequence[Point]) -> dict[Point, np.ndarray]:
        """At several points, from one pass."""
        from server.engine.offline import activations

        rows: dict[Point, list[np.ndarray]] = {point: [] for point in points}
        for start in range(0, len(texts), BATCH):
            sites = {"points": list(points), "layers": None}
            found = activations(self.llm, list(texts[start : start + BATCH]), sites, "last", memory_bytes=1 << 30)
            for point in points:
                layers = [f"{point}.{layer}" for layer in layers_at(point, self.layers)]
                rows[point] += [np.stack([each[name][0] for name in layers]) for each in found]
        return {point: np.stack(each) for point, each in rows.items()}

    def upload(self, key: str, tensors: Mapping[int, Mapping[Any, np.ndarray]], point: Point = "resid_post") -> None:
        """Bring an operand, its tensors by layer and role, into the bank, as the server's uploader does."""
        operand = pack(tensors)
        core = self.llm.llm_engine.engine_core.engine_core
        (grant,) = core.polyhelm_reserve([[(key, point, operand.width, len(operand.data))]])
        if "uploads" not in grant:
            raise RuntimeError(f"{key}: no room in the bank, {grant}; raise POLYHELM_BANK_BYTES")
        serial = grant["uploads"][key]
        written = core.polyhelm_write(key, serial, 0, operand.data.astype("<f4").tobytes())
        bound = core.polyhelm_bind(key, serial, operand.pieces)
        if (written, bound) != ("written", "loaded"):
            raise RuntimeError(f"{key}: {written}, {bound}")

    def likeliest(self, requests: Sequence[Request], cached: bool = False) -> list[list[int]]:
        """For each request the likeliest token at the place of each of its last `scored`, given all before it.

        With `cached`, what requests have in common at their beginnings is computed once.
        """
        found = []
        for start in range(0, len(requests), BATCH):
            part = requests[start : start + BATCH]
            states = np.concatenate(self._states([(r.ids[:-1], r.scored, r.edits) for r in part], cached))
            tokens = np.concatenate([logits.argmax(1).numpy() for logits in self._logits(states)])
            found += [each.tolist() for each in np.split(tokens, np.cumsum([r.scored for r in part])[:-1])]
        return found

    def greedy(self, prompts: Sequence[list[int]], max_tokens: Sequence[int], stop: Sequence[str] = ()) -> list[str]:
        """What each prompt is continued with, unsteered, with at most so many tokens."""
        params = [self._params(max_tokens=most, temperature=0, stop=list(stop)) for most in max_tokens]
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids in prompts], params, use_tqdm=False)
        return [output.outputs[0].text for output in outputs]

    def log_probabilities(self, requests: Sequence[Request]) -> list[np.ndarray]:
        """Of each request's last `scored` tokens, given all before them."""
        found: list[np.ndarray] = []
        for start in range(0, len(requests), BATCH):
            part = requests[start : start + BATCH]
            states = self._states([(r.ids[:-1], r.scored, r.edits) for r in part])
            targets = np.concatenate([r.ids[-r.scored :] for r in part])
            values = self._scored(np.concatenate(states), targets)
            found += np.split(values, np.cumsum([r.scored for r in part])[:-1])
        return found

    def next_logits(self, requests: Sequence[tuple[list[int], tuple[Edit, ...]]], tokens: Sequence[int]) -> np.ndarray:
        """[requests, tokens]: of the token that follows each prompt, up to a constant of the prompt."""
        rows = []
        for start in range(0, len(requests), BATCH):
            part = requests[start : start + BATCH]
            states = np.concatenate(self._states([(ids, 1, edits) for ids, edits in part]))
            rows += [logits[:, list(tokens)].numpy() for logits in self._logits(states)]
        return np.concatenate(rows)

    def _states(
        self, wanted: Sequence[tuple[list[int], int, tuple[Edit, ...]]], cached: bool = False
    ) -> list[np.ndarray]:
        """The last layer's states [tokens, hidden] of the last so many tokens of each prompt, as steered."""
        site = ("resid_post", self.layers - 1)
        names = [uuid.uuid4().hex for _ in wanted]
        params = []
        for name, (_, count, edits) in zip(names, wanted, strict=True):
            span = Span(prompt=False, generation=False, prompt_window=(-count, None))
            extra = {CAPTURE: CaptureSpec((site,), span, "rows", memory_bytes=1 << 30).wire, RECEIPT: name.encode()}
            if edits:
                extra[PROGRAM] = Program(edits).wire
            params.append(
                self._params(
                    max_tokens=1,
                    temperature=0,
                    detokenize=False,
                    extra_args=extra,
                    skip_reading_prefix_cache=count > 1 and not cached,
                )
            )
        outputs = self.llm.generate([{"prompt_token_ids": ids} for ids, _, _ in wanted], params, use_tqdm=False)
        self._check_touched([name for name, (_, _, edits) in zip(names, wanted, strict=True) if edits])
        rows = []
        for name, output, each in zip(names, outputs, wanted, strict=True):
            ids, count, _ = each
            answers = self.llm.collective_rpc("polyhelm_captured", args=(name, count))
            if output.num_cached_tokens > len(ids) - count:
                # The cache has keys and values, and no states: rows that came from it are missing.
                rows += self._states([each])
                continue
            rows.append(joined(answers, self._described["points"])["{}.{}".format(*site)].numpy())
        return rows

    def _check_touched(self, names: list[str]) -> None:
        """A score of a program that did nothing would be worth nothing."""
        (receipts,) = self.llm.collective_rpc("polyhelm_receipts", args=(names,))
        for receipt in receipts:
            if receipt is None or any(not all(edit) for edit in receipt["touched"]):
                raise RuntimeError(f"an edit touched no token: {receipt}")

    def _logits(self, states: np.ndarray) -> Any:
        with torch.inference_mode():
            for start in range(0, len(states), LOGIT_ROWS):
                rows = torch.from_numpy(states[start : start + LOGIT_ROWS]).to(torch.bfloat16)
                yield self._model.compute_logits(self._model.model.norm(rows)).float()

    def _scored(self, states: np.ndarray, targets: np.ndarray) -> np.ndarray:
        rows = []
        for index, logits in enumerate(self._logits(states)):
            wanted = torch.from_numpy(targets[index * LOGIT_ROWS :][: len(logits)].astype(np.int64))
            rows.append((logits.gather(1, wanted[:, None])[:, 0] - logits.logsumexp(1)).numpy())
        return np.concatenate(rows)

    def _prove(self) -> None:
        ids = self.encode(PROOF)
        params = self._params(max_tokens=1, temperature=0, prompt_logprobs=0)
        (output,) = self.llm.generate([{"prompt_token_ids": ids}], params, use_tqdm=False)
        table = zip(output.prompt_logprobs[1:], ids[1:], strict=True)
        theirs = np.array([row[token].logprob for row, token in table])
        (ours,) = self.log_probabilities([Request(ids, len(ids) - 1)])
        if not (difference := float(np.abs(theirs - ours).mean())) < AGREEMENT:
            raise RuntimeError(f"these log-probabilities differ from vLLM's by {difference:.3f} nats a token")
