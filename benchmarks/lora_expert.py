"""An expert that differs from its target by a LoRA (Hu et al. 2022) only, trained on a CPU in minutes.

W x becomes W x + (scale / rank) B A x for the query and value projections of all layers, B starting at 0. The trained
matrices are merged into the weights, so that vLLM serves the expert like any model.
"""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

RANK, SCALE, LEARNING_RATE = 16, 32, 2e-3
BATCH, LENGTH, SEED = 4, 32, 0


class Adapted(torch.nn.Module):
    """A frozen linear layer with a trainable change of low rank."""

    def __init__(self, base: torch.nn.Linear) -> None:
        super().__init__()
        self.base = base.requires_grad_(False)
        self.down = torch.nn.Parameter(torch.randn(RANK, base.in_features) / base.in_features**0.5)
        self.up = torch.nn.Parameter(torch.zeros(base.out_features, RANK))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        changed: torch.Tensor = self.base(x) + (SCALE / RANK) * (x @ self.down.T @ self.up.T)
        return changed

    def merge(self) -> torch.nn.Linear:
        with torch.no_grad():
            self.base.weight += (SCALE / RANK) * self.up @ self.down
        return self.base


def train(model: Path, texts: list[str], steps: int, out: Path) -> dict[str, Any]:
    """Writes the merged model to `out`; the mean loss of the first and last tenth of the steps, nats a token."""
    torch.manual_seed(SEED)
    rng = np.random.default_rng(SEED)
    tokenizer = AutoTokenizer.from_pretrained(model)
    lm = AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).requires_grad_(False)
    adapted = []
    for layer in lm.model.layers:
        for name in ("q_proj", "v_proj"):
            made = Adapted(getattr(layer.self_attn, name))
            setattr(layer.self_attn, name, made)
            adapted.append((layer.self_attn, name, made))
    stream = np.concatenate([tokenizer(f"{text}\n")["input_ids"] for text in texts])
    weights = [parameter for _, _, made in adapted for parameter in (made.down, made.up)]
    optimizer, losses = torch.optim.AdamW(weights, lr=LEARNING_RATE), []
    for step in range(steps):
        starts = rng.integers(0, len(stream) - LENGTH, BATCH)
        ids = torch.from_numpy(np.stack([stream[start : start + LENGTH] for start in starts]))
        loss = lm(input_ids=ids, labels=ids).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
        if step % 20 == 0:
            print(f"LoRA step {step} of {steps}: {losses[-1]:.2f}", flush=True)
    for parent, name, made in adapted:
        setattr(parent, name, made.merge())
    lm.to(torch.bfloat16).save_pretrained(out)
    for file in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copyfile(model / file, out / file)
    tenth = max(1, steps // 10)
    return {
        "rank": RANK,
        "steps": steps,
        "tokens": steps * BATCH * LENGTH,
        "loss_first": float(np.mean(losses[:tenth])),
        "loss_last": float(np.mean(losses[-tenth:])),
    }
